"""Framing, deadlines and limits of connections, against bytes that no client library would send."""

import asyncio
import contextlib
import logging
import random
import socket
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from aiohttp import http_parser

from gateway.app import Gateway
from gateway.domain.settings import SimulatorSettings
from gateway.edge.listener import MAX_HEAD_BYTES, Connection, require_c_parser
from tests.raw_http import (
    CANARY,
    PATIENCE_S,
    check_ordinary,
    check_refusal,
    check_silence,
    connected,
    ordinary,
    request,
)
from tests.running import CHAT, RunningGateway, running_gateway

BODY = ordinary()
LENGTH = b"Content-Length: %d\r\n" % len(BODY)
CHUNKED = b"Transfer-Encoding: chunked\r\n"
IN_CHUNKS = b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)
# Served, it would be a second reply; as a part of a body it is nothing.
SMUGGLED = request("GET", "/v1/models/qa_agent")


def post(headers: bytes, body: bytes) -> bytes:
    return request(headers=headers, body=body, length=False)


async def until(is_so: Callable[[], bool]) -> None:
    """Let the loop turn until something has happened."""
    async with asyncio.timeout(PATIENCE_S):
        while not is_so():  # noqa: ASYNC110  (no event is offered for what is asked)
            await asyncio.sleep(0)


async def check_next_connection(gateway: RunningGateway) -> None:
    async with connected(gateway.data_url) as connection:
        await check_ordinary(connection)


# --- Framing ---------------------------------------------------------------------------------------------------------

AMBIGUOUS = {
    "CL.TE": post(b"Content-Length: 4\r\n" + CHUNKED, b"0\r\n\r\n" + SMUGGLED),
    "TE.CL": post(CHUNKED + LENGTH, IN_CHUNKS + SMUGGLED),
    "TE.CL of zero": post(CHUNKED + b"Content-Length: 0\r\n", IN_CHUNKS + SMUGGLED),
    "two lengths that differ": post(LENGTH + b"Content-Length: 5\r\n", BODY + SMUGGLED),
    "two lengths that agree": post(LENGTH + LENGTH, BODY + SMUGGLED),
    "a list of lengths": post(b"Content-Length: %d, %d\r\n" % (len(BODY), len(BODY)), BODY + SMUGGLED),
    "a negative length": post(b"Content-Length: -1\r\n", BODY + SMUGGLED),
    "a length with a plus": post(b"Content-Length: +%d\r\n" % len(BODY), BODY + SMUGGLED),
    "a length in hex": post(b"Content-Length: 0x10\r\n", BODY + SMUGGLED),
    "a length with an underscore": post(b"Content-Length: 1_0\r\n", BODY + SMUGGLED),
    "a length with a space inside": post(b"Content-Length: 1 0\r\n", BODY + SMUGGLED),
    "a length with a decimal point": post(b"Content-Length: 5.0\r\n", BODY + SMUGGLED),
    "a length beyond 64 bits": post(b"Content-Length: 18446744073709551617\r\n", BODY + SMUGGLED),
    "a length in Arabic digits": post("Content-Length: ٣\r\n".encode(), BODY + SMUGGLED),
    "an empty length": post(b"Content-Length: \r\n", BODY + SMUGGLED),
    "chunked, identity": post(b"Transfer-Encoding: chunked, identity\r\n", IN_CHUNKS + SMUGGLED),
    "identity": post(b"Transfer-Encoding: identity\r\n", IN_CHUNKS + SMUGGLED),
    "identity, chunked": post(b"Transfer-Encoding: identity, chunked\r\n", IN_CHUNKS + SMUGGLED),
    "gzip, chunked": post(b"Transfer-Encoding: gzip, chunked\r\n", IN_CHUNKS + SMUGGLED),
    "chunked, chunked": post(b"Transfer-Encoding: chunked, chunked\r\n", IN_CHUNKS + SMUGGLED),
    "chunked twice": post(CHUNKED + CHUNKED, IN_CHUNKS + SMUGGLED),
    "chunked and identity": post(CHUNKED + b"Transfer-Encoding: identity\r\n", IN_CHUNKS + SMUGGLED),
    "xchunked": post(b"Transfer-Encoding: xchunked\r\n", IN_CHUNKS + SMUGGLED),
    "chunked after a vertical tab": post(b"Transfer-Encoding: \x0bchunked\r\n", IN_CHUNKS + SMUGGLED),
    "chunked and a NUL": post(b"Transfer-Encoding: chunked\0\r\n", IN_CHUNKS + SMUGGLED),
    "chunked in quotes": post(b'Transfer-Encoding: "chunked"\r\n', IN_CHUNKS + SMUGGLED),
    "chunked under HTTP/1.0": post(CHUNKED, IN_CHUNKS + SMUGGLED).replace(b"HTTP/1.1", b"HTTP/1.0", 1),
    "an obs-fold": post(b"X-A: 1\r\n Content-Length: 5\r\n" + LENGTH, BODY + SMUGGLED),
    "an obs-fold in the encoding": post(b"Transfer-Encoding:\r\n chunked\r\n", IN_CHUNKS + SMUGGLED),
    "an obs-fold on the first header": post(b"", b"").replace(b"Host", b" Host", 1) + SMUGGLED,
    "bare line feeds": post(LENGTH, BODY).replace(b"\r\n", b"\n") + SMUGGLED,
    "one bare line feed": post(b"X-A: 1\n" + LENGTH, BODY + SMUGGLED),
    "a bare carriage return": post(b"X-A: 1\rTransfer-Encoding: chunked\r\n" + LENGTH, BODY + SMUGGLED),
    "a space before the colon": post(b"Content-Length : %d\r\n" % len(BODY), BODY + SMUGGLED),
    "a space before the encoding's colon": post(b"Transfer-Encoding : chunked\r\n" + LENGTH, BODY + SMUGGLED),
    "a header without a name": post(b": x\r\n" + LENGTH, BODY + SMUGGLED),
    "a header without a colon": post(b"X-A\r\n" + LENGTH, BODY + SMUGGLED),
    "a name that is no token": post(b"X(A): 1\r\n" + LENGTH, BODY + SMUGGLED),
    "a name beyond ASCII": post("Contënt-Length: 5\r\n".encode() + LENGTH, BODY + SMUGGLED),
    "two hosts": post(b"Host: other\r\n" + LENGTH, BODY + SMUGGLED),
    "a chunk size with a plus": post(CHUNKED, b"+" + IN_CHUNKS + SMUGGLED),
    "a chunk size with 0x": post(CHUNKED, b"0x" + IN_CHUNKS + SMUGGLED),
    "a chunk size with a space before": post(CHUNKED, b" " + IN_CHUNKS + SMUGGLED),
    "a chunk size beyond 64 bits": post(CHUNKED, b"1000000000000000f" + IN_CHUNKS + SMUGGLED),
    "chunks parted by bare line feeds": post(CHUNKED, IN_CHUNKS.replace(b"\r\n", b"\n") + SMUGGLED),
    "a line feed in a chunk's extension": post(CHUNKED, b"5;a\nb\r\nhello\r\n0\r\n\r\n" + SMUGGLED),
    "a chunk longer than it says": post(CHUNKED, b"1\r\n" + BODY + b"\r\n0\r\n\r\n" + SMUGGLED),
    "a broken version": post(LENGTH, BODY + SMUGGLED).replace(b"HTTP/1.1", b"HTTP/1.1 HTTP/1.0", 1),
    "a version of the future": post(LENGTH, BODY + SMUGGLED).replace(b"HTTP/1.1", b"HTTP/3.7", 1),
    "two spaces in the request line": post(LENGTH, BODY + SMUGGLED).replace(b" HTTP/1.1", b"  x HTTP/1.1", 1),
    "a target beyond ASCII": request("GET", "/v1/models/").replace(b" HTTP", b"\xff\xfe HTTP", 1) + SMUGGLED,
    "a target with an open bracket": request("GET", "http://[::1/v1/models") + SMUGGLED,
    "a target with a port beyond ports": request("GET", "http://h:99999999/v1/models") + SMUGGLED,
}


@pytest.mark.parametrize("name", AMBIGUOUS)
async def test_what_two_parsers_could_read_in_two_ways_is_refused_and_ends_the_connection(
    tmp_path: Path, name: str
) -> None:
    async with running_gateway(tmp_path) as gateway:
        async with connected(gateway.data_url) as connection:
            connection.send(AMBIGUOUS[name])
            check_refusal(await connection.reply(), 400, "bad_request")
            # No second reply: whatever followed was not taken for a request.
            assert await connection.rest() == b""
        assert not gateway.simulator.calls
        await check_next_connection(gateway)


@pytest.mark.parametrize("cut", [1, 7, 40, 90, 120, -1])
async def test_an_ambiguous_request_is_refused_however_it_is_cut_into_segments(tmp_path: Path, cut: int) -> None:
    whole = AMBIGUOUS["CL.TE"]
    async with running_gateway(tmp_path) as gateway:
        async with connected(gateway.data_url) as connection:
            connection.send(whole[:cut])
            for _ in range(5):
                await asyncio.sleep(0)
            connection.send(whole[cut:])
            answers = await connection.rest()
            # Where its rest crosses our close, the refusal may be lost to a reset; a second reply there never is.
            assert answers.count(b"HTTP/1.") <= 1
            assert b" 200 " not in answers
            check_silence(answers)
        assert not gateway.simulator.calls


async def test_a_body_is_never_taken_for_a_request(tmp_path: Path) -> None:
    async with running_gateway(tmp_path) as gateway, connected(gateway.data_url) as connection:
        # A GET may have a body; its length says where it ends.
        connection.send(request("GET", "/v1/models", body=SMUGGLED))
        assert len((await connection.reply()).json()["data"]) == 3
        # Optional white space around a value is good HTTP.
        connection.send(post(b"Transfer-Encoding: \tchunked \r\n", IN_CHUNKS))
        assert (await connection.reply()).status == 200
        connection.send(post(b"tRANSFER-eNCODING: Chunked\r\n", b"%x\r\n%b\r\n0\r\n\r\n" % (len(SMUGGLED), SMUGGLED)))
        check_refusal(await connection.reply(), 400, "invalid_json")
        await check_ordinary(connection)


async def test_an_upgrade_is_declined_by_answering(tmp_path: Path) -> None:
    async with running_gateway(tmp_path) as gateway, connected(gateway.data_url) as connection:
        for protocol in (b"h2c", b"websocket", CANARY):
            headers = b"Connection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AA\r\nUpgrade: " + protocol + b"\r\n"
            connection.send(request(headers=headers, body=BODY))
            assert (await connection.reply()).status == 200
        await check_ordinary(connection)


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + CANARY,
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\0" * 64,
        CANARY + b"\r\n\r\n",
        b"GET\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"EHLO " + CANARY + b"\r\n",
    ],
)
async def test_what_is_no_http_gets_one_refusal(tmp_path: Path, garbage: bytes) -> None:
    async with running_gateway(tmp_path) as gateway:
        async with connected(gateway.data_url) as connection:
            connection.send(garbage)
            check_refusal(await connection.reply(), 400, "bad_request")
            assert await connection.rest() == b""
        await check_next_connection(gateway)


@pytest.mark.parametrize(
    "large",
    [
        request("GET", "/" + "a" * 100_000),
        request("GET", "/v1/models?" + CANARY.decode() * 20_000),
        request(headers=b"X-Long: " + CANARY * 20_000 + b"\r\n", body=BODY),
        request(headers=b"X" * 100_000 + b": 1\r\n", body=BODY),
        request(headers=b"".join(b"X-%d: %b\r\n" % (number, CANARY) for number in range(500)), body=BODY),
    ],
    ids=["path", "query", "value", "name", "number"],
)
async def test_a_head_beyond_its_limits_is_refused(tmp_path: Path, large: bytes) -> None:
    async with running_gateway(tmp_path) as gateway:
        async with connected(gateway.data_url) as connection:
            connection.send(large)
            check_refusal(await connection.reply(), 400, "bad_request")
        assert not gateway.simulator.calls
        await check_next_connection(gateway)


async def test_a_long_header_within_the_limit_passes(tmp_path: Path) -> None:
    async with running_gateway(tmp_path) as gateway, connected(gateway.data_url) as connection:
        connection.send(request(headers=b"Cookie: " + b"c" * (MAX_HEAD_BYTES - 100) + b"\r\n", body=BODY))
        assert (await connection.reply()).status == 200


async def test_random_damage_never_makes_a_fault_of_ours(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    damage = random.Random(20261121)
    good = request(headers=b"x-gateway-user: u1\r\nExpect: 100-continue\r\n", body=BODY)
    in_chunks = post(CHUNKED, IN_CHUNKS)

    def damaged() -> bytes:
        data = bytearray(damage.choice((good, in_chunks)))
        for _ in range(damage.randint(1, 4)):
            at = damage.randrange(len(data))
            match damage.randrange(3):
                case 0:
                    data[at] = damage.randrange(256)
                case 1:
                    del data[at : at + damage.randint(1, 20)]
                case _:
                    data[at:at] = damage.choice(
                        (b"\r\n", b"\n", b"\0", b":", b" ", b"\xff", b'"', b"}", b"Content-Length: 0\r\n")
                    )
        return bytes(data)

    async def answers(gateway: RunningGateway, data: bytes) -> bytes:
        async with connected(gateway.data_url) as connection:
            connection.send(data)
            return await connection.rest()

    quick = "head_timeout_s = 0.1\nbody_timeout_s = 0.1\nidle_timeout_s = 0.1"
    async with running_gateway(tmp_path, server=quick) as gateway:
        found = await asyncio.gather(*(answers(gateway, damaged()) for _ in range(300)))
        for answer in found:
            assert answer.count(b"HTTP/1.1 5") == 0, answer
            check_silence(answer)
        assert sum(b" 400 " in answer for answer in found) > 100
        assert gateway.runtime.observer.in_flight == 0
        await check_next_connection(gateway)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


# --- Order -----------------------------------------------------------------------------------------------------------


async def test_pipelined_requests_are_answered_in_order(tmp_path: Path) -> None:
    async with running_gateway(tmp_path) as gateway, connected(gateway.data_url) as connection:
        asked = ["qa_agent", "support_agent", "auto"] * 20
        connection.send(b"".join(request("GET", f"/v1/models/{name}") for name in asked))
        assert [(await connection.reply()).json()["id"] for _ in asked] == asked
        connection.send(request(body=BODY) + request("GET", "/nowhere") + request(body=b"[]") + request(body=BODY))
        assert [(await connection.reply()).status for _ in range(4)] == [200, 404, 400, 200]
        await check_ordinary(connection)


async def test_a_caller_who_closes_one_side_counts_as_gone(tmp_path: Path) -> None:
    async with running_gateway(tmp_path) as gateway:
        for sent in (b"", b"GET /v1/mod", request("GET", "/v1/models"), request(body=BODY), request(body=BODY)[:-9]):
            async with connected(gateway.data_url) as connection:
                connection.send(sent)
                connection.half_close()
                check_silence(await connection.rest())
        await until(lambda: gateway.runtime.observer.connections == 0)
        assert gateway.runtime.observer.in_flight == 0
        await check_next_connection(gateway)


# --- Deadlines -------------------------------------------------------------------------------------------------------

QUICK_HEAD = "head_timeout_s = 0.05"


@pytest.mark.parametrize("begun", [b"P", b"POST " + CHAT.encode(), request(body=BODY)[:60], b"\r\n"])
async def test_a_head_that_stops_is_cut_off(tmp_path: Path, begun: bytes) -> None:
    async with (
        running_gateway(tmp_path, server=QUICK_HEAD) as gateway,
        connected(gateway.data_url) as fresh,
        connected(gateway.data_url) as used,
        connected(gateway.data_url) as idle,
    ):
        await check_ordinary(used)
        await check_ordinary(idle)
        for connection in (fresh, used):
            connection.send(begun)
        for connection in (fresh, used):
            check_refusal(await connection.reply(), 408, "request_timeout")
            assert await connection.rest() == b""
        # Waiting between requests is not a head that stops.
        await check_ordinary(idle)


async def test_a_head_that_trickles_gets_no_more_time_for_every_byte(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, server=QUICK_HEAD) as gateway, connected(gateway.data_url) as connection:
        connection.send(b"GET /v1/models HTTP/1.1\r\nX-Slow: ")
        ended = asyncio.create_task(connection.rest())
        async with asyncio.timeout(PATIENCE_S):
            while not (await asyncio.wait({ended}, timeout=0.005))[0]:
                connection.send(b"a")
        # A byte that crosses our close makes the kernel reset the connection, which may take the reply with it.
        assert isinstance(ended.exception(), ConnectionError) or ended.result()[:13] in (b"HTTP/1.1 408 ", b"")


@pytest.mark.parametrize("turns", range(5))
async def test_the_deadline_of_the_head_is_not_one_of_the_answer(
    tmp_path: Path, turns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Connection.data_received

    def in_two_segments(connection: Connection, data: bytes) -> None:
        """The body so many turns of the loop after its head; the network may choose any."""
        head, end, body = data.partition(b"\r\n\r\n")
        whole(connection, head + end)
        after(turns, lambda: whole(connection, body))

    def after(turns_left: int, act: Callable[[], None]) -> None:
        if turns_left:
            asyncio.get_running_loop().call_soon(after, turns_left - 1, act)
        else:
            act()

    monkeypatch.setattr(Connection, "data_received", in_two_segments)
    slow = SimulatorSettings(first_token_ms=250, per_token_ms=0, jitter=0)
    async with running_gateway(tmp_path, server=QUICK_HEAD, simulated=slow) as gateway:
        await check_next_connection(gateway)


async def test_an_idle_connection_is_closed_before_and_between_requests(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, server="idle_timeout_s = 0.05") as gateway:
        async with connected(gateway.data_url) as silent, connected(gateway.data_url) as used:
            await check_ordinary(used)
            assert await silent.rest() == b""
            assert await used.rest() == b""
        await until(lambda: gateway.runtime.observer.connections == 0)
        await check_next_connection(gateway)


async def test_a_caller_who_does_not_read_the_answers_is_let_go(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, server="idle_timeout_s = 0.1") as gateway:
        with socket.socket() as deaf:
            # The less the kernel keeps for this side, the sooner the other side has to wait.
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
            deaf.setblocking(False)
            parts = urlsplit(gateway.data_url)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(deaf, (parts.hostname, parts.port))
            await until(lambda: gateway.runtime.observer.connections == 1)
            with contextlib.suppress(ConnectionError):
                async with asyncio.timeout(PATIENCE_S):
                    await loop.sock_sendall(deaf, request("GET", "/v1/models") * 50_000)
            await until(lambda: gateway.runtime.observer.connections == 0)
        await check_next_connection(gateway)


# --- Limits ----------------------------------------------------------------------------------------------------------


async def test_one_connection_too_many_is_told_so_and_the_next_has_room_again(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, server="max_connections = 2") as gateway:
        async with connected(gateway.data_url) as first, connected(gateway.data_url) as second:
            await check_ordinary(first)
            await check_ordinary(second)
            for _ in range(10):
                async with connected(gateway.data_url) as third:
                    reply = await third.reply()
                    check_refusal(reply, 503, "overloaded")
                    assert (reply.headers["retry-after"], reply.headers["connection"]) == ("1", "close")
                    assert await third.rest() == b""
            # Those within the limit have noticed nothing.
            await check_ordinary(first)
        await until(lambda: gateway.runtime.observer.connections == 0)
        await check_next_connection(gateway)


async def test_one_who_asks_at_once_is_told_as_well(tmp_path: Path) -> None:
    server = "max_connections = 1"
    async with running_gateway(tmp_path, server=server) as gateway, connected(gateway.data_url) as first:
        await check_ordinary(first)
        for _ in range(10):
            async with connected(gateway.data_url) as second:
                second.send(request(body=BODY))
                check_refusal(await second.reply(), 503, "overloaded")
        assert gateway.simulator.calls.total() == 1


# --- Ourselves -------------------------------------------------------------------------------------------------------


async def test_a_bug_above_is_told_as_internal_error_and_explained_only_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_gateway(tmp_path) as gateway:
        with monkeypatch.context() as broken:
            broken.delattr(gateway.runtime, "plan")
            async with connected(gateway.admin_url) as connection:
                connection.send(request("GET", "/readyz", headers=b"X-A: " + CANARY + b"\r\n"))
                check_refusal(await connection.reply(), 500, "internal_error")
                assert await connection.rest() == b""
        assert "AttributeError" in caplog.text
        assert CANARY.decode() not in caplog.text
        await check_next_connection(gateway)


async def test_without_the_compiled_parser_nothing_is_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_c_parser()
    async with running_gateway(tmp_path) as running:
        monkeypatch.setattr(http_parser, "HttpRequestParser", http_parser.HttpRequestParserPy)
        with pytest.raises(RuntimeError, match="C extensions"):
            require_c_parser()
        another = Gateway(running.gateway._loaded, lambda _: running.gateway._loaded)
        with pytest.raises(RuntimeError, match="C extensions"):
            await another.start()
