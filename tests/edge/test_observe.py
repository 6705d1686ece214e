"""The metrics, read back by Prometheus' own parsers and held against the calls that were made."""

from collections import Counter
from pathlib import Path

import pytest
from prometheus_client import parser as classic_parser
from prometheus_client.openmetrics import parser as openmetrics_parser

from gateway.domain.money import NUSD_PER_USD
from gateway.edge.observe import METRICS, Distribution, Kind
from tests.raw_http import CANARY, RawConnection, connected, ordinary, request
from tests.running import RunningGateway, running_gateway

OPENMETRICS = b"Accept: application/openmetrics-text; version=1.0.0\r\n"
CALL_LABELS = ("agent", "model", "variant")
FAULTY = """
[agents.qa_agent]
finetuned = "sim/ft:qa"
baseline  = "sim/simulator-small"
defaults  = { max_tokens = 64 }

[agents.support_agent]
finetuned = "sim/ft:fault:503"
baseline  = "sim/simulator-small"
fallbacks = ["sim/simulator-large"]

[agents.broken_agent]
finetuned = "sim/ft:fault:400-filter"
baseline  = "sim/simulator-small"
"""
FINETUNED = "[models]\nuse_finetuned = true\n[overrides]\nvariant = true\n"

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


async def scrape(gateway: RunningGateway, headers: bytes = b"") -> tuple[str, str]:
    """The content type and the text of `/metrics`."""
    async with connected(gateway.admin_url) as connection:
        connection.send(request("GET", "/metrics", headers=headers))
        reply = await connection.reply()
        assert reply.status == 200
        return reply.headers["content-type"], reply.body.decode()


def samples(text: str) -> Samples:
    parse = (
        openmetrics_parser.text_string_to_metric_families
        if text.endswith("# EOF\n")
        else classic_parser.text_string_to_metric_families
    )
    found: Samples = {}
    for family in parse(text):
        for sample in family.samples:
            key = (sample.name, tuple(sorted(sample.labels.items())))
            assert key not in found, f"{key} comes twice"
            found[key] = sample.value
    return found


def total(found: Samples, name: str, **labels: str) -> float:
    """The sum over every series of that name with these labels."""
    wanted = set(labels.items())
    return sum(value for (series, has), value in found.items() if series == name and wanted <= set(has))


async def call(connection: RawConnection, headers: bytes = b"", **fields: object) -> int:
    connection.send(request(headers=headers, body=ordinary(**fields)))
    return (await connection.reply()).status


async def make_calls(gateway: RunningGateway) -> None:
    """Some of each: whole, streamed, fallen back, failed, refused."""
    async with connected(gateway.data_url) as connection:
        for user in range(5):
            assert await call(connection, user=f"u{user}") == 200
        assert await call(connection, stream=True) == 200
        assert await call(connection, headers=b"x-gateway-variant: baseline\r\n") == 200
        for _ in range(3):
            assert await call(connection, model="support_agent") == 200
        for _ in range(2):
            assert await call(connection, model="broken_agent") == 400
        assert await call(connection, model="nobody") == 404
        assert await call(connection, messages=[]) == 400
        assert await call(connection, headers=b"x-gateway-user: a b\r\n") == 400


@pytest.mark.parametrize("accept", [b"", OPENMETRICS, b"Accept: text/plain\r\n", b"Accept: \xff\r\n"])
async def test_the_metrics_are_what_the_journal_says(tmp_path: Path, accept: bytes) -> None:
    async with running_gateway(tmp_path, agents=FAULTY, policy=FINETUNED) as gateway:
        await make_calls(gateway)
        content_type, text = await scrape(gateway, accept)
        is_open = accept == OPENMETRICS
        assert content_type.startswith("application/openmetrics-text" if is_open else "text/plain")
        found = samples(text)
        records = gateway.journal()
        assert len(records) == 12
        by_label = Counter((one.agent, one.model_sent, str(one.variant)) for one in records)
        for values, count in by_label.items():
            labels = dict(zip(CALL_LABELS, values, strict=True))
            own = [one for one in records if (one.agent, one.model_sent, str(one.variant)) == values]
            assert total(found, "model_requests_total", **labels) == count
            assert total(found, "model_latency_ms_count", **labels) == count
            assert total(found, "model_fallbacks_total", **labels) == sum(one.is_fallback for one in own)
            assert total(found, "model_errors_total", **labels) == sum(bool(one.error) for one in own)
            cost = sum(one.cost_nusd for one in own) / NUSD_PER_USD
            assert total(found, "model_cost_usd_total", **labels) == pytest.approx(cost)
            streams = sum(one.first_chunk_ms is not None for one in own)
            assert total(found, "model_first_chunk_ms_count", **labels) == streams
            output = sum(one.usage.completion_tokens for one in own if one.usage)
            assert total(found, "model_tokens_total", direction="output", **labels) == output
            assert total(found, "model_latency_ms_sum", **labels) == pytest.approx(sum(one.duration_ms for one in own))
        assert total(found, "model_requests_total") == len(records)
        assert total(found, "gateway_overhead_ms_count") == len(records)
        assert total(found, "model_fallbacks_total") == 3
        assert total(found, "gateway_upstream_faults_total", upstream="sim", kind="server") == 3
        assert total(found, "gateway_upstream_faults_total", upstream="sim", kind="rejected") == 2
        for code, count in (("model_not_found", 1), ("invalid_value", 1), ("invalid_header", 1)):
            assert total(found, "gateway_refusals_total", code=code) == count
        assert total(found, "gateway_calls_in_flight") == 0
        assert total(found, "gateway_rollout_share", agent="qa_agent") == 1


async def test_both_formats_say_the_same(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, agents=FAULTY, policy=FINETUNED) as gateway:
        await make_calls(gateway)
        classic, opened = samples((await scrape(gateway))[1]), samples((await scrape(gateway, OPENMETRICS))[1])
        assert classic == opened


async def test_every_declared_metric_is_shown_with_its_help_and_no_other(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, agents=FAULTY, policy=FINETUNED) as gateway:
        await make_calls(gateway)
        _, text = await scrape(gateway)
        families = {family.name: family for family in classic_parser.text_string_to_metric_families(text)}
        assert set(families) == {declared.name for declared in METRICS}
        for declared in METRICS:
            family = families[declared.name]
            assert (family.documentation, family.type) == (declared.help, declared.kind)
            assert family.samples, declared.name
            for sample in family.samples:
                assert set(sample.labels) - {"le"} == set(declared.labels)


async def test_strangers_cannot_grow_the_number_of_series(tmp_path: Path) -> None:
    policy = '[models]\nallow_raw_models = true\nunknown_agent = "baseline"\n'
    async with running_gateway(tmp_path, policy=policy) as gateway, connected(gateway.data_url) as connection:

        async def flood(start: int) -> None:
            for number in range(start, start + 60):
                word = f"{CANARY.decode()}-{number}"
                odd = f"x-gateway-operation: {word}\r\nx-gateway-user: {word}\r\n".encode()
                await call(connection, headers=odd, model=word)
                await call(connection, headers=odd, model=f"sim/{word}")
                await call(connection, headers=f"x-gateway-agent: {word}\r\n".encode(), user=word)
                await call(connection, model="sim/fault:400-filter" + word)
                await call(connection, headers=f"x-gateway-variant: {word}\r\n".encode())
                connection.send(request("GET", f"/{word}"))
                await connection.reply()

        await flood(0)
        before = samples((await scrape(gateway))[1])
        cells = len(gateway.runtime.observer._cells)
        await flood(1_000)
        text = (await scrape(gateway))[1]
        assert samples(text).keys() == before.keys()
        # Not in memory either, where no scrape would show it.
        assert len(gateway.runtime.observer._cells) == cells
        assert CANARY.decode() not in text
        assert total(samples(text), "model_requests_total", model="other") > 0


async def test_a_providers_own_error_codes_are_one_label(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, agents=FAULTY, policy=FINETUNED) as gateway:
        async with connected(gateway.data_url) as connection:
            assert await call(connection, model="broken_agent") == 400
        (record,) = gateway.journal()
        assert record.error == "content_filter"
        found = samples((await scrape(gateway))[1])
        assert total(found, "model_errors_total", code="upstream_error") == 1


async def test_counters_never_go_back_over_a_reload(tmp_path: Path) -> None:
    async with running_gateway(tmp_path) as gateway:
        await_before = await _count_one(gateway)
        await gateway.reload(policy="[models]\nuse_finetuned = true\n")
        after = samples((await scrape(gateway))[1])
        for (name, labels), value in await_before.items():
            if name.endswith(("_total", "_count", "_bucket")):
                assert after[name, labels] >= value


async def _count_one(gateway: RunningGateway) -> Samples:
    async with connected(gateway.data_url) as connection:
        assert await call(connection) == 200
    return samples((await scrape(gateway))[1])


def test_an_edge_belongs_to_its_own_bucket() -> None:
    seen = Distribution((1, 10, 100))
    for value in (0, 1, 1.0001, 10, 99.9, 100, 100.1, 5_000):
        seen.add(value)
    assert seen.buckets() == [("1", 2.0), ("10", 4.0), ("100", 6.0), ("+Inf", 8.0)]


def test_names_and_labels_follow_prometheus_conventions() -> None:
    assert len({declared.name for declared in METRICS}) == len(METRICS)
    for declared in METRICS:
        assert declared.name.startswith(("model_", "gateway_"))
        assert not declared.name.endswith("_total")
        assert declared.help.endswith(".")
        assert declared.kind in Kind
