"""Step 1, admit: whether a request is let in at all, and its body. All back-pressure on callers is here.

What is too large, encoded, too slow or too much is refused before it is read or parsed, each with its own code.
"""

import asyncio

from aiohttp import HttpVersion11, web

from gateway.domain.errors import Refused
from gateway.edge.open_call import OpenCall
from gateway.edge.runtime import Runtime

# After a refusal the body is still on its way, so what follows on the connection could not be told from it.
_CLOSE = {"Connection": "close"}


async def admit(call: OpenCall, request: web.Request) -> bytes:
    """The body of a call. Raises `Refused`."""
    runtime = call.runtime
    if runtime.is_draining:
        raise Refused("draining", "the gateway is shutting down", headers={"Retry-After": "1", "Connection": "close"})
    if runtime.observer.in_flight > runtime.server.max_calls:
        raise Refused("overloaded", "too many calls at once", headers={"Retry-After": "1"})
    runtime.journal.check()
    # Counted before it is read, by what is announced. A chunked body announces nothing and is counted once it is here.
    call.hold_bytes(min(request.content_length or 0, runtime.server.max_body_bytes))
    _check_buffers(runtime)
    body = await read_body(runtime, request)
    call.hold_bytes(len(body))
    _check_buffers(runtime)
    return body


def _check_buffers(runtime: Runtime) -> None:
    if runtime.buffered_bytes > runtime.server.max_buffered_bytes:
        raise Refused("overloaded", "too many bytes of requests at once", headers={"Retry-After": "1", **_CLOSE})


async def read_body(runtime: Runtime, request: web.Request) -> bytes:
    """The request's body, within its limits of size and time. Raises `Refused`."""
    _check_head(runtime, request)
    try:
        if "Expect" in request.headers:
            await _ask_for_body(request)
        async with asyncio.timeout(runtime.server.body_timeout_s):
            return await request.read()
    except web.HTTPRequestEntityTooLarge:
        raise too_large(runtime) from None
    except TimeoutError:
        raise Refused("request_timeout", "the body did not arrive in time", headers=_CLOSE) from None
    except (web.RequestPayloadError, OSError, ValueError):
        raise Refused("incomplete_body", "the body is incomplete", headers=_CLOSE) from None


async def leave_to_read_body(request: web.Request) -> None:
    """aiohttp's `expect_handler`: does nothing, so that a body is asked for only once it is known to be wanted."""


def _check_head(runtime: Runtime, request: web.Request) -> None:
    """Refuse what the head announces and would not be read: no byte of such a body is waited for."""
    headers = request.headers
    if headers.get("Content-Encoding", "identity").strip().lower() != "identity":
        raise Refused("unsupported_encoding", "request bodies must not have a Content-Encoding", headers=_CLOSE)
    if headers.get("Transfer-Encoding", "chunked").strip().lower() != "chunked":
        # `identity, chunked` is good HTTP of old; a proxy before us may have read it otherwise.
        raise Refused("bad_request", "the only Transfer-Encoding is chunked", headers=_CLOSE)
    if headers.get("Expect", "100-continue").strip().lower() != "100-continue":
        raise Refused("unsupported_expectation", "only 100-continue can be expected", headers=_CLOSE)
    if request.content_length is not None and request.content_length > runtime.server.max_body_bytes:
        raise too_large(runtime)


async def _ask_for_body(request: web.Request) -> None:
    """Send `100 Continue`; HTTP/1.0 does not know it."""
    if request.version >= HttpVersion11:
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        # Not a part of the answer: without this an error could not be sent any more.
        request.writer.output_size = 0


def too_large(runtime: Runtime) -> Refused:
    """The refusal of a body over the limit. The rest of it is on its way, so the connection is not kept."""
    message = f"the body is over {runtime.server.max_body_bytes} bytes"
    return Refused("body_too_large", message, headers=_CLOSE)
