"""Plain HTTP to a provider, behind a small interface: open an exchange, read it whole or in chunks, close it.

Not here: which provider, what to send, what to do when it fails. The invariants: every exchange is released exactly
once, every foreign exception leaves as an `UpstreamFault`, and no redirect, cookie or proxy variable is followed.
"""

import asyncio
import ssl
from collections.abc import AsyncIterator, Mapping
from functools import partial
from io import BytesIO
from typing import Protocol
from urllib.parse import quote

import aiohttp
from aiohttp.client_proto import ResponseHandler
from aiohttp.http import HttpProcessingError
from yarl import URL

from gateway import __version__
from gateway.domain.errors import FaultKind, UpstreamFault
from gateway.domain.provider_error import ProviderError, read_error
from gateway.domain.secret import Secret
from gateway.domain.settings import Upstream as UpstreamSettings

# Larger than any chat completion; what is larger is not one, and must not fill our memory.
MAX_ANSWER_BYTES = 64 * 2**20
# A provider closes idle connections after 60 s or more; ours go first, so that none is closed under a request.
KEEPALIVE_S = 20.0
READ_BYTES = 64 * 2**10
LARGE_BYTES = 512 * 2**10


class Exchange(Protocol):
    """A request that was sent and whose status has come."""

    status: int
    headers: Mapping[str, str]

    async def read(self) -> bytes:
        """The whole body. Raises `UpstreamFault`."""
        ...

    def read_error(self, body: bytes) -> ProviderError:
        """The provider's words about a failure, without our key, should it quote it."""
        ...

    def chunks(self) -> AsyncIterator[bytes]:
        """The body as it arrives. Raises `UpstreamFault` with kind CUT where it breaks off."""
        ...

    def close(self, *, is_sound: bool) -> None:
        """Let go. The connection is used again only where the body was read to its end and `is_sound`: made sense."""
        ...


class Upstream(Protocol):
    """A provider one can send chat requests to."""

    stream_usage: bool

    async def send(self, body: bytes, headers: Mapping[str, str], *, within_s: float) -> Exchange:
        """Post a chat request; return when the status is known. Raises `UpstreamFault`."""
        ...

    async def look_up(self, model: str, *, within_s: float) -> Exchange:
        """Ask for a model's card, or with "" for the list of them. Costs no tokens. Raises `UpstreamFault`."""
        ...

    async def close(self) -> None:
        """Close every connection."""
        ...


class HttpExchange:
    """An exchange over aiohttp."""

    __slots__ = ("_key", "_response", "headers", "status")

    def __init__(self, response: aiohttp.ClientResponse, key: Secret) -> None:
        self._response = response
        self._key = key
        self.status = response.status
        self.headers: Mapping[str, str] = response.headers

    async def read(self) -> bytes:
        """The whole body, at most MAX_ANSWER_BYTES."""
        parts: list[bytes] = []
        size = 0
        async for part in self.chunks():
            size += len(part)
            if size > MAX_ANSWER_BYTES:
                raise UpstreamFault(FaultKind.INVALID, "upstream_invalid", "the provider's answer is too large")
            parts.append(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def read_error(self, body: bytes) -> ProviderError:
        """What the provider says, with `***` for our key."""
        key = self._key.reveal()
        if not key:
            return read_error(self.status, body)
        # In the bytes, lest a long message be cut inside the key; in the words, lest JSON's escapes have hidden it.
        said = read_error(self.status, body.replace(key.encode(), b"***"))
        return ProviderError(
            said.message.replace(key, "***"), *(word and word.replace(key, "***") for word in said[1:])
        )

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body in the pieces it comes in."""
        try:
            async for part in self._response.content.iter_any():
                yield part
        except (aiohttp.ClientError, OSError) as error:
            raise UpstreamFault(FaultKind.CUT, "upstream_cut", "the provider's answer broke off") from error

    def close(self, *, is_sound: bool) -> None:
        """Release once. After a body that made no sense more of it may follow, and would pass for the next answer."""
        if is_sound and self._response.content.is_eof():
            self._response.release()
        else:
            self._response.close()


class _Response(aiohttp.ClientResponse):
    """aiohttp's response, which keeps its connection until it is closed: aiohttp's own hands it on at the body's end,
    before anybody has seen whether the body made sense."""

    def _response_eof(self) -> None:
        pass


class _Connection(ResponseHandler):
    """aiohttp's client protocol. Of broken framing it tells who waits for a head, but not who waits for a body."""

    def set_exception(self, exc: BaseException, *cause: BaseException) -> None:
        body = self._payload
        if isinstance(exc, HttpProcessingError) and body is not None and not body.is_eof():
            body.set_exception(aiohttp.ClientPayloadError("the framing is broken"))
        super().set_exception(exc, *cause)


class HttpUpstream:
    """A provider over HTTP/1.1, through an aiohttp session of its own."""

    def __init__(self, name: str, settings: UpstreamSettings, base_url: str) -> None:
        self.name = name
        self.stream_usage = settings.stream_usage
        self._url = f"{base_url.rstrip('/')}/chat/completions"
        self._models_url = f"{base_url.rstrip('/')}/models"
        self._key = settings.api_key
        self._headers = {"Authorization": f"Bearer {self._key.reveal()}"} if self._key else {}
        self._headers |= {
            "Content-Type": "application/json",
            # Compressed answers would be decompressed only to be read here and sent on plain.
            "Accept-Encoding": "identity",
            "User-Agent": f"genesis-gateway/{__version__}",
        }
        connector = aiohttp.TCPConnector(limit=settings.max_connections, keepalive_timeout=KEEPALIVE_S)
        connect: type[ResponseHandler] = _Connection
        connector._factory = partial(connect, loop=asyncio.get_running_loop())
        self._session = aiohttp.ClientSession(
            connector=connector,
            response_class=_Response,
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
            read_bufsize=READ_BYTES,
            # The deadlines of a call are the journey's; only connecting is aiohttp's to watch.
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=settings.timeouts.connect_s),
        )

    async def send(self, body: bytes, headers: Mapping[str, str], *, within_s: float) -> HttpExchange:
        """Post a chat request. `within_s` bounds the wait for the status line, connecting included."""
        try:
            async with asyncio.timeout(within_s):
                response = await self._session.post(
                    self._url,
                    # aiohttp writes a file piece by piece, and large bytes at once, of which it warns.
                    data=body if len(body) <= LARGE_BYTES else BytesIO(body),
                    headers={**self._headers, **headers},
                    allow_redirects=False,
                )
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            raise _fault_of(error, self.name) from error
        return HttpExchange(response, self._key)

    async def look_up(self, model: str, *, within_s: float) -> HttpExchange:
        """Get a model's card, or the list. An id may hold slashes and colons, and they stay as they are."""
        url = f"{self._models_url}/{quote(model, safe='/:@')}" if model else self._models_url
        try:
            async with asyncio.timeout(within_s):
                response = await self._session.get(URL(url, encoded=True), headers=self._headers, allow_redirects=False)
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            raise _fault_of(error, self.name) from error
        return HttpExchange(response, self._key)

    async def close(self) -> None:
        """Close every connection."""
        await self._session.close()


def _fault_of(error: Exception, name: str) -> UpstreamFault:
    """The one table from aiohttp's exceptions to ours; the more special class stands before the more general."""
    match error:
        case aiohttp.ConnectionTimeoutError():
            return UpstreamFault(FaultKind.CONNECT, "upstream_unreachable", f"no connection to {name} in time")
        case TimeoutError():
            return UpstreamFault(FaultKind.FIRST_BYTE, "upstream_timeout", f"{name} did not answer in time")
        case aiohttp.ClientSSLError() | ssl.SSLError():
            return UpstreamFault(FaultKind.CONNECT, "upstream_unreachable", f"no secure connection to {name}")
        case aiohttp.ClientConnectorError():
            return UpstreamFault(FaultKind.CONNECT, "upstream_unreachable", f"no connection to {name}")
        case aiohttp.ClientResponseError():
            return UpstreamFault(FaultKind.INVALID, "upstream_invalid", f"{name} does not speak HTTP as it should")
        case _:
            return UpstreamFault(FaultKind.RESET, "upstream_unreachable", f"{name} closed the connection")
