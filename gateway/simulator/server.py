"""The embedded upstream: an OpenAI-compatible chat server for machines without keys, the demo and tests.

Real HTTP on a port of its own, and only that: what is said, how fast and how it goes wrong is decided in
the files beside this one and played here. A model id such as `sim-fault:503` misbehaves on purpose; see `FAULTS`.
Invariant: a client that leaves ends the work for it at once.
"""

import asyncio
import contextlib
import socket
import struct
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

from aiohttp import web

from gateway.domain.settings import SimulatorSettings
from gateway.simulator import chat
from gateway.simulator.chat import RequestRefused
from gateway.simulator.faults import FAULTS, reply_to
from gateway.simulator.reply import Part, Reply, json_reply, model_card, refused_reply

__all__ = ["FAULTS", "SEEN", "Seen", "SeenRequest", "Simulator", "SimulatorSettings", "simulator_app"]

_BODY_MAX_BYTES = 64 * 1024 * 1024
_MODELS_COUNTED_MAX = 1_000
_SHORTEST_SLEEP_S = 0.001  # Shorter waits are saved up: a sleep costs the loop about as much as a token's bytes.
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class SeenRequest:
    """What arrived: the path, the headers by lower-case name, the decoded body (None if it was not JSON)."""

    __slots__ = ("body", "headers", "path")

    def __init__(self, request: web.Request) -> None:
        self.path = request.path
        self.headers = {name.lower(): value for name, value in request.headers.items()}
        self.body: Any = None


class Seen:
    """What the simulator remembers for those who test against it."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        """Chat requests by model id; from a thousand ids on, new ones count as `other`."""
        self.open_calls = 0
        self.open_streams = 0
        self.last_request: SeenRequest | None = None
        self.stopping = asyncio.Event()

    def count(self, model: str) -> None:
        is_room = model in self.calls or len(self.calls) < _MODELS_COUNTED_MAX
        self.calls[model if is_room else "other"] += 1

    @contextlib.contextmanager
    def open(self, *, is_stream: bool) -> Iterator[None]:
        self.open_calls += 1
        self.open_streams += is_stream
        try:
            yield
        finally:
            self.open_calls -= 1
            self.open_streams -= is_stream


SEEN = web.AppKey("seen", Seen)
_SETTINGS = web.AppKey("settings", SimulatorSettings)


def simulator_app(settings: SimulatorSettings) -> web.Application:
    """The server as an application. Run it with `handler_cancellation`, as `Simulator` does."""
    app = web.Application(client_max_size=_BODY_MAX_BYTES)
    app[_SETTINGS] = settings
    app[SEEN] = Seen()
    app.router.add_post("/v1/chat/completions", _chat)
    app.router.add_get("/v1/models", _models)
    app.router.add_get("/v1/models/{id:.+}", _model)
    app.router.add_route("*", "/{path:.*}", _unknown)
    app.on_shutdown.append(_let_go)
    return app


class Simulator:
    """The simulator on a port. `await Simulator.start(...)`, then `base_url`, then `await stop()`."""

    def __init__(self, runner: web.AppRunner, seen: Seen, host: str) -> None:
        self._runner, self._seen, self.host = runner, seen, host
        self.port: int = runner.addresses[0][1]

    @classmethod
    async def start(
        cls, settings: SimulatorSettings | None = None, *, host: str = "127.0.0.1", port: int = 0
    ) -> "Simulator":
        """Listens on `port`, or on a free one. Raises `OSError` where it cannot."""
        app = simulator_app(settings or SimulatorSettings())
        runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        try:
            await web.TCPSite(runner, host, port).start()
        except OSError:
            await runner.cleanup()
            raise
        return cls(runner, app[SEEN], host)

    async def stop(self) -> None:
        """Stops listening and ends every open call."""
        await self._runner.cleanup()

    @property
    def base_url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}/v1"

    @property
    def calls(self) -> Counter[str]:
        return self._seen.calls

    @property
    def open_calls(self) -> int:
        """Chat requests that are being answered, streamed or not."""
        return self._seen.open_calls

    @property
    def open_streams(self) -> int:
        return self._seen.open_streams

    @property
    def last_request(self) -> SeenRequest | None:
        """The chat request that arrived last."""
        return self._seen.last_request


async def _chat(http: web.Request) -> web.StreamResponse:
    seen, settings = http.app[SEEN], http.app[_SETTINGS]
    seen.last_request = arrived = SeenRequest(http)
    try:
        arrived.body = chat.decode(await http.read())
        request = chat.read_request(arrived.body)
    except RequestRefused as refusal:
        return await _play(http, refused_reply(refusal))
    except web.HTTPRequestEntityTooLarge:
        too_large = RequestRefused(413, f"The body exceeds {_BODY_MAX_BYTES} bytes.", code="body_too_large")
        return await _play(http, refused_reply(too_large))
    seen.count(request.model)
    with seen.open(is_stream=bool(request.stream)):
        return await _play(http, reply_to(request, settings, now_s=int(time.time())))


async def _models(http: web.Request) -> web.StreamResponse:
    ids = [*chat.MODELS, *(f"fault:{name}" for name in FAULTS)]
    return await _play(http, json_reply(200, {"object": "list", "data": [model_card(one) for one in ids]}))


async def _model(http: web.Request) -> web.StreamResponse:
    try:
        return await _play(http, json_reply(200, model_card(http.match_info["id"])))
    except RequestRefused as refusal:
        return await _play(http, refused_reply(refusal))


async def _unknown(http: web.Request) -> web.StreamResponse:
    return await _play(http, refused_reply(RequestRefused(404, f"Invalid URL ({http.method} {http.path}).")))


async def _let_go(app: web.Application) -> None:
    app[SEEN].stopping.set()


async def _play(http: web.Request, reply: Reply) -> web.StreamResponse:
    """Sends a reply as its script says."""
    if reply.is_headless:
        return await _play_headless(http, reply)
    response = web.StreamResponse(status=reply.status, headers={**reply.headers, "content-type": reply.content_type})
    if reply.declared_bytes is None:
        response.headers["cache-control"] = "no-cache"
        response.enable_chunked_encoding()
    else:
        response.content_length = reply.declared_bytes
    await response.prepare(http)
    await _send(response, reply.parts)
    if reply.ending == "held":
        await http.app[SEEN].stopping.wait()
    if reply.ending != "whole":
        _close(http)
        return response
    await response.write_eof()
    return response


async def _play_headless(http: web.Request, reply: Reply) -> web.StreamResponse:
    if reply.ending == "held":
        await http.app[SEEN].stopping.wait()
    elif http.transport is not None:
        # Lingering for zero seconds turns the close into a reset.
        connection = http.transport.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
    _close(http)
    return web.Response()


def _close(http: web.Request) -> None:
    """Closes once what was written has left; aiohttp finds the connection closed and adds nothing."""
    if http.transport is not None:
        http.transport.close()


async def _send(response: web.StreamResponse, parts: tuple[Part, ...]) -> None:
    """Writes the parts, each when it is due; those that wait for nothing leave together."""
    loop = asyncio.get_running_loop()
    due_s = loop.time()
    batch = bytearray()
    for part in parts:
        due_s += part.wait_ms / 1000
        if part.wait_ms > 0 and due_s - loop.time() >= _SHORTEST_SLEEP_S:
            if batch:
                await response.write(bytes(batch))
                batch.clear()
            # Measured anew, because the write may have waited for a slow reader.
            await asyncio.sleep(max(0.0, due_s - loop.time()))
        batch += part.data
    if batch:
        await response.write(bytes(batch))
