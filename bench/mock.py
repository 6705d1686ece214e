"""The upstream of the bench: a process that answers chat calls as fast as Python can, and counts them.

Not a simulator: one fixed answer, one fixed stream, no faults, no thinking time. It speaks to the bench's own
subjects only, so it reads Content-Length requests and nothing else, one at a time per connection.
It lives as long as its standard input, and never longer than --limit-s.
"""

import argparse
import asyncio
import gc
import os
import re
import sys
from dataclasses import asdict, dataclass, field
from typing import cast

import uvloop

from bench import wire

BURST_WRITES = 4
_STREAM = re.compile(rb'"stream"\s*:\s*true')
_USAGE = re.compile(rb'"include_usage"\s*:\s*true')
_PACED = re.compile(rb'"model"\s*:\s*"' + wire.PACED.encode())


def _plain(status: str, body: bytes) -> bytes:
    head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


_STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"cache-control: no-cache\r\ntransfer-encoding: chunked\r\n\r\n"
)
_ANSWER = _plain("200 OK", wire.answer())
_MODELS = _plain("200 OK", wire.compact({"object": "list", "data": []}))
_NO_LENGTH = _plain("411 Length Required", wire.compact({"error": {"message": "Content-Length only"}}))


def _stream_pieces(*, with_usage: bool, paced: bool) -> list[bytes]:
    """The stream cut into writes. Each event is an HTTP chunk of its own, as real servers send them."""
    chunks = [wire.chunked(event) for event in wire.events(with_usage=with_usage)]
    first, rest = chunks[: wire.STREAM_CHUNKS], b"".join(chunks[wire.STREAM_CHUNKS :]) + b"0\r\n\r\n"
    size = 1 if paced else wire.STREAM_CHUNKS // BURST_WRITES
    pieces = [b"".join(first[start : start + size]) for start in range(0, len(first), size)]
    pieces[0] = _STREAM_HEAD + pieces[0]
    pieces[-1] += rest
    return pieces


_PIECES = {
    (with_usage, paced): _stream_pieces(with_usage=with_usage, paced=paced)
    for with_usage in (False, True)
    for paced in (False, True)
}


@dataclass
class Counts:
    plain: int = 0
    streams: int = 0
    streams_cut: int = 0


@dataclass(eq=False)  # Loops keep protocols in sets, so they are told apart by identity.
class Upstream(asyncio.Protocol):
    """One connection."""

    loop: asyncio.AbstractEventLoop
    counts: Counts
    unread: bytes = b""
    pieces_left: list[bytes] = field(default_factory=list)
    next_write: asyncio.Handle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # A cast, because uvloop's transports do not inherit asyncio's.
        self.transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.pieces_left:
            self.counts.streams_cut += 1
        if self.next_write is not None:
            self.next_write.cancel()

    def data_received(self, data: bytes) -> None:
        data = self.unread + data
        while (head_end := data.find(b"\r\n\r\n")) >= 0:
            length = wire.body_length(data, head_end)
            if data.startswith(b"GET "):
                length = 0
            if length < 0:
                self.transport.write(_NO_LENGTH)
                self.transport.close()
                return
            end = head_end + 4 + length
            if len(data) < end:
                break
            self.answer(data[:end])
            data = data[end:]
        self.unread = data

    def answer(self, request: bytes) -> None:
        if request.startswith(b"GET "):
            counts = _plain("200 OK", wire.compact(asdict(self.counts)))
            self.transport.write(counts if request.startswith(b"GET /counts ") else _MODELS)
        elif not _STREAM.search(request):
            self.counts.plain += 1
            self.transport.write(_ANSWER)
        else:
            self.counts.streams += 1
            paced = _PACED.search(request) is not None
            self.pieces_left = _PIECES[_USAGE.search(request) is not None, paced][::-1]
            self.write_next(self.loop.time() if paced else None)

    def write_next(self, due_s: float | None) -> None:
        """One piece now, the next at its due time (no drift) or, back to back, in the loop's next turn."""
        self.transport.write(self.pieces_left.pop())
        if not self.pieces_left:
            self.next_write = None
        elif due_s is None:
            self.next_write = self.loop.call_soon(self.write_next, None)
        else:
            due_s += wire.SPACING_S
            self.next_write = self.loop.call_at(due_s, self.write_next, due_s)


async def serve(limit_s: float) -> None:
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    counts = Counts()
    server = await loop.create_server(lambda: Upstream(loop, counts), wire.HOST, 0, backlog=1024)
    stdin = sys.stdin.fileno()

    def read_stdin() -> None:
        if not os.read(stdin, 4096):
            ended.set()

    loop.add_reader(stdin, read_stdin)
    loop.call_later(limit_s, ended.set)
    print(server.sockets[0].getsockname()[1], flush=True)
    gc.freeze()
    await ended.wait()
    loop.remove_reader(stdin)
    server.close()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.mock", description=__doc__)
    parser.add_argument("--limit-s", type=float, default=900.0)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(parser.parse_args().limit_s))


if __name__ == "__main__":
    main()
