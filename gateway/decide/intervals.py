"""Intervals that hold at every look at once, from an estimate and its variance.

Knows nothing of users, arms or metrics. Its one invariant: however often one looks, and whatever makes one stop, the
interval misses the truth at any of the looks with probability alpha at most, as far as the estimate is normal.
"""

from math import exp, expm1, inf, log, log1p, sqrt
from typing import NamedTuple

# A variance carried by a single user counts as 4 degrees of freedom. At alpha 0.05 that reaches 7 standard errors: with
# none of 7 expected events seen, the chance of which is 0.001, the interval just begins to exclude the 7.
MIN_FREEDOM = 4.0


class Band(NamedTuple):
    """What an interval holds, both ends included; infinite where it has no end."""

    low: float
    high: float


def threshold(information: float, alpha: float, freedom: float = inf) -> float:
    """How many standard errors the interval reaches to either side.

    The normal mixture of Robbins (1970), as Johari et al. (2022) use it: against a normal prior of variance tau^2 the
    likelihood ratio is a martingale, so it ever exceeds 1/alpha with probability alpha at most (Ville). `information`
    is tau^2 / se^2, with tau fixed beforehand. Where the variance itself is known with `freedom` degrees of freedom
    only, the threshold is carried over to Student's t by Wallace's (1959) approximation, within 6 % from 4 upwards.
    """
    if information <= 0:
        return inf
    square = (1 + 1 / information) * (log1p(information) - 2 * log(alpha))
    if freedom == inf:
        return sqrt(square)
    square *= ((8 * freedom + 3) / (8 * freedom + 1)) ** 2
    # Beyond 1e130 nothing is told from infinity, and exp() would overflow.
    return sqrt(freedom * expm1(min(600.0, square / freedom)))


def ratio_band(
    treated: float, control: float, *, var_treated: float, var_control: float, covariance: float, reach: float
) -> Band | None:
    """All ratios treated/control that are no further than `reach` standard errors from what was seen (Fieller 1954).

    None where the control cannot be told from zero: then the ratio has no interval.
    """
    square = reach * reach
    # The ratios x with (treated - x control)^2 <= square * Var(treated - x control): a quadratic in x.
    leading = control * control - square * var_control
    if not leading > 0:
        return None
    middle = treated * control - square * covariance
    last = treated * treated - square * var_treated
    root = sqrt(max(0.0, middle * middle - leading * last))
    return Band((middle - root) / leading, (middle + root) / leading)


def difference_band(first: float, first_band: Band, second: float, second_band: Band, correlation: float) -> Band:
    """The interval of `first - second` from theirs, which may be lopsided (MOVER: Zou and Donner 2008)."""
    difference = first - second
    down = _joined(first - first_band.low, second_band.high - second, correlation)
    up = _joined(first_band.high - first, second - second_band.low, correlation)
    return Band(difference - down, difference + up)


def _joined(one: float, other: float, correlation: float) -> float:
    if inf in (one, other):
        return inf
    return sqrt(max(0.0, one * one + other * other - 2 * correlation * one * other))


def log_to_relative(band: Band) -> Band:
    """An interval of a log ratio as one of the relative difference. No end stays no end."""
    return Band(expm1(band.low), exp(band.high) - 1 if band.high < 700 else inf)
