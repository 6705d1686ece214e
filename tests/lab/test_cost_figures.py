"""The figures of a report: the ledger's own, and curves that climb and fall with their windows."""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.domain.ledger import Amounts
from gateway.domain.spans import Span
from gateway.lab.cost_figures import GROUPS, busiest, curves_of, gather, step_of
from gateway.store.ledger import Ledger
from gateway.store.store import Total
from tests.ledgers import DAY_MS, HOUR_MS, LEGAL, NOON_MS, NOON_S, QA, USD, row, serve
from tests.planning import plan_of

POLICY = """
[[caps]]
per = "hour"
usd = "20"
[[caps]]
scope = "agent"
per = "day"
usd = "5"
[[caps]]
per = "total"
usd = "30"
only = { operation = ["benchmark"] }
[[caps]]
per = "hour"
requests = 10
"""
RULES = plan_of(POLICY, env="production").rules
TODAY = Span(NOON_MS - 12 * HOUR_MS, NOON_MS + 1)


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    serve(tmp_path / "ledger.db", RULES)
    with Ledger(tmp_path / "ledger.db", clock=lambda: NOON_S) as opened:
        yield opened


@pytest.mark.parametrize(
    ("length_ms", "step_s"),
    [
        (1, 3_600), (3 * DAY_MS, 3_600), (3 * DAY_MS + 1_000, 86_400), (100 * DAY_MS, 86_400),
        (100 * DAY_MS + 1_000, 2 * 86_400), (20_000 * DAY_MS, 200 * 86_400),
    ],
)  # fmt: skip
def test_bars_are_hours_days_or_whole_days_and_never_too_many(length_ms: int, step_s: int) -> None:
    assert step_of(Span(0, length_ms)) == step_s


@given(st.integers(1, 50_000 * DAY_MS))
def test_there_are_at_most_a_hundred_bars(length_ms: int) -> None:
    assert length_ms / (step_of(Span(0, length_ms)) * 1000) <= 100


def test_every_view_of_a_time_adds_up_to_the_same(ledger: Ledger) -> None:
    on = [QA, LEGAL, QA._replace(agent="", model="", variant="")]
    ledger.add(
        [
            row(str(n), 1 + n * 1_000_003, on=on[n % 3], at_ms=NOON_MS - n * HOUR_MS,
                state=("posted", "in_doubt", "void", "released")[n % 4])
            for n in range(100)
        ],
        who="test",
    )  # fmt: skip
    figures = gather(ledger, "production", RULES, NOON_S, Span(NOON_MS - 2 * DAY_MS - 5, NOON_MS + 1))
    # Widened to a whole hour, so that the first bar is whole.
    assert figures.span.since_ms == NOON_MS - 2 * DAY_MS - HOUR_MS
    counted = [
        found
        for found in ledger.rows("production", since_ms=figures.span.since_ms, until_ms=figures.span.until_ms)
        if found.state in ("posted", "in_doubt")
    ]
    spent = sum(found.amounts.nusd for found in counted)
    assert figures.whole == Total(
        "", Amounts(spent, len(counted), 100 * len(counted)),
        sum(found.amounts.nusd for found in counted if found.state == "in_doubt"), len(counted),
    )  # fmt: skip
    for by in GROUPS:
        assert sum(total.amounts.nusd for total in figures.totals[by]) == spent
    assert sum(total.amounts.nusd for total in figures.days) == spent
    assert sum(map(sum, figures.series.groups.values())) == spent
    # As long a time before, and nothing of it in both.
    earlier = sum(
        found.amounts.nusd
        for found in ledger.rows("production", until_ms=figures.span.since_ms, states=["posted", "in_doubt"])
        if found.at_ms >= 2 * figures.span.since_ms - figures.span.until_ms
    )
    assert figures.whole_before.amounts.nusd == earlier > 0


def test_a_curve_ends_where_its_account_stands(ledger: Ledger) -> None:
    ledger.add(
        [
            row("before", 7 * USD, at_ms=NOON_MS - DAY_MS, on=LEGAL),
            row("a", USD, at_ms=NOON_MS - 3 * HOUR_MS),
            row("b", 2 * USD, state="in_doubt"),
            row("c", 4 * USD, on=LEGAL),
        ],
        who="test",
    )
    by_hour, by_agent, benchmark = curves_of(ledger, "production", RULES, TODAY)
    now = {status.label: status.posted + status.in_doubt for status in ledger.accounts("production", RULES, NOON_S)}
    assert by_hour.lines["all"][-1] == (TODAY.until_ms, now[by_hour.label]) == (TODAY.until_ms, 6 * USD)
    assert by_agent.lines["qa_agent"][-1] == (TODAY.until_ms, 3 * USD)
    assert by_agent.lines["legal_agent"][-1] == (TODAY.until_ms, 4 * USD)
    assert benchmark.lines["all"][-1] == (TODAY.until_ms, 11 * USD)


def test_a_curve_falls_to_zero_where_its_window_ends(ledger: Ledger) -> None:
    at_ms = NOON_MS - 3 * HOUR_MS + 60_000
    ledger.add([row("a", USD, at_ms=at_ms), row("b", 2 * USD, at_ms=NOON_MS)], who="test")
    by_hour = curves_of(ledger, "production", RULES, TODAY)[0]
    assert by_hour.lines["all"] == [
        (TODAY.since_ms, 0),
        (at_ms, USD),
        (NOON_MS - 2 * HOUR_MS, 0),
        (NOON_MS, 2 * USD),
        (TODAY.until_ms, 2 * USD),
    ]


def test_a_curve_begins_with_what_its_window_held_before(ledger: Ledger) -> None:
    ledger.add(
        [row("a", USD, at_ms=TODAY.since_ms - DAY_MS, on=LEGAL), row("b", USD, at_ms=TODAY.since_ms - 1)], who="test"
    )
    by_hour, by_agent, benchmark = curves_of(ledger, "production", RULES, TODAY)
    # What was spent in total before is there from the beginning; hours and days of then are over.
    assert benchmark.lines["all"][0] == (TODAY.since_ms, USD)
    assert {nusd for points in (*by_hour.lines.values(), *by_agent.lines.values()) for _, nusd in points} <= {0}


def test_a_curve_has_a_bounded_number_of_points_and_keeps_its_peak(ledger: Ledger) -> None:
    ledger.add([row(str(n), 1, at_ms=NOON_MS - n * 1_000) for n in range(5_000)], who="test")
    (points,) = curves_of(ledger, "production", RULES[1:2], TODAY)[0].lines.values()
    assert len(points) < 700
    assert points[-1][1] == 5_000
    assert all(one[0] <= other[0] for one, other in pairwise(points))


def test_no_cap_in_dollars_no_curve(ledger: Ledger) -> None:
    assert curves_of(ledger, "production", RULES[3:], TODAY) == []


def test_the_busiest_days_come_first() -> None:
    days = [Total(f"2026-11-{day}", Amounts(nusd), 0, 1) for day, nusd in ((19, 1), (20, 5), (21, 5), (22, 0))]
    assert [day.group for day in busiest(days, 3)] == ["2026-11-20", "2026-11-21", "2026-11-19"]
