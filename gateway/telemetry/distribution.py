"""A histogram as the hot path fills it, and the traces that exemplify its buckets. Renders nothing.

The invariant: its size is that of its edges, whatever is counted. An exemplar is kept per bucket, the last one, and
only where calls are traced: until then there is no room for any.
"""

from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

from gateway.telemetry.metrics import Declared


class Exemplar(NamedTuple):
    """One value that was counted, and the span in which it came about. `at_ms` is unix time."""

    trace_id: str
    span_id: str
    value: float
    at_ms: float


class Distribution:
    """How many values fell below each edge, and their sum."""

    __slots__ = ("counts", "edges", "exemplars", "sum")

    def __init__(self, edges: tuple[float, ...]) -> None:
        self.edges = edges
        self.counts = [0] * (len(edges) + 1)
        self.sum = 0.0
        # By the place of their bucket.
        self.exemplars: dict[int, Exemplar] | None = None

    def add(self, value: float) -> None:
        """Count one value, in the unit of the edges. An edge belongs to its own bucket, as in Prometheus."""
        self.counts[bisect_left(self.edges, value)] += 1
        self.sum += value

    def exemplify(self, exemplar: Exemplar) -> None:
        """Keep it for the bucket that its value fell into, in place of the one before it."""
        if self.exemplars is None:
            self.exemplars = {}
        self.exemplars[bisect_left(self.edges, exemplar.value)] = exemplar

    @property
    def count(self) -> int:
        """How many values there were."""
        return sum(self.counts)

    def buckets(self) -> list[tuple[str, float, Exemplar | None]]:
        """Cumulative counts by upper edge, as Prometheus wants them, each with its own bucket's exemplar."""
        total = 0
        found = []
        exemplars = self.exemplars or {}
        for place, (edge, count) in enumerate(zip((*self.edges, float("inf")), self.counts, strict=True)):
            total += count
            label = "+Inf" if edge == float("inf") else f"{edge:g}"
            found.append((label, float(total), exemplars.get(place)))
        return found


# A metric and its values by labels.
Figures = tuple[Declared, Sequence[tuple[tuple[str, ...], float | Distribution]]]
