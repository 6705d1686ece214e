"""The metrics, read back by Prometheus' own parsers and held against the calls that were made."""

import re
import time
from collections import Counter
from pathlib import Path

import pytest
from prometheus_client import parser as classic_parser
from prometheus_client.openmetrics import parser as openmetrics_parser

from gateway.decide.breaker import Admission
from gateway.decide.standing import Standing
from gateway.domain.errors import FaultKind
from gateway.domain.money import NUSD_PER_USD
from gateway.domain.policy import Breakers, Retries
from gateway.telemetry.metrics import BREAKER, CROSSED, ERRORS, FAULTS, METRICS, REFUSALS, REQUESTS, Declared
from gateway.telemetry.observe import COUNTED_REFUSALS, PROVIDER_ERRORS, Observer
from tests.planning import plan_of
from tests.raw_http import CANARY, RawConnection, connected, ordinary, request
from tests.running import RunningGateway, running_gateway
from tests.scripted import DONE, delta, finish, refuses, says, scripted, streams

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
# No breaker opens here, so that how often a model is tried is what the table of faults says.
EXPERIMENT = "[ab_testing]\nenabled = true\nrollout_percentage = 100\n"
FINETUNED = """
[models]
use_finetuned = true
[overrides]
variant = true
[retries]
base_s = 0.001
[breakers]
consecutive = 100
"""

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
        # Each of the three calls tried the failing model twice.
        assert total(found, "gateway_upstream_faults_total", upstream="sim", kind="server") == 6
        assert total(found, "gateway_retries_total", upstream="sim") == 3
        assert total(found, "gateway_upstream_faults_total") == sum(
            attempt.fault is not None for one in records for attempt in one.attempts
        )
        assert total(found, "gateway_upstream_faults_total", upstream="sim", kind="filtered") == 2
        for code, count in (("model_not_found", 1), ("invalid_value", 1), ("invalid_header", 1)):
            assert total(found, "gateway_refusals_total", code=code) == count
        assert total(found, "gateway_calls_in_flight") == 0
        assert total(found, "gateway_rollout_share", agent="qa_agent") == 1


async def test_both_formats_say_the_same(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, agents=FAULTY, policy=FINETUNED) as gateway:
        await make_calls(gateway)
        classic, opened = samples((await scrape(gateway))[1]), samples((await scrape(gateway, OPENMETRICS))[1])
        # The one figure that changes by itself.
        for found in (classic, opened):
            assert found.pop(("gateway_journal_behind_bytes", ())) >= 0
        assert classic == opened


async def test_every_declared_metric_is_shown_with_its_help_and_no_other(tmp_path: Path) -> None:
    cap = '[[caps]]\nper = "total"\nrequests = 100\n'
    agents = FAULTY.replace("sim/simulator-large", "sim/simulator-deprecated")
    async with (
        running_gateway(tmp_path, agents=agents, policy=FINETUNED + cap) as gateway,
        connected(gateway.admin_url) as admin,
    ):
        await make_calls(gateway)
        gateway.runtime.observer.resumed("sim")
        gateway.runtime.observer.crossed(0.25)
        gateway.runtime.observer.shadowed("qa_agent", "baseline", "ok")
        gateway.runtime.observer.exports("traces")
        admin.send(request("GET", "/health"))
        await admin.reply()
        await gateway.reload(policy=FINETUNED + EXPERIMENT + cap)
        assert gateway.gateway._pilot is not None
        await gateway.gateway._pilot.step()
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


# --- A first burst ---------------------------------------------------------------------------------------------------


def grown(before: Samples, after: Samples, name: str, **labels: str) -> float:
    """By how much, as Prometheus' increase() sees it: a series that was not there before has not grown."""
    wanted = set(labels.items())
    known = [key for key in after if key[0] == name and wanted <= set(key[1]) and key in before]
    return sum(after[key] - before[key] for key in known)


async def test_a_first_burst_between_two_scrapes_is_seen(tmp_path: Path) -> None:
    cap = '[[caps]]\nscope = "user"\nper = "day"\nrequests = 1\nwarn_at = [0.5]\n'
    agents = FAULTY + '[agents.lost_agent]\nfinetuned = "sim/fault:500"\nbaseline = "sim/fault:500"\n'
    async with running_gateway(tmp_path, agents=agents, policy=FINETUNED + cap) as gateway:
        before = samples((await scrape(gateway))[1])
        async with connected(gateway.data_url) as connection:
            for user in ("u1", "u2"):
                assert await call(connection, model="lost_agent", user=user) == 500
                assert await call(connection, model="support_agent", user=user) == 200
                for _ in range(3):
                    assert await call(connection, model="support_agent", user=user) == 429
        # As the bookkeeper does, when the store has told it.
        for share in (0.5, 1.0):
            gateway.runtime.observer.crossed(share)
        after, records = samples((await scrape(gateway))[1]), gateway.journal()
    assert grown(before, after, "gateway_refusals_total", code="budget_exceeded") == 6
    assert grown(before, after, "model_requests_total") == 4
    assert grown(before, after, "model_fallbacks_total", agent="support_agent", model="sim/simulator-small") == 2
    assert grown(before, after, "model_errors_total", agent="lost_agent", code="upstream_error") == 2
    assert grown(before, after, "model_tokens_total", direction="output") > 0
    faults = [attempt.fault for one in records for attempt in one.attempts if attempt.fault is not None]
    assert grown(before, after, "gateway_upstream_faults_total", kind="server") == len(faults) > 4
    assert grown(before, after, "gateway_cap_warnings_total", share="0.5") >= 1
    assert grown(before, after, "gateway_cap_warnings_total", share="1") >= 1
    # The rest, of which there may be much, begins when it happens.
    assert total(before, "model_latency_ms_count") == 0
    assert not [key for key in before if key[0].startswith("model_latency_ms")]


def test_what_is_at_0_from_the_beginning_is_what_the_alerts_count() -> None:
    rules = (Path(__file__).parent.parent.parent / "prometheus" / "rules.yml").read_text()
    (counted,) = re.findall(r'gateway_refusals_total\{code=~"([^"]*)"\}', rules)
    assert set(counted.split("|")) == set(COUNTED_REFUSALS)
    assert {"upstream_error", "upstream_cut", "upstream_timeout", "upstream_unreachable"} <= set(PROVIDER_ERRORS)


def observer_of(policy: str = "", config: str | None = None) -> Observer:
    plan = plan_of(policy) if config is None else plan_of(policy, config=config)
    return Observer(plan, Standing(Breakers(), Retries()), (10, 100))


def rows(observer: Observer, metric: Declared) -> dict[tuple[str, ...], object]:
    return {labels: value for declared, found in observer.figures() if declared is metric for labels, value in found}


def test_models_stand_at_0_in_the_arms_that_callers_may_get() -> None:
    baseline = {
        ("qa_agent", "mistral/base", "baseline"), ("qa_agent", "openai/gpt-4o", "baseline"),
        ("qa_agent", "sim/small", "baseline"), ("legal_agent", "mistral/base", "baseline"),
    }  # fmt: skip
    observer = observer_of("[models]\nuse_finetuned = false")
    assert rows(observer, REQUESTS) == dict.fromkeys(baseline, 0)
    assert rows(observer, ERRORS).keys() == {(*labels, code) for labels in baseline for code in PROVIDER_ERRORS}
    # A rollout that begins brings the other arm, and one that was taken back leaves it.
    observer.take_plan(plan_of("[ab_testing]\nenabled = true\nrollout_percentage = 10"))
    both = rows(observer, REQUESTS).keys()
    assert both > baseline
    assert ("qa_agent", "mistral/ft:qa", "finetuned") in both
    observer.take_plan(plan_of("[models]\nuse_finetuned = false"))
    assert rows(observer, REQUESTS).keys() == both


def test_zeros_are_as_many_as_the_configuration_has_names() -> None:
    observer = observer_of()
    assert len(rows(observer, FAULTS)) == 3 * len(FaultKind)
    before = sum(len(found) for _, found in observer.figures())
    for _ in range(9):
        observer.take_plan(plan_of())
    assert sum(len(found) for _, found in observer.figures()) == before


def test_a_reload_takes_nothing_back() -> None:
    observer = observer_of()
    observer.fault("sim", FaultKind.CUT)
    observer.crossed(1.0)
    observer.refused("budget_exceeded")
    observer.take_plan(plan_of())
    assert rows(observer, FAULTS)["sim", "cut"] == 1
    assert rows(observer, CROSSED)["1",] == 1
    assert rows(observer, REFUSALS)["budget_exceeded",] == 1


def test_a_caller_who_left_before_a_model_was_asked_is_no_refusal() -> None:
    observer = observer_of()
    before = rows(observer, REFUSALS)
    observer.refused("")
    assert rows(observer, REFUSALS) == before == dict.fromkeys(((code,) for code in COUNTED_REFUSALS), 0)


# --- What failover knows ---------------------------------------------------------------------------------------------

CUT_AGENTS = """
[agents.qa_agent]
finetuned = "first/ft:a"
baseline  = "first/a"
fallbacks = ["second/b"]
"""
CUT_ROUTING = 'default_agent = "qa_agent"\n'
BREAKING = "[models]\nuse_finetuned = false\nallow_raw_models = true\n[retries]\nbase_s = 0.001\n"


async def test_a_joined_stream_is_counted_at_the_upstream_that_took_it_up(tmp_path: Path) -> None:
    begun = [delta("The "), delta("capital ")]
    async with (
        scripted(streams(*begun)) as first,
        scripted(streams(*begun, delta("is Paris."), finish(), DONE)) as second,
        running_gateway(
            tmp_path,
            agents=CUT_AGENTS,
            routing=CUT_ROUTING,
            policy=BREAKING,
            upstreams={"first": first.base_url, "second": second.base_url},
        ) as gateway,
        connected(gateway.data_url) as connection,
    ):
        for _ in range(2):
            assert await call(connection, stream=True) == 200
        found = samples((await scrape(gateway))[1])
        assert {key: value for key, value in found.items() if key[0] == "gateway_streams_resumed_total"} == {
            ("gateway_streams_resumed_total", (("upstream", "second"),)): 2
        }
        assert total(found, "gateway_upstream_faults_total", upstream="first", kind="cut") == 2
        assert total(found, "gateway_retries_total") == 0
        assert total(found, "model_fallbacks_total", model="second/b") == 2
        assert total(found, "model_errors_total") == 0


async def test_the_state_of_a_breaker_is_shown_as_it_changes(tmp_path: Path) -> None:
    policy = BREAKING + "[breakers]\nconsecutive = 2\n"
    async with (
        scripted(refuses(503), refuses(503), says("Well ", "again.")) as first,
        scripted(says("From ", "the ", "second.")) as second,
        running_gateway(
            tmp_path,
            agents=CUT_AGENTS,
            routing=CUT_ROUTING,
            policy=policy,
            upstreams={"first": first.base_url, "second": second.base_url},
        ) as gateway,
        connected(gateway.data_url) as connection,
    ):

        async def states() -> dict[str, float]:
            found = samples((await scrape(gateway))[1])
            shown = {dict(labels)["model"]: at for (name, labels), at in found.items() if name == BREAKER.name}
            upstreams = {labels for (name, labels), _ in found.items() if name == BREAKER.name}
            assert all(dict(labels)["model"].startswith(dict(labels)["upstream"]) for labels in upstreams)
            return shown

        assert await states() == {}
        assert await call(connection) == 200
        assert await states() == {"first/a": 2, "second/b": 0}
        # Its time is passed by hand: the next call is the probe, and while it is out the breaker is half-open.
        breaker = gateway.runtime.standing.breaker("first", "first/a")
        breaker._opened_s -= 1_000
        admission = breaker.admit(time.monotonic())
        assert admission is Admission.PROBE
        assert await states() == {"first/a": 1, "second/b": 0}
        breaker.abandoned(admission)
        assert await call(connection) == 200
        assert await states() == {"first/a": 0, "second/b": 0}


async def test_the_retry_budget_is_shown_per_upstream_as_it_is_used_up(tmp_path: Path) -> None:
    policy = BREAKING + "budget_floor = 2\nbudget_percent = 0\nbudget_window_s = 3600\n[breakers]\nconsecutive = 100\n"
    async with running_gateway(tmp_path, agents=FAULTY, policy=policy) as gateway:
        left = []
        async with connected(gateway.data_url) as connection:
            for _ in range(4):
                assert await call(connection, model="sim/fault:500") == 500
                found = samples((await scrape(gateway))[1])
                left.append(found["gateway_retry_budget_left", (("upstream", "sim"),)])
        assert left == [1, 0, 0, 0]
        assert total(found, "gateway_retries_total", upstream="sim") == 2
        assert total(found, "gateway_upstream_faults_total", kind="server") == 6


async def test_models_named_outright_get_breakers_and_no_series_of_their_own(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, agents=FAULTY, policy=BREAKING) as gateway:
        async with connected(gateway.data_url) as connection:
            for number in range(8):
                assert await call(connection, model=f"sim/{CANARY.decode()}-{number}") == 200
                assert await call(connection, model=f"sim/retired-{number}") == 404
            # The same model by its name and through its agent is one model, and one series.
            assert await call(connection, model="sim/simulator-small") == 200
            assert await call(connection) == 200
        assert len(list(gateway.runtime.standing.breakers())) == 17
        text = (await scrape(gateway))[1]
        assert CANARY.decode() not in text
        assert "retired" not in text
        assert [labels for name, labels in samples(text) if name == BREAKER.name] == [
            (("model", "sim/simulator-small"), ("upstream", "sim"))
        ]


async def test_a_reload_that_drops_a_model_drops_its_breaker_from_sight_and_keeps_the_counts(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, agents=FAULTY, policy=FINETUNED) as gateway:
        await make_calls(gateway)
        before = samples((await scrape(gateway))[1])
        assert total(before, "gateway_retries_total") == 3
        await gateway.reload(policy="[models]\nuse_finetuned = false\nfallback_enabled = false\n")
        after = samples((await scrape(gateway))[1])
        assert total(after, "gateway_retries_total") == 3
        names = {dict(labels)["model"] for name, labels in after if name == BREAKER.name}
        assert "sim/simulator-small" in names


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
