"""An OpenTelemetry collector on loopback: it decodes what comes with the SDK's own protobuf, or misbehaves.

async with collector() as found:
    ...                              # found.url; found.latest().total("model.requests", agent="qa_agent")
"""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)

PATH = "/v1/metrics"


class Export:
    """One request, by metric and attributes."""

    def __init__(self, body: bytes) -> None:
        request = ExportMetricsServiceRequest.FromString(body)
        (resource,) = request.resource_metrics
        (scope,) = resource.scope_metrics
        self.resource = _plain(resource.resource.attributes)
        self.scope = (scope.scope.name, scope.scope.version)
        self.metrics = {metric.name: metric for metric in scope.metrics}
        assert len(self.metrics) == len(scope.metrics), "a metric comes twice"

    def points(self, name: str) -> Mapping[tuple[tuple[str, str], ...], Any]:
        """The points of a metric by their attributes; none where it is not there."""
        if name not in self.metrics:
            return {}
        metric = self.metrics[name]
        points = getattr(metric, metric.WhichOneof("data")).data_points
        found = {tuple(sorted(_plain(point.attributes).items())): point for point in points}
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


class Collector:
    """What came, and how the next is answered: with `status`, and only once `answering` is set."""

    def __init__(self) -> None:
        self.url = ""
        self.status = 200
        self.answering = asyncio.Event()
        self.answering.set()
        self.asked = asyncio.Event()
        self.headers: list[Mapping[str, str]] = []
        self.bodies: list[bytes] = []

    def latest(self) -> Export:
        """The last one, decoded."""
        return Export(self.bodies[-1])

    async def take(self, request: web.Request) -> web.Response:
        """Take an export."""
        assert request.content_type == "application/x-protobuf"
        body = await request.read()
        self.asked.set()
        await self.answering.wait()
        self.headers.append(request.headers)
        self.bodies.append(body)
        return web.Response(
            status=self.status,
            body=ExportMetricsServiceResponse().SerializeToString(),
            content_type="application/x-protobuf",
        )


@asynccontextmanager
async def collector() -> AsyncIterator[Collector]:
    """A collector that takes everything until it is told otherwise."""
    found = Collector()
    app = web.Application()
    app.router.add_post(PATH, found.take)
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


def _plain(attributes: Any) -> dict[str, str]:
    return {pair.key: pair.value.string_value for pair in attributes}


def _value(point: Any) -> float:
    if hasattr(point, "bucket_counts"):
        assert sum(point.bucket_counts) == point.count
        return float(point.count)
    return float(getattr(point, point.WhichOneof("value")))
