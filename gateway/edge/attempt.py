"""Step 5, attempt: one try at one model, up to the point where an answer has begun for certain.

Plain: the whole answer, checked. Streaming: everything up to the first content is held back, so that whatever fails
before it can still fall back silently; a policy may hold back the whole stream. Everything that goes wrong leaves here
as an `UpstreamFault`.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping

from gateway.decide.fill import Filled
from gateway.decide.targets import Target
from gateway.domain.dialects import DIALECTS, Dialect, continued, translate
from gateway.domain.errors import FaultKind, UpstreamFault
from gateway.domain.money import Usage
from gateway.domain.sse import DONE, Splitter, Tap
from gateway.domain.wire import ChatBody, carries_content, encode, is_json, raw, read_answer, read_usage
from gateway.edge.open_call import OpenCall
from gateway.edge.refusal import error_in_answer, no_stream, rate_limit_headers, refusal
from gateway.edge.upstream import MAX_ANSWER_BYTES, Exchange, Upstream

# Malformed events are skipped; a stream that holds more of them than this is broken.
MAX_MALFORMED = 3
_INCLUDE_USAGE = raw({"include_usage": True})


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
    """A stream whose first content is here, and the rest to come. Its events are in OpenAI's dialect."""

    __slots__ = ("_chunks", "_dialect", "_splitter", "events", "exchange", "headers", "target")

    def __init__(self, exchange: Exchange, target: Target) -> None:
        self.exchange = exchange
        self.target = target
        self.headers = rate_limit_headers(exchange.headers)
        self.events: list[bytes] = []
        self._dialect: Dialect = DIALECTS[target.kind]
        self._splitter = Splitter()
        self._chunks: AsyncIterator[bytes] = exchange.chunks()

    async def next_events(self) -> list[bytes] | None:
        """The events of the next piece of the stream; None at its end. Raises `UpstreamFault`."""
        async for chunk in self._chunks:
            return self._rewritten(self._splitter.feed(chunk))
        return None

    def last_events(self) -> list[bytes]:
        """The last event where the stream ended without its blank line."""
        return self._rewritten(self._splitter.end())

    def _rewritten(self, events: list[bytes]) -> list[bytes]:
        rewrite = self._dialect.rewrite_chunk
        if rewrite is None:
            return events
        return [piece for data in events for piece in ((data,) if data == DONE else rewrite(data))]


def request_body(
    target: Target, filled: Filled, body: ChatBody, *, stream_usage: bool, begun_text: str = ""
) -> tuple[bytes, list[str]]:
    """The bytes to send to `target`, and the names of the fields its dialect does not take.

    `begun_text` is what the answer begins with, for a model that is to go on from there.
    """
    dialect = DIALECTS[target.kind]
    fields, dropped = translate(dialect, filled.fields)
    sent = continued(dialect, fields, begun_text) if begun_text else dict(fields)
    sent["model"] = raw(target.model)
    if body.stream and dialect.asks_for_usage and stream_usage and not body.include_usage:
        sent["stream_options"] = _INCLUDE_USAGE
    return encode(sent), dropped


async def attempt(
    call: OpenCall,
    upstream: Upstream,
    target: Target,
    payload: bytes,
    headers: Mapping[str, str],
    *,
    stream: bool,
    hold: bool = False,
) -> Whole | Begun:
    """One try. `hold`: the whole stream is waited for. Raises `UpstreamFault`; the exchange is closed then."""
    limits = target.timeouts
    since_s = time.perf_counter()
    exchange: Exchange | None = None
    is_kept = is_sound = False
    silence = FaultKind.FIRST_TOKEN
    tap = Tap()
    try:
        first_s = limits.first_token_s if stream else limits.first_byte_s
        exchange = await upstream.send(payload, headers, within_s=min(first_s, call.left_s))
        waited_s = time.perf_counter() - since_s
        rest_s = (first_s if stream or exchange.status != 200 else limits.attempt_s) - waited_s
        async with asyncio.timeout(min(rest_s, call.left_s)) as clock:
            if exchange.status != 200:
                said = await exchange.read()
                is_sound = is_json(said)
                raise refusal(exchange, said)
            if not stream:
                whole = _whole(exchange, await exchange.read(), DIALECTS[target.kind])
                is_sound = True
                return whole
            answer = Begun(exchange, target)
            await _until_content(answer)
            if hold:
                silence = FaultKind.STALL
                within_s = min(limits.attempt_s - (time.perf_counter() - since_s), call.left_s)
                await _until_end(answer, tap, clock, choices=call.purse.n, within_s=within_s)
            is_kept = True
            return answer
    except UpstreamFault as fault:
        if fault.kind is FaultKind.CUT:
            # Nothing of the answer has gone out, so to the caller it is as if none had come.
            fault.kind = FaultKind.RESET
        elif fault.kind is FaultKind.FIRST_BYTE and call.left_s <= 0:
            fault.kind = FaultKind.DEADLINE
        if tap.content_events:
            call.failed(fault, tap)
        raise
    except TimeoutError:
        kind = FaultKind.DEADLINE if call.left_s <= 0 else silence
        raise UpstreamFault(kind, "upstream_timeout", f"{target.upstream} did not answer in time") from None
    finally:
        call.waited_s += time.perf_counter() - since_s
        if exchange is not None and not is_kept:
            exchange.close(is_sound=is_sound)


async def _until_content(answer: Begun) -> None:
    """Read until the first content is here, and see that no error and no empty end comes before it."""
    exchange = answer.exchange
    if not exchange.headers.get("Content-Type", "").lower().startswith("text/event-stream"):
        raise no_stream(exchange, await exchange.read())
    size = 0
    while True:
        found = await answer.next_events()
        is_end = found is None
        events = answer.last_events() if found is None else found
        answer.events += events
        for data in events:
            if data == DONE:
                is_end = True
                break
            tap = Tap()
            if not tap.look(data):
                raise UpstreamFault(FaultKind.INVALID, "upstream_invalid", "the provider's stream begins with no JSON")
            _refuse_errors(exchange, tap)
            if carries_content(data):
                return
        size += sum(map(len, events))
        if is_end or size > MAX_ANSWER_BYTES:
            raise UpstreamFault(FaultKind.INVALID, "upstream_invalid", "the provider's stream held nothing")


async def _until_end(answer: Begun, tap: Tap, clock: asyncio.Timeout, *, choices: int, within_s: float) -> None:
    """Read the whole stream, as far as it is not here yet, and see that it is whole; a stall ends it as anywhere."""
    loop = asyncio.get_running_loop()
    end_s = loop.time() + within_s
    is_at_end = False
    events, answer.events = answer.events, []
    size = 0
    while True:
        for data in events:
            answer.events.append(data)
            if data == DONE:
                return
            if tap.look(data):
                _refuse_errors(answer.exchange, tap)
            elif tap.malformed > MAX_MALFORMED and tap.finished < choices:
                raise UpstreamFault(FaultKind.CUT, "upstream_cut", "the provider's stream is malformed")
        size += sum(map(len, events))
        if tap.finished >= choices:
            return
        if is_at_end:
            raise UpstreamFault(FaultKind.CUT, "upstream_cut", "the provider's answer broke off before its end")
        if size > MAX_ANSWER_BYTES:
            raise UpstreamFault(FaultKind.INVALID, "upstream_invalid", "the provider's answer is too large")
        clock.reschedule(min(end_s, loop.time() + answer.target.timeouts.stall_s))
        found = await answer.next_events()
        is_at_end = found is None
        events = answer.last_events() if found is None else found


def _refuse_errors(exchange: Exchange, tap: Tap) -> None:
    if tap.error is not None:
        raise error_in_answer(exchange, tap.error)
    if tap.finish_reason == "error":
        raise UpstreamFault(FaultKind.SERVER, "upstream_error", "the provider ended with finish_reason error")


def _whole(exchange: Exchange, body: bytes, dialect: Dialect) -> Whole:
    if dialect.rewrite_answer is not None:
        body = dialect.rewrite_answer(body)
    answer = read_answer(body)
    if answer is not None and answer.has_error:
        raise error_in_answer(exchange, body)
    if answer is None or not answer.choices:
        raise UpstreamFault(FaultKind.INVALID, "upstream_invalid", "the provider's answer is not a chat completion")
    reason = next((choice.finish_reason for choice in answer.choices if choice.finish_reason), "")
    if reason == "error":
        raise UpstreamFault(FaultKind.SERVER, "upstream_error", "the provider ended with finish_reason error")
    return Whole(body, answer.model or "", reason, read_usage(answer.usage), rate_limit_headers(exchange.headers))
