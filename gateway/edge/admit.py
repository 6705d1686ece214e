"""Step 1, admit: whether a request is let in at all, and its body. All back-pressure on callers is here.

What is too large, encoded, too slow or too much is refused before it is read or parsed, each with its own code.
"""

import asyncio

from aiohttp import web

from gateway.domain.errors import Refused
from gateway.edge.runtime import Runtime


async def admit(runtime: Runtime, request: web.Request) -> bytes:
    """The request's body. Raises `Refused`."""
    if runtime.is_draining:
        raise Refused("draining", "the gateway is shutting down", headers={"Retry-After": "1", "Connection": "close"})
    if runtime.observer.in_flight > runtime.server.max_calls:
        raise Refused("overloaded", "too many calls at once", headers={"Retry-After": "1"})
    encoding = request.headers.get("Content-Encoding", "identity")
    if encoding.strip().lower() != "identity":
        raise Refused("unsupported_encoding", "request bodies must not have a Content-Encoding")
    check_size(runtime, request)
    try:
        async with asyncio.timeout(runtime.server.body_timeout_s):
            return await request.read()
    except web.HTTPRequestEntityTooLarge:
        raise too_large(runtime) from None
    except TimeoutError:
        raise Refused("request_timeout", "the body did not arrive in time", headers={"Connection": "close"}) from None
    except (web.RequestPayloadError, OSError, ValueError):
        raise Refused("incomplete_body", "the body is incomplete", headers={"Connection": "close"}) from None


async def expect_continue(request: web.Request) -> None:
    """Answer `Expect: 100-continue`, but only to a body that would be read: aiohttp's `expect_handler`."""
    if request.headers.get("Expect", "").lower() != "100-continue":
        raise Refused("unsupported_expectation", "only 100-continue can be expected")


def check_size(runtime: Runtime, request: web.Request) -> None:
    """Refuse a body whose announced length is over the limit, before a byte of it is read."""
    if request.content_length is not None and request.content_length > runtime.server.max_body_bytes:
        raise too_large(runtime)


def too_large(runtime: Runtime) -> Refused:
    """The refusal of a body over the limit. The rest of it is on its way, so the connection is not kept."""
    message = f"the body is over {runtime.server.max_body_bytes} bytes"
    return Refused("body_too_large", message, headers={"Connection": "close"})
