"""Intervals: against the integrals and tables they stand for, and where they have no end."""

from math import exp, inf, isfinite, log, sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, stats

from gateway.decide.intervals import Band, difference_band, log_to_relative, ratio_band, threshold


@pytest.mark.parametrize("alpha", [0.05, 0.01, 0.001])
@pytest.mark.parametrize("information", [0.1, 1.0, 10.0, 500.0])
def test_at_the_threshold_the_mixture_of_likelihood_ratios_is_one_over_alpha(information: float, alpha: float) -> None:
    z, tau = threshold(information, alpha), sqrt(information)

    # In units of the standard error: the estimate is z, the effects that are mixed are normal with variance tau^2.
    def ratio(effect: float) -> float:
        return exp(effect * z - effect * effect / 2) * stats.norm.pdf(effect, scale=tau)

    mixture, _ = integrate.quad(ratio, -12 * tau - z, 12 * tau + z, limit=400, points=[0.0, z])
    assert mixture == pytest.approx(1 / alpha, rel=1e-6)


@pytest.mark.parametrize("freedom", [4, 10, 20, 50, 200])
@pytest.mark.parametrize("information", [1.0, 10.0, 500.0])
def test_with_few_degrees_of_freedom_it_is_students_quantile(information: float, freedom: int) -> None:
    z = threshold(information, 0.05)
    exact = stats.t.isf(stats.norm.sf(z), freedom)
    assert threshold(information, 0.05, freedom) == pytest.approx(exact, rel=0.06)


@given(st.floats(1e-6, 1e9), st.floats(1e-9, 0.4), st.floats(4, 1e9))
def test_a_smaller_alpha_or_less_freedom_reaches_further(information: float, alpha: float, freedom: float) -> None:
    reach = threshold(information, alpha, freedom)
    assert isfinite(reach)
    assert reach >= threshold(information, alpha) * (1 - 1e-9)
    assert threshold(information, alpha / 2, freedom) >= reach


def test_it_is_never_less_than_what_one_look_would_need() -> None:
    for information in (0.01, 1, 8, 100, 1e6):
        assert threshold(information, 0.05) > stats.norm.isf(0.025)


def test_without_information_there_is_no_end() -> None:
    assert threshold(0.0, 0.05) == inf


@given(
    st.floats(-5, 5), st.floats(0.1, 5), st.floats(0.001, 0.3), st.floats(0.001, 0.3), st.floats(-0.9, 0.9),
    st.floats(1, 4),
)  # fmt: skip
def test_the_ratios_in_the_band_are_those_that_are_not_rejected(
    treated: float, control: float, sd_treated: float, sd_control: float, correlation: float, reach: float
) -> None:
    covariance = correlation * sd_treated * sd_control
    band = ratio_band(
        treated, control, var_treated=sd_treated**2, var_control=sd_control**2, covariance=covariance, reach=reach
    )
    if band is None:
        assert control <= reach * sd_control
        return
    for end in band:
        variance = sd_treated**2 - 2 * end * covariance + end * end * sd_control**2
        assert abs(treated - end * control) == pytest.approx(reach * sqrt(variance), rel=1e-3, abs=1e-6)
    assert band.low <= treated / control <= band.high


def test_a_difference_of_two_plain_estimates_has_the_plain_interval() -> None:
    band = difference_band(3.0, Band(2.0, 4.0), 1.0, Band(0.5, 1.5), 0.0)
    assert band == pytest.approx((2 - sqrt(1.25), 2 + sqrt(1.25)))
    together = difference_band(3.0, Band(2.0, 4.0), 1.0, Band(0.0, 2.0), 1.0)
    assert together == pytest.approx((2.0, 2.0))


def test_an_end_that_is_open_stays_open() -> None:
    assert difference_band(3.0, Band(2.0, inf), 1.0, Band(0.5, 1.5), 0.3).high == inf
    assert difference_band(3.0, Band(2.0, 4.0), 1.0, Band(0.5, inf), 0.3).low == -inf
    assert log_to_relative(Band(-inf, inf)) == (-1.0, inf)


def test_a_log_ratio_is_told_as_a_relative_difference() -> None:
    assert log_to_relative(Band(log(0.8), log(1.25))) == pytest.approx((-0.2, 0.25))


def test_brownian_motion_crosses_no_more_often_than_alpha() -> None:
    random = np.random.default_rng(7)
    looks = np.arange(1, 2001)
    walks = np.cumsum(random.standard_normal((2000, 2000)), axis=1)
    # One unit of information a step, from 0.05 to 100 of the prior's.
    limits = np.array([threshold(0.05 * look, 0.05) for look in looks]) * np.sqrt(looks)
    crossed = (np.abs(walks) > limits).any(axis=1).mean()
    assert 0.02 < crossed < 0.05
