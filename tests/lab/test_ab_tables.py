"""The tables of an A/B report: sensible units, and words that mean what the figures say."""

from collections.abc import Sequence

import pytest

from gateway.domain.experiment import METRICS, Evidence, Finding, Guardrail, Metric, Mismatch
from gateway.domain.rollout import Change, Event, Phase
from gateway.lab.ab_arms import Arm
from gateway.lab.ab_tables import (
    arrivals_words,
    calls_table,
    dollars,
    errors_table,
    metrics_table,
    story_table,
    value_of,
    windows_table,
)
from tests.ledgers import NOON_MS

ARM = Arm(users=10, calls=200, answered=180, failed=15, left=5, fallbacks=3, cost_nusd=1_234_567_891, errors={})
FINE = Mismatch(is_found=False, e_value=0.4, expected_share=0.10, seen_share=0.102, users=4_000)


def cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")][2:]


def finding(metric: Metric, **changes: object) -> Finding:
    known = Finding(metric, "undecided", "none", treated=0.95, control=0.94, difference=0.01, low=-0.01, high=0.03)
    return known._replace(**changes)  # type: ignore[arg-type]


def evidence(*findings: Finding) -> Evidence:
    return Evidence(findings, 10, 90, FINE)


@pytest.mark.parametrize(
    ("nusd", "shown"),
    [
        (0, "$0.00"), (1_234_567_891, "$1.23"), (12_345_000_000_000, "$12,345.00"), (246_000_000, "$0.246"),
        (40_119_876, "$0.0401"), (1, "$0.000000001"), (-50_000_000, "-$0.0500"),
    ],
)  # fmt: skip
def test_dollars_have_three_digits_and_cents_at_least(nusd: int, shown: str) -> None:
    assert dollars(nusd) == shown


@pytest.mark.parametrize(
    ("metric", "value", "shown", "difference"),
    [
        ("success_rate", 0.9523456, "95.23 %", "+95.23 points"),
        ("mean_latency", 917.123, "917 ms", "+917 ms"),
        ("mean_latency", 12.34, "12.3 ms", "+12.3 ms"),
        ("p95_latency", 12_345.6, "12.35 s", "+12.35 s"),
        ("cost_per_request", 246_123.4, "$0.246", "+$0.246"),
        ("satisfaction", 0.2871, "0.29", "+0.29"),
        ("satisfaction", None, "–", "–"),
    ],
)
def test_a_value_is_in_a_unit_that_people_read(metric: Metric, value: float, shown: str, difference: str) -> None:
    assert (value_of(metric, value), value_of(metric, value, sign="+")) == (shown, difference)


def test_a_metric_is_a_line_with_its_interval_and_its_guardrail() -> None:
    rail = Guardrail("success_rate", 0.02)
    (line,) = cells(metrics_table(evidence(finding("success_rate", guard="holds", guardrail=rail))))
    assert line == [
        "success rate", "95.00 %", "94.00 %", "+1.00 points", "–", "-1.00 to +3.00 points", "undecided",
        "holds (at most 2 points less)",
    ]  # fmt: skip


def test_latency_and_cost_have_their_interval_as_a_ratio_like_their_guardrails() -> None:
    rail = Guardrail("p95_latency", 0.2, is_relative=True)
    slow = finding(
        "p95_latency", verdict="worse", guard="breached", treated=1_200.0, control=1_000.0, difference=200.0,
        low=150.0, high=280.0, relative=0.2, relative_low=0.15, relative_high=None, guardrail=rail,
    )  # fmt: skip
    (line,) = cells(metrics_table(evidence(slow)))
    assert line[3:] == ["+200 ms", "+20.0 %", "+15.0 % to no bound", "worse", "**breached** (at most 20 % more)"]


@pytest.mark.parametrize("metric", METRICS)
def test_a_metric_of_which_too_little_is_known_has_no_figures(metric: Metric) -> None:
    (line,) = cells(metrics_table(evidence(Finding(metric, "too few", "none"))))
    assert line[1:] == ["–", "–", "–", "–", "–", "too few", "–"]


def test_a_window_is_named_once() -> None:
    found = [("24h", evidence(finding("success_rate"), finding("satisfaction", low=None, high=None)))]
    lines = cells(windows_table(found))
    assert [line[0] for line in lines] == ["24h", ""]
    assert lines[1][4] == "–"


def test_calls_are_told_by_what_became_of_them() -> None:
    lines = {line[0]: line[1:] for line in cells(calls_table(ARM, ARM._replace(calls=0, answered=0, failed=0, left=0)))}
    assert lines["calls"] == ["200", "0"]
    assert lines["failed"] == ["15 (7.5 %)", "0"]
    assert lines["caller left before the end"] == ["5 (2.5 %)", "0"]
    assert lines["cost"] == ["$1.23", "$1.23"]


def test_errors_are_ranked_over_both_arms_and_the_rare_ones_summed_up() -> None:
    many = {f"kind{number}": 1 for number in range(10)}
    lines = cells(errors_table(ARM._replace(errors={"stall": 4, **many}), ARM._replace(errors={"server_error": 9})))
    assert lines[:2] == [["`server_error`", "0", "9"], ["`stall`", "4", "0"]]
    assert lines[-1] == ["4 other kinds", "4", "0"]
    assert errors_table(ARM, ARM) == ""


def changed(number: int, **changes: object) -> Change:
    known: dict[str, object] = {
        "agent": "qa_agent", "version": number, "at_ms": NOON_MS + number, "by": "ann", "event": Event.RAISED,
        "from_phase": Phase.RAMPING, "phase": Phase.RAMPING, "from_bps": 1_000, "share_bps": 2_500, "experiment": 1,
        "why": "looks good", "reasons": ("ann raised it",), "evidence": "",
    }  # fmt: skip
    return Change(**{**known, **changes})  # type: ignore[arg-type]


def story(changes: Sequence[Change]) -> list[list[str]]:
    return cells(story_table(changes))


def test_the_story_is_told_latest_first_with_who_when_what_and_why() -> None:
    back = changed(2, by="pilot", event=Event.ROLLED_BACK, from_bps=2_500, share_bps=0, why="", reasons=("a", "b"))
    assert story([changed(1), back]) == [
        ["2026-11-21T12:00:00Z", "`pilot`", "rolled back", "25 % → 0 %", "a<br>b"],
        ["2026-11-21T12:00:00Z", "`ann`", "raised", "10 % → 25 %", "“looks good”<br>ann raised it"],
    ]


def test_a_step_against_the_evidence_and_one_that_moves_nobody_are_told_as_such() -> None:
    forced = changed(1, is_forced=True, event=Event.OVERRULED)
    held = changed(2, event=Event.HELD, from_bps=2_500)
    assert [line[2:4] for line in story([forced, held])] == [
        ["held", "25 %"],
        ["overruled, against the evidence", "10 % → 25 %"],
    ]


def test_somebodys_words_are_no_markdown() -> None:
    (line,) = story([changed(1, why="<b>now</b>\n[x](y)")])
    assert line[4] == "“&lt;b>now&lt;/b> \\[x](y)”<br>ann raised it"


def test_of_a_long_story_the_latest_changes_are_told() -> None:
    text = story_table([changed(number) for number in range(50)])
    assert len(cells(text)) == 40
    assert text.endswith("and 10 earlier: `gateway rollout history`")


def test_arrivals_are_told_in_words() -> None:
    assert arrivals_words(FINE).endswith("10.20 % were in the fine-tuned arm, where 10.00 % belong.")
    assert arrivals_words(Mismatch(False, 1.0, None, None, 0)).startswith("Too few users")
    assert "no comparison can be trusted" in arrivals_words(FINE._replace(is_found=True, e_value=9_000.0))
