"""The books of one call while it is open: its record, its hold, its clocks. Steps reserve, settle and record.

Plain functions, so neither cancellation nor another call can come between a check and what follows from it. The
invariant: `finish` settles and records once, however often and from wherever it is called.
"""

import asyncio
import logging
import time
from collections.abc import Mapping
from contextlib import suppress

from gateway.decide.fallback import REMEDIES
from gateway.decide.fill import Filled
from gateway.decide.identify import Caller, Identity
from gateway.decide.plan import Assignment
from gateway.decide.targets import Target
from gateway.domain.call import Attempt, CallRecord
from gateway.domain.errors import FaultKind, GatewayError, Refused, UpstreamFault
from gateway.domain.ledger import Dimensions
from gateway.domain.money import Usage, format_usd
from gateway.domain.policy import OnCut
from gateway.domain.sse import Tap
from gateway.domain.wire import ChatBody
from gateway.edge.call_trace import CallTrace
from gateway.edge.purse import Ended, Purse
from gateway.edge.replies import header_text
from gateway.edge.runtime import Runtime

log = logging.getLogger("gateway.call")
# Of the time an SDK waits, we use this much, so that our clear error gets there before it gives up.
PATIENCE_SHARE = 0.9


class OpenCall:
    """One call between its first and its last byte."""

    def __init__(self, runtime: Runtime, request_id: str) -> None:
        self.runtime = runtime
        # A reload replaces both; a call keeps the pair it began with.
        self.plan = runtime.plan
        self.upstreams = runtime.upstreams
        self.started_s = time.perf_counter()
        self.deadline_s = float("inf")
        # When the caller last got something of us; a plain call hears nothing until its end.
        self.heard_s = self.started_s
        self._patience_s = float("inf")
        self.waited_s = 0.0
        self.record = CallRecord(id=request_id, at_ms=time.time_ns() // 1_000_000, env=self.plan.env)
        self.dropped: list[str] = []
        self.lowered: tuple[str, ...] = ()
        self._why = ""
        self.purse = Purse(runtime, self.plan, request_id)
        self._wanted_ref = ""
        self.trace = CallTrace(runtime.tracing)
        # How a stream that breaks off goes on.
        self.on_cut: OnCut = "error"
        self._buffered_bytes = 0
        self._target: Target | None = None
        self._attempt: Attempt | None = None
        # Ends the journey where its caller has left and the answer takes too long.
        self.ending: asyncio.TimerHandle | None = None
        self._is_finished = False

    # --- What becomes known of it ------------------------------------------------------------------------------------

    def identified(self, who: Identity, caller: Caller, body: ChatBody) -> None:
        """Note who calls, and until when they wait."""
        record = self.record
        record.agent, record.agent_from, record.rule = who.agent.name, who.agent_from, who.rule
        record.user = self.plan.kept_user(who.user)
        record.key, record.operation = caller.key, who.operation
        record.stream, record.model_asked = body.stream, body.model[:256]
        self._why = who.why
        if who.timeout_s is not None:
            self.deadline_s = self.started_s + who.timeout_s
        if who.patience_s is not None:
            self._patience_s = who.patience_s * PATIENCE_SHARE

    def assigned(self, who: Identity, assignment: Assignment, filled: Filled, body: ChatBody) -> None:
        """Note the arm, and the most that this call can use."""
        record = self.record
        record.variant, record.bucket = assignment.variant, assignment.bucket
        record.variant_from = who.variant_from or assignment.variant_from
        record.share_bps = who.agent.share_bps if self.plan.is_experiment else None
        if assignment.variant_from == "experiment":
            record.experiment, record.stage = who.agent.experiment, who.agent.stage
        self._wanted_ref = assignment.chain[0].ref
        self.on_cut = who.agent.on_cut
        self.lowered = filled.lowered
        self.purse.fill(filled.fields, filled.max_tokens, body.n)
        traces = self.plan.traces
        self.trace.asks(filled.fields, max_chars=traces.max_chars if self.plan.shows_prompts(record.agent) else 0)

    def hold_bytes(self, size: int) -> None:
        """Make the body's share of what the gateway holds of all bodies `size`; 0 gives it back."""
        self.runtime.buffered_bytes += size - self._buffered_bytes
        self._buffered_bytes = size

    def start_clock(self, total_s: float) -> None:
        """Bound the whole call by what an upstream allows in all, from the call's start; the tightest bound holds."""
        self.deadline_s = min(self.deadline_s, self.started_s + total_s)

    @property
    def is_finished(self) -> bool:
        """Whether the books of this call are closed."""
        return self._is_finished

    @property
    def left_s(self) -> float:
        """Seconds until the call's deadline, or until the caller has heard nothing for as long as it waits."""
        return min(self.deadline_s, self.heard_s + self._patience_s) - time.perf_counter()

    # --- Step 4: reserve ---------------------------------------------------------------------------------------------

    def within_budget(self, assignment: Assignment) -> Assignment:
        """The same arm, with a cheaper model in front where a cap's share from which to use it is reached."""
        runtime, chain = self.runtime, assignment.chain
        rule = runtime.books.cheaper(self._on(chain[0]), now_s=time.time())
        cheaper = self.plan.targets.find(rule.use) if rule is not None else None
        if rule is None or cheaper is None or cheaper.ref == chain[0].ref:
            return assignment
        self.record.switched_by = rule.label
        self._wanted_ref = cheaper.ref
        others = [target for target in chain if target.ref != cheaper.ref]
        return assignment._replace(chain=(cheaper, *others) if len(chain) > 1 else (cheaper,))

    async def reserve(self, target: Target) -> None:
        """Begin an attempt: hold the most it can cost. Raises `Refused`; then nothing is held."""
        before_s = self.purse.waited_s
        try:
            await self.purse.reserve(target, self._on(target), left_s=self.left_s)
        finally:
            self.waited_s += self.purse.waited_s - before_s
        self._target = target
        started_ms = round((time.perf_counter() - self.started_s) * 1000)
        self._attempt = Attempt(ref=target.ref, started_ms=started_ms, span_id=self.trace.span_id())
        self.record.attempts.append(self._attempt)
        self.record.model_sent = target.ref

    def trace_headers(self, target: Target) -> dict[str, str]:
        """What the provider of the attempt under way is told of the trace."""
        return self.trace.sent(self._attempt.span_id if self._attempt is not None else "", target.trace_context)

    def _on(self, target: Target) -> Dimensions:
        record = self.record
        variant = record.variant or ""
        return Dimensions(record.agent, record.key, record.user, record.operation, target.ref, variant)

    # --- Step 7: settle ----------------------------------------------------------------------------------------------

    def failed(self, fault: UpstreamFault, tap: Tap | None = None) -> None:
        """Close the attempt that failed: void where the provider cannot bill it, in doubt where it may.

        Whatever the fault, an answer that had begun may be billed; `tap` has seen it.
        """
        purse, attempt = self.purse, self._attempt
        if self._target is None or attempt is None:
            return
        self._tell_fault(fault)
        usage = tap.usage if tap is not None else None
        if usage is not None and usage.is_sane:
            ended = purse.post(usage)
        elif fault.kind is FaultKind.OVERRUN and tap is not None:
            ended = purse.post_estimate(tap.content_bytes, tap.content_events, ran_over=True)
        elif fault.kind is FaultKind.LEFT:
            ended = purse.post_bound()
        elif REMEDIES[fault.kind].may_be_billed or (tap is not None and tap.content_events):
            ended = purse.doubt()
        else:
            ended = purse.void()
        self._ended(ended)
        # At once: what this attempt gives back another may hold, and then a crash must not find it held twice. What the
        # disk does not take now goes with the next lines.
        with suppress(Refused):
            purse.write()
        attempt.fault, attempt.status = fault.kind, fault.status
        self._attempt = None

    def answered(
        self, model: str, finish_reason: str, usage: Usage | None, *, content_bytes: int, content_events: int = 0
    ) -> None:
        """Close the attempt that answered.

        Exact where the usage can be believed; the whole hold where it cannot; an estimate upwards where there is none.
        """
        record, purse, attempt = self.record, self.purse, self._attempt
        record.status = 200
        record.model_answered, record.finish_reason = model[:256], finish_reason[:64]
        record.is_fallback = record.model_sent != self._wanted_ref
        if attempt is None:
            return
        if usage is None:
            self._ended(purse.post_estimate(content_bytes, content_events))
        elif usage.is_sane:
            record.usage = usage
            self._ended(purse.post(usage))
        else:
            self.runtime.observer.usage_disbelieved += 1
            self._ended(purse.post_bound())
        attempt.status = 200

    def _ended(self, ended: Ended | None) -> None:
        attempt = self._attempt
        if ended is None or attempt is None:
            return
        attempt.cost_nusd, attempt.tokens = ended.amounts.nusd, ended.amounts.tokens
        attempt.is_in_doubt = ended.is_in_doubt
        if not ended.is_in_doubt:
            self.record.cost_nusd += ended.amounts.nusd
        attempt.duration_ms = round((time.perf_counter() - self.started_s) * 1000 - attempt.started_ms, 3)
        self.record.cost_basis = ended.basis

    # --- Step 8: record ----------------------------------------------------------------------------------------------

    def left(self) -> float | None:
        """The caller has gone. For how many seconds an answer under way is read on; None: it is not."""
        self.record.client_left = True
        budget = self.plan.budget
        return budget.left_s if budget.when_left == "drain" and self.purse.is_open else None

    def finish(self, error: GatewayError | None = None) -> None:
        """Settle what is open, write the record, count. Once; raises `Refused` where the journal does not take it."""
        if self._is_finished:
            return
        self._is_finished = True
        if self.ending is not None:
            self.ending.cancel()
        record = self.record
        if error is not None:
            record.status, record.error = error.status, error.code
        # Where nothing closed the attempt: the caller left, and then the bound is booked; or a bug or our own shutdown
        # ended the journey, and then nobody knows.
        self._ended(self.purse.post_bound() if record.client_left else self.purse.doubt())
        elapsed_s = time.perf_counter() - self.started_s
        record.duration_ms = round(elapsed_s * 1000, 3)
        record.overhead_ms = round((elapsed_s - self.waited_s) * 1000, 3)
        # The books first: nothing that is told of a call may stand between it and them.
        try:
            self.purse.close(record if record.agent else None)
        finally:
            self._tell()

    def _tell_fault(self, fault: UpstreamFault) -> None:
        if self._target is not None:
            self.runtime.observer.fault(self._target.upstream, fault.kind)

    def _tell(self) -> None:
        """Tell all who count and show calls. Whatever is wrong there, the call's books are closed."""
        record = self.record
        try:
            if not record.attempts:
                self.runtime.observer.refused(record.error)
            else:
                self.runtime.observer.call_ended(record)
            self.trace.end(record)
            self._log()
        except Exception:
            log.exception("bug: a call could not be told of", extra={"fields": {"call_id": record.id}})

    def _log(self) -> None:
        record = self.record
        level = logging.INFO if record.error or record.client_left else logging.DEBUG
        if log.isEnabledFor(level):
            fields = {
                "agent": record.agent,
                "variant": record.variant,
                "model": record.model_sent,
                "status": record.status,
                "error": record.error,
                "attempts": len(record.attempts),
                "ms": record.duration_ms,
                "cost_usd": format_usd(record.cost_nusd),
            }
            if record.client_left:
                fields["client_left"] = True
            log.log(level, "call", extra={"fields": fields})

    # --- Headers -----------------------------------------------------------------------------------------------------

    def headers(self) -> dict[str, str]:
        """What the caller is told of the call, as far as it is known when the headers leave."""
        record = self.record
        found = {"x-request-id": record.id}
        if record.span_id:
            found["x-gateway-trace-id"] = record.trace_id
        if record.agent:
            found["x-gateway-agent"] = record.agent
            found["x-gateway-route"] = header_text(f"{record.rule}: {self._why}" if record.rule else self._why)
        if record.variant is not None:
            found["x-gateway-variant"] = record.variant
        if record.bucket is not None:
            found["x-gateway-bucket"] = str(record.bucket)
        if record.attempts:
            found["x-gateway-model"] = header_text(record.model_sent)
            found["x-gateway-attempts"] = str(len(record.attempts))
            if record.model_sent != self._wanted_ref:
                found["x-gateway-fallback"] = header_text(self._wanted_ref)
        if self.lowered:
            found["x-gateway-fields-lowered"] = ", ".join(self.lowered)
        if self.purse.is_clamped or any(name.startswith("max_") for name in self.lowered):
            found["x-gateway-max-tokens-clamped"] = str(self.purse.max_tokens)
        if record.switched_by:
            found["x-gateway-budget-switch"] = header_text(record.switched_by)
        if self.dropped:
            found["x-gateway-fields-dropped"] = header_text(", ".join(self.dropped))
        return found

    def closing_headers(self) -> Mapping[str, str]:
        """What is known only when the call has ended: its cost, and our own share of the time."""
        elapsed_s = time.perf_counter() - self.started_s
        found = {
            "x-gateway-model": header_text(self.record.model_sent),
            "x-gateway-attempts": str(len(self.record.attempts)),
            "x-gateway-cost-usd": format_usd(self.record.cost_nusd),
            "x-gateway-overhead-ms": f"{(elapsed_s - self.waited_s) * 1000:.3f}",
        }
        remaining = self.purse.remaining_nusd()
        if remaining is not None:
            found["x-gateway-budget-remaining-usd"] = format_usd(max(0, remaining))
        return found
