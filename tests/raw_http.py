"""HTTP/1.1 by hand, for what no client library would send: bytes out, replies in, and the moment a connection ends.

Nothing here is timed: every wait is for an event, under one generous limit that only a hang can reach.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import msgspec

from tests.running import CHAT, chat

PATIENCE_S = 15.0
# Planted in what is sent; no error reply may hold it.
CANARY = b"cAnArY"


class Reply(NamedTuple):
    """One response: its status, its headers by lower-case name, its body."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    head: bytes

    def json(self) -> Any:
        return msgspec.json.decode(self.body)


class RawConnection:
    """One TCP connection to a listener."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    def send(self, data: bytes) -> None:
        """Write, in one piece as far as the kernel likes."""
        self._writer.write(data)

    def half_close(self) -> None:
        """Say that no more will come."""
        self._writer.write_eof()

    async def line(self) -> bytes:
        """What comes up to the next empty line, such as an interim response."""
        async with asyncio.timeout(PATIENCE_S):
            return await self._reader.readuntil(b"\r\n\r\n")

    async def reply(self, *, to_head: bool = False) -> Reply:
        """The next response, whole."""
        head = await self.line()
        first, *lines = head.decode("ascii").rstrip("\r\n").split("\r\n")
        pairs = [line.split(": ", 1) for line in lines]
        headers = {name.lower(): value for name, value in pairs}
        assert len(headers) == len(pairs), f"a header came twice: {head!r}"
        async with asyncio.timeout(PATIENCE_S):
            body = b"" if to_head else await self._body(headers)
        return Reply(int(first.split(" ")[1]), headers, body, head)

    async def rest(self) -> bytes:
        """Everything until the other side closes; returns once it has."""
        async with asyncio.timeout(PATIENCE_S):
            try:
                return await self._reader.read()
            except ConnectionError:
                return b""

    def close(self) -> None:
        self._writer.close()

    async def _body(self, headers: Mapping[str, str]) -> bytes:
        if headers.get("transfer-encoding") != "chunked":
            return await self._reader.readexactly(int(headers["content-length"]))
        found = b""
        while size := int(await self._reader.readline(), 16):
            found += (await self._reader.readexactly(size + 2))[:-2]
        await self._reader.readline()
        return found


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[RawConnection]:
    """A connection to the listener at `url`, closed at the end."""
    parts = urlsplit(url)
    connection = RawConnection(*await asyncio.open_connection(parts.hostname, parts.port))
    try:
        yield connection
    finally:
        connection.close()


def request(
    method: str = "POST", target: str = CHAT, *, headers: bytes = b"", body: bytes | None = None, length: bool = True
) -> bytes:
    """A request as bytes. `headers` are whole lines, each with its CRLF."""
    head = f"{method} {target} HTTP/1.1\r\nHost: localhost\r\n".encode() + headers
    if body is not None and length:
        head += b"Content-Length: %d\r\n" % len(body)
    return head + b"\r\n" + (body or b"")


def ordinary(text: str = "What is the capital of France?", **fields: Any) -> bytes:
    """The body of a good chat request."""
    return msgspec.json.encode(chat(text, **fields))


def check_refusal(reply: Reply, status: int, code: str, *, param: str | None = None) -> str:
    """See that this is an error as OpenAI's SDKs read it, and tells strangers nothing; its message."""
    assert reply.status == status, reply
    check_silence(reply.head + reply.body)
    assert reply.headers["content-type"].startswith("application/json")
    assert reply.headers["server"] == "genesis-gateway"
    body = reply.json()
    assert set(body) == {"error"}
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["code"], error["param"]) == (code, param)
    assert error["type"] == ("server_error" if status >= 500 else "invalid_request_error")
    assert error["message"]
    return str(error["message"])


def check_silence(data: bytes) -> None:
    """Nothing of the request's own bytes, of the software below, of its insides."""
    lowered = data.lower()
    for told in (CANARY.lower(), b"aiohttp", b"python", b"<html", b"traceback", b"text/plain", b"text/html"):
        assert told not in lowered, data


async def check_ordinary(connection: RawConnection) -> None:
    """See that the connection still serves."""
    connection.send(request(body=ordinary()))
    reply = await connection.reply()
    assert reply.status == 200, reply
    assert reply.json()["choices"][0]["message"]["content"]
