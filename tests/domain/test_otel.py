"""OpenTelemetry's standard variables: which of them wins, and that nothing they hold is ever quoted."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.domain.otel import DEFAULT_INTERVAL_S, Otel, is_http_url, read_otel

ALL = "OTEL_EXPORTER_OTLP_ENDPOINT"
METRICS = "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT"
ON = {ALL: "http://all:4318"}


@pytest.mark.parametrize(
    ("environ", "endpoint", "url"),
    [
        ({}, "", ""),
        ({}, "http://file:4318", "http://file:4318/v1/metrics"),
        ({}, "https://file/otlp/", "https://file/otlp/v1/metrics"),
        (ON, "", "http://all:4318/v1/metrics"),
        (ON, "http://file:4318", "http://all:4318/v1/metrics"),
        ({ALL: "http://all:4318/"}, "", "http://all:4318/v1/metrics"),
        # That of the metrics is taken as it is.
        ({METRICS: "http://own:1/path"}, "", "http://own:1/path"),
        ({METRICS: "http://own:1/path", **ON}, "http://file", "http://own:1/path"),
        # Set to nothing is not set, says the specification.
        ({METRICS: " ", ALL: ""}, "http://file", "http://file/v1/metrics"),
        ({**ON, "OTEL_SDK_DISABLED": "true"}, "", ""),
        ({**ON, "OTEL_SDK_DISABLED": "TRUE"}, "http://file", ""),
        # Anything but true is false.
        ({**ON, "OTEL_SDK_DISABLED": "1"}, "", "http://all:4318/v1/metrics"),
        ({**ON, "OTEL_METRICS_EXPORTER": "none"}, "", ""),
        ({**ON, "OTEL_METRICS_EXPORTER": "prometheus"}, "", ""),
        ({**ON, "OTEL_METRICS_EXPORTER": "console, otlp"}, "", "http://all:4318/v1/metrics"),
        ({**ON, "OTEL_METRICS_EXPORTER": "otlp"}, "", "http://all:4318/v1/metrics"),
        # Asking for it says not yet where to.
        ({"OTEL_METRICS_EXPORTER": "otlp"}, "", ""),
    ],
)
def test_where_the_metrics_go(environ: dict[str, str], endpoint: str, url: str) -> None:
    found = read_otel(environ, endpoint)
    assert found.metrics_url == url
    assert found.complaints == ()


@pytest.mark.parametrize(
    ("written", "interval_s", "complains"),
    [
        ("", DEFAULT_INTERVAL_S, False),
        ("100", 0.1, False),
        ("5000", 5.0, False),
        (" 86400000 ", 86_400.0, False),
        ("99", DEFAULT_INTERVAL_S, True),
        ("86400001", DEFAULT_INTERVAL_S, True),
        ("0", DEFAULT_INTERVAL_S, True),
        ("-5000", DEFAULT_INTERVAL_S, True),
        ("5s", DEFAULT_INTERVAL_S, True),
        ("\u0665\u0660\u0660\u0660", DEFAULT_INTERVAL_S, True),
        ("9" * 5_000, DEFAULT_INTERVAL_S, True),
    ],
)
def test_how_often(written: str, interval_s: float, complains: bool) -> None:
    found = read_otel({**ON, "OTEL_METRIC_EXPORT_INTERVAL": written}, "")
    assert (found.interval_s, bool(found.complaints)) == (interval_s, complains)
    assert found.metrics_url


@pytest.mark.parametrize("name", ["OTEL_EXPORTER_OTLP_PROTOCOL", "OTEL_EXPORTER_OTLP_METRICS_PROTOCOL"])
def test_another_protocol_is_told_and_not_spoken(name: str) -> None:
    found = read_otel({**ON, name: "grpc"}, "")
    assert found.metrics_url
    assert "http/protobuf" in found.complaints[0]
    assert read_otel({**ON, name: "http/protobuf"}, "").complaints == ()


@pytest.mark.parametrize(
    "bad", ["all:4318", "grpc://all:4317", "http://", "http://[::1", "http://h:99999", "http://h:0"]
)
def test_what_is_no_address_is_not_sent_to(bad: str) -> None:
    assert not is_http_url(bad)
    assert read_otel({ALL: bad}, "http://file") == Otel(
        complaints=("OTEL_EXPORTER_OTLP_ENDPOINT is not an http address, so no metrics are exported",)
    )
    # As with `gateway check`, where a variable in the file may be missing.
    assert "telemetry.otlp_endpoint" in read_otel({}, bad).complaints[0]


@given(st.text(), st.text(), st.text())
def test_no_value_is_ever_quoted_and_none_is_an_error(endpoint: str, interval: str, protocol: str) -> None:
    names = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_METRIC_EXPORT_INTERVAL", "OTEL_EXPORTER_OTLP_PROTOCOL")
    values = [f"{value}-s3cr3t" for value in (endpoint, interval, protocol)]
    found = read_otel(dict(zip(names, values, strict=True)), "")
    assert not any("s3cr3t" in complaint for complaint in found.complaints)
