"""Step 5, attempt: one try at one model, up to the point where an answer has begun for certain.

Plain: the whole answer, checked. Streaming: the first event of content, held back, so that whatever fails before it
can still fall back silently. Everything that goes wrong leaves here as an `UpstreamFault`.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping

from gateway.decide.fill import Filled
from gateway.decide.plan import Target
from gateway.domain.dialects import DIALECTS, Dialect, translate
from gateway.domain.errors import FaultKind, UpstreamFault
from gateway.domain.money import Usage
from gateway.domain.sse import DONE, Splitter, Tap
from gateway.domain.wire import ChatBody, encode, raw, read_answer, read_usage
from gateway.edge.open_call import OpenCall
from gateway.edge.upstream import Exchange, Upstream

# Of a provider's refusal, these go on to the caller: the SDKs pace themselves by them.
_PASSED_HEADERS = ("retry-after", "retry-after-ms", "x-should-retry")
_RATE_LIMIT_PREFIX = "x-ratelimit-"
# Of a caller's headers, these go on to the provider. Everything else stays here.
_SENT_HEADERS = ("traceparent", "tracestate")
_INCLUDE_USAGE = raw({"include_usage": True})

_KINDS_BY_STATUS = {
    401: FaultKind.AUTH,
    403: FaultKind.AUTH,
    404: FaultKind.NOT_FOUND,
    408: FaultKind.TIMEOUT,
    429: FaultKind.RATE_LIMITED,
}


class Whole:
    """A plain answer, complete and checked."""

    __slots__ = ("body", "finish_reason", "headers", "model", "usage")

    def __init__(
        self, body: bytes, model: str, finish_reason: str, usage: Usage | None, headers: dict[str, str]
    ) -> None:
        self.body = body
        self.model = model
        self.finish_reason = finish_reason
        self.usage = usage
        self.headers = headers


class Begun:
    """A stream whose first events are here, and the rest to come."""

    __slots__ = ("chunks", "dialect", "events", "exchange", "headers", "splitter", "stall_s")

    def __init__(self, exchange: Exchange, dialect: Dialect, stall_s: float) -> None:
        self.exchange = exchange
        self.dialect = dialect
        self.stall_s = stall_s
        self.headers = rate_limit_headers(exchange.headers)
        self.splitter = Splitter()
        self.chunks: AsyncIterator[bytes] = exchange.chunks()
        self.events: list[bytes] = []

    async def next_events(self) -> list[bytes] | None:
        """The events of the next piece of the stream; None at its end. Raises `UpstreamFault`."""
        async for chunk in self.chunks:
            return self.splitter.feed(chunk)
        return None


def request_body(target: Target, filled: Filled, body: ChatBody, *, stream_usage: bool) -> tuple[bytes, list[str]]:
    """The bytes to send to `target`, and the names of the fields its dialect does not take."""
    dialect = DIALECTS[target.kind]
    fields, dropped = translate(dialect, filled.fields)
    sent = dict(fields)
    sent["model"] = raw(target.model)
    if body.stream and dialect.asks_for_usage and stream_usage and not body.include_usage:
        sent["stream_options"] = _INCLUDE_USAGE
    return encode(sent), dropped


def sent_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """The caller's headers that go on to the provider."""
    return {name: headers[name] for name in _SENT_HEADERS if name in headers}


async def attempt(
    call: OpenCall, upstream: Upstream, target: Target, payload: bytes, headers: Mapping[str, str], *, stream: bool
) -> Whole | Begun:
    """One try. Raises `UpstreamFault`; the exchange is closed then."""
    limits = upstream.timeouts
    since_s = time.perf_counter()
    exchange: Exchange | None = None
    begun = False
    try:
        exchange = await upstream.send(payload, headers, within_s=min(limits.first_byte_s, call.left_s))
        async with asyncio.timeout(min(limits.total_s if not stream else limits.first_byte_s, call.left_s)):
            if exchange.status != 200:
                raise _refusal(exchange, await exchange.read())
            if not stream:
                return _whole(exchange, await exchange.read(), DIALECTS[target.kind])
            answer = Begun(exchange, DIALECTS[target.kind], limits.stall_s)
            await _first_events(answer)
            begun = True
            return answer
    except UpstreamFault as fault:
        if fault.kind is FaultKind.CUT:
            # Nothing of the answer has gone out, so to the caller it is as if none had come.
            fault.kind = FaultKind.RESET
        raise
    except TimeoutError:
        raise UpstreamFault(
            FaultKind.TIMEOUT, "upstream_timeout", f"{target.upstream} did not answer in time"
        ) from None
    finally:
        call.waited_s += time.perf_counter() - since_s
        if exchange is not None and not begun:
            exchange.close()


async def _first_events(answer: Begun) -> None:
    """Read until the first event is here, and see that it is no error and no empty end."""
    content_type = answer.exchange.headers.get("Content-Type", "")
    if not content_type.lower().startswith("text/event-stream"):
        raise _not_a_stream(answer.exchange, await answer.exchange.read())
    while not answer.events:
        found = await answer.next_events()
        if found is None:
            answer.events = answer.splitter.end()
            break
        answer.events = found
    if not answer.events or answer.events[0] == DONE:
        raise UpstreamFault(FaultKind.INVALID, "upstream_invalid", "the provider's stream held nothing")
    tap = Tap()
    tap.look(answer.events[0])
    if tap.error is not None:
        raise stream_error(answer.exchange, tap.error)


def _whole(exchange: Exchange, body: bytes, dialect: Dialect) -> Whole:
    if dialect.rewrite_answer is not None:
        body = dialect.rewrite_answer(body)
    answer = read_answer(body)
    if answer is not None and answer.has_error:
        raise stream_error(exchange, body)
    if answer is None or not answer.choices:
        raise UpstreamFault(FaultKind.INVALID, "upstream_invalid", "the provider's answer is not a chat completion")
    reason = next((choice.finish_reason for choice in answer.choices if choice.finish_reason), "")
    if reason == "error":
        raise UpstreamFault(FaultKind.SERVER, "upstream_error", "the provider ended with finish_reason error")
    return Whole(body, answer.model or "", reason, read_usage(answer.usage), rate_limit_headers(exchange.headers))


def _refusal(exchange: Exchange, body: bytes) -> UpstreamFault:
    """The fault behind a status other than 200."""
    status = exchange.status
    kind = _KINDS_BY_STATUS.get(status)
    if kind is None:
        kind = FaultKind.SERVER if status >= 500 else FaultKind.REJECTED if status >= 400 else FaultKind.INVALID
    if kind is FaultKind.AUTH:
        # The provider's words here may quote our key, in part.
        return UpstreamFault(kind, "upstream_auth", "the provider refused the gateway's own key")
    if kind is FaultKind.INVALID:
        return UpstreamFault(kind, "upstream_invalid", f"the provider answered {status}, which is no answer")
    said = exchange.read_error(body)
    headers = {name: exchange.headers.get(name, "") for name in _PASSED_HEADERS}
    return UpstreamFault(
        kind,
        said.code or ("model_not_found" if kind is FaultKind.NOT_FOUND else "upstream_error"),
        said.message,
        status=status,
        type=said.type or ("invalid_request_error" if status < 500 and status != 429 else "server_error"),
        param=said.param,
        headers={
            **{name: value for name, value in headers.items() if value and value.isprintable()},
            **rate_limit_headers(exchange.headers),
        },
    )


def stream_error(exchange: Exchange, data: bytes) -> UpstreamFault:
    """The fault behind an error object that came under status 200."""
    said = exchange.read_error(data)
    code = said.code or "upstream_error"
    return UpstreamFault(FaultKind.SERVER, code, said.message, status=502, type=said.type or "server_error")


def _not_a_stream(exchange: Exchange, body: bytes) -> UpstreamFault:
    answer = read_answer(body)
    if answer is not None and answer.has_error:
        return stream_error(exchange, body)
    return UpstreamFault(FaultKind.INVALID, "upstream_invalid", "the provider did not answer with a stream")


def rate_limit_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """The provider's rate-limit headers, for SDKs that pace themselves."""
    return {
        name: value
        for name, value in headers.items()
        if name.lower().startswith(_RATE_LIMIT_PREFIX) and value.isprintable()
    }
