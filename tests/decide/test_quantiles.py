"""Quantiles off the grid: near the calls' own, as uncertain as when users are drawn anew, and open where data end."""

from math import inf, log

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.random import default_rng

from gateway.decide.compare import merge
from gateway.decide.quantiles import Quantiles, quantiles
from gateway.domain.experiment import GRID_RATIO, UserSums
from tests.experiments import drawn, histogram


def seen(rows: list[UserSums], level: float = 0.95) -> Quantiles:
    found = quantiles(merge(rows), level)
    assert found is not None
    return found


def row(user: str, latencies: list[float], *, is_treated: bool, stage: str = "1") -> UserSums:
    count = len(latencies)
    return UserSums(user, stage, is_treated, count, count, sum(latencies), 0, latencies=histogram(latencies))


def two_arms(control: list[list[float]], treated: list[list[float]]) -> list[UserSums]:
    return [row(f"c{n}", calls, is_treated=False) for n, calls in enumerate(control)] + [
        row(f"t{n}", calls, is_treated=True) for n, calls in enumerate(treated)
    ]


@pytest.mark.parametrize("level", [0.5, 0.9, 0.95, 0.99])
def test_it_is_the_calls_own_quantile_to_a_part_of_a_cell(level: float) -> None:
    random = default_rng(1)
    calls = [random.lognormal(7, 0.5, 50).tolist() for _ in range(400)]
    found = seen(two_arms(calls[:200], calls[200:]), level)
    for arm, mine in enumerate((calls[:200], calls[200:])):
        assert found.values[arm] == pytest.approx(np.quantile(mine, level), rel=0.01)


@given(st.lists(st.floats(1, 1e6), min_size=4, max_size=60), st.floats(0.05, 0.99))
def test_it_is_never_further_off_than_a_cell(latencies: list[float], level: float) -> None:
    halves = [latencies[::2], latencies[1::2]]
    found = seen(two_arms([*[[ms] for ms in halves[0]]], [*[[ms] for ms in halves[1]]]), level)
    for arm in (0, 1):
        exact = np.quantile(halves[arm], level, method="inverted_cdf")
        # A level that a cell's calls just reach may be the next cell's by a rounding.
        near = [np.quantile(halves[arm], level + step, method="inverted_cdf") for step in (-1e-9, 1e-9)]
        off = [abs(log(found.values[arm] / each)) for each in (exact, *near)]
        assert min(off) <= log(GRID_RATIO) + 1e-9


def test_the_standard_error_is_that_of_users_drawn_anew() -> None:
    random = default_rng(2)
    rows = drawn(random, users=300, calls=20)
    found = seen(rows)
    logs = []
    for _ in range(150):
        picked = random.integers(len(rows), size=len(rows))
        anew = seen([rows[index]._replace(user=f"{at}") for at, index in enumerate(picked)])
        logs.append(log(anew.values[1] / anew.values[0]))
    assert found.relative_se == pytest.approx(np.std(logs), rel=0.25)


def test_the_band_joins_what_each_arm_reaches_to_either_side() -> None:
    random = default_rng(8)
    arms = [[random.lognormal(7, 0.5, 20).tolist() for _ in range(300)] for _ in range(2)]
    found = seen(two_arms(*arms))
    ends = []
    for arm in (0, 1):
        step = 3 * np.sqrt(found.contrast.variances[arm])
        ends.append(np.log(np.quantile(arms[arm], [0.95 - step, 0.95, 0.95 + step])))
    (c_low, c, c_high), (t_low, t, t_high) = ends
    low, high = t - c - np.hypot(t - t_low, c_high - c), t - c + np.hypot(t_high - t, c - c_low)
    assert found.relative_band(3.0) == pytest.approx((np.expm1(low), np.expm1(high)), abs=0.01)


def test_a_slower_arm_is_slower_by_as_much() -> None:
    rows = drawn(default_rng(3), users=2000, slower=1.3)
    found = seen(rows)
    assert found.values[1] / found.values[0] == pytest.approx(1.3, rel=0.1)
    band = found.relative_band(3.0)
    assert 0 < band.low < 0.3 < band.high < 0.7


def test_swapping_the_arms_inverts_the_band() -> None:
    rows = drawn(default_rng(4), stages=(3000, 6000), slower=1.2)
    band = seen(rows).relative_band(2.5)
    other = seen([row._replace(is_treated=not row.is_treated) for row in rows]).relative_band(2.5)
    assert (1 + band.low) * (1 + other.high) == pytest.approx(1)
    assert (1 + band.high) * (1 + other.low) == pytest.approx(1)


def test_a_stage_in_which_all_was_slower_does_not_count_against_an_arm() -> None:
    random = default_rng(5)
    rows = []
    for stage, share, speed in (("fast", 0.1, 500.0), ("slow", 0.9, 5000.0)):
        for user in range(600):
            calls = (speed * random.lognormal(0, 0.3, 10)).tolist()
            rows.append(row(f"{stage}{user}", calls, is_treated=user < 600 * share, stage=stage))
    found = seen(rows)
    assert found.values[1] == pytest.approx(found.values[0], rel=0.06)


def test_with_too_few_calls_above_it_the_band_is_open_above() -> None:
    random = default_rng(6)
    found = seen(two_arms(*([random.lognormal(7, 0.5, 2).tolist() for _ in range(12)] for _ in range(2))))
    assert found.relative_band(3.0).high == inf
    assert found.relative_band(3.0).low == -1.0


def test_calls_that_all_last_as_long_are_known_to_a_cell() -> None:
    found = seen(two_arms([[1000.0]] * 300, [[1000.0]] * 300))
    band = found.relative_band(3.0)
    assert found.values[0] == found.values[1]
    assert 1 / GRID_RATIO**2 - 1 <= band.low < 0 < band.high <= GRID_RATIO**2 - 1


def test_without_latencies_there_is_no_quantile() -> None:
    assert quantiles(merge([row._replace(latencies={}) for row in drawn(default_rng(7))]), 0.95) is None
