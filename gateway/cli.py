"""The `gateway` command. Reads arguments, calls the floors below, prints for people; decides nothing.

What only one command needs is imported inside it, so that `gateway --help` and `gateway ping` stay quick.
"""

import secrets
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any, NoReturn

import click

from gateway import __version__
from gateway.config import (
    ConfigError,
    Loaded,
    Paths,
    chosen_environment,
    effective,
    environments,
    load,
    look_up,
    missing_variables,
)
from gateway.store.price_map import load_price_map

Command = Callable[..., Any]


def configured(command: Command) -> Command:
    """The options that say which configuration is meant."""
    options = (
        click.option("--config", type=click.Path(path_type=Path), default=Path("config.toml"), show_default=True),
        click.option("--policies", type=click.Path(path_type=Path), default=Path("policies"), show_default=True),
        click.option("--env", help="Environment; else GATEWAY_ENV, GENESIS_ENV, dev."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def load_or_exit(config: Path, policies: Path, env: str | None, *, want_secrets: bool = True) -> Loaded:
    """The configuration, or its problems on the terminal and exit 1."""
    paths = Paths(config, policies)
    try:
        return load(paths, chosen_environment(env), litellm_map=load_price_map(), want_secrets=want_secrets)
    except ConfigError as error:
        fail(str(error))


def fail(message: str) -> NoReturn:
    """Say why on stderr, and exit 1."""
    click.echo(message, err=True)
    sys.exit(1)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="gateway")
def main() -> None:
    """A sidecar LLM gateway: which model answers, that one does, what it costs, and a record of every call.

    Start with `gateway serve`, then point any OpenAI SDK at http://127.0.0.1:8080/v1.
    """


@main.command()
@configured
def serve(config: Path, policies: Path, env: str | None) -> None:
    """Serve until SIGTERM; reload on SIGHUP and when the files change."""
    from gateway.app import serve as run
    from gateway.edge.logs import set_up_logs

    loaded = load_or_exit(config, policies, env)
    set_up_logs(loaded.settings.log.format, loaded.policy.log.level)

    def load_again() -> Loaded:
        return load(loaded.paths, loaded.env, litellm_map=load_price_map())

    try:
        run_loop(run(loaded, load_again, announce))
    except (OSError, RuntimeError) as error:
        fail(f"cannot serve: {error}")


def run_loop(main_task: Any) -> None:
    """Run to the end, on uvloop where there is one."""
    try:
        import uvloop
    except ImportError:  # Windows has none; asyncio's own loop serves as well, only slower.
        import asyncio

        asyncio.run(main_task)
    else:
        uvloop.run(main_task)


def announce(gateway: Any) -> None:
    """Tell the person at the terminal what runs and how to try it."""
    plan = gateway.runtime.plan
    click.echo(f"Genesis Gateway {__version__}, environment {plan.env}")
    click.echo(f"  agents  {gateway.data.url}/v1   (models: auto, {', '.join(plan.agents)})")
    click.echo(f"  admin   {gateway.admin.url}   (/metrics /livez /readyz /admin/explain /admin/config)")
    serving = {target.kind for agent in plan.agents.values() for target in (*agent.baseline, *agent.finetuned)}
    if serving == {"simulator"}:
        click.echo("  answers come from the built-in SIMULATOR: no key, no cost, no real model")
        click.echo("  for real models: MISTRAL_API_KEY=... GATEWAY_ENV=production make run")
    body = '{"model": "auto", "messages": [{"role": "user", "content": "Where is my order?"}]}'
    click.echo(f"  try     curl {gateway.data.url}/v1/chat/completions -d '{body}'")


@main.command()
@configured
def check(config: Path, policies: Path, env: str | None) -> None:
    """Validate config.toml and every environment's policy; exit 1 on any problem."""
    paths = Paths(config, policies)
    chosen = chosen_environment(env)
    names = environments(policies)
    if chosen not in names:
        names.append(chosen)  # Loading it says what is wrong with it, in the words `serve` would use.
    prices = load_price_map()
    failed = False
    for name in names:
        try:
            # Another environment's secrets need not be on this machine; the chosen one's must.
            loaded = load(paths, name, litellm_map=prices, want_secrets=name == chosen)
        except ConfigError as error:
            failed = True
            click.echo(f"{name}:\n{error}", err=True)
            continue
        missing = missing_variables(paths, name, loaded)
        note = f"   (to serve it, set {', '.join(missing)})" if missing else ""
        click.echo(f"{policies / name}.toml: ok{note}")
        for line in unpriced(loaded):
            click.echo(f"  note: {line}")
    sys.exit(1 if failed else 0)


def unpriced(loaded: Loaded) -> list[str]:
    """What a person should know of a plan that is valid: models without a price under a cap in dollars."""
    plan = loaded.plan
    if not any(cap.usd is not None for cap in plan.caps):
        return []
    targets = {target for agent in plan.agents.values() for target in (*agent.finetuned, *agent.baseline)}
    return [
        f"{target.ref} has no price, and a cap in dollars applies: calls to it are refused"
        for target in sorted(targets)
        if target.price is None
    ]


@main.group("config")
def config_group() -> None:
    """Show the effective configuration."""


@config_group.command("show")
@configured
def config_show(config: Path, policies: Path, env: str | None) -> None:
    """Print everything that is in force, as TOML, secrets masked."""
    import toml

    click.echo(toml.dumps(effective(load_or_exit(config, policies, env, want_secrets=False))), nl=False)


@config_group.command("get")
@click.argument("key")
@configured
def config_get(key: str, config: Path, policies: Path, env: str | None) -> None:
    """Print one value, such as models.use_finetuned or server.data; the policy is asked before config.toml."""
    import msgspec

    try:
        value = look_up(load_or_exit(config, policies, env, want_secrets=False), key)
    except KeyError as error:
        fail(error.args[0])
    click.echo(value if isinstance(value, str) else msgspec.json.encode(value).decode())


@main.command()
@click.option("--model", default="auto", show_default=True, help="What the caller would put into `model`.")
@click.option("--user", help="The caller's user id.")
@click.option("--header", "headers", multiple=True, metavar="NAME:VALUE", help="A request header; repeatable.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@click.argument("text")
@configured
def explain(
    model: str, user: str | None, headers: tuple[str, ...], as_json: bool, text: str,
    config: Path, policies: Path, env: str | None,
) -> None:  # fmt: skip
    """Say what would happen to a message, and why, without calling anyone."""
    import time

    import msgspec

    from gateway.decide.explain import explain as explain_call
    from gateway.decide.identify import Caller
    from gateway.domain.errors import GatewayError
    from gateway.domain.wire import read_chat

    loaded = load_or_exit(config, policies, env, want_secrets=False)
    request: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": text}]}
    if user is not None:
        request["user"] = user
    named = {name.strip().lower(): value.strip() for name, _, value in (header.partition(":") for header in headers)}
    try:
        body = read_chat(msgspec.json.encode(request))
        found = explain_call(loaded.plan, named, body, Caller("", (), is_trusted=True), now_s=time.time())
    except GatewayError as error:
        fail(f"refused: {error.status} {error.code}: {error.message}")
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(found)).decode())
        return
    arm = f"bucket {found.bucket} of 10000, share {found.share_percent:g} %" if found.bucket is not None else "no user"
    rule = f"rule {found.rule!r}: " if found.rule else ""
    click.echo(f"environment  {found.env}")
    click.echo(f"agent        {found.agent}   ({rule}{found.why})")
    click.echo(f"variant      {found.variant}   ({found.variant_from}; {arm})")
    for place, link in enumerate(found.chain, start=1):
        limit = f"at most {link.at_most_usd} usd" if link.at_most_usd is not None else "no bound"
        click.echo(f"chain {place}      {link.model} at {link.upstream}   ({link.price}; {limit})")
        if link.fields_dropped:
            click.echo(f"             drops {', '.join(link.fields_dropped)}")
    click.echo(f"caps         {'; '.join(found.caps) or 'none'}")
    click.echo(f"sent         {msgspec.json.encode(found.sent).decode()}")


@main.group()
def keys() -> None:
    """Keys for callers."""


@keys.command("new")
@click.option("--name", required=True, help="How the key is called in records and caps.")
@click.option("--agent", "agents", multiple=True, help="An agent it may use; repeatable; all by default.")
def keys_new(name: str, agents: tuple[str, ...]) -> None:
    """Make a key: it is shown once, and the policy entry that knows only its hash."""
    import toml

    key = f"gw-{secrets.token_urlsafe(32)}"
    entry: dict[str, Any] = {"name": name, "sha256": sha256(key.encode()).hexdigest()}
    if agents:
        entry["agents"] = list(agents)
    click.echo(f"The key, shown this once: {key}\n\nInto policies/<environment>.toml:\n")
    click.echo(toml.dumps({"keys": [entry]}), nl=False)


@main.command()
@click.option("--url", default="", help="The admin listener; default: server.admin of the configuration.")
@configured
def ping(url: str, config: Path, policies: Path, env: str | None) -> None:
    """Exit 0 if a gateway on this machine is alive; for a container's health check."""
    from urllib.error import URLError
    from urllib.request import urlopen

    if not url:
        loaded = load_or_exit(config, policies, env, want_secrets=False)
        address = loaded.settings.server.admin
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(address.host, address.host)
        url = f"http://{host}:{address.port}"
    try:
        with urlopen(f"{url}/livez", timeout=3) as reply:  # noqa: S310
            click.echo(f"{url} {reply.status}")
    except (URLError, OSError, ValueError) as error:
        fail(f"{url}: {error}")


@main.command()
@click.option("--port", default=8000, show_default=True)
def simulator(port: int) -> None:
    """Serve the built-in OpenAI-compatible simulator by itself, until Ctrl-C."""
    import asyncio

    from gateway.domain.simulated import SimulatorSettings
    from gateway.edge.simulator import Simulator

    async def run() -> None:
        running = await Simulator.start(SimulatorSettings(), port=port)
        click.echo(f"simulator at {running.base_url}")
        await asyncio.Event().wait()

    run_loop(run())
