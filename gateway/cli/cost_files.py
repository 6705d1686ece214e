"""The `costs` commands that read and write files: report, export, import, reconcile. Prints; decides nothing.

A file is written beside its place and then moved there, so a command that fails leaves none that is half.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import click

from gateway.cli.ledger import Chosen, Desk, desk, for_configuration, is_terminal, note, say, signed, span_or_exit
from gateway.cli.options import fail
from gateway.domain.money import format_usd
from gateway.domain.spans import DAY_MS
from gateway.domain.variables import is_reference
from gateway.domain.words import counted

if TYPE_CHECKING:
    from gateway.lab.provider_usage import UsageDay
    from gateway.lab.reconcile import Difference

_IDS_SHOWN = 5


@click.command()
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False),
    help="The Markdown file; its plots go beside it.  [default: cost_dashboard.md in the policy's reports.dir]",
)  # fmt: skip
@click.option("--since", default="7d", show_default=True, help="24h, 7d, today, 2026-11-01, an ISO time.")
@click.option("--until", default="", help="Likewise; default: now.")
@for_configuration
def report(out: Path | None, since: str, until: str, chosen: Chosen) -> None:
    """Write the cost dashboard, Markdown with SVG plots.

    Plots need matplotlib: pip install 'genesis-gateway[reports]'. Without it the report has none.
    """
    from gateway.lab.cost_report import write_report

    with desk(chosen) as opened:
        span = span_or_exit(since, until, opened.now_ms)
        out = out or Path(opened.loaded.policy.reports.path("costs"))
        try:
            with at_work("reading the ledger, drawing"):
                written = write_report(opened.ledger, opened.env, opened.plan.rules, opened.now_s, span, out)
        except OSError as error:
            fail(f"{out} cannot be written: {error.strerror or error}")
    say(told(written))


def told(written: Sequence[Path]) -> str:
    """What was written: a report, and its plots."""
    out, *plots = written
    return f"{out}, with {len(plots)} plots in {out.with_suffix('')}" if plots else f"{out}, without plots: it says why"


@click.command("export")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False, allow_dash=True))
@click.option("--since", default="", help="24h, 7d, today, 2026-11-01, an ISO time; default: all there is.")
@click.option("--until", default="", help="Likewise; default: now.")
@for_configuration
def export_command(file: Path, since: str, until: str, chosen: Chosen) -> None:
    """Write the ledger to a CSV FILE, or to - (stdout).

    Every row of the environment in any state. What is exported comes back equal by `gateway costs import`.
    """
    from gateway.lab.ledger_csv import export_csv

    with desk(chosen) as opened:
        span = span_or_exit(since or "1970-01-01", until, opened.now_ms)
        # Without an end also what was booked for the future is exported.
        rows = opened.ledger.rows(opened.env, since_ms=span.since_ms, until_ms=span.until_ms if until else None)
        try:
            if str(file) == "-":
                if isinstance(sys.stdout, TextIOWrapper):
                    sys.stdout.reconfigure(encoding="utf-8", newline="")
                export_csv(rows, sys.stdout)
                return
            with at_work("writing"):
                beside = file.with_name(f".{file.name}.part")
                with beside.open("w", encoding="utf-8", newline="") as sheet:
                    count = export_csv(rows, sheet)
                beside.replace(file)
        except OSError as error:
            fail(f"{file} cannot be written: {error.strerror or error}")
    say(f"{counted(count, 'row')} to {file}")


@click.command("import")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False, allow_dash=True))
@signed
@for_configuration
def import_command(file: Path, who: str, chosen: Chosen) -> None:
    """Book the rows of a CSV FILE, or of - (stdin).

    All or none: every problem is told with its line and its remedy, and then nothing is booked. A row that is there
    already is known by its id and counts once. Columns: time, agent, usd at least; see docs/costs.md.
    """
    from gateway.lab.ledger_csv import CsvProblems, read_csv

    with desk(chosen, is_new_allowed=True) as opened:
        name = "stdin" if str(file) == "-" else str(file)
        try:
            with _opened(file) as sheet, at_work(f"reading {name}"):
                rows = read_csv(sheet, name, env=opened.env)
        except OSError as error:
            fail(f"{name} cannot be read: {error.strerror or error}")
        except CsvProblems as found:
            note(str(found))
            fail(f"{counted(len(found.problems), 'problem')}; nothing was booked")
        with at_work(f"booking {len(rows):,} rows"):
            added = opened.ledger.add(rows, who=who)
    usd = format_usd(sum(row.amounts.nusd for row in rows))
    say(f"{name}: {counted(len(rows), 'row')}, {usd} usd; {added.added:,} added, {added.known:,} known before")


@click.command("reconcile")
@click.argument("source", metavar="FILE|mistral")
@click.option("--upstream", default="", help="Only models of this upstream; mistral: the one of that kind.")
@click.option("--month", default="", metavar="YYYY-MM", help="mistral: which month; default: this one.")
@click.option(
    "--key-file", type=click.File("r"), help="mistral: a file with an Admin API key; default: the upstream's own key."
)
@click.option("--apply", "is_applied", is_flag=True, help="End the doubts that are settled, instead of saying how.")
@signed
@for_configuration
def reconcile_command(
    source: str, upstream: str, month: str, key_file: Any, is_applied: bool, who: str, chosen: Chosen
) -> None:
    """Compare the ledger with the provider's own figures.

    FILE is a CSV (day, model, prompt_tokens, completion_tokens, usd, requests), OpenAI's export of usage, or the JSON
    of Mistral's Admin API, which `mistral` asks itself. Exit status 1 where a difference stays unexplained.
    """
    from gateway.lab.cost_tables import console, show_differences
    from gateway.lab.reconcile import booked_days, over_all_days, reconcile

    with desk(chosen) as opened:
        upstreams = opened.loaded.settings.upstreams
        if upstream and upstream not in upstreams:
            raise click.BadParameter(f"no such upstream; known: {', '.join(upstreams)}", param_hint="--upstream")
        if source == "mistral":
            upstream = upstream or _mistral_upstream(opened)
            theirs = _ask_mistral(opened, upstream, month, key_file)
        else:
            theirs = _read_usage(Path(source))
        today = datetime.fromtimestamp(opened.now_s, UTC).date().isoformat()
        since_ms, until_ms = _covered_ms(theirs)
        rows = opened.ledger.rows(opened.env, since_ms=since_ms, until_ms=until_ms)
        found = reconcile(booked_days(rows, upstream=upstream), theirs, today=today)
        if not found:
            say("Neither side has anything in that time.")
            return
        show_differences(found, console())
        if len({difference.day for difference in found}) > 1:
            say("Over all of these days, since a call at midnight may be another day's for the provider:")
            show_differences(over_all_days(found), console())
        _settle(opened, found, source, who, is_applied=is_applied)
    # A day's end may fall between two days; what counts is what stays unexplained over all of them.
    sys.exit(1 if any(whole.verdict == "unexplained" for whole in over_all_days(found)) else 0)


def _settle(opened: Desk, found: "list[Difference]", source: str, who: str, *, is_applied: bool) -> None:
    """End the doubts that the figures settle, or say which commands do."""
    freed = [id for difference in found for id in difference.may_be_freed]
    costs = {id: amounts for difference in found for id, amounts in difference.may_be_posted}
    if not freed and not costs:
        return
    why = f"reconciled with {source}"
    if is_applied:
        ended = opened.ledger.release(opened.env, [*freed, *costs], who=who, why=why, actual=costs)
        say(f"{len(ended)} out of doubt: {len(freed)} freed, {len(costs)} booked with what they did cost.")
        return
    say(f"{counted(len(freed) + len(costs), 'attempt')} in doubt can be settled by these figures:")
    for id in freed[:_IDS_SHOWN]:
        say(f"  {id}: not counted by the provider; can be freed")
    if len(freed) > _IDS_SHOWN:
        say(f"  and {len(freed) - _IDS_SHOWN} more that can be freed")
    for id, amounts in costs.items():
        say(f"  {id}: did cost {format_usd(amounts.nusd)} usd")
    say("Give the same command with --apply to do so.")


def _opened(file: Path) -> BinaryIO:
    return sys.stdin.buffer if str(file) == "-" else file.open("rb")


def _read_usage(file: Path) -> "list[UsageDay]":
    from gateway.lab.ledger_csv import CsvProblems
    from gateway.lab.provider_usage import read_usage

    try:
        with file.open("rb") as sheet:
            return read_usage(sheet, str(file))
    except OSError as error:
        fail(f"{file} cannot be read: {error.strerror or error}")
    except CsvProblems as found:
        note(str(found))
        fail(f"{counted(len(found.problems), 'problem')}; nothing was compared")


def _ask_mistral(opened: Desk, upstream: str, month: str, key_file: Any) -> "list[UsageDay]":
    import asyncio

    import aiohttp

    from gateway.domain.secret import Secret
    from gateway.lab.provider_usage import UsageUnavailable, fetch_mistral_usage

    now = datetime.fromtimestamp(opened.now_s, UTC)
    try:
        wanted = datetime.strptime(month, "%Y-%m") if month else now
    except ValueError:
        raise click.BadParameter(f"{month!r} is not a month such as 2026-11", param_hint="--month") from None
    key = Secret(key_file.read().strip()) if key_file else opened.loaded.settings.upstreams[upstream].api_key
    if not key or is_reference(key.reveal()):
        fail(f"upstreams.{upstream} has no key here; give an Admin API key by --key-file")

    async def ask() -> "list[UsageDay]":
        async with aiohttp.ClientSession() as session:
            return await fetch_mistral_usage(session, key, year=wanted.year, month=wanted.month)

    try:
        with at_work("asking Mistral"):
            return asyncio.run(ask())
    except UsageUnavailable as unavailable:
        fail(str(unavailable))


def _mistral_upstream(opened: Desk) -> str:
    names = [name for name, found in opened.loaded.settings.upstreams.items() if found.kind == "mistral"]
    if len(names) != 1:
        fail(f"there are {len(names)} upstreams of kind mistral; say which by --upstream")
    return names[0]


def _covered_ms(theirs: "list[UsageDay]") -> tuple[int, int]:
    days = [datetime.fromisoformat(day.day).replace(tzinfo=UTC) for day in theirs]
    return (int(min(days).timestamp() * 1000), int(max(days).timestamp() * 1000) + DAY_MS) if days else (0, 0)


@contextmanager
def at_work(what: str) -> Iterator[None]:
    """Show somebody who looks on that it goes on."""
    if is_terminal():
        from rich.console import Console

        waiting: Any = Console(stderr=True).status(what)
    else:
        waiting = nullcontext()
    with waiting:
        yield
