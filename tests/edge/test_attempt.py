"""One try at one model: whatever goes wrong before the answer has begun falls back, and its kind is told."""

import asyncio
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from gateway.decide.fallback import REMEDIES, Then
from gateway.domain.errors import FaultKind
from tests.journey import NO_RETRIES, POLICY, Answer, Journey, journey
from tests.scripted import (
    DONE,
    Scene,
    Turn,
    completion,
    delta,
    error_body,
    event,
    refuses,
    refusing_port,
    resets,
    says,
    silent,
    streams,
)

HTML = b"<html><body><h1>502 Bad Gateway</h1></body></html>"
AS_HTML = {"Content-Type": "text/html"}
# One try at each model; what is tried again, and when, is test_failover's.
once = partial(journey, policy=POLICY + NO_RETRIES)


def sends(data: bytes) -> Scene:
    """Answers with these bytes and closes."""

    async def scene(turn: Turn) -> None:
        await turn.raw(data)
        turn.close()

    return scene


async def promises_more(turn: Turn) -> None:
    await turn.raw(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n{")
    turn.close()


async def begins_and_resets(turn: Turn) -> None:
    await turn.begin_stream()
    turn.reset()


async def begins_and_is_silent(turn: Turn) -> None:
    await turn.begin_stream()
    await silent(turn)


async def comments_and_is_silent(turn: Turn) -> None:
    await turn.begin_stream()
    await turn.piece(b": one moment\n\n")
    await silent(turn)


async def fails_and_is_silent(turn: Turn) -> None:
    await turn.raw(b"HTTP/1.1 500 Oh\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n{")
    await silent(turn)


async def begins_out_of_frame(turn: Turn) -> None:
    await turn.begin_stream()
    await turn.raw(b"not a size\r\n")


Fault = tuple[Scene, FaultKind]
FAULTS: dict[str, Fault] = {
    "reset before the head": (resets, FaultKind.RESET),
    "closed before the head": (sends(b""), FaultKind.RESET),
    "closed inside the head": (sends(b"HTTP/1.1 200 OK\r\nContent-"), FaultKind.RESET),
    "not HTTP": (sends(b"SSH-2.0-OpenSSH_9.6\r\n\r\n"), FaultKind.INVALID),
    "silence": (silent, FaultKind.FIRST_BYTE),
    "500": (refuses(500, error_body()), FaultKind.SERVER),
    "503 without a body": (refuses(503), FaultKind.SERVER),
    "502 with a page": (refuses(502, HTML, AS_HTML), FaultKind.SERVER),
    "429": (refuses(429, error_body(type="rate_limit_error")), FaultKind.RATE_LIMITED),
    "429 of an empty account": (refuses(429, error_body(code="insufficient_quota")), FaultKind.QUOTA),
    "402": (refuses(402, error_body("pay first")), FaultKind.QUOTA),
    "413": (refuses(413), FaultKind.CONTEXT_LENGTH),
    "400 that says too long": (refuses(400, error_body(code="context_length_exceeded")), FaultKind.CONTEXT_LENGTH),
    "400 of a model that is gone": (refuses(400, error_body(code="model_not_found")), FaultKind.NOT_FOUND),
    "404": (refuses(404, error_body("no such model")), FaultKind.NOT_FOUND),
    "401": (refuses(401, error_body("bad key")), FaultKind.AUTH),
    "403": (refuses(403, error_body("bad key")), FaultKind.AUTH),
    "408": (refuses(408), FaultKind.FIRST_BYTE),
    "200 with a page": (refuses(200, HTML, AS_HTML), FaultKind.INVALID),
    "200 and nothing": (refuses(200), FaultKind.INVALID),
    "200 with null": (refuses(200, b"null"), FaultKind.INVALID),
    "200 without choices": (refuses(200, completion() | {"choices": []}), FaultKind.INVALID),
    "200 with an error": (refuses(200, error_body()), FaultKind.SERVER),
    "204": (sends(b"HTTP/1.1 204 No Content\r\n\r\n"), FaultKind.INVALID),
    "a body cut short": (promises_more, FaultKind.RESET),
    "a body that is not the gzip it says": (
        refuses(200, b"not gzip", {"Content-Encoding": "gzip"}),
        FaultKind.RESET,
    ),
    "307": (refuses(307, b"", {"Location": "http://127.0.0.1:1/v1/chat/completions"}), FaultKind.INVALID),
}
STREAM_FAULTS: dict[str, Fault] = {
    "a plain answer": (refuses(200, completion()), FaultKind.INVALID),
    "a stream of nothing": (streams(), FaultKind.INVALID),
    "a stream of comments": (sends(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n: a\n\n: b\n\n"),
                             FaultKind.INVALID),
    "nothing but [DONE]": (streams(DONE), FaultKind.INVALID),
    "a first event that is no JSON": (streams(b'{"choices": [', DONE), FaultKind.INVALID),
    "a first event that tells of an error": (streams(error_body()), FaultKind.SERVER),
    "a head and a reset": (begins_and_resets, FaultKind.RESET),
    "a head and silence": (begins_and_is_silent, FaultKind.FIRST_TOKEN),
    "an error whose words do not come": (fails_and_is_silent, FaultKind.FIRST_TOKEN),
    "a head, a comment and silence": (comments_and_is_silent, FaultKind.FIRST_TOKEN),
}  # fmt: skip
WHOLE_FAULTS: dict[str, Fault] = {
    "finish_reason error": (
        refuses(200, completion() | {"choices": [{"index": 0, "message": {}, "finish_reason": "error"}]}),
        FaultKind.SERVER,
    ),
}


def check_fell_back(trip: Journey, answer: Answer, kind: FaultKind) -> None:
    """See that the second provider answered, and that the caller and the record are told so."""
    assert answer.status == 200, answer.body
    assert (answer.streamed_text if trip.record.stream else answer.text) == "From the second."
    assert answer.headers["x-gateway-model"] == "second/b"
    assert answer.headers["x-gateway-fallback"] == "first/a"
    assert answer.headers["x-gateway-attempts"] == "2"
    record = trip.record
    assert [(one.ref, one.fault) for one in record.attempts] == [("first/a", kind), ("second/b", None)]
    assert record.is_fallback
    assert (record.status, record.error, record.model_sent) == (200, "", "second/b")
    assert len(trip.second.turns) == 1
    trip.check_at_rest()


def timeouts_for(kind: FaultKind) -> str:
    return {
        FaultKind.FIRST_BYTE: "first_byte_s = 0.05, first_token_s = 0.05",
        # The head has to be there by then, on a busy machine too.
        FaultKind.FIRST_TOKEN: "first_token_s = 0.5",
    }.get(kind, "")


@pytest.mark.parametrize("name", [*FAULTS, *WHOLE_FAULTS])
async def test_a_plain_call_falls_back(tmp_path: Path, name: str) -> None:
    scene, kind = (FAULTS | WHOLE_FAULTS)[name]
    async with once(tmp_path, scene, timeouts=timeouts_for(kind)) as trip:
        check_fell_back(trip, await trip.ask(), kind)


@pytest.mark.parametrize("name", [*FAULTS, *STREAM_FAULTS])
async def test_a_stream_falls_back_before_its_first_event(tmp_path: Path, name: str) -> None:
    scene, kind = (FAULTS | STREAM_FAULTS)[name]
    async with once(tmp_path, scene, timeouts=timeouts_for(kind)) as trip:
        answer = await trip.ask(stream=True)
        check_fell_back(trip, answer, kind)
        assert answer.events[-1] == DONE


async def test_a_connection_that_is_refused_falls_back_and_costs_nothing(tmp_path: Path) -> None:
    with refusing_port() as held:
        table = f'kind = "compatible"\nbase_url = "http://127.0.0.1:{held.getsockname()[1]}/v1"'
        async with once(tmp_path, silent, first_table=table) as trip:
            check_fell_back(trip, await trip.ask(), FaultKind.CONNECT)
            assert trip.record.attempts[0].cost_nusd == 0


async def test_what_may_have_been_billed_is_posted_at_its_bound(tmp_path: Path) -> None:
    async with once(tmp_path, resets) as trip:
        await trip.ask()
        failed, answered = trip.record.attempts
        assert failed.cost_nusd > answered.cost_nusd > 0
        (dollars, *_) = trip.gateway.runtime.books._accounts.values()
        assert dollars.used == failed.cost_nusd + answered.cost_nusd


@pytest.mark.parametrize("stream", [False, True])
async def test_broken_framing_is_not_waited_on(tmp_path: Path, stream: bool) -> None:
    async with once(tmp_path, begins_out_of_frame) as trip:
        answer = await trip.ask(stream=stream)
        # Which of the two depends on whether the head came in the same breath.
        kind = trip.record.attempts[0].fault
        assert kind in (FaultKind.INVALID, FaultKind.RESET)
        check_fell_back(trip, answer, kind)


async def test_a_redirect_is_not_followed(tmp_path: Path) -> None:
    async with once(tmp_path, silent) as trip:
        elsewhere = {"Location": f"{trip.second.base_url}/chat/completions"}
        trip.first.then(refuses(308, b"", elsewhere))
        answer = await trip.ask(model="lone_agent")
        assert (answer.status, answer.error["code"]) == (502, "upstream_invalid")
        assert not trip.second.turns


# --- What does not fall back ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("status", [400, 409, 422])
async def test_a_request_that_is_refused_is_not_tried_elsewhere(tmp_path: Path, status: int, stream: bool) -> None:
    body = error_body("No such field.", type="invalid_request_error", code="unknown_parameter", param="metadata")
    async with once(tmp_path, refuses(status, body)) as trip:
        answer = await trip.ask(stream=stream)
        assert answer.status == status
        assert answer.json() == body
        assert not trip.second.turns
        assert trip.record.attempts[0].fault is FaultKind.REJECTED
        assert (trip.record.status, trip.record.error) == (status, "unknown_parameter")
        assert trip.record.cost_nusd == 0


async def test_mistrals_flat_refusal_comes_out_in_openais_shape(tmp_path: Path) -> None:
    detail = [{"type": "extra_forbidden", "loc": ["body", "user"], "msg": "Extra inputs are not permitted"}]
    async with once(tmp_path, refuses(422, {"object": "error", "message": {"detail": detail}, "code": 3051})) as trip:
        answer = await trip.ask()
        assert answer.status == 422
        assert answer.error == {
            "message": "body.user: Extra inputs are not permitted",
            "type": "invalid_request_error",
            "param": None,
            "code": "3051",
        }


async def test_a_caller_may_forbid_the_fallback(tmp_path: Path) -> None:
    async with once(tmp_path, refuses(503, error_body("Come back later."))) as trip:
        answer = await trip.ask(headers={"x-gateway-fallback": "off"})
        assert (answer.status, answer.error["message"]) == (503, "Come back later.")
        assert not trip.second.turns


async def test_a_caller_may_not_forbid_the_fallback_where_the_policy_does_not_let_them(tmp_path: Path) -> None:
    async with once(tmp_path, says("Paris"), policy=POLICY.replace("fallback = true\n", "")) as trip:
        answer = await trip.ask(headers={"x-gateway-fallback": "off"})
        assert (answer.status, answer.error["code"]) == (403, "override_not_allowed")
        assert not trip.first.turns


# --- When all fail ----------------------------------------------------------------------------------------------------


async def test_when_all_fail_the_last_provider_speaks_and_all_attempts_are_named(tmp_path: Path) -> None:
    paced = {
        "Retry-After": "7", "retry-after-ms": "7000", "x-should-retry": "true", "x-ratelimit-remaining-requests": "0",
        "Set-Cookie": "a=b", "x-internal": "secret",
    }  # fmt: skip
    busy = refuses(429, error_body("Slow down.", type="rate_limit_error", code="rate_limited"), paced)
    async with once(tmp_path, resets, second=busy) as trip:
        answer = await trip.ask()
        assert answer.status == 429
        assert answer.error["code"] == "rate_limited"
        assert answer.error["type"] == "rate_limit_error"
        assert answer.error["message"] == "Slow down. (tried first/a: reset; second/b: rate_limited)"
        passed = {name: answer.headers.get(name) for name in paced}
        assert passed == {**paced, "Set-Cookie": None, "x-internal": None}
        assert answer.headers["x-gateway-attempts"] == "2"
        record = trip.record
        assert (record.status, record.error) == (429, "rate_limited")
        assert [one.fault for one in record.attempts] == [FaultKind.RESET, FaultKind.RATE_LIMITED]
        trip.check_at_rest()


@pytest.mark.parametrize("value", [b"\xff\xfe", "zwölf".encode()])
async def test_headers_of_a_refusal_that_are_no_text_do_no_harm(tmp_path: Path, value: bytes) -> None:
    raw = b"HTTP/1.1 429 Slow\r\nRetry-After: %b\r\nx-ratelimit-reset: %b\r\nContent-Length: 0\r\n\r\n" % (value, value)
    async with once(tmp_path, sends(raw)) as trip:
        answer = await trip.ask(model="lone_agent")
        assert (answer.status, answer.error["code"]) == (429, "upstream_error")
        for name in ("Retry-After", "x-ratelimit-reset"):
            assert answer.headers.get(name) in (None, "zwölf")


LAST_WORDS: dict[str, tuple[Scene, int, str]] = {
    "silence": (silent, 504, "upstream_timeout"),
    "a reset": (resets, 502, "upstream_unreachable"),
    "a page": (refuses(200, HTML, AS_HTML), 502, "upstream_invalid"),
    "a page as an error": (refuses(500, HTML, AS_HTML), 500, "upstream_error"),
    "a retired model": (refuses(404, b""), 404, "model_not_found"),
    "our key": (refuses(401, error_body("Incorrect API key provided: sk-fir*****cdef")), 502, "upstream_auth"),
    "an error under 200": (refuses(200, error_body(code="engine_failure")), 502, "engine_failure"),
    "a cut": (promises_more, 502, "upstream_cut"),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", LAST_WORDS)
async def test_what_a_caller_hears_of_a_lone_model_that_fails(tmp_path: Path, name: str, stream: bool) -> None:
    scene, status, code = LAST_WORDS[name]
    async with once(
        tmp_path, scene, timeouts="first_byte_s = 0.05, first_token_s = 0.05" if scene is silent else ""
    ) as trip:
        answer = await trip.ask(model="lone_agent", stream=stream)
        assert (answer.status, answer.error["code"]) == (status, code)
        assert answer.headers["Content-Type"].startswith("application/json")
        assert "html" not in answer.error["message"]
        assert "sk-" not in answer.error["message"]
        assert answer.headers["x-request-id"] == trip.record.id


# --- Deadlines --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers", [{"x-gateway-timeout-ms": "60"}, {"x-stainless-read-timeout": "0.06"}], ids=["ours", "the SDK's"]
)
async def test_the_callers_deadline_bounds_all_attempts_together(tmp_path: Path, headers: Mapping[str, str]) -> None:
    async with once(tmp_path, silent, second=silent) as trip:
        answer = await trip.ask(headers=headers)
        assert (answer.status, answer.error["code"]) == (504, "upstream_timeout")
        # The first attempt has used it up, so nobody else is asked.
        assert not trip.second.turns
        await asyncio.wait_for(trip.first.turns[0].peer_left.wait(), 20)


async def test_a_plain_answer_that_does_not_end_is_ended_by_the_total(tmp_path: Path) -> None:
    async def drips(turn: Turn) -> None:
        await turn.raw(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n{")
        await silent(turn)

    async with once(tmp_path, drips, timeouts="total_s = 0.5") as trip:
        answer = await trip.ask()
        assert (answer.status, answer.error["code"]) == (504, "upstream_timeout")
        await trip.first.turns[0].peer_left.wait()


# --- What is sent -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lines, asks", [('kind = "openai"', True), ('kind = "compatible"\nstream_usage = false', False)]
)
async def test_usage_is_asked_for_only_where_the_provider_takes_it(tmp_path: Path, lines: str, asks: bool) -> None:
    async with once(tmp_path, says("Paris"), first_table=f'{lines}\nbase_url = "BASE_URL"') as trip:
        await trip.ask(stream=True)
        await trip.ask()
        streamed, plain = (turn.json() for turn in trip.first.turns)
        assert ("stream_options" in streamed) is asks
        assert "stream_options" not in plain


async def test_the_first_event_is_held_back_until_it_is_known_to_be_good(tmp_path: Path) -> None:
    halves = event(delta("Paris"))
    go_on = asyncio.Event()

    async def in_halves(turn: Turn) -> None:
        await turn.begin_stream()
        await turn.piece(halves[:40])
        await go_on.wait()
        await turn.event(b"")
        turn.close()

    async with once(tmp_path, in_halves) as trip:
        asked = asyncio.ensure_future(trip.ask(stream=True))
        await trip.first.turn()
        go_on.set()
        # Half an event is none: what the client gets is whole and from one model.
        check_fell_back(trip, await asked, FaultKind.INVALID)


def test_the_tables_of_faults_name_every_kind_that_may_come_before_an_answer() -> None:
    tables: list[dict[str, Any]] = [FAULTS, STREAM_FAULTS, WHOLE_FAULTS]
    seen = {kind for table in tables for _, kind in table.values()}
    of_an_answer = {FaultKind.CUT, FaultKind.STALL, FaultKind.DRIP}
    ends_the_call = {kind for kind, remedy in REMEDIES.items() if remedy.then is Then.GIVE_UP}
    assert seen | {FaultKind.CONNECT} == set(FaultKind) - of_an_answer - ends_the_call
