"""A listening socket with aiohttp behind it, and four things put right for strangers.

aiohttp's own error pages quote the bytes they refuse and name its version: ours are OpenAI-shaped and quote nothing.
A head that trickles in is cut off after its deadline, as is a caller who reads nothing of an answer, and there is a
limit on connections. Framing itself (duplicate lengths, CL with TE, obs-fold, bare LF) is judged by aiohttp's C parser,
without which we refuse to start: the Python one is slower and more forgiving. A peer that closes its sending side
counts as gone, as aiohttp cannot tell the two apart.
"""

import asyncio
import logging
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from aiohttp import StreamReader, http_parser, web
from aiohttp.http import RawRequestMessage

from gateway.domain.errors import Refused
from gateway.domain.reading import Address
from gateway.domain.settings import Server
from gateway.edge.replies import JSON, SERVER_NAME, error_reply

log = logging.getLogger("gateway.listener")
SWEEP_S = 1.0
MAX_HEAD_BYTES = 16_384
BACKLOG = 1_024


def require_c_parser() -> None:
    """Raise RuntimeError where aiohttp's compiled parser is missing."""
    if http_parser.HttpRequestParser is http_parser.HttpRequestParserPy:
        raise RuntimeError("aiohttp's C extensions are missing; install a wheel of aiohttp for this platform")


class Connection(web.RequestHandler):
    """aiohttp's server protocol with our error replies and a deadline for the head of each request."""

    __slots__ = ("_body", "_unread_bytes", "_unread_since_s", "head_since_s", "listener", "on_lost")

    def __init__(self, listener: "Listener", manager: web.Server, **kwargs: Any) -> None:
        super().__init__(manager, **kwargs)
        self.listener = listener
        # Whoever serves a request here and wants to know that the caller has gone.
        self.on_lost: Callable[[], None] | None = None
        # Loop time at which the first byte of an unfinished head came; None between requests.
        self.head_since_s: float | None = None
        # The body of the request that was parsed last.
        self._body: StreamReader | None = None
        # What waits for the caller to read it, and since when it has not become less or more.
        self._unread_bytes = 0
        self._unread_since_s = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.listener.opened(self)

    def connection_lost(self, exc: BaseException | None) -> None:
        self.listener.closed(self)
        on_lost, self.on_lost = self.on_lost, None
        if on_lost is not None:
            on_lost()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._messages:
            self._note_body(*self._messages[-1])
        # Only a connection that waits for a request can be in the middle of a head; what comes while one is served is
        # its body, and a head that follows in the same breath is timed from its next byte.
        if self._waiter is None or self._waiter.done():
            self.head_since_s = None
        elif data and self.head_since_s is None:
            self.head_since_s = self._loop.time()

    def takes_nothing_since_s(self, now_s: float) -> float:
        """For how long the caller has read nothing of what waits for them; asked again and again."""
        waiting = self.transport.get_write_buffer_size() if self.transport is not None else 0
        if waiting == 0 or waiting != self._unread_bytes:
            self._unread_bytes, self._unread_since_s = waiting, now_s
        return now_s - self._unread_since_s

    def turn_away(self, reply: bytes) -> None:
        """Close with these last words."""
        if self.transport is not None:
            self.transport.write(reply)
        self.force_close()

    def _note_body(self, message: Any, body: StreamReader) -> None:
        """Remember the latest body; where its framing turns out broken, tell who reads it, which aiohttp does not."""
        if isinstance(message, RawRequestMessage):
            self._body = body
        elif self._body is not None and not self._body.is_eof():
            self._body.set_exception(web.RequestPayloadError("the framing is broken"))

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """The reply to what could not be parsed, or to a bug above. Says nothing of the bytes received."""
        if request.writer.output_size > 0:
            raise ConnectionError("the answer has begun, so no error can be sent in its place")
        if status == 400:
            reply = error_reply(Refused("bad_request", "the request is not valid HTTP"))
        else:
            log.error("a request failed outside the journey", exc_info=exc)
            reply = error_reply(Refused("internal_error", "internal error"))
        reply.force_close()
        return reply

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Send a reply; where it is one of aiohttp's own, such as the 404 to `OPTIONS *`, ours goes in its place."""
        if isinstance(resp, web.HTTPException):
            if resp.status == 404:
                resp = error_reply(Refused("not_found", "there is no such path here"))
            else:
                resp = error_reply(Refused("bad_request", "the request is not valid HTTP"))
                resp.force_close()
        return await super().finish_response(request, resp, start_time)


def tell_when_lost(request: web.BaseRequest, on_lost: Callable[[], None] | None) -> None:
    """Have `on_lost` called, once, if the caller of this request goes away; None: not any more."""
    connection = request.protocol
    if isinstance(connection, Connection):
        connection.on_lost = on_lost


class Listener:
    """One address, one application, and the connections open on it."""

    def __init__(self, app: web.Application, address: Address, server: Server, count: Callable[[int], None]) -> None:
        self._address = address
        self._settings = server
        self._count = count
        self._runner = web.AppRunner(
            app,
            # What becomes of a journey whose caller has left is the journey's affair: `tell_when_lost`.
            handler_cancellation=False,
            access_log=None,
            # What a handler of ours leaves unread is not worth waiting for.
            lingering_time=1.0,
        )
        self._connections: set[Connection] = set()
        self._server: asyncio.Server | None = None
        self._sweeper: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        """Where it listens, with the port the system chose."""
        if self._server is None:
            raise AssertionError("BUG: the listener was not started")
        host, port = self._server.sockets[0].getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    async def start(self) -> None:
        """Listen. Raises OSError where the address cannot be had."""
        await self._runner.setup()
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            self._connect, self._address.host, self._address.port, backlog=BACKLOG, reuse_address=True
        )
        self._sweeper = asyncio.create_task(self._sweep())

    async def stop(self, within_s: float) -> None:
        """No new connections; those that serve a request get `within_s` seconds, then the rest are closed."""
        if self._sweeper is not None:
            self._sweeper.cancel()
        if self._server is not None:
            self._server.close()
        manager = self._runner.server
        if manager is not None:
            manager.pre_shutdown()
            await manager.shutdown(within_s)
        await self._runner.cleanup()

    def opened(self, connection: Connection) -> None:
        """A connection came; beyond the limit it is closed at once, before it costs anything."""
        self._connections.add(connection)
        self._count(len(self._connections))
        if len(self._connections) > self._settings.max_connections:
            connection.turn_away(_TOO_MANY)

    def closed(self, connection: Connection) -> None:
        """A connection went."""
        self._connections.discard(connection)
        self._count(len(self._connections))

    def _connect(self) -> Connection:
        manager = self._runner.server
        if manager is None:
            raise AssertionError("BUG: a connection before set-up")
        return Connection(
            self,
            manager,
            loop=asyncio.get_running_loop(),
            keepalive_timeout=self._settings.idle_timeout_s,
            access_log=None,
            logger=log,
            max_line_size=MAX_HEAD_BYTES,
            max_field_size=MAX_HEAD_BYTES,
            # An encoded body is refused by the journey; nothing is inflated on a stranger's word.
            auto_decompress=False,
            lingering_time=1.0,
        )

    async def _sweep(self) -> None:
        """Every second or so, close those whose head has been coming for too long, and those who do not read."""
        loop = asyncio.get_running_loop()
        head_s, idle_s = self._settings.head_timeout_s, self._settings.idle_timeout_s
        while True:
            await asyncio.sleep(min(SWEEP_S, head_s, idle_s))
            now_s = loop.time()
            for connection in list(self._connections):
                if connection.head_since_s is not None and connection.head_since_s < now_s - head_s:
                    connection.turn_away(_TOO_SLOW)
                elif connection.takes_nothing_since_s(now_s) > idle_s and connection.transport is not None:
                    # A plain close would wait for what is unread to be read.
                    connection.transport.abort()


def _as_bytes(error: Refused) -> bytes:
    """A whole reply, for where there is no request that aiohttp could answer."""
    body = error.encode()
    head = (
        f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}",
        f"Server: {SERVER_NAME}",
        f"Content-Type: {JSON}",
        f"Content-Length: {len(body)}",
        *(f"{name}: {value}" for name, value in error.headers.items()),
        "Connection: close",
    )
    return "\r\n".join((*head, "", "")).encode() + body


_TOO_MANY = _as_bytes(Refused("overloaded", "too many connections", headers={"Retry-After": "1"}))
_TOO_SLOW = _as_bytes(Refused("request_timeout", "the head did not arrive in time"))
