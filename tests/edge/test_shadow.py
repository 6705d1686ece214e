"""Shadow mode, through a real gateway: the other variant is asked as well, and no caller, cap or breaker can tell."""

import asyncio
import re
import signal
import socket
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any
from urllib.parse import urlsplit

import msgspec
import pytest

from gateway.decide.breaker import Admission, State
from gateway.domain.call import CallRecord
from gateway.domain.errors import Refused
from gateway.domain.outcome import outcome_of
from gateway.domain.shadow_policy import SHADOW
from gateway.edge.open_call import OpenCall
from gateway.edge.shadow import ShadowCall
from gateway.store.ledger import Ledger
from tests.journey import AT_ONCE, NO_RETRIES, PRICES, WIDE_CAPS, Answer, Journey, journey
from tests.process import Files, process
from tests.running import RunningGateway, chat
from tests.scripted import Scene, Turn, completion, refuses, resets, says, scripted, silent

# `first` answers, `second` is asked by the shadows: everybody is assigned the baseline by the experiment.
AGENTS = """
[agents.qa_agent]
finetuned = "second/ft:b"
baseline  = "first/a"
defaults  = { temperature = 0.7, max_tokens = 64 }

[agents.other_agent]
finetuned = "second/ft:b"
baseline  = "first/a"

[agents.same_agent]
finetuned = "first/a"
baseline  = "first/a"
"""
OFF = """
[ab_testing]
enabled = true
rollout_percentage = 0
[overrides]
variant = true
fallback = true
[models]
fallback_enabled = false
allow_raw_models = true
unknown_agent = "baseline"
"""
EVERY_SCOPE = "".join(
    f'[[caps]]\nscope = "{scope}"\nper = "total"\nusd = "1000"\n'
    for scope in ("agent", "user", "key", "model", "operation", "agent+user")
)
OWN_CAP = "dev: global usd total (operation shadow)"


def shadowing(percent: float = 100, *, usd: str = "100", more: str = "") -> str:
    """A policy under which calls have shadows."""
    return f'{OFF}\n[shadow]\npercent = {percent}\nusd = "{usd}"\nper = "total"\n{more}\n'


@asynccontextmanager
async def shadowed(
    tmp_path: Path, *scenes: Scene, shadow: Scene | None = None, policy: str | None = None, **more: Any
) -> AsyncIterator[Journey]:
    """A gateway that shadows; `shadow` is what the other variant's provider does, for ever."""
    more = {"agents": AGENTS, "second": shadow or says("Shadow."), "policy": policy or shadowing(), **more}
    async with journey(tmp_path, *(scenes or (says("Paris"),)), **more) as trip:
        yield trip


def split(gateway: RunningGateway) -> tuple[list[CallRecord], list[CallRecord]]:
    """The records of calls, and those of shadow calls."""
    records = gateway.journal()
    return [one for one in records if not one.shadow_of], [one for one in records if one.shadow_of]


def results(trip: Journey) -> Counter[str]:
    """What became of shadow calls, as counted."""
    found: Counter[str] = Counter()
    for (_, _, result), count in trip.gateway.runtime.observer._shadows.items():
        found[result] += count
    return found


async def at_rest(trip: Journey) -> None:
    """Wait until no shadow is under way."""
    await trip.until(lambda: not trip.gateway.runtime.shadows)
    trip.check_at_rest()


async def metrics(trip: Journey) -> str:
    async with trip.session.get(f"{trip.gateway.admin_url}/metrics") as response:
        return await response.text()


def said(answer: Answer) -> dict[str, str]:
    """The headers, without what is another for each call."""
    passing = {"date", "x-request-id", "x-gateway-overhead-ms"}
    return {name: value for name, value in answer.headers.items() if name.lower() not in passing}


def body_of(answer: Answer) -> bytes:
    """The body; a stream's last comment tells our own milliseconds, which are never the same."""
    return re.sub(rb"overhead-ms=[\d.]+", b"", answer.body)


async def test_of_a_shadow_nobody_can_say_anything(tmp_path: Path) -> None:
    async with shadowed(tmp_path) as trip:
        await trip.ask(user="ann")
        await at_rest(trip)
        await trip.booked()
        (call,), (shadow,) = split(trip.gateway)
        for id, status in ((call.id, 200), (shadow.id, 404)):
            said = {"call_id": id, "score": 1}
            async with trip.session.post(f"{trip.gateway.data_url}/v1/feedback", json=said) as response:
                assert response.status == status


# --- What the caller sees ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{}, {"stream": True}, {"stream": True, "stream_options": {"include_usage": True}}])
async def test_the_answer_is_the_same_with_and_without_a_shadow(tmp_path: Path, fields: dict[str, Any]) -> None:
    answers: list[Answer] = []
    sent: list[bytes] = []
    for folder, policy in (("off", OFF), ("on", shadowing())):
        (tmp_path / folder).mkdir()
        async with shadowed(tmp_path / folder, policy=policy) as trip:
            answers += [await trip.ask(user="ann", service_tier="priority", **fields) for _ in range(3)]
            await at_rest(trip)
            sent += [turn.body for turn in trip.first.turns]
            assert len(trip.second.turns) == (3 if folder == "on" else 0)
    off, on = answers[:3], answers[3:]
    assert [one.status for one in answers] == [200] * 6
    assert [body_of(one) for one in on] == [body_of(one) for one in off]
    assert [said(one) for one in on] == [said(one) for one in off]
    assert sent[3:] == sent[:3]


async def test_a_cap_of_shadows_alone_changes_nothing_in_a_callers_request(tmp_path: Path) -> None:
    async with shadowed(tmp_path, caps="") as trip:
        answer = await trip.ask(service_tier="priority")
        await at_rest(trip)
        assert "x-gateway-budget-remaining-usd" not in answer.headers
        assert "x-gateway-fields-lowered" not in answer.headers
        assert trip.first.turns[0].json()["service_tier"] == "priority"
        # The shadow is under a cap in dollars, and its hold reckons with the price in the table.
        assert trip.second.turns[0].json()["service_tier"] == "default"


@pytest.mark.parametrize("stream", [False, True])
async def test_the_last_byte_is_there_while_the_shadows_provider_hangs(tmp_path: Path, stream: bool) -> None:
    async with shadowed(tmp_path, shadow=silent) as trip:
        answer = await trip.ask(stream=stream)
        assert (answer.status, answer.streamed_text if stream else answer.text) == (200, "Paris")
        await trip.second.turn()
        assert len(trip.gateway.runtime.shadows) == 1
        assert (await trip.ask(stream=stream)).status == 200


@pytest.mark.parametrize("stream", [False, True])
async def test_a_shadow_begins_when_the_answer_is_out_and_recorded(tmp_path: Path, stream: bool) -> None:
    seen: list[bytes] = []
    kept: list[str] = []

    async def looks(turn: Turn) -> None:
        # A socket that nobody reads: what the kernel has for the caller by now.
        seen.append(caller.recv(2**16, socket.MSG_DONTWAIT | socket.MSG_PEEK))
        kept.extend(record.id for record in trip.gateway.journal())
        await turn.reply(completion())

    async with shadowed(tmp_path, shadow=looks) as trip:
        address = urlsplit(trip.gateway.data_url)
        with socket.create_connection((address.hostname, address.port)) as caller:
            body = msgspec.json.encode(chat(stream=stream))
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: here\r\nContent-Length: {len(body)}\r\n\r\n"
            caller.sendall(head.encode() + body)
            await trip.second.turn()
            await at_rest(trip)
        ends = b"data: [DONE]\n\n\r\n0\r\n\r\n" if stream else msgspec.json.encode(completion("Paris"))
        assert seen[0].startswith(b"HTTP/1.1 200 OK")
        assert seen[0].endswith(ends)
        calls, _ = split(trip.gateway)
        assert kept == [calls[0].id]


async def test_the_shadow_is_asked_the_same_plainly_of_the_other_variants_first_model(tmp_path: Path) -> None:
    headers = {"traceparent": f"00-{'1' * 32}-{'2' * 16}-01"}
    async with shadowed(tmp_path) as trip:
        await trip.ask(user="ann", stream=True, stream_options={"include_usage": True}, top_p=0.5, headers=headers)
        await at_rest(trip)
        real, shadow = trip.first.turns[0].json(), trip.second.turns[0].json()
        assert shadow.pop("model") == "ft:b"
        assert (real.pop("model"), real.pop("stream"), real.pop("stream_options")) == (
            "a",
            True,
            {"include_usage": True},
        )
        assert shadow == real
        assert "traceparent" in trip.first.turns[0].headers
        assert "traceparent" not in trip.second.turns[0].headers


# --- What is recorded -------------------------------------------------------------------------------------------------


async def test_its_record_names_the_call_and_is_in_no_experiment(tmp_path: Path) -> None:
    async with shadowed(tmp_path) as trip:
        answer = await trip.ask(user="ann")
        await at_rest(trip)
        (call,), (shadow,) = split(trip.gateway)
        assert shadow.shadow_of == call.id == answer.headers["x-request-id"] != shadow.id
        assert (call.operation, call.variant, call.variant_from) == ("inference", "baseline", "experiment")
        assert (shadow.operation, shadow.variant, shadow.variant_from) == (SHADOW, "finetuned", SHADOW)
        assert (shadow.agent, shadow.user, shadow.key) == (call.agent, call.user, call.key)
        assert (shadow.status, shadow.error, shadow.model_sent, shadow.is_fallback) == (200, "", "second/ft:b", False)
        assert (shadow.experiment, shadow.stage, shadow.span_id, shadow.trace_id) == (0, 0, "", "")
        assert shadow.usage == call.usage
        outcome = outcome_of(shadow)
        assert outcome is not None
        assert (outcome.experiment, outcome.stage, outcome.operation) == (0, 0, SHADOW)
        rows = await trip.booked()
        assert [(row.id, row.on.operation, row.state, row.basis) for row in rows] == [
            (f"{call.id}.1", "inference", "posted", "exact"),
            (f"{shadow.id}.1", SHADOW, "posted", "exact"),
        ]
        assert [row.amounts.nusd for row in rows] == [call.cost_nusd, shadow.cost_nusd]


@pytest.mark.parametrize(
    "shadow",
    [says("Shadow."), refuses(500), refuses(429), refuses(400), resets, refuses(200, b"{}")],
    ids=["ok", "500", "429", "400", "reset", "invalid"],
)
async def test_nothing_that_judges_models_hears_of_it(tmp_path: Path, shadow: Scene) -> None:
    policy = shadowing(more="[breakers]\nconsecutive = 2\n") + NO_RETRIES
    async with shadowed(tmp_path, shadow=shadow, policy=policy) as trip:
        for _ in range(8):
            assert (await trip.ask()).status == 200
            await at_rest(trip)
        assert len(trip.second.turns) == 8
        runtime = trip.gateway.runtime
        assert runtime.standing.known("second", "second/ft:b") is None
        assert [ref for _, ref, _ in runtime.standing.breakers()] == ["first/a"]
        assert "second" not in dict(runtime.standing.budgets())
        calls, shadows = split(trip.gateway)
        assert (len(calls), len(shadows)) == (8, 8)
        result = "ok" if shadows[0].status == 200 and not shadows[0].error else "failed"
        own, others = [], []
        for line in (await metrics(trip)).split("\n"):
            (own if line.startswith("gateway_shadow_calls_total{") else others).append(line)
        # What stands at 0 from the beginning has heard of nothing.
        others = [line for line in others if not line.endswith(" 0.0") or "breaker" in line]
        (counted,) = own
        assert counted.endswith(" 8.0")
        assert {'agent="qa_agent"', 'variant="finetuned"', f'result="{result}"'} == set(
            counted.partition("{")[2].partition("}")[0].split(",")
        )
        told = "\n".join(others)
        assert "finetuned" not in told
        assert "second" not in told
        assert "gateway_upstream_faults_total{" not in told


async def test_a_shadow_that_hangs_ends_by_its_models_own_timeouts_in_doubt(tmp_path: Path) -> None:
    policy = shadowing(more="[timeouts.second]\nfirst_byte_s = 0.01\n[breakers]\nconsecutive = 1\n")
    async with shadowed(tmp_path, shadow=silent, policy=policy) as trip:
        for _ in range(3):
            assert (await trip.ask()).status == 200
            await at_rest(trip)
        _, shadows = split(trip.gateway)
        assert [one.error for one in shadows] == ["upstream_timeout"] * 3
        assert [len(one.attempts) for one in shadows] == [1] * 3
        assert all(one.attempts[0].is_in_doubt for one in shadows)
        assert results(trip) == {"failed": 3}
        assert trip.gateway.runtime.standing.known("second", "second/ft:b") is None


# --- Money ------------------------------------------------------------------------------------------------------------


async def used_by_cap(trip: Journey) -> dict[str, int]:
    await trip.booked()
    return {account.name: account.used for account in trip.gateway.runtime.books.accounts()}


@pytest.mark.parametrize("shadow", [says("Shadow."), resets], ids=["ok", "in doubt"])
async def test_every_other_cap_stands_where_it_would_stand_without_shadows(tmp_path: Path, shadow: Scene) -> None:
    stands: list[dict[str, int]] = []
    for folder, policy in (("off", OFF), ("on", shadowing())):
        (tmp_path / folder).mkdir()
        async with shadowed(tmp_path / folder, policy=policy, caps=WIDE_CAPS + EVERY_SCOPE, shadow=shadow) as trip:
            for place in range(10):
                assert (await trip.ask(user=f"u{place % 3}", stream=bool(place % 2))).status == 200
            await at_rest(trip)
            stands.append(await used_by_cap(trip))
            _, shadows = split(trip.gateway)
        with Ledger(tmp_path / folder / "gateway.db", clock=lambda: 0.0, is_new_allowed=False) as ledger:
            # The same by a fold of every row.
            assert ledger.verify("dev") == []
    off, on = stands
    assert on.pop(OWN_CAP) == sum(attempt.cost_nusd for one in shadows for attempt in one.attempts) > 0
    assert len(shadows) == 10
    assert on == off
    assert min(off.values()) > 0


async def test_its_own_cap_holds_when_a_hundred_want_it_at_once(tmp_path: Path) -> None:
    may_answer = asyncio.Event()

    async def waits(turn: Turn) -> None:
        await may_answer.wait()
        await turn.reply(completion())

    (tmp_path / "one").mkdir()
    async with shadowed(tmp_path / "one") as trip:
        await trip.ask()
        await at_rest(trip)
        (bound,) = [held.amounts.nusd for held in trip.holds().values() if held.on.operation == SHADOW]
    limit = bound * 10 + bound // 2
    (tmp_path / "many").mkdir()
    policy = shadowing(usd=f"0.{limit:09d}", more="max_in_flight = 100")
    async with shadowed(tmp_path / "many", shadow=waits, policy=policy) as trip:
        answers = await asyncio.gather(*(trip.ask() for _ in range(100)))
        assert {one.status for one in answers} == {200}
        await trip.second.turn(9)
        await trip.until(lambda: results(trip)["refused"] == 90)
        assert len(trip.second.turns) == 10
        account = next(one for one in trip.gateway.runtime.books.accounts() if one.name == OWN_CAP)
        assert account.held == bound * 10 <= limit
        may_answer.set()
        await at_rest(trip)
        assert results(trip) == {"ok": 10, "refused": 90}
        calls, shadows = split(trip.gateway)
        # One that was refused leaves nothing behind but the count.
        assert (len(calls), len(shadows)) == (100, 10)
        assert (await used_by_cap(trip))[OWN_CAP] == sum(one.cost_nusd for one in shadows) <= limit


async def test_a_used_up_cap_refuses_no_caller_and_leaves_no_trace_but_the_count(tmp_path: Path) -> None:
    async with shadowed(tmp_path, policy=shadowing(usd="0.000000001")) as trip:
        assert [(await trip.ask()).status for _ in range(5)] == [200] * 5
        await at_rest(trip)
        assert results(trip) == {"refused": 5}
        assert trip.second.turns == []
        refusals = [line for line in (await metrics(trip)).split("\n") if line.startswith("gateway_refusals_total{")]
        assert {line.rpartition(" ")[2] for line in refusals} == {"0.0"}
        assert not any(trip.gateway.runtime.observer._crossed.values())
        _, shadows = split(trip.gateway)
        assert shadows == []


async def test_a_shadow_is_not_shortened_to_what_its_cap_has_left(tmp_path: Path) -> None:
    clamps = '[budget]\nwhen_short = "clamp"\nmin_tokens = 1\n'
    async with shadowed(tmp_path, policy=shadowing(usd="0.0002"), budget=clamps) as trip:
        assert (await trip.ask()).status == 200
        await at_rest(trip)
        assert (results(trip), trip.second.turns) == ({"refused": 1}, [])


async def test_a_model_without_a_price_is_asked_by_no_shadow(tmp_path: Path) -> None:
    prices = PRICES.replace('"*"', '"first/*"')
    async with shadowed(tmp_path, config=prices, caps="") as trip:
        assert (await trip.ask()).status == 200
        await at_rest(trip)
        assert (results(trip), trip.second.turns) == ({"refused": 1}, [])


async def test_a_shadow_whose_cap_a_reload_took_away_is_not_sent(tmp_path: Path) -> None:
    async with shadowed(tmp_path, policy=shadowing(0.000001)) as trip:
        runtime = trip.gateway.runtime
        real = OpenCall(runtime, "req-1")
        real.record.agent, real.record.variant = "qa_agent", "baseline"
        agent = runtime.plan.agents["qa_agent"]
        call = ShadowCall(real, agent, agent.finetuned[0])
        runtime.books.change_rules(rule for rule in runtime.books.rules if not rule.counts_shadows)
        with pytest.raises(Refused, match="caps changed"):
            await call.ask(chat_body())
        call.close(None)
        await at_rest(trip)
        assert trip.second.turns == []
        assert [row.state for row in await trip.booked()] == ["void"]


def chat_body() -> Any:
    from gateway.domain.wire import read_chat

    return read_chat(msgspec.json.encode(chat()))


async def test_no_caller_may_pass_for_a_shadow(tmp_path: Path) -> None:
    async with shadowed(tmp_path) as trip:
        answer = await trip.ask(headers={"x-gateway-operation": SHADOW})
        assert (answer.status, answer.error["code"], answer.error["param"]) == (
            400, "invalid_header", "x-gateway-operation",
        )  # fmt: skip
        assert trip.first.turns == []
        assert await trip.booked() == []


@pytest.mark.parametrize(
    ("before", "after", "count"), [(shadowing(), OFF, 0), (OFF, shadowing(), 1)], ids=["off", "on"]
)
async def test_a_call_that_ends_after_a_reload_has_a_shadow_under_the_policy_that_pays_for_it(
    tmp_path: Path, before: str, after: str, count: int
) -> None:
    may_answer = asyncio.Event()

    async def waits(turn: Turn) -> None:
        await may_answer.wait()
        await turn.reply(completion())

    async with shadowed(tmp_path, waits, policy=before) as trip:
        asking = asyncio.create_task(trip.ask())
        await trip.first.turn()
        await trip.gateway.reload(policy=after + AT_ONCE + WIDE_CAPS)
        may_answer.set()
        assert (await asking).status == 200
        await trip.let_others_act()
        await at_rest(trip)
        assert len(trip.second.turns) == count
        assert Counter(row.on.operation for row in await trip.booked()) == Counter(inference=1, **{SHADOW: count})


# --- Which calls have one ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "headers", "count"),
    [
        ({"user": "ann"}, {}, 1),
        ({}, {}, 1),
        ({"user": "ann"}, {"x-gateway-variant": "baseline"}, 0),
        ({"user": "ann", "model": "no_such_agent"}, {}, 0),
        ({"user": "ann", "model": "first/z"}, {}, 0),
        ({"user": "ann", "model": "other_agent"}, {}, 0),
        ({"user": "ann", "model": "same_agent"}, {}, 0),
    ],
    ids=["assigned", "no user", "forced", "unknown agent", "raw model", "agent not named", "no other model"],
)
async def test_only_calls_whose_arm_was_assigned_have_one(
    tmp_path: Path, fields: dict[str, Any], headers: Mapping[str, str], count: int
) -> None:
    policy = shadowing(more='agents = ["qa_agent", "same_agent"]')
    async with shadowed(tmp_path, policy=policy) as trip:
        assert (await trip.ask(headers=headers, **fields)).status == 200
        await trip.let_others_act()
        await at_rest(trip)
        assert len(trip.second.turns) == sum(results(trip).values()) == count


async def test_a_call_that_failed_has_none(tmp_path: Path) -> None:
    async with shadowed(tmp_path, refuses(500)) as trip:
        assert (await trip.ask()).status == 500
        assert (await trip.ask(messages=[])).status == 400
        await trip.let_others_act()
        assert (results(trip), trip.second.turns) == ({}, [])


async def test_a_caller_who_left_has_none(tmp_path: Path) -> None:
    may_answer = asyncio.Event()

    async def waits(turn: Turn) -> None:
        await may_answer.wait()
        await turn.reply(completion())

    async with shadowed(tmp_path, waits, budget=AT_ONCE.replace("abort", "drain")) as trip:
        asking = asyncio.create_task(trip.ask())
        await trip.first.turn()
        asking.cancel()
        await trip.until(lambda: trip.gateway.runtime.lingering)
        may_answer.set()
        await trip.until(lambda: not trip.gateway.runtime.lingering)
        assert trip.record.client_left
        assert (results(trip), trip.second.turns) == ({}, [])


async def test_the_share_is_thrown_with_the_gateways_dice(tmp_path: Path) -> None:
    async with shadowed(tmp_path, policy=shadowing(25)) as trip:
        trip.gateway.runtime.dice.seed(7)
        for _ in range(40):
            await trip.ask()
            await at_rest(trip)
        dice = Random(7)
        wanted = sum(dice.random() * 100 < 25 for _ in range(40))
        assert 0 < wanted < 40
        assert results(trip) == {"ok": wanted}


async def test_where_no_shadow_is_wanted_no_dice_are_thrown(tmp_path: Path) -> None:
    async with shadowed(tmp_path, policy=OFF) as trip:
        before = trip.gateway.runtime.dice.getstate()
        await trip.ask()
        await trip.ask(stream=True)
        assert trip.gateway.runtime.dice.getstate() == before


# --- What is left out, and how it ends --------------------------------------------------------------------------------


async def test_what_would_be_more_than_may_be_under_way_is_dropped(tmp_path: Path) -> None:
    async with shadowed(tmp_path, shadow=silent, policy=shadowing(more="max_in_flight = 2")) as trip:
        for _ in range(5):
            assert (await trip.ask()).status == 200
        await trip.second.turn(1)
        assert results(trip) == {"dropped": 3}
        assert len(trip.gateway.runtime.shadows) == 2
        assert len(trip.second.turns) == 2


async def test_a_model_that_calls_leave_alone_is_left_alone_by_shadows(tmp_path: Path) -> None:
    async with shadowed(
        tmp_path, policy=shadowing(more="[breakers]\nconsecutive = 1\nopen_s = 600\nmax_open_s = 600")
    ) as trip:
        breaker = trip.breaker("second/ft:b")
        breaker.failed(Admission.ORDINARY, asyncio.get_running_loop().time())
        assert breaker.state is State.OPEN
        assert (await trip.ask()).status == 200
        assert (results(trip), trip.second.turns) == ({"dropped": 1}, [])


async def test_a_draining_gateway_begins_none(tmp_path: Path) -> None:
    may_answer = asyncio.Event()

    async def waits(turn: Turn) -> None:
        await may_answer.wait()
        await turn.reply(completion())

    async with shadowed(tmp_path, waits) as trip:
        asking = asyncio.create_task(trip.ask())
        await trip.first.turn()
        trip.gateway.runtime.is_draining = True
        may_answer.set()
        assert (await asking).status == 200
        await trip.until(lambda: results(trip))
        assert (results(trip), trip.second.turns) == ({"dropped": 1}, [])


SHADOWED_PROCESS = (
    "[ab_testing]\nenabled = true\nrollout_percentage = 0\n"
    '[shadow]\npercent = 100\nusd = "1"\nper = "total"\n'
    '[[caps]]\nscope = "global"\nper = "total"\nusd = "1"\n'
)


async def hangs_for_shadows(turn: Turn) -> None:
    if turn.json()["model"] == "ft:a":
        await silent(turn)
    else:
        await turn.reply(completion())


async def test_a_drain_ends_shadows_in_its_time_and_leaves_them_in_doubt(tmp_path: Path) -> None:
    async with scripted(hangs_for_shadows) as provider:
        files = Files(tmp_path, provider)
        files.write_config(server="drain_s = 0.1", more=PRICES)
        files.write_policy(SHADOWED_PROCESS)
        async with process(files) as gateway:
            status, id, _ = await gateway.ask()
            await provider.turn(1)
            gateway.child.send_signal(signal.SIGTERM)
            assert (status, await gateway.ended()) == (200, 0)
        rows = {row.id: (row.state, row.on.operation) for row in files.ledger()}
        assert rows == {f"{id}.1": ("posted", "inference"), f"{id}-shadow.1": ("in_doubt", SHADOW)}
        call, shadow = files.records()
        assert (call.error, shadow.error, shadow.shadow_of) == ("", "draining", id)


async def test_a_drain_lets_a_shadow_end_that_can(tmp_path: Path) -> None:
    may_answer = asyncio.Event()

    async def waits(turn: Turn) -> None:
        if turn.json()["model"] == "ft:a":
            await may_answer.wait()
        await turn.reply(completion())

    async with scripted(waits) as provider:
        files = Files(tmp_path, provider)
        files.write_config(more=PRICES)
        files.write_policy(SHADOWED_PROCESS)
        async with process(files) as gateway:
            await gateway.ask()
            await provider.turn(1)
            gateway.child.send_signal(signal.SIGTERM)
            await gateway.logged("draining")
            may_answer.set()
            assert await gateway.ended() == 0
        assert [row.state for row in files.ledger()] == ["posted", "posted"]


async def test_after_a_kill_the_doubt_is_in_the_shadows_account_only(tmp_path: Path) -> None:
    async with scripted(hangs_for_shadows) as provider:
        files = Files(tmp_path, provider)
        files.write_config(more=PRICES)
        files.write_policy(SHADOWED_PROCESS)
        async with process(files) as gateway:
            _, id, _ = await gateway.ask()
            await provider.turn(1)
            gateway.child.kill()
            await gateway.ended()
        async with process(files) as gateway:
            await gateway.logged("under way when this gateway ended last")
            rows = {row.id: row for row in files.ledger()}
            assert {name: row.state for name, row in rows.items()} == {
                f"{id}.1": "posted",
                f"{id}-shadow.1": "in_doubt",
            }
            _, text = await gateway.admin("/metrics")
        real, doubt = (rows[name].amounts.nusd / 10**9 for name in (f"{id}.1", f"{id}-shadow.1"))
        figures = {}
        for line in text.split("\n"):
            found = re.match(r'gateway_cap_(posted|in_doubt)\{cap="([^"]+)",unit="usd"\} (\S+)', line)
            if found:
                figures[found[2], found[1]] = float(found[3])
        assert figures == {
            ("dev: global usd total", "posted"): pytest.approx(real),
            ("dev: global usd total", "in_doubt"): 0.0,
            (OWN_CAP, "posted"): pytest.approx(doubt),
            (OWN_CAP, "in_doubt"): pytest.approx(doubt),
        }
