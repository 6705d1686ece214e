"""`gateway ping` and `gateway health`: ask the gateway of this machine whether it lives, and how its models are.

Both go to the admin listener, without any key or token: neither is wanted there.
"""

import sys
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from gateway.cli.options import configured, fail, load_or_exit

if TYPE_CHECKING:
    from rich.text import Text

_PING_S = 3.0
# A look at providers that are silent takes two of their timeouts.
_HEALTH_S = 60.0
_STYLES = {
    "healthy": "green", "ok": "green", "OK": "green", "slow": "yellow", "SLOW": "yellow", "degraded": "yellow",
    "error": "red", "ERROR": "red",
}  # fmt: skip


class _NoGateway(Exception):
    """Nobody is there, or not a gateway; says which."""


@click.command()
@click.option("--url", default="", help="The admin listener; default: server.admin of the configuration.")
@configured
def ping(url: str, config: Path, policies: Path, env: str | None) -> None:
    """Tell whether a gateway on this machine is alive.

    Exit status 0 if it is, 1 if not: made for a container's health check.
    """
    url = url or _admin_url(config, policies, env)
    try:
        status, _ = _get(url, "/livez", _PING_S)
    except _NoGateway as error:
        fail(str(error))
    if status != 200:
        fail(f"{url} does not answer as a gateway should: HTTP status {status}")
    click.echo(f"{url} is alive ({status})")


@click.command()
@click.option("--url", default="", help="The admin listener; default: server.admin of the configuration.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@configured
def health(url: str, as_json: bool, config: Path, policies: Path, env: str | None) -> None:
    """Tell how the agents and their models are.

    The running gateway judges by recent calls, and asks the providers whether they still have the models; no tokens
    are spent. Exit status 0: healthy, 1: degraded or in error, 2: no gateway there.
    """
    url = url or _admin_url(config, policies, env)
    try:
        _, body = _get(url, "/health", _HEALTH_S)
        found = _read(url, body)
    except _NoGateway as error:
        click.echo(str(error), err=True)
        sys.exit(2)
    if as_json:
        click.echo(msgspec.json.format(body).decode())
    else:
        _show(url, found)
    sys.exit(0 if found["status"] == "healthy" else 1)


def _admin_url(config: Path, policies: Path, env: str | None) -> str:
    address = load_or_exit(config, policies, env, want_secrets=False).settings.server.admin
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(address.host, address.host)
    return f"http://{host}:{address.port}"


def _get(url: str, path: str, timeout_s: float) -> tuple[int, bytes]:
    """The status and the body, whatever the status. Raises `_NoGateway`."""
    from urllib.error import HTTPError
    from urllib.request import ProxyHandler, build_opener

    if not url.startswith(("http://", "https://")):
        raise click.BadParameter(f"{url!r} does not begin with http:// or https://", param_hint="--url")
    # What is on this machine is not asked for by way of a proxy, whatever the environment says.
    opener = build_opener(ProxyHandler({}))
    said = f"{url} does not answer as a gateway should"
    try:
        try:
            reply = opener.open(f"{url.rstrip('/')}{path}", timeout=timeout_s)
        except HTTPError as error:
            # An answer like any other: 503 says how things stand, too.
            reply = error
        with reply:
            return reply.status, reply.read()
    except HTTPException:
        raise _NoGateway(f"{said}: it speaks no HTTP") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise _NoGateway(f"{said}: {getattr(reason, 'strerror', None) or reason}") from None


def _read(url: str, body: bytes) -> dict[str, Any]:
    try:
        found = msgspec.json.decode(body, type=dict[str, Any])
        if isinstance(found["status"], str) and isinstance(found["agents"], dict) and isinstance(found["models"], dict):
            return found
    except (msgspec.DecodeError, KeyError):
        pass
    raise _NoGateway(f"{url} does not answer as a gateway should: what it says of its health makes no sense")


def _show(url: str, found: dict[str, Any]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    from gateway.lab.cost_tables import console

    screen = console()
    screen.print(Text.assemble(f"{url}, environment {found['environment']}: ", _coloured(found["status"])))
    agents = Table("agent", "status", "why", box=SIMPLE_HEAD)
    for name, agent in found["agents"].items():
        agents.add_row(Text(name), _coloured(agent["status"]), Text(agent["reason"], overflow="fold"))
    models = Table("model", "verdict", "from", "age", "why", "withdrawn", box=SIMPLE_HEAD)
    for ref, model in found["models"].items():
        models.add_row(
            Text(ref, overflow="fold"),
            _coloured(model["verdict"]),
            Text(model["evidence"]),
            Text("–" if model["age_s"] is None else f"{model['age_s']:.0f} s"),
            Text(model["reason"], overflow="fold"),
            Text("" if model["retires_at"] is None else f"{model['retires_at'][:10]}, in {model['retires_in_days']} d"),
        )
    screen.print(agents)
    screen.print(models)


def _coloured(word: str) -> "Text":
    from rich.text import Text

    return Text(word, style=_STYLES.get(word, ""))
