"""Exports the figures over OTLP, as http/protobuf, by OpenTelemetry's own exporter. Imported only where that is wanted.

The exporter blocks, so each export has a thread of its own, one at a time. The invariants: a collector that is down,
slow or wrong changes nothing for a call, holds no more memory than one export, and is told of once in an outage; and
nothing of what the exporter says reaches the log, as addresses and headers may hold keys.
"""

import asyncio
import logging
import threading
import time
from contextlib import suppress

from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.sdk.metrics.export import MetricExportResult, MetricsData

from gateway.decide.plan import Plan
from gateway.domain.otel import Otel
from gateway.edge.gen_ai import Operations
from gateway.edge.observe import Observer
from gateway.edge.otlp_metrics import metrics_data, resource_of

log = logging.getLogger("gateway.otlp")

# The last figures get so long to arrive when the process ends.
CLOSING_S = 2.0
# Whose log lines quote addresses and headers.
_TALKATIVE = ("opentelemetry", "urllib3")
_NOWHERE = logging.NullHandler()


class _Listening(logging.Handler):
    """Hears what the exporter has to say, and keeps of it only what cannot be a secret."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.why = ""
        self.templates: dict[str, None] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a status or the type of an error, and a sentence without what was to be put into it."""
        self.templates[str(record.msg) if record.args else record.name] = None
        for value in record.args if isinstance(record.args, tuple) else ():
            if isinstance(value, BaseException):
                self.why = type(value).__name__
            elif isinstance(value, int):
                self.why = f"it answered {value}"


class OtlpExport:
    """Brings the figures to a collector, every so often and once more at the end."""

    def __init__(self, otel: Otel, *, env: str, plan: Plan, observer: Observer) -> None:
        self._interval_s = otel.interval_s
        self._observer = observer
        self._operations = Operations(plan)
        observer.take_operations(self._operations)
        self._listening = _Listening()
        for name in _TALKATIVE:
            library = logging.getLogger(name)
            library.propagate = False
            # Without any, Python would write to stderr what comes after our end.
            library.addHandler(_NOWHERE)
            library.addHandler(self._listening)
        self._resource = resource_of(env)
        self._exporter = OTLPMetricExporter(endpoint=otel.metrics_url)
        for template in self._listening.templates:
            log.warning("one of OpenTelemetry's variables is not in order: %s", template.replace("%s", "***"))
        self._began_ns = time.time_ns()
        self._failures = 0
        self._closing = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to export."""
        self._task = asyncio.get_running_loop().create_task(self._run())
        self._task.add_done_callback(_ended)

    async def close(self) -> None:
        """Export once more, within CLOSING_S, and end."""
        self._closing.set()
        if self._task is not None:
            await asyncio.wait({self._task}, timeout=CLOSING_S)
            if self._task.cancel() and not self._failures:
                log.warning("the last figures were not exported over OTLP: no answer within %g s", CLOSING_S)
            await asyncio.wait({self._task})
        self._exporter.shutdown()
        for name in _TALKATIVE:
            logging.getLogger(name).removeHandler(self._listening)

    async def export(self) -> None:
        """Export what there is now."""
        figures = (*self._observer.figures(), *self._operations.figures())
        data = metrics_data(self._resource, figures, began_ns=self._began_ns, now_ns=time.time_ns())
        self._listening.why = ""
        ok = await self._in_thread(data)
        self._observer.exported(ok=ok)
        if ok and self._failures:
            log.info("metrics are exported over OTLP again, after %d that were not", self._failures)
        elif not ok and not self._failures:
            why = self._listening.why or "it did not take them in time"
            log.warning("metrics are not exported over OTLP: %s; every %g s it is tried again", why, self._interval_s)
        self._failures = 0 if ok else self._failures + 1

    async def _run(self) -> None:
        is_last = False
        while not is_last:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._interval_s):
                    is_last = await self._closing.wait()
            await self.export()

    async def _in_thread(self, data: MetricsData) -> bool:
        """Whether the collector took it. The thread is nobody's to wait for: it must not hold up the process's end."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[bool] = loop.create_future()

        def tell(ok: bool) -> None:
            if not done.done():
                done.set_result(ok)

        def send() -> None:
            ok = False
            try:
                ok = self._exporter.export(data) is MetricExportResult.SUCCESS
            finally:
                with suppress(RuntimeError):  # The loop is closed, and nobody wants to know any more.
                    loop.call_soon_threadsafe(tell, ok)

        threading.Thread(target=send, name="otlp", daemon=True).start()
        return await done


def _ended(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("bug in the export over OTLP, which has ended: %s", type(error).__name__, exc_info=error)
