"""Evidence: what holds whatever the data, what follows from known data, and how often it is wrong when looked at."""

from math import isfinite, sqrt

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.random import default_rng
from scipy import stats

from gateway.decide.compare import KINDS, evidence_of, merge
from gateway.decide.ratios import contrast
from gateway.domain.experiment import METRICS, Arrivals, Evidence, Finding, Guardrail, Metric, Terms, UserSums
from tests.experiments import drawn, user_sums

GUARDRAILS = (
    Guardrail("success_rate", 0.02),
    Guardrail("mean_latency", 0.2, is_relative=True),
    Guardrail("p95_latency", 0.2, is_relative=True),
    Guardrail("cost_per_request", 0.1, is_relative=True),
    Guardrail("satisfaction", 0.1),
)
TERMS = Terms(guardrails=GUARDRAILS)
# Small enough that hypothesis' handful of users gets to the arithmetic.
EAGER = Terms(guardrails=GUARDRAILS, min_users=2, min_effective_users=1.0)
ROWS = st.lists(user_sums(), max_size=40)


def look(rows: list[UserSums], terms: Terms = TERMS) -> dict[Metric, Finding]:
    evidence = evidence_of(rows, [], terms)
    assert [finding.metric for finding in evidence.findings] == list(METRICS)
    return {finding.metric: finding for finding in evidence.findings}


def numbers(finding: Finding) -> list[float]:
    return [value for value in finding[3:11] if value is not None]


def same(one: Evidence, other: Evidence) -> None:
    for mine, theirs in zip(one.findings, other.findings, strict=True):
        assert (mine.verdict, mine.guard, mine[11:15]) == (theirs.verdict, theirs.guard, theirs[11:15])
        assert numbers(mine) == pytest.approx(numbers(theirs), rel=1e-6, abs=1e-9)


@given(ROWS)
def test_whatever_the_rows_every_number_is_finite_and_in_order(rows: list[UserSums]) -> None:
    for finding in look(rows, EAGER).values():
        assert all(isfinite(value) for value in numbers(finding))
        if finding.low is not None and finding.difference is not None:
            assert finding.low <= finding.difference + 1e-9 * abs(finding.difference)
        if finding.high is not None and finding.difference is not None:
            assert finding.high >= finding.difference - 1e-9 * abs(finding.difference)
        assert finding.guard != "none"


@pytest.mark.parametrize("seed", range(8))
def test_no_interval_holds_what_cannot_be(seed: int) -> None:
    found = look(drawn(default_rng(seed), users=12), EAGER)
    for metric, most in (("success_rate", 1.0), ("satisfaction", 2.0)):
        low, high = found[metric].low, found[metric].high
        assert low is not None
        assert high is not None
        assert -most <= low <= high <= most
    assert all(finding.relative_low is None or finding.relative_low >= -1 for finding in found.values())


@given(ROWS, st.randoms())
def test_the_order_of_the_rows_does_not_matter(rows: list[UserSums], random: object) -> None:
    shuffled = sorted(rows, key=lambda _: random.random())  # type: ignore[attr-defined]
    same(evidence_of(rows, [], EAGER), evidence_of(shuffled, [], EAGER))


@given(ROWS)
def test_rows_of_one_user_count_as_one_row(rows: list[UserSums]) -> None:
    twice = [each for row in rows for each in (row, row)]
    doubled = [
        row._replace(
            calls=2 * row.calls,
            successes=2 * row.successes,
            latency_ms=2 * row.latency_ms,
            cost_nusd=2 * row.cost_nusd,
            scores=2 * row.scores,
            score_sum=2 * row.score_sum,
            latencies={cell: 2 * count for cell, count in row.latencies.items()},
        )
        for row in rows
    ]
    same(evidence_of(twice, [], EAGER), evidence_of(doubled, [], EAGER))


@given(ROWS)
def test_swapping_the_arms_turns_every_difference_round(rows: list[UserSums]) -> None:
    swapped = look([row._replace(is_treated=not row.is_treated) for row in rows], EAGER)
    other = {"better": "worse", "worse": "better", "undecided": "undecided", "too few": "too few"}
    for metric, finding in look(rows, EAGER).items():
        mirror = swapped[metric]
        assert mirror.verdict == other[finding.verdict]
        assert (mirror.users_treated, mirror.users_control) == (finding.users_control, finding.users_treated)
        if metric != "p95_latency" and finding.low is not None:
            assert finding.high is not None
            size = abs(finding.low) + abs(finding.high)
            assert (mirror.high, mirror.low) == pytest.approx((-finding.low, -finding.high), abs=1e-6 * size)


@given(st.lists(user_sums(), min_size=1, max_size=20))
def test_two_arms_with_the_same_calls_are_never_told_apart(rows: list[UserSums]) -> None:
    mirrored = [row._replace(user=f"{row.is_treated}{row.user}", is_treated=False) for row in rows]
    mirrored += [row._replace(user=f"other{row.user}", is_treated=True) for row in mirrored]
    for finding in look(mirrored, EAGER).values():
        assert finding.verdict in ("undecided", "too few")
        assert finding.guard != "breached"


@settings(max_examples=25)
@given(st.floats(0.001, 0.2), st.integers(0, 100))
def test_a_smaller_alpha_makes_every_interval_wider(alpha: float, seed: int) -> None:
    rows = drawn(default_rng(seed), users=120)
    narrow = look(rows, EAGER._replace(alpha=alpha))
    for metric, finding in look(rows, EAGER._replace(alpha=alpha / 2)).items():
        if finding.low is not None and finding.high is not None:
            low, high = narrow[metric].low, narrow[metric].high
            assert low is not None
            assert high is not None
            assert finding.low <= low <= high <= finding.high


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [row for row in drawn(default_rng(1)) if row.is_treated],
        [row for row in drawn(default_rng(1)) if not row.is_treated],
        drawn(default_rng(1), users=1),
        drawn(default_rng(1), stages=(0,)),
        drawn(default_rng(1), stages=(10_000,)),
        [row._replace(calls=0, successes=0, scores=0, latencies={}) for row in drawn(default_rng(1))],
    ],
    ids=["nothing", "treated only", "control only", "one user", "share 0", "share 100", "no calls"],
)
def test_without_two_arms_there_is_too_few_of_everything(rows: list[UserSums]) -> None:
    for finding in look(rows, EAGER).values():
        assert (finding.verdict, finding.guard) == ("too few", "too few")


def test_without_feedback_only_satisfaction_is_unknown() -> None:
    found = look([row._replace(scores=0, score_sum=0.0) for row in drawn(default_rng(1), users=400)])
    assert found.pop("satisfaction").verdict == "too few"
    assert {finding.verdict for finding in found.values()} == {"undecided"}


def test_one_user_short_is_too_few() -> None:
    rows = [row._replace(calls=10, successes=9) for row in drawn(default_rng(1), users=300)]
    treated = [row for row in rows if row.is_treated]
    control = [row for row in rows if not row.is_treated]
    short = look(treated[:29] + control)["success_rate"]
    assert (short.verdict, short.users_treated) == ("too few", 29)
    assert short.low is None
    assert short.difference is not None
    assert look(treated[:30] + control)["success_rate"].verdict != "too few"


def test_many_users_of_whom_one_makes_nearly_all_calls_are_too_few() -> None:
    rows = drawn(default_rng(1), users=400)
    assert look(rows)["success_rate"].verdict == "undecided"
    rows[0] = rows[0]._replace(calls=100_000, successes=90_000)
    assert look(rows)["success_rate"].verdict == "too few"


CHANGES: list[tuple[dict[str, object], Metric, str, str]] = [
    ({"success": (0.9, 0.6)}, "success_rate", "worse", "breached"),
    ({"success": (0.6, 0.9)}, "success_rate", "better", "holds"),
    ({"slower": 2.0}, "mean_latency", "worse", "breached"),
    ({"slower": 2.0}, "p95_latency", "worse", "breached"),
    ({"slower": 0.5}, "mean_latency", "better", "holds"),
    ({"slower": 0.5}, "p95_latency", "better", "holds"),
    ({"dearer": 4.0}, "cost_per_request", "worse", "breached"),
    ({"dearer": 0.25}, "cost_per_request", "better", "holds"),
    ({"happier": -0.5}, "satisfaction", "worse", "breached"),
    ({"happier": 0.5}, "satisfaction", "better", "holds"),
]


@pytest.mark.parametrize("change, metric, verdict, guard", CHANGES)
def test_a_large_change_is_seen_in_its_metric_and_its_direction(
    change: dict[str, object], metric: Metric, verdict: str, guard: str
) -> None:
    found = look(drawn(default_rng(2), users=1500, stages=(2500, 5000), **change))  # type: ignore[arg-type]
    assert (found[metric].verdict, found[metric].guard) == (verdict, guard)
    for other, finding in found.items():
        if other != metric and {other, metric} != {"mean_latency", "p95_latency"}:
            assert finding.verdict == "undecided"
            assert finding.guard != "breached"


def test_a_guardrail_holds_for_a_loss_within_its_margin_and_breaks_beyond() -> None:
    rows = drawn(default_rng(3), users=6000, success=(0.9, 0.86))

    def guard(margin: float) -> str:
        return look(rows, Terms(guardrails=(Guardrail("success_rate", margin),)))["success_rate"].guard

    found = look(rows, Terms())["success_rate"]
    assert (found.verdict, found.guard) == ("worse", "none")
    assert found.low is not None
    assert found.high is not None
    assert guard(-found.low + 1e-9) == "holds"
    assert guard(-found.low - 1e-4) == guard(-found.high + 1e-4) == "undecided"
    assert guard(-found.high - 1e-9) == "breached"


@pytest.mark.parametrize("metric", ["success_rate", "mean_latency", "p95_latency", "cost_per_request"])
def test_a_relative_guardrail_says_what_the_relative_interval_says(metric: Metric) -> None:
    rows = drawn(default_rng(4), users=1500, success=(0.9, 0.8), slower=1.3, dearer=1.3)
    found = look(rows, Terms())[metric]
    assert found.relative_low is not None
    assert found.relative_high is not None
    best, worst = (found.relative_low, found.relative_high)
    if metric == "success_rate":
        best, worst = -worst, -best
    for margin, guard in ((best - 1e-3, "breached"), (best + 1e-3, "undecided"), (worst + 1e-3, "holds")):
        terms = Terms(guardrails=(Guardrail(metric, margin, is_relative=True),))
        assert look(rows, terms)[metric].guard == guard


def test_models_without_a_price_cost_the_same() -> None:
    free = [row._replace(cost_nusd=0) for row in drawn(default_rng(5), users=400)]
    cost = look(free)["cost_per_request"]
    assert (cost.verdict, cost.guard, cost.low, cost.high) == ("undecided", "holds", 0.0, 0.0)
    assert cost.relative is cost.relative_low is cost.relative_high is None
    priced = [row._replace(cost_nusd=1000 * row.calls if row.is_treated else 0) for row in free]
    cost = look(priced)["cost_per_request"]
    assert (cost.verdict, cost.guard, cost.relative) == ("worse", "breached", None)


def test_calls_that_never_fail_leave_room_for_one_that_will() -> None:
    rows = [row._replace(successes=row.calls) for row in drawn(default_rng(6), users=400)]
    found = look(rows)["success_rate"]
    assert found.difference == 0
    assert found.low is not None
    # No narrower than what the rule of three leaves for one arm of about 200 users.
    assert found.low < -3 / 200
    assert found.verdict == "undecided"


def outage(*, treated: int, control: int, failing: int = 0) -> Finding:
    """Three calls of each user, all failed in the treated arm; else one of every `failing`th user's, or none."""
    rows = [
        UserSums(f"u{n}", "1", False, 3, 2 if failing and n % failing == 0 else 3, 2_400.0, 600) for n in range(control)
    ]
    rows += [UserSums(f"t{n}", "1", True, 3, 0, 2_400.0, 600) for n in range(treated)]
    return look(rows, Terms(guardrails=(GUARDRAILS[0], GUARDRAILS[2], GUARDRAILS[3])))["success_rate"]


def test_a_total_outage_is_told_within_what_can_be() -> None:
    found = outage(treated=30, control=270)
    assert (found.difference, found.low, found.high, found.guard) == (-1.0, -1.0, 1.0, "undecided")


@pytest.mark.parametrize(
    ("treated", "control", "guard"),
    [
        (29, 10_000, "too few"),
        (30, 270, "undecided"),
        (41, 369, "undecided"),
        (42, 378, "breached"),
        (50, 450, "breached"),
        (58, 58, "undecided"),
        (59, 59, "breached"),
    ],
)
def test_where_the_control_never_failed_a_total_outage_takes_as_many_users_as_documented(
    treated: int, control: int, guard: str
) -> None:
    assert outage(treated=treated, control=control).guard == guard


def test_where_the_control_fails_now_and_then_a_total_outage_is_seen_as_soon_as_anything_is() -> None:
    assert outage(treated=29, control=270, failing=7).guard == "too few"
    assert outage(treated=30, control=270, failing=7).guard == "breached"


@pytest.mark.parametrize("metric", ["success_rate", "satisfaction"])
def test_where_all_calls_are_as_good_as_can_be_one_more_user_may_be_as_bad_as_can_be(metric: Metric) -> None:
    best = [UserSums(f"u{n}", "1", n < 200, 2, 2, 1_600.0, 20, 2, 2.0) for n in range(400)]
    worst = UserSums("one more", "1", True, 2, 0, 1_600.0, 20, 2, -2.0)
    kind = KINDS[metric]
    assert kind.read is not None
    before, after = (contrast(merge(rows), kind.read, scale=kind.scale) for rows in (best, [*best, worst]))
    assert before is not None
    assert after is not None
    assert before.variances[0] == before.variances[1]
    assert sqrt(before.variances[1]) == pytest.approx(before.values[1] - after.values[1], rel=0.01)


def test_alpha_is_shared_among_the_guardrails() -> None:
    rows = drawn(default_rng(7), users=400)
    assert {finding.alpha for finding in look(rows, Terms()).values()} == {0.05}
    assert {finding.alpha for finding in look(rows).values()} == {0.01}


def test_a_fixed_test_at_the_same_level_is_narrower_but_not_by_much() -> None:
    """Looking at all times costs less than twice the width of looking once."""
    found = look(drawn(default_rng(8), users=2000), Terms())["success_rate"]
    assert found.low is not None
    assert found.high is not None
    rows = drawn(default_rng(8), users=2000)
    means = [[row.successes / row.calls for row in rows if row.is_treated is arm] for arm in (False, True)]
    once = stats.ttest_ind(means[1], means[0], equal_var=False).confidence_interval()
    assert 1 < (found.high - found.low) / (once.high - once.low) < 2


@pytest.mark.parametrize(
    "guardrails, message",
    [
        ((Guardrail("success_rate", 0.1), Guardrail("success_rate", 0.2)), "success_rate has two guardrails"),
        ((Guardrail("satisfaction", 0.1, is_relative=True),), "a guardrail on satisfaction is absolute"),
        ((Guardrail("success_rate", -0.1),), "the margin of success_rate must be 0 or more, not -0.1"),
        ((Guardrail("success_rate", float("nan")),), "must be 0 or more, not nan"),
    ],
)
def test_a_guardrail_that_makes_no_sense_is_refused(guardrails: tuple[Guardrail, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evidence_of([], [], Terms(guardrails=guardrails))


def test_users_are_counted_in_every_arm_they_were_in_and_a_mismatch_is_told() -> None:
    rows = drawn(default_rng(9), users=500, stages=(2000, 6000))
    evidence = evidence_of(rows, [Arrivals("0", 0.2, 400, 400)], TERMS)
    arms = [{row.user for row in rows if row.is_treated is arm} for arm in (False, True)]
    assert (evidence.users_control, evidence.users_treated) == (len(arms[0]), len(arms[1]))
    assert evidence.users_control + evidence.users_treated > 500
    assert evidence.mismatch.is_found


def test_equal_arms_are_seldom_told_apart_however_often_one_looks() -> None:
    """All five metrics at once, at alpha 0.05 in all. Beyond 5 of 30 experiments a true 0.05 has a chance of 0.003."""
    wrong = 0
    for seed in range(30):
        rows = drawn(default_rng(seed), users=400, stages=(4000,), calls=4)
        looks = [look([row for row in rows if int(row.user[1:]) < seen]) for seen in (280, 340, 400)]
        wrong += any(finding.verdict in ("better", "worse") for each in looks for finding in each.values())
    assert wrong <= 5
