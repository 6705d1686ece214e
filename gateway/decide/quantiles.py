"""A quantile of latency in either arm, from the counts on the grid, and how uncertain it is.

Knows no verdicts. A quantile is known no finer than the grid, whose cells are 5 % wide; within a cell calls are taken
to be spread evenly over log latency. Its one invariant: both arms are weighted alike over the stages, so a stage in
which everything was slower does not count against the arm that had more of it.
"""

from bisect import bisect_left
from collections.abc import Callable
from itertools import accumulate
from math import exp, inf, log, sqrt
from typing import NamedTuple

from gateway.decide.intervals import Band, difference_band, log_to_relative
from gateway.decide.ratios import Contrast, Strata, contrast
from gateway.domain.experiment import GRID_MS, GRID_RATIO, UserSums

_LOG_CELL = log(GRID_RATIO)


class Quantiles(NamedTuple):
    """The quantile of each arm in ms (control, treated), and what its interval follows from.

    `relative_se` is the standard error of the difference of their logs, None where calls are too few to have one.
    """

    values: tuple[float, float]
    relative_se: float | None
    contrast: Contrast
    level: float
    curves: "tuple[_Curve, _Curve]"

    def relative_band(self, reach: float) -> Band:
        """The interval of treated/control - 1, `reach` standard errors to either side."""
        bands = [self._log_band(arm, reach) for arm in (0, 1)]
        control, treated = log(self.values[0]), log(self.values[1])
        return log_to_relative(difference_band(treated, bands[1], control, bands[0], self._correlation()))

    def _log_band(self, arm: int, reach: float) -> Band:
        # Woodruff (1952): the interval of the distribution function at the quantile, read off on the other axis.
        step = reach * sqrt(self.contrast.variances[arm])
        curve = self.curves[arm]
        return Band(curve.log_ms(self.level - step), curve.log_ms(self.level + step))

    def _correlation(self) -> float:
        control, treated = self.contrast.variances
        return self.contrast.covariance / sqrt(control * treated) if control * treated > 0 else 0.0


class _Curve:
    """The distribution of one arm over the grid's cells."""

    def __init__(self, shares: list[float]) -> None:
        self.shares = shares
        self.below = list(accumulate(shares))

    def cell(self, level: float) -> int:
        """The cell in which the distribution reaches `level`."""
        return min(bisect_left(self.below, level), len(self.shares) - 1)

    def log_ms(self, level: float) -> float:
        """The log of the latency which a part `level` of calls stays below; infinite from 1 on, or below 0."""
        if level <= 0:
            return -inf
        if level >= 1:
            return inf
        cell = self.cell(level)
        share = self.shares[cell]
        part = (level - (self.below[cell] - share)) / share if share > 0 else 1.0
        return log(GRID_MS[cell]) + min(1.0, max(0.0, part)) * _LOG_CELL

    def cut(self, level: float) -> int:
        """The number of cells below the edge that is nearest to the quantile, and has calls on either side if any has.

        Between edges nothing is known of a single user, so the variance is taken at an edge.
        """
        cell = self.cell(level)
        edges = [edge for edge in (cell, cell + 1) if 0 < self.part(edge) < 1]
        return min(edges or [cell], key=lambda edge: abs(self.part(edge) - level))

    def part(self, edge: int) -> float:
        """The part of calls in the first `edge` cells."""
        return min(1.0, self.below[edge - 1]) if edge else 0.0


def quantiles(strata: Strata, level: float) -> Quantiles | None:
    """The quantile of either arm. None where no stage has two users in both."""
    plain = contrast(strata, _timed, scale=1.0)
    if plain is None:
        return None
    curves = (_curve(strata, plain, arm=0), _curve(strata, plain, arm=1))
    cuts = (curves[0].cut(level), curves[1].cut(level))
    below = contrast(strata, _reader(cuts), scale=1.0)
    if below is None:
        raise AssertionError("BUG: the same users were enough a moment ago")
    below = _at_level(below, (curves[0].part(cuts[0]), curves[1].part(cuts[1])), level)
    values = (exp(curves[0].log_ms(level)), exp(curves[1].log_ms(level)))
    result = Quantiles(values, None, below, level, curves)
    return result._replace(relative_se=_relative_se(result))


def _timed(row: UserSums) -> tuple[float, float]:
    return sum(row.latencies.values()), 0.0


def _reader(cuts: tuple[int, int]) -> Callable[[UserSums], tuple[float, float]]:
    def read(row: UserSums) -> tuple[float, float]:
        cut, latencies = cuts[row.is_treated], row.latencies
        return sum(latencies.values()), sum([count for cell, count in latencies.items() if cell < cut])

    return read


def _curve(strata: Strata, plain: Contrast, *, arm: int) -> _Curve:
    shares = [0.0] * len(GRID_MS)
    for stage, weight in plain.weights.items():
        counts = [0] * len(GRID_MS)
        for row in strata[stage][arm].values():
            for cell, count in row.latencies.items():
                counts[cell] += count
        whole = sum(counts)
        for cell, count in enumerate(counts):
            if count:
                shares[cell] += weight * count / whole
    return _Curve(shares)


def _at_level(below: Contrast, parts: tuple[float, float], level: float) -> Contrast:
    """The variances at the quantile itself, which is not quite at the edge: p (1 - p), all else being equal."""
    scales = [level * (1 - level) / (part * (1 - part)) if 0 < part < 1 else 1.0 for part in parts]
    return below._replace(
        variances=(below.variances[0] * scales[0], below.variances[1] * scales[1]),
        covariance=below.covariance * sqrt(scales[0] * scales[1]),
    )


def _relative_se(seen: Quantiles) -> float | None:
    """Half of what one standard error to either side spans, as a log ratio."""
    band = seen.relative_band(1.0)
    if band.low <= -1 or band.high == inf:
        return None
    return max(log((1 + band.high) / (1 + band.low)) / 2, 0.0)
