"""What OpenTelemetry's standard variables ask of the gateway, read into one value. Told the environment; reads none.

Only the variables that decide whether, where to, how and how often; headers, certificates, compression and the time
limit of one export are read by the exporter itself. The invariant: nothing that they hold is quoted, as a key may be in
it; and they are meant for every program beside us, so what is wrong with them is a complaint, never a reason not to
start.
"""

import re
from collections.abc import Mapping
from typing import Literal, NamedTuple, cast, get_args
from urllib.parse import urlsplit

Protocol = Literal["http/protobuf", "grpc"]
Signal = Literal["metrics", "traces"]

DEFAULT_INTERVAL_S = 60.0
# More often than this is a load on everybody and news to nobody.
MIN_INTERVAL_MS, MAX_INTERVAL_MS = 100, 86_400_000
# Sampler -> whether a caller's decision holds, and the ratio of the rest; None: OTEL_TRACES_SAMPLER_ARG says it.
_SAMPLERS: Mapping[str, tuple[bool, float | None]] = {
    "always_on": (False, 1.0),
    "always_off": (False, 0.0),
    "traceidratio": (False, None),
    "parentbased_always_on": (True, 1.0),
    "parentbased_always_off": (True, 0.0),
    "parentbased_traceidratio": (True, None),
}
_RATIO = re.compile(r"[01](?:\.[0-9]{0,20})?|\.[0-9]{1,20}")


class Exporting(NamedTuple):
    """Where one signal goes. `url` is the whole address; empty: it is not exported."""

    url: str = ""
    protocol: Protocol = "http/protobuf"


class Sampling(NamedTuple):
    """Which calls are traced: those whose callers say so, where `is_parent_based`, and a share of the others."""

    ratio: float = 1.0
    is_parent_based: bool = True


class Batching(NamedTuple):
    """How spans are sent: so often, so many at once; and how many may wait for it."""

    delay_s: float = 5.0
    max_queue_spans: int = 2_048
    max_batch_spans: int = 512


class Otel(NamedTuple):
    """Metrics every `interval_s`, traces in batches; either may be off. `complaints` are for the log."""

    metrics: Exporting = Exporting()
    interval_s: float = DEFAULT_INTERVAL_S
    traces: Exporting = Exporting()
    sampling: Sampling = Sampling()
    batching: Batching = Batching()
    complaints: tuple[str, ...] = ()

    @property
    def is_on(self) -> bool:
        """Whether anything is exported."""
        return bool(self.metrics.url or self.traces.url)


def read_otel(environ: Mapping[str, str], endpoint: str, *, trace_ratio: float = 1.0) -> Otel:
    """What the variables ask for. `endpoint` and `trace_ratio` are the configuration's, which a variable overrules."""
    reader = _Reader(environ, endpoint)
    if reader.said("OTEL_SDK_DISABLED").lower() == "true":
        return Otel()
    metrics, traces = reader.exporting("metrics"), reader.exporting("traces")
    otel = Otel(metrics=metrics, traces=traces)
    # What nobody uses is nothing to complain of.
    if metrics.url:
        interval_ms = reader.whole(
            "OTEL_METRIC_EXPORT_INTERVAL", DEFAULT_INTERVAL_S * 1000, MIN_INTERVAL_MS, MAX_INTERVAL_MS, " ms"
        )
        otel = otel._replace(interval_s=interval_ms / 1000)
    if traces.url:
        otel = otel._replace(sampling=reader.sampling(trace_ratio), batching=reader.batching())
    return otel._replace(complaints=tuple(dict.fromkeys(reader.complaints)))


class _Reader:
    """The variables, and what is wrong with them."""

    def __init__(self, environ: Mapping[str, str], endpoint: str) -> None:
        self._environ = environ
        self._endpoint = endpoint
        self.complaints: list[str] = []

    def said(self, name: str) -> str:
        """A variable's value. One that is empty is not set, says the specification."""
        return self._environ.get(name, "").strip()

    def exporting(self, signal: Signal) -> Exporting:
        """Where a signal goes, and in which protocol. Its own variables go before those for all signals."""
        exporters = {name.strip().lower() for name in self.said(f"OTEL_{signal.upper()}_EXPORTER").split(",")} - {""}
        own, all_signals = f"OTEL_EXPORTER_OTLP_{signal.upper()}_", "OTEL_EXPORTER_OTLP_"
        named = next((name for name in (f"{own}ENDPOINT", f"{all_signals}ENDPOINT") if self.said(name)), "")
        url = self.said(named) if named else self._endpoint
        if not url or (exporters and "otlp" not in exporters):
            return Exporting()
        if not is_http_url(url):
            self.complaints.append(
                f"{named or 'telemetry.otlp_endpoint'} is not an http address, so no {signal} are exported"
            )
            return Exporting()
        protocol = self._protocol(f"{own}PROTOCOL", f"{all_signals}PROTOCOL")
        if protocol == "http/protobuf" and named != f"{own}ENDPOINT":
            url = f"{url.rstrip('/')}/v1/{signal}"
        return Exporting(url, protocol)

    def _protocol(self, *names: str) -> Protocol:
        name = next((name for name in names if self.said(name)), "")
        if name and self.said(name) not in get_args(Protocol):
            known = " and ".join(get_args(Protocol))
            self.complaints.append(f"{name} asks for a protocol other than {known}; it is http/protobuf")
            return "http/protobuf"
        return cast(Protocol, self.said(name)) if name else "http/protobuf"

    def sampling(self, ratio: float) -> Sampling:
        """Which calls are traced. `ratio` is the configuration's."""
        name = self.said("OTEL_TRACES_SAMPLER")
        if not name:
            return Sampling(ratio)
        if name not in _SAMPLERS:
            self.complaints.append(
                "OTEL_TRACES_SAMPLER names no sampler that there is here; telemetry.trace_ratio holds"
            )
            return Sampling(ratio)
        is_parent_based, fixed = _SAMPLERS[name]
        return Sampling(self._ratio() if fixed is None else fixed, is_parent_based)

    def _ratio(self) -> float:
        written = self.said("OTEL_TRACES_SAMPLER_ARG")
        if written and _RATIO.fullmatch(written) and float(written) <= 1:
            return float(written)
        if written:
            self.complaints.append("OTEL_TRACES_SAMPLER_ARG is not 0 to 1; it is 1")
        return 1.0

    def batching(self) -> Batching:
        """How spans are sent."""
        default = Batching()
        delay_ms = self.whole(
            "OTEL_BSP_SCHEDULE_DELAY", default.delay_s * 1000, MIN_INTERVAL_MS, MAX_INTERVAL_MS, " ms"
        )
        # A call and its attempts are never sent apart, so there has to be room for some.
        queue = self.whole("OTEL_BSP_MAX_QUEUE_SIZE", default.max_queue_spans, 64, 1_000_000)
        batch = self.whole("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", default.max_batch_spans, 1, 100_000)
        return Batching(delay_ms / 1000, queue, min(batch, queue))

    def whole(self, name: str, default: float, least: int, most: int, unit: str = "") -> int:
        """A whole number between two."""
        written = self.said(name)
        if re.fullmatch("[0-9]{1,9}", written) and least <= int(written) <= most:
            return int(written)
        if written:
            self.complaints.append(f"{name} is not {least} to {most}{unit}; it is {default:g}{unit}")
        return int(default)


def is_http_url(text: str) -> bool:
    """Whether something can be sent there."""
    try:
        url = urlsplit(text)
        return url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:  # A bracket without its twin, or a port above 65535.
        return False
