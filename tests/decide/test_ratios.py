"""Ratios of sums: against leaving users out one by one, drawing them anew, and the sandwich of a regression."""

import numpy as np
import pytest
from numpy.random import default_rng
from numpy.typing import NDArray

from gateway.decide.compare import merge
from gateway.decide.ratios import Contrast, contrast
from gateway.domain.experiment import UserSums
from tests.experiments import drawn

Floats = NDArray[np.float64]


def successes(row: UserSums) -> tuple[float, float]:
    return row.calls, row.successes


def latency(row: UserSums) -> tuple[float, float]:
    return row.calls, row.latency_ms


def seen(rows: list[UserSums], *, scale: float | None = 1.0) -> Contrast:
    found = contrast(merge(rows), successes, scale=scale)
    assert found is not None
    return found


def row(user: str, *, is_treated: bool, calls: int, succeeded: int, stage: str = "1") -> UserSums:
    return UserSums(user, stage, is_treated, calls, succeeded, 100.0 * calls, 10 * calls)


def crowd(*, treated: int, control: int, calls: int = 1, stage: str = "1") -> list[UserSums]:
    """Users without a failure."""
    return [
        row(f"{'t' if n < treated else 'c'}{n}", is_treated=n < treated, calls=calls, succeeded=calls, stage=stage)
        for n in range(treated + control)
    ]


def difference_by_hand(rows: list[UserSums]) -> float:
    total = weights = 0.0
    for stage in {row.stage for row in rows}:
        arms = [[row for row in rows if row.stage == stage and row.is_treated is arm] for arm in (False, True)]
        calls = [sum(row.calls for row in arm) for arm in arms]
        rates = [sum(row.successes for row in arm) / size for arm, size in zip(arms, calls, strict=True)]
        weight = calls[0] * calls[1] / sum(calls)
        total += weight * (rates[1] - rates[0])
        weights += weight
    return total / weights


def test_the_difference_is_that_of_mantel_and_haenszel() -> None:
    rows = drawn(default_rng(1), stages=(1000, 5000, 9000))
    assert seen(rows).difference == pytest.approx(difference_by_hand(rows), rel=1e-12)


def test_the_stages_keep_a_slow_day_from_counting_against_an_arm() -> None:
    """Simpson's paradox: no arm is better in any stage, yet over all calls one would seem so."""
    good, bad = (crowd(treated=t, control=c, stage=s) for t, c, s in ((10, 90, "good"), (90, 10, "bad")))
    rows = good + [row._replace(calls=2, successes=1) for row in bad]
    assert seen(rows).difference == pytest.approx(0, abs=1e-12)
    assert seen([row._replace(stage="") for row in rows]).difference < -0.3


def test_with_one_stage_the_variance_is_that_of_leaving_users_out_one_by_one() -> None:
    rows = drawn(default_rng(2), users=200)
    found = contrast(merge(rows), latency)
    assert found is not None
    for arm in (0, 1):
        mine = [row for row in rows if row.is_treated == arm]
        calls, total = (np.array([getattr(row, name) for row in mine]) for name in ("calls", "latency_ms"))
        whole = total.sum() / calls.sum()
        without = (total.sum() - total) / (calls.sum() - calls)
        squares = (without - whole) ** 2
        # And one more user, like those who carry it.
        extra = (squares**2).sum() / squares.sum()
        assert found.variances[arm] == pytest.approx(squares.sum() + extra, rel=1e-9)


def test_it_is_a_little_more_than_the_cluster_robust_sandwich_of_a_regression_on_calls() -> None:
    rows = drawn(default_rng(3), users=400)
    sandwich = regression_variance(rows)
    assert sandwich < seen(rows).variance() < 1.1 * sandwich


def regression_variance(rows: list[UserSums]) -> float:
    """Liang and Zeger (1986), least squares of each call's success on its arm, clustered by user."""
    scores, bread = [], np.zeros((2, 2))
    calls = np.array([row.calls for row in rows], dtype=float)
    design = np.array([[1.0, float(row.is_treated)] for row in rows])
    wins = np.array([row.successes for row in rows], dtype=float)
    bread = np.linalg.inv((design * calls[:, None]).T @ design)
    fit = bread @ (design.T @ wins)
    scores = design * (wins - calls * (design @ fit))[:, None]
    return float((bread @ (scores.T @ scores) @ bread)[1, 1])


def test_users_who_move_between_the_arms_vary_as_when_they_are_drawn_anew() -> None:
    random = default_rng(4)
    rows = drawn(random, users=400, stages=(2000, 5000, 8000), success=(0.7, 0.7))
    found = seen(rows)
    assert found.covariance > 0
    sums = np.zeros((400, 3, 2, 2))
    for each in rows:
        sums[int(each.user[1:]), int(each.stage), int(each.is_treated)] = each.calls, each.successes
    draws = []
    for _ in range(1000):
        calls, wins = np.moveaxis(sums[random.integers(400, size=400)].sum(axis=0), -1, 0)
        weights = calls.prod(axis=1) / calls.sum(axis=1)
        draws.append(weights @ np.diff(wins / calls)[:, 0] / weights.sum())
    assert found.variance() == pytest.approx(np.var(draws), rel=0.2)


def test_users_who_do_the_same_many_times_are_no_more_users() -> None:
    rows = drawn(default_rng(5), users=200)
    often = [row._replace(calls=row.calls * 50, successes=row.successes * 50) for row in rows]
    assert seen(often).variance() == pytest.approx(seen(rows).variance(), rel=1e-9)


@pytest.mark.parametrize("treated, control", [(50, 50), (100, 900)])
def test_where_nothing_ever_failed_one_more_user_might(treated: int, control: int) -> None:
    found = seen(crowd(treated=treated, control=control, calls=20))
    assert found.variances == pytest.approx((control**-2, treated**-2))
    assert found.freedom < 9


def test_where_only_one_arm_never_failed_it_borrows_from_the_other() -> None:
    rows = crowd(treated=100, control=1000)
    failing = [
        row._replace(successes=0) if row.user.startswith("c") and n % 20 == 0 else row for n, row in enumerate(rows)
    ]
    found = seen(failing)
    # One failure among 100 calls, nearly.
    assert found.variances[1] == pytest.approx(0.01**2, rel=0.15)
    assert found.variances[1] > 50 * found.variances[0] / 100


def test_rare_failures_leave_few_degrees_of_freedom() -> None:
    def freedom(failing: int) -> float:
        rows = crowd(treated=2000, control=2000)
        return seen([row._replace(successes=0) if n % 2000 < failing else row for n, row in enumerate(rows)]).freedom

    assert freedom(1) == pytest.approx(8, rel=0.1)
    assert freedom(20) == pytest.approx(84, rel=0.1)
    assert freedom(500) > 1000


def test_one_user_with_most_calls_leaves_few_effective_users() -> None:
    rows = crowd(treated=500, control=500)
    assert seen(rows).effective == pytest.approx(500)
    rows[0] = rows[0]._replace(calls=10_000, successes=9_000)
    assert seen(rows).effective < 1.2


@pytest.mark.parametrize("alone", [0, 1])
def test_a_stage_with_fewer_than_two_users_in_an_arm_is_left_out(alone: int) -> None:
    rows = crowd(treated=20, control=20)
    small = crowd(treated=alone, control=30, stage="2")
    assert seen(rows + small).weights == {"1": 1.0}
    assert contrast(merge(small), successes, scale=1.0) is None
