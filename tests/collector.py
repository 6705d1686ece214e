"""An OpenTelemetry collector on loopback: it decodes what comes with the SDK's own protobuf, or misbehaves.

async with collector() as found:
    ...                              # found.url; found.latest().total("model.requests", agent="qa_agent")
                                     # found.spans(); found.spans(SpanKind.CLIENT)

`grpc_collector()` is the same over gRPC, at `found.url`; it never misbehaves.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span as SpanMessage

PATH = "/v1/metrics"
TRACES_PATH = "/v1/traces"
SERVER, CLIENT = SpanMessage.SPAN_KIND_SERVER, SpanMessage.SPAN_KIND_CLIENT


class Export:
    """One request, by metric and attributes."""

    def __init__(self, body: bytes) -> None:
        request = ExportMetricsServiceRequest.FromString(body)
        (resource,) = request.resource_metrics
        (scope,) = resource.scope_metrics
        self.resource = plain(resource.resource.attributes)
        self.scope = (scope.scope.name, scope.scope.version)
        self.metrics = {metric.name: metric for metric in scope.metrics}
        assert len(self.metrics) == len(scope.metrics), "a metric comes twice"

    def points(self, name: str) -> Mapping[tuple[tuple[str, str], ...], Any]:
        """The points of a metric by their attributes; none where it is not there."""
        if name not in self.metrics:
            return {}
        metric = self.metrics[name]
        points = getattr(metric, metric.WhichOneof("data")).data_points
        found = {tuple(sorted(plain(point.attributes).items())): point for point in points}
        assert len(found) == len(points), f"{name}: attributes come twice"
        return found

    def total(self, name: str, **attributes: str) -> float:
        """The sum over the points with these attributes: of values, or of a histogram's counts."""
        wanted = set(attributes.items())
        chosen = [point for has, point in self.points(name).items() if wanted <= set(has)]
        return sum(_value(point) for point in chosen)

    @property
    def series(self) -> set[tuple[str, tuple[tuple[str, str], ...]]]:
        """Every metric with its attributes."""
        return {(name, attributes) for name in self.metrics for attributes in self.points(name)}


class Span:
    """One span, as a collector has it: ids in hex, times in unix nanoseconds."""

    def __init__(self, message: SpanMessage, resource: Mapping[str, Any]) -> None:
        self.trace_id = message.trace_id.hex()
        self.id = message.span_id.hex()
        self.parent_id = message.parent_span_id.hex()
        self.name = message.name
        self.kind = message.kind
        self.state = message.trace_state
        self.flags = message.flags
        self.start_ns, self.end_ns = message.start_time_unix_nano, message.end_time_unix_nano
        self.is_error = message.status.code == message.status.STATUS_CODE_ERROR
        self.attributes = plain(message.attributes)
        assert len(self.attributes) == len(message.attributes), "an attribute comes twice"
        self.events = [(event.name, event.time_unix_nano) for event in message.events]
        self.resource = resource


class Collector:
    """What came, and how the next is answered: with `status`, and only once `answering` is set."""

    def __init__(self) -> None:
        self.url = ""
        self.status = 200
        self.answering = asyncio.Event()
        self.answering.set()
        self.asked = asyncio.Event()
        self.asked_for_traces = asyncio.Event()
        self.headers: list[Mapping[str, str]] = []
        self.bodies: list[bytes] = []
        self.trace_bodies: list[bytes] = []

    def latest(self) -> Export:
        """The last one of metrics, decoded."""
        return Export(self.bodies[-1])

    def spans(self, kind: int | None = None) -> list[Span]:
        """Every span that was taken, or those of one kind."""
        found = [span for body in self.trace_bodies for span in spans_in(body)]
        assert len({span.id for span in found}) == len(found), "a span comes twice"
        return [span for span in found if kind in (None, span.kind)]

    async def take(self, request: web.Request) -> web.Response:
        """Take an export of metrics."""
        return await self._take(request, self.bodies, self.asked, ExportMetricsServiceResponse())

    async def take_traces(self, request: web.Request) -> web.Response:
        """Take an export of spans."""
        return await self._take(request, self.trace_bodies, self.asked_for_traces, ExportTraceServiceResponse())

    async def _take(self, request: web.Request, bodies: list[bytes], asked: asyncio.Event, answer: Any) -> web.Response:
        assert request.content_type == "application/x-protobuf"
        body = await request.read()
        asked.set()
        await self.answering.wait()
        self.headers.append(request.headers)
        if self.status == 200 or bodies is self.bodies:
            bodies.append(body)
        return web.Response(status=self.status, body=answer.SerializeToString(), content_type="application/x-protobuf")


def spans_in(body: bytes) -> list[Span]:
    """The spans of one export."""
    return [
        Span(message, plain(resource.resource.attributes))
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans
        for scope in resource.scope_spans
        for message in scope.spans
    ]


@asynccontextmanager
async def collector() -> AsyncIterator[Collector]:
    """A collector that takes everything until it is told otherwise."""
    found = Collector()
    app = web.Application(client_max_size=64 * 2**20)
    app.router.add_post(PATH, found.take)
    app.router.add_post(TRACES_PATH, found.take_traces)
    runner = web.AppRunner(app, shutdown_timeout=0)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        found.url = f"http://{host}:{port}"
        yield found
    finally:
        found.answering.set()
        await runner.cleanup()


@asynccontextmanager
async def grpc_collector() -> AsyncIterator[Collector]:
    """A gRPC server of OpenTelemetry's own two services."""
    import grpc
    from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2_grpc as metrics_service
    from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as trace_service

    found = Collector()

    def note(bodies: list[bytes], request: Any, context: Any) -> None:
        bodies.append(request.SerializeToString())
        found.headers.append(dict(context.invocation_metadata()))

    class Metrics(metrics_service.MetricsServiceServicer):  # type: ignore[misc]
        def Export(self, request: Any, context: Any) -> Any:
            note(found.bodies, request, context)
            return ExportMetricsServiceResponse()

    class Traces(trace_service.TraceServiceServicer):  # type: ignore[misc]
        def Export(self, request: Any, context: Any) -> Any:
            note(found.trace_bodies, request, context)
            return ExportTraceServiceResponse()

    server = grpc.server(ThreadPoolExecutor(2))
    metrics_service.add_MetricsServiceServicer_to_server(Metrics(), server)
    trace_service.add_TraceServiceServicer_to_server(Traces(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    found.url = f"http://127.0.0.1:{port}"
    try:
        yield found
    finally:
        await asyncio.to_thread(server.stop(None).wait)


def plain(attributes: Any) -> dict[str, Any]:
    """Attributes as plain values."""
    return {pair.key: _plain_value(pair.value) for pair in attributes}


def _plain_value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    return list(map(_plain_value, value.array_value.values)) if kind == "array_value" else getattr(value, kind)


def _value(point: Any) -> float:
    if hasattr(point, "bucket_counts"):
        assert sum(point.bucket_counts) == point.count
        return float(point.count)
    return float(getattr(point, point.WhichOneof("value")))
