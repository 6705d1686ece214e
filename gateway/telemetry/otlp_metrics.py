"""Figures as OpenTelemetry's `MetricsData`: the second way in which what is counted is shown. Sends nothing.

It is made of the SDK's public data classes, without its instruments, which cost 8 µs a call each. All sums are
cumulative since the process began, and everything is copied: what is made here may be read in another thread.
"""

from collections.abc import Iterable
from typing import Any, cast
from uuid import uuid4

from opentelemetry.sdk.metrics import Exemplar as OtelExemplar
from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    Gauge,
    Histogram,
    HistogramDataPoint,
    Metric,
    MetricsData,
    NumberDataPoint,
    ResourceMetrics,
    ScopeMetrics,
    Sum,
)
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.util.instrumentation import InstrumentationScope

from gateway import __version__
from gateway.telemetry.distribution import Distribution, Exemplar, Figures
from gateway.telemetry.metrics import Declared, Kind

SERVICE = "genesis-gateway"
SCOPE = InstrumentationScope("gateway", __version__)
# An optional field that is left out: the smallest and the largest value are not kept.
_NOT_KEPT = cast(float, None)


def resource_of(env: str) -> Resource:
    """Who we are. OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES have the last word.

    The instance is named anew with each start: two gateways of one name would otherwise write into the same sums.
    """
    ours = {
        "service.name": SERVICE,
        "service.version": __version__,
        "service.instance.id": str(uuid4()),
        "deployment.environment.name": env,
    }
    return Resource.create().merge(Resource(ours)).merge(OTELResourceDetector().detect())


def metrics_data(resource: Resource, figures: Iterable[Figures], *, began_ns: int, now_ns: int) -> MetricsData:
    """All figures at this moment. Metrics without a value yet are left out."""
    metrics = [_metric(declared, rows, began_ns, now_ns) for declared, rows in figures if rows]
    return MetricsData([ResourceMetrics(resource, [ScopeMetrics(SCOPE, metrics, "")], "")])


def _metric(declared: Declared, rows: Any, began_ns: int, now_ns: int) -> Metric:
    if declared.kind is Kind.HISTOGRAM:
        points = [_histogram_point(_attributes(declared, labels), values, began_ns, now_ns) for labels, values in rows]
        data: Histogram | Sum | Gauge = Histogram(points, AggregationTemporality.CUMULATIVE)
    else:
        numbers = [NumberDataPoint(_attributes(declared, labels), began_ns, now_ns, value) for labels, value in rows]
        is_sum = declared.kind is Kind.COUNTER
        data = Sum(numbers, AggregationTemporality.CUMULATIVE, is_monotonic=True) if is_sum else Gauge(numbers)
    return Metric(declared.dotted, declared.help, declared.unit, data)


def _histogram_point(
    attributes: dict[str, str], values: Distribution, began_ns: int, now_ns: int
) -> HistogramDataPoint:
    return HistogramDataPoint(
        attributes=attributes,
        start_time_unix_nano=began_ns,
        time_unix_nano=now_ns,
        count=values.count,
        sum=values.sum,
        bucket_counts=tuple(values.counts),
        explicit_bounds=values.edges,
        min=_NOT_KEPT,
        max=_NOT_KEPT,
        exemplars=[_exemplar(left) for left in (values.exemplars or {}).values()],
    )


def _exemplar(left: Exemplar) -> OtelExemplar:
    at_ns = round(left.at_ms * 1e6)
    return OtelExemplar({}, float(left.value), at_ns, int(left.span_id, 16), int(left.trace_id, 16))


def _attributes(declared: Declared, labels: tuple[str, ...]) -> dict[str, str]:
    """An empty label is none, as in Prometheus."""
    return {name: label for name, label in zip(declared.labels, labels, strict=True) if label}
