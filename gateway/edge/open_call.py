"""The books of one call while it is open: its record, its hold, its clocks. Steps reserve, settle and record.

Plain functions, so neither cancellation nor another call can come between a check and what follows from it. The
invariant: `finish` settles and records once, however often and from wherever it is called.
"""

import logging
import time
from collections.abc import Mapping

from gateway.decide.budget import Amounts, Hold, bound_tokens
from gateway.decide.fallback import REMEDIES
from gateway.decide.fill import Filled
from gateway.decide.identify import Caller, Identity
from gateway.decide.plan import Assignment
from gateway.decide.targets import Target
from gateway.domain.call import Attempt, CallRecord, CostBasis
from gateway.domain.errors import GatewayError, Refused, UpstreamFault
from gateway.domain.money import Usage, cost_nusd, format_usd
from gateway.domain.policy import OnCut
from gateway.domain.wire import ChatBody
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
        self._max_tokens = 0
        self._requests = 0
        self._wanted_ref = ""
        # What the policy and the body say of streams: how one that breaks off goes on, and how many choices there are.
        self.on_cut: OnCut = "error"
        self.n = 1
        self._buffered_bytes = 0
        self._bound_usage = Usage()
        self._dimensions: dict[str, str] = {}
        self._hold: Hold | None = None
        self._target: Target | None = None
        self._attempt: Attempt | None = None
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
        self._wanted_ref = assignment.chain[0].ref
        self.on_cut, self.n = who.agent.on_cut, body.n
        self.lowered = filled.lowered
        self._max_tokens = filled.max_tokens
        size = sum(len(bytes(value)) for value in filled.fields.values())
        prompt, completion = bound_tokens(
            request_bytes=size, messages=body.message_count, max_tokens=filled.max_tokens, n=body.n
        )
        self._bound_usage = Usage(prompt_tokens=prompt, completion_tokens=completion)
        self._dimensions = {
            "agent": record.agent,
            "key": record.key,
            "user": record.user,
            "operation": record.operation,
        }

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

    def reserve(self, target: Target) -> None:
        """Hold the most an attempt at `target` can cost, in every account. Raises `Refused`."""
        bound = self._bound_usage
        nusd = cost_nusd(target.price, bound) if target.price is not None else 0
        # A call is one request, however many tries it takes.
        self._requests = 0 if self.record.attempts else 1
        amounts = Amounts(nusd, self._requests, bound.prompt_tokens + bound.completion_tokens)
        now_s = time.time()
        dimensions = {**self._dimensions, "model": target.ref}
        found = self.runtime.books.reserve(dimensions, amounts, is_priced=target.price is not None, now_s=now_s)
        if not isinstance(found, Hold):
            if found.needs_price:
                message = f"no price is known for {target.ref}, and a cap applies: {found.cap}"
                raise Refused("model_not_priced", message, headers={"x-should-retry": "false"})
            if found.is_only_held:
                message = f"what is left is held by calls in flight: {found.cap}"
                raise Refused("budget_reserved", message, headers={"retry-after-ms": "500", "x-should-retry": "true"})
            headers = {"x-should-retry": "false"}
            if found.reset_s is not None:
                headers["Retry-After"] = str(max(1, round(found.reset_s - now_s)))
            raise Refused("budget_exceeded", f"the cap is used up: {found.cap}", headers=headers)
        self._hold, self._target = found, target
        self._attempt = Attempt(ref=target.ref, started_ms=round((time.perf_counter() - self.started_s) * 1000))
        self.record.attempts.append(self._attempt)
        self.record.model_sent = target.ref

    # --- Step 7: settle ----------------------------------------------------------------------------------------------

    def failed(self, fault: UpstreamFault) -> None:
        """Close the attempt that failed: void where the provider cannot bill it, the whole bound where it may."""
        if self._target is not None:
            self.runtime.observer.fault(self._target.upstream, fault.kind)
        self._settle(None, may_be_billed=REMEDIES[fault.kind].may_be_billed)
        if self._attempt is not None:
            self._attempt.fault, self._attempt.status = fault.kind, fault.status
            self._attempt = None

    def answered(self, model: str, finish_reason: str, usage: Usage | None) -> None:
        """Close the attempt that answered: exact cost where the usage can be believed, the bound otherwise."""
        record = self.record
        record.status = 200
        record.model_answered, record.finish_reason = model[:256], finish_reason[:64]
        record.is_fallback = record.model_sent != self._wanted_ref
        record.usage = usage if usage is not None and usage.is_sane else None
        attempt = self._attempt
        self._settle(record.usage, may_be_billed=True)
        if attempt is not None:
            attempt.status = 200
            record.cost_nusd = attempt.cost_nusd

    def _settle(self, usage: Usage | None, *, may_be_billed: bool) -> None:
        hold, target, attempt = self._hold, self._target, self._attempt
        if hold is None or target is None or attempt is None:
            return
        self._hold = None
        basis: CostBasis = "none"
        amounts = Amounts(requests=self._requests)
        if usage is not None or may_be_billed:
            basis = "exact" if usage is not None else "bound"
            used = usage if usage is not None else self._bound_usage
            nusd = cost_nusd(target.price, used) if target.price is not None else 0
            amounts = Amounts(nusd, self._requests, used.prompt_tokens + used.completion_tokens)
        self.runtime.books.settle(hold, amounts)
        attempt.cost_nusd, attempt.tokens = amounts.nusd, amounts.tokens
        attempt.duration_ms = round((time.perf_counter() - self.started_s) * 1000 - attempt.started_ms, 3)
        self.record.cost_basis = basis

    # --- Step 8: record ----------------------------------------------------------------------------------------------

    def finish(self, error: GatewayError | None = None) -> None:
        """Settle what is open, write the record, count. Once; raises `Refused` where the journal does not take it."""
        if self._is_finished:
            return
        self._is_finished = True
        record = self.record
        if error is not None:
            record.status, record.error = error.status, error.code
        # Nothing closed the attempt: the caller left, or a bug ended the journey. It may be billed.
        self._settle(None, may_be_billed=True)
        elapsed_s = time.perf_counter() - self.started_s
        record.duration_ms = round(elapsed_s * 1000, 3)
        record.overhead_ms = round((elapsed_s - self.waited_s) * 1000, 3)
        if not record.attempts:
            self.runtime.observer.refused(record.error)
        else:
            self.runtime.observer.call_ended(record)
        if record.agent:
            self.runtime.journal.append(record)
        self._log()

    def _log(self) -> None:
        record = self.record
        level = logging.INFO if record.error or record.client_left else logging.DEBUG
        if log.isEnabledFor(level):
            fields = {
                "id": record.id,
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
            if self.lowered[0] != "temperature":
                found["x-gateway-max-tokens-clamped"] = str(self._max_tokens)
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
        dimensions = {**self._dimensions, "model": self.record.model_sent}
        remaining = self.runtime.books.remaining_nusd(dimensions, now_s=time.time())
        if remaining is not None:
            found["x-gateway-budget-remaining-usd"] = format_usd(max(0, remaining))
        return found
