"""Step 6, relay: the stream's events to the client as they come, and an end that is true.

`[DONE]` goes out only when the provider finished and the record is in the journal; a stream that breaks off ends in an
error event instead, which the SDKs raise. A slow reader holds the provider back, it never fills our memory; one that
reads nothing for `server.idle_timeout_s` counts as gone.
"""

import asyncio
import time
from contextlib import suppress

from aiohttp import web

from gateway.domain.errors import FaultKind, GatewayError, Refused, UpstreamFault
from gateway.domain.sse import DONE, DONE_FRAME, Tap, frame
from gateway.edge.attempt import Begun, stream_error
from gateway.edge.open_call import OpenCall

# After the last finish_reason only usage and `[DONE]` can come; a provider that forgets them is not waited for.
GRACE_S = 2.0
# Less than this unsent does not make a write wait, so no timer is set for it.
EASY_BYTES = 32 * 2**10
# What follows `[DONE]` is an empty chunk, which comes at once if it comes at all.
READ_OUT_S = 0.25


class Relay:
    """One stream on its way out."""

    def __init__(
        self,
        call: OpenCall,
        begun: Begun,
        response: web.StreamResponse,
        transport: asyncio.Transport | None,
        *,
        wants_usage: bool,
        n: int,
    ) -> None:
        self._call = call
        self._begun = begun
        self._response = response
        self._transport = transport
        self._wants_usage = wants_usage
        self._n = n
        self._tap = Tap()
        self._waits_for_client = False
        self._patience = asyncio.timeout(None)

    @property
    def _is_complete(self) -> bool:
        is_finished = self._tap.done or self._tap.finished >= self._n
        return is_finished and self._tap.finish_reason != "error"

    async def run(self) -> None:
        """Relay to the end. What goes wrong at the provider becomes the stream's last event."""
        error: GatewayError | None = None
        try:
            async with self._patience:
                await self._pump()
        except TimeoutError:
            if self._waits_for_client:
                self._call.record.client_left = True
                return
            error = UpstreamFault(FaultKind.TIMEOUT, "upstream_timeout", "the provider's stream stalled")
        except UpstreamFault as fault:
            error = fault
        if isinstance(error, UpstreamFault):
            # What follows the last finish_reason is not part of the answer, so neither is its absence.
            if self._is_complete:
                error = None
            else:
                self._call.failed(error)
        await self._end(error)
        if self._tap.done:
            await self._read_out()

    async def _pump(self) -> None:
        """Events out until the provider is done. Raises `UpstreamFault` where it ends without having finished."""
        events: list[bytes] | None = self._begun.events
        while events is not None:
            await self._forward(events)
            if self._tap.done:
                return
            events = await self._read()
        await self._forward(self._begun.splitter.end())
        if not self._is_complete:
            raise UpstreamFault(FaultKind.CUT, "upstream_cut", "the provider's answer broke off before its end")

    async def _forward(self, events: list[bytes]) -> None:
        """Send events on: in the client's dialect, without usage nobody asked for, and without `[DONE]`."""
        out: list[bytes] = []
        try:
            for data in events:
                if data == DONE:
                    self._tap.done = True
                    break
                rewrite = self._begun.dialect.rewrite_chunk
                pieces = rewrite(data) if rewrite is not None else (data,)
                out.extend(frame(piece) for piece in pieces if self._keeps(piece))
        finally:
            # Also before a fault is raised: what came before it is good.
            if out:
                await self._write(b"".join(out))

    async def _read_out(self) -> None:
        """The end of a stream that is done, by which its connection can be used again. The client has all by now."""
        with suppress(TimeoutError, UpstreamFault):
            async with asyncio.timeout(READ_OUT_S):
                while await self._begun.next_events() is not None:
                    pass

    def _keeps(self, data: bytes) -> bool:
        """Look at an event; whether it goes out. Raises `UpstreamFault` where it tells of an error."""
        answer = self._tap.look(data)
        if self._tap.error is not None:
            raise stream_error(self._begun.exchange, self._tap.error)
        if self._tap.finish_reason == "error":
            raise UpstreamFault(FaultKind.SERVER, "upstream_error", "the provider ended with finish_reason error")
        return bool(answer.choices) or self._wants_usage or self._tap.usage is None

    async def _read(self) -> list[bytes] | None:
        """The next events, within the stall limit and the call's deadline; the wait is not our overhead."""
        since_s = time.perf_counter()
        self._allow(GRACE_S if self._is_complete else min(self._begun.stall_s, self._call.left_s))
        try:
            return await self._begun.next_events()
        finally:
            self._call.waited_s += time.perf_counter() - since_s

    async def _write(self, data: bytes) -> None:
        since_s = time.perf_counter()
        if self._call.record.first_chunk_ms is None:
            self._call.record.first_chunk_ms = round((since_s - self._call.started_s) * 1000, 3)
        if self._transport is None or self._transport.get_write_buffer_size() + len(data) > EASY_BYTES:
            self._allow(self._call.runtime.server.idle_timeout_s)
        self._waits_for_client = True
        await self._response.write(data)
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
            call.answered(tap.model or "", tap.finish_reason or "", tap.usage)
        try:
            call.finish(error)
        except Refused as refused:
            error = refused
        last = frame(error.encode()) if error is not None else _closing_comment(call) + DONE_FRAME
        try:
            async with asyncio.timeout(call.runtime.server.idle_timeout_s):
                await self._response.write(last)
                await self._response.write_eof()
        except TimeoutError:
            call.record.client_left = True


def _closing_comment(call: OpenCall) -> bytes:
    """What became known after the headers had left, as a comment that every SSE reader skips."""
    told = " ".join(f"{name}={value}" for name, value in call.closing_headers().items())
    return f": {told}\n".encode()
