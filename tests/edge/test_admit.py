"""Bodies: how large, how encoded, how announced and how slow they may be, and how many calls may be open at once."""

import base64
from pathlib import Path

import pytest

from tests.journey import Journey, journey
from tests.raw_http import (
    CANARY,
    RawConnection,
    check_ordinary,
    check_refusal,
    connected,
    ordinary,
    request,
)
from tests.running import CHAT, RunningGateway, running_gateway
from tests.scripted import says, silent

LIMIT = 4_096
SMALL = f"max_body_bytes = {LIMIT}"
SLOW_BODY = "body_timeout_s = 0.05"


def chunked(*chunks: bytes) -> bytes:
    """Chunks as they go over the wire, the last one included."""
    return b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks if chunk) + b"0\r\n\r\n"


def padded(size: int) -> bytes:
    """A good request of exactly so many bytes."""
    body = ordinary("x" * (size - len(ordinary(""))))
    assert len(body) == size
    return body


async def check_next_connection(gateway: RunningGateway) -> None:
    async with connected(gateway.data_url) as connection:
        await check_ordinary(connection)


# --- Size ------------------------------------------------------------------------------------------------------------


# aiohttp's client thinks that 20 MB at once are much; they are what an image needs.
async def test_an_image_of_20_megabytes_goes_through_whole(tmp_path: Path) -> None:
    image = "data:image/png;base64," + base64.b64encode(bytes(range(256)) * 60_000).decode()
    assert len(image) > 20_000_000
    body = ordinary(
        messages=[
            {
                "role": "user",
                "content": [{"type": "text", "text": "?"}, {"type": "image_url", "image_url": {"url": image}}],
            }
        ]
    )
    async with running_gateway(tmp_path) as gateway, connected(gateway.data_url) as connection:
        connection.send(request(body=body))
        assert (await connection.reply()).status == 200
        seen = gateway.simulator.last_request
        assert seen is not None
        assert seen.body["messages"][0]["content"][1]["image_url"]["url"] == image
        # The image is nowhere but at the provider.
        assert gateway.runtime.journal.path.stat().st_size < 2_000


@pytest.mark.parametrize("size", [LIMIT - 1, LIMIT])
async def test_a_body_up_to_the_limit_is_taken(tmp_path: Path, size: int) -> None:
    async with running_gateway(tmp_path, server=SMALL) as gateway, connected(gateway.data_url) as connection:
        connection.send(request(body=padded(size)))
        assert (await connection.reply()).status == 200
        connection.send(request(headers=b"Transfer-Encoding: chunked\r\n", body=chunked(padded(size)), length=False))
        assert (await connection.reply()).status == 200


@pytest.mark.parametrize("announced", [LIMIT + 1, 2**31, 2**63 - 1])
async def test_a_body_over_the_limit_is_refused_by_its_length_before_it_comes(tmp_path: Path, announced: int) -> None:
    async with running_gateway(tmp_path, server=SMALL) as gateway:
        async with connected(gateway.data_url) as connection:
            connection.send(request(headers=b"Content-Length: %d\r\n" % announced))
            # Not a byte of the body is ever sent.
            reply = await connection.reply()
            check_refusal(reply, 413, "body_too_large")
            assert reply.headers["connection"] == "close"
        assert not gateway.simulator.calls
        await check_next_connection(gateway)


async def test_the_connection_ends_with_the_refusal_and_what_still_comes_is_not_served(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, server=SMALL) as gateway, connected(gateway.data_url) as connection:
        connection.send(request(headers=b"Content-Length: 1000000\r\n"))
        check_refusal(await connection.reply(), 413, "body_too_large")
        connection.send(request(body=ordinary()) * 3)
        assert await connection.rest() == b""
        assert not gateway.simulator.calls


async def test_a_chunked_body_is_refused_once_it_is_over_the_limit(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, server=SMALL) as gateway:
        async with connected(gateway.data_url) as connection:
            over = padded(LIMIT) + b" "
            connection.send(request(headers=b"Transfer-Encoding: chunked\r\n"))
            # The last chunk is never sent.
            connection.send(chunked(over)[: -len(b"0\r\n\r\n")])
            check_refusal(await connection.reply(), 413, "body_too_large")
        assert not gateway.simulator.calls
        await check_next_connection(gateway)


# --- Encoding and framing --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", [b"gzip", b"deflate", b"br", b"zstd", b"GZIP", b"gzip, gzip", CANARY, b"\xff"])
async def test_an_encoded_body_is_refused_unread(tmp_path: Path, encoding: bytes) -> None:
    async with running_gateway(tmp_path) as gateway:
        async with connected(gateway.data_url) as connection:
            connection.send(request(headers=b"Content-Encoding: %b\r\nContent-Length: 1000\r\n" % encoding))
            check_refusal(await connection.reply(), 415, "unsupported_encoding")
        assert not gateway.simulator.calls
        await check_next_connection(gateway)


async def test_an_identity_encoding_is_none(tmp_path: Path) -> None:
    async with running_gateway(tmp_path) as gateway, connected(gateway.data_url) as connection:
        connection.send(request(headers=b"Content-Encoding: identity\r\n", body=ordinary()))
        assert (await connection.reply()).status == 200


async def test_chunks_of_any_cut_make_the_same_body(tmp_path: Path) -> None:
    body = ordinary("Grüße, ¿qué tal?")
    cuts = (
        chunked(body),
        chunked(*(body[at : at + 1] for at in range(len(body)))),
        b"%x;name=%b\r\n%b\r\n0\r\n\r\n" % (len(body), CANARY, body),
        b"%X\r\n%b\r\n0\r\nX-Checksum: 1\r\n\r\n" % (len(body), body),
    )
    async with running_gateway(tmp_path) as gateway, connected(gateway.data_url) as connection:
        answers = set()
        for sent in cuts:
            connection.send(request(headers=b"Transfer-Encoding: chunked\r\n", body=sent, length=False))
            reply = await connection.reply()
            assert reply.status == 200
            answers.add(reply.json()["choices"][0]["message"]["content"])
        assert len(answers) == 1


@pytest.mark.parametrize("broken", [b"zz\r\n", b"fffffffffffffffff\r\n", b"-1\r\n", b"3\r\nabcdef", b"\r\n"])
async def test_broken_chunks_after_a_good_head_are_an_incomplete_body(tmp_path: Path, broken: bytes) -> None:
    async with running_gateway(tmp_path) as gateway:
        async with connected(gateway.data_url) as connection:
            connection.send(request(headers=b"Expect: 100-continue\r\nTransfer-Encoding: chunked\r\n"))
            # The head is read by the time the interim answer comes, so what follows is broken as a body.
            assert await connection.line() == b"HTTP/1.1 100 Continue\r\n\r\n"
            connection.send(broken + CANARY)
            reply = await connection.reply()
            check_refusal(reply, 400, "incomplete_body")
            await connection.rest()
        assert not gateway.simulator.calls
        await check_next_connection(gateway)


async def test_a_body_that_ends_early_is_no_call(tmp_path: Path) -> None:
    async with running_gateway(tmp_path) as gateway:
        async with connected(gateway.data_url) as connection:
            connection.send(request(body=ordinary())[:-5])
            connection.half_close()
            await connection.rest()
        assert not gateway.simulator.calls
        assert not gateway.journal()
        await check_next_connection(gateway)


# --- Expect ----------------------------------------------------------------------------------------------------------


async def expecting(connection: RawConnection, headers: bytes) -> None:
    connection.send(request(headers=b"Expect: 100-continue\r\n" + headers))


@pytest.mark.parametrize("expectation", [b"100-continue", b"100-Continue"])
async def test_a_client_that_waits_is_told_to_go_on(tmp_path: Path, expectation: bytes) -> None:
    body = ordinary()
    async with running_gateway(tmp_path) as gateway, connected(gateway.data_url) as connection:
        for _ in range(2):
            connection.send(request(headers=b"Expect: %b\r\nContent-Length: %d\r\n" % (expectation, len(body))))
            assert await connection.line() == b"HTTP/1.1 100 Continue\r\n\r\n"
            connection.send(body)
            assert (await connection.reply()).status == 200
        await check_ordinary(connection)


@pytest.mark.parametrize(
    ("headers", "status", "code"),
    [
        (b"Content-Length: %d\r\n" % (LIMIT + 1), 413, "body_too_large"),
        (b"Content-Length: 9\r\nContent-Encoding: gzip\r\n", 415, "unsupported_encoding"),
        (b"Transfer-Encoding: identity, chunked\r\n", 400, "bad_request"),
    ],
)
async def test_a_body_that_would_be_refused_is_not_asked_for(
    tmp_path: Path, headers: bytes, status: int, code: str
) -> None:
    async with running_gateway(tmp_path, server=SMALL) as gateway, connected(gateway.data_url) as connection:
        await expecting(connection, headers)
        # The refusal is the first thing that comes, in the place of an interim answer.
        check_refusal(await connection.reply(), status, code)


async def test_a_path_that_does_not_exist_asks_for_no_body(tmp_path: Path) -> None:
    async with running_gateway(tmp_path) as gateway, connected(gateway.data_url) as connection:
        connection.send(request("POST", "/nowhere", headers=b"Expect: 100-continue\r\nContent-Length: 9\r\n"))
        check_refusal(await connection.reply(), 404, "not_found")


@pytest.mark.parametrize("expectation", [b"200-ok", b"100-continue, " + CANARY, CANARY, b"\xff"])
async def test_other_expectations_are_refused(tmp_path: Path, expectation: bytes) -> None:
    async with running_gateway(tmp_path) as gateway:
        async with connected(gateway.data_url) as connection:
            connection.send(request(headers=b"Expect: %b\r\n" % expectation, body=ordinary()))
            check_refusal(await connection.reply(), 417, "unsupported_expectation")
            await connection.rest()
        assert not gateway.simulator.calls
        await check_next_connection(gateway)


async def test_http_1_0_gets_no_interim_answer(tmp_path: Path) -> None:
    body = ordinary()
    async with running_gateway(tmp_path) as gateway, connected(gateway.data_url) as connection:
        head = f"POST {CHAT} HTTP/1.0\r\nExpect: 100-continue\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.send(head.encode() + body)
        assert (await connection.reply()).status == 200


# --- Time and number -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("begun", [b"", b"{", ordinary()[:-1]])
async def test_a_body_that_does_not_come_in_time_is_given_up(tmp_path: Path, begun: bytes) -> None:
    async with running_gateway(tmp_path, server=SLOW_BODY) as gateway:
        async with connected(gateway.data_url) as connection:
            connection.send(request(headers=b"Content-Length: %d\r\n" % len(ordinary())) + begun)
            check_refusal(await connection.reply(), 408, "request_timeout")
        assert gateway.runtime.observer.in_flight == 0
        await check_next_connection(gateway)


async def test_a_chunked_body_that_trickles_is_given_up(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, server=SLOW_BODY) as gateway:
        async with connected(gateway.data_url) as connection:
            connection.send(request(headers=b"Transfer-Encoding: chunked\r\n") + b"1\r\n{\r\n")
            check_refusal(await connection.reply(), 408, "request_timeout")
        await check_next_connection(gateway)


async def test_one_call_too_many_is_told_to_come_back(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, server="max_calls = 1") as gateway:
        body = ordinary()
        async with connected(gateway.data_url) as first, connected(gateway.data_url) as second:
            await expecting(first, b"Content-Length: %d\r\n" % len(body))
            # Once it is asked for its body, the first call is in flight.
            await first.line()
            second.send(request(body=body))
            reply = await second.reply()
            check_refusal(reply, 503, "overloaded")
            assert reply.headers["retry-after"] == "1"
            first.send(body)
            assert (await first.reply()).status == 200
            # The refused one kept its connection, and there is room now.
            await check_ordinary(second)
        assert gateway.runtime.observer.in_flight == 0


async def test_callers_who_leave_make_room_for_others(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, server="max_calls = 2") as gateway:
        for _ in range(5):
            async with connected(gateway.data_url) as leaving:
                await expecting(leaving, b"Content-Length: 1000\r\n")
                await leaving.line()
                leaving.half_close()
                assert await leaving.rest() == b""
        await check_next_connection(gateway)
        assert gateway.runtime.observer.in_flight == 0


async def test_a_draining_gateway_takes_no_call_and_no_connection_for_another(tmp_path: Path) -> None:
    async with running_gateway(tmp_path) as gateway, connected(gateway.data_url) as connection:
        await check_ordinary(connection)
        gateway.runtime.is_draining = True
        connection.send(request(body=ordinary()))
        reply = await connection.reply()
        check_refusal(reply, 503, "draining")
        assert (reply.headers["retry-after"], reply.headers["connection"]) == ("1", "close")
        assert await connection.rest() == b""


# --- Bytes of all bodies ----------------------------------------------------------------------------------------------

TIGHT = f"{SMALL}\nmax_buffered_bytes = {2 * LIMIT}"


async def check_alive(trip: Journey) -> None:
    """See that whoever watches the gateway still gets an answer."""
    for path in ("/livez", "/readyz"):
        async with trip.session.get(f"{trip.gateway.admin_url}{path}") as response:
            assert response.status == 200


async def check_refused_at_once(trip: Journey, headers: bytes, body: bytes = b"") -> None:
    async with connected(trip.gateway.data_url) as connection:
        connection.send(request(headers=headers) + body)
        reply = await connection.reply()
        check_refusal(reply, 503, "overloaded")
        assert (reply.headers["retry-after"], reply.headers["connection"]) == ("1", "close")
        assert await connection.rest() == b""


async def test_bodies_that_are_announced_count_before_they_come(tmp_path: Path) -> None:
    async with journey(tmp_path, says("Paris"), server=TIGHT) as trip:
        url, runtime = trip.gateway.data_url, trip.gateway.runtime
        body = padded(LIMIT)
        async with connected(url) as first, connected(url) as second:
            for connection in (first, second):
                await expecting(connection, b"Content-Length: %d\r\n" % LIMIT)
                await connection.line()
            assert runtime.buffered_bytes == 2 * LIMIT
            # Not a byte of the third is read, and there is no room for the smallest one.
            await check_refused_at_once(trip, b"Content-Length: %d\r\n" % LIMIT)
            await check_refused_at_once(trip, b"Content-Length: 1\r\n")
            # One that is too large in itself hears that, or that there is no room; it is refused either way.
            async with connected(url) as third:
                third.send(request(headers=b"Content-Length: %d\r\n" % 2**40))
                assert (await third.reply()).status in (413, 503)
            await check_alive(trip)
            assert runtime.buffered_bytes == 2 * LIMIT
            for connection in (first, second):
                connection.send(body)
                assert (await connection.reply()).status == 200
            assert runtime.buffered_bytes == 0
            # Recovery is immediate.
            await check_ordinary(first)
        trip.check_at_rest()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_body_counts_until_its_call_ends_chunked_or_not(tmp_path: Path, stream: bool) -> None:
    body = ordinary("x" * 3_900, stream=stream)
    as_chunks = b"Transfer-Encoding: chunked\r\n"
    async with journey(tmp_path, silent, server=TIGHT) as trip:
        url, runtime = trip.gateway.data_url, trip.gateway.runtime
        async with connected(url) as announced, connected(url) as unannounced:
            announced.send(request(body=body))
            unannounced.send(request(headers=as_chunks, body=chunked(body[:100], body[100:]), length=False))
            turns = [await trip.first.turn(0), await trip.first.turn(1)]
            # Both wait for the model, and what they hold is what they sent.
            assert runtime.buffered_bytes == 2 * len(body)
            await check_refused_at_once(trip, as_chunks, chunked(body))
            await check_refused_at_once(trip, b"Content-Length: %d\r\n" % len(body))
            await check_alive(trip)
            assert runtime.buffered_bytes == 2 * len(body)
        for turn in turns:
            await turn.peer_left.wait()
        trip.check_at_rest()
        trip.first.then(says("Paris"))
        assert (await trip.ask()).status == 200
        assert len(trip.first.turns) == 3


@pytest.mark.parametrize("framing", [b"Content-Length: 4000\r\n", b"Transfer-Encoding: chunked\r\n"])
async def test_bodies_that_never_come_whole_give_their_room_back(tmp_path: Path, framing: bytes) -> None:
    async with journey(tmp_path, says("Paris"), server=f"{TIGHT}\n{SLOW_BODY}") as trip:
        for begun in (b"", b"1\r\n{\r\n"):
            for _ in range(3):
                async with connected(trip.gateway.data_url) as connection:
                    connection.send(request(headers=framing) + begun)
                    check_refusal(await connection.reply(), 408, "request_timeout")
                async with connected(trip.gateway.data_url) as leaving:
                    leaving.send(request(headers=framing) + begun)
                    leaving.half_close()
                    await leaving.rest()
        trip.check_at_rest()
        assert (await trip.ask()).status == 200


async def test_bodies_that_are_refused_give_their_room_back(tmp_path: Path) -> None:
    bad = (b"{", b"[]", b'{"model": 7}', b"\xff" * 4_000, ordinary(model="nobody"), ordinary(n=1_000))
    async with journey(tmp_path, says("Paris"), server=TIGHT) as trip:
        for body in bad:
            async with connected(trip.gateway.data_url) as connection:
                connection.send(request(body=body))
                assert (await connection.reply()).status in (400, 404)
        trip.check_at_rest()
