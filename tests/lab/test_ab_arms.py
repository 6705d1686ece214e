"""Calls folded into arms: each counted once, in an arm or beside them, and in its step of time."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from gateway.domain.outcome import Outcome
from gateway.lab.ab_arms import Slot, arms_of
from tests.ledgers import DAY_MS, NOON_MS

HOUR_S = 3_600


def call(**changes: Any) -> Outcome:
    known = Outcome(
        id="c", at_ms=NOON_MS, env="production", agent="qa_agent", experiment=1, stage=1, share_bps=5_000,
        variant="finetuned", bucket=7, user="u1", key="web", operation="inference", model="m", is_success=True,
        is_fallback=False, error="", latency_ms=100.0, first_chunk_ms=None, cost_nusd=10, prompt_tokens=1,
        completion_tokens=1,
    )  # fmt: skip
    return known._replace(**changes)


CALLS = st.builds(
    call,
    at_ms=st.integers(NOON_MS, NOON_MS + 3 * DAY_MS),
    experiment=st.integers(0, 2),
    variant=st.sampled_from(["finetuned", "baseline"]),
    user=st.sampled_from(["", "u1", "u2", "u3"]),
    is_success=st.sampled_from([True, False, None]),
    is_fallback=st.booleans(),
    error=st.sampled_from(["", "stall"]),
    cost_nusd=st.integers(0, 10**9),
)


@given(st.lists(CALLS, max_size=40))
def test_every_call_and_every_dollar_is_counted_once(calls: list[Outcome]) -> None:
    found = arms_of(calls, experiment=1, step_s=HOUR_S)
    parts = (found.treated, found.control, found.outside)
    assert sum(part.calls for part in parts) == len(calls)
    assert sum(part.cost_nusd for part in parts) == sum(one.cost_nusd for one in calls)
    for name, arm in (("treated", found.treated), ("control", found.control)):
        assert arm.answered + arm.failed + arm.left == arm.calls
        assert sum(arm.errors.values()) == arm.failed
        slots: list[Slot] = [getattr(step, name) for step in found.steps]
        assert sum(slot.calls for slot in slots) == arm.answered + arm.failed
        assert sum(slot.answered for slot in slots) == arm.answered


def test_a_call_by_the_fallback_stays_in_its_arm() -> None:
    found = arms_of([call(is_fallback=True, model="mistral/base")], experiment=1, step_s=HOUR_S)
    assert (found.treated.calls, found.treated.fallbacks, found.control.calls) == (1, 1, 0)


def test_a_user_whose_callers_always_left_is_not_counted_as_seen() -> None:
    calls = [call(is_success=None), call(is_success=None, user="u2"), call(user="u2")]
    treated = arms_of(calls, experiment=1, step_s=HOUR_S).treated
    assert (treated.users, treated.calls, treated.left) == (1, 3, 2)


def test_the_most_frequent_errors_come_first_and_one_without_a_name_is_unknown() -> None:
    kinds = ["stall", "", "server_error", "server_error"]
    found = arms_of([call(is_success=False, error=kind) for kind in kinds], experiment=1, step_s=HOUR_S)
    assert list(found.treated.errors.items()) == [("server_error", 2), ("stall", 1), ("unknown", 1)]


def test_steps_begin_on_whole_hours_or_days_and_those_without_calls_are_left_out() -> None:
    calls = [call(at_ms=NOON_MS + 59_000), call(at_ms=NOON_MS + 2 * DAY_MS, variant="baseline", latency_ms=50.0)]
    hours = arms_of(calls, experiment=1, step_s=HOUR_S).steps
    assert [step.start_ms for step in hours] == [NOON_MS, NOON_MS + 2 * DAY_MS]
    assert hours[1].control == Slot(1, 1, 50.0)
    assert hours[1].treated == Slot()
    days = arms_of(calls, experiment=1, step_s=86_400).steps
    assert [step.start_ms % DAY_MS for step in days] == [0, 0]
