"""One signal's exports, metrics or traces: one at a time, each in a thread of its own, and what the log hears of them.

The invariants: a collector that is down, slow or wrong changes nothing for a call, holds no more memory than one
export, and is told of once in an outage; soon also where it hangs in a way that no exporter's time limit ends.
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

# What an exporter gets beyond its time limit, which it has for each wait and not for all: a collector that answers a
# byte now and then is never late for it.
GRACE_S = 5.0


class SignalExport:
    """Sends what it is given, and counts how that went."""

    def __init__(
        self, signal: Signal, exporter: Exporter, observer: Observer, *, every_s: float, late_s: float
    ) -> None:
        """`late_s`: an export that takes longer has failed, and again each time as long after."""
        self.signal = signal
        self._exporter = exporter
        self._observer = observer
        self._every_s = every_s
        self._late_s = late_s
        observer.exports(signal)
        # Failures that were counted since the last export that came through.
        self.failures = 0

    async def send(self, make: Callable[[], Any]) -> bool:
        """Export what `make` makes, which is called in the thread. Whether the collector took it."""
        done = self._in_thread(make)
        # It is waited for all the same: what hangs is one thread and one export, not one more with every turn.
        while not (await asyncio.wait((done,), timeout=self._late_s))[0]:
            self._failed(f"no answer within {self._late_s:g} s")
        why = done.result()
        if why:
            self._failed(why)
            return False
        self._observer.exported(self.signal, ok=True)
        if self.failures:
            log.info("%s are exported over OTLP again, after %d that were not", self.signal, self.failures)
        self.failures = 0
        return True

    def shutdown(self) -> None:
        """Close the exporter."""
        self._exporter.shutdown()

    def _failed(self, why: str | Exception) -> None:
        self._observer.exported(self.signal, ok=False)
        if not self.failures and isinstance(why, Exception):
            # Of one call, perhaps: the next ones are tried.
            log.error("bug in the %s for OTLP: %s", self.signal, type(why).__name__, exc_info=why)
        elif not self.failures:
            again_s = self._every_s
            log.warning("%s are not exported over OTLP: %s; every %g s it is tried again", self.signal, why, again_s)
        self.failures += 1

    def _in_thread(self, make: Callable[[], Any]) -> "asyncio.Future[str | Exception]":
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
        return done
