"""One call's way down its chain: which model next, after which wait, and how a stream that broke off goes on.

What to do is decided in `decide/fallback.py`; what is known of each model, in `decide/standing.py`. Here it is carried
out. The invariant: every call that a breaker admitted is told to it as succeeded, failed or abandoned, exactly once.
"""

import asyncio
import time

from gateway.decide.breaker import Admission, Breaker, State
from gateway.decide.fallback import REMEDIES, Action, next_step
from gateway.decide.fill import Filled, limited
from gateway.decide.plan import Assignment
from gateway.decide.targets import Target
from gateway.domain.dialects import DIALECTS
from gateway.domain.errors import FaultKind, UpstreamFault
from gateway.domain.splice import Delivered, Splice
from gateway.domain.wire import ChatBody
from gateway.edge.attempt import Begun, Whole, attempt, request_body
from gateway.edge.open_call import OpenCall


class Failover:
    """A place in a chain, which only ever moves forward."""

    def __init__(self, call: OpenCall, assignment: Assignment, filled: Filled, body: ChatBody) -> None:
        self._call = call
        self._standing = call.runtime.standing
        self._chain = assignment.chain
        self._filled = filled
        self._body = body
        self._hold = body.stream and call.on_cut == "hold"
        self._index = 0
        # The breaker, and the way it admitted it, of the stream that is under way.
        self._begun: tuple[Breaker, Admission] | None = None
        # Tries at the model of `_index`, the next one included.
        self._tries = 1

    @property
    def has_next(self) -> bool:
        """Whether there is a further model that could take up a stream."""
        return self._index + 1 < len(self._chain)

    async def answer(self) -> Whole | Begun:
        """Down the chain until a model answers. Raises the last fault where none does."""
        last: UpstreamFault | None = None
        while True:
            found = self._next_admitted()
            if found is None:
                if last is not None:
                    raise self._told(last)
                # Every breaker is open and nobody was tried: they must not make an outage where there may be none.
                found = self._chain[0], Admission.ORDINARY
            try:
                return await self._try(*found)
            except UpstreamFault as fault:
                last = fault
                if not await self._go_on(fault):
                    raise self._told(fault) from fault

    async def resume(self, fault: UpstreamFault, delivered: Delivered) -> tuple[Begun, Splice] | None:
        """Another stream that takes up where one broke off with `fault`; None where nobody can."""
        while await self._go_on(fault):
            found = self._next_admitted()
            if found is None:
                return None
            target, admission = found
            try:
                if target.continues:
                    try:
                        begun = await self._stream(target, admission, delivered.text)
                        may_repeat = DIALECTS[target.kind].continuation["may_repeat"]
                        return begun, Splice(delivered.text if may_repeat else "", is_continued=True)
                    except UpstreamFault as refused:
                        if refused.kind is not FaultKind.REJECTED:
                            raise
                        # It takes no answer that has begun, which says nothing of the request itself.
                        admission = Admission.ORDINARY
                return await self._stream(target, admission, ""), Splice(delivered.text, is_continued=False)
            except UpstreamFault as further:
                fault = further
        return None

    def ended(self, fault: UpstreamFault | None) -> None:
        """Tell the breaker how the stream that had begun came to its end."""
        if self._begun is None:
            return
        (breaker, admission), self._begun = self._begun, None
        if fault is None:
            breaker.succeeded(admission, time.monotonic())
        elif REMEDIES[fault.kind].is_models_fault:
            breaker.failed(admission, time.monotonic())
        else:
            breaker.abandoned(admission)

    def left(self) -> None:
        """The stream that had begun ended without telling anything of its model: the client left, say."""
        if self._begun is not None:
            (breaker, admission), self._begun = self._begun, None
            breaker.abandoned(admission)

    async def _stream(self, target: Target, admission: Admission, begun_text: str) -> Begun:
        found = await self._try(target, admission, begun_text)
        if not isinstance(found, Begun):
            raise AssertionError("BUG: a plain answer to a stream")
        return found

    async def _try(self, target: Target, admission: Admission, begun_text: str = "") -> Whole | Begun:
        call, breaker = self._call, self._standing.breaker(target.upstream, target.ref)
        upstream = call.upstreams[target.upstream]
        is_settled = False
        try:
            call.start_clock(target.timeouts.total_s)
            await call.reserve(target)
            payload, call.dropped = request_body(
                target,
                limited(self._filled, call.purse.max_tokens),
                self._body,
                stream_usage=upstream.stream_usage,
                begun_text=begun_text,
            )
            if self._tries == 1:
                self._standing.budget(target.upstream).called(time.monotonic())
            headers = call.trace_headers(target)
            found = await attempt(call, upstream, target, payload, headers, stream=self._body.stream, hold=self._hold)
            is_settled = True
            if isinstance(found, Begun):
                # How a stream went is known at its end.
                self._begun = breaker, admission
            else:
                breaker.succeeded(admission, time.monotonic())
            return found
        except UpstreamFault as fault:
            call.failed(fault)
            if REMEDIES[fault.kind].is_models_fault:
                breaker.failed(admission, time.monotonic())
                is_settled = True
            raise
        finally:
            if not is_settled:
                breaker.abandoned(admission)

    async def _go_on(self, fault: UpstreamFault) -> bool:
        """Wait, or move to the next model, as the table says; False where the call ends with this fault."""
        if self._call.record.client_left:
            # An answer that has begun is read to its end for its usage; another is not begun for nobody.
            return False
        call, target = self._call, self._chain[self._index]
        budget = self._standing.budget(target.upstream)
        breaker = self._standing.breaker(target.upstream, target.ref)
        now_s = time.monotonic()
        step = next_step(
            fault.kind,
            retry_after_s=fault.retry_after_s,
            tries_here=self._tries,
            is_last_model=self._index + 1 >= len(self._chain),
            # A model whose breaker has opened meanwhile is not waited for.
            may_retry=budget.left(now_s) >= 1 and breaker.state is State.CLOSED,
            left_s=call.left_s,
            dice=call.runtime.dice.random(),
            limits=call.plan.retries,
        )
        match step.action:
            case Action.RETRY:
                budget.take(now_s)
                self._tries += 1
                call.runtime.observer.retried(target.upstream)
                await asyncio.sleep(step.after_s)
                call.waited_s += step.after_s
                return True
            case Action.NEXT_MODEL:
                return self._move_to(self._index + 1)
            case Action.LARGER_MODEL:
                further = range(self._index + 1, len(self._chain))
                return self._move_to(next((place for place in further if self._may_be_larger(place)), len(self._chain)))
            case Action.GIVE_UP:
                return False

    def _move_to(self, index: int) -> bool:
        if index >= len(self._chain):
            return False
        self._index, self._tries = index, 1
        return True

    def _may_be_larger(self, place: int) -> bool:
        """Whether the model at `place` takes a longer prompt than this one; what is not known may be."""
        here, there = self._chain[self._index].context_tokens, self._chain[place].context_tokens
        return here is None or there is None or there > here

    def _next_admitted(self) -> tuple[Target, Admission] | None:
        """The next model whose breaker lets a call through, from here on; None where none does."""
        for place in range(self._index, len(self._chain)):
            target = self._chain[place]
            admission = self._standing.breaker(target.upstream, target.ref).admit(time.monotonic())
            if admission is not None:
                if place != self._index:
                    self._index, self._tries = place, 1
                return target, admission
        return None

    def _told(self, fault: UpstreamFault) -> UpstreamFault:
        """The last fault, told with what was tried before it."""
        attempts = self._call.record.attempts
        if len(attempts) > 1:
            tried = "; ".join(f"{one.ref}: {one.fault}" for one in attempts)
            fault.message = f"{fault.message} (tried {tried})"
        return fault
