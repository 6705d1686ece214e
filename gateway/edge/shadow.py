"""Shadow mode: a share of the calls that were answered is sent once more, to the other variant, for nobody to wait for.

Its answer is read, booked and recorded, and goes to no caller. A shadow call has no retries and no fallback, takes its
money from the cap of its own, and nothing that judges models or calls hears of it. The invariant: it begins when the
last byte of the real answer has left our hands, and whatever becomes of it, no caller can tell.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import msgspec
from aiohttp import web

from gateway.decide.fill import fill
from gateway.decide.plan import AgentPlan
from gateway.decide.targets import Target
from gateway.domain.errors import GatewayError, Refused, UpstreamFault
from gateway.domain.shadow_policy import SHADOW
from gateway.domain.wire import ChatBody
from gateway.edge.attempt import Whole, attempt, request_body
from gateway.edge.open_call import OpenCall
from gateway.edge.purse import Purse
from gateway.telemetry.logs import IN_CALL

log = logging.getLogger("gateway.shadow")

# What became of one: answered; not; not begun, as too many were under way, its model was shut or we drain; no money.
Result = Literal["ok", "failed", "dropped", "refused"]
# Who chose the arm of a call that may have a shadow. A forced arm is an experiment of the caller's own.
_CHOSEN_BY = frozenset({"experiment", "policy", "no user"})
# A shadow's answer is read whole, so that no stream is asked for.
_OF_STREAMS = frozenset({"stream", "stream_options"})


class Reply(web.Response):
    """A plain answer, and what is to happen once it has left."""

    def __init__(self, then: Callable[[], None], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._then = then

    async def write_eof(self, data: bytes = b"") -> None:
        """Send the last byte, and only then go on."""
        await super().write_eof(data)
        self._then()


class ShadowCall(OpenCall):
    """The books of a shadow call. Metrics, breakers and traces hear nothing of it; journal and ledger hear it all."""

    def __init__(self, of: OpenCall, agent: AgentPlan, target: Target) -> None:
        super().__init__(of.runtime, f"{of.record.id}-{SHADOW}")
        self._agent, self._wanted = agent, target
        self._wanted_ref = target.ref
        # Neither waits for what other shadows hold nor is shortened: a clamped answer compares with nothing.
        budget = msgspec.structs.replace(self.plan.budget, when_short="refuse", wait_ms=0)
        self.plan = self.plan._replace(budget=budget)
        self.purse = Purse(self.runtime, self.plan, self.record.id)
        # The rules under which it was begun, its own cap among them.
        self._rules_version = self.runtime.books.version
        record, real = self.record, of.record
        record.shadow_of, record.operation = real.id, SHADOW
        record.agent, record.agent_from, record.rule = real.agent, real.agent_from, real.rule
        record.user, record.key, record.model_asked = real.user, real.key, real.model_asked
        record.variant = "baseline" if real.variant == "finetuned" else "finetuned"
        record.variant_from = SHADOW

    async def ask(self, body: ChatBody) -> None:
        """Send what `body` asks for, plainly, and book the answer. Raises `Refused`, `UpstreamFault`."""
        target = self._wanted
        plain = ChatBody({name: value for name, value in body.fields.items() if name not in _OF_STREAMS})
        # Its own cap counts dollars, whatever those of callers count.
        filled = fill(plain, self._agent.defaults, self.plan.limits, is_capped=True)
        self.purse.fill(filled.fields, filled.max_tokens, plain.n)
        self.start_clock(target.timeouts.total_s)
        await self.reserve(target)
        if self.runtime.books.version != self._rules_version:
            # A reload may have taken its cap away, and then this hold would be in none.
            self.purse.void()
            raise Refused("budget_exceeded", "the caps changed while the shadow call waited for its own")
        payload, self.dropped = request_body(target, filled, plain, stream_usage=False)
        upstream = self.upstreams[target.upstream]
        found = await attempt(self, upstream, target, payload, self.trace_headers(target), stream=False)
        if not isinstance(found, Whole):
            raise AssertionError("BUG: a stream where none was asked for")
        self.answered(found.model, found.finish_reason, found.usage, content_bytes=len(found.body))

    def close(self, error: GatewayError | None) -> None:
        """Close the books. One that never had a hold leaves no record: a cap that is used up would fill the journal."""
        try:
            if self.record.attempts:
                self.finish(error)
            else:
                self.purse.close(None)
        except Refused:
            log.exception("a shadow call could not be recorded")

    def _tell_fault(self, fault: UpstreamFault) -> None:
        pass

    def _tell(self) -> None:
        record = self.record
        log.log(
            logging.INFO if record.error else logging.DEBUG,
            "shadow call",
            extra={"fields": {"model": record.model_sent, "error": record.error, "shadow_of": record.shadow_of}},
        )


def plain_reply(call: OpenCall, asked: ChatBody, **kwargs: Any) -> web.Response:
    """A plain answer as `web.Response` takes it, and behind it the call's shadow. Costs nothing where there is none."""
    is_on = call.runtime.plan.shadow.is_on
    return Reply(partial(follow, call, asked), **kwargs) if is_on else web.Response(**kwargs)


def follow(call: OpenCall, body: ChatBody) -> None:
    """Begin the shadow of a call whose answer has left, if it is to have one. Waits for nothing and raises nothing."""
    runtime = call.runtime
    # As it is now, together with the caps that are in force now: the call may have begun under another.
    plan, record = runtime.plan, call.record
    shadow = plan.shadow
    if not shadow.is_on or not _is_answered(call):
        return
    agent = plan.agents.get(record.agent)
    if agent is None or not shadow.covers(agent.name):
        return
    own, other = agent.baseline[0], agent.finetuned[0]
    if record.variant == "finetuned":
        own, other = other, own
    if own.ref == other.ref or runtime.dice.random() * 100 >= shadow.percent:
        return
    shadowed = ShadowCall(call, agent, other)
    breaker = runtime.standing.known(other.upstream, other.ref)
    recent = breaker.recent(time.monotonic(), 0.0) if breaker is not None else None
    # A model that calls leave alone gets no rest from shadows otherwise.
    is_shut = recent is not None and recent.is_shut
    if runtime.is_draining or is_shut or len(runtime.shadows) >= shadow.max_in_flight:
        _count(shadowed, "dropped")
        return
    task = asyncio.create_task(_run(shadowed, body))
    # A drain gives it what is left of its time.
    for tasks in (runtime.shadows, runtime.lingering):
        tasks.add(task)
        task.add_done_callback(tasks.discard)


def _is_answered(call: OpenCall) -> bool:
    record = call.record
    is_whole = record.status == 200 and not record.error and not record.client_left
    return is_whole and record.variant_from in _CHOSEN_BY


async def _run(call: ShadowCall, body: ChatBody) -> None:
    """One shadow call from its hold to its record."""
    IN_CALL.set(call.record)
    result: Result = "failed"
    error: GatewayError | None = None
    try:
        await call.ask(body)
        result = "ok"
    except Refused as refused:
        error, result = refused, "refused"
    except UpstreamFault as fault:
        call.failed(fault)
        error = fault
    except asyncio.CancelledError:
        error = Refused("draining", "cut off by the gateway's shutdown")
        raise
    except Exception:
        log.exception("bug in a shadow call")
        error = Refused("internal_error", "internal error")
    finally:
        call.close(error)
        _count(call, result)


def _count(call: ShadowCall, result: Result) -> None:
    record = call.record
    call.runtime.observer.shadowed(record.agent, record.variant or "", result)
