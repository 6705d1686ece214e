"""One signal's exports, metrics or traces: one at a time, each in a thread of its own, and what the log hears of them.

The invariants: a collector that is down, slow or wrong changes nothing for a call, holds no more memory than one
export, and is told of once in an outage.
"""

import asyncio
import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from gateway.domain.otel import Signal
from gateway.telemetry.observe import Observer
from gateway.telemetry.otlp_exporter import Exporter

log = logging.getLogger("gateway.otlp")


class SignalExport:
    """Sends what it is given, and counts how that went."""

    def __init__(self, signal: Signal, exporter: Exporter, observer: Observer, *, every_s: float) -> None:
        self.signal = signal
        self._exporter = exporter
        self._observer = observer
        self._every_s = every_s
        observer.exports(signal)
        # Exports that have failed since the last one that did not.
        self.failures = 0

    async def send(self, make: Callable[[], Any]) -> bool:
        """Export what `make` makes, which is called in the thread. Whether the collector took it."""
        why = await self._in_thread(make)
        self._observer.exported(self.signal, ok=not why)
        if isinstance(why, Exception):
            # Of one call, perhaps: the next ones are tried.
            if not self.failures:
                log.error("bug in the %s for OTLP: %s", self.signal, type(why).__name__, exc_info=why)
        elif why and not self.failures:
            again_s = self._every_s
            log.warning("%s are not exported over OTLP: %s; every %g s it is tried again", self.signal, why, again_s)
        elif not why and self.failures:
            log.info("%s are exported over OTLP again, after %d that were not", self.signal, self.failures)
        self.failures = self.failures + 1 if why else 0
        return not why

    def shutdown(self) -> None:
        """Close the exporter."""
        self._exporter.shutdown()

    async def _in_thread(self, make: Callable[[], Any]) -> str | Exception:
        """Why it failed, if it did. The thread is nobody's to wait for: it must not hold up the process's end."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[str | Exception] = loop.create_future()

        def tell(why: str | Exception) -> None:
            if not done.done():
                done.set_result(why)

        def send() -> None:
            why = self._exporter.send(make)
            with suppress(RuntimeError):  # The loop is closed, and nobody wants to know any more.
                loop.call_soon_threadsafe(tell, why)

        threading.Thread(target=send, name=f"otlp-{self.signal}", daemon=True).start()
        return await done
