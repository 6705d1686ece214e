"""A provider that does exactly what a script says, byte by byte: a TCP server on a loopback port, and a list of scenes.

    async def cut(turn: Turn) -> None:
        await turn.begin_stream()
        await turn.event(delta("Hel"))
        turn.reset()

    async with scripted(cut, says("Hello")) as provider:
        ...                                            # provider.base_url; provider.turns[0].json()["model"]

Each request plays the next scene, and the last scene is played for ever. A scene that returns with the connection open
leaves it to the next request, as keep-alive does. What a scene raises fails the test, unless it is that the peer left.
Nothing here is timed: a scene waits for an event, for instance for `turn.peer_left`.
"""

import asyncio
import itertools
import socket
import struct
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import msgspec

Scene = Callable[["Turn"], Awaitable[None]]
USAGE = {"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18}
DONE = b"[DONE]"
# Closing with this set sends RST in the place of FIN, and drops what is not sent yet.
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class Turn:
    """One request as it came, and the means to answer it."""

    def __init__(self, connection: "_Connection", head: bytes, body: bytes) -> None:
        first, *lines = head.decode("latin-1").rstrip("\r\n").split("\r\n")
        self.method, self.target, _ = first.split(" ")
        self.headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        self.body = body
        self.connection = connection.number
        # Set once the other side has closed or reset the connection.
        self.peer_left = connection.reader.ended
        # Bytes handed to the kernel so far; those it did not take yet are not among them.
        self.sent_bytes = 0
        self._writer = connection.writer

    def json(self) -> Any:
        """The request's body."""
        return msgspec.json.decode(self.body)

    async def raw(self, data: bytes) -> None:
        """These bytes, and back when the kernel has them. Raises ConnectionError where the peer left."""
        self._writer.write(data)
        await self._writer.drain()
        self.sent_bytes += len(data)

    async def reply(self, body: bytes | Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        """A plain reply of known length; what is not bytes goes as JSON."""
        data = body if isinstance(body, bytes) else msgspec.json.encode(body)
        named = {"Content-Type": "application/json", "Content-Length": str(len(data)), **(headers or {})}
        await self.raw(head(status, named) + data)

    async def begin_stream(self, headers: Mapping[str, str] | None = None) -> None:
        """The head of a stream in chunked framing."""
        named = {"Content-Type": "text/event-stream", "Transfer-Encoding": "chunked", **(headers or {})}
        await self.raw(head(200, named))

    async def piece(self, data: bytes) -> None:
        """A chunk of the framing, whole; what it holds need not be whole events."""
        await self.raw(b"%x\r\n%b\r\n" % (len(data), data))

    async def event(self, data: bytes | Any) -> None:
        """One event in a chunk of its own."""
        await self.piece(event(data))

    async def end(self) -> None:
        """The end of the framing. The connection stays."""
        await self.raw(b"0\r\n\r\n")

    def close(self) -> None:
        """FIN: what was sent still arrives."""
        self._writer.close()

    def reset(self) -> None:
        """RST, at once."""
        raw_socket = self._writer.get_extra_info("socket")
        raw_socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        self._writer.transport.abort()


class _Reader(asyncio.StreamReader):
    """Knows when the other side has gone, also while nobody reads."""

    def __init__(self) -> None:
        super().__init__(limit=2**24)
        self.ended = asyncio.Event()

    def feed_eof(self) -> None:
        self.ended.set()
        super().feed_eof()

    def set_exception(self, exc: BaseException) -> None:
        self.ended.set()
        super().set_exception(exc)


class _Connection:
    def __init__(self, number: int, reader: _Reader, writer: asyncio.StreamWriter) -> None:
        self.number, self.reader, self.writer = number, reader, writer

    async def next_turn(self) -> Turn | None:
        """The next request, or None where none comes any more."""
        try:
            head = await self.reader.readuntil(b"\r\n\r\n")
            turn = Turn(self, head, b"")
            turn.body = await self.reader.readexactly(int(turn.headers.get("content-length", 0)))
        except (asyncio.IncompleteReadError, ConnectionError):
            return None
        return turn


class Scripted:
    """The provider: its address, its script, and every request it has seen."""

    def __init__(self, scenes: tuple[Scene, ...]) -> None:
        self.turns: list[Turn] = []
        self._arrived = asyncio.Condition()
        self._scenes = list(scenes)
        self._numbers = itertools.count()
        self._playing: set[asyncio.Task[None]] = set()
        self._failed: list[BaseException] = []
        self._server: asyncio.Server | None = None

    @property
    def base_url(self) -> str:
        """What to write into an upstream's table."""
        assert self._server is not None
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/v1"

    @property
    def connections(self) -> int:
        """How many connections requests have come on."""
        return len({turn.connection for turn in self.turns})

    def then(self, *scenes: Scene) -> None:
        """From now on, these."""
        self._scenes[:] = scenes

    async def turn(self, index: int = 0) -> Turn:
        """A request by its place, waited for where it has not come yet."""
        async with self._arrived:
            await self._arrived.wait_for(lambda: len(self.turns) > index)
        return self.turns[index]

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(self._protocol, "127.0.0.1", 0)

    async def stop(self) -> None:
        """End every connection; raises what a scene raised."""
        assert self._server is not None
        self._server.close()
        for task in self._playing:
            task.cancel()
        await asyncio.gather(*self._playing, return_exceptions=True)
        # A transport is closed in the loop's next turn.
        await asyncio.sleep(0)
        if self._failed:
            raise self._failed[0]

    def _protocol(self) -> asyncio.StreamReaderProtocol:
        reader = _Reader()

        def begin(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            # Two buffers more would blur how much the peer has really taken.
            writer.transport.set_write_buffer_limits(high=0)
            task = asyncio.create_task(self._serve(_Connection(next(self._numbers), reader, writer)))
            self._playing.add(task)
            task.add_done_callback(self._playing.discard)

        return asyncio.StreamReaderProtocol(reader, begin)

    async def _serve(self, connection: _Connection) -> None:
        try:
            while not connection.writer.is_closing() and (turn := await connection.next_turn()) is not None:
                scene = self._scenes.pop(0) if len(self._scenes) > 1 else self._scenes[0]
                async with self._arrived:
                    self.turns.append(turn)
                    self._arrived.notify_all()
                await scene(turn)
        except ConnectionError:
            pass  # The gateway left in the middle of a scene, which is its right.
        except Exception as error:  # noqa: BLE001 - it is raised again, where the test can see it
            self._failed.append(error)
        finally:
            connection.writer.close()
            if sys.exc_info()[0] is asyncio.CancelledError:
                # The script is over; nobody is left to take what is not sent yet.
                connection.writer.transport.abort()


@asynccontextmanager
async def scripted(*scenes: Scene) -> AsyncIterator[Scripted]:
    """A provider with this script, until the block ends."""
    provider = Scripted(scenes)
    await provider.start()
    try:
        yield provider
    finally:
        await provider.stop()


def refusing_port() -> socket.socket:
    """A port that is taken and that nobody listens on: whoever connects is refused."""
    held = socket.socket()
    held.bind(("127.0.0.1", 0))
    return held


# --- What is sent -----------------------------------------------------------------------------------------------------


def head(status: int, headers: Mapping[str, str]) -> bytes:
    """A reply's head."""
    lines = [f"HTTP/1.1 {status} Whatever", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join((*lines, "", "")).encode("latin-1")


def event(data: bytes | Any) -> bytes:
    """A server-sent event; what is not bytes goes as JSON."""
    return b"data: %b\n\n" % (data if isinstance(data, bytes) else msgspec.json.encode(data))


def completion(text: str = "Paris.", *, model: str = "scripted-1", **more: Any) -> dict[str, Any]:
    """A whole answer, as OpenAI shapes it."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return {
        "id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": model, "choices": [choice],
        "usage": USAGE, **more,
    }  # fmt: skip


def chunk(delta: dict[str, Any], finish_reason: str | None = None, **more: Any) -> dict[str, Any]:
    """One chunk of a stream, as OpenAI shapes it."""
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    return {
        "id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "scripted-1", "choices": [choice],
        **more,
    }  # fmt: skip


def delta(text: str) -> dict[str, Any]:
    """A chunk of text."""
    return chunk({"content": text})


def finish(reason: str = "stop") -> dict[str, Any]:
    """The chunk that tells why the answer ends."""
    return chunk({}, reason)


def usage_chunk() -> dict[str, Any]:
    """What OpenAI sends after the answer where it was asked to."""
    return {**chunk({}), "choices": [], "usage": USAGE}


# --- Scenes that many tests want --------------------------------------------------------------------------------------


def says(*words: str, headers: Mapping[str, str] | None = None) -> Scene:
    """A good provider: answers with these words, plain or a word per event, with usage where it is asked for."""

    async def scene(turn: Turn) -> None:
        asked = turn.json()
        if not asked.get("stream"):
            await turn.reply(completion("".join(words)), headers=headers)
            return
        await turn.begin_stream(headers)
        for word in words:
            await turn.event(delta(word))
        await turn.event(finish())
        if (asked.get("stream_options") or {}).get("include_usage"):
            await turn.event(usage_chunk())
        await turn.event(DONE)
        await turn.end()

    return scene


def refuses(status: int, body: bytes | Any = b"", headers: Mapping[str, str] | None = None) -> Scene:
    """Answers with this status, whatever is asked."""

    async def scene(turn: Turn) -> None:
        await turn.reply(body, status, headers)

    return scene


def streams(*events: bytes | Any, headers: Mapping[str, str] | None = None) -> Scene:
    """Streams exactly these events, and ends the framing."""

    async def scene(turn: Turn) -> None:
        await turn.begin_stream(headers)
        for data in events:
            await turn.event(data)
        await turn.end()

    return scene


async def silent(turn: Turn) -> None:
    """Takes the request and says nothing, until the other side gives up."""
    await turn.peer_left.wait()


async def resets(turn: Turn) -> None:
    """Takes the request and breaks the connection."""
    turn.reset()


def error_body(message: str = "It broke.", *, type: str = "server_error", **more: Any) -> dict[str, Any]:
    """An error as OpenAI shapes it."""
    return {"error": {"message": message, "type": type, "param": None, "code": None, **more}}
