"""`gateway report`: what was seen and what to do about it, as Markdown for people. Prints; decides nothing.

The daily reports of a gateway that serves are these very commands: edge/daily.py runs them.
"""

import re
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gateway.cli import ledger
from gateway.cli.cost_files import at_work, told
from gateway.cli.cost_files import report as costs_report
from gateway.cli.ledger import Chosen, for_configuration, note, say
from gateway.cli.options import fail
from gateway.config import Loaded
from gateway.domain.reading import nearest
from gateway.domain.spans import read_instant

if TYPE_CHECKING:
    from gateway.lab.ab_figures import Asked, Figures

_ALL = "all"
_LENGTH = re.compile(r"[0-9]{1,6}[mhdw]")
_FAR_MS = 10**15


@click.group()
def report() -> None:
    """Write reports: A/B tests, costs."""


report.add_command(costs_report, "costs")


@report.command()
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False),
    help="The Markdown file; its plots go beside it.  [default: ab_testing_results.md in the policy's reports.dir]",
)  # fmt: skip
@click.option("--agent", "agents", multiple=True, help="Only this agent's; repeatable.  [default: all]")
@click.option(
    "--since", default="", help="24h, 7d, today, 2026-11-01, an ISO time; default: the experiment's beginning."
)
@click.option("--until", default="", help="Likewise; default: now.")
@click.option("--window", default="24h,7d,all", show_default=True, help="Lengths of time to compare over, beside all.")
@click.option("--json", "is_json", is_flag=True, help="As JSON on stdout; no file is written.")
@for_configuration
def ab(
    out: Path | None, agents: tuple[str, ...], since: str, until: str, window: str, is_json: bool, chosen: Chosen
) -> None:  # fmt: skip
    """Write what the A/B tests say, Markdown with SVG plots.

    Both arms of each agent's experiment, the difference with its interval, and a recommendation: proceed, hold or roll
    back, and why. Plots need matplotlib: pip install 'genesis-gateway[reports]'. Without it the report has none.
    """
    from gateway.lab.ab_figures import Asked
    from gateway.lab.ab_report import as_json, write_report

    now_ms = int(ledger.clock() * 1000)
    # `until` alone is checked like a time that begins with the first one.
    span = ledger.span_or_exit(since or "1970-01-01", until, now_ms)
    asked = Asked(span.since_ms if since else None, span.until_ms, agents, _windows(window))
    with at_work("reading the calls, drawing"):
        loaded = chosen.load()
        figures = _figures(loaded, asked, now_ms)
        if is_json:
            click.echo(as_json(figures))
            return
        out = out or Path(loaded.policy.reports.path("ab"))
        try:
            written = write_report(figures, out)
        except OSError as error:
            fail(f"{out} cannot be written: {error.strerror or error}")
    say(told(written))


def _windows(text: str) -> list[tuple[str, int | None]]:
    """The windows with their lengths in ms; what is none is exit status 2."""
    found: list[tuple[str, int | None]] = []
    for name in filter(None, (part.strip() for part in text.split(","))):
        # So long before an instant far enough from 1970.
        length_ms = _FAR_MS - read_instant(name, _FAR_MS) if _LENGTH.fullmatch(name) else 0
        if not length_ms and name != _ALL:
            raise click.BadParameter(f"{name[:40]!r} wants a length such as 24h, 7d or {_ALL}", param_hint="--window")
        found.append((name, length_ms or None))
    return found


def _figures(loaded: Loaded, asked: "Asked", now_ms: int) -> "Figures":
    from gateway.lab.ab_figures import gather, nothing
    from gateway.store.experiments import Experiments
    from gateway.store.store import StoreError
    from gateway.treasury import ledger_path

    plan = loaded.plan
    try:
        path = ledger_path(loaded.settings)
        if not path.exists():
            note(f"there is no ledger at {path} yet; a gateway makes it when it first serves")
            _check_agents(asked.agents, plan.agents)
            return nothing(plan, now_ms)
        with Experiments(path, clock=ledger.clock, is_new_allowed=False) as experiments:
            _check_agents(asked.agents, {*plan.agents, *experiments.states(plan.env)})
            return gather(experiments, plan, now_ms, asked)
    except StoreError as error:
        fail(str(error))


def _check_agents(agents: Collection[str], known: Collection[str]) -> None:
    for agent in agents:
        if agent not in known:
            names = f"known: {', '.join(sorted(known))}{nearest(agent, known)}"
            raise click.BadParameter(f"there is no agent {agent!r}; {names}", param_hint="--agent")
