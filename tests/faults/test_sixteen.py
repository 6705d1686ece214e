"""The field's neutral list of sixteen faults, each streamed through a real gateway from providers that break on cue.

`make failover` runs this file and prints the scorecard. Every test says what the client got, how many tries each
provider saw and in which order, and that the next call works. What the list counts in seconds of silence is scaled to
tenths by configuration (S06, S07, S09, S11); what it counts in waits and minutes (S01, S02, S15) runs at its own size,
on a clock that the test moves.
"""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gateway.edge import relay
from tests.faults.stage import SHORT, TEXT, WORDS, Clock, check_at_rest, check_honest, check_serves_on, stage, timeouts
from tests.journey import PATIENCE_S, PRICES, QUICK_RETRIES, Answer, Journey
from tests.scripted import (
    DONE,
    USAGE,
    Scene,
    Turn,
    chunk,
    completion,
    delta,
    error_body,
    finish,
    refuses,
    resets,
    says,
    silent,
    streams,
    usage_chunk,
)  # fmt: skip

GOOD = says(*WORDS)
# Forty of the sixty words.
FORTY = tuple(delta(word) for word in WORDS[:40])
OVERLOADED = refuses(503, error_body("Overloaded."))
SLOW_DOWN = error_body("Slow down.", type="rate_limit_error", code="rate_limit_exceeded")
Saw = Callable[[str], None]


@pytest.fixture
def saw(record_property: Callable[[str, object], None]) -> Saw:
    """Notes for the scorecard what was seen."""
    return lambda text: record_property("saw", text)


async def ask(trip: Journey, **fields: Any) -> Answer:
    """The streamed call that the fault befalls, whose answer is whole or honestly is not."""
    return await trip.ask(stream=True, stream_options={"include_usage": True}, **fields)


def check_whole(answer: Answer) -> None:
    assert (answer.status, check_honest(answer)) == (200, ""), answer.body


def check_tries(trip: Journey, first: int, second: int) -> None:
    """See how often each provider was asked, in the order of the chain, and that the record says the same."""
    assert (len(trip.first.turns), len(trip.second.turns)) == (first, second)
    tried = [attempt.ref.partition("/")[0] for attempt in trip.record.attempts]
    assert tried == ["first"] * first + ["second"] * second


async def cut_after_forty(turn: Turn) -> None:
    """Two thirds of the answer, and then the connection is gone."""
    await turn.begin_stream()
    for data in FORTY:
        await turn.event(data)
    turn.close()


def continues_or(otherwise: Scene) -> Scene:
    """A provider that goes on from an answer that has begun; it plays `otherwise` where it is not asked to."""

    async def scene(turn: Turn) -> None:
        last = turn.json()["messages"][-1]
        if last["role"] != "assistant":
            await otherwise(turn)
            return
        assert TEXT.startswith(last["content"])
        await says(TEXT[len(last["content"]) :])(turn)

    return scene


# --- Before the first token ------------------------------------------------------------------------------------------


async def test_s01_429_once_with_retry_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saw: Saw) -> None:
    clock = Clock(monkeypatch)
    async with stage(tmp_path, refuses(429, SLOW_DOWN, {"Retry-After": "2"}), GOOD, policy="") as trip:
        check_whole(await ask(trip))
        check_tries(trip, 2, 0)
        (wait_s,) = clock.waits_s
        assert 2.0 <= wait_s <= 2.25
        saw(f"waited {wait_s:.2f} s, retried, whole answer")
        await check_serves_on(trip)


async def test_s01_a_retry_after_beyond_the_deadline_fails_over_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    async with stage(tmp_path, refuses(429, SLOW_DOWN, {"Retry-After": "2"}), policy="") as trip:
        check_whole(await ask(trip, headers={"x-gateway-timeout-ms": "1900"}))
        check_tries(trip, 1, 1)
        assert clock.waits_s == []
        await check_serves_on(trip)


async def test_s02_429_without_retry_after_persistent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saw: Saw
) -> None:
    clock = Clock(monkeypatch)
    async with stage(tmp_path, refuses(429, SLOW_DOWN), policy="") as trip:
        check_whole(await ask(trip))
        check_tries(trip, 3, 1)
        one_s, two_s = clock.waits_s
        assert 0 < one_s <= 0.25
        assert 0 < two_s <= 0.5
        for _ in range(19):
            check_whole(await ask(trip))
        # A share of its calls and a few more, however long it goes on.
        assert len(trip.first.turns) <= 20 + max(3, 20 * 0.2)
        saw(f"3 tries with backoff, fell over; over 20 calls {len(trip.first.turns)} tries in all")
        await check_serves_on(trip)


async def test_s03_500_once(tmp_path: Path, saw: Saw) -> None:
    async with stage(tmp_path, refuses(500, error_body()), GOOD) as trip:
        check_whole(await ask(trip))
        check_tries(trip, 2, 0)
        assert not trip.record.is_fallback
        saw("one retry on the same upstream, whole answer")
        await check_serves_on(trip)


async def test_s04_503_persistent(tmp_path: Path, saw: Saw) -> None:
    async with stage(tmp_path, OVERLOADED) as trip:
        check_whole(await ask(trip))
        check_tries(trip, 2, 1)
        saw("2 tries, then the fallback's whole answer")
        await check_serves_on(trip)


async def test_s05_reset_before_headers(tmp_path: Path, saw: Saw) -> None:
    async with stage(tmp_path, resets) as trip:
        check_whole(await ask(trip))
        check_tries(trip, 2, 1)
        saw("2 tries, then the fallback's whole answer")
        await check_serves_on(trip)


async def test_s05_reset_once_is_retried_where_it_happened(tmp_path: Path) -> None:
    async with stage(tmp_path, resets, GOOD) as trip:
        check_whole(await ask(trip))
        check_tries(trip, 2, 0)
        await check_serves_on(trip)


async def test_s06_accepts_and_never_answers(tmp_path: Path, saw: Saw) -> None:
    async with stage(tmp_path, silent, first_table=timeouts(SHORT)) as trip:
        check_whole(await ask(trip))
        check_tries(trip, 1, 1)
        assert trip.record.attempts[0].fault == "first_byte"
        assert trip.first.turns[0].peer_left.is_set()
        saw("one silence, not asked again; the fallback's whole answer")
        await check_serves_on(trip)


async def test_s07_headers_at_once_and_no_first_token(tmp_path: Path, saw: Saw) -> None:
    async def preamble(turn: Turn) -> None:
        await turn.begin_stream()
        await turn.event(chunk({"role": "assistant", "content": ""}))
        await silent(turn)

    async with stage(tmp_path, preamble, first_table=timeouts(SHORT)) as trip:
        check_whole(await ask(trip))
        check_tries(trip, 1, 1)
        assert trip.record.attempts[0].fault == "first_token"
        saw("one try up to the first-token limit; the fallback's whole answer")
        await check_serves_on(trip)


# --- After it --------------------------------------------------------------------------------------------------------


async def test_s08_stream_cut_after_40_of_60_tokens(tmp_path: Path, saw: Saw) -> None:
    async with stage(tmp_path, cut_after_forty) as trip:
        answer = await ask(trip)
        check_whole(answer)
        check_tries(trip, 1, 1)
        assert len({one["id"] for one in answer.chunks}) == 1
        saw("whole answer: the fallback's, less what the client had")
        await check_serves_on(trip)


async def test_s08_cut_and_continued_by_prefix(tmp_path: Path) -> None:
    async with stage(tmp_path, cut_after_forty, second=(continues_or(GOOD),), second_table="continues = true") as trip:
        check_whole(await ask(trip))
        check_tries(trip, 1, 1)
        await check_serves_on(trip)


@pytest.mark.parametrize(
    "second",
    [
        pytest.param(says("Something ", "else."), id="another answer"),
        pytest.param(says(*WORDS[:20]), id="a shorter one"),
        pytest.param(streams(*FORTY[:20], DONE), id="a shorter one without a finish_reason"),
        pytest.param(OVERLOADED, id="none"),
    ],
)
async def test_s08_cut_and_the_fallback_says_something_else(tmp_path: Path, second: Scene) -> None:
    async with stage(tmp_path, cut_after_forty, second=(second,)) as trip:
        answer = await ask(trip)
        assert (answer.status, check_honest(answer)) == (200, "upstream_cut")
        assert answer.streamed_text == "".join(WORDS[:40])
        assert trip.record.error == "upstream_cut"
        await check_serves_on(trip)


async def test_s08_held_streams_and_streams_without_a_fallback(tmp_path: Path) -> None:
    policy = '[retries]\nbase_s = 0.001\n[stream]\nagents = { qa_agent = "hold", lone_agent = "error" }\n'
    other = "Something else, and whole."
    async with stage(tmp_path, cut_after_forty, second=(says(other),), policy=policy) as trip:
        answer = await ask(trip)
        assert (answer.status, check_honest(answer, whole=other)) == (200, "")
        answer = await ask(trip, model="lone_agent")
        assert (answer.status, check_honest(answer)) == (200, "upstream_cut")
        await check_serves_on(trip)


CALL = chunk({"tool_calls": [{"index": 0, "id": "a", "function": {"name": "pay", "arguments": '{"sum'}}]})


@pytest.mark.parametrize(
    "odd",
    [
        pytest.param(CALL, id="a tool call"),
        pytest.param({**delta("no"), "choices": []}, id="no choices"),
        pytest.param(chunk({"content": [{"type": "text", "text": TEXT}]}), id="content in parts"),
        pytest.param({**delta(""), "choices": [{"index": 0, "delta": None, "finish_reason": None}]}, id="null"),
        pytest.param({**delta(""), "choices": [{"index": 0, "delta": "text", "finish_reason": None}]}, id="text"),
        pytest.param({**delta(""), "choices": [{"index": 1, "delta": {"content": "x"}}]}, id="another choice"),
    ],
)
async def test_s08_cut_and_the_fallbacks_answer_is_odd(tmp_path: Path, odd: Any) -> None:
    """Whatever comes in the second stream, what the client has is whole in the end, or ends in an error."""
    second = streams(*map(delta, WORDS[:50]), odd, *map(delta, WORDS[50:]), finish(), DONE)
    async with stage(tmp_path, cut_after_forty, second=(second,)) as trip:
        answer = await ask(trip)
        assert answer.status == 200
        assert check_honest(answer) in ("", "upstream_cut")
        assert b"tool_calls" not in answer.body
        await check_serves_on(trip)


async def test_s08_the_arguments_of_a_tool_call_are_never_spliced(tmp_path: Path) -> None:
    rest = chunk({"tool_calls": [{"index": 0, "function": {"arguments": '": 7}'}}]})

    async def cut(turn: Turn) -> None:
        await turn.begin_stream()
        await turn.event(CALL)
        turn.close()

    async with stage(tmp_path, cut, second=(streams(CALL, rest, finish("tool_calls"), DONE),)) as trip:
        answer = await ask(trip)
        assert (answer.status, check_honest(answer)) == (200, "upstream_cut")
        assert answer.body.count(b"tool_calls") == 1
        check_tries(trip, 1, 0)
        await check_serves_on(trip)


async def test_s09_stream_stalls_with_the_connection_open(tmp_path: Path, saw: Saw) -> None:
    async def stalls(turn: Turn) -> None:
        await turn.begin_stream()
        for data in FORTY:
            await turn.event(data)
        await silent(turn)

    async with stage(tmp_path, stalls, first_table=timeouts("stall_s = 0.2")) as trip:
        check_whole(await ask(trip))
        check_tries(trip, 1, 1)
        assert trip.record.attempts[0].fault == "stall"
        assert trip.first.turns[0].peer_left.is_set()
        answer = await ask(trip, model="lone_agent")
        assert (answer.status, check_honest(answer)) == (200, "upstream_timeout")
        saw("whole answer through the fallback; without one, an error event")
        await check_serves_on(trip)


async def test_s09_a_held_stream_stalls_no_longer_than_another(tmp_path: Path) -> None:
    async def stalls(turn: Turn) -> None:
        await turn.begin_stream()
        await turn.event(FORTY[0])
        await silent(turn)

    policy = QUICK_RETRIES + '[stream]\non_cut = "hold"\n'
    async with stage(tmp_path, stalls, first_table=timeouts("stall_s = 0.2"), policy=policy) as trip:
        check_whole(await ask(trip))
        check_tries(trip, 1, 1)
        assert trip.record.attempts[0].fault == "stall"
        await check_serves_on(trip)


async def test_s10_malformed_event_in_the_middle(tmp_path: Path, saw: Saw) -> None:
    malformed = b'{"id": "chatcmpl-1", "choices": [{"delta": {"con'
    rest = (delta(word) for word in WORDS[40:])
    async with stage(tmp_path, streams(*FORTY, malformed, *rest, finish(), usage_chunk(), DONE)) as trip:
        answer = await ask(trip)
        check_whole(answer)
        check_tries(trip, 1, 0)
        assert malformed not in answer.body
        saw("the event was skipped, the rest came")
        await check_serves_on(trip)


@pytest.mark.parametrize("is_held", [False, True])
async def test_s11_complete_without_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saw: Saw, is_held: bool
) -> None:
    monkeypatch.setattr(relay, "GRACE_S", 0.05)

    async def without_done(turn: Turn) -> None:
        await turn.begin_stream()
        for data in (*map(delta, WORDS), finish(), usage_chunk()):
            await turn.event(data)
        await (silent(turn) if is_held else turn.end())

    async with stage(tmp_path, without_done) as trip:
        answer = await ask(trip)
        check_whole(answer)
        check_tries(trip, 1, 0)
        assert [one["usage"] for one in answer.chunks if one.get("usage")] == [USAGE]
        assert trip.record.cost_basis == "exact"
        saw("finished, [DONE] added, usage reported")
        await check_serves_on(trip)


# --- Refusals that are about the request -----------------------------------------------------------------------------


async def test_s12_context_length_exceeded(tmp_path: Path, saw: Saw) -> None:
    too_long = error_body("Too long.", type="invalid_request_error", code="context_length_exceeded", param="messages")
    agents = """
[agents.qa_agent]
finetuned = "first/ft:a"
baseline  = "first/a"
fallbacks = ["first/smaller", "second/larger"]
"""
    sizes = '[context_tokens]\n"first/a" = 8192\n"first/smaller" = 4096\n"second/larger" = 128000\n'
    async with stage(tmp_path, refuses(400, too_long), agents=agents, config=PRICES + sizes) as trip:
        check_whole(await ask(trip))
        assert [turn.json()["model"] for turn in trip.first.turns] == ["a"]
        assert [turn.json()["model"] for turn in trip.second.turns] == ["larger"]
        saw("no retry; straight to the model with a larger context")
        await check_serves_on(trip)


async def test_s12_without_a_larger_model_the_reason_goes_to_the_client(tmp_path: Path) -> None:
    too_long = error_body("Too long.", type="invalid_request_error", code="context_length_exceeded", param="messages")
    async with stage(tmp_path, refuses(400, too_long)) as trip:
        answer = await ask(trip, model="lone_agent")
        assert (answer.status, check_honest(answer)) == (400, "context_length_exceeded")
        assert answer.error["param"] == "messages"
        check_tries(trip, 1, 0)
        await check_serves_on(trip)


async def test_s13_content_filter(tmp_path: Path, saw: Saw) -> None:
    filtered = error_body("That breaks our policy.", type="invalid_request_error", code="content_filter")
    async with stage(tmp_path, refuses(400, filtered)) as trip:
        answer = await ask(trip)
        assert (answer.status, check_honest(answer)) == (400, "content_filter")
        assert answer.error["message"] == "That breaks our policy."
        check_tries(trip, 1, 0)
        saw("no retry, no fallback, the provider's own reason")
        await check_serves_on(trip)


def rejects_prefill(otherwise: Scene) -> Scene:
    """A provider that takes no answer that has begun."""

    async def scene(turn: Turn) -> None:
        if turn.json()["messages"][-1]["role"] == "assistant":
            await turn.reply(error_body("No prefill here.", type="invalid_request_error"), 400)
        else:
            await otherwise(turn)

    return scene


async def test_s14_cut_and_the_fallback_rejects_a_prefill(tmp_path: Path, saw: Saw) -> None:
    async with stage(
        tmp_path, cut_after_forty, second=(rejects_prefill(GOOD),), second_table="continues = true"
    ) as trip:
        check_whole(await ask(trip))
        check_tries(trip, 1, 2)
        roles = [turn.json()["messages"][-1]["role"] for turn in trip.second.turns]
        assert roles == ["assistant", "user"]
        saw("prefill refused, restarted cleanly, whole answer")
        await check_serves_on(trip)


async def test_s14_a_model_that_does_not_declare_it_is_sent_no_prefill(tmp_path: Path) -> None:
    async with stage(tmp_path, cut_after_forty, second=(rejects_prefill(GOOD),)) as trip:
        check_whole(await ask(trip))
        check_tries(trip, 1, 1)
        await check_serves_on(trip)


@pytest.mark.parametrize("then", [says("Something else."), OVERLOADED, refuses(400, error_body("Nor this."))])
async def test_s14_the_prefills_400_never_masks_the_real_error(tmp_path: Path, then: Scene) -> None:
    async with stage(
        tmp_path, cut_after_forty, second=(rejects_prefill(then),), second_table="continues = true"
    ) as trip:
        answer = await ask(trip)
        assert (answer.status, check_honest(answer)) == (200, "upstream_cut")
        assert b"No prefill here" not in answer.body
        await check_serves_on(trip)


# --- Over many calls -------------------------------------------------------------------------------------------------


async def test_s15_down_for_60_s_then_healthy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saw: Saw) -> None:
    clock = Clock(monkeypatch)
    began_s = clock.now_s
    served_by: list[tuple[float, str]] = []
    seen: list[int] = []
    async with stage(tmp_path, resets, policy="") as trip:
        for place in range(20):
            clock.now_s = max(clock.now_s, began_s + 5 * place)
            if clock.now_s >= began_s + 60:
                trip.first.then(GOOD)
            check_whole(await ask(trip))
            served_by.append((clock.now_s - began_s, trip.gateway.journal()[-1].model_sent))
            seen.append(len(trip.first.turns))
        while_down = [ref for at_s, ref in served_by if at_s < 60]
        assert len(while_down) == 12
        assert set(while_down) == {"second/b"}
        # Five faults open the circuit; after that, a probe now and then.
        assert seen[2] == 5
        assert seen[11] - seen[2] <= 4
        back_s = next(at_s for at_s, ref in served_by if ref == "first/a")
        assert back_s <= 60 + 30 + 5
        assert {ref for at_s, ref in served_by if at_s >= back_s} == {"first/a"}
        saw(f"20 of 20 answered; {seen[11]} tries in 60 s of outage; back {back_s - 60:.0f} s after it ended")
        await check_serves_on(trip)


async def test_s15_a_model_whose_circuit_has_opened_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    slow_down = refuses(503, error_body(), {"Retry-After": "3"})
    async with stage(tmp_path, slow_down, policy="[breakers]\nconsecutive = 1\n") as trip:
        check_whole(await ask(trip))
        check_tries(trip, 1, 1)
        assert clock.waits_s == []
        await check_at_rest(trip)


async def test_s15_one_probe_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    may_answer = asyncio.Event()

    async def slow(turn: Turn) -> None:
        await may_answer.wait()
        await GOOD(turn)

    async with stage(tmp_path, resets, policy="") as trip:
        while len(trip.first.turns) < 5:
            check_whole(await ask(trip))
        trip.first.then(slow)
        clock.now_s += 5.5
        calls = [asyncio.create_task(ask(trip)) for _ in range(20)]
        probe = await trip.first.turn(5)
        async with asyncio.timeout(PATIENCE_S):
            while sum(call.done() for call in calls) < 19:
                await trip.let_others_act()
        assert trip.first.turns[5:] == [probe]
        may_answer.set()
        for call in calls:
            check_whole(await call)
        check_whole(await ask(trip))
        assert len(trip.first.turns) == 7
        await check_serves_on(trip)


async def test_s16_model_and_usage_reported_are_the_fallbacks(tmp_path: Path, saw: Saw) -> None:
    usage = {"prompt_tokens": 21, "completion_tokens": 60, "total_tokens": 81}
    answer_of_second = (*map(delta, WORDS), finish(), {**usage_chunk(), "usage": usage})
    events = [{**one, "model": "scripted-2"} for one in answer_of_second]
    async with stage(tmp_path, OVERLOADED, second=(streams(*events, DONE),)) as trip:
        answer = await ask(trip)
        check_whole(answer)
        check_tries(trip, 2, 1)
        assert {one["model"] for one in answer.chunks} == {"scripted-2"}
        assert [one["usage"] for one in answer.chunks if one.get("usage")] == [usage]
        record = trip.record
        assert (record.model_sent, record.model_answered, record.is_fallback) == ("second/b", "scripted-2", True)
        assert answer.headers["x-gateway-fallback"] == "first/a"
        assert answer.headers["x-gateway-attempts"] == "3"
        cost_nusd = 21 * 1_000 + 60 * 2_000
        assert [attempt.cost_nusd for attempt in record.attempts] == [0, 0, cost_nusd]
        assert record.cost_nusd == cost_nusd
        posted = [account.used for account in trip.gateway.runtime.books._accounts.values()]
        assert posted == [cost_nusd, 1, 81]
        saw("the fallback's model and usage; failed attempts cost nothing")
        await check_serves_on(trip)


@pytest.mark.parametrize("fault", [OVERLOADED, resets])
async def test_s16_holds_for_plain_answers_too(tmp_path: Path, fault: Scene) -> None:
    plain = refuses(200, msgspec.json.encode(completion(TEXT, model="scripted-2")))
    async with stage(tmp_path, fault, second=(plain,)) as trip:
        answer = await trip.ask()
        check_whole(answer)
        check_tries(trip, 2, 1)
        assert answer.json()["model"] == "scripted-2"
        assert answer.headers["x-gateway-model"] == "second/b"
        assert trip.record.usage is not None
        assert trip.record.usage.prompt_tokens == USAGE["prompt_tokens"]
        await check_at_rest(trip)
