"""OpenTelemetry's standard variables: which of them wins, and that nothing they hold is ever quoted."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.domain.otel import (
    _NOT_OF_METRICS,
    _NOT_OF_TRACES,
    DEFAULT_INTERVAL_S,
    Batching,
    Exporting,
    Otel,
    Sampling,
    is_http_url,
    read_otel,
)

ALL = "OTEL_EXPORTER_OTLP_ENDPOINT"
METRICS = "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT"
TRACES = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"
ON = {ALL: "http://all:4318"}


@pytest.mark.parametrize(
    ("environ", "endpoint", "metrics", "traces"),
    [
        ({}, "", "", ""),
        ({}, "http://file:4318", "http://file:4318/v1/metrics", "http://file:4318/v1/traces"),
        ({}, "https://file/otlp/", "https://file/otlp/v1/metrics", "https://file/otlp/v1/traces"),
        (ON, "", "http://all:4318/v1/metrics", "http://all:4318/v1/traces"),
        (ON, "http://file:4318", "http://all:4318/v1/metrics", "http://all:4318/v1/traces"),
        ({ALL: "http://all:4318/"}, "", "http://all:4318/v1/metrics", "http://all:4318/v1/traces"),
        # That of one signal is taken as it is, and says nothing of the other.
        ({METRICS: "http://own:1/path"}, "", "http://own:1/path", ""),
        ({TRACES: "http://own:1/path"}, "", "", "http://own:1/path"),
        ({METRICS: "http://own:1/path", **ON}, "http://file", "http://own:1/path", "http://all:4318/v1/traces"),
        ({TRACES: "http://own:1/path"}, "http://file", "http://file/v1/metrics", "http://own:1/path"),
        # Set to nothing is not set, says the specification.
        ({METRICS: " ", ALL: ""}, "http://file", "http://file/v1/metrics", "http://file/v1/traces"),
        ({**ON, "OTEL_SDK_DISABLED": "true"}, "", "", ""),
        ({**ON, "OTEL_SDK_DISABLED": "TRUE"}, "http://file", "", ""),
        # Anything but true is false.
        ({**ON, "OTEL_SDK_DISABLED": "1"}, "", "http://all:4318/v1/metrics", "http://all:4318/v1/traces"),
        ({**ON, "OTEL_METRICS_EXPORTER": "none"}, "", "", "http://all:4318/v1/traces"),
        ({**ON, "OTEL_TRACES_EXPORTER": "none"}, "", "http://all:4318/v1/metrics", ""),
        ({**ON, "OTEL_METRICS_EXPORTER": "prometheus"}, "", "", "http://all:4318/v1/traces"),
        (
            {**ON, "OTEL_TRACES_EXPORTER": "console, otlp"},
            "",
            "http://all:4318/v1/metrics",
            "http://all:4318/v1/traces",
        ),
        # Asking for it says not yet where to.
        ({"OTEL_METRICS_EXPORTER": "otlp", "OTEL_TRACES_EXPORTER": "otlp"}, "", "", ""),
        # Over gRPC the address is the whole of it: the path is the service's name.
        (
            {**ON, "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "grpc"},
            "",
            "http://all:4318/v1/metrics",
            "http://all:4318",
        ),
    ],
)
def test_where_metrics_and_traces_go(environ: dict[str, str], endpoint: str, metrics: str, traces: str) -> None:
    found = read_otel(environ, endpoint)
    assert (found.metrics.url, found.traces.url) == (metrics, traces)
    assert found.is_on == bool(metrics or traces)
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
    assert found.metrics.url
    assert read_otel({"OTEL_METRIC_EXPORT_INTERVAL": written, TRACES: "http://own"}, "").complaints == ()


@pytest.mark.parametrize(
    ("environ", "metrics", "traces"),
    [
        ({}, "http/protobuf", "http/protobuf"),
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}, "http/protobuf", "http/protobuf"),
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "grpc", "grpc"),
        ({"OTEL_EXPORTER_OTLP_METRICS_PROTOCOL": "grpc"}, "grpc", "http/protobuf"),
        (
            {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf"},
            "grpc",
            "http/protobuf",
        ),
    ],
)
def test_each_signal_has_its_protocol(environ: dict[str, str], metrics: str, traces: str) -> None:
    found = read_otel({**ON, **environ}, "")
    assert (found.metrics.protocol, found.traces.protocol) == (metrics, traces)
    assert found.complaints == ()


@pytest.mark.parametrize("name", ["OTEL_EXPORTER_OTLP_PROTOCOL", "OTEL_EXPORTER_OTLP_METRICS_PROTOCOL"])
def test_a_protocol_that_nobody_speaks_is_told_once(name: str) -> None:
    found = read_otel({**ON, name: "http/json"}, "")
    assert found.metrics == Exporting("http://all:4318/v1/metrics", "http/protobuf")
    assert found.complaints == (f"{name} asks for a protocol other than http/protobuf and grpc; it is http/protobuf",)


@pytest.mark.parametrize(
    ("sampler", "arg", "sampling", "complains"),
    [
        ("", "", Sampling(0.25, True), False),
        # Of no sampler, says the specification.
        ("", "0.5", Sampling(0.25, True), False),
        ("always_on", "0.5", Sampling(1.0, False), False),
        ("always_off", "", Sampling(0.0, False), False),
        ("traceidratio", "0.5", Sampling(0.5, False), False),
        ("traceidratio", "", Sampling(1.0, False), False),
        ("parentbased_always_on", "", Sampling(1.0, True), False),
        ("parentbased_always_off", "", Sampling(0.0, True), False),
        ("parentbased_traceidratio", ".001", Sampling(0.001, True), False),
        ("parentbased_traceidratio", "0", Sampling(0.0, True), False),
        ("parentbased_traceidratio", "1.0", Sampling(1.0, True), False),
        ("parentbased_traceidratio", "1e-2", Sampling(0.01, True), False),
        # Who cannot be understood wanted a share all the same, and never a hundred times it.
        ("parentbased_traceidratio", "1.01", Sampling(0.25, True), True),
        ("parentbased_traceidratio", "-0.1", Sampling(0.25, True), True),
        ("parentbased_traceidratio", "nan", Sampling(0.25, True), True),
        ("parentbased_traceidratio", "10%", Sampling(0.25, True), True),
        ("traceidratio", "1e400", Sampling(0.25, False), True),
        ("jaeger_remote", "", Sampling(0.25, True), True),
        ("Always_On", "", Sampling(1.0, False), False),
        ("PARENTBASED_TRACEIDRATIO", "0.5", Sampling(0.5, True), False),
    ],
)
def test_which_calls_are_traced(sampler: str, arg: str, sampling: Sampling, complains: bool) -> None:
    environ = {**ON, "OTEL_TRACES_SAMPLER": sampler, "OTEL_TRACES_SAMPLER_ARG": arg}
    found = read_otel(environ, "", trace_ratio=0.25)
    assert (found.sampling, bool(found.complaints)) == (sampling, complains)
    # Where nobody is traced, nothing is wrong with it.
    assert read_otel({**environ, "OTEL_TRACES_EXPORTER": "none"}, "").complaints == ()


OTLP = "OTEL_EXPORTER_OTLP_"


@pytest.mark.parametrize(
    ("environ", "metrics_s", "traces_s", "complains"),
    [
        ({}, 10.0, 10.0, 0),
        ({f"{OTLP}TIMEOUT": "10000"}, 10.0, 10.0, 0),
        ({f"{OTLP}TIMEOUT": "100", f"{OTLP}TRACES_TIMEOUT": "60000"}, 0.1, 60.0, 0),
        ({f"{OTLP}METRICS_TIMEOUT": "2500"}, 2.5, 10.0, 0),
        # Seconds, as the exporters for Python read it: by themselves they would wait for 2.8 h where 10000 is written.
        ({f"{OTLP}TIMEOUT": "10"}, 10.0, 10.0, 1),
        ({f"{OTLP}TIMEOUT": "0.5"}, 10.0, 10.0, 1),
        ({f"{OTLP}TIMEOUT": "99", f"{OTLP}TRACES_TIMEOUT": "60001"}, 10.0, 10.0, 2),
        ({f"{OTLP}TIMEOUT": "soon", f"{OTLP}METRICS_TIMEOUT": "5000"}, 5.0, 10.0, 1),
    ],
)
def test_how_long_an_export_may_take_is_in_milliseconds(
    environ: dict[str, str], metrics_s: float, traces_s: float, complains: int
) -> None:
    found = read_otel({**ON, **environ}, "")
    assert (found.metrics.timeout_s, found.traces.timeout_s) == (metrics_s, traces_s)
    assert len(found.complaints) == complains
    assert all(" is not 100 to 60000 ms; it is 10000 ms" in complaint for complaint in found.complaints)


@pytest.mark.parametrize(
    ("name", "done", "undone"),
    [
        (f"{OTLP}METRICS_TEMPORALITY_PREFERENCE", "Cumulative", "delta"),
        (
            f"{OTLP}METRICS_DEFAULT_HISTOGRAM_AGGREGATION",
            "explicit_bucket_histogram",
            "base2_exponential_bucket_histogram",
        ),
        ("OTEL_METRICS_EXEMPLAR_FILTER", "trace_based", "always_on"),
        ("OTEL_METRIC_EXPORT_TIMEOUT", "", "30000"),
        ("OTEL_PROPAGATORS", "tracecontext, baggage", "b3"),
        ("OTEL_PROPAGATORS", "baggage,tracecontext,", "tracecontext"),
        ("OTEL_BSP_EXPORT_TIMEOUT", "", "30000"),
        ("OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT", "", "100"),
        ("OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT", " ", "128"),
    ],
)
def test_what_is_asked_for_and_not_done_is_told_once(name: str, done: str, undone: str) -> None:
    assert read_otel({**ON, name: done}, "").complaints == ()
    (complaint,) = read_otel({**ON, name: undone}, "").complaints
    assert complaint.startswith(f"{name} is not followed")
    # Where nothing is exported, there is nothing wrong with it.
    assert read_otel({name: undone}, "").complaints == ()
    none = {"OTEL_METRICS_EXPORTER": "none", "OTEL_TRACES_EXPORTER": "none"}
    assert read_otel({**ON, **none, name: undone}, "").complaints == ()


@pytest.mark.parametrize("name", sorted({*_NOT_OF_METRICS, *_NOT_OF_TRACES}))
def test_what_is_not_done_is_documented(name: str) -> None:
    assert f"`{name}`" in (Path(__file__).parent.parent.parent / "docs" / "metrics.md").read_text()


@pytest.mark.parametrize(
    ("environ", "batching", "complains"),
    [
        ({}, Batching(5.0, 2_048, 512), 0),
        ({"OTEL_BSP_SCHEDULE_DELAY": "250"}, Batching(0.25, 2_048, 512), 0),
        ({"OTEL_BSP_MAX_QUEUE_SIZE": "64"}, Batching(5.0, 64, 64), 0),
        ({"OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "1"}, Batching(5.0, 2_048, 1), 0),
        ({"OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "4096"}, Batching(5.0, 2_048, 2_048), 0),
        (
            {
                "OTEL_BSP_SCHEDULE_DELAY": "0",
                "OTEL_BSP_MAX_QUEUE_SIZE": "63",
                "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "many",
            },
            Batching(),
            3,
        ),
    ],
)
def test_how_spans_are_batched(environ: dict[str, str], batching: Batching, complains: int) -> None:
    found = read_otel({**ON, **environ}, "")
    assert (found.batching, len(found.complaints)) == (batching, complains)


@pytest.mark.parametrize(
    "bad", ["all:4318", "grpc://all:4317", "http://", "http://[::1", "http://h:99999", "http://h:0"]
)
def test_what_is_no_address_is_not_sent_to(bad: str) -> None:
    assert not is_http_url(bad)
    assert read_otel({ALL: bad}, "http://file") == Otel(
        complaints=(
            "OTEL_EXPORTER_OTLP_ENDPOINT is not an http address, so no metrics are exported",
            "OTEL_EXPORTER_OTLP_ENDPOINT is not an http address, so no traces are exported",
        )
    )
    # As with `gateway check`, where a variable in the file may be missing.
    assert "telemetry.otlp_endpoint" in read_otel({}, bad).complaints[0]


@given(st.text(), st.text())
def test_no_value_is_ever_quoted_and_none_is_an_error(endpoint: str, value: str) -> None:
    names = (
        "OTEL_METRIC_EXPORT_INTERVAL",
        "OTEL_EXPORTER_OTLP_PROTOCOL",
        "OTEL_TRACES_SAMPLER",
        "OTEL_BSP_SCHEDULE_DELAY",
        "OTEL_BSP_MAX_QUEUE_SIZE",
        "OTEL_EXPORTER_OTLP_TIMEOUT",
        *_NOT_OF_METRICS,
        *_NOT_OF_TRACES,
    )
    environ = {ALL: f"http://host/{endpoint}", **dict.fromkeys(names, f"{value}-s3cr3t")}
    for sampler in (f"{value}-s3cr3t", "traceidratio"):
        environ |= {"OTEL_TRACES_SAMPLER": sampler, "OTEL_TRACES_SAMPLER_ARG": f"{value}-s3cr3t"}
        found = read_otel(environ, "")
        # The sampler, or its ratio.
        assert len(found.complaints) == len(names)
        assert not any("s3cr3t" in complaint for complaint in found.complaints)
