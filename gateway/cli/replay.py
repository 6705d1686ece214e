"""`gateway replay`: what another policy would have made of the calls that were recorded. Prints; decides nothing.

It reads the journal, with a gateway that writes it or without; it writes nothing and calls nobody.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click
import msgspec

from gateway.cli import ledger
from gateway.cli.ledger import Chosen, for_configuration, is_terminal, note, say, span_or_exit
from gateway.cli.options import share_or_exit
from gateway.config import ConfigError, Loaded, Paths, chosen_environment, load
from gateway.decide.plan import RAW_AGENT
from gateway.domain.reading import nearest
from gateway.domain.rollout_policy import bps_of
from gateway.domain.words import counted
from gateway.store.price_map import load_price_map

if TYPE_CHECKING:
    from gateway.lab.replay import Tell

_BAD_INPUT = 2
_FILE = click.Path(path_type=Path, dir_okay=False)


@click.command()
@click.option("--policy", required=True, type=_FILE, help="The policy to try, such as policies/production.toml.")
@click.option("--since", default="24h", show_default=True, help="24h, 7d, today, 2026-11-01, an ISO time.")
@click.option("--until", default="", help="Likewise; default: now.")
@click.option("--with-config", type=_FILE, help="A config.toml to try with it; default: the one of --config.")
@click.option("--was", type=_FILE, help="The policy under which the calls were made; default: that of --env.")
@click.option(
    "--share", type=click.FloatRange(0, 100), callback=share_or_exit,
    help="Percent of users for the fine-tuned model; else policy.",
)  # fmt: skip
@click.option("--agent", default="", help="Show only this one's calls; the others still count in the caps.")
@click.option("--limit", default=10, show_default=True, type=click.IntRange(0, 10_000), help="So many single changes.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@for_configuration
def replay(
    policy: Path, since: str, until: str, with_config: Path | None, was: Path | None, share: float | None,
    agent: str, limit: int, as_json: bool, chosen: Chosen,
) -> None:  # fmt: skip
    """Run recorded calls through another policy, and tell what would change.

    Variants, models, cost and refusals; docs/replay.md says what it assumes. Nobody is called and nothing is written.
    Exit status 0 whatever it finds, 2 where it cannot begin.
    """
    from gateway.decide.replay import Replayer
    from gateway.lab.replay import About, findings_of, plain, read_journal, replay_calls

    span = span_or_exit(since, until, int(ledger.clock() * 1000))
    env = chosen_environment(chosen.env)
    former = _load(Paths(chosen.config, chosen.policies), env, was)
    other = _load(Paths(with_config or chosen.config, chosen.policies), env, policy)
    root = Path(former.settings.journal.dir)
    if not root.is_dir():
        _cannot(f"there is no journal at {root}; a gateway makes it when it first serves")
    with _progress() as at:
        try:
            journal = read_journal(root, env, span.until_ms, at("reading the journal", None))
        except OSError as error:
            _cannot(f"{error.filename} cannot be read: {error.strerror}")
        known = {*former.plan.agents, *other.plan.agents, RAW_AGENT, *(call.agent for call in journal.calls)}
        if agent and agent not in known:
            raise click.BadParameter(f"there is no agent {agent!r}{nearest(agent, known)}", param_hint="--agent")
        replayer = Replayer(former.plan, other.plan, share_bps=None if share is None else bps_of(share))
        replayed = replay_calls(replayer, journal.calls, span.since_ms, at("replaying", len(journal.calls)))
        found = findings_of(replayed, agent=agent, limit=limit)
    about = About(
        env=env, since_ms=span.since_ms, until_ms=span.until_ms, policy=str(policy),
        was=str(was or chosen.policies / f"{env}.toml"), agent=agent, torn=journal.torn, elsewhere=journal.elsewhere,
        counted=sum(call.at_ms < span.since_ms or bool(call.shadow_of) for call in journal.calls),
    )  # fmt: skip
    if as_json:
        say(msgspec.json.format(msgspec.json.encode({**plain(about), **plain(found)})).decode())
    else:
        from gateway.lab.cost_tables import console
        from gateway.lab.replay_report import show

        show(about, found, console())
    if former.policy == other.policy and former.settings == other.settings:
        note("note: this is the policy of --was; what it has changed since the calls were made is not seen")
    if journal.elsewhere:
        note(f"note: {counted(journal.elsewhere, 'call')} of other environments left out")
    if journal.torn:
        note(f"note: {counted(journal.torn, 'torn line')} of the journal left out")


def _load(paths: Paths, env: str, policy: Path | None) -> Loaded:
    """The configuration, or all of its problems and exit 2."""
    try:
        return load(paths, env, litellm_map=load_price_map(), want_secrets=False, policy_file=policy)
    except ConfigError as error:
        _cannot(str(error))


def _cannot(message: str) -> NoReturn:
    note(message)
    sys.exit(_BAD_INPUT)


@contextmanager
def _progress() -> Iterator[Callable[[str, int | None], "Tell"]]:
    """Show somebody who looks on how far it is: what is done, and of how much, gives a function that is told."""
    if not is_terminal():
        yield lambda what, total: lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:

        def begin(what: str, total: int | None) -> "Tell":
            task = progress.add_task(what, total=total)
            return lambda done: progress.update(task, completed=done)

        yield begin
