"""The grid of latencies, and the names that policies and reports rely on."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.domain.experiment import GRID_MS, GRID_RATIO, METRICS, bucket_of_ms


@given(st.floats(1.0, GRID_MS[-1]))
def test_a_latency_lies_in_its_cell(ms: float) -> None:
    low = GRID_MS[bucket_of_ms(ms)]
    assert low <= ms < low * GRID_RATIO


@given(st.floats(0, 1e9), st.floats(0, 1e9))
def test_a_longer_latency_is_in_no_earlier_cell(one: float, other: float) -> None:
    assert (bucket_of_ms(one) <= bucket_of_ms(other)) or one > other


@pytest.mark.parametrize(
    "ms, bucket",
    [(-1.0, 0), (0.0, 0), (1.0, 0), (1.0499, 0), (1.05, 1), (1000.0, 141), (math.inf, 319), (1e12, 319)],
)
def test_a_latency_has_this_cell_whoever_counts_it(ms: float, bucket: int) -> None:
    assert bucket_of_ms(ms) == bucket


def test_every_edge_begins_its_own_cell() -> None:
    assert [bucket_of_ms(edge) for edge in GRID_MS] == list(range(320))
    assert [bucket_of_ms(math.nextafter(edge, 0)) for edge in GRID_MS[1:]] == list(range(319))


def test_the_grid_is_of_five_percent_from_a_millisecond_to_an_hour_and_a_half() -> None:
    assert GRID_MS[0] == 1.0
    assert GRID_MS[-1] * GRID_RATIO > 90 * 60_000
    assert all(high / low == pytest.approx(1.05) for low, high in pairwise(GRID_MS))


def test_the_metrics_are_those_of_the_mission() -> None:
    assert METRICS == ("success_rate", "mean_latency", "p95_latency", "cost_per_request", "satisfaction")
