"""One call's way through the gateway, from a client's socket to a provider's and back, the journal in between."""

import asyncio
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from gateway.decide.assign import bucket_of
from gateway.edge import chat
from tests.journey import Answer, Journey, full_disk, journey
from tests.raw_http import connected, ordinary, request
from tests.scripted import (
    DONE,
    Scene,
    Turn,
    chunk,
    completion,
    delta,
    error_body,
    event,
    refuses,
    says,
    silent,
    streams,
)

# --- The answer -------------------------------------------------------------------------------------------------------


async def test_a_plain_answer_is_passed_on_to_the_byte(tmp_path: Path) -> None:
    body = b' {"choices": [ {"index":0, "message": {"content": "Gr\\u00fc\xc3\x9fe"}, "x": 1.0 } ], "vendor": {}} \n'
    async with journey(tmp_path, refuses(200, body)) as trip:
        answer = await trip.ask()
        assert (answer.status, answer.body) == (200, body)
        assert answer.headers["Content-Type"] == "application/json"


async def test_the_headers_tell_how_the_answer_came_about(tmp_path: Path) -> None:
    limits = {"x-ratelimit-remaining-tokens": "99", "X-RateLimit-Reset": "1s", "x-internal": "a", "Server": "nginx"}
    async with journey(tmp_path, says("Paris", headers=limits)) as trip:
        for stream in (False, True):
            answer = await trip.ask(stream=stream, user="u1")
            record = trip.gateway.journal()[-1]
            told = {name.lower(): value for name, value in answer.headers.items()}
            del told["date"]
            only_plain = {
                "content-length": str(len(answer.body)),
                "content-type": "application/json",
                "x-gateway-cost-usd": "0.000025",
                "x-gateway-overhead-ms": f"{float(told.get('x-gateway-overhead-ms', 0)):.3f}",
                "x-gateway-budget-remaining-usd": "999.999975",
            }
            only_streamed = {
                "content-type": "text/event-stream; charset=utf-8",
                "cache-control": "no-cache",
                "transfer-encoding": "chunked",
            }
            assert told == {
                "server": "genesis-gateway",
                "x-request-id": record.id,
                "x-gateway-agent": "qa_agent",
                "x-gateway-route": "named as the model",
                "x-gateway-variant": "baseline",
                "x-gateway-bucket": str(bucket_of("qa_agent", "u1")),
                "x-gateway-model": "first/a",
                "x-gateway-attempts": "1",
                "x-ratelimit-remaining-tokens": "99",
                "x-ratelimit-reset": "1s",
                **(only_streamed if stream else only_plain),
            }


async def test_three_names_of_the_model_are_kept_apart(tmp_path: Path) -> None:
    async with journey(tmp_path, says("Paris")) as trip:
        for stream in (False, True):
            await trip.ask(model="agent/qa_agent", stream=stream)
            record = trip.gateway.journal()[-1]
            names = (record.model_asked, record.model_sent, record.model_answered)
            assert names == ("agent/qa_agent", "first/a", "scripted-1")
        assert {turn.json()["model"] for turn in trip.first.turns} == {"a"}


async def test_the_record_is_in_the_journal_before_the_client_has_the_answer(tmp_path: Path) -> None:
    async with journey(tmp_path, says("Paris")) as trip, trip.post() as response:
        # The head has come, the body has not been read.
        record = trip.record
        assert response.headers["x-request-id"] == record.id
        assert (record.status, record.cost_nusd, record.cost_basis) == (200, 25_000, "exact")


# --- The request ------------------------------------------------------------------------------------------------------


async def test_defaults_fill_what_was_left_out_and_never_override(tmp_path: Path) -> None:
    async with journey(tmp_path, says("Paris")) as trip:
        await trip.ask()
        await trip.ask(temperature=0, max_tokens=5, seed=3)
        await trip.ask(max_completion_tokens=9, temperature=None)
        sent = [turn.json() for turn in trip.first.turns]
        keys = ("temperature", "max_tokens", "max_completion_tokens", "seed")
        assert [tuple(one.get(key) for key in keys) for one in sent] == [
            (0.7, 64, None, None),
            (0, 5, None, 3),
            (0.7, None, 9, None),
        ]
        assert [one["messages"] for one in sent] == [sent[0]["messages"]] * 3


async def test_a_ceiling_lowers_and_says_so(tmp_path: Path) -> None:
    limits = "[models]\nuse_finetuned = false\n[limits]\nmax_tokens = 32\ntemperature = 0.5\n"
    async with journey(tmp_path, says("Paris"), policy=limits) as trip:
        silently = await trip.ask()
        assert "x-gateway-fields-lowered" not in silently.headers
        answer = await trip.ask(max_tokens=1000, temperature=1.5)
        assert answer.headers["x-gateway-fields-lowered"] == "max_tokens, temperature"
        assert answer.headers["x-gateway-max-tokens-clamped"] == "32"
        for turn in trip.first.turns:
            assert (turn.json()["max_tokens"], turn.json()["temperature"]) == (32, 0.5)


# --- The experiment ---------------------------------------------------------------------------------------------------

EXPERIMENT = """
[models]
use_finetuned = true
[ab_testing]
enabled = true
rollout_percentage = 30
[overrides]
variant = true
"""


async def test_a_user_gets_the_arm_of_their_bucket_and_keeps_it(tmp_path: Path) -> None:
    async with journey(tmp_path, says("Paris"), policy=EXPERIMENT) as trip:
        seen: dict[str, set[tuple[str, str, str]]] = {}
        for _ in range(2):
            for user in map(str, range(20)):
                answer = await trip.ask(user=user)
                told = tuple(answer.headers[f"x-gateway-{name}"] for name in ("bucket", "variant", "model"))
                seen.setdefault(user, set()).add(told)  # type: ignore[arg-type]
        for user, arms in seen.items():
            bucket = bucket_of("qa_agent", user)
            treated = bucket < 3_000
            assert arms == {(str(bucket), *(("finetuned", "first/ft:a") if treated else ("baseline", "first/a")))}
        variants = {variant for ((_, variant, _),) in seen.values()}
        assert variants == {"finetuned", "baseline"}
        for record in trip.gateway.journal():
            assert record.share_bps == 3_000
            assert record.variant_from == "experiment"
            # The user is kept as a hash.
            assert len(record.user) == 32


async def test_without_a_user_the_baseline_answers(tmp_path: Path) -> None:
    everybody = EXPERIMENT.replace("30", "100")
    async with journey(tmp_path, says("Paris"), policy=everybody) as trip:
        answer = await trip.ask()
        assert answer.headers["x-gateway-variant"] == "baseline"
        assert "x-gateway-bucket" not in answer.headers
        assert trip.record.variant_from == "no user"
        assert (await trip.ask(user="anyone")).headers["x-gateway-variant"] == "finetuned"


async def test_the_finetuned_falls_back_to_the_baseline_and_stays_in_its_arm(tmp_path: Path) -> None:
    async def only_the_baseline(turn: Turn) -> None:
        scene = says("Paris") if turn.json()["model"] == "a" else refuses(404, error_body("retired"))
        await scene(turn)

    async with journey(tmp_path, only_the_baseline, policy=EXPERIMENT) as trip:
        answer = await trip.ask(headers={"x-gateway-variant": "finetuned"})
        assert answer.text == "Paris"
        assert answer.headers["x-gateway-variant"] == "finetuned"
        assert answer.headers["x-gateway-model"] == "first/a"
        assert answer.headers["x-gateway-fallback"] == "first/ft:a"
        assert (trip.record.variant, trip.record.is_fallback) == ("finetuned", True)


# --- Mistral ----------------------------------------------------------------------------------------------------------

MISTRAL = 'kind = "mistral"\nbase_url = "BASE_URL"\napi_key = "m"'
MISTRAL_USAGE = {"prompt_tokens": 100, "completion_tokens": 5, "total_tokens": 105, "num_cached_tokens": 40}
TOOL_CALL = {"id": "call12345", "function": {"name": "weather", "arguments": {"city": "Paris"}}, "index": 0}


async def test_mistral_is_asked_in_its_own_words(tmp_path: Path) -> None:
    async with journey(tmp_path, refuses(200, completion()), first_table=MISTRAL) as trip:
        fields: dict[str, Any] = {
            "seed": 1, "max_completion_tokens": 9, "temperature": 2, "user": "u1", "logit_bias": {"1": 1},
            "stream_options": {"include_usage": True}, "store": False,
        }  # fmt: skip
        answer = await trip.ask(**fields)
        sent = trip.first.turns[0].json()
        del sent["messages"]
        assert sent == {"model": "a", "random_seed": 1, "max_tokens": 9, "temperature": 1.5}
        assert set(answer.headers["x-gateway-fields-dropped"].split(", ")) == {"user", "logit_bias", "store"}


async def test_mistrals_answer_comes_out_as_openais(tmp_path: Path) -> None:
    parts = [{"type": "thinking", "thinking": []}, {"type": "text", "text": "Par"}, {"type": "text", "text": "is"}]
    message = {"role": "assistant", "content": parts, "tool_calls": [TOOL_CALL]}
    choice = {"index": 0, "message": message, "finish_reason": "model_length"}
    body = completion() | {"choices": [choice], "usage": MISTRAL_USAGE}
    async with journey(tmp_path, refuses(200, body), first_table=MISTRAL) as trip:
        answer = await trip.ask()
        (told,) = answer.json()["choices"]
        assert (told["message"]["content"], told["finish_reason"]) == ("Paris", "length")
        (call,) = told["message"]["tool_calls"]
        assert call["type"] == "function"
        assert msgspec.json.decode(call["function"]["arguments"]) == {"city": "Paris"}
        assert answer.json()["usage"]["prompt_tokens_details"] == {"cached_tokens": 40}
        usage = trip.record.usage
        assert usage is not None
        assert (usage.prompt_tokens, usage.cached_tokens) == (100, 40)
        assert trip.record.finish_reason == "length"


@pytest.mark.parametrize("is_asked", [False, True])
async def test_mistrals_stream_comes_out_as_openais(tmp_path: Path, is_asked: bool) -> None:
    events = (
        chunk({"role": "assistant", "content": ""}),
        chunk({"content": [{"type": "text", "text": "Par"}]}),
        chunk({"content": "is", "tool_calls": [TOOL_CALL]}),
        chunk({"content": ""}, "tool_calls", usage=MISTRAL_USAGE),
        DONE,
    )
    options = {"stream_options": {"include_usage": is_asked}}
    async with journey(tmp_path, streams(*events), first_table=MISTRAL) as trip:
        answer = await trip.ask(stream=True, **options)
        assert "stream_options" not in trip.first.turns[0].json()
        assert answer.streamed_text == "Paris"
        (call,) = answer.chunks[2]["choices"][0]["delta"]["tool_calls"]
        assert msgspec.json.decode(call["function"]["arguments"]) == {"city": "Paris"}
        # Usage came with the last content; it goes out in a chunk of its own, to who asked.
        with_usage = [one for one in answer.chunks if "usage" in one]
        assert [one["choices"] for one in with_usage] == ([[]] if is_asked else [])
        assert answer.events[-1] == DONE
        assert trip.record.usage is not None
        assert trip.record.usage.cached_tokens == 40


# --- Money ------------------------------------------------------------------------------------------------------------


async def test_a_cap_that_is_used_up_refuses_and_says_when_to_come_back(tmp_path: Path) -> None:
    cap = '[[caps]]\nscope = "global"\nper = "day"\nrequests = 2\n'
    async with journey(tmp_path, says("Paris"), caps=cap) as trip:
        assert [(await trip.ask()).status for _ in range(2)] == [200, 200]
        answer = await trip.ask()
        assert (answer.status, answer.error["type"], answer.error["code"]) == (
            429, "insufficient_quota", "budget_exceeded",
        )  # fmt: skip
        assert answer.headers["x-should-retry"] == "false"
        assert 1 <= int(answer.headers["Retry-After"]) <= 86_400
        assert len(trip.first.turns) == 2
        assert [record.status for record in trip.gateway.journal()] == [200, 200, 429]


async def test_what_calls_in_flight_hold_is_refused_as_passing(tmp_path: Path) -> None:
    cap = '[[caps]]\nscope = "global"\nper = "day"\nrequests = 1\n'
    async with journey(tmp_path, silent, caps=cap) as trip:
        waiting = asyncio.ensure_future(trip.ask())
        turn = await trip.first.turn()
        answer = await trip.ask()
        assert (answer.status, answer.error["code"]) == (429, "budget_reserved")
        assert answer.headers["x-should-retry"] == "true"
        waiting.cancel()
        await turn.peer_left.wait()


async def test_under_a_cap_in_dollars_a_model_without_a_price_is_not_asked(tmp_path: Path) -> None:
    async with journey(tmp_path, says("Paris"), config="") as trip:
        answer = await trip.ask()
        assert (answer.status, answer.error["code"]) == (402, "model_not_priced")
        assert answer.headers["x-should-retry"] == "false"
        assert not trip.first.turns


# --- The client leaves ------------------------------------------------------------------------------------------------


async def begins_and_waits(turn: Turn) -> None:
    await turn.begin_stream()
    await turn.event(delta("Pa"))
    await silent(turn)


async def has_head_only(turn: Turn) -> None:
    await turn.begin_stream()
    await silent(turn)


async def has_half_a_body(turn: Turn) -> None:
    await turn.raw(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n{")
    await silent(turn)


LEAVES: dict[str, tuple[Scene, bool]] = {
    "plain, before the head": (silent, False),
    "plain, inside the body": (has_half_a_body, False),
    "stream, before the head": (silent, True),
    "stream, before the first token": (has_head_only, True),
}


async def check_left(trip: Journey) -> None:
    """See that the provider is let go at once, that nothing is held, and that the record tells."""
    turn = await trip.first.turn()
    await turn.peer_left.wait()
    trip.check_at_rest()
    record = trip.record
    assert record.client_left
    assert (record.error, record.model_sent, record.cost_basis) == ("", "first/a", "bound")
    assert [one.fault for one in record.attempts] == [None]
    assert not trip.second.turns


@pytest.mark.parametrize("name", LEAVES)
async def test_a_client_that_leaves_ends_the_providers_work(tmp_path: Path, name: str) -> None:
    scene, stream = LEAVES[name]
    async with journey(tmp_path, scene) as trip, connected(trip.gateway.data_url) as connection:
        connection.send(request(body=ordinary(stream=stream)))
        await trip.first.turn()
        await trip.let_others_act()
        connection.close()
        await check_left(trip)


async def test_a_client_that_leaves_in_the_middle_of_a_stream_ends_the_providers_work(tmp_path: Path) -> None:
    async with journey(tmp_path, begins_and_waits) as trip:
        async with trip.post(stream=True) as response:
            await response.content.readuntil(event(delta("Pa")))
            response.close()
        await check_left(trip)


async def test_a_client_that_leaves_while_much_is_on_its_way_ends_the_providers_work(tmp_path: Path) -> None:
    async def talks_for_ever(turn: Turn) -> None:
        await turn.begin_stream()
        while True:
            await turn.event(delta("on and on "))

    async with journey(tmp_path, talks_for_ever) as trip:
        async with trip.post(stream=True, max_tokens=1_000_000) as response:
            await response.content.readuntil(event(delta("on and on ")))
            response.close()
        await check_left(trip)


async def test_many_clients_that_leave_leave_nothing_behind(tmp_path: Path) -> None:
    async with journey(tmp_path, begins_and_waits) as trip:
        for index in range(30):
            async with trip.post(stream=True) as response:
                await response.content.readuntil(event(delta("Pa")))
                response.close()
            await (await trip.first.turn(index)).peer_left.wait()
        trip.check_at_rest()
        assert [record.client_left for record in trip.gateway.journal()] == [True] * 30


# --- The journal fails ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
async def test_a_call_whose_hold_cannot_be_written_down_is_not_made(tmp_path: Path, stream: bool) -> None:
    async with journey(tmp_path, says("Pa", "ris")) as trip:
        with full_disk(trip.gateway.runtime.journal):
            for _ in range(3):
                refused = await trip.ask(stream=stream)
                assert (refused.status, refused.error["code"]) == (503, "journal_unavailable")
                assert refused.headers["Retry-After"] == "1"
        assert trip.first.turns == []
        trip.check_at_rest()
        assert trip.used() == [0, 0, 0]
        assert (await trip.ask(stream=stream)).status == 200


@pytest.mark.parametrize("stream", [False, True])
async def test_what_cannot_be_recorded_is_not_answered_and_what_follows_is_not_asked(
    tmp_path: Path, stream: bool
) -> None:
    may_answer = asyncio.Event()

    async def waits(turn: Turn) -> None:
        await may_answer.wait()
        await says("Pa", "ris")(turn)

    async with journey(tmp_path, waits) as trip:
        asked = asyncio.create_task(trip.ask(stream=stream))
        await trip.first.turn()
        with full_disk(trip.gateway.runtime.journal):
            may_answer.set()
            answer = await asked
            await check_not_answered(trip, answer, stream=stream)
        # Once the disk takes a line again, what was answered in vain is written down and told, and calls are taken.
        (row,) = await trip.booked()
        assert (row.id, row.state, row.amounts) == (f"{answer.headers['x-request-id']}.1", "posted", (25_000, 1, 18))
        assert trip.record.cost_nusd == 25_000
        assert (await trip.ask()).status == 200


async def check_not_answered(trip: Journey, answer: Answer, *, stream: bool) -> None:
    """See that the caller was told, that the money is spent all the same, and that the next call is not made."""
    if stream:
        assert DONE not in answer.events
        assert msgspec.json.decode(answer.events[-1])["error"]["code"] == "journal_unavailable"
    else:
        assert (answer.status, answer.error["code"]) == (503, "journal_unavailable")
    trip.check_at_rest()
    assert trip.used() == [25_000, 1, 18]
    refused = await trip.ask(stream=stream)
    assert (refused.status, refused.error["code"]) == (503, "journal_unavailable")
    assert refused.headers["Retry-After"] == "1"
    assert len(trip.first.turns) == 1


async def test_a_call_is_one_request_however_many_tries_it_takes(tmp_path: Path) -> None:
    cap = '[[caps]]\nper = "total"\nrequests = 2\n'
    async with journey(tmp_path, refuses(503, error_body()), caps=cap) as trip:
        answers = [await trip.ask() for _ in range(3)]
        assert [answer.status for answer in answers] == [200, 200, 429]
        assert answers[2].error["code"] == "budget_exceeded"


# --- A change of the files in the middle of a call --------------------------------------------------------------------


async def test_a_call_ends_with_the_files_it_began_with(tmp_path: Path) -> None:
    go_on = asyncio.Event()

    async def fails_late(turn: Turn) -> None:
        await go_on.wait()
        await turn.reply(error_body(), 500)

    async with journey(tmp_path, fails_late) as trip:
        asked = asyncio.ensure_future(trip.ask())
        await trip.first.turn()
        # The chain's second upstream goes, and the agents that name it.
        paths = trip.gateway._files.paths
        text = paths.config.read_text()
        paths.config.write_text(text.replace("second", "other"))
        await trip.gateway.gateway.reload()
        assert trip.gateway.runtime.reload_error == ""
        assert set(trip.gateway.runtime.upstreams) == {"sim", "first", "other"}
        go_on.set()
        assert (await asked).text == "From the second."


async def test_a_bug_is_told_by_its_number_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with journey(tmp_path, says("Paris")) as trip:
        monkeypatch.setattr("gateway.edge.chat.fill", lambda *_, **__: 1 / 0)
        answer = await trip.ask()
        assert (answer.status, answer.error["code"]) == (500, "internal_error")
        assert answer.headers["x-request-id"] in answer.error["message"]
        assert "division" not in answer.error["message"]
        assert "ZeroDivisionError" in caplog.text
        assert trip.record.error == "internal_error"
        assert trip.gateway.runtime.observer.in_flight == 0


def test_names_of_calls_rise_with_time_and_no_two_are_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    names = []
    for at_ms in (0, 9, 10, 255, 256, 1_795_262_400_000, 1_795_262_400_001):
        monkeypatch.setattr(chat, "time", SimpleNamespace(time_ns=lambda at_ms=at_ms: at_ms * 1_000_000))
        names += sorted(chat.new_call_id() for _ in range(3))
    assert names == sorted(set(names))
    assert all(re.fullmatch("req-[0-9a-f]{32}", name) for name in names)
