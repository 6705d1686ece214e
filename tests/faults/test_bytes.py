"""Every way to break that has bytes of its own, in four settings: plain and streamed, with a fallback and without.

What a fault leads to stands in one table, `FAULTS`: the whole answer, a refusal before its first byte, or a stream that
ends in an error event. With a healthy fallback there is always the whole answer. And after each, the next call works,
no call stays open and no money is held.
"""

import asyncio
import gzip
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest

from gateway.domain.sse import MAX_EVENT_BYTES
from gateway.edge import relay, upstream
from tests.faults.stage import SHORT, TEXT, WORDS, check_at_rest, check_honest, check_serves_on, stage, timeouts
from tests.journey import QUICK_RETRIES
from tests.scripted import (
    DONE,
    USAGE,
    Scene,
    Turn,
    chunk,
    completion,
    delta,
    error_body,
    event,
    finish,
    head,
    refusing_port,
    resets,
    says,
    silent,
    streams,
    usage_chunk,
)

JSON = msgspec.json
WHOLE = ""
CUT, INVALID, TIMEOUT, UNREACHABLE = "upstream_cut", "upstream_invalid", "upstream_timeout", "upstream_unreachable"
PLAIN_HEAD = {"Content-Type": "application/json"}
STREAM_HEAD = {"Content-Type": "text/event-stream"}
HTML = b"<html><body><h1>502 Bad Gateway</h1></body></html>"


class Fault(NamedTuple):
    """A scene, and the code of the error it leads to where there is no fallback; None: there is no such thing."""

    scene: Scene
    plain: str | None
    stream: str | None
    # Whether the stream has begun when it breaks, so that the error is its last event.
    is_begun: bool = False
    # Further lines of the provider's table in config.toml.
    table: str = ""
    # Of a whole answer: whether its own account of its tokens can be believed.
    basis: str = "exact"


# --- The good answer, as bytes to spoil -------------------------------------------------------------------------------


def is_stream(turn: Turn) -> bool:
    return bool(turn.json().get("stream"))


def good_body(turn: Turn) -> bytes:
    """The whole answer, plain or as server-sent events."""
    if not is_stream(turn):
        return JSON.encode(completion(TEXT))
    return b"".join(map(event, (*map(delta, WORDS), finish(), usage_chunk(), DONE)))


def kind_of(turn: Turn) -> dict[str, str]:
    return STREAM_HEAD if is_stream(turn) else PLAIN_HEAD


async def begin(turn: Turn, **headers: str) -> None:
    """A good head in chunked framing."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    await turn.raw(head(200, {**kind_of(turn), "Transfer-Encoding": "chunked", **named}))


def framed(size: int = 0, *, spoil: Callable[[bytes], bytes] = bytes, **headers: str) -> Scene:
    """The good answer after `spoil`, in chunks of `size` bytes, or in one."""

    async def scene(turn: Turn) -> None:
        body = spoil(good_body(turn))
        step = size or len(body)
        await begin(turn, **headers)
        pieces = (body[start : start + step] for start in range(0, len(body), step))
        await turn.raw(b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces))
        await turn.end()

    return scene


def answers(status: int, body: bytes, **headers: str) -> Scene:
    """The same reply to whatever is asked."""

    async def scene(turn: Turn) -> None:
        await turn.reply(body, status, {name.replace("_", "-"): value for name, value in headers.items()})

    return scene


def with_usage(*found: object) -> Scene:
    """A good answer, but for what it says it used."""

    async def scene(turn: Turn) -> None:
        if is_stream(turn):
            used = ({**usage_chunk(), "usage": one} for one in found)
            await streams(*map(delta, WORDS), finish(), *used, DONE)(turn)
        else:
            more = {"usage": found[-1]} if found else {}
            body = completion(TEXT)
            del body["usage"]
            await turn.reply({**body, **more})

    return scene


def says_raw(data: bytes, then: Callable[[Turn], Awaitable[None]] | None = None) -> Scene:
    """These bytes in the place of an answer."""

    async def scene(turn: Turn) -> None:
        await turn.raw(data)
        if then is None:
            turn.close()
        else:
            await then(turn)

    return scene


# --- Faults that need more than a spoilt body -------------------------------------------------------------------------


async def head_then_silence(turn: Turn) -> None:
    await begin(turn)
    await silent(turn)


async def stalls_half_way(turn: Turn) -> None:
    body = good_body(turn)
    await begin(turn)
    await turn.piece(body[: len(body) // 2])
    await silent(turn)


async def half_a_chunk(turn: Turn) -> None:
    body = good_body(turn)
    await begin(turn)
    await turn.raw(b"%x\r\n" % len(body) + body[: len(body) // 2])
    turn.close()


async def reset_half_way(turn: Turn) -> None:
    body = good_body(turn)
    await begin(turn)
    await turn.piece(body[: len(body) // 2])
    turn.reset()


async def let_it_arrive() -> None:
    """The gateway shares this loop: after some turns of it, it has read what was sent."""
    for _ in range(50):
        await asyncio.sleep(0)


def broken_framing(*, at_once: bool) -> Scene:
    """Half an answer, then a chunk whose size is none."""

    async def scene(turn: Turn) -> None:
        body = good_body(turn)
        half = body[: len(body) // 2]
        begun = head(200, {**kind_of(turn), "Transfer-Encoding": "chunked"}) + b"%x\r\n%b\r\n" % (len(half), half)
        broken = b"zz\r\nno size\r\n"
        await turn.raw(begun + broken if at_once else begun)
        if not at_once:
            await let_it_arrive()
            await turn.raw(broken)
        await silent(turn)

    return scene


async def tidy_end_half_way(turn: Turn) -> None:
    await framed(spoil=lambda body: body[: len(body) // 2])(turn)


def length_off_by(share: float, *, at_once: bool = True) -> Scene:
    """A good body under a wrong Content-Length; what is beyond it comes with the rest, or after it."""

    async def scene(turn: Turn) -> None:
        body = good_body(turn)
        length = int(len(body) * share)
        await turn.raw(
            head(200, {**kind_of(turn), "Content-Length": str(length)}) + body[: None if at_once else length]
        )
        if not at_once:
            await let_it_arrive()
            await turn.raw(body[length:])
        turn.close()

    return scene


def http_1_0(share: float) -> Scene:
    """The end of the body is the end of the connection, so only the body itself can tell whether it is whole."""

    async def scene(turn: Turn) -> None:
        body = good_body(turn)
        lines = head(200, kind_of(turn)).replace(b"HTTP/1.1", b"HTTP/1.0")
        await turn.raw(lines + body[: int(len(body) * share)])
        turn.close()

    return scene


def after(interim: bytes) -> Scene:
    """The good answer after responses that are none."""

    async def scene(turn: Turn) -> None:
        await turn.raw(interim)
        await framed()(turn)

    return scene


async def garbage_after_the_end(turn: Turn) -> None:
    body = good_body(turn)
    garbage = event(b"what is this") + event(delta("MORE")) + b"\x00\xff\n\n"
    if is_stream(turn):
        await begin(turn)
        await turn.piece(body + garbage)
        await turn.end()
    else:
        await turn.raw(head(200, {**PLAIN_HEAD, "Content-Length": str(len(body))}) + body + garbage)


async def garbage_after_the_end_for_ever(turn: Turn) -> None:
    await begin(turn)
    await turn.piece(good_body(turn))
    while not turn.peer_left.is_set():
        await turn.piece(b"data: more\n\n" * 1_000)


async def noise(turn: Turn) -> None:
    """All that a good SSE parser has to skip, between all events."""
    if not is_stream(turn):
        await framed(spoil=lambda body: b"\r\n \t" + body + b"\r\n")(turn)
        return
    between = b": keep-alive\n\nevent: ping\n\nid: 7\nretry: 10\nevent: message\ndata\ndata:\n\nunknown: field\n"
    await framed(spoil=lambda body: between + body.replace(b"\n\n", b"\n\n" + between))(turn)


async def compressed(turn: Turn) -> None:
    await framed(spoil=gzip.compress, Content_Encoding="gzip")(turn)


async def compressed_and_cut(turn: Turn) -> None:
    await framed(spoil=lambda body: gzip.compress(body)[: len(gzip.compress(body)) // 2], Content_Encoding="gzip")(turn)


def endless(prefix: bytes) -> Scene:
    """After `prefix`, a line that never ends; a stream goes on until the gateway closes it."""

    async def scene(turn: Turn) -> None:
        await begin(turn)
        await turn.piece(prefix if is_stream(turn) else b'{"id": "')
        while turn.sent_bytes < 16 * MAX_EVENT_BYTES:
            await turn.piece(b"x" * 2**18)

    return scene


async def stream_of_the_wrong_type(turn: Turn) -> None:
    """Events under another name, or a chat completion under another name."""
    body = good_body(turn)
    kind = "application/json" if is_stream(turn) else "text/plain"
    await turn.reply(body, 200, {"Content-Type": kind})


async def no_stream_at_all(turn: Turn) -> None:
    await turn.reply(completion(TEXT))


REDIRECT = "http://127.0.0.1:9/elsewhere"
OVERLOADED = JSON.encode(error_body("Overloaded.", code="overloaded_error"))

FAULTS = {
    # No answer at all.
    "reset before headers": Fault(resets, UNREACHABLE, UNREACHABLE),
    "closed before headers": Fault(says_raw(b""), UNREACHABLE, UNREACHABLE),
    "closed in the head": Fault(says_raw(b"HTTP/1.1 200 OK\r\nConte"), UNREACHABLE, UNREACHABLE),
    "reset in the head": Fault(says_raw(b"HTTP/1.1 200 OK\r\nConte", resets), UNREACHABLE, UNREACHABLE),
    "not HTTP": Fault(says_raw(b"SSH-2.0-OpenSSH_9.6\r\n"), INVALID, INVALID),
    "a head without end": Fault(
        says_raw(b"HTTP/1.1 200 OK\r\nX: " + b"x" * 2**20), INVALID, INVALID
    ),
    "silence": Fault(silent, TIMEOUT, TIMEOUT, table=timeouts(SHORT)),
    "headers, then silence": Fault(head_then_silence, TIMEOUT, TIMEOUT, table=timeouts(SHORT)),
    # A refusal need not be read to its end to be one, so it has no longer than an answer's begin.
    "a refusal without its end": Fault(
        says_raw(head(503, {**PLAIN_HEAD, "Content-Length": "100"}), silent), TIMEOUT, TIMEOUT,
        table=timeouts("first_byte_s = 0.3\nfirst_token_s = 0.3"),
    ),
    # Half an answer.
    "stall": Fault(stalls_half_way, TIMEOUT, TIMEOUT, is_begun=True, table=timeouts(SHORT)),
    "half a chunk": Fault(half_a_chunk, CUT, CUT, is_begun=True),
    "reset half way": Fault(reset_half_way, CUT, CUT, is_begun=True),
    "broken framing": Fault(broken_framing(at_once=False), CUT, CUT, is_begun=True),
    "broken framing from the first": Fault(broken_framing(at_once=True), INVALID, INVALID),
    "a tidy end half way": Fault(tidy_end_half_way, INVALID, CUT, is_begun=True),
    "length too long": Fault(length_off_by(1.1), CUT, WHOLE),
    "length too short": Fault(length_off_by(0.5), INVALID, INVALID),
    "length too short, the rest later": Fault(length_off_by(0.5, at_once=False), INVALID, CUT, is_begun=True),
    "HTTP/1.0, cut": Fault(http_1_0(0.5), INVALID, CUT, is_begun=True),
    "no finish, no [DONE]": Fault(streams(*map(delta, WORDS)), None, CUT, is_begun=True),
    # A whole answer, oddly sent.
    "byte by byte, through UTF-8": Fault(framed(1), WHOLE, WHOLE),
    "CRLF": Fault(framed(spoil=lambda body: body.replace(b"\n", b"\r\n")), WHOLE, WHOLE),
    "CR": Fault(framed(spoil=lambda body: body.replace(b"\n", b"\r")), WHOLE, WHOLE),
    "CRLF, byte by byte": Fault(framed(1, spoil=lambda body: body.replace(b"\n", b"\r\n")), WHOLE, WHOLE),
    "a byte order mark": Fault(framed(spoil=lambda body: b"\xef\xbb\xbf" + body), None, WHOLE),
    "comments, event:, id:": Fault(noise, WHOLE, WHOLE),
    "no [DONE]": Fault(streams(*map(delta, WORDS), finish(), usage_chunk()), None, WHOLE),
    "no finish_reason": Fault(streams(*map(delta, WORDS), usage_chunk(), DONE), None, WHOLE),
    # What follows a plain answer is a response to nothing, so the connection cannot be believed at all.
    "garbage after the end": Fault(garbage_after_the_end, INVALID, WHOLE),
    "garbage for ever after the end": Fault(garbage_after_the_end_for_ever, None, WHOLE),
    "gzip unasked for": Fault(compressed, WHOLE, WHOLE),
    "HTTP/1.0": Fault(http_1_0(1), WHOLE, WHOLE),
    "100 before it": Fault(after(b"HTTP/1.1 100 Continue\r\n\r\n"), WHOLE, WHOLE),
    "103 before it, thrice": Fault(after(b"HTTP/1.1 103 Early Hints\r\nLink: <a>\r\n\r\n" * 3), WHOLE, WHOLE),
    # A whole answer with odd accounts.
    "usage absent": Fault(with_usage(), WHOLE, WHOLE, basis="estimate"),
    "usage null": Fault(with_usage(None), WHOLE, WHOLE, basis="estimate"),
    "usage negative": Fault(with_usage({**USAGE, "completion_tokens": -7}), WHOLE, WHOLE, basis="bound"),
    "usage absurd": Fault(with_usage({**USAGE, "prompt_tokens": 10**15}), WHOLE, WHOLE, basis="bound"),
    "usage beyond 64 bits": Fault(with_usage({**USAGE, "prompt_tokens": 10**30}), WHOLE, WHOLE, basis="bound"),
    "usage of text": Fault(with_usage("much"), WHOLE, WHOLE, basis="estimate"),
    "usage twice": Fault(with_usage({**USAGE, "prompt_tokens": 5}, USAGE), WHOLE, WHOLE),
    # No chat completion.
    "redirect": Fault(answers(302, b"", Location=REDIRECT), INVALID, INVALID),
    "redirect that keeps the method": Fault(answers(307, b"", Location=REDIRECT), INVALID, INVALID),
    "gzip broken": Fault(framed(Content_Encoding="gzip"), CUT, CUT),
    "gzip cut": Fault(compressed_and_cut, INVALID, CUT, is_begun=True),
    "an unknown encoding": Fault(framed(Content_Encoding="zstd"), INVALID, INVALID),
    "101": Fault(says_raw(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n"),
                 INVALID, INVALID),
    "204": Fault(says_raw(b"HTTP/1.1 204 No Content\r\n\r\n"), INVALID, INVALID),
    "an HTML error page": Fault(answers(502, HTML, Content_Type="text/html"), "upstream_error", "upstream_error"),
    "HTML under 200": Fault(answers(200, HTML, Content_Type="text/html"), INVALID, INVALID),
    "an empty 200": Fault(answers(200, b""), INVALID, INVALID),
    "an empty stream": Fault(streams(), None, INVALID),
    "nothing but [DONE]": Fault(streams(DONE), None, INVALID),
    "a preamble and the end": Fault(streams(chunk({"role": "assistant"}), DONE), None, INVALID),
    "an error under 200": Fault(answers(200, OVERLOADED), "overloaded_error", "overloaded_error"),
    "an error at the start of a stream": Fault(streams(OVERLOADED), None, "overloaded_error"),
    "an error in the stream": Fault(
        streams(*map(delta, WORDS[:9]), OVERLOADED, DONE), None, "overloaded_error", is_begun=True
    ),
    "no choices": Fault(answers(200, JSON.encode({**completion(TEXT), "choices": []})), INVALID, INVALID),
    "another content type": Fault(stream_of_the_wrong_type, WHOLE, INVALID),
    "no stream where one was asked for": Fault(no_stream_at_all, None, INVALID),
    "four malformed events": Fault(streams(delta(WORDS[0]), *[b"{"] * 4, DONE), None, CUT, is_begun=True),
    # Too much.
    "a first event without end": Fault(endless(b"data: "), None, INVALID),
    "a later event without end": Fault(endless(event(delta(WORDS[0])) + b"data: "), None, INVALID, is_begun=True),
}  # fmt: skip
CASES = [
    pytest.param(fault, stream, id=f"{name}, {'stream' if stream else 'plain'}")
    for name, fault in FAULTS.items()
    for stream in (False, True)
    if (fault.stream if stream else fault.plain) is not None
]


@pytest.mark.parametrize(("fault", "stream"), CASES)
async def test_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Fault, stream: bool) -> None:
    monkeypatch.setattr(relay, "READ_OUT_S", 0.05)
    expected = fault.stream if stream else fault.plain
    async with stage(tmp_path, fault.scene, first_table=fault.table) as trip:
        alone = await trip.ask(stream=stream, model="lone_agent")
        assert check_honest(alone) == expected, alone.body
        is_event = expected == WHOLE or (stream and fault.is_begun)
        assert (alone.status == 200) == is_event
        assert HTML not in alone.body
        record = trip.record
        assert record.error == expected
        if expected == WHOLE:
            assert record.cost_basis == fault.basis
        backed = await trip.ask(stream=stream)
        assert (backed.status, check_honest(backed)) == (200, WHOLE), backed.body
        served = trip.gateway.journal()[-1]
        assert served.model_sent == ("first/a" if expected == WHOLE else "second/b")
        assert len(trip.second.turns) == (expected != WHOLE)
        await check_serves_on(trip, stream=stream, model="lone_agent")
        assert not any(turn.target.endswith("elsewhere") for turn in trip.first.turns)


@pytest.mark.parametrize("name", [name for name, fault in FAULTS.items() if fault.is_begun])
async def test_a_stream_that_is_held_back_fails_like_a_plain_answer(tmp_path: Path, name: str) -> None:
    fault, other = FAULTS[name], "Another answer, and whole."
    policy = f'{QUICK_RETRIES}[stream]\non_cut = "hold"\n'
    table = timeouts("stall_s = 0.3") if fault.table else ""
    async with stage(tmp_path, fault.scene, second=(says(other),), first_table=table, policy=policy) as trip:
        alone = await trip.ask(stream=True, model="lone_agent")
        # Bytes beyond the announced length are noticed or not, as they come in time; either is told honestly.
        assert check_honest(alone) in (fault.stream, fault.plain)
        assert alone.status != 200
        # Nothing of the first answer went out, so the second need not be like it.
        backed = await trip.ask(stream=True)
        assert (backed.status, check_honest(backed, whole=other)) == (200, WHOLE), backed.body
        await check_serves_on(trip, model="lone_agent")


@pytest.mark.parametrize("stream", [False, True])
async def test_nobody_listens(tmp_path: Path, stream: bool) -> None:
    with refusing_port() as held:
        base_url = f"http://127.0.0.1:{held.getsockname()[1]}/v1"
        agents = """
[agents.qa_agent]
finetuned = "nobody/ft:a"
baseline  = "nobody/a"
fallbacks = ["second/b"]
[agents.lone_agent]
finetuned = "nobody/ft:a"
baseline  = "nobody/a"
"""
        nobody = f'[upstreams.nobody]\nkind = "compatible"\nbase_url = "{base_url}"\n'
        prices = '[prices."*"]\ninput_usd_per_mtok = "1"\noutput_usd_per_mtok = "2"\n'
        async with stage(tmp_path, silent, agents=agents, config=nobody + prices) as trip:
            alone = await trip.ask(stream=stream, model="lone_agent")
            assert (alone.status, check_honest(alone)) == (502, "upstream_unreachable")
            backed = await trip.ask(stream=stream)
            assert (backed.status, check_honest(backed)) == (200, WHOLE)
            assert trip.first.turns == []
            await check_serves_on(trip, stream=stream)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_kept_connection_is_closed_under_a_request(tmp_path: Path, stream: bool) -> None:
    async def closes(turn: Turn) -> None:
        turn.close()

    async with stage(tmp_path, says(*WORDS), closes, says(*WORDS)) as trip:
        for _ in range(2):
            answer = await trip.ask(stream=stream, model="lone_agent")
            assert (answer.status, check_honest(answer)) == (200, WHOLE)
            await check_at_rest(trip)
        one, two, three = trip.first.turns
        assert one.connection == two.connection != three.connection
        await check_serves_on(trip, stream=stream)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_hundred_thousand_tiny_chunks(tmp_path: Path, stream: bool) -> None:
    # One event, or one answer, of a hundred thousand chunks of a byte.
    whole = "x" * 100_000
    body = b"".join(map(event, (delta(whole), finish(), DONE))) if stream else JSON.encode(completion(whole))

    async def crumbles(turn: Turn) -> None:
        await begin(turn)
        for start in range(0, len(body), 1_000):
            await turn.raw(b"".join(b"1\r\n%c\r\n" % byte for byte in body[start : start + 1_000]))
        await turn.end()

    async with stage(tmp_path, crumbles) as trip:
        answer = await trip.ask(stream=stream, model="lone_agent")
        assert (answer.status, check_honest(answer, whole=whole)) == (200, WHOLE)
        await check_serves_on(trip, stream=stream)


@pytest.mark.parametrize("prefix", [b"data: ", event(delta(WORDS[0])) + b"data: ", b": "])
async def test_a_line_without_end_is_not_kept(tmp_path: Path, prefix: bytes) -> None:
    async with stage(tmp_path, endless(prefix)) as trip:
        answer = await trip.ask(stream=True, model="lone_agent")
        assert check_honest(answer) == "upstream_invalid"
        (turn,) = trip.first.turns
        await turn.peer_left.wait()
        # What the sockets hold on both sides is more than what the gateway took.
        assert MAX_EVENT_BYTES < turn.sent_bytes < 2 * MAX_EVENT_BYTES
        await check_serves_on(trip)


async def test_a_plain_answer_without_end_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream, "MAX_ANSWER_BYTES", MAX_EVENT_BYTES)
    async with stage(tmp_path, endless(b"")) as trip:
        answer = await trip.ask(model="lone_agent")
        assert (answer.status, check_honest(answer)) == (502, "upstream_invalid")
        (turn,) = trip.first.turns
        await turn.peer_left.wait()
        assert turn.sent_bytes < 2 * MAX_EVENT_BYTES
        await check_serves_on(trip, stream=False)
