"""OpenTelemetry's exporters, over HTTP and gRPC: what arrives, and that nothing they say or raise reaches the log."""

import asyncio
import logging
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest
from aiohttp.test_utils import unused_port

from gateway.domain.otel import Exporting, Protocol, Signal, read_otel
from gateway.telemetry.otlp_exporter import Exporter, Listening, make_exporter
from gateway.telemetry.otlp_metrics import metrics_data, resource_of
from tests.collector import SERVER, Collector, collector, grpc_collector
from tests.raw_http import connected
from tests.running import running_gateway
from tests.telemetry.test_observe import call

SECRET = "hush-hush-4712"
DATA = metrics_data(resource_of("dev"), [], began_ns=1, now_ns=2)
COLLECTORS: dict[Protocol, Callable[[], AbstractAsyncContextManager[Collector]]] = {
    "http/protobuf": collector,
    "grpc": grpc_collector,
}


@pytest.fixture(autouse=True)
def _with_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", f"authorization=Bearer%20{SECRET}")


@asynccontextmanager
async def listening() -> AsyncIterator[Listening]:
    found = Listening()
    try:
        yield found
    finally:
        found.end()


@pytest.mark.parametrize("protocol", COLLECTORS)
async def test_metrics_and_traces_arrive_in_either_protocol(tmp_path: Path, protocol: Protocol) -> None:
    async with COLLECTORS[protocol]() as found:
        variables = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": found.url,
            "OTEL_EXPORTER_OTLP_PROTOCOL": protocol,
            "OTEL_TRACES_SAMPLER": "parentbased_always_on",
        }
        async with (
            running_gateway(tmp_path, environ=variables) as gateway,
            connected(gateway.data_url) as connection,
        ):
            for stream in (False, True):
                assert await call(connection, stream=stream) == 200
            records = gateway.journal()
        assert found.latest().total("model.requests") == 2
        assert {span.id for span in found.spans(SERVER)} == {record.span_id for record in records}
        assert [headers["authorization"] for headers in found.headers] == [f"Bearer {SECRET}"] * 2


@pytest.mark.parametrize("protocol", COLLECTORS)
@pytest.mark.parametrize("signal", ["metrics", "traces"])
async def test_one_who_is_not_there_is_a_reason_without_the_address(signal: Signal, protocol: Protocol) -> None:
    url = f"http://127.0.0.1:{unused_port()}/{SECRET}"
    async with listening() as heard:
        exporter = make_exporter(signal, Exporting(url, protocol, timeout_s=0.5), heard)
        assert exporter is not None
        why = await asyncio.to_thread(exporter.send, lambda: DATA if signal == "metrics" else [])
        exporter.shutdown()
    assert isinstance(why, str)
    assert why
    assert SECRET not in why
    assert "127.0.0.1" not in why
    assert heard.whys == {}


@pytest.mark.parametrize("protocol", COLLECTORS)
@pytest.mark.parametrize("signal", ["metrics", "traces"])
async def test_an_exporter_has_the_time_that_we_read_and_not_what_it_would_read_itself(
    signal: Signal, protocol: Protocol, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Ten seconds, as the specification has it. The exporters would take it for three hours.
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "10000")
    read = read_otel({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_EXPORTER_OTLP_TIMEOUT": "10000"}, "")
    async with listening() as heard:
        exporter = make_exporter(signal, read.metrics._replace(protocol=protocol), heard)
        assert exporter is not None
        theirs = exporter._exporter if protocol == "grpc" else exporter._exporter._client
        assert theirs._timeout == 10.0
        exporter.shutdown()


class _Raises:
    """An exporter that raises what no exporter should."""

    def export(self, data: object) -> object:
        raise LookupError(f"metadata was invalid: {SECRET}, {data}")


async def test_what_a_library_raises_is_told_by_its_kind(caplog: pytest.LogCaptureFixture) -> None:
    async with listening() as heard:
        assert Exporter(_Raises(), heard).send(lambda: DATA) == "LookupError"
    assert SECRET not in caplog.text


@pytest.mark.parametrize("protocol", COLLECTORS)
async def test_a_variable_that_a_library_cannot_read_turns_off_the_export_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, protocol: Protocol
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", f"zip-{SECRET}")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", f"soon-{SECRET}")
    async with listening() as heard:
        make_exporter("traces", Exporting("http://127.0.0.1:1", protocol), heard)
        heard.tell()
    ours = [record.getMessage() for record in caplog.records if record.name == "gateway.otlp"]
    assert ours
    assert all(text.startswith("one of OpenTelemetry's variables is not in order") for text in ours)
    assert not [text for text in ours if SECRET in text]


async def test_threads_that_export_at_once_hear_each_their_own_reason() -> None:
    library = logging.getLogger("opentelemetry.something")

    def fail(status: int) -> dict[int, str]:
        library.error("no: %s", status)
        return dict(heard.whys)

    async with listening() as heard:
        for status in (500, 404):
            await asyncio.to_thread(fail, status)
        assert sorted(heard.whys.values()) in (["it answered 404"], ["it answered 404", "it answered 500"])
        assert {"no: %s"} == set(heard.templates)


def test_without_its_package_grpc_is_told_by_name_and_the_gateway_starts_all_the_same() -> None:
    script = """
import logging, sys
sys.modules["grpc"] = None
logging.basicConfig(stream=sys.stdout, format="%(levelname)s %(message)s")
from gateway.domain.otel import Exporting
from gateway.telemetry.otlp_exporter import Listening, make_exporter
print(make_exporter("traces", Exporting("http://h:4317", "grpc"), Listening()))
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == [
        "WARNING OTEL_EXPORTER_OTLP_PROTOCOL is grpc, so no traces are exported; it needs: "
        "pip install genesis-gateway[grpc]",
        "None",
    ]
    assert run.stderr == ""


def test_an_exporter_over_http_does_not_load_grpc() -> None:
    script = """
import sys
from gateway.domain.otel import Exporting
from gateway.telemetry.otlp_exporter import Listening, make_exporter
for signal in ("metrics", "traces"):
    assert make_exporter(signal, Exporting("http://h:4318"), Listening()) is not None
print([name for name in ("grpc", "litellm") if name in sys.modules])
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
