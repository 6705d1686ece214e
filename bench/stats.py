"""Quantiles of one run and the spread over several. Pure; no test of significance."""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple


def quantile(rising: Sequence[float], q: float) -> float:
    """Nearest-rank quantile of sorted values: always one that was measured. Raises ValueError on none."""
    if not rising:
        raise ValueError("no values, no quantile")
    if not 0 <= q <= 1:
        raise ValueError(f"a quantile lies in 0..1, not {q}")
    # Rounded first, so that 0.99 x 100 is rank 99 and not, by a bit of floating point, rank 100.
    rank = math.ceil(round(q * len(rising), 9))
    return rising[max(rank, 1) - 1]


class Spread(NamedTuple):
    """One figure over the rounds."""

    median: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread | None":
        """None where nothing was measured: an absent figure is not a zero."""
        if not values:
            return None
        return cls(statistics.median(values), min(values), max(values), len(values))
