"""Looking at models without spending tokens: who is asked, how often, what is made of it, and where it is told."""

import asyncio
import logging
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
from aiohttp import web

from gateway.decide.health import Condition, Overall
from gateway.decide.plan import Plan
from gateway.decide.standing import Standing
from gateway.domain.errors import FaultKind, Refused, UpstreamFault
from gateway.domain.policy import Breakers, Retries
from gateway.edge.health import MAX_ABREAST, Health
from gateway.edge.runtime import Runtime
from gateway.edge.upstream import Upstream
from gateway.telemetry.exposition import Snapshot
from gateway.telemetry.observe import Observer
from tests.planning import NOW_S, plan_of
from tests.raw_http import check_ordinary, check_refusal, connected, request
from tests.running import AGENTS, POLICY, running_gateway
from tests.scripted import Turn, refusing_port, scripted, silent

CONFIG = """
[upstreams.one]
kind = "compatible"
base_url = "https://one.example/v1"
[upstreams.two]
kind = "compatible"
base_url = "https://two.example/v1"

[agents.qa_agent]
finetuned = "one/ft:qa"
baseline  = "one/base"
fallbacks = ["two/small"]
[agents.legal_agent]
finetuned = "one/ft:legal"
baseline  = "one/base"
"""
BASELINE = "[models]\nuse_finetuned = false\n"
ROUTING = 'default_agent = "qa_agent"'
DAY_S = 86_400.0
Answer = tuple[int, Any] | UpstreamFault


def plan(policy: str = BASELINE, config: str = CONFIG) -> Plan:
    return plan_of(policy, config=config, routing=ROUTING)


def card(model: str, **fields: Any) -> Answer:
    return 200, {"id": model, "object": "model", **fields}


class Exchange:
    headers: Mapping[str, str] = {}

    def __init__(self, status: int, body: Any) -> None:
        self.status = status
        self._body = body if isinstance(body, bytes) else msgspec.json.encode(body)
        self.closed = 0

    async def read(self) -> bytes:
        return self._body

    def close(self, *, is_sound: bool) -> None:
        self.closed += 1


class Provider:
    """Answers as its table says; a model that is not in it is there."""

    def __init__(self, answers: dict[str, Answer] | None = None) -> None:
        self.answers = {} if answers is None else answers
        self.asked: list[str] = []
        self.exchanges: list[Exchange] = []
        self.abreast = self.most_abreast = 0
        self.began, self.gate = asyncio.Event(), asyncio.Event()
        self.gate.set()

    async def look_up(self, model: str, *, within_s: float) -> Exchange:
        self.asked.append(model)
        self.abreast += 1
        self.most_abreast = max(self.most_abreast, self.abreast)
        self.began.set()
        try:
            # Others get their turn, as with a real socket.
            await asyncio.sleep(0)
            await self.gate.wait()
        finally:
            self.abreast -= 1
        answer = self.answers.get(model, card(model))
        if isinstance(answer, UpstreamFault):
            raise answer
        self.exchanges.append(Exchange(*answer))
        return self.exchanges[-1]


class Bench:
    """A `Health` with two providers, and clocks that stand until they are moved."""

    def __init__(self, policy: str = BASELINE, config: str = CONFIG) -> None:
        self.now_s = 500.0
        self.wall_s = NOW_S
        self.one, self.two = Provider(), Provider()
        self.standing = Standing(Breakers(), Retries())
        made = plan(policy, config)
        self.observer = Observer(made, self.standing, (100.0, 1_000.0, 10_000.0))
        upstreams = {"one": cast("Upstream", self.one), "two": cast("Upstream", self.two)}
        self.runtime = SimpleNamespace(
            plan=made, upstreams=upstreams, standing=self.standing, observer=self.observer
        )  # fmt: skip
        self.health = Health(cast("Runtime", self.runtime), clock=lambda: self.now_s, wall=lambda: self.wall_s)

    def called(self, ref: str, *, ok: bool = True, times: int = 1) -> None:
        breaker = self.standing.breaker(ref.partition("/")[0], ref)
        for _ in range(times):
            admission = breaker.admit(self.now_s)
            assert admission is not None
            (breaker.succeeded if ok else breaker.failed)(admission, self.now_s)

    async def models(self) -> dict[str, Any]:
        _, found = await self.health.report()
        return cast("dict[str, Any]", found["models"])

    def metric(self, name: str) -> dict[str, float]:
        families = {family.name: family for family in Snapshot(self.observer.figures()).collect()}
        return {sample.labels["model"]: sample.value for sample in families[name].samples}


# --- Who is asked, and how often -------------------------------------------------------------------------------------


async def test_each_model_is_asked_for_once_however_many_agents_share_it() -> None:
    bench = Bench()
    overall, found = await bench.health.report()
    assert overall is Overall.HEALTHY
    assert (bench.one.asked, bench.two.asked) == (["base"], ["small"])
    assert found["agents"]["qa_agent"] == {
        "status": "ok", "reason": "one/base: the provider knows it", "chains": [["one/base", "two/small"]],
    }  # fmt: skip
    assert found["models"]["one/base"] == {
        "verdict": "OK", "reason": "the provider knows it", "evidence": "probe", "age_s": 0.0,
        "probe": {"finding": "here", "latency_ms": 0.0}, "retires_at": None, "retires_in_days": None,
    }  # fmt: skip


async def test_many_who_ask_at_once_share_one_round() -> None:
    bench = Bench()
    bench.one.gate.clear()
    askers = [asyncio.create_task(bench.health.report()) for _ in range(50)]
    await bench.one.began.wait()
    bench.one.gate.set()
    await asyncio.gather(*askers)
    assert bench.one.asked == ["base"]


async def test_what_was_said_is_kept_for_a_while_and_its_age_is_told() -> None:
    bench = Bench()
    await bench.models()
    bench.now_s += 14.9
    assert (await bench.models())["one/base"]["age_s"] == 14.9
    assert bench.one.asked == ["base"]
    bench.now_s += 0.1
    assert (await bench.models())["one/base"]["age_s"] == 0.0
    assert bench.one.asked == ["base", "base"]


async def test_an_asker_that_leaves_does_not_end_it_for_the_others() -> None:
    bench = Bench()
    bench.one.gate.clear()
    leaves, stays = asyncio.create_task(bench.health.report()), asyncio.create_task(bench.health.report())
    await bench.one.began.wait()
    leaves.cancel()
    await asyncio.gather(leaves, return_exceptions=True)
    bench.one.gate.set()
    assert (await stays)[0] is Overall.HEALTHY
    assert bench.one.asked == ["base"]


async def test_a_reload_is_looked_at_anew_also_while_a_round_is_under_way() -> None:
    bench = Bench()
    bench.one.gate.clear()
    asker = asyncio.create_task(bench.health.report())
    await bench.one.began.wait()
    bench.runtime.plan = plan("[models]\nfallback_enabled = false")
    bench.one.gate.set()
    _, found = await asker
    assert set(found["models"]) == {"one/ft:qa", "one/ft:legal"}
    assert {row["verdict"] for row in found["models"].values()} == {"OK"}


MANY = CONFIG + "\n".join(f'[agents.a{n}]\nfinetuned = "one/m{n}"\nbaseline = "one/m{n}"' for n in range(40))


async def test_a_provider_is_asked_for_few_models_at_a_time() -> None:
    bench = Bench(config=MANY)
    assert len(await bench.models()) == 42
    assert bench.one.most_abreast == MAX_ABREAST
    assert all(exchange.closed == 1 for exchange in bench.one.exchanges)


@pytest.mark.parametrize("kind", [FaultKind.CONNECT, FaultKind.FIRST_BYTE])
async def test_a_silent_provider_is_given_up_and_not_asked_for_all_its_models(kind: FaultKind) -> None:
    bench = Bench(config=MANY)
    silence = UpstreamFault(kind, "upstream_unreachable", "no connection to one")
    bench.one.answers = {"base": silence, **{f"m{n}": silence for n in range(40)}}
    found = await bench.models()
    assert len(bench.one.asked) <= MAX_ABREAST
    assert {row["reason"] for ref, row in found.items() if ref.startswith("one/")} == {"no connection to one"}
    assert found["two/small"]["verdict"] == "OK"


async def test_a_provider_that_never_ends_its_answer_is_given_up_in_time() -> None:
    bench = Bench(BASELINE + "[health]\ntimeout_s = 0.001")
    bench.one.gate.clear()
    found = await bench.models()
    assert (found["one/base"]["verdict"], found["one/base"]["reason"]) == ("ERROR", "one did not answer in time")
    assert bench.one.abreast == 0


# --- What is made of it ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("no_card", [(404, b"not found"), (405, b""), (200, b"<html>"), (404, {"error": {}})])
async def test_where_there_are_no_single_cards_the_list_is_asked(no_card: Answer) -> None:
    bench = Bench()
    bench.one.answers = {"base": no_card, "": (200, {"object": "list", "data": [{"id": "base"}]})}
    assert (await bench.models())["one/base"]["verdict"] == "OK"
    assert bench.one.asked == ["base", ""]


async def test_a_server_without_any_list_is_no_error_while_calls_succeed() -> None:
    bench = Bench()
    bench.one.answers = {"base": (404, b""), "": (404, b"")}
    bench.called("one/base")
    row = (await bench.models())["one/base"]
    assert (row["verdict"], row["evidence"], row["probe"]["finding"]) == ("OK", "calls", "untold")
    bench.now_s += 3_600
    row = (await bench.models())["one/base"]
    assert (row["verdict"], row["evidence"], row["age_s"]) == ("OK", "calls", 3_600.0)
    assert bench.metric("gateway_model_retires_in_days") == {}


async def test_calls_are_seen_at_once_though_the_providers_word_is_kept() -> None:
    bench = Bench()
    await bench.models()
    bench.called("one/base", ok=False)
    assert (await bench.models())["one/base"]["verdict"] == "ERROR"
    assert bench.one.asked == ["base"]


async def test_a_model_in_error_degrades_who_has_a_fallback_and_fails_who_has_none() -> None:
    bench = Bench()
    bench.one.answers = {"base": (503, b"")}
    overall, found = await bench.health.report()
    assert overall is Overall.ERROR
    assert {name: row["status"] for name, row in found["agents"].items()} == {
        "qa_agent": "degraded", "legal_agent": "error",
    }  # fmt: skip
    assert (await bench.health.report_on("qa_agent"))[0] is Condition.DEGRADED


async def test_one_agent_is_told_with_its_own_models_only() -> None:
    bench = Bench()
    condition, found = await bench.health.report_on("legal_agent")
    assert (condition, found["agent"], list(found["models"])) == (Condition.OK, "legal_agent", ["one/base"])


async def test_an_unknown_agent_costs_the_providers_nothing() -> None:
    bench = Bench()
    with pytest.raises(Refused) as refused:
        await bench.health.report_on("raw")
    assert refused.value.status == 404
    assert bench.one.asked == []


def streamed(bench: Bench, first_chunk_ms: float, times: int) -> None:
    for _ in range(times):
        bench.observer._new_cell(("qa_agent", "one/base", "baseline")).first_chunk_ms.add(first_chunk_ms)
    bench.called("one/base", times=times)


async def test_streams_that_begin_late_make_their_model_slow_and_only_lately() -> None:
    bench = Bench()
    streamed(bench, 50.0, times=100)
    await bench.models()
    bench.now_s += 20
    streamed(bench, 20_000.0, times=8)
    row = (await bench.models())["one/base"]
    assert (row["verdict"], row["evidence"]) == ("SLOW", "calls")
    for _ in range(4):
        bench.now_s += 30
        streamed(bench, 50.0, times=8)
        row = (await bench.models())["one/base"]
    assert row["verdict"] == "OK"


async def test_a_mark_that_is_too_old_is_not_compared_with() -> None:
    bench = Bench()
    await bench.models()
    bench.now_s += 10_000
    streamed(bench, 20_000.0, times=8)
    assert (await bench.models())["one/base"]["verdict"] == "OK"


# --- A model's end ---------------------------------------------------------------------------------------------------


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [record.getMessage() for record in caplog.records if record.name == "gateway.health"]
    caplog.clear()
    return found


async def look_again(bench: Bench, after_s: float = 60.0) -> dict[str, Any]:
    bench.now_s += after_s
    bench.wall_s += after_s
    return (await bench.models())["one/base"]  # type: ignore[no-any-return]


async def test_an_end_that_is_announced_is_a_metric_and_one_warning_a_day(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    bench = Bench()
    # NOW_S is on 2025-11-21.
    announced = card("base", deprecation="2025-12-21T04:40:00Z", deprecation_replacement_model="new\n\x1b[31m")
    bench.one.answers = {"base": announced}
    row = (await bench.models())["one/base"]
    assert (row["verdict"], row["retires_at"]) == ("OK", "2025-12-21T04:40:00Z")
    assert row["retires_in_days"] == pytest.approx(30, abs=1)
    assert bench.metric("gateway_model_retires_in_days") == {"one/base": pytest.approx(30, abs=1)}
    (warned,) = warnings(caplog)
    assert "one/base is withdrawn on 2025-12-21" in warned
    assert warned.isprintable()
    await look_again(bench)
    assert warnings(caplog) == []
    await look_again(bench, DAY_S)
    assert len(warnings(caplog)) == 1
    # A look that fails does not make it forgotten, and the provider may change its mind.
    bench.one.answers = {"base": (503, b"")}
    assert (await look_again(bench))["retires_at"] is not None
    bench.one.answers = {}
    assert (await look_again(bench))["retires_at"] is None
    assert bench.metric("gateway_model_retires_in_days") == {}


async def test_an_end_that_is_far_away_is_a_metric_only(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench(BASELINE + "[health]\nwarn_days = 10")
    bench.one.answers = {"base": card("base", deprecation="2026-11-21")}
    await bench.models()
    assert bench.metric("gateway_model_retires_in_days")["one/base"] > 360
    assert warnings(caplog) == []


async def test_a_model_that_was_there_and_is_gone_is_withdrawn(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench()
    await bench.models()
    bench.one.answers = {"base": (404, {"error": {}}), "": (200, {"data": []})}
    row = await look_again(bench)
    assert (row["verdict"], row["probe"]["finding"], row["retires_in_days"]) == ("ERROR", "gone", 0.0)
    (warned,) = warnings(caplog)
    assert warned == "model one/base is withdrawn: the provider does not know it any more"
    await look_again(bench)
    assert warnings(caplog) == []
    assert bench.metric("gateway_model_retires_in_days")["one/base"] == pytest.approx(-60 / DAY_S)


async def test_a_model_that_another_provider_had_is_not_gone_but_unknown() -> None:
    bench = Bench()
    await bench.models()
    bench.runtime.plan = plan(BASELINE + 'upstream = "two"')
    bench.two.answers = {"base": (404, b""), "": (404, b"")}
    row = await look_again(bench)
    assert (row["verdict"], row["probe"]["finding"], row["retires_at"]) == ("ERROR", "untold", None)


async def test_an_archived_model_is_withdrawn() -> None:
    bench = Bench()
    bench.one.answers = {"base": card("base", archived=True)}
    row = (await bench.models())["one/base"]
    assert (row["verdict"], row["retires_in_days"]) == ("ERROR", 0.0)


async def test_the_metrics_ask_nobody_and_tell_nothing_that_is_not_known() -> None:
    bench = Bench()
    assert bench.metric("gateway_model_health") == {}
    bench.called("two/small", ok=False)
    assert bench.metric("gateway_model_health") == {"two/small": 2.0}
    assert bench.one.asked == []
    await bench.models()
    assert bench.metric("gateway_model_health") == {"one/base": 0.0, "two/small": 2.0}


# --- Over real sockets -----------------------------------------------------------------------------------------------


async def test_a_gateway_on_its_simulator_is_healthy_and_no_chat_is_spent(tmp_path: Path) -> None:
    async with running_gateway(tmp_path) as gateway, connected(gateway.admin_url) as admin:
        admin.send(request("GET", "/health"))
        reply = await admin.reply()
        assert (reply.status, reply.json()["status"]) == (200, "healthy")
        assert reply.headers["content-type"].startswith("application/json")
        admin.send(request("GET", "/health/support_agent"))
        reply = await admin.reply()
        assert (reply.status, reply.json()["status"]) == (200, "ok")
        assert reply.json()["chains"] == [["sim/simulator-small", "sim/simulator-large"]]
        assert not gateway.simulator.calls
        async with connected(gateway.data_url) as data:
            await check_ordinary(data)
        admin.send(request("GET", "/health/qa_agent"))
        row = (await admin.reply()).json()["models"]["sim/simulator-small"]
        assert (row["evidence"], row["reason"]) == ("calls", "1 of 1 call in 60 s succeeded")


async def test_who_has_nobody_to_answer_is_told_503_and_stays_ready(tmp_path: Path) -> None:
    with refusing_port() as closed:
        nowhere = {"sim": f"http://127.0.0.1:{closed.getsockname()[1]}/v1"}
        async with running_gateway(tmp_path, upstreams=nowhere) as gateway, connected(gateway.admin_url) as admin:
            for path, status in (("/health", 503), ("/health/qa_agent", 503), ("/readyz", 200), ("/livez", 200)):
                admin.send(request("GET", path))
                assert (await admin.reply()).status == status


@pytest.mark.parametrize("path", ["/health/nobody", "/health/raw", "/health/auto", "/health/%2e%2e%2fadmin"])
async def test_an_unknown_agent_is_404_in_openais_shape(tmp_path: Path, path: str) -> None:
    async with running_gateway(tmp_path) as gateway, connected(gateway.admin_url) as admin:
        admin.send(request("GET", path))
        assert "qa_agent" in check_refusal(await admin.reply(), 404, "model_not_found")


async def test_the_provider_is_asked_with_its_own_key_which_nobody_else_sees(tmp_path: Path) -> None:
    async def knows(turn: Turn) -> None:
        await turn.reply({"error": {"message": f"no model for {turn.headers['authorization']}"}}, status=401)

    async with scripted(knows) as provider:
        table = f'kind = "compatible"\nbase_url = "{provider.base_url}"\napi_key = "very-secret"'
        agents = AGENTS.replace("sim/simulator-small", "sim/org/a b?:1")
        async with (
            running_gateway(tmp_path, upstreams={"sim": table}, agents=agents) as gateway,
            connected(gateway.admin_url) as admin,
        ):
            admin.send(request("GET", "/health"))
            reply = await admin.reply()
        asked = {turn.target: turn.headers["authorization"] for turn in provider.turns}
        assert asked == dict.fromkeys(
            ["/v1/models/org/a%20b%3F:1", "/v1/models/simulator-large"], "Bearer very-secret"
        )  # fmt: skip
        assert {turn.method for turn in provider.turns} == {"GET"}
        assert reply.status == 503
        assert "refuses our key (401)" in reply.json()["models"]["sim/simulator-large"]["reason"]
        assert b"very-secret" not in reply.head + reply.body


async def test_a_gateway_looks_by_itself_so_that_an_end_is_noticed_though_nobody_asks(tmp_path: Path) -> None:
    async def retiring(turn: Turn) -> None:
        await turn.reply({"id": "m", "object": "model", "deprecation": "2020-01-01"})

    async with scripted(retiring) as provider:
        policy = f"{POLICY}\n[health]\nevery_s = 0.001\ncache_s = 3600"
        async with running_gateway(tmp_path, upstreams={"sim": provider.base_url}, policy=policy) as gateway:
            await provider.turn(1)
            async with connected(gateway.admin_url) as admin:
                admin.send(request("GET", "/health"))
                assert (await admin.reply()).json()["models"]["sim/simulator-large"]["retires_in_days"] < 0
                admin.send(request("GET", "/metrics"))
                metrics = (await admin.reply()).body
        assert b'gateway_model_retires_in_days{model="sim/simulator-small"} -' in metrics
        assert len(provider.turns) == 2


async def test_a_bug_in_a_look_is_told_and_the_next_look_is_made(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench(BASELINE + "[health]\nevery_s = 0.001\ncache_s = 0.001\n")
    bench.one.answers["base"] = cast("Answer", (200, {"id": "base"}))
    look_up, looks = bench.one.look_up, 0

    async def stumbles(model: str, *, within_s: float) -> Exchange:
        nonlocal looks
        looks += 1
        if looks == 1:
            raise ZeroDivisionError
        return await look_up(model, within_s=within_s)

    bench.one.look_up = stumbles  # type: ignore[method-assign]
    async for _ in bench.health.run(web.Application()):
        await bench.one.began.wait()
    assert looks >= 2
    (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert record.getMessage() == "bug in the look at the models"
    assert record.exc_info is not None


@pytest.mark.parametrize("far", ["9999-12-31T23:59:59-08:00", "0001-01-01T00:00:00+14:00", "0001-01-01"])
async def test_a_date_that_nobody_can_have_meant_is_no_end_and_spoils_nothing(far: str) -> None:
    bench = Bench()
    bench.one.answers["base"] = card("base", deprecation=far)
    found = await bench.models()
    assert (found["one/base"]["verdict"], found["one/base"]["retires_at"]) == ("OK", None)


async def test_a_gateway_stops_at_once_though_a_look_is_under_way(tmp_path: Path) -> None:
    async with (
        scripted(silent) as provider,
        running_gateway(tmp_path, upstreams={"sim": provider.base_url}) as gateway,
        connected(gateway.admin_url) as admin,
    ):
        admin.send(request("GET", "/health"))
        await provider.turn()
