"""The `gateway` command. Reads arguments, calls the floors below, prints for people; decides nothing.

What only one command needs is imported inside it, so that `gateway --help` and `gateway ping` stay quick.
"""

import errno
import secrets
import signal
import sys
import time
from hashlib import sha256
from pathlib import Path
from typing import Any

import click

from gateway import __version__
from gateway.cli.costs import costs
from gateway.cli.health import health, ping
from gateway.cli.options import configured, fail, load_or_exit
from gateway.cli.prices import prices
from gateway.cli.replay import replay
from gateway.cli.report import report
from gateway.cli.rollout import rollout
from gateway.config import (
    ConfigError,
    Loaded,
    Paths,
    chosen_environment,
    effective,
    environments,
    format_problems,
    load,
    look_up,
    missing_variables,
)
from gateway.decide.plan import Plan
from gateway.domain.names import NAME, is_name
from gateway.domain.reading import Problem
from gateway.domain.settings import Settings
from gateway.store.price_map import load_price_map


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="gateway")
def main() -> None:
    """Genesis Gateway, one small process beside your agents.

    It picks the model that answers, sees that an answer comes, keeps the bill under its cap and records every call.

    Start with `gateway serve`, then point any OpenAI SDK at http://127.0.0.1:8080/v1.
    """


main.add_command(costs)
main.add_command(health)
main.add_command(ping)
main.add_command(prices)
main.add_command(replay)
main.add_command(report)
main.add_command(rollout)


@main.command()
@configured
def serve(config: Path, policies: Path, env: str | None) -> None:
    """Serve until SIGTERM or Ctrl-C.

    The configuration is read again on SIGHUP and when its files change; one with a problem is refused, and the last
    good one stays.
    """
    # First of all: what asks for a reload before the files were read asks for nothing, and is no reason to die.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    from gateway.app import serve as run
    from gateway.telemetry.logs import set_up_logs

    loaded = load_or_exit(config, policies, env)
    set_up_logs(loaded.settings.log.format, loaded.policy.log.level)

    def load_again(started: Settings) -> Loaded:
        return load(loaded.paths, loaded.env, litellm_map=load_price_map(), started=started)

    try:
        run_loop(run(loaded, load_again, announce))
    except (OSError, RuntimeError) as error:
        is_taken = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
        fail(f"cannot serve: {error}{'; [server] in config.toml can name another' if is_taken else ''}")


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
    click.echo(f"  admin   {gateway.admin.url}   (/health /metrics /livez /readyz /admin/explain /admin/config)")
    serving = {
        target.kind
        for agent in plan.agents.values()
        for target in (*agent.baseline, *(agent.finetuned if plan.use_finetuned else ()))
    }
    if serving == {"simulator"}:
        click.echo("  answers come from the built-in SIMULATOR: no key, no cost, no real model")
        click.echo("  for real models: MISTRAL_API_KEY=... GATEWAY_ENV=production make run")
    body = '{"model": "auto", "messages": [{"role": "user", "content": "Where is my order?"}]}'
    click.echo(f"  try     curl {gateway.data.url}/v1/chat/completions -d '{body}'")


@main.command()
@configured
def check(config: Path, policies: Path, env: str | None) -> None:
    """Check config.toml and the policy of every environment.

    Exit status 1 where there is a problem.
    """
    paths = Paths(config, policies)
    chosen = chosen_environment(env)
    names = environments(policies)
    if chosen not in names:
        names.append(chosen)  # Loading it says what is wrong with it, in the words `serve` would use.
    prices = load_price_map()
    # A problem of config.toml is one of every environment, and is told once.
    problems: dict[Problem, None] = {}
    for name in names:
        try:
            # Another environment's secrets need not be on this machine; the chosen one's must.
            loaded = load(paths, name, litellm_map=prices, want_secrets=name == chosen)
        except ConfigError as error:
            problems |= dict.fromkeys(error.problems)
            continue
        missing = missing_variables(paths, name, loaded)
        note = f"   (to serve it, set {', '.join(missing)})" if missing else ""
        click.echo(f"{policies / name}.toml: ok{note}")
        for line in (*unpriced(loaded), *resting(loaded)):
            click.echo(f"  note: {line}")
    if problems:
        fail(format_problems(list(problems)))


def unpriced(loaded: Loaded) -> list[str]:
    """What a person should know of a plan that is valid: models without a price under a cap in dollars."""
    plan = loaded.plan
    if not plan.is_capped:
        return []
    targets = {target for agent in plan.agents.values() for target in (*agent.finetuned, *agent.baseline)}
    return [
        f"{target.ref} has no price, and a cap in dollars applies: calls to it are refused"
        for target in sorted(targets)
        if target.price is None
    ]


def resting(loaded: Loaded) -> list[str]:
    """What a policy asks for and does not get, as the fine-tuned models are switched off."""
    policy = loaded.policy
    if policy.models.use_finetuned:
        return []
    asked = {"ab_testing": policy.ab_testing.enabled, "shadow": policy.shadow.is_on}
    return [f"[{name}] rests while models.use_finetuned is false" for name, is_asked in asked.items() if is_asked]


@main.group("config")
def config_group() -> None:
    """Show the effective configuration."""


@config_group.command("show")
@configured
def config_show(config: Path, policies: Path, env: str | None) -> None:
    """Print everything that is in force, as TOML, secrets masked."""
    click.echo(to_toml(effective(load_or_exit(config, policies, env, want_secrets=False))), nl=False)


def to_toml(table: dict[str, Any]) -> str:
    """A table as TOML text."""
    import msgspec
    import toml

    def quoted(text: str) -> str:
        # toml's own way with text breaks on backslashes; a JSON string is a TOML string, but for DEL.
        return msgspec.json.encode(text).decode().replace("\x7f", "\\u007f")

    encoder = toml.TomlEncoder()
    encoder.dump_funcs[str] = quoted
    return toml.dumps(table, encoder)


@config_group.command("get")
@click.argument("key")
@configured
def config_get(key: str, config: Path, policies: Path, env: str | None) -> None:
    """Print one value, such as models.use_finetuned.

    The policy is asked before config.toml: models.use_finetuned, caps[0].usd, server.data, agents.qa_agent.baseline.
    """
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
    """Say what would happen to a message, and why.

    Nobody is called. The share is the one in force, as the store has it. Exit status 1 where the call would be refused.
    """
    import msgspec

    from gateway.decide.explain import explain as explain_call
    from gateway.decide.identify import Caller
    from gateway.domain.errors import GatewayError
    from gateway.domain.wire import read_chat

    loaded = load_or_exit(config, policies, env, want_secrets=False)
    request: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": text}]}
    if user is not None:
        request["user"] = user
    named = dict(map(split_header, headers))
    try:
        body = read_chat(msgspec.json.encode(request))
        found = explain_call(with_rollouts(loaded), named, body, Caller("", (), is_trusted=True), now_s=time.time())
    except GatewayError as error:
        fail(f"refused: {error.status} {error.code}: {error.message}")
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(found)).decode())
        return
    share = f"share {found.share_percent:g} %"
    if found.variant_from == "experiment" and found.share_from == "policy":
        share += ", where the policy starts a rollout: no gateway has begun it here"
    arm = f"bucket {found.bucket} of 10000, {share}" if found.bucket is not None else "no user"
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


def with_rollouts(loaded: Loaded) -> Plan:
    """The plan at the shares where the rollouts stand, where there is a store that tells."""
    from gateway.store.experiments import Experiments
    from gateway.store.store import StoreError
    from gateway.treasury import ledger_path

    path = ledger_path(loaded.settings)
    if not loaded.plan.is_experiment or not path.exists():
        return loaded.plan
    try:
        with Experiments(path, clock=time.time, is_new_allowed=False) as experiments:
            return loaded.plan.with_rollouts(experiments.states(loaded.env))
    except StoreError as error:
        click.echo(f"the policy's shares are shown: {error}", err=True)
        return loaded.plan


def split_header(header: str) -> tuple[str, str]:
    """A header as it is written on a command line, in its two halves."""
    name, colon, value = header.partition(":")
    if not colon or not name.strip():
        raise click.BadParameter(f"{header!r} is not NAME:VALUE", param_hint="--header")
    return name.strip().lower(), value.strip()


@main.group()
def keys() -> None:
    """Keys for callers."""


@keys.command("new")
@click.option("--name", required=True, help="How the key is called in records and caps.")
@click.option("--agent", "agents", multiple=True, help="An agent it may use; repeatable; all by default.")
def keys_new(name: str, agents: tuple[str, ...]) -> None:
    """Make a key, and the policy entry that knows only its hash.

    The key is shown this once and kept nowhere.
    """
    for value, option in ((name, "--name"), *((agent, "--agent") for agent in agents)):
        if not is_name(value):
            raise click.BadParameter(f"{value!r} is no name; use {NAME}", param_hint=option)
    key = f"gw-{secrets.token_urlsafe(32)}"
    entry: dict[str, Any] = {"name": name, "sha256": sha256(key.encode()).hexdigest()}
    if agents:
        entry["agents"] = list(agents)
    click.echo(f"The key, shown this once: {key}\n\nInto policies/<environment>.toml:\n")
    click.echo(to_toml({"keys": [entry]}), nl=False)


@main.command()
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0: any free one.")
def simulator(port: int) -> None:
    """Serve the built-in simulator alone, until Ctrl-C.

    It speaks OpenAI's API, and misbehaves where the model is named `fault:...`.
    """
    import asyncio

    from gateway.domain.settings import SimulatorSettings
    from gateway.simulator.server import Simulator

    async def run() -> None:
        running = await Simulator.start(SimulatorSettings(), port=port)
        click.echo(f"simulator at {running.base_url}")
        await asyncio.Event().wait()

    try:
        run_loop(run())
    except OSError as error:
        fail(f"cannot serve: {error}")


@main.command()
@click.option("--users", default=200, show_default=True, type=click.IntRange(1, 10_000))
@click.option(
    "--questions", type=click.Path(path_type=Path), default=Path("tests/data/mt_bench_questions.jsonl"),
    show_default=True, help="A JSONL file of questions with their turns.",
)  # fmt: skip
@click.option("--share", type=click.FloatRange(0, 100), help="Percent of users for the fine-tuned model; else policy.")
@click.option("--quick", is_flag=True, help="Eight questions and ten users, in a few seconds.")
@click.option("--config", type=click.Path(path_type=Path), default=Path("config.toml"), show_default=True)
@click.option("--policies", type=click.Path(path_type=Path), default=Path("policies"), show_default=True)
@click.option("--env", default="production", show_default=True)
def demo(users: int, questions: Path, share: float | None, quick: bool, config: Path, policies: Path, env: str) -> None:
    """Ask MT-bench's questions through a gateway on the simulator, and check what everybody tells of it."""
    import asyncio
    import signal

    from gateway.lab import demo as lab
    from gateway.lab.callers import SdkMissing
    from gateway.lab.questions import read_questions
    from gateway.lab.trial_gateway import TrialFailed, read_tables

    load_or_exit(config, policies, env, want_secrets=False)
    try:
        asked = read_questions(questions)
        order = lab.Order(read_tables(config, policies, env), asked, users, share)
        if quick:
            order = order._replace(questions=lab.quick(asked), users=lab.QUICK_USERS)
        ended_well: list[bool] = []

        async def run() -> None:
            task = asyncio.current_task()
            if task is not None:
                # As Ctrl-C does, so that the gateway it started is taken down with it.
                asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
            ended_well.append(await lab.run_demo(order, lab.console()))

        run_loop(run())
    except (OSError, ValueError, SdkMissing, TrialFailed) as error:
        fail(str(error))
    except asyncio.CancelledError:
        fail("stopped")
    sys.exit(0 if ended_well == [True] else 1)
