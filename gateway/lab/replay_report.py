"""What a replay found, on a terminal: totals, moves, refusals, the dearest changes, assumptions. Prints only."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from gateway.domain.money import format_usd
from gateway.domain.spans import format_time
from gateway.domain.words import counted
from gateway.lab.replay import About, Findings, Moves, Sums
from gateway.lab.screen import add_row, say, table_of

_FIGURES = ("calls", "answered", "refused", "failed", "left")
# What is said of each assumption, behind the number of calls that rest on it.
ASSUMED: Mapping[str, str] = {
    "bucket_unknown": "the agent's salt is another one, so their buckets are not known: taken as recorded",
    "share_kept": "the share was that of a rollout, which no policy changes: kept; --share tries another",
    "failed_again": "a model that failed or was passed over is taken to fail again",
    "usage_estimated": "they were not answered: taken to use what the agent's calls used on average until then",
    "usage_unknown": "they were not answered, and no call of the agent's was until then: counted as free",
    "cost_kept": "no usage was reported: they cost what they did cost",
    "price_unknown": "the model has no price: counted as free",
}


def show(about: About, found: Findings, screen: Console) -> None:
    """All of it."""
    since, until = format_time(about.since_ms), format_time(about.until_ms)
    whose = f" of {about.agent}" if about.agent else ""
    say(screen, f"{about.env}, {since} to {until}: calls{whose} made under {about.was}, replayed under {about.policy}")
    if not found.whole.before.calls:
        say(screen, "No such call was recorded.")
        return
    screen.print(_totals(found.whole))
    changed, calls = found.whole.changed, counted(found.whole.before.calls, "call")
    say(screen, f"{changed:,} of {calls} would go otherwise." if changed else "No call would go otherwise.")
    for table in (_agents(found.agents), _moves(found.agents), _refusals(found), _largest(found)):
        if table.row_count:
            screen.print()
            screen.print(table)
    if found.assumed:
        say(screen, "\nThis rests on:")
    for name, number in found.assumed.items():
        say(screen, f"  {counted(number, 'call')}: {ASSUMED[name]}")


def _totals(whole: Moves) -> Table:
    table = table_of("", *_FIGURES, "usd", "tokens", names=1)
    add_row(table, "recorded", *_figures(whole.before))
    add_row(table, "replayed", *_figures(whole.after))
    before, after = whole.before, whole.after
    moved = [getattr(after, name) - getattr(before, name) for name in _FIGURES]
    cost_nusd, tokens = after.cost_nusd - before.cost_nusd, after.tokens - before.tokens
    add_row(table, "difference", *(_signed(number) for number in moved), _signed_usd(cost_nusd), _signed(tokens))
    return table


def _figures(sums: Sums) -> list[str]:
    return [*(f"{getattr(sums, name):,}" for name in _FIGURES), f"${format_usd(sums.cost_nusd)}", f"{sums.tokens:,}"]


def _agents(agents: Mapping[str, Moves]) -> Table:
    table = table_of("agent", "calls", "otherwise", "recorded", "replayed", "difference", names=1)
    for name, moves in agents.items():
        before, after = moves.before.cost_nusd, moves.after.cost_nusd
        usd = (f"${format_usd(before)}", f"${format_usd(after)}", _signed_usd(after - before))
        add_row(table, name, f"{moves.before.calls:,}", f"{moves.changed:,}", *usd)
    return table


def _moves(agents: Mapping[str, Moves]) -> Table:
    table = table_of("agent", "what moves", "from -> to", "calls", names=3)
    for name, moves in agents.items():
        for what, found in (("share", moves.shares), ("variant", moves.variants), ("model", moves.models)):
            for way, number in sorted(found.items(), key=lambda item: (-item[1], item[0])):
                add_row(table, name, what, way, f"{number:,}")
    return table


def _refusals(found: Findings) -> Table:
    table = table_of("refused by", "first", "recorded", "replayed", names=2, whole={"first"})
    for refusal in found.refusals:
        first = "-" if refusal.first_ms is None else format_time(refusal.first_ms)
        add_row(table, refusal.why, first, f"{refusal.before:,}", f"{refusal.after:,}")
    return table


def _largest(found: Findings) -> Table:
    table = table_of(
        "changes of most cost", "call", "agent", "recorded", "replayed", "difference",
        names=5, whole={"changes of most cost", "call"},
    )  # fmt: skip
    for change in found.largest:
        ends = _ending(change.before), _ending(change.after)
        add_row(table, format_time(change.at_ms), change.id, change.agent, *ends, _signed_usd(change.difference_nusd))
    return table


def _ending(ending: Mapping[str, Any]) -> str:
    if ending["end"] == "answered":
        return f"{ending['variant']}, {ending['model']}"
    return f"{ending['end']}: {ending['why']}" if ending["why"] else str(ending["end"])


def _signed(number: int) -> str:
    return f"{number:+,}" if number else "0"


def _signed_usd(nusd: int) -> str:
    sign = "-" if nusd < 0 else "+" if nusd else ""
    return f"{sign}${format_usd(abs(nusd))}"
