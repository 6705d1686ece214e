"""What can be read out of a record: how the call ended, what it took, and whom it could not ask."""

from typing import Any

import pytest

from gateway.decide.recorded import Ending, Route, ending_of, is_void, next_ref, on_of, reserved_ms, route_of, taken
from gateway.domain.call import Attempt, CallRecord
from gateway.domain.errors import FaultKind
from gateway.domain.ledger import Amounts, Dimensions
from tests.planning import plan_of

FT, BASE, GPT, SMALL = "mistral/ft:qa", "mistral/base", "openai/gpt-4o", "sim/small"
CHAIN = (FT, BASE, GPT, SMALL)


def record(*attempts: Attempt, **fields: Any) -> CallRecord:
    """A call of qa_agent's in the fine-tuned arm, answered by the last of its attempts."""
    known = {
        "id": "req-1", "at_ms": 1_000, "env": "test", "agent": "qa_agent", "agent_from": "model",
        "variant": "finetuned", "status": 200, "model_sent": attempts[-1].ref if attempts else "",
    }  # fmt: skip
    return CallRecord(attempts=list(attempts), **{**known, **fields})


def ok(ref: str = FT, cost_nusd: int = 10, tokens: int = 5, **fields: Any) -> Attempt:
    return Attempt(ref=ref, started_ms=0, status=200, cost_nusd=cost_nusd, tokens=tokens, **fields)


def bad(ref: str = FT, fault: FaultKind = FaultKind.SERVER, **fields: Any) -> Attempt:
    return Attempt(ref=ref, started_ms=0, fault=fault, **fields)


@pytest.mark.parametrize(
    "found, expected",
    [
        (record(ok()), Ending("finetuned", FT, "answered", "", 10, 5)),
        (record(bad(cost_nusd=3, tokens=2), ok(BASE)), Ending("finetuned", BASE, "answered", "", 13, 7)),
        (
            record(bad(), bad(BASE, FaultKind.STALL), status=504, error="upstream_timeout"),
            Ending("finetuned", BASE, "failed", "stall"),
        ),
        (record(status=429, error="budget_exceeded"), Ending("finetuned", "", "refused", "budget_exceeded")),
        # Refused for want of money after a model had failed: the last word is the gateway's.
        (record(bad(), status=429, error="budget_reserved"), Ending("finetuned", FT, "refused", "budget_reserved")),
        (record(ok(), status=503, error="draining"), Ending("finetuned", FT, "refused", "draining", 10, 5)),
        (record(ok(), status=0, client_left=True), Ending("finetuned", FT, "left", "", 10, 5)),
        # The caller left, and the answer was read to its end.
        (record(ok(), client_left=True), Ending("finetuned", FT, "answered", "", 10, 5)),
        (record(variant=None, status=400, error="invalid_value"), Ending(None, "", "refused", "invalid_value")),
    ],
)
def test_how_a_call_ended(found: CallRecord, expected: Ending) -> None:
    assert ending_of(found) == expected


def test_a_call_is_one_request_and_a_void_attempt_is_none() -> None:
    doubt = bad(fault=FaultKind.RESET, cost_nusd=7, tokens=9, is_in_doubt=True)
    found = record(bad(), doubt, ok(BASE))
    assert [amounts for _, amounts in taken(found)] == [Amounts(), Amounts(7, 1, 9), Amounts(10, 0, 5)]
    assert [is_void(attempt) for attempt in found.attempts] == [True, False, False]


def test_an_attempt_counts_for_whom_it_was_and_when_its_money_was_held() -> None:
    found = record(ok(), key="web", user="u1", operation="benchmark")
    assert on_of(found, BASE) == Dimensions("qa_agent", "web", "u1", "benchmark", BASE, "finetuned")
    assert reserved_ms(found, Attempt(ref=FT, started_ms=250)) == 1_250


@pytest.mark.parametrize(
    "found, closed",
    [
        (record(ok()), set()),
        (record(bad(), ok(BASE)), set()),
        # Passed over without a try: its breaker was open.
        (record(ok(BASE)), {FT}),
        (record(bad(), ok(SMALL)), {BASE, GPT}),
        # Nobody was asked any more, so nobody could be.
        (record(bad(), status=502, error="upstream_error"), {BASE, GPT, SMALL}),
        # There was no money for the next, which says nothing of it.
        (record(bad(), status=429, error="budget_exceeded"), set()),
        (record(status=429, error="budget_exceeded"), set()),
        (record(ok(BASE), variant="baseline"), set()),
        (record(ok("who/knows")), set()),
    ],
)
def test_the_models_that_could_not_be_asked(found: CallRecord, closed: set[str]) -> None:
    route = route_of(found, plan_of())
    assert route.closed == closed
    assert route.refs == (CHAIN if found.variant == "finetuned" else CHAIN[1:])


def test_a_cheaper_model_that_a_cap_put_in_front_belongs_to_the_route() -> None:
    plan = plan_of('[[caps]]\nper = "day"\nusd = "1"\nover_pct = 50\nuse = "sim/cheap"\n')
    found = record(ok("sim/cheap"), switched_by=plan.rules[0].label)
    assert route_of(found, plan) == Route(("sim/cheap", *CHAIN), frozenset())


def test_models_named_outright_and_agents_that_are_gone() -> None:
    raw = record(ok("sim/x"), agent="raw", agent_from="raw model", model_asked="sim/x", variant="baseline")
    assert route_of(raw, plan_of("[models]\nallow_raw_models = true")).refs == ("sim/x",)
    assert route_of(raw, plan_of()).refs == ()
    assert route_of(record(ok(), agent="gone"), plan_of()) == Route((), frozenset())


def test_the_model_a_refused_call_wanted_next() -> None:
    plan = plan_of()
    for found, ref in [(record(), FT), (record(bad()), BASE), (record(*map(bad, CHAIN)), SMALL)]:
        assert next_ref(found, route_of(found, plan)) == ref
