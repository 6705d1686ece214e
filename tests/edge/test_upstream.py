"""Plain HTTP to a provider: what it gets to see, what is never taken from it, and connections that are used again."""

import asyncio
import gzip
import zlib
from pathlib import Path

import msgspec
import pytest

from gateway import __version__
from gateway.domain.errors import FaultKind, UpstreamFault
from gateway.domain.secret import Secret
from gateway.domain.settings import Upstream as UpstreamSettings
from gateway.edge import upstream
from gateway.edge.upstream import HttpUpstream
from tests.journey import KEY, NO_RETRIES, POLICY, journey
from tests.scripted import (
    DONE,
    Scene,
    Turn,
    completion,
    delta,
    error_body,
    event,
    finish,
    refuses,
    refusing_port,
    says,
    scripted,
    silent,
)

# --- What the provider gets to see ------------------------------------------------------------------------------------


async def test_of_a_callers_headers_only_the_trace_goes_on(tmp_path: Path) -> None:
    said = {
        "Authorization": "Bearer callers-own", "Cookie": "a=b", "User-Agent": "their-sdk/1", "x-internal": "1",
        "x-gateway-user": "u1", "OpenAI-Project": "p-1", "traceparent": "00-" + "1" * 32 + "-" + "2" * 16 + "-01",
        "tracestate": "a=b", "x-stainless-lang": "python",
    }  # fmt: skip
    async with journey(tmp_path, says("Paris")) as trip:
        assert (await trip.ask(headers=said)).status == 200
        (turn,) = trip.first.turns
        assert (turn.method, turn.target) == ("POST", "/v1/chat/completions")
        assert turn.headers == {
            "host": trip.first.base_url.removeprefix("http://").removesuffix("/v1"),
            "authorization": f"Bearer {KEY}",
            "content-type": "application/json",
            "content-length": str(len(turn.body)),
            "accept": "*/*",
            "accept-encoding": "identity",
            "user-agent": f"genesis-gateway/{__version__}",
            "traceparent": said["traceparent"],
            "tracestate": said["tracestate"],
        }


async def test_an_upstream_without_a_key_gets_no_authorization(tmp_path: Path) -> None:
    async with journey(tmp_path, says("Paris"), first_table='kind = "compatible"\nbase_url = "BASE_URL"') as trip:
        await trip.ask(headers={"Authorization": "Bearer callers-own"})
        assert "authorization" not in trip.first.turns[0].headers


async def test_a_proxy_in_the_environment_is_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with refusing_port() as held:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{held.getsockname()[1]}")
        async with journey(tmp_path, says("Paris")) as trip:
            assert (await trip.ask()).status == 200


async def test_cookies_are_neither_kept_nor_passed_on(tmp_path: Path) -> None:
    async with journey(tmp_path, says("Paris", headers={"Set-Cookie": "a=b; Path=/"})) as trip:
        for _ in range(2):
            assert "Set-Cookie" not in (await trip.ask()).headers
        assert "cookie" not in trip.first.turns[1].headers


# --- Our key ----------------------------------------------------------------------------------------------------------


def quotes_key(status: int, *, padding: int = 0, escaped: bool = False, stream: bool = False) -> Scene:
    """Quotes the key it was shown wherever an error has room for it."""

    async def scene(turn: Turn) -> None:
        shown = turn.headers["authorization"]
        body = msgspec.json.encode(error_body("." * padding + shown, type=shown, code=shown, param=shown))
        if escaped:
            body = body.replace(b"sk-", rb"\u0073k-")
        if stream:
            await turn.begin_stream()
            await turn.event(delta("Pa"))
            await turn.event(body)
            await turn.end()
        else:
            await turn.reply(body, status)

    return scene


# With 985 before it, the cut at 1,000 characters falls inside the key.
@pytest.mark.parametrize("padding, escaped", [(0, False), (0, True), (985, False)])
@pytest.mark.parametrize("status", [200, 400, 401, 403, 404, 422, 429, 500, 503])
async def test_our_key_never_reaches_a_caller(tmp_path: Path, status: int, padding: int, escaped: bool) -> None:
    async with journey(tmp_path, quotes_key(status, padding=padding, escaped=escaped)) as trip:
        for stream in (False, True):
            answer = await trip.ask(model="lone_agent", stream=stream)
            assert answer.status >= 400
            assert KEY[:6].encode() not in answer.body
            assert KEY not in str(answer.headers)
        assert KEY[:6] not in trip.gateway.runtime.journal.path.read_text()


async def test_our_key_never_reaches_a_caller_inside_a_stream(tmp_path: Path) -> None:
    async with journey(tmp_path, quotes_key(200, stream=True)) as trip:
        answer = await trip.ask(model="lone_agent", stream=True)
        assert b"Bearer ***" in answer.body
        assert KEY[:6].encode() not in answer.body


# --- Bodies -----------------------------------------------------------------------------------------------------------


async def test_an_answer_that_comes_compressed_unasked_goes_out_plain(tmp_path: Path) -> None:
    packed = gzip.compress(msgspec.json.encode(completion("Paris")))
    async with journey(tmp_path, refuses(200, packed, {"Content-Encoding": "gzip"})) as trip:
        answer = await trip.ask()
        assert answer.text == "Paris"
        assert "Content-Encoding" not in answer.headers


async def test_a_stream_that_comes_compressed_unasked_goes_out_plain(tmp_path: Path) -> None:
    async def scene(turn: Turn) -> None:
        packer = zlib.compressobj(wbits=31)
        await turn.begin_stream({"Content-Encoding": "gzip"})
        for data in (delta("Pa"), delta("ris"), finish(), DONE):
            await turn.piece(packer.compress(event(data)) + packer.flush(zlib.Z_SYNC_FLUSH))
        await turn.piece(packer.flush())
        await turn.end()

    async with journey(tmp_path, scene) as trip:
        answer = await trip.ask(stream=True)
        assert answer.streamed_text == "Paris"
        assert answer.events[-1] == DONE


@pytest.mark.parametrize("status", [200, 400, 500])
async def test_a_body_without_measure_is_not_read_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    monkeypatch.setattr(upstream, "MAX_ANSWER_BYTES", 100_000)

    async def goes_on_for_ever(turn: Turn) -> None:
        await turn.raw(b"HTTP/1.1 %d Whatever\r\nContent-Type: application/json\r\n\r\n" % status)
        while True:
            await turn.raw(b" " * 10_000)

    async with journey(tmp_path, goes_on_for_ever) as trip:
        answer = await trip.ask()
        assert answer.text == "From the second."
        assert trip.record.attempts[0].fault is FaultKind.INVALID
        await trip.first.turns[0].peer_left.wait()


async def test_a_small_body_that_unpacks_to_a_large_one_is_not_unpacked_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upstream, "MAX_ANSWER_BYTES", 1_000_000)
    bomb = gzip.compress(b'{"choices": "' + b" " * 20_000_000)
    async with journey(tmp_path, refuses(200, bomb, {"Content-Encoding": "gzip"})) as trip:
        assert (await trip.ask()).text == "From the second."
        assert trip.record.attempts[0].fault is FaultKind.INVALID


# --- Connections ------------------------------------------------------------------------------------------------------


async def test_a_connection_is_used_again_after_a_whole_answer_a_stream_and_a_refusal(tmp_path: Path) -> None:
    async with journey(tmp_path, says("a"), refuses(400, error_body()), says("b")) as trip:
        for stream in (False, False, True, True, False):
            await trip.ask(stream=stream)
        assert len(trip.first.turns) == 5
        assert trip.first.connections == 1


async def test_a_connection_whose_answer_was_not_read_to_its_end_is_not_used_again(tmp_path: Path) -> None:
    async def goes_on_after_done(turn: Turn) -> None:
        await turn.begin_stream()
        for data in (delta("Paris"), finish(), DONE):
            await turn.event(data)
        await turn.peer_left.wait()

    async with journey(tmp_path, goes_on_after_done, says("again")) as trip:
        assert (await trip.ask(stream=True)).events[-1] == DONE
        await trip.first.turns[0].peer_left.wait()
        assert (await trip.ask(stream=True)).streamed_text == "again"
        assert trip.first.connections == 2


def half_of_it(status: int = 200, *, stream: bool = False) -> Scene:
    """A length that is half of the body's, and no byte beyond it yet: whole to HTTP, and no sense to anybody."""

    async def scene(turn: Turn) -> None:
        body = event(delta("Pa")) * 3 if stream else msgspec.json.encode(completion("Paris"))
        kind = "text/event-stream" if stream else "application/json"
        length = len(body) // 2
        await turn.raw(
            b"HTTP/1.1 %d X\r\nContent-Type: %b\r\nContent-Length: %d\r\n\r\n" % (status, kind.encode(), length)
            + body[:length]
        )

    return scene


@pytest.mark.parametrize(("status", "stream"), [(200, False), (200, True), (503, False)])
async def test_after_a_body_that_made_no_sense_its_rest_cannot_pass_for_the_next_answer(
    tmp_path: Path, status: int, stream: bool
) -> None:
    scenes = half_of_it(status, stream=stream), says("Paris")
    async with journey(tmp_path, *scenes, policy=POLICY + NO_RETRIES) as trip:
        await trip.ask(model="lone_agent", stream=stream)
        # Nobody could use it again, whatever still comes on it: it is closed, and not only left aside.
        await trip.first.turns[0].peer_left.wait()
        assert (await trip.ask(model="lone_agent")).text == "Paris"
        assert [turn.connection for turn in trip.first.turns] == [0, 1]


async def test_a_connection_that_the_provider_has_closed_meanwhile_is_noticed(tmp_path: Path) -> None:
    async def answers_and_closes(turn: Turn) -> None:
        await says("Paris")(turn)
        turn.close()

    async with journey(tmp_path, answers_and_closes) as trip:
        for _ in range(3):
            assert (await trip.ask(model="lone_agent")).text == "Paris"
            await trip.let_others_act()
        assert trip.first.connections == 3


# --- The interface, without a gateway around it -----------------------------------------------------------------------


async def test_sending_is_bounded_and_a_broken_body_says_so() -> None:
    async def promises_more(turn: Turn) -> None:
        await turn.raw(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc")
        turn.close()

    async with scripted(silent, promises_more) as provider:
        pool = HttpUpstream("p", UpstreamSettings(kind="compatible"), f"{provider.base_url}/")
        try:
            with pytest.raises(UpstreamFault) as caught:
                await pool.send(b"{}", {}, within_s=0.02)
            assert caught.value.kind is FaultKind.FIRST_BYTE
            await provider.turns[0].peer_left.wait()
            exchange = await pool.send(b"{}", {}, within_s=20)
            with pytest.raises(UpstreamFault) as caught:
                await exchange.read()
            assert caught.value.kind is FaultKind.CUT
            exchange.close(is_sound=False)
        finally:
            await pool.close()


async def test_no_more_connections_are_opened_than_the_limit_says(tmp_path: Path) -> None:
    go_on = asyncio.Event()
    most = 0

    async def waits(turn: Turn) -> None:
        await go_on.wait()
        await says("Paris")(turn)

    table = 'kind = "compatible"\nbase_url = "BASE_URL"\nmax_connections = 3'
    async with journey(tmp_path, waits, first_table=table) as trip:
        asked = [asyncio.ensure_future(trip.ask()) for _ in range(10)]
        await trip.first.turn(2)
        await trip.let_others_act()
        most = len(trip.first.turns)
        go_on.set()
        assert {(await answer).status for answer in asked} == {200}
        assert most == trip.first.connections == 3


@pytest.mark.parametrize(
    ("model", "target"),
    [
        ("", "/v1/models"),
        ("ft:open-mistral-7b:5010731d:20251031:ecc3829c", "/v1/models/ft:open-mistral-7b:5010731d:20251031:ecc3829c"),
        ("meta-llama/Llama-3.1-8B", "/v1/models/meta-llama/Llama-3.1-8B"),
        ("a b?c#d%2e\r\né", "/v1/models/a%20b%3Fc%23d%252e%0D%0A%C3%A9"),
    ],
)
async def test_a_model_is_looked_up_under_its_id_and_with_our_key(model: str, target: str) -> None:
    async def shows(turn: Turn) -> None:
        await turn.reply({"id": "m"})

    async with scripted(shows) as provider:
        pool = HttpUpstream("one", UpstreamSettings(kind="compatible", api_key=Secret(KEY)), f"{provider.base_url}/")
        try:
            for _ in range(2):
                exchange = await pool.look_up(model, within_s=5)
                assert (exchange.status, await exchange.read()) == (200, b'{"id":"m"}')
                exchange.close(is_sound=True)
        finally:
            await pool.close()
        assert [(turn.method, turn.target, turn.body) for turn in provider.turns] == [("GET", target, b"")] * 2
        assert {turn.headers["authorization"] for turn in provider.turns} == {f"Bearer {KEY}"}
        assert provider.connections == 1


async def test_a_look_up_fails_as_a_call_does() -> None:
    async with scripted(silent) as provider:
        pool = HttpUpstream("one", UpstreamSettings(kind="compatible"), provider.base_url)
        try:
            with pytest.raises(UpstreamFault) as caught:
                await pool.look_up("m", within_s=0.02)
            assert caught.value.kind is FaultKind.FIRST_BYTE
        finally:
            await pool.close()
