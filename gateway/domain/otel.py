"""What OpenTelemetry's standard variables ask of the gateway, read into one value. Told the environment; reads none.

Only the variables that decide whether, where to and how often; headers, certificates, compression and the time limit of
one export are read by the exporter itself. The invariant: nothing that they hold is quoted, as a key may be in it; and
they are meant for every program beside us, so what is wrong with them is a complaint, never a reason not to start.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple
from urllib.parse import urlsplit

DEFAULT_INTERVAL_S = 60.0
# More often than this is a load on everybody and news to nobody.
MIN_INTERVAL_MS, MAX_INTERVAL_MS = 100, 86_400_000
_METRICS_PATH = "/v1/metrics"
_OUR_PROTOCOL = "http/protobuf"


class Otel(NamedTuple):
    """`metrics_url` is the whole address; empty: nothing is exported. `complaints` are for the log."""

    metrics_url: str = ""
    interval_s: float = DEFAULT_INTERVAL_S
    complaints: tuple[str, ...] = ()


def read_otel(environ: Mapping[str, str], endpoint: str) -> Otel:
    """What the variables ask for. `endpoint` is that of the configuration, which a variable overrules."""

    def said(name: str) -> str:
        return environ.get(name, "").strip()

    exporters = {name.strip().lower() for name in said("OTEL_METRICS_EXPORTER").split(",") if name.strip()}
    if said("OTEL_SDK_DISABLED").lower() == "true" or (exporters and "otlp" not in exporters):
        return Otel()
    named = next(
        (name for name in ("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT") if said(name)), ""
    )
    url = said(named) if named else endpoint
    if not url:
        return Otel()
    if not is_http_url(url):
        return Otel(
            complaints=(f"{named or 'telemetry.otlp_endpoint'} is not an http address, so no metrics are exported",)
        )
    if named != "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT":
        url = url.rstrip("/") + _METRICS_PATH
    complaints = []
    protocol = said("OTEL_EXPORTER_OTLP_METRICS_PROTOCOL") or said("OTEL_EXPORTER_OTLP_PROTOCOL")
    if protocol not in ("", _OUR_PROTOCOL):
        complaints.append(f"OTEL_EXPORTER_OTLP_PROTOCOL asks for another protocol; metrics go out as {_OUR_PROTOCOL}")
    interval_s = DEFAULT_INTERVAL_S
    if interval := said("OTEL_METRIC_EXPORT_INTERVAL"):
        if re.fullmatch("[0-9]{1,9}", interval) and MIN_INTERVAL_MS <= int(interval) <= MAX_INTERVAL_MS:
            interval_s = int(interval) / 1000
        else:
            allowed = f"{MIN_INTERVAL_MS} to {MAX_INTERVAL_MS} ms"
            complaints.append(f"OTEL_METRIC_EXPORT_INTERVAL is not {allowed}; it is {DEFAULT_INTERVAL_S:g} s")
    return Otel(url, interval_s, tuple(complaints))


def is_http_url(text: str) -> bool:
    """Whether something can be sent there."""
    try:
        url = urlsplit(text)
        return url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:  # A bracket without its twin, or a port above 65535.
        return False
