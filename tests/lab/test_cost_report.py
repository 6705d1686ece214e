"""The cost dashboard, read back: its figures are the ledger's, its bytes those of the same ledger before."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.domain.ledger import LedgerRow
from gateway.domain.money import format_usd, nusd_from_usd
from gateway.domain.spans import Span
from gateway.lab.cost_report import write_report
from gateway.store.ledger import By, Ledger
from gateway.store.store import Stop
from tests.ledgers import DAY_MS, HOUR_MS, LEGAL, NOON_MS, NOON_S, QA, USD, row, serve
from tests.planning import plan_of

RULES = plan_of(
    """
    [[caps]]
    per = "hour"
    usd = "20"
    [[caps]]
    scope = "agent"
    per = "day"
    usd = "50"
    [[caps]]
    per = "day"
    requests = 1000
    """,
    env="production",
).rules
WEEK = Span(NOON_MS - 7 * DAY_MS, NOON_MS + 1)
SINCE_MS = WEEK.since_ms - 12 * HOUR_MS  # Widened to the whole day.


class Desk:
    """A ledger of a fortnight, and the report of its last week."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.out = path / "reports" / "cost_dashboard.md"
        serve(path / "ledger.db", RULES, [self._row(n) for n in range(80)], held=1_000)
        self.ledger = Ledger(path / "ledger.db", clock=lambda: NOON_S)

    def _row(self, n: int) -> LedgerRow:
        state = ("posted", "posted", "in_doubt", "void")[n % 4]
        on = (QA, LEGAL, QA._replace(model="vllm/a|b", variant=""))[n % 3]
        return row(f"req-{n}.1", 1 + n * 10_000_019, at_ms=NOON_MS - n * 4 * HOUR_MS, on=on, state=state)

    def write(self, span: Span = WEEK) -> str:
        self.written = write_report(self.ledger, "production", RULES, NOON_S, span, self.out)
        return self.out.read_text()


@pytest.fixture
def drawing_desk(tmp_path: Path) -> Iterator[Desk]:
    made = Desk(tmp_path)
    yield made
    made.ledger.close()


@pytest.fixture
def desk(drawing_desk: Desk, monkeypatch: pytest.MonkeyPatch) -> Desk:
    """One that draws nothing, which is most of a report's work: whoever reads only figures need not wait for it."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    return drawing_desk


def table(text: str, heading: str) -> list[dict[str, str]]:
    """The first table below a heading, by its columns."""
    section = text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in section.splitlines() if line.startswith("|")]
    head, _, *rows = [[cell.strip().strip("`").replace("\\|", "|") for cell in line] for line in lines]
    return [dict(zip(head, cells, strict=True)) for cells in rows]


def test_the_figures_of_each_group_are_the_ledgers(desk: Desk) -> None:
    text = desk.write()
    length_ms = WEEK.until_ms - SINCE_MS
    by: By
    for by in ("agent", "model", "variant", "operation"):
        found = table(text, f"By {by}")
        totals = desk.ledger.totals("production", by, since_ms=SINCE_MS, until_ms=WEEK.until_ms)
        told = [
            (line[by], nusd_from_usd(line["usd"]), nusd_from_usd(line["in doubt"]), int(line["requests"]))
            for line in found
        ]
        assert told == [
            (total.group or "-", total.amounts.nusd, total.in_doubt_nusd, total.amounts.requests) for total in totals
        ]
        assert [int(line["tokens"]) for line in found] == [total.amounts.tokens for total in totals]
        before = desk.ledger.totals("production", by, since_ms=SINCE_MS - length_ms, until_ms=SINCE_MS)
        assert {line[by]: nusd_from_usd(line["before"]) for line in found} == {
            total.group or "-": total.amounts.nusd for total in before
        }


def test_caps_are_shown_as_they_stand(desk: Desk) -> None:
    found = table(desk.write(), "Caps")
    accounts = desk.ledger.accounts("production", RULES, NOON_S)
    assert len(found) == len(accounts) == 4
    for line, status in zip(found, accounts, strict=True):
        assert line["cap"].startswith(status.label)
        read = nusd_from_usd if status.unit == "usd" else int
        assert [read(line[name]) for name in ("posted", "held", "in doubt", "remaining")] == [
            status.posted, status.held, status.in_doubt, status.remaining,
        ]  # fmt: skip


def test_the_largest_days_and_the_doubts_are_the_ledgers(desk: Desk) -> None:
    text = desk.write()
    days = desk.ledger.totals("production", "day", since_ms=SINCE_MS, until_ms=WEEK.until_ms)
    largest = sorted(days, key=lambda day: -day.amounts.nusd)
    assert [(line["day"], nusd_from_usd(line["usd"])) for line in table(text, "Largest days")] == [
        (day.group, day.amounts.nusd) for day in largest
    ]
    doubts = desk.ledger.in_doubt("production")
    assert {line["id"]: nusd_from_usd(line["usd"]) for line in table(text, "In doubt")} == {
        doubt.id: doubt.amounts.nusd for doubt in doubts
    }
    assert f"{format_usd(sum(doubt.amounts.nusd for doubt in doubts))} usd in {len(doubts)} rows" in text


def test_it_begins_with_plain_words(desk: Desk) -> None:
    desk.ledger.stop(Stop("production", "agent", "qa_agent", by="ann", why="runs *wild*", at_ms=NOON_MS))
    lines = [line for line in desk.write().splitlines() if line.startswith("- ")]
    spent = sum(
        total.amounts.nusd
        for total in desk.ledger.totals("production", "agent", since_ms=SINCE_MS, until_ms=WEEK.until_ms)
    )
    assert lines[0] == "- **STOPPED:** `agent=qa_agent`, by `ann`: `runs *wild*`."
    assert lines[1].startswith(f"- **{format_usd(spent)} usd** were spent, in ")
    assert re.search(r": [+-]\d+% against the \d+\.\d+ usd of the 7 d 12 h before\.$", lines[1])
    assert lines[2].startswith("- The dearest agent was `")
    assert "usd are in doubt**" in lines[3]
    assert lines[4].startswith("- The tightest cap is `")


def test_the_same_ledger_and_moment_give_the_same_bytes(drawing_desk: Desk) -> None:
    drawing_desk.write()
    first = {path.name: path.read_bytes() for path in drawing_desk.written}
    drawing_desk.write()
    assert {path.name: path.read_bytes() for path in drawing_desk.written} == first
    assert len(first) == 6


def test_every_plot_that_is_shown_is_there_and_none_is_left_over(drawing_desk: Desk) -> None:
    folder = drawing_desk.out.with_suffix("")
    folder.mkdir(parents=True)
    (folder / "cap-9.svg").write_text("of a cap that is gone")
    (folder / "notes.svg").write_text("somebody's own")
    text = drawing_desk.write()
    shown = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    assert sorted(shown) == sorted(f"cost_dashboard/{path.name}" for path in drawing_desk.written[1:])
    assert all((drawing_desk.out.parent / name).is_file() for name in shown)
    assert not (folder / "cap-9.svg").exists()
    assert (folder / "notes.svg").exists()
    assert not list(drawing_desk.out.parent.rglob("*.part"))


def test_a_time_without_spend_is_told_as_such(desk: Desk) -> None:
    text = desk.write(Span(NOON_MS - 90 * DAY_MS, NOON_MS - 80 * DAY_MS))
    assert "- Nothing was spent.\n" in text
    assert "## Over time" not in text
    assert "Nothing was spent." in text.partition("## By agent")[2]


def test_what_is_not_spent_on_any_more_is_told(desk: Desk) -> None:
    gone = QA._replace(agent="old_agent")
    desk.ledger.add([row("old", 3 * USD, on=gone, at_ms=SINCE_MS - HOUR_MS)], who="test")
    lines = {line["agent"]: line for line in table(desk.write(), "By agent")}
    assert (lines["old_agent"]["usd"], lines["old_agent"]["before"], lines["old_agent"]["change"]) == (
        "0.00", "3.00", "gone",
    )  # fmt: skip


def test_names_from_outside_are_no_markdown_and_no_html(desk: Desk) -> None:
    nasty = "<img src=x>`**|[a](b)\n# heading"
    desk.ledger.add([row("nasty", 500 * USD, on=QA._replace(model=nasty))], who="test")
    text = desk.write()
    assert "`<img src=x>'**\\|[a](b) # heading`" in text
    assert "\n# heading" not in text


def test_without_matplotlib_it_has_no_plots_and_says_so(desk: Desk) -> None:
    text = desk.write()
    assert "Without plots: the plots need matplotlib, which is not installed: pip install" in text
    assert "![" not in text
    assert desk.written == [desk.out]
    assert len(table(text, "Caps")) == 4
