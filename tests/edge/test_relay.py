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

from gateway.domain.errors import FaultKind
from gateway.edge import relay
from gateway.edge.upstream import HttpExchange
from tests.journey import Answer, Journey, journey
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
    says,
    silent,
    streams,
    usage_chunk,
)

JSON = msgspec.json


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
        assert [account.posted for account in accounts] == [25_000, 1, 18]


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
    "sends what is no JSON": (sends_no_json, "upstream_invalid", FaultKind.INVALID),
    "stalls": (stalls, "upstream_timeout", FaultKind.TIMEOUT),
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

    async with journey(tmp_path, scene, timeouts="stall_s = 0.2" if name == "stalls" else "") as trip:
        async with trip.post(stream=True) as response:
            begun = await response.content.readuntil(event(delta("of ")))
            has_read.set()
            answer = Answer(response.status, response.headers, begun + await response.content.read())
        check_broken_off(answer, code)
        assert "".join(one["choices"][0]["delta"]["content"] for one in answer.chunks[:-1]) == "The capital of "
        record = trip.record
        assert (record.error, record.attempts[0].fault) == (code, kind)
        assert not record.client_left
        # What was delivered came from one model; another's answer is not glued to it.
        assert not trip.second.turns
        trip.check_at_rest()


async def test_an_error_of_the_provider_after_its_last_word_changes_nothing(tmp_path: Path) -> None:
    async def resets_at_the_end(turn: Turn) -> None:
        await turn.begin_stream()
        await turn.event(delta("Paris"))
        await turn.event(finish())
        turn.close()

    async with journey(tmp_path, resets_at_the_end) as trip:
        answer = await trip.ask(stream=True)
        assert answer.events[-1] == DONE
        # Its usage is not known, so the money is the bound's.
        assert (trip.record.error, trip.record.cost_basis) == ("", "bound")
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
        answer = await trip.ask(stream=True)
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
        await loop.sock_sendall(client, request(body=ordinary(stream=True)))
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
