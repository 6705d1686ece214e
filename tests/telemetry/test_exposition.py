"""The text of a scrape: valid in both formats, exemplars in one, shared by those who ask at once, older than nobody."""

import asyncio
import gc
import shutil
from asyncio.subprocess import PIPE
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.openmetrics import parser as openmetrics_parser
from prometheus_client.parser import text_string_to_metric_families

from gateway.telemetry.distribution import Distribution, Exemplar, Figures
from gateway.telemetry.exposition import OPENMETRICS, Exposition, Snapshot
from gateway.telemetry.metrics import METRICS, Declared, Kind
from tests.raw_http import connected, request
from tests.running import RunningGateway, running_gateway
from tests.telemetry.test_observe import FAULTY, FINETUNED, call, make_calls, samples, scrape, total

COUNTED = Declared("gateway_things", Kind.COUNTER, "Things.", ("kind",), "{thing}")
TIMED = Declared("model_wait_ms", Kind.HISTOGRAM, "A wait.", (), "ms")
ACCEPT = "application/openmetrics-text; version=1.0.0"
OPEN = f"Accept: {ACCEPT}\r\n".encode()
OTLP = {
    "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_BSP_SCHEDULE_DELAY": "86400000",
    "OTEL_TRACES_SAMPLER": "parentbased_always_on",
}  # fmt: skip


class _Figures:
    """Figures of which each reading is one more than the last."""

    def __init__(self) -> None:
        self.readings = 0
        self.read = asyncio.Event()

    def __call__(self) -> Iterator[Figures]:
        self.readings += 1
        self.read.set()
        yield COUNTED, [(("a",), self.readings)]


def test_a_snapshot_stays_as_it_was_when_more_is_counted() -> None:
    waits = Distribution((1, 10))
    waits.add(5)
    waits.exemplify(Exemplar("a" * 32, "b" * 16, 5, 1_000))
    snapshot = Snapshot([(TIMED, [((), waits)])])
    waits.add(5)
    waits.exemplify(Exemplar("c" * 32, "d" * 16, 6, 2_000))
    (family,) = snapshot.collect()
    found = {sample.labels.get("le", sample.name): sample for sample in family.samples}
    assert (found["10"].value, found["model_wait_ms_sum"].value) == (1, 5)
    assert found["10"].exemplar is not None
    assert found["10"].exemplar.labels == {"trace_id": "a" * 32, "span_id": "b" * 16}


async def test_scrapers_that_come_at_once_share_a_rendering_and_none_is_older_than_its_request() -> None:
    figures = _Figures()
    exposition = Exposition(figures)
    texts = await asyncio.gather(*(exposition.text("") for _ in range(10)))
    assert figures.readings == 1
    assert len({text for text, _ in texts}) == 1
    figures.read.clear()
    first = asyncio.create_task(exposition.text(""))
    await figures.read.wait()
    # It has begun: who comes now gets the next one.
    later = await asyncio.gather(*(exposition.text("") for _ in range(10)))
    assert b"2.0" in (await first)[0]
    assert figures.readings == 3
    assert all(b'gateway_things_total{kind="a"} 3.0' in text for text, _ in later)


async def test_a_scraper_that_leaves_takes_nothing_from_the_others() -> None:
    exposition = Exposition(_Figures())
    one, other = (asyncio.create_task(exposition.text("")) for _ in range(2))
    await asyncio.sleep(0)
    one.cancel()
    assert b"gateway_things_total" in (await other)[0]
    assert exposition._next == {}


async def test_each_format_is_rendered_for_those_who_want_it() -> None:
    exposition = Exposition(_Figures())
    (classic, plain), (opened, content_type) = await asyncio.gather(exposition.text(""), exposition.text(ACCEPT))
    assert plain.startswith("text/plain")
    assert content_type.startswith("application/openmetrics-text")
    assert opened.endswith(b"# EOF\n")
    assert not classic.endswith(b"# EOF\n")


@pytest.mark.parametrize(
    "accept",
    [
        'application/openmetrics-text; version="1.0.0"', "application/openmetrics-text; version=abc",
        "application/openmetrics-text;version=1.x,text/plain;q=0.1", "text/plain; version=abc",
        "application/openmetrics-text; version=0.0.1", "text/plain; version=1.0.0; escaping=allow-utf-8", "nonsense;;=",
    ],
)  # fmt: skip
async def test_a_version_that_nobody_knows_gets_the_classic_text(accept: str) -> None:
    exposition = Exposition(_Figures())
    assert await exposition.text(accept) == (
        (await Exposition(_Figures()).text(""))[0],
        "text/plain; version=0.0.4; charset=utf-8",
    )


async def test_nothing_of_what_is_asked_for_comes_back_and_no_spelling_of_it_is_rendered_anew() -> None:
    figures = _Figures()
    exposition = Exposition(figures)
    asked = [f"{OPENMETRICS}; version=1.0.{number}.\udcff; escaping=dots" for number in range(9)]
    found = await asyncio.gather(*map(exposition.text, [ACCEPT, OPENMETRICS, *asked]))
    assert figures.readings == 1
    assert {content_type for _, content_type in found} == {f"{ACCEPT}; charset=utf-8"}


# --- Of a whole gateway ----------------------------------------------------------------------------------------------


async def _scraped(gateway: RunningGateway) -> tuple[str, str]:
    await make_calls(gateway)
    (_, classic), (_, opened) = await scrape(gateway), await scrape(gateway, OPEN)
    return classic, opened


async def test_exemplars_are_in_openmetrics_and_name_traces_of_the_journal(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, agents=FAULTY, policy=FINETUNED, environ=OTLP) as gateway:
        classic, opened = await _scraped(gateway)
        records = {record.span_id: record for record in gateway.journal()}
    found = [
        (sample.name, sample.exemplar, sample.labels["le"])
        for family in openmetrics_parser.text_string_to_metric_families(opened)
        for sample in family.samples
        if sample.exemplar is not None
    ]
    assert {name for name, _, _ in found} == {"model_latency_ms_bucket", "model_first_chunk_ms_bucket"}
    for name, exemplar, le in found:
        record = records[exemplar.labels["span_id"]]
        assert exemplar.labels["trace_id"] == record.trace_id
        value = record.first_chunk_ms if "first" in name else record.duration_ms
        assert exemplar.value == value <= float(le)
    # The classic format has no place for them.
    assert "trace_id" not in classic
    assert samples(classic).keys() == samples(opened).keys()
    assert list(text_string_to_metric_families(classic))


async def test_calls_that_are_not_sampled_leave_no_exemplar(tmp_path: Path) -> None:
    async with running_gateway(tmp_path) as gateway, connected(gateway.data_url) as connection:
        assert await call(connection, stream=True) == 200
        _, opened = await scrape(gateway, OPEN)
    assert " # {" not in opened


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not on PATH")
async def test_promtool_finds_nothing_wrong(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, agents=FAULTY, policy=FINETUNED, environ=OTLP) as gateway:
        classic, _ = await _scraped(gateway)
    process = await asyncio.create_subprocess_exec("promtool", "check", "metrics", stdin=PIPE, stdout=PIPE, stderr=PIPE)
    said = b"".join(await process.communicate(classic.encode())).decode()
    # It would have seconds, spelt out; milliseconds are what these are asked for in.
    in_ms = {declared.name for declared in METRICS if declared.unit == "ms"}
    assert set(filter(None, said.splitlines())) == {
        f"{name} metric names should not contain abbreviated units" for name in in_ms
    }


async def test_ten_scrapes_and_a_slow_one_hold_up_no_call_and_no_more_than_their_text(tmp_path: Path) -> None:
    async with (
        running_gateway(tmp_path, agents=FAULTY, policy=FINETUNED) as gateway,
        connected(gateway.data_url) as connection,
        connected(gateway.admin_url) as slow,
    ):
        await make_calls(gateway)
        slow.send(request("GET", "/metrics"))
        # One byte at a time, and never to the end.
        for _ in range(40):
            assert len(await slow._reader.readexactly(1)) == 1
        for number in range(3):
            scrapes = [asyncio.create_task(scrape(gateway)) for _ in range(10)]
            for _ in range(5):
                assert await call(connection) == 200
            for text in await asyncio.gather(*scrapes):
                assert total(samples(text[1]), "model_requests_total") >= 12 + 5 * number
        # Nothing that was copied for them is kept.
        gc.collect()
        assert not [one for one in gc.get_objects() if type(one) is Snapshot]
        assert total(samples((await scrape(gateway))[1]), "model_requests_total") == 12 + 15
        assert len(gateway.journal()) == 12 + 15
