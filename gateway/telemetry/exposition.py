"""Figures in Prometheus' two text formats, rendered beside the calls. Counts nothing.

Rendering 2,000 series takes 50 ms, and calls would wait for it: so it is done in a thread, on figures that were copied
before. The invariants: there is one rendering at a time, shared by all who came while the last one went on; and what a
scraper gets is no older than its request.
"""

import asyncio
from collections.abc import Callable, Iterable, Iterator
from copy import copy
from typing import Any

from prometheus_client import samples
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from gateway.telemetry.distribution import Distribution, Exemplar, Figures
from gateway.telemetry.metrics import Declared, Kind

OPENMETRICS = "application/openmetrics-text"
_CLASSIC, _OPEN = choose_encoder(""), choose_encoder(OPENMETRICS)
_FAMILIES = {Kind.COUNTER: CounterMetricFamily, Kind.GAUGE: GaugeMetricFamily, Kind.HISTOGRAM: HistogramMetricFamily}


class Snapshot(Collector):
    """Figures as they were at one moment; calls that go on do not change them."""

    def __init__(self, figures: Iterable[Figures]) -> None:
        self._figures = [(declared, [(labels, _kept(value)) for labels, value in rows]) for declared, rows in figures]

    def collect(self) -> Iterator[Metric]:
        """Every metric, for Prometheus."""
        for declared, rows in self._figures:
            family = _family(declared)
            for labels, value in rows:
                if isinstance(value, Distribution):
                    family.add_metric(labels, buckets=list(map(_bucket, value.buckets())), sum_value=value.sum)
                else:
                    family.add_metric(labels, value)
            yield family


class Exposition:
    """The text of a scrape, for any number of scrapers."""

    def __init__(self, figures: Callable[[], Iterable[Figures]]) -> None:
        self._figures = figures
        self._rendering = asyncio.Lock()
        # By content type: the rendering that has not begun yet, for which whoever comes now may wait.
        self._next: dict[str, asyncio.Task[bytes]] = {}

    async def text(self, accept: str) -> tuple[bytes, str]:
        """The text and its content type; OpenMetrics, which has exemplars, where `accept` asks for it."""
        encode, content_type = _chosen(accept)
        rendering = self._next.get(content_type)
        if rendering is None:
            task = self._render(encode, content_type)
            rendering = self._next[content_type] = asyncio.create_task(task)
        # Others may wait for it still when this scraper has gone.
        return await asyncio.shield(rendering), content_type

    async def _render(self, encode: Callable[[Any], bytes], content_type: str) -> bytes:
        async with self._rendering:
            del self._next[content_type]
            return await asyncio.to_thread(encode, Snapshot(self._figures()))


def _chosen(accept: str) -> tuple[Callable[[Any], bytes], str]:
    """What writes the text, and its content type: one of two, whatever else is asked for."""
    try:
        _, content_type = choose_encoder(accept)
    except (TypeError, ValueError):
        # It stumbles over a version that is not all numbers, such as one in quotation marks, as HTTP allows.
        return _CLASSIC
    # What was asked for would else be repeated in our own header, and each spelling of it be rendered anew.
    return _OPEN if content_type.startswith(OPENMETRICS) else _CLASSIC


def _kept(value: float | Distribution) -> float | Distribution:
    if not isinstance(value, Distribution):
        return value
    kept = copy(value)
    kept.counts = value.counts.copy()
    kept.exemplars = value.exemplars.copy() if value.exemplars is not None else None
    return kept


def _bucket(bucket: tuple[str, float, Exemplar | None]) -> Any:
    label, count, left = bucket
    if left is None:
        return label, count
    ids = {"trace_id": left.trace_id, "span_id": left.span_id}
    return label, count, samples.Exemplar(ids, left.value, left.at_ms / 1000)


def _family(declared: Declared):  # type: ignore[no-untyped-def]
    return _FAMILIES[declared.kind](declared.name, declared.help, labels=declared.labels)
