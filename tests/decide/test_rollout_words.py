"""Reasons in words: each figure stands beside what it is compared with."""

import pytest

from gateway.decide.rollout_words import (
    LABELS,
    above_ceiling,
    allowance,
    compared,
    guarded,
    mismatched,
    percent,
    standing,
    value_of,
)
from gateway.domain.experiment import METRICS, Finding, Guardrail, Metric, Mismatch
from tests.rolling import begun

SUCCESS = Finding(
    "success_rate", "worse", "breached", treated=0.91, control=0.95, difference=-0.04, low=-0.055, high=-0.025,
    relative=-0.042, relative_low=-0.06, relative_high=-0.03, users_treated=812, users_control=7_290,
)  # fmt: skip
LATENCY = Finding(
    "p95_latency", "undecided", "undecided", treated=880.0, control=800.0, difference=80.0, low=-40.0, high=200.0,
    relative=0.1, relative_low=-0.05, relative_high=None, users_treated=812, users_control=7_290,
)  # fmt: skip


def test_a_rate_is_told_in_points() -> None:
    assert compared(SUCCESS) == ("success rate 91.00 % against 95.00 %, -4 points (-5.5 to -2.5; 812 and 7,290 users)")


def test_a_latency_is_told_in_per_cent_and_what_has_no_bound_is_said_to_have_none() -> None:
    assert compared(LATENCY) == ("p95 latency 880 ms against 800 ms, +10 % (-5 to no bound; 812 and 7,290 users)")


def test_a_cost_is_told_in_dollars_where_there_is_no_ratio() -> None:
    cost = Finding("cost_per_request", "worse", "none", treated=400_000.0, control=0.0, difference=400_000.0,
                   low=1_000.0, high=None)  # fmt: skip
    assert compared(cost) == (
        "cost per request 0.0004 usd against 0.00 usd, +0.0004 usd "
        "(+0.000001 to no bound; 0 and 0 users)"
    )  # fmt: skip


@pytest.mark.parametrize("metric", METRICS)
def test_where_too_little_is_known_no_figure_is_made_up(metric: Metric) -> None:
    said = compared(Finding(metric, "too few", "too few", users_treated=3, users_control=4))
    assert said == f"{LABELS[metric]}: too little is known yet (3 and 4 users)"


def test_arms_without_a_difference_are_shown_without_one() -> None:
    satisfied = Finding("satisfaction", "too few", "none", treated=0.5, control=0.25)
    assert compared(satisfied) == "satisfaction 0.50 against 0.25 (0 and 0 users)"


@pytest.mark.parametrize(
    ("guard", "said"),
    [
        ("breached", "past the guardrail of 2 points less"),
        ("holds", "within the guardrail of 2 points less"),
        ("undecided", "not yet known to be within the guardrail of 2 points less"),
        ("too few", "too few yet for the guardrail of 2 points less"),
        ("none", "too few yet for the guardrail of 2 points less"),
    ],
)
def test_what_a_guardrail_makes_of_it(guard: str, said: str) -> None:
    finding = SUCCESS._replace(guard=guard)
    assert guarded(finding, Guardrail("success_rate", 0.02)) == f"{compared(finding)}: {said}"


@pytest.mark.parametrize(
    ("guardrail", "said"),
    [
        (Guardrail("success_rate", 0.02), "2 points less"),
        (Guardrail("p95_latency", 0.2, is_relative=True), "20 % more"),
        (Guardrail("p95_latency", 150.0), "150 ms more"),
        (Guardrail("cost_per_request", 4.0, is_relative=True), "400 % more"),
        (Guardrail("satisfaction", 0.05), "0.05 less"),
    ],
)
def test_a_margin_is_told_in_its_own_unit(guardrail: Guardrail, said: str) -> None:
    assert allowance(guardrail) == said


def test_a_mismatch_is_told_with_both_shares_and_its_odds() -> None:
    assert mismatched(Mismatch(True, 5_000.0, 0.10, 0.08, 4_000)) == (
        "the arms do not have the users they should (4,000 users: 8.00 % of them were in the treated arm where "
        "10.00 % belong; by chance that comes about once in 5,000 experiments)"
    )
    without = mismatched(Mismatch(True, 1e300, None, None, 10))
    assert without.endswith("(10 users; by chance that comes about less than once in a million experiments)")


@pytest.mark.parametrize(("bps", "said"), [(0, "0 %"), (1_250, "12.5 %"), (10_000, "100 %"), (1, "0.01 %")])
def test_a_share_is_told_as_people_write_it(bps: int, said: str) -> None:
    assert percent(bps) == said


@pytest.mark.parametrize(
    ("metric", "value", "said"),
    [("success_rate", 0.98765, "98.77 %"), ("mean_latency", 812.4, "812 ms"), ("satisfaction", -0.5, "-0.50")],
)
def test_a_value_has_its_unit(metric: Metric, value: float, said: str) -> None:
    assert value_of(metric, value) == said


def test_a_share_above_what_the_holdback_leaves_is_told_with_the_order_that_lowers_it() -> None:
    assert above_ceiling(9_500, 9_500) == ()
    (said,) = above_ceiling(9_501, 9_500)
    assert said.startswith("95.01 % is above the 95 % that rollout.holdback_percent leaves")
    assert "`gateway rollout set 95`" in said
    assert "`gateway rollout set 87.5`" in above_ceiling(10_000, 8_750)[0]


def test_where_a_rollout_stands_is_told_with_when_who_and_why() -> None:
    assert standing(begun()) == (
        "since 2026-11-21T00:00:00Z, by pilot: the policy's ab_testing.rollout_percentage starts it at 10 %"
    )
