"""Step 6, relay: the stream's events to the client as they come, and an end that is true.

`[DONE]` goes out only when a provider finished and the record is in the journal. A stream that breaks off is joined
with another model's where the policy says so and both say the same; else it ends in an error event, which the SDKs
raise. A slow reader holds the provider back, it never fills our memory; one that reads nothing for
`server.idle_timeout_s` counts as gone.
"""

import asyncio
import time
from contextlib import suppress

import msgspec
from aiohttp import web

from gateway.decide.bound import is_over
from gateway.domain.errors import FaultKind, GatewayError, Refused, UpstreamFault
from gateway.domain.splice import MAX_DELIVERED_BYTES, Mismatch, Splice, read_delivered, respliced
from gateway.domain.sse import DONE, DONE_FRAME, Tap, frame
from gateway.edge.attempt import MAX_MALFORMED, Begun
from gateway.edge.failover import Failover
from gateway.edge.open_call import OpenCall
from gateway.edge.refusal import error_in_answer
from gateway.telemetry.gen_ai import Operations

# After the last finish_reason only usage and `[DONE]` can come; a provider that forgets them is not waited for.
GRACE_S = 2.0
# Less than this unsent does not make a write wait, so no timer is set for it.
EASY_BYTES = 32 * 2**10
# What follows `[DONE]` is an empty chunk, which comes at once if it comes at all.
READ_OUT_S = 0.25
# The least rate of a stream is judged over stretches of so long a wait for the provider.
DRIP_WINDOW_S = 30.0


class Relay:
    """One stream on its way out."""

    def __init__(
        self,
        call: OpenCall,
        failover: Failover,
        begun: Begun,
        response: web.StreamResponse,
        transport: asyncio.Transport | None,
        *,
        wants_usage: bool,
    ) -> None:
        self._call = call
        self._failover = failover
        self._begun = begun
        self._response = response
        self._transport = transport
        self._wants_usage = wants_usage
        self._tap = Tap()
        self._splice: Splice | None = None
        self._stream_id = ""
        # What went out, for joining another stream to it; None where nobody could, or where it is too much.
        may_join = call.on_cut == "continue" and call.purse.n == 1 and failover.has_next
        self._sent: list[bytes] | None = [] if may_join else None
        self._sent_bytes = 0
        self._waits_for_client = False
        self._patience = asyncio.timeout(None)
        # Of the stretch over which the rate is judged: how long the provider was waited for, and what it sent.
        self._window_waited_s = 0.0
        self._window_events = 0
        # When the latest events came, and the latest chunk with content; and of how many chunks is told.
        self._came_s = self._chunk_s = time.perf_counter()
        self._told_chunks = 0
        self._operations = call.runtime.observer.operations

    async def run(self, request: web.Request) -> None:
        """Relay to the end, whichever provider it comes from. What cannot be mended becomes the stream's last event."""
        error: GatewayError | None = None
        try:
            if not self._call.record.client_left:
                await self._response.prepare(request)
            while True:
                fault = await self._relay_one()
                if fault is None or not await self._resume(fault):
                    error = fault
                    break
            await self._end(error)
            if self._tap.done:
                await self._read_out()
        finally:
            self._begun.exchange.close(is_sound=self._tap.done)
            self._failover.left()

    async def _relay_one(self) -> UpstreamFault | None:
        """One provider's stream to its end: None where it is whole, or where the client has gone."""
        self._patience = asyncio.timeout(None)
        self._window_waited_s, self._window_events = 0.0, 0
        self._came_s, self._told_chunks = time.perf_counter(), 0
        try:
            async with self._patience:
                await self._pump()
        except TimeoutError:
            if self._waits_for_client:
                self._call.record.client_left = True
                fault = UpstreamFault(FaultKind.LEFT, "upstream_cut", "the caller reads nothing")
            else:
                kind = FaultKind.DEADLINE if self._call.left_s <= 0 else FaultKind.STALL
                fault = UpstreamFault(kind, "upstream_timeout", "the provider's stream stalled")
        except UpstreamFault as found:
            fault = found
        except Mismatch as mismatch:
            fault = UpstreamFault(FaultKind.CUT, "upstream_cut", f"the provider's answer broke off, and {mismatch}")
            self._sent = None
            # Two models that answer differently are both well.
            self._failover.left()
            # A finish_reason that came with the second answer ends that one, not what the client has.
            self._tap = Tap()
        else:
            self._failover.ended(None)
            return None
        # What follows the last finish_reason is not part of the answer, so neither is its absence.
        if self._is_complete:
            self._failover.ended(None)
            return None
        self._call.failed(fault, self._tap)
        self._failover.ended(fault)
        return fault

    async def _resume(self, fault: UpstreamFault) -> bool:
        """Take up with another model's stream where this one broke off; False where that cannot be."""
        delivered = read_delivered(self._sent) if self._sent is not None else None
        self._begun.exchange.close(is_sound=False)
        if delivered is None:
            return False
        try:
            found = await self._failover.resume(fault, delivered)
        except Refused:
            return False  # No money for another attempt: the stream's own fault is what the caller hears of.
        if found is None:
            return False
        self._begun, self._splice = found
        self._stream_id = delivered.id
        self._tap = Tap()
        self._call.runtime.observer.resumed(self._begun.target.upstream)
        return True

    @property
    def _is_complete(self) -> bool:
        is_finished = self._tap.done or self._tap.finished >= self._call.purse.n
        return is_finished and self._tap.finish_reason != "error"

    async def _pump(self) -> None:
        """Events out until the provider is done. Raises `UpstreamFault` where it ends without having finished."""
        events: list[bytes] | None = self._begun.events
        while events is not None:
            await self._forward(events)
            if self._tap.done:
                return
            events = await self._read()
        await self._forward(self._begun.last_events())
        if not self._is_complete:
            raise UpstreamFault(FaultKind.CUT, "upstream_cut", "the provider's answer broke off before its end")

    async def _forward(self, events: list[bytes]) -> None:
        """Send events on, without usage nobody asked for, without what is malformed, and without `[DONE]`."""
        out: list[bytes] = []
        try:
            for data in events:
                if data == DONE:
                    if self._splice is not None and self._splice.end():
                        raise Mismatch("the second answer ended without a reason")
                    self._tap.done = True
                    break
                kept = self._kept(data)
                if kept is not None:
                    out.append(kept)
        finally:
            if self._operations is not None:
                self._time_chunks(self._operations)
            # Also before a fault is raised: what came before it is good.
            if out and not self._call.record.client_left:
                self._remember(out)
                self._call.trace.answers(out)
                await self._write(b"".join(map(frame, out)))
        self._check_money()

    def _time_chunks(self, operations: Operations) -> None:
        """Tell how long the chunks that have just come were waited for. A stream's first has a metric of its own."""
        tap, told = self._tap, self._told_chunks
        if tap.content_events > told:
            count = tap.content_events - max(told, 1)
            if count:
                waited_s = self._came_s - self._chunk_s if told else 0.0
                operations.chunks_came(self._begun.target.ref, tap.model or "", count, waited_s)
            self._told_chunks, self._chunk_s = tap.content_events, self._came_s

    def _check_money(self) -> None:
        """Raise `UpstreamFault` where the provider goes on beyond what was held, or the money was taken back."""
        purse, tap = self._call.purse, self._tap
        if self._is_complete:
            return
        limit_tokens = purse.max_tokens * purse.n
        if is_over(events=tap.content_events, content_bytes=tap.content_bytes, limit_tokens=limit_tokens):
            message = "cut off: the provider went on beyond max_tokens"
            raise UpstreamFault(FaultKind.OVERRUN, "budget_exceeded", message)
        reason = purse.why_to_stop()
        if reason:
            raise UpstreamFault(FaultKind.OVERRUN, "spending_stopped", f"cut off: {reason}")

    def _kept(self, data: bytes) -> bytes | None:
        """What of an event goes out. Raises `UpstreamFault` where it tells of an error."""
        tap = self._tap
        answer = tap.look(data)
        if answer is None:
            if tap.malformed > MAX_MALFORMED:
                raise UpstreamFault(FaultKind.CUT, "upstream_cut", "the provider's stream is malformed")
            return None
        if tap.error is not None:
            raise error_in_answer(self._begun.exchange, tap.error)
        if tap.finish_reason == "error":
            raise UpstreamFault(FaultKind.SERVER, "upstream_error", "the provider ended with finish_reason error")
        if not (answer.choices or self._wants_usage or tap.usage is None):
            return None
        return data if self._splice is None else respliced(data, self._splice, self._stream_id)

    def _remember(self, out: list[bytes]) -> None:
        if self._sent is not None:
            self._sent += out
            self._sent_bytes += sum(map(len, out))
            if self._sent_bytes > MAX_DELIVERED_BYTES:
                self._sent = None

    async def _read_out(self) -> None:
        """The end of a stream that is done, by which its connection can be used again. The client has all by now."""
        with suppress(TimeoutError, UpstreamFault):
            async with asyncio.timeout(READ_OUT_S):
                while await self._begun.next_events() is not None:
                    pass

    async def _read(self) -> list[bytes] | None:
        """The next events, within the stall limit and the call's deadline; the wait is not our overhead."""
        since_s = time.perf_counter()
        limits = self._begun.target.timeouts
        self._allow(GRACE_S if self._is_complete else min(limits.stall_s, self._call.left_s))
        try:
            events = await self._begun.next_events()
        finally:
            self._came_s = time.perf_counter()
            waited_s = self._came_s - since_s
            self._call.waited_s += waited_s
        self._check_rate(limits.min_events_per_s, len(events or ()), waited_s)
        return events

    def _check_rate(self, least_per_s: float, count: int, waited_s: float) -> None:
        """Raise `UpstreamFault` where a whole stretch of waiting for the provider went by below the least rate.

        The time in which a slow reader was waited for does not count: it is not the provider's.
        """
        self._window_events += count
        self._window_waited_s += waited_s
        if self._window_waited_s >= DRIP_WINDOW_S:
            if self._window_events < least_per_s * self._window_waited_s:
                raise UpstreamFault(FaultKind.DRIP, "upstream_timeout", "the provider's stream is too slow")
            self._window_waited_s, self._window_events = 0.0, 0

    async def _write(self, data: bytes) -> None:
        since_s = time.perf_counter()
        if self._call.record.first_chunk_ms is None:
            self._call.record.first_chunk_ms = round((since_s - self._call.started_s) * 1000, 3)
        if self._transport is None or self._transport.get_write_buffer_size() + len(data) > EASY_BYTES:
            self._allow(self._call.runtime.server.idle_timeout_s)
        self._waits_for_client = True
        try:
            await self._response.write(data)
        except ConnectionError:
            if self._call.left() is None:
                raise
        self._waits_for_client = False
        self._call.heard_s = time.perf_counter()

    def _allow(self, seconds: float) -> None:
        """Bound the wait that begins now. A timer that is right to a tenth is left as it is; a new one costs 2 µs."""
        when = asyncio.get_running_loop().time() + max(0.0, seconds)
        set_for = self._patience.when()
        if set_for is None or not 0 <= when - set_for <= seconds * 0.1:
            self._patience.reschedule(when)

    async def _end(self, error: GatewayError | None) -> None:
        """Record, and only then say how it ended."""
        call, tap = self._call, self._tap
        if error is None:
            call.answered(
                tap.model or "", tap.finish_reason or "", tap.usage,
                content_bytes=tap.content_bytes, content_events=tap.content_events,
            )  # fmt: skip
        if call.record.client_left:
            call.finish()
            return
        try:
            call.finish(error)
            await call.runtime.journal.flushed()
        except Refused as refused:
            error = refused
        last = frame(error.encode()) if error is not None else _closing_comment(call) + DONE_FRAME
        if isinstance(error, UpstreamFault) and error.kind is FaultKind.OVERRUN:
            last = _cut_short(call) + last
        try:
            async with asyncio.timeout(call.runtime.server.idle_timeout_s):
                await self._response.write(last)
                await self._response.write_eof()
        except TimeoutError:
            call.record.client_left = True


def _cut_short(call: OpenCall) -> bytes:
    """The chunk that says of every choice that it ends for its length, as the API has it."""
    choices = [{"index": index, "delta": {}, "finish_reason": "length"} for index in range(call.purse.n)]
    chunk = {
        "id": call.record.id,
        "object": "chat.completion.chunk",
        "created": call.record.at_ms // 1000,
        "model": call.record.model_sent,
        "choices": choices,
    }
    return frame(msgspec.json.encode(chunk))


def _closing_comment(call: OpenCall) -> bytes:
    """What became known after the headers had left, as a comment that every SSE reader skips."""
    told = " ".join(f"{name}={value}" for name, value in call.closing_headers().items())
    return f": {told}\n".encode()
