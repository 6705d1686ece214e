"""Exports figures and spans over OTLP, by OpenTelemetry's own exporters. Imported only where that is wanted.

How one export goes is otlp_signal's; here is when, and of what. Figures are cumulative, so what failed to arrive is in
what arrives later. Spans that failed to arrive are gone, and counted: the exporter has tried for as long as its time
limit lets it, and others are waiting.
"""

import asyncio
import logging
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import partial

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan

from gateway.decide.plan import Plan
from gateway.domain.otel import Otel
from gateway.domain.trace import TracedCall
from gateway.telemetry.gen_ai import Operations, providers_of
from gateway.telemetry.observe import Observer
from gateway.telemetry.otlp_exporter import Listening, make_exporter
from gateway.telemetry.otlp_metrics import metrics_data, resource_of
from gateway.telemetry.otlp_signal import GRACE_S, SignalExport
from gateway.telemetry.otlp_traces import spans_of
from gateway.telemetry.span_queue import SpanQueue, span_count

log = logging.getLogger("gateway.otlp")

# What is left gets so long to arrive when the process ends.
CLOSING_S = 2.0


class OtlpExport:
    """Brings figures and spans to a collector, every so often and once more at the end. Either may be off."""

    def __init__(self, otel: Otel, *, env: str, plan: Plan, observer: Observer) -> None:
        self._otel = otel
        self._observer = observer
        self._listening = listening = Listening()
        self._resource = resource_of(env)
        self._operations = Operations(plan)
        self._metrics = self._traces = None
        if otel.metrics.url and (exporter := make_exporter("metrics", otel.metrics, listening)) is not None:
            late_s = otel.metrics.timeout_s + GRACE_S
            self._metrics = SignalExport("metrics", exporter, observer, every_s=otel.interval_s, late_s=late_s)
            observer.take_operations(self._operations)
        if otel.traces.url and (exporter := make_exporter("traces", otel.traces, listening)) is not None:
            late_s = otel.traces.timeout_s + GRACE_S
            self._traces = SignalExport("traces", exporter, observer, every_s=otel.batching.delay_s, late_s=late_s)
        listening.tell()
        self._queue = SpanQueue(otel.batching.max_queue_spans, partial(observer.spans_dropped, reason="queue_full"))
        self._began_ns = time.time_ns()
        self._closing = asyncio.Event()
        self._is_due = asyncio.Event()
        self._running: dict[asyncio.Task[None], SignalExport] = {}

    @property
    def has_traces(self) -> bool:
        """Whether `take` has somewhere to bring a call's spans to."""
        return self._traces is not None

    def take(self, traced: TracedCall) -> None:
        """Export the spans of a call that has ended, before long. Of the hot path, so it waits for nothing."""
        self._queue.put(traced)
        if self._queue.is_half_full:
            self._is_due.set()

    def start(self) -> None:
        """Begin to export."""
        loop = asyncio.get_running_loop()
        if self._metrics is not None:
            self._running[loop.create_task(self._run_metrics())] = self._metrics
        if self._traces is not None:
            self._running[loop.create_task(self._run_traces())] = self._traces
        for task in self._running:
            task.add_done_callback(_ended)

    async def close(self) -> None:
        """Export once more, within CLOSING_S, and end."""
        self._closing.set()
        self._is_due.set()
        if self._running:
            await asyncio.wait(self._running, timeout=CLOSING_S)
            for task, export in self._running.items():
                if task.cancel() and not export.failures:
                    what = export.signal
                    log.warning("the last %s were not exported over OTLP: no answer within %g s", what, CLOSING_S)
            await asyncio.wait(self._running)
        for export in filter(None, (self._metrics, self._traces)):
            export.shutdown()
        self._listening.end()

    async def export(self) -> None:
        """Export the figures that there are now."""
        if self._metrics is None:
            return
        figures = (*self._observer.figures(), *self._operations.figures())
        # Here and not in the thread, as calls change them.
        data = metrics_data(self._resource, figures, began_ns=self._began_ns, now_ns=time.time_ns())
        await self._metrics.send(lambda: data)

    async def export_spans(self) -> None:
        """Export the spans that there are now, batch by batch."""
        while self._traces is not None and (batch := self._queue.take(self._otel.batching.max_batch_spans)):
            make = partial(_spans, batch, self._resource, providers_of(self._observer.plan))
            if not await self._traces.send(make):
                self._observer.spans_dropped(sum(map(span_count, batch)), "not_taken")

    async def _run_metrics(self) -> None:
        is_last = False
        while not is_last:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._otel.interval_s):
                    is_last = await self._closing.wait()
            await self.export()

    async def _run_traces(self) -> None:
        is_last = False
        while not is_last:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._otel.batching.delay_s):
                    await self._is_due.wait()
            self._is_due.clear()
            is_last = self._closing.is_set()
            await self.export_spans()


def _spans(batch: list[TracedCall], resource: Resource, providers: Mapping[str, str]) -> list[ReadableSpan]:
    return [span for traced in batch for span in spans_of(traced, resource, providers)]


def _ended(task: "asyncio.Task[None]") -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("bug in the export over OTLP, which has ended: %s", type(error).__name__, exc_info=error)
