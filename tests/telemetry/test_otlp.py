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
from gateway.domain.trace import TracedCall
from gateway.telemetry import otlp as room
from gateway.telemetry.metrics import METRICS, Kind
from gateway.telemetry.otlp import OtlpExport
from tests.collector import CLIENT, SERVER, Collector, Span, collector, spans_in
from tests.journey import PATIENCE_S
from tests.process import Files, process
from tests.raw_http import connected
from tests.running import RunningGateway, running_gateway
from tests.scripted import DONE, delta, finish, refuses, says, scripted, streams
from tests.telemetry.test_observe import (
    BREAKING,
    CUT_AGENTS,
    CUT_ROUTING,
    FAULTY,
    FINETUNED,
    call,
    make_calls,
    samples,
    scrape,
    total,
)

SECRET = "hush-hush-4711"
# What changes by itself, between a scrape and an export.
CHANGING = ("gateway_connections", "gateway_journal_behind_bytes")
# No time for second tries; and time enough for whoever wants to see a collector hang.
HURRIED = {"OTEL_EXPORTER_OTLP_TIMEOUT": "500"}
PATIENT = {"OTEL_EXPORTER_OTLP_TIMEOUT": "30000"}


@pytest.fixture(autouse=True)
def _with_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """The exporter's own variable: a key in the headers."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", f"authorization=Bearer%20{SECRET}")


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
    """Metrics only; what is said of traces is in test_otlp_traces.py."""
    return {"OTEL_EXPORTER_OTLP_ENDPOINT": url, "OTEL_TRACES_EXPORTER": "none", **HURRIED, **variables}


def exporter(gateway: RunningGateway) -> OtlpExport:
    assert gateway.gateway.otlp is not None
    return gateway.gateway.otlp


def senders() -> int:
    return sum(thread.name.startswith("otlp") for thread in threading.enumerate())


def have_senders_ended() -> bool:
    """A thread says how its export went, and ends a moment later."""
    for thread in threading.enumerate():
        if thread.name.startswith("otlp"):
            thread.join(PATIENCE_S)
    return not senders()


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
        if declared.kind is not Kind.HISTOGRAM and declared.name not in CHANGING:
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
        # The simulator says that it answered with the model that it was asked for.
        wanted = {**names, "error.type": str(fault)} if fault else {**names, "gen_ai.response.model": model}
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
    (stream,) = [one for one in records if one.first_chunk_ms is not None]
    assert export.total("gen_ai.client.operation.time_to_first_chunk") == 1
    # The simulator sends a token at a time, after a first chunk that tells the role.
    assert stream.usage is not None
    assert export.total("gen_ai.client.operation.time_per_output_chunk") == stream.usage.completion_tokens


async def test_chunks_of_a_joined_stream_are_told_of_the_model_that_each_came_from(tmp_path: Path) -> None:
    begun = [delta("The "), delta("capital ")]
    async with (
        collector() as found,
        scripted(streams(*begun)) as first,
        scripted(streams(*begun, delta("is "), delta("Paris."), finish(), DONE)) as second,
        running_gateway(
            tmp_path,
            agents=CUT_AGENTS,
            routing=CUT_ROUTING,
            policy=BREAKING,
            upstreams={"first": first.base_url, "second": second.base_url},
            environ=to(found.url),
        ) as gateway,
        connected(gateway.data_url) as connection,
    ):
        assert await call(connection, stream=True) == 200
        await exporter(gateway).export()
        points = found.latest().points("gen_ai.client.operation.time_per_output_chunk")
    # Two chunks are one step, four are three; none is from one model's last to the other's first.
    counts = {dict(has)["gen_ai.provider.name"]: point.count for has, point in points.items()}
    assert counts == {"first": 1, "second": 3}


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
        assert have_senders_ended()


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
        assert gateway.runtime.observer.operations is None


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
        assert have_senders_ended()
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
    variables = to(found.url, OTEL_METRIC_EXPORT_INTERVAL="100", **PATIENT)
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
    async with collector() as found:
        found.answering.clear()
        await _hangs(tmp_path, found, said)
    for thread in threading.enumerate():
        if thread.name.startswith("otlp"):
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
            (task,) = exporter(gateway)._running
            await asyncio.wait({task})
            assert await call(connection) == 200
    assert told(said) == [("ERROR", "bug in the export over OTLP, which has ended: ZeroDivisionError")]


# --- Traces ----------------------------------------------------------------------------------------------------------


def traces_to(url: str, **variables: str) -> dict[str, str]:
    """Traces only, and never before somebody asks, unless there are many."""
    return {
        "OTEL_EXPORTER_OTLP_ENDPOINT": url,
        "OTEL_METRICS_EXPORTER": "none",
        "OTEL_TRACES_SAMPLER": "parentbased_always_on",
        "OTEL_BSP_SCHEDULE_DELAY": "86400000",
        **HURRIED,
        **variables,
    }


JOINED = """
[agents.joined_agent]
finetuned = "first/ft:a"
baseline  = "first/a"
fallbacks = ["second/b"]
"""


async def test_spans_add_up_to_what_journal_and_ledger_say(tmp_path: Path, said: _Log) -> None:
    begun = [delta("The "), delta("capital ")]
    async with (
        collector() as found,
        scripted(streams(*begun)) as first,
        scripted(streams(*begun, delta("is Paris."), finish(), DONE)) as second,
    ):
        async with running_gateway(
            tmp_path,
            agents=FAULTY + JOINED,
            policy=FINETUNED,
            upstreams={"first": first.base_url, "second": second.base_url},
            environ=traces_to(found.url, OTEL_BSP_MAX_EXPORT_BATCH_SIZE="7"),
        ) as gateway:
            await make_calls(gateway)
            async with connected(gateway.data_url) as connection:
                assert await call(connection, model="joined_agent", stream=True) == 200
            await exporter(gateway).export_spans()
            records, prometheus = gateway.journal(), samples((await scrape(gateway))[1])
        rows = gateway.ledger()
        servers, clients = found.spans(SERVER), found.spans(CLIENT)
        sizes = [len(spans_in(body)) for body in found.trace_bodies]
    assert [size for size in sizes if size > 7] == []
    assert len(sizes) > 4
    by_call = {span.attributes["gateway.call.id"]: span for span in servers}
    # Three requests were refused before any model was asked: they have spans, and no records.
    assert len(servers) == len(by_call) == len(records) + 3 == 16
    attempts = [one for record in records for one in record.attempts]
    assert {one.span_id for one in attempts} == {span.id for span in clients}
    assert len(clients) == len(attempts) == len(rows)
    for record in records:
        span = by_call[record.id]
        assert (span.trace_id, span.id) == (record.trace_id, record.span_id)
        assert [one.id for one in clients if one.parent_id == span.id] == [one.span_id for one in record.attempts]
        assert all(span.start_ns <= one.start_ns <= one.end_ns for one in clients if one.parent_id == span.id)
        assert span.attributes["gateway.fallback"] == record.is_fallback
        assert span.is_error == (record.status >= 500)
    assert sum(one.is_fallback for one in records) == 4
    assert sum(span.is_error for span in clients) == sum(one.fault is not None for one in attempts) == 10

    def spent(spans: list[Span]) -> float:
        return sum(span.attributes["gateway.cost_usd"] for span in spans)

    assert spent(clients) == pytest.approx(sum(row.amounts.nusd for row in rows) / NUSD_PER_USD)
    assert spent(servers) == pytest.approx(sum(one.cost_nusd for one in records) / NUSD_PER_USD)
    # Of the joined answer there is no usage, so that its tokens are the ledger's estimate, and nobody else's.
    exact = [row for row in rows if row.basis == "exact"]
    for name, tokens in (
        ("gen_ai.usage.input_tokens", sum(row.prompt_tokens for row in exact)),
        ("gen_ai.usage.output_tokens", sum(row.completion_tokens for row in exact)),
    ):
        assert sum(span.attributes.get(name, 0) for span in clients) == tokens > 0
    assert sum(len(span.events) for span in clients) == sum(one.first_chunk_ms is not None for one in records) == 2
    assert {span.resource["service.name"] for span in servers + clients} == {"genesis-gateway"}
    assert total(prometheus, "gateway_otlp_exports_total", signal="traces", result="ok") == len(sizes)
    assert total(prometheus, "gateway_spans_dropped_total") == 0
    assert told(said) == []


async def test_the_last_spans_are_told_when_the_gateway_stops(tmp_path: Path) -> None:
    async with collector() as found:
        async with (
            running_gateway(tmp_path, environ=traces_to(found.url)) as gateway,
            connected(gateway.data_url) as connection,
        ):
            assert await call(connection) == 200
            assert found.trace_bodies == []
        assert len(found.spans(SERVER)) == len(found.spans(CLIENT)) == 1
        assert have_senders_ended()


async def test_a_process_that_is_told_to_stop_tells_first_what_its_journal_and_ledger_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with collector() as found, scripted(refuses(500), says("Paris.")) as provider:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", found.url)
        monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_always_on")
        files = Files(tmp_path, provider)
        async with process(files) as running:
            ids = {(await running.ask())[1] for _ in range(5)}
            running.child.terminate()
            assert await running.ended() == 0
        records, rows = files.records(), files.ledger()
        servers, clients = found.spans(SERVER), found.spans(CLIENT)
        export = found.latest()
    assert {span.attributes["gateway.call.id"] for span in servers} == {record.id for record in records} == ids
    # The first was tried twice.
    assert len(clients) == sum(len(record.attempts) for record in records) == len(rows) == 6
    assert export.total("model.requests") == 5
    spent = sum(row.amounts.nusd for row in rows) / NUSD_PER_USD
    assert export.total("model.cost_usd") == pytest.approx(spent)
    assert sum(span.attributes["gateway.cost_usd"] for span in clients) == pytest.approx(spent)


async def test_a_queue_that_is_half_full_is_emptied_before_its_time(tmp_path: Path) -> None:
    async with (
        collector() as found,
        running_gateway(tmp_path, environ=traces_to(found.url, OTEL_BSP_MAX_QUEUE_SIZE="64")) as gateway,
        connected(gateway.data_url) as connection,
    ):
        for _ in range(16):
            assert await call(connection) == 200
        await found.asked_for_traces.wait()


async def test_calls_that_are_not_sampled_have_no_spans(tmp_path: Path) -> None:
    variables = {"OTEL_TRACES_SAMPLER": "parentbased_always_off"}
    trace_id = "4bf92f3577b34da6a3ce929d0e0e4736"
    sampled = f"traceparent: 00-{trace_id}-00f067aa0ba902b7-01\r\n".encode()
    async with collector() as found:
        async with (
            running_gateway(tmp_path, environ=traces_to(found.url, **variables)) as gateway,
            connected(gateway.data_url) as connection,
        ):
            for _ in range(3):
                assert await call(connection) == 200
            assert await call(connection, headers=sampled) == 200
        (server,) = found.spans(SERVER)
    assert (server.trace_id, server.parent_id) == (trace_id, "00f067aa0ba902b7")


async def test_without_traces_nothing_is_sampled(tmp_path: Path) -> None:
    async with (
        collector() as found,
        running_gateway(tmp_path, environ=to(found.url)) as gateway,
        connected(gateway.data_url) as connection,
    ):
        assert await call(connection) == 200
        assert gateway.runtime.tracing.take is None
        assert not exporter(gateway).has_traces


async def test_spans_that_nobody_takes_are_counted_and_an_outage_is_told_once(tmp_path: Path, said: _Log) -> None:
    async with (
        collector() as found,
        running_gateway(tmp_path, environ=traces_to(found.url)) as gateway,
        connected(gateway.data_url) as connection,
    ):
        for status in (400, 403, 400, 200, 404, 200):
            found.status = status
            assert await call(connection) == 200
            await exporter(gateway).export_spans()
        prometheus = samples((await scrape(gateway))[1])
        # Gone is gone: a span is not kept for later.
        assert len(found.spans(SERVER)) == 2
    assert told(said) == [
        ("WARNING", "traces are not exported over OTLP: it answered 400; every 86400 s it is tried again"),
        ("INFO", "traces are exported over OTLP again, after 3 that were not"),
        ("WARNING", "traces are not exported over OTLP: it answered 404; every 86400 s it is tried again"),
        ("INFO", "traces are exported over OTLP again, after 1 that were not"),
    ]
    assert total(prometheus, "gateway_spans_dropped_total", reason="not_taken") == 2 * 4
    assert total(prometheus, "gateway_otlp_exports_total", signal="traces", result="failed") == 4


async def _hangs_on_traces(tmp_path: Path, found: Collector) -> None:
    variables = traces_to(found.url, OTEL_BSP_MAX_QUEUE_SIZE="64", OTEL_BSP_MAX_EXPORT_BATCH_SIZE="32", **PATIENT)
    async with running_gateway(tmp_path, environ=variables) as gateway:
        async with connected(gateway.data_url) as connection:
            for _ in range(16):
                assert await call(connection) == 200
            await found.asked_for_traces.wait()
            for _ in range(100):
                assert await call(connection) == 200
        gc.collect()
        waiting = sum(type(one) is TracedCall for one in gc.get_objects())
        prometheus = samples((await scrape(gateway))[1])
        assert senders() == 1
    # Of 116 calls with two spans each, a batch is under way and the queue is full.
    assert waiting == 16 + 32
    assert total(prometheus, "gateway_spans_dropped_total", reason="queue_full") == 2 * (116 - 48)
    assert total(prometheus, "model_requests_total") == 116
    assert not found.answering.is_set()


async def test_a_collector_that_hangs_on_traces_holds_up_nobody_and_no_more_than_the_queue(
    tmp_path: Path, said: _Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "CLOSING_S", 0.05)
    async with collector() as found:
        found.answering.clear()
        await _hangs_on_traces(tmp_path, found)
    assert told(said) == [("WARNING", "the last traces were not exported over OTLP: no answer within 0.05 s")]
    for thread in threading.enumerate():
        if thread.name.startswith("otlp"):
            await asyncio.to_thread(thread.join)


async def test_one_signal_that_fails_does_not_hold_up_the_other(tmp_path: Path, said: _Log) -> None:
    variables = {
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"http://127.0.0.1:{unused_port()}/{SECRET}",
        "OTEL_BSP_SCHEDULE_DELAY": "100",
        "OTEL_TRACES_SAMPLER": "parentbased_always_on",
        **HURRIED,
    }
    async with collector() as found:
        variables["OTEL_EXPORTER_OTLP_METRICS_ENDPOINT"] = f"{found.url}/v1/metrics"
        async with running_gateway(tmp_path, environ=variables) as gateway, connected(gateway.data_url) as connection:
            for _ in range(3):
                assert await call(connection) == 200
                await exporter(gateway).export()
        assert found.latest().total("model.requests") == 3
        assert found.latest().total("gateway.otlp_exports", signal="metrics", result="failed") == 0
        assert found.trace_bodies == []
    ((level, text),) = told(said)
    assert level == "WARNING"
    assert text.startswith("traces are not exported over OTLP: ")


# --- Exemplars -------------------------------------------------------------------------------------------------------


async def test_latencies_lead_to_the_traces_of_calls_that_had_them(tmp_path: Path) -> None:
    async with collector() as found:
        variables = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": found.url,
            "OTEL_METRIC_EXPORT_INTERVAL": "86400000",
            "OTEL_TRACES_SAMPLER": "parentbased_always_on",
        }
        async with running_gateway(tmp_path, environ=variables) as gateway:
            async with connected(gateway.data_url) as connection:
                for stream in (False, True):
                    assert await call(connection, stream=stream) == 200
            records = gateway.journal()
            await exporter(gateway).export()
        export = found.latest()
    ids = {(record.trace_id, record.span_id) for record in records}
    for name in ("model.latency_ms", "model.first_chunk_ms"):
        (point,) = export.points(name).values()
        assert point.exemplars
        for left in point.exemplars:
            assert (left.trace_id.hex(), left.span_id.hex()) in ids
            (record,) = [one for one in records if one.span_id == left.span_id.hex()]
            value = record.duration_ms if name == "model.latency_ms" else record.first_chunk_ms
            assert left.as_double == value
            assert left.time_unix_nano == pytest.approx((record.at_ms + (value or 0)) * 1e6)
    (point,) = export.points("gen_ai.client.operation.duration").values()
    assert {left.span_id.hex() for left in point.exemplars} <= {record.attempts[0].span_id for record in records}
