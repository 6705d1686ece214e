"""Streams on their way to the client: true to the byte, true about their end, and never faster than they are read."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
from aiohttp.web import StreamResponse

from gateway.decide.breaker import State
from gateway.domain.errors import FaultKind, UpstreamFault
from gateway.edge import attempt, relay
from gateway.edge.relay import Relay
from gateway.edge.upstream import HttpExchange
from tests.journey import AGENTS, NO_RETRIES, POLICY, PRICES, Answer, Journey, journey
from tests.raw_http import ordinary, request
from tests.scripted import (
    DONE,
    USAGE,
    Scene,
    Turn,
    chunk,
    delta,
    error_body,
    event,
    finish,
    refuses,
    says,
    silent,
    streams,
    usage_chunk,
)

JSON = msgspec.json


def on_cut(how: str) -> str:
    """A policy that says what becomes of a stream that breaks off."""
    return f'{POLICY}\n[stream]\non_cut = "{how}"\n'


def check_broken_off(answer: Answer, code: str) -> str:
    """See that a stream ended in an error event as the SDKs raise it, and in nothing after it; its message."""
    assert answer.status == 200
    assert DONE not in answer.events
    error = JSON.decode(answer.events[-1])["error"]
    assert error["code"] == code
    return str(error["message"])


async def test_events_come_out_as_they_went_in_however_the_bytes_were_cut(tmp_path: Path) -> None:
    sent = [delta("Grüße, "), delta("世界 🌍"), chunk({"tool_calls": [{"index": 0, "id": "x"}]}), finish()]
    whole = b": hello\r\n\r\n" + b"".join(event(one) for one in sent).replace(b"\n", b"\r\n") + event(DONE)

    async def a_byte_at_a_time(turn: Turn) -> None:
        await turn.begin_stream()
        for index in range(len(whole)):
            await turn.piece(whole[index : index + 1])
        await turn.end()

    async with journey(tmp_path, a_byte_at_a_time) as trip:
        answer = await trip.ask(stream=True)
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        assert answer.events == [*(JSON.encode(one) for one in sent), DONE]


@pytest.mark.parametrize("is_asked", [False, True])
async def test_usage_is_asked_of_the_provider_and_shown_only_to_who_asked(tmp_path: Path, is_asked: bool) -> None:
    options: dict[str, Any] = {"stream_options": {"include_usage": True}} if is_asked else {}
    async with journey(tmp_path, says("Pa", "ris")) as trip:
        answer = await trip.ask(stream=True, **options)
        assert trip.first.turns[0].json()["stream_options"] == {"include_usage": True}
        assert [one["usage"] for one in answer.chunks if "usage" in one] == ([USAGE] if is_asked else [])
        assert answer.streamed_text == "Paris"
        assert answer.events[-1] == DONE
        usage = trip.record.usage
        assert usage is not None
        assert (usage.prompt_tokens, usage.completion_tokens) == (11, 7)
        assert trip.record.cost_nusd == 11 * 1_000 + 7 * 2_000
        assert b"x-gateway-cost-usd=0.000025" in answer.body


async def test_the_record_is_in_the_journal_when_the_client_reads_the_end(tmp_path: Path) -> None:
    async with journey(tmp_path, says("Pa", "ris")) as trip:
        async with trip.post(stream=True) as response:
            await response.content.readuntil(b"[DONE]")
            record = trip.record
            assert (record.status, record.finish_reason, record.error) == (200, "stop", "")
            assert record.first_chunk_ms is not None
        accounts = trip.gateway.runtime.books._accounts.values()
        assert [account.used for account in accounts] == [25_000, 1, 18]


async def test_done_is_added_where_the_provider_finished_without_it(tmp_path: Path) -> None:
    async with journey(tmp_path, streams(delta("Paris"), finish(), usage_chunk())) as trip:
        answer = await trip.ask(stream=True)
        assert answer.events[-1] == DONE
        assert (trip.record.error, trip.record.finish_reason, trip.record.cost_basis) == ("", "stop", "exact")


async def test_a_provider_that_finished_and_holds_the_line_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay, "GRACE_S", 0.01)

    async def lingers(turn: Turn) -> None:
        await turn.begin_stream()
        await turn.event(delta("Paris"))
        await turn.event(finish())
        await silent(turn)

    async with journey(tmp_path, lingers) as trip:
        answer = await trip.ask(stream=True)
        assert answer.events[-1] == DONE
        assert trip.record.error == ""


async def test_the_end_goes_out_when_the_provider_says_done_and_not_when_it_closes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay, "READ_OUT_S", 20.0)

    async def lingers(turn: Turn) -> None:
        await turn.begin_stream()
        for data in (delta("Paris"), finish(), DONE):
            await turn.event(data)
        await has_read.wait()
        await turn.end()

    has_read = asyncio.Event()
    async with journey(tmp_path, lingers, says("again")) as trip:
        answer = await trip.ask(stream=True)
        has_read.set()
        assert answer.events[-1] == DONE
        # The connection was not lost by it.
        assert (await trip.ask(stream=True)).streamed_text == "again"
        assert trip.first.connections == 1


async def test_an_end_that_comes_without_a_blank_line_counts(tmp_path: Path) -> None:
    async def stops_short(turn: Turn) -> None:
        await turn.begin_stream()
        await turn.piece(event(delta("Paris")) + event(finish()).rstrip(b"\n"))
        await turn.end()

    async with journey(tmp_path, stops_short) as trip:
        answer = await trip.ask(stream=True)
        assert answer.streamed_text == "Paris"
        assert [one["choices"][0]["finish_reason"] for one in answer.chunks] == [None, "stop"]
        assert answer.events[-1] == DONE


async def test_of_two_choices_both_must_finish(tmp_path: Path) -> None:
    one_of_two = streams(delta("a"), finish())
    async with journey(tmp_path, one_of_two) as trip:
        check_broken_off(await trip.ask(stream=True, n=2), "upstream_cut")


async def ends_cleanly(turn: Turn) -> None:
    await turn.end()


async def closes(turn: Turn) -> None:
    turn.close()


async def resets(turn: Turn) -> None:
    turn.reset()


async def cuts_a_chunk(turn: Turn) -> None:
    await turn.raw(b"ff\r\ndata: {")
    turn.close()


async def breaks_the_framing(turn: Turn) -> None:
    await turn.raw(b"this is no chunk size\r\n")


async def says_error(turn: Turn) -> None:
    await turn.event(error_body("The model fell over.", code="engine_failure"))


async def finishes_with_error(turn: Turn) -> None:
    await turn.event(finish("error"))


async def sends_no_json(turn: Turn) -> None:
    for _ in range(relay.MAX_MALFORMED + 1):
        await turn.event(b'{"choices": [{"delta": {"content": "x"')


async def stalls(turn: Turn) -> None:
    await turn.peer_left.wait()


BREAKS: dict[str, tuple[Scene, str, FaultKind]] = {
    "ends without finish_reason": (ends_cleanly, "upstream_cut", FaultKind.CUT),
    "closes": (closes, "upstream_cut", FaultKind.CUT),
    "resets": (resets, "upstream_cut", FaultKind.CUT),
    "cuts a chunk": (cuts_a_chunk, "upstream_cut", FaultKind.CUT),
    "breaks the framing": (breaks_the_framing, "upstream_cut", FaultKind.CUT),
    "says error": (says_error, "engine_failure", FaultKind.SERVER),
    "finishes with error": (finishes_with_error, "upstream_error", FaultKind.SERVER),
    "sends what is no JSON": (sends_no_json, "upstream_cut", FaultKind.CUT),
    "stalls": (stalls, "upstream_timeout", FaultKind.STALL),
}


@pytest.mark.parametrize("name", BREAKS)
async def test_what_breaks_off_ends_in_an_error_event_and_never_in_done(tmp_path: Path, name: str) -> None:
    break_off, code, kind = BREAKS[name]
    has_read = asyncio.Event()

    async def scene(turn: Turn) -> None:
        await turn.begin_stream()
        await turn.event(delta("The capital "))
        await turn.event(delta("of "))
        # A reset, and a break in the framing, would overtake what was sent.
        await has_read.wait()
        await break_off(turn)

    timeouts = "stall_s = 0.2" if name == "stalls" else ""
    async with journey(tmp_path, scene, timeouts=timeouts, policy=on_cut("error")) as trip:
        async with trip.post(stream=True) as response:
            begun = await response.content.readuntil(event(delta("of ")))
            has_read.set()
            answer = Answer(response.status, response.headers, begun + await response.content.read())
        check_broken_off(answer, code)
        assert "".join(one["choices"][0]["delta"]["content"] for one in answer.chunks[:-1]) == "The capital of "
        record = trip.record
        assert (record.error, record.attempts[0].fault) == (code, kind)
        assert not record.client_left
        assert not trip.second.turns
        trip.check_at_rest()


async def test_malformed_events_are_left_out_and_the_rest_goes_on(tmp_path: Path) -> None:
    broken = [b'{"choices": [{"delta"', b"<html>", b'{"choices": 7}']
    assert len(broken) == relay.MAX_MALFORMED
    async with journey(tmp_path, streams(delta("Pa"), *broken, delta("ris"), finish(), DONE)) as trip:
        answer = await trip.ask(stream=True)
        assert answer.events == [*(JSON.encode(one) for one in (delta("Pa"), delta("ris"), finish())), DONE]
        assert (trip.record.error, len(trip.record.attempts)) == ("", 1)


async def test_an_error_of_the_provider_after_its_last_word_changes_nothing(tmp_path: Path) -> None:
    async def resets_at_the_end(turn: Turn) -> None:
        await turn.begin_stream()
        await turn.event(delta("Paris"))
        await turn.event(finish())
        turn.close()

    async with journey(tmp_path, resets_at_the_end) as trip:
        answer = await trip.ask(stream=True)
        assert answer.events[-1] == DONE
        # Its usage was not told, so what came is counted upwards.
        assert (trip.record.error, trip.record.cost_basis) == ("", "estimate")
        assert trip.record.cost_nusd > 0


async def test_100_000_tiny_chunks_arrive(tmp_path: Path) -> None:
    words = 100_000

    async def chatters(turn: Turn) -> None:
        await turn.begin_stream()
        tiny = event(delta("x"))
        framed = b"%x\r\n%b\r\n" % (len(tiny), tiny)
        for _ in range(words // 100):
            await turn.raw(framed * 100)
        await turn.event(finish())
        await turn.event(DONE)
        await turn.end()

    async with journey(tmp_path, chatters) as trip:
        answer = await trip.ask(stream=True, max_tokens=words)
        assert answer.body.count(b'"content":"x"') == words
        assert answer.events[-1] == DONE


# --- Readers that are slow --------------------------------------------------------------------------------------------


@asynccontextmanager
async def slow_client(trip: Journey) -> AsyncIterator[socket.socket]:
    """A client that has asked for a stream and has a tiny buffer to receive it in."""
    loop = asyncio.get_running_loop()
    host, _, port = trip.gateway.data_url.removeprefix("http://").rpartition(":")
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        client.setblocking(False)
        await loop.sock_connect(client, (host, int(port)))
        await loop.sock_sendall(client, request(body=ordinary(stream=True, max_tokens=EVENTS)))
        yield client


PADDING = "x" * 10_000
EVENTS = 1_600


async def floods(turn: Turn) -> None:
    """16 MB of an answer, as fast as it is taken."""
    await turn.begin_stream()
    for _ in range(EVENTS):
        await turn.event(delta(PADDING))
    await turn.event(finish())
    await turn.event(DONE)
    await turn.end()


async def until_it_stalls(trip: Journey, turn: Turn) -> int:
    """The bytes the provider got rid of, once it gets rid of no more."""
    before = -1
    while turn.sent_bytes != before:
        before = turn.sent_bytes
        await trip.let_others_act()
    return before


async def test_a_slow_reader_holds_the_provider_back_and_then_gets_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    relayed_bytes = 0
    chunks = HttpExchange.chunks
    exchanges: list[HttpExchange] = []

    async def counted(exchange: HttpExchange) -> AsyncIterator[bytes]:
        nonlocal relayed_bytes
        exchanges.append(exchange)
        async for data in chunks(exchange):
            relayed_bytes += len(data)
            yield data

    monkeypatch.setattr(HttpExchange, "chunks", counted)
    async with journey(tmp_path, floods) as trip, slow_client(trip) as client:
        taken = await until_it_stalls(trip, await trip.first.turn())
        # The kernel's buffers are the kernel's affair; what the gateway took out of them is its own.
        assert 0 < taken < EVENTS * len(PADDING)
        coming_in_bytes = exchanges[0]._response.content.total_bytes - relayed_bytes
        going_out = [one.transport for one in trip.gateway.gateway.data._connections]
        going_out_bytes = sum(one.get_write_buffer_size() for one in going_out if isinstance(one, asyncio.Transport))
        assert going_out_bytes > 0
        assert coming_in_bytes + going_out_bytes < 400_000
        loop = asyncio.get_running_loop()
        received = 0
        tail = b""
        while b"[DONE]" not in tail:
            data = await loop.sock_recv(client, 65_536)
            assert data
            received += data.count(b"x")
            tail = tail[-20:] + data[-40:]
        assert received >= EVENTS * len(PADDING)
        assert (trip.record.error, trip.record.client_left) == ("", False)


async def test_a_client_that_does_not_take_the_last_byte_is_let_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def never(response: StreamResponse, data: bytes = b"") -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(StreamResponse, "write_eof", never)
    async with journey(tmp_path, says("Paris"), server="idle_timeout_s = 0.05") as trip:
        with pytest.raises(aiohttp.ClientPayloadError):
            await trip.ask(stream=True)
        monkeypatch.undo()
        trip.check_at_rest()
        assert "bug" not in caplog.text


async def test_a_client_that_never_reads_is_let_go_and_the_provider_with_it(tmp_path: Path) -> None:
    async with journey(tmp_path, floods, server="idle_timeout_s = 0.2") as trip, slow_client(trip):
        turn = await trip.first.turn()
        await turn.peer_left.wait()
        assert trip.record.client_left
        assert trip.record.cost_basis == "bound"
        trip.check_at_rest()


# --- A stream that breaks off, and another that takes it up -----------------------------------------------------------

WORDS = ("The ", "capital ", "of ", "France ", "is ", "Paris", " 🌍.")
TEXT = "".join(WORDS)
ONCE = on_cut("continue") + NO_RETRIES
DEAR_SECOND = f'{PRICES}[prices."second/*"]\ninput_usd_per_mtok = "10"\noutput_usd_per_mtok = "20"\n'


def begins(*events: Any, then: Scene = closes) -> Scene:
    """Streams these, and does not come to an end; text goes as a word."""

    async def scene(turn: Turn) -> None:
        await turn.begin_stream()
        for data in events:
            await turn.event(delta(data) if isinstance(data, str) else data)
        await then(turn)

    return scene


def in_pieces(text: str, *, words: int, step: int, reason: str = "stop") -> Scene:
    """The whole of `text` under another id, so many characters to an event, so many bytes at a time."""

    async def scene(turn: Turn) -> None:
        parts = [text[at : at + words] for at in range(0, len(text), words)]
        own = {"id": "chatcmpl-2", "model": "scripted-2"}
        events = [
            chunk({"role": "assistant", "content": ""}, **own),
            *(chunk({"content": part}, **own) for part in parts),
            chunk({}, reason, **own),
            {**usage_chunk(), **own},
        ]
        data = b"".join(event(one) for one in events) + event(DONE)
        await turn.begin_stream()
        for at in range(0, len(data), step):
            await turn.piece(data[at : at + step])
        await turn.end()

    return scene


def check_joined(trip: Journey, answer: Answer, text: str = TEXT, ref: str = "second/b") -> None:
    """See that the client got one whole answer under one id, and that the record is that of who ended it."""
    assert answer.streamed_text == text
    assert answer.events.count(DONE) == 1
    assert answer.events[-1] == DONE
    assert {one["id"] for one in answer.chunks} == {"chatcmpl-1"}
    finished = [one for one in answer.chunks if any(choice.get("finish_reason") for choice in one["choices"])]
    assert len(finished) == 1
    # The role is told once, by whoever tells it first.
    assert sum("role" in choice["delta"] for one in answer.chunks for choice in one["choices"]) <= 1
    record = trip.record
    assert (record.status, record.error, record.model_sent, record.is_fallback) == (200, "", ref, True)
    assert f"x-gateway-model={ref}".encode() in answer.body
    assert f"x-gateway-attempts={len(record.attempts)}".encode() in answer.body
    trip.check_at_rest()


@pytest.mark.parametrize("step", [1, 3, 10_000])
@pytest.mark.parametrize("size", [1, 4, 1_000])
async def test_an_answer_that_broke_off_is_joined_with_one_that_says_the_same(
    tmp_path: Path, size: int, step: int
) -> None:
    first = begins(chunk({"role": "assistant", "content": ""}), *WORDS[:4])
    async with journey(tmp_path, first, second=in_pieces(TEXT, words=size, step=step), policy=ONCE) as trip:
        answer = await trip.ask(stream=True)
        check_joined(trip, answer)
        # What the first had sent went out as it came, and what the second repeated of it did not.
        assert [one["choices"][0]["delta"]["content"] for one in answer.chunks[1:5]] == list(WORDS[:4])
        assert [one.fault for one in trip.record.attempts] == [FaultKind.CUT, None]
        rendered = await (await trip.session.get(f"{trip.gateway.admin_url}/metrics")).text()
        assert 'gateway_streams_resumed_total{upstream="second"} 1.0' in rendered


async def test_the_model_the_usage_and_the_cost_are_those_of_who_ended_it(tmp_path: Path) -> None:
    second = in_pieces(TEXT, words=4, step=100)
    async with journey(tmp_path, begins(*WORDS[:4]), second=second, policy=ONCE, config=DEAR_SECOND) as trip:
        answer = await trip.ask(stream=True, stream_options={"include_usage": True})
        check_joined(trip, answer)
        # The head had left with the first one's name; the comment at the end tells.
        assert answer.headers["x-gateway-model"] == "first/a"
        record = trip.record
        assert (record.model_answered, record.finish_reason) == ("scripted-2", "stop")
        assert record.cost_nusd == 11 * 10_000 + 7 * 20_000
        assert b"x-gateway-cost-usd=0.00025" in answer.body
        assert [one["usage"] for one in answer.chunks if one.get("usage")] == [USAGE]
        # What broke off may be billed, to us and not to the answer.
        assert record.attempts[0].cost_nusd > 0
        accounts = trip.gateway.runtime.books._accounts.values()
        assert next(iter(accounts)).used == sum(one.cost_nusd for one in record.attempts)


@pytest.mark.parametrize("delivered", range(len(WORDS)))
async def test_wherever_it_breaks_off_the_whole_is_delivered(tmp_path: Path, delivered: int) -> None:
    first = begins(*WORDS[: delivered + 1])
    async with journey(tmp_path, first, second=in_pieces(TEXT, words=3, step=7), policy=ONCE) as trip:
        check_joined(trip, await trip.ask(stream=True))


@pytest.mark.parametrize(
    "said",
    ["The capital of Germany is Berlin.", "The capital of", "", "  The capital of France is Paris 🌍."],
    ids=["differs", "stops before", "says nothing", "begins otherwise"],
)
async def test_two_answers_that_differ_are_never_joined(tmp_path: Path, said: str) -> None:
    second = in_pieces(said, words=3, step=50)
    async with journey(tmp_path, begins(*WORDS[:4]), second=second, policy=ONCE) as trip:
        answer = await trip.ask(stream=True)
        check_broken_off(answer, "upstream_cut")
        assert "".join(one["choices"][0]["delta"]["content"] for one in answer.chunks[:-1]) == "".join(WORDS[:4])
        assert len(trip.record.attempts) == 2
        assert trip.record.error == "upstream_cut"
        # That it says it otherwise is no fault of the second model.
        assert trip.breaker("second/b")._consecutive == 0
        trip.check_at_rest()


async def test_after_an_answer_that_differs_nobody_else_is_asked(tmp_path: Path) -> None:
    agents = AGENTS.replace('["second/b"]', '["second/b", "second/c"]')
    async with journey(tmp_path, begins(*WORDS[:2]), agents=agents, policy=ONCE) as trip:
        trip.second.then(says("Berlin"), in_pieces(TEXT, words=4, step=50))
        check_broken_off(await trip.ask(stream=True), "upstream_cut")
        assert len(trip.second.turns) == 1


STOPS: dict[str, Scene] = {
    "resets": resets,
    "cuts a chunk": cuts_a_chunk,
    "ends without finish_reason": ends_cleanly,
    "says error": says_error,
    "finishes with error": finishes_with_error,
    "is malformed": sends_no_json,
    "stalls": stalls,
}


@pytest.mark.parametrize("name", STOPS)
async def test_however_it_breaks_off_it_is_joined(tmp_path: Path, name: str) -> None:
    has_read = asyncio.Event()

    async def stops(turn: Turn) -> None:
        await has_read.wait()
        await STOPS[name](turn)

    timeouts = "stall_s = 0.2" if name == "stalls" else ""
    first = begins(*WORDS[:2], then=stops)
    second = in_pieces(TEXT, words=5, step=50)
    async with journey(tmp_path, first, second=second, policy=ONCE, timeouts=timeouts) as trip:
        async with trip.post(stream=True) as response:
            begun = await response.content.readuntil(event(delta(WORDS[1])))
            has_read.set()
            answer = Answer(response.status, response.headers, begun + await response.content.read())
        check_joined(trip, answer)
        assert b'"error"' not in answer.body


async def test_a_drip_is_a_break(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "DRIP_WINDOW_S", 1e-9)

    has_read = asyncio.Event()

    async def keeps_alive(turn: Turn) -> None:
        await has_read.wait()
        # A comment puts the stall limit off, and says nothing.
        await turn.piece(b": one moment\n\n")
        await silent(turn)

    second = in_pieces(TEXT, words=5, step=50)
    first = begins(*WORDS[:4], then=keeps_alive)
    async with journey(tmp_path, first, second=second, policy=ONCE, timeouts="min_events_per_s = 1e9") as trip:
        async with trip.post(stream=True) as response:
            begun = await response.content.readuntil(event(delta(WORDS[0])))
            has_read.set()
            check_joined(trip, Answer(response.status, response.headers, begun + await response.content.read()))
        assert trip.record.attempts[0].fault is FaultKind.DRIP


def test_only_the_time_in_which_the_provider_was_waited_for_counts_against_it() -> None:
    stream = Relay.__new__(Relay)
    stream._window_waited_s, stream._window_events = 0.0, 0
    # A reader that takes an event a minute, from a provider that has each at once.
    for _ in range(1_000):
        stream._check_rate(0.2, 1, 0.001)
    # Just at the least rate, and just below it.
    stream._window_waited_s, stream._window_events = 0.0, 0
    stream._check_rate(0.2, 6, relay.DRIP_WINDOW_S)
    with pytest.raises(UpstreamFault) as caught:
        stream._check_rate(0.2, 5, relay.DRIP_WINDOW_S)
    assert caught.value.kind is FaultKind.DRIP


async def test_a_break_in_the_second_is_joined_by_a_third(tmp_path: Path) -> None:
    agents = AGENTS.replace('["second/b"]', '["second/b", "second/c"]')
    async with journey(tmp_path, begins(*WORDS[:2]), agents=agents, policy=ONCE) as trip:
        trip.second.then(begins(*WORDS[:4]), in_pieces(TEXT, words=4, step=50))
        answer = await trip.ask(stream=True)
        check_joined(trip, answer, ref="second/c")
        assert [turn.json()["model"] for turn in trip.second.turns] == ["b", "c"]
        assert [one.fault for one in trip.record.attempts] == [FaultKind.CUT, FaultKind.CUT, None]


async def test_a_second_that_breaks_before_it_has_caught_up_is_passed_over(tmp_path: Path) -> None:
    agents = AGENTS.replace('["second/b"]', '["second/b", "second/c"]')
    async with journey(tmp_path, begins(*WORDS[:4]), agents=agents, policy=ONCE) as trip:
        trip.second.then(begins(*WORDS[:2]), in_pieces(TEXT, words=4, step=50))
        check_joined(trip, await trip.ask(stream=True), ref="second/c")


async def test_what_the_second_refuses_never_hides_why_the_first_broke(tmp_path: Path) -> None:
    second = refuses(422, error_body("No such field.", type="invalid_request_error"))
    first = begins(*WORDS[:2], then=says_error)
    async with journey(tmp_path, first, second=second, policy=ONCE) as trip:
        answer = await trip.ask(stream=True)
        assert "The model fell over." in check_broken_off(answer, "engine_failure")
        assert len(trip.second.turns) == 1
        trip.check_at_rest()


async def test_without_anybody_else_a_break_is_told(tmp_path: Path) -> None:
    async with journey(tmp_path, begins(*WORDS[:2]), policy=ONCE) as trip:
        check_broken_off(await trip.ask(model="lone_agent", stream=True), "upstream_cut")
        assert len(trip.first.turns) == 1


async def test_the_callers_word_against_a_fallback_holds_for_breaks_too(tmp_path: Path) -> None:
    async with journey(tmp_path, begins(*WORDS[:2]), policy=ONCE) as trip:
        answer = await trip.ask(stream=True, headers={"x-gateway-fallback": "off"})
        check_broken_off(answer, "upstream_cut")
        assert not trip.second.turns


async def test_a_model_that_always_breaks_off_is_left_alone_in_the_end(tmp_path: Path) -> None:
    policy = f"{ONCE}[breakers]\nconsecutive = 1000\nmin_calls = 3\nopen_s = 300\nmax_open_s = 300\n"
    second = in_pieces(TEXT, words=4, step=50)
    async with journey(tmp_path, begins(*WORDS[:2]), second=second, policy=policy) as trip:
        for _ in range(5):
            assert (await trip.ask(stream=True)).streamed_text == TEXT
        assert trip.breaker().state is State.OPEN
        assert trip.breaker("second/b").state is State.CLOSED
        assert len(trip.first.turns) < 5


TOOL = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a": '}}
NEVER_JOINED: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "a tool call": ([chunk({"tool_calls": [TOOL]})], {}),
    "a tool call after text": (["The ", chunk({"tool_calls": [TOOL]})], {}),
    "reasoning": ([chunk({"reasoning_content": "Let me think."}), "The "], {}),
    "a refusal": ([chunk({"refusal": "I will not"})], {}),
    "two choices": (["The "], {"n": 2}),
    "a second choice unasked": (["The ", {**chunk({}), "choices": [{"index": 1, "delta": {"content": "A"}}]}], {}),
    "parts": ([chunk({"content": [{"type": "text", "text": "The "}]})], {}),
}


@pytest.mark.parametrize("name", NEVER_JOINED)
async def test_what_is_not_one_text_is_never_joined(tmp_path: Path, name: str) -> None:
    events, fields = NEVER_JOINED[name]
    async with journey(tmp_path, begins(*events), policy=ONCE) as trip:
        answer = await trip.ask(stream=True, **fields)
        check_broken_off(answer, "upstream_cut")
        assert len(answer.events) == len(events) + 1
        assert not trip.second.turns
        trip.check_at_rest()


SECONDS: dict[str, Any] = {
    "a tool call": chunk({"tool_calls": [TOOL]}),
    "reasoning": chunk({"reasoning": "Let me think."}),
    "another choice": {**chunk({}), "choices": [{"index": 1, "delta": {"content": "The "}}]},
    "a delta that is null": {**chunk({}), "choices": [{"index": 0, "delta": None, "finish_reason": "stop"}]},
    "a delta that is text": {**chunk({}), "choices": [{"index": 0, "delta": "The ", "finish_reason": "stop"}]},
    "a number for text": chunk({"content": 7}, "stop"),
}


@pytest.mark.parametrize("name", SECONDS)
async def test_a_second_of_another_kind_is_not_joined_to_the_first(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    second = streams(delta("The "), SECONDS[name], finish(), DONE)
    async with journey(tmp_path, begins(*WORDS[:2]), second=second, policy=ONCE) as trip:
        answer = await trip.ask(stream=True)
        check_broken_off(answer, "upstream_cut")
        assert len(answer.events) == 3
        assert "bug" not in caplog.text
        trip.check_at_rest()


async def test_of_a_long_answer_too_much_went_out_to_be_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "MAX_DELIVERED_BYTES", 1_000)
    async with journey(tmp_path, begins(*["word "] * 20), second=says(*["word "] * 30), policy=ONCE) as trip:
        check_broken_off(await trip.ask(stream=True), "upstream_cut")
        assert not trip.second.turns


async def test_no_money_for_another_attempt_leaves_the_break_as_it_is(tmp_path: Path) -> None:
    caps = '[[caps]]\nper = "total"\nscope = "model"\nusd = "0.000001"\nonly = { model = ["second/b"] }\n'
    async with journey(tmp_path, begins(*WORDS[:2]), policy=ONCE, caps=caps) as trip:
        check_broken_off(await trip.ask(stream=True), "upstream_cut")
        assert not trip.second.turns
        assert trip.record.error == "upstream_cut"
        trip.check_at_rest()


async def test_the_deadline_ends_a_stream_and_nobody_takes_it_up(tmp_path: Path) -> None:
    async with journey(tmp_path, begins(*WORDS[:2], then=stalls), policy=ONCE) as trip:
        answer = await trip.ask(stream=True, headers={"x-gateway-timeout-ms": "150"})
        check_broken_off(answer, "upstream_timeout")
        assert not trip.second.turns
        assert trip.record.attempts[0].fault is FaultKind.DEADLINE
        assert trip.breaker()._consecutive == 0


# --- Going on from an answer that has begun ---------------------------------------------------------------------------

MISTRAL = 'kind = "mistral"\nbase_url = "BASE_URL"\napi_key = "m"'
VLLM = 'kind = "compatible"\nbase_url = "BASE_URL"\ncontinues = true'
BEGUN = "".join(WORDS[:4])


@pytest.mark.parametrize("size", [1, 4, 100])
@pytest.mark.parametrize(
    ("table", "echoes"),
    [(MISTRAL, True), (MISTRAL, False), (VLLM, False)],
    ids=["mistral repeats it", "mistral goes on", "vllm goes on"],
)
async def test_a_model_that_can_goes_on_from_what_was_delivered(
    tmp_path: Path, table: str, size: int, echoes: bool
) -> None:
    text = TEXT if echoes else TEXT.removeprefix(BEGUN)
    second = in_pieces(text, words=size, step=20)
    async with journey(tmp_path, begins(*WORDS[:4]), second=second, second_table=table, policy=ONCE) as trip:
        check_joined(trip, await trip.ask(text="Where?", stream=True))
        (turn,) = trip.second.turns
        marks = {"prefix": True} if table is MISTRAL else {}
        assert turn.json()["messages"] == [
            {"role": "user", "content": "Where?"},
            {"role": "assistant", "content": BEGUN, **marks},
        ]
        assert turn.json().get("continue_final_message") == (True if table is VLLM else None)


@pytest.mark.parametrize("status", [400, 422])
async def test_where_going_on_is_refused_the_whole_is_asked_for(tmp_path: Path, status: int) -> None:
    no_prefill = refuses(status, error_body("The last message must be the user's.", type="invalid_request_error"))
    async with journey(tmp_path, begins(*WORDS[:4]), second_table=MISTRAL, policy=ONCE) as trip:
        trip.second.then(no_prefill, in_pieces(TEXT, words=4, step=50))
        check_joined(trip, await trip.ask(stream=True))
        asked, again = (turn.json()["messages"] for turn in trip.second.turns)
        assert [one["role"] for one in asked] == ["user", "assistant"]
        assert [one["role"] for one in again] == ["user"]
        assert [one.fault for one in trip.record.attempts] == [FaultKind.CUT, FaultKind.REJECTED, None]


async def test_a_refused_beginning_never_hides_why_the_answer_broke_off(tmp_path: Path) -> None:
    no_prefill = refuses(400, error_body("The last message must be the user's.", type="invalid_request_error"))
    first = begins(*WORDS[:2], then=says_error)
    async with journey(tmp_path, first, second=no_prefill, second_table=MISTRAL, policy=ONCE) as trip:
        assert "fell over" in check_broken_off(await trip.ask(stream=True), "engine_failure")
        assert len(trip.second.turns) == 2
        trip.check_at_rest()


async def test_going_on_may_bring_nothing_but_the_end(tmp_path: Path) -> None:
    second = in_pieces("", words=1, step=100, reason="length")
    async with journey(tmp_path, begins(*WORDS), second=second, second_table=MISTRAL, policy=ONCE) as trip:
        check_joined(trip, await trip.ask(stream=True))
        assert trip.record.finish_reason == "length"


# --- Held back, or told at once ---------------------------------------------------------------------------------------

HOLD = on_cut("hold") + NO_RETRIES


async def test_what_is_held_back_goes_out_when_it_is_whole(tmp_path: Path) -> None:
    go_on = asyncio.Event()

    async def waits(turn: Turn) -> None:
        await go_on.wait()
        for data in (finish(), usage_chunk(), DONE):
            await turn.event(data)
        await turn.end()

    async with journey(tmp_path, begins(*WORDS, then=waits), policy=HOLD) as trip:
        asked = asyncio.ensure_future(trip.post(stream=True).__aenter__())
        await trip.first.turn()
        await trip.let_others_act()
        # Not even a head.
        assert not asked.done()
        go_on.set()
        response = await asked
        answer = Answer(response.status, response.headers, await response.read())
        assert (answer.streamed_text, answer.events[-1]) == (TEXT, DONE)
        assert answer.headers["x-gateway-model"] == "first/a"
        assert trip.record.cost_basis == "exact"


@pytest.mark.parametrize("name", STOPS)
async def test_what_breaks_off_while_held_back_falls_back_silently(tmp_path: Path, name: str) -> None:
    timeouts = "stall_s = 0.2" if name == "stalls" else ""
    async with journey(tmp_path, begins(*WORDS[:2], then=STOPS[name]), policy=HOLD, timeouts=timeouts) as trip:
        answer = await trip.ask(stream=True)
        assert (answer.streamed_text, answer.events[-1]) == ("From the second.", DONE)
        assert answer.headers["x-gateway-model"] == "second/b"
        assert answer.headers["x-gateway-fallback"] == "first/a"
        assert trip.record.attempts[0].fault in (
            {FaultKind.STALL} if name == "stalls" else {FaultKind.RESET, FaultKind.SERVER}
        )
        trip.check_at_rest()


@pytest.mark.parametrize("last", [finish(), {**finish(), "usage": USAGE}])
async def test_a_held_stream_may_end_without_its_blank_line(tmp_path: Path, last: Any) -> None:
    async def stops_short(turn: Turn) -> None:
        await turn.begin_stream()
        await turn.piece(event(delta("Paris")) + event(last).rstrip(b"\n"))
        await turn.end()

    async with journey(tmp_path, stops_short, policy=HOLD) as trip:
        answer = await trip.ask(stream=True)
        assert (answer.streamed_text, answer.events[-1]) == ("Paris", DONE)
        assert len(trip.record.attempts) == 1


async def test_what_is_held_back_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempt, "MAX_ANSWER_BYTES", 100_000)

    async def talks_for_ever(turn: Turn) -> None:
        await turn.begin_stream()
        while True:
            await turn.event(delta("on and on " * 100))

    async with journey(tmp_path, talks_for_ever, policy=HOLD) as trip:
        assert (await trip.ask(stream=True)).streamed_text == "From the second."
        assert trip.record.attempts[0].fault is FaultKind.INVALID
        await trip.first.turns[0].peer_left.wait()


async def test_of_two_choices_held_back_both_must_finish(tmp_path: Path) -> None:
    other = {**chunk({}), "choices": [{"index": 1, "delta": {"content": "B"}, "finish_reason": "stop"}]}
    async with journey(
        tmp_path, streams(delta("A"), finish()), second=streams(delta("A"), finish(), other, DONE), policy=HOLD
    ) as trip:
        answer = await trip.ask(stream=True, n=2)
        assert answer.headers["x-gateway-model"] == "second/b"
        assert answer.events[-1] == DONE


async def test_when_everything_held_back_breaks_the_status_says_so(tmp_path: Path) -> None:
    broken = begins(*WORDS[:2])
    async with journey(tmp_path, broken, second=broken, policy=HOLD) as trip:
        answer = await trip.ask(stream=True)
        assert (answer.status, answer.error["code"]) == (502, "upstream_cut")
        assert answer.headers["Content-Type"].startswith("application/json")


async def test_each_agent_may_have_its_own_way(tmp_path: Path) -> None:
    policy = f'{on_cut("error")}[stream.agents]\nqa_agent = "continue"\n{NO_RETRIES}'
    agents = AGENTS.replace("[agents.lone_agent]", '[agents.third_agent]\nfallbacks = ["second/b"]')
    second = in_pieces(TEXT, words=4, step=50)
    async with journey(tmp_path, begins(*WORDS[:2]), second=second, policy=policy, agents=agents) as trip:
        check_joined(trip, await trip.ask(stream=True))
        check_broken_off(await trip.ask(model="third_agent", stream=True), "upstream_cut")
        assert len(trip.second.turns) == 1
