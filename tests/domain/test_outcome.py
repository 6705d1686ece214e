"""A call's outcome: in the arm it was assigned to, with all that its attempts cost; none where nobody was asked."""

from gateway.domain.call import Attempt, CallRecord
from gateway.domain.errors import FaultKind
from gateway.domain.money import Usage
from gateway.domain.outcome import outcome_of

FAILED = Attempt(ref="m/ft", started_ms=0, fault=FaultKind.CUT, cost_nusd=30)
ANSWERED = Attempt(ref="m/base", started_ms=5, status=200, cost_nusd=70)


def record(*attempts: Attempt, **fields: object) -> CallRecord:
    known = {"id": "req-1", "at_ms": 7, "env": "production", "agent": "qa_agent", "variant": "finetuned", "status": 200}
    return CallRecord(**{**known, "attempts": list(attempts), **fields})  # type: ignore[arg-type]


def test_a_call_that_another_model_answered_stays_in_its_arm_and_costs_all_its_attempts() -> None:
    found = outcome_of(
        record(
            FAILED, ANSWERED, is_fallback=True, model_sent="m/base", usage=Usage(prompt_tokens=3, completion_tokens=4)
        )
    )
    assert found is not None
    assert (found.variant, found.is_fallback, found.model, found.is_success) == ("finetuned", True, "m/base", True)
    assert (found.cost_nusd, found.prompt_tokens, found.completion_tokens) == (100, 3, 4)


def test_what_is_in_doubt_is_no_cost_of_a_call() -> None:
    doubt = Attempt(ref="m/ft", started_ms=0, fault=FaultKind.RESET, cost_nusd=9_000, is_in_doubt=True)
    found = outcome_of(record(doubt, ANSWERED))
    assert found is not None
    assert found.cost_nusd == 70


def test_a_call_that_failed_is_no_success_and_one_whose_caller_left_is_neither() -> None:
    def is_success(call: CallRecord) -> bool | None:
        found = outcome_of(call)
        assert found is not None
        return found.is_success

    assert is_success(record(FAILED, status=503, error="upstream_error")) is False
    assert is_success(record(ANSWERED, status=200, error="upstream_cut")) is False
    assert is_success(record(ANSWERED, client_left=True)) is None


def test_where_no_model_was_asked_there_is_no_outcome() -> None:
    assert outcome_of(record(status=429, error="budget_exceeded")) is None
    assert outcome_of(record(ANSWERED, agent="")) is None
