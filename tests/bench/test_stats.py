"""Quantiles are measured values, and a spread never invents one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.stats import Spread, quantile


@pytest.mark.parametrize("q, expected", [(0.0, 1), (0.5, 50), (0.99, 99), (0.991, 100), (1.0, 100)])
def test_a_quantile_of_a_hundred_values_is_that_rank(q: float, expected: int) -> None:
    assert quantile(range(1, 101), q) == expected


def test_one_value_is_every_quantile() -> None:
    assert [quantile([7.0], q) for q in (0.0, 0.5, 0.99, 1.0)] == [7.0] * 4


@given(st.lists(st.floats(allow_nan=False), min_size=1), st.floats(0, 1))
def test_a_quantile_is_always_one_of_the_values(values: list[float], q: float) -> None:
    assert quantile(sorted(values), q) in values


def test_no_values_have_no_quantile() -> None:
    with pytest.raises(ValueError, match="no quantile"):
        quantile([], 0.5)


@pytest.mark.parametrize("q", [-0.01, 1.01, 99])
def test_a_quantile_outside_0_to_1_is_refused(q: float) -> None:
    with pytest.raises(ValueError, match="lies in"):
        quantile([1.0], q)


def test_a_spread_tells_median_least_and_most() -> None:
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(median=2.0, low=1.0, high=3.0, rounds=3)


def test_nothing_measured_is_not_a_zero() -> None:
    assert Spread.of([]) is None
