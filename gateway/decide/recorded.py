"""What a call's record tells of how it went: its end, what each attempt took, and the models it could not ask.

Only what can be read out of the record and the plan that was in force. The invariant: what the attempts took adds up
to what the ledger has of the call.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

from gateway.decide.plan import Plan
from gateway.domain.call import Attempt, CallRecord, Variant
from gateway.domain.ledger import Amounts, Dimensions

End = Literal["answered", "refused", "failed", "left"]
# Refusals for want of money, and all those that another policy may lift.
SHORT = frozenset({"budget_exceeded", "budget_reserved"})
LIFTED = SHORT | {"model_not_priced"}
# With these the gateway ended a call whatever its last attempt had come to.
_OWN = LIFTED | {"spending_stopped", "budget_unavailable", "draining", "journal_unavailable", "internal_error"}
_NONE: frozenset[str] = frozenset()


class Ending(NamedTuple):
    """How a call ends. `model` is the last one tried; `why` the cap or the error code of a refusal, or the fault.

    `cost_nusd` and `tokens` are those of all attempts, what is in doubt included.
    """

    variant: Variant | None
    model: str
    end: End
    why: str = ""
    cost_nusd: int = 0
    tokens: int = 0


class Route(NamedTuple):
    """The models there were for a call, best first, and those of them that it could not ask."""

    refs: tuple[str, ...]
    closed: frozenset[str]


def ending_of(record: CallRecord) -> Ending:
    """How it ended."""
    end, why = _end_of(record), ""
    if end == "failed":
        why = str(record.attempts[-1].fault)
    elif end == "refused":
        why = record.error
    cost_nusd = sum(attempt.cost_nusd for attempt in record.attempts)
    tokens = sum(attempt.tokens for attempt in record.attempts)
    return Ending(record.variant, record.model_sent, end, why, cost_nusd, tokens)


def taken(record: CallRecord) -> Iterator[tuple[Attempt, Amounts]]:
    """What each attempt took. A call is one request, however many tries it takes; one that was void was none."""
    requests = 1
    for attempt in record.attempts:
        if is_void(attempt):
            yield attempt, Amounts()
        else:
            yield attempt, Amounts(attempt.cost_nusd, requests, attempt.tokens)
            requests = 0


def is_void(attempt: Attempt) -> bool:
    """Whether nothing was booked for it."""
    return attempt.fault is not None and not (attempt.cost_nusd or attempt.tokens or attempt.is_in_doubt)


def on_of(record: CallRecord, ref: str) -> Dimensions:
    """What an attempt at this model was for."""
    return Dimensions(record.agent, record.key, record.user, record.operation, ref, record.variant or "")


def reserved_ms(record: CallRecord, attempt: Attempt) -> int:
    """When its money was held, which says in which windows it counts."""
    return record.at_ms + attempt.started_ms


def route_of(record: CallRecord, was: Plan) -> Route:
    """The models that `was`, the plan in force, had for a call.

    Those before the last one tried that were not tried had an open breaker or too small a context. Where the call
    failed, the others could not be asked either: the caller forbade it, say, or its time was over.
    """
    agent = was.raw_agent(record.model_asked) if record.agent_from == "raw model" else was.agents.get(record.agent)
    if agent is None:
        return Route((), frozenset())
    refs = [target.ref for target in (agent.finetuned if record.variant == "finetuned" else agent.baseline)]
    if record.switched_by:
        cheaper = [rule.use for rule in was.rules if rule.label == record.switched_by]
        refs = list(dict.fromkeys([*cheaper, *refs]))
    attempts = record.attempts
    if attempts and attempts[-1].ref == refs[0] and attempts[-1].fault is None:
        return Route(tuple(refs), _NONE)
    tried = {attempt.ref for attempt in attempts}
    reached = max((place for place, ref in enumerate(refs) if ref in tried), default=0)
    asked = refs if _end_of(record) == "failed" else refs[:reached]
    return Route(tuple(refs), frozenset(asked) - tried)


def next_ref(record: CallRecord, route: Route) -> str:
    """The model that was next when a call was refused, or was to be tried again; empty where nobody can tell."""
    tried = {attempt.ref for attempt in record.attempts}
    return next((ref for ref in route.refs if ref not in tried), record.model_sent)


def _end_of(record: CallRecord) -> End:
    if record.status == 200 and not record.error:
        return "answered"
    if record.client_left:
        return "left"
    has_fault = bool(record.attempts) and record.attempts[-1].fault is not None
    return "failed" if has_fault and record.error not in _OWN else "refused"
