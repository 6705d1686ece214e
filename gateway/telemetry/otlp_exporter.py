"""OpenTelemetry's own exporters, behind one that says no more than it may. It blocks, so it is called in a thread.

The invariant: nothing of what an exporter says or raises reaches the log, as addresses and headers may hold keys; what
is kept of it is a status, or the type of an error.
"""

import logging
import threading
from collections.abc import Callable
from enum import Enum
from typing import Any

from gateway.domain.otel import Exporting, Signal

log = logging.getLogger("gateway.otlp")

# Whose log lines quote addresses and headers.
_TALKATIVE = ("opentelemetry", "urllib3", "grpc")
_NOWHERE = logging.NullHandler()
GRPC_EXTRA = "pip install genesis-gateway[grpc]"


class Listening(logging.Handler):
    """Hears what the exporters have to say, and keeps of it only what cannot be a secret."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        # By thread: each export has one of its own.
        self.whys: dict[int, str] = {}
        self.templates: dict[str, None] = {}
        for name in _TALKATIVE:
            library = logging.getLogger(name)
            library.propagate = False
            # Without any, Python would write to stderr what comes after our end.
            library.addHandler(_NOWHERE)
            library.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a status or the type of an error, and a sentence without what was to be put into it."""
        self.templates[str(record.msg) if record.args else record.name] = None
        for value in record.args if isinstance(record.args, tuple) else ():
            if isinstance(value, BaseException):
                self.whys[threading.get_ident()] = type(value).__name__
            elif isinstance(value, Enum):
                self.whys[threading.get_ident()] = f"it answered {value.name}"
            elif isinstance(value, int):
                self.whys[threading.get_ident()] = f"it answered {value}"

    def tell(self) -> None:
        """Log what was heard so far, without what was quoted in it."""
        for template in self.templates:
            log.warning("one of OpenTelemetry's variables is not in order: %s", template.replace("%s", "***"))
        self.templates = {}

    def end(self) -> None:
        """Hear no more."""
        for name in _TALKATIVE:
            logging.getLogger(name).removeHandler(self)


class Exporter:
    """One signal's exporter."""

    def __init__(self, exporter: Any, listening: Listening) -> None:
        self._exporter = exporter
        self._listening = listening

    def send(self, make: Callable[[], Any]) -> str | Exception:
        """Export what `make` makes. Empty where the collector took it, else why it did not, which quotes nothing.

        An error is one that `make` raised.
        """
        data = None
        try:
            data = make()
            if self._exporter.export(data).name == "SUCCESS":
                return ""
        except Exception as error:  # noqa: BLE001  (it may be anything)
            # Whatever a library raises here is one reason more for which nothing arrived.
            return error if data is None else type(error).__name__
        finally:
            why = self._listening.whys.pop(threading.get_ident(), "")
        return why or "it did not take them in time"

    def shutdown(self) -> None:
        """Close its connections."""
        self._exporter.shutdown()


def make_exporter(signal: Signal, exporting: Exporting, listening: Listening) -> Exporter | None:
    """The exporter that is asked for; None where there can be none, which is told."""
    try:
        return Exporter(_made(signal, exporting), listening)
    except ModuleNotFoundError:
        log.warning("OTEL_EXPORTER_OTLP_PROTOCOL is grpc, so no %s are exported; it needs: %s", signal, GRPC_EXTRA)
    except Exception as error:  # noqa: BLE001  (it may be anything)
        # Each library has errors of its own for variables that are not in order, and quotes them.
        why = type(error).__name__
        log.warning("one of OpenTelemetry's variables is not in order (%s), so no %s are exported", why, signal)
    return None


def _made(signal: Signal, exporting: Exporting) -> Any:
    """Imported here: each is paid for only by those who use it. Their `timeout` is in seconds."""
    if exporting.protocol == "grpc" and signal == "metrics":
        from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter as GrpcMetrics

        return GrpcMetrics(endpoint=exporting.url, timeout=exporting.timeout_s)
    if exporting.protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcSpans

        return GrpcSpans(endpoint=exporting.url, timeout=exporting.timeout_s)
    if signal == "metrics":
        from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter

        return OTLPMetricExporter(endpoint=exporting.url, timeout=exporting.timeout_s)
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    return OTLPSpanExporter(endpoint=exporting.url, timeout=exporting.timeout_s)
