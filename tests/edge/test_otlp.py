"""Exporting over OTLP to a collector that decodes it, is away, hangs or refuses; and what the calls notice: nothing."""

import asyncio
import gc
import logging
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from aiohttp.test_utils import unused_port
from opentelemetry.sdk.metrics.export import MetricsData

from gateway.domain.money import NUSD_PER_USD
from gateway.edge import otlp as room
from gateway.edge.observe import METRICS, Kind
from gateway.edge.otlp import OtlpExport
from tests.collector import Collector, collector
from tests.edge.test_observe import FAULTY, FINETUNED, call, make_calls, samples, scrape, total
from tests.raw_http import connected
from tests.running import RunningGateway, running_gateway

SECRET = "hush-hush-4711"


@pytest.fixture(autouse=True)
def _without_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """The exporter's own variables: a key in the headers, and no time for second tries."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", f"authorization=Bearer%20{SECRET}")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "0.5")


class _Log(logging.Handler):
    """What reaches the root, as in production. (pytest's own capture also listens to loggers that pass nothing on.)"""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@pytest.fixture
def said() -> Iterator[_Log]:
    """All that anybody logs, down to debug; the key is in none of it, and nobody but us speaks of exports."""
    root, log = logging.getLogger(), _Log()
    level = root.level
    root.addHandler(log)
    root.setLevel(logging.DEBUG)
    yield log
    root.setLevel(level)
    root.removeHandler(log)
    assert not [record.getMessage() for record in log.records if SECRET in record.getMessage()]
    assert not [record.name for record in log.records if record.name.startswith(("opentelemetry", "urllib3"))]


def told(said: _Log) -> list[tuple[str, str]]:
    """What our own room said."""
    return [(record.levelname, record.getMessage()) for record in said.records if record.name == "gateway.otlp"]


def to(url: str, **variables: str) -> dict[str, str]:
    return {"OTEL_EXPORTER_OTLP_ENDPOINT": url, **variables}


def exporter(gateway: RunningGateway) -> OtlpExport:
    assert gateway.gateway.otlp is not None
    return gateway.gateway.otlp


def senders() -> int:
    return sum(thread.name == "otlp" for thread in threading.enumerate())


# --- One aggregate, two exporters ------------------------------------------------------------------------------------


async def test_otlp_says_what_prometheus_and_the_journal_say(tmp_path: Path, said: _Log) -> None:
    caps = '[[caps]]\nper = "total"\nusd = "1000"\n'
    async with (
        collector() as found,
        running_gateway(tmp_path, agents=FAULTY, policy=FINETUNED + caps, environ=to(found.url)) as gateway,
    ):
        await make_calls(gateway)
        prometheus = samples((await scrape(gateway))[1])
        await exporter(gateway).export()
        export, records = found.latest(), gateway.journal()
        assert found.headers[0]["authorization"] == f"Bearer {SECRET}"
    assert len(records) == 12
    cells = Counter((one.agent, one.model_sent, str(one.variant)) for one in records)
    for (agent, model, variant), count in cells.items():
        cell = {"agent": agent, "model": model, "variant": variant}
        own = [one for one in records if (one.agent, one.model_sent, str(one.variant)) == (agent, model, variant)]
        assert export.total("model.requests", **cell) == export.total("model.latency_ms", **cell) == count
        assert export.total("model.errors", **cell) == sum(bool(one.error) for one in own)
        assert export.total("model.fallbacks", **cell) == sum(one.is_fallback for one in own)
        cost_usd = sum(one.cost_nusd for one in own) / NUSD_PER_USD
        assert export.total("model.cost_usd", **cell) == pytest.approx(cost_usd)
        point = export.points("model.latency_ms")[tuple(sorted(cell.items()))]
        assert point.sum == pytest.approx(sum(one.duration_ms for one in own))
    # And everything else is what a scrape shows, metric by metric and series by series.
    for declared in METRICS:
        if declared.kind is not Kind.HISTOGRAM and declared.name != "gateway_connections":
            series = declared.name + ("_total" if declared.kind is Kind.COUNTER else "")
            shown = {labels: value for (name, labels), value in prometheus.items() if name == series}
            assert export.points(declared.dotted).keys() == shown.keys(), declared.name
            assert export.total(declared.dotted) == pytest.approx(sum(shown.values())), declared.name
        elif declared.kind is Kind.HISTOGRAM:
            for has, point in export.points(declared.dotted).items():
                assert total(prometheus, f"{declared.name}_count", **dict(has)) == point.count
                assert total(prometheus, f"{declared.name}_sum", **dict(has)) == pytest.approx(point.sum)
                running = 0
                for edge, count in zip((*point.explicit_bounds, float("inf")), point.bucket_counts, strict=True):
                    running += count
                    label = "+Inf" if edge == float("inf") else f"{edge:g}"
                    assert total(prometheus, f"{declared.name}_bucket", le=label, **dict(has)) == running
    assert told(said) == []


async def test_the_conventions_of_generative_ai_tell_of_every_attempt_in_the_journal(tmp_path: Path) -> None:
    async with (
        collector() as found,
        running_gateway(tmp_path, agents=FAULTY, policy=FINETUNED, environ=to(found.url)) as gateway,
    ):
        await make_calls(gateway)
        await exporter(gateway).export()
        export, records = found.latest(), gateway.journal()
    attempts = Counter((one.ref, one.fault) for record in records for one in record.attempts)
    assert len({fault for _, fault in attempts}) == 3
    for (ref, fault), count in attempts.items():
        upstream, _, model = ref.partition("/")
        names = {
            "gen_ai.operation.name": "chat",
            # The tests' simulator is configured as a compatible server, whose provider is its own name.
            "gen_ai.provider.name": upstream,
            "gen_ai.request.model": model,
        }
        wanted = {**names, "error.type": str(fault)} if fault else names
        assert export.points("gen_ai.client.operation.duration")[tuple(sorted(wanted.items()))].count == count
    used = [one.usage for one in records if one.usage]
    for kind, sizes in (
        ("input", [one.prompt_tokens for one in used]),
        ("output", [one.completion_tokens for one in used]),
    ):
        points = [
            p for has, p in export.points("gen_ai.client.token.usage").items() if ("gen_ai.token.type", kind) in has
        ]
        assert (sum(p.count for p in points), sum(p.sum for p in points)) == (len(sizes), sum(sizes))
    streams = [one for one in records if one.first_chunk_ms is not None]
    assert export.total("gen_ai.client.operation.time_to_first_chunk") == len(streams) == 1


async def test_the_last_calls_are_told_when_the_gateway_stops(tmp_path: Path) -> None:
    async with collector() as found:
        async with (
            running_gateway(tmp_path, environ=to(found.url)) as gateway,
            connected(gateway.data_url) as connection,
        ):
            assert await call(connection) == 200
            assert found.bodies == []
        assert found.latest().total("model.requests") == 1
        assert found.latest().total("gateway.draining") == 1
        assert senders() == 0


async def test_it_exports_by_itself_as_often_as_it_is_told(tmp_path: Path) -> None:
    async with collector() as found:
        variables = to(found.url, OTEL_METRIC_EXPORT_INTERVAL="100")
        async with running_gateway(tmp_path, environ=variables):
            for _ in range(2):
                found.asked.clear()
                await found.asked.wait()


async def test_without_an_endpoint_there_is_nobody_who_exports(tmp_path: Path) -> None:
    async with running_gateway(tmp_path) as gateway:
        assert gateway.gateway.otlp is None
        assert gateway.runtime.observer._operations is None


async def test_a_wrong_variable_is_told_without_its_value_and_stops_nobody(tmp_path: Path, said: _Log) -> None:
    async with running_gateway(tmp_path, environ=to(f"collector:4317/{SECRET}")) as gateway:
        assert gateway.gateway.otlp is None
    assert "OTEL_EXPORTER_OTLP_ENDPOINT is not an http address" in " ".join(
        record.getMessage() for record in said.records
    )


# --- A collector that is no help -------------------------------------------------------------------------------------


async def test_an_outage_is_told_once_and_so_is_its_end(tmp_path: Path, said: _Log) -> None:
    async with (
        collector() as found,
        running_gateway(tmp_path, environ=to(found.url)) as gateway,
        connected(gateway.data_url) as connection,
    ):
        for status in (500, 500, 404, 503, 401, 200, 200, 500, 200):
            found.status = status
            assert await call(connection) == 200
            await exporter(gateway).export()
        prometheus = samples((await scrape(gateway))[1])
        # Cumulative: what failed to arrive is in what arrives later.
        assert found.latest().total("model.requests") == 9
    assert told(said) == [
        ("WARNING", "metrics are not exported over OTLP: it answered 500; every 60 s it is tried again"),
        ("INFO", "metrics are exported over OTLP again, after 5 that were not"),
        ("WARNING", "metrics are not exported over OTLP: it answered 500; every 60 s it is tried again"),
        ("INFO", "metrics are exported over OTLP again, after 1 that were not"),
    ]
    assert total(prometheus, "gateway_otlp_exports_total", result="failed") == 6
    assert total(prometheus, "gateway_otlp_exports_total", result="ok") == 3


async def test_a_collector_that_is_not_there_is_told_once_and_holds_nothing(tmp_path: Path, said: _Log) -> None:
    url = f"http://user:{SECRET}@127.0.0.1:{unused_port()}/{SECRET}?key={SECRET}"
    async with running_gateway(tmp_path, environ=to(url)) as gateway, connected(gateway.data_url) as connection:
        for _ in range(20):
            assert await call(connection) == 200
            await exporter(gateway).export()
        gc.collect()
        assert sum(type(one) is MetricsData for one in gc.get_objects()) <= 1
        assert senders() == 0
    ((level, text),) = told(said)
    assert level == "WARNING"
    assert text.startswith("metrics are not exported over OTLP: ")


async def test_why_is_told_by_its_kind_and_not_in_words_that_may_quote_the_address(tmp_path: Path, said: _Log) -> None:
    async with running_gateway(tmp_path, environ=to(f"http://.no-name/{SECRET}")) as gateway:
        await exporter(gateway).export()
    assert told(said) == [
        ("WARNING", "metrics are not exported over OTLP: InvalidURL; every 60 s it is tried again"),
    ]


async def _hangs(tmp_path: Path, found: Collector, said: _Log) -> None:
    variables = to(found.url, OTEL_METRIC_EXPORT_INTERVAL="100")
    async with running_gateway(tmp_path, environ=variables) as gateway:
        await found.asked.wait()
        async with connected(gateway.data_url) as connection:
            for _ in range(20):
                assert await call(connection) == 200
        texts = [text for _, text in await asyncio.gather(*(scrape(gateway) for _ in range(10)))]
        assert all(total(samples(text), "model_requests_total") == 20 for text in texts)
        # However many intervals go by, there is one that waits.
        assert senders() == 1
    # The gateway is down, and the one that waits has held up nobody.
    assert not found.answering.is_set()
    assert senders() == 1
    (warning,) = told(said)
    assert warning[0] == "WARNING"


async def test_a_collector_that_hangs_holds_up_neither_calls_nor_scrapes_nor_the_end(
    tmp_path: Path, said: _Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "CLOSING_S", 0.05)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "30")
    async with collector() as found:
        found.answering.clear()
        await _hangs(tmp_path, found, said)
    for thread in threading.enumerate():
        if thread.name == "otlp":
            await asyncio.to_thread(thread.join)


async def test_headers_that_cannot_be_read_are_not_quoted(
    tmp_path: Path, said: _Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", f"no equals sign {SECRET},a=b")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", f"nonsense {SECRET}")
    async with collector() as found, running_gateway(tmp_path, environ=to(found.url)) as gateway:
        await exporter(gateway).export()
        assert found.headers[0]["a"] == "b"
    # Once each, however often the SDK looks.
    assert [level for level, _ in told(said)] == ["WARNING", "WARNING"]
    assert all(text.startswith("one of OpenTelemetry's variables is not in order: ") for _, text in told(said))


async def test_a_bug_in_the_export_is_told_and_ends_only_the_export(
    tmp_path: Path, said: _Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> MetricsData:
        raise ZeroDivisionError

    async with collector() as found:
        variables = to(found.url, OTEL_METRIC_EXPORT_INTERVAL="100")
        async with running_gateway(tmp_path, environ=variables) as gateway, connected(gateway.data_url) as connection:
            monkeypatch.setattr(room, "metrics_data", broken)
            task = exporter(gateway)._task
            assert task is not None
            await asyncio.wait({task})
            assert await call(connection) == 200
    assert told(said) == [("ERROR", "bug in the export over OTLP, which has ended: ZeroDivisionError")]
