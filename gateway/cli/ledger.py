"""What the `costs` commands share: the ledger of a configuration, opened for one command, and who gives the command.

Whatever goes wrong with it is said in words, and is exit status 1.
"""

import getpass
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from gateway.cli.options import configured, fail, load_or_exit
from gateway.config import Loaded
from gateway.decide.plan import Plan
from gateway.domain.errors import Refused
from gateway.domain.spans import Span, read_instant, read_span

if TYPE_CHECKING:
    from gateway.edge.alerts import Alerts
    from gateway.store.ledger import Ledger
    from gateway.store.store import Stop

Command = Callable[..., Any]
clock = time.time


class Chosen(NamedTuple):
    """Which configuration is meant."""

    config: Path
    policies: Path
    env: str | None

    def load(self) -> Loaded:
        """What is in force, or its problems and exit 1."""
        return load_or_exit(*self, want_secrets=False)


class Desk(NamedTuple):
    """An open ledger, and the plan by which it is read."""

    loaded: Loaded
    ledger: "Ledger"
    now_s: float

    @property
    def plan(self) -> Plan:
        """What is in force."""
        return self.loaded.plan

    @property
    def env(self) -> str:
        """The environment all of it is about."""
        return self.loaded.env

    @property
    def now_ms(self) -> int:
        """The moment the command was given."""
        return int(self.now_s * 1000)


@contextmanager
def desk(chosen: Chosen, *, is_new_allowed: bool = False) -> Iterator[Desk]:
    """The ledger, open. Without `is_new_allowed` there must be one already."""
    # Imported by those who open a ledger, so that `gateway --help` and `gateway ping` stay quick.
    from gateway.store.ledger import Ledger
    from gateway.store.store import StoreError
    from gateway.treasury import ledger_path

    loaded = chosen.load()
    try:
        with Ledger(ledger_path(loaded.settings), clock=clock, is_new_allowed=is_new_allowed) as ledger:
            yield Desk(loaded, ledger, clock())
    except StoreError as error:
        fail(str(error))
    except Refused as refused:
        fail(refused.message)


def tell_stop(opened: Desk, stop: "Stop", *, is_lifted: bool = False) -> None:
    """Tell Slack of a kill switch."""
    tell_slack(opened.loaded, lambda alerts: alerts.told_stop(stop, is_lifted=is_lifted))


def tell_slack(loaded: Loaded, what: Callable[["Alerts"], None]) -> None:
    """Tell Slack, where the policy has a webhook: gateways see in the store what was done here, and tell nobody."""
    import asyncio

    from gateway.edge.alerts import Alerts

    alerting = loaded.policy.alerting
    if not (alerting.enabled and alerting.slack_webhook):
        return

    async def tell() -> None:
        alerts = Alerts(alerting, env=loaded.env)
        what(alerts)
        await alerts.close()
        if not alerts.sent:
            click.echo("Slack could not be told.", err=True)

    asyncio.run(tell())


def for_configuration(command: Command) -> Command:
    """The options of `configured`, handed to the command as one `chosen`."""

    def chosen(config: Path, policies: Path, env: str | None, **others: Any) -> Any:
        return command(chosen=Chosen(config, policies, env), **others)

    # The options and the help text that the command has already.
    chosen.__doc__, chosen.__name__ = command.__doc__, command.__name__
    chosen.__click_params__ = getattr(command, "__click_params__", [])  # type: ignore[attr-defined]
    return configured(chosen)


def signed(command: Command) -> Command:
    """The option that says who did it."""
    return click.option("--who", default=login_name, show_default="your login name", help="For the audit log.")(command)


def login_name() -> str:
    """The user of the operating system; in a container it may have a number only."""
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):
        return f"uid {os.getuid()}"


def span_or_exit(since: str, until: str, now_ms: int) -> Span:
    """The time that was asked for; what cannot be read is exit status 2, like any wrong option."""
    try:
        read_instant(since, now_ms)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--since") from None
    try:
        return read_span(since, until, now_ms)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--until") from None


def say(*lines: str) -> None:
    """For people, on stdout."""
    for line in lines:
        click.echo(line)


note = partial(click.echo, err=True)


def is_terminal() -> bool:
    """Whether somebody looks on while it works."""
    return sys.stderr.isatty()
