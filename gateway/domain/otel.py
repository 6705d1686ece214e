"""What OpenTelemetry's standard variables ask of the gateway, read into one value. Told the environment; reads none.

Only the variables that decide whether, where to, how, how often and for how long; headers, certificates and
compression are read by the exporter itself. The invariant: nothing that they hold is quoted, as a key may be in it; and
they are meant for every program beside us, so what is wrong with them, or asks for what there is not, is a complaint,
never a reason not to start.
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
DEFAULT_TIMEOUT_S = 10.0
# OpenTelemetry's exporters for Python read it in seconds (its issue 4044), and the specification has milliseconds, as
# have all others who are told by the same variable. So 10, which was meant for those exporters, is none of ours.
MIN_TIMEOUT_MS, MAX_TIMEOUT_MS = 100, 60_000
# Sampler -> whether a caller's decision holds, and the ratio of the rest; None: OTEL_TRACES_SAMPLER_ARG says it.
_SAMPLERS: Mapping[str, tuple[bool, float | None]] = {
    "always_on": (False, 1.0),
    "always_off": (False, 0.0),
    "traceidratio": (False, None),
    "parentbased_always_on": (True, 1.0),
    "parentbased_always_off": (True, 0.0),
    "parentbased_traceidratio": (True, None),
}
# What may be asked for and is not done: the variable -> the value that says what is done anyway, and what that is.
_NOT_OF_METRICS: Mapping[str, tuple[str, str]] = {
    "OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE": ("cumulative", "sums are cumulative"),
    "OTEL_EXPORTER_OTLP_METRICS_DEFAULT_HISTOGRAM_AGGREGATION": (
        "explicit_bucket_histogram", "histograms have the buckets that they have for Prometheus",
    ),
    "OTEL_METRICS_EXEMPLAR_FILTER": ("trace_based", "exemplars are those of sampled calls"),
    "OTEL_METRIC_EXPORT_TIMEOUT": ("", "OTEL_EXPORTER_OTLP_TIMEOUT is"),
}  # fmt: skip
_NOT_OF_TRACES: Mapping[str, tuple[str, str]] = {
    "OTEL_PROPAGATORS": ("baggage,tracecontext", "tracecontext and baggage are spoken"),
    "OTEL_BSP_EXPORT_TIMEOUT": ("", "OTEL_EXPORTER_OTLP_TIMEOUT is"),
    **dict.fromkeys(
        (
            "OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT", "OTEL_ATTRIBUTE_COUNT_LIMIT", "OTEL_SPAN_ATTRIBUTE_VALUE_LENGTH_LIMIT",
            "OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT", "OTEL_SPAN_EVENT_COUNT_LIMIT", "OTEL_SPAN_LINK_COUNT_LIMIT",
            "OTEL_EVENT_ATTRIBUTE_COUNT_LIMIT", "OTEL_LINK_ATTRIBUTE_COUNT_LIMIT",
        ),
        ("", "of what spans hold only texts are long, and traces.max_chars of the policy bounds those"),
    ),
}  # fmt: skip


class Exporting(NamedTuple):
    """Where one signal goes. `url` is the whole address; empty: it is not exported. One export may take `timeout_s`."""

    url: str = ""
    protocol: Protocol = "http/protobuf"
    timeout_s: float = DEFAULT_TIMEOUT_S


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
        reader.check_undone(_NOT_OF_METRICS)
    if traces.url:
        otel = otel._replace(sampling=reader.sampling(trace_ratio), batching=reader.batching())
        reader.check_undone(_NOT_OF_TRACES)
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
        limit = next((name for name in (f"{own}TIMEOUT", f"{all_signals}TIMEOUT") if self.said(name)), "")
        timeout_ms = self.whole(limit, DEFAULT_TIMEOUT_S * 1000, MIN_TIMEOUT_MS, MAX_TIMEOUT_MS, " ms")
        return Exporting(url, protocol, timeout_ms / 1000)

    def _protocol(self, *names: str) -> Protocol:
        name = next((name for name in names if self.said(name)), "")
        if name and self.said(name) not in get_args(Protocol):
            known = " and ".join(get_args(Protocol))
            self.complaints.append(f"{name} asks for a protocol other than {known}; it is http/protobuf")
            return "http/protobuf"
        return cast(Protocol, self.said(name)) if name else "http/protobuf"

    def sampling(self, ratio: float) -> Sampling:
        """Which calls are traced. `ratio` is the configuration's."""
        name = self.said("OTEL_TRACES_SAMPLER").lower()
        if not name:
            return Sampling(ratio)
        if name not in _SAMPLERS:
            self.complaints.append(
                "OTEL_TRACES_SAMPLER names no sampler that there is here; telemetry.trace_ratio holds"
            )
            return Sampling(ratio)
        is_parent_based, fixed = _SAMPLERS[name]
        return Sampling(self._ratio(ratio) if fixed is None else fixed, is_parent_based)

    def _ratio(self, otherwise: float) -> float:
        written = self.said("OTEL_TRACES_SAMPLER_ARG")
        try:
            ratio = float(written or 1)
        except ValueError:
            ratio = -1.0
        if 0 <= ratio <= 1:
            return ratio
        # Whoever wrote something wanted some of them. All of them could be a hundred times that.
        self.complaints.append("OTEL_TRACES_SAMPLER_ARG is not 0 to 1; telemetry.trace_ratio holds")
        return otherwise

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

    def check_undone(self, undone: Mapping[str, tuple[str, str]]) -> None:
        """Complain of what is asked for and not done. Lists are compared without their order."""
        for name, (done, instead) in undone.items():
            written = {piece.strip() for piece in self.said(name).lower().split(",")} - {""}
            if written and ",".join(sorted(written)) != done:
                self.complaints.append(f"{name} is not followed in what it asks for: {instead}")

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
