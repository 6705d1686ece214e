"""Orders: down is always allowed, up only where the evidence does not object or somebody answers for it."""

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from gateway.decide.rollout import TRANSITIONS, Decision
from gateway.decide.rollout_by_hand import (
    MAX_WHY,
    Order,
    Refusal,
    next_stage,
    pause,
    rearm,
    resume,
    roll_back,
    set_share,
    wrong_percent,
)
from gateway.domain.rollout import Event, Phase, RolloutState, after
from tests.rolling import HOUR_MS, NOW_MS, PLAN, Found, begun, look_of, plan_of

LATER_MS = NOW_MS + HOUR_MS
ANN = Order("ann", LATER_MS)
ANN_INSISTS = Order("ann", LATER_MS, "the figures of tuesday were a test", is_forced=True)
BREACHED: dict[str, Any] = {"success_rate": Found("breached", "worse")}
WORSE: dict[str, Any] = {"success_rate": Found("undecided", "worse")}
MISMATCH: dict[str, Any] = {"is_mismatch": True}
RUNNING = (Phase.RAMPING, Phase.HOLD, Phase.PAUSED, Phase.COMPLETED)


def at(phase: Phase, share_bps: int = 2_500) -> RolloutState:
    share = 0 if phase in (Phase.BASELINE, Phase.ROLLED_BACK) else share_bps
    return msgspec.structs.replace(begun(), phase=phase, share_bps=share)


def done(found: Decision | Refusal, state: RolloutState) -> tuple[str, Phase, int]:
    assert isinstance(found, Decision), found
    assert found.change is not None
    assert found.state == after(state, found.change)
    assert found.reasons == found.change.reasons
    return found.action, found.state.phase, found.state.share_bps


def refused(found: Decision | Refusal) -> str:
    assert isinstance(found, Refusal), found
    return "\n".join(found.reasons)


def test_above_what_the_holdback_leaves_nothing_is_completed() -> None:
    state, plan = at(Phase.RAMPING, 9_500), PLAN._replace(ceiling_bps=6_000)
    assert "`gateway rollout set 60`" in refused(next_stage(state, ANN_INSISTS, look=look_of(state), plan=plan))


@pytest.mark.parametrize("phase", RUNNING, ids=str)
@pytest.mark.parametrize("asked", [None, {}, BREACHED, MISMATCH], ids=str)
def test_lowering_is_always_allowed_and_nothing_raises_it_again_by_itself(
    phase: Phase, asked: dict[str, Any] | None
) -> None:
    state = at(phase)
    look = None if asked is None else look_of(state, **asked)
    lowered = set_share(state, 12.5, ANN, look=look, plan=PLAN)
    assert done(lowered, state) == ("lowered", Phase.PAUSED, 1_250)
    assert done(set_share(state, 0, ANN, look=look, plan=PLAN), state) == ("emptied", Phase.BASELINE, 0)


@pytest.mark.parametrize("asked", [BREACHED, WORSE, MISMATCH], ids=str)
@pytest.mark.parametrize("phase", [*RUNNING, Phase.BASELINE], ids=str)
def test_a_raise_against_the_evidence_wants_force_and_a_reason_and_pauses_it(
    phase: Phase, asked: dict[str, Any]
) -> None:
    state = at(phase)
    look = look_of(state, **asked)
    for order in (ANN, ANN._replace(why="please")):
        plain = set_share(state, 40, order, look=look, plan=PLAN)
        assert "the evidence speaks against 40 %" in refused(plain)
        assert plain == Refusal(plain.reasons, can_force=True)
    assert "wants a reason" in refused(set_share(state, 40, ANN_INSISTS._replace(why=" "), look=look, plan=PLAN))
    forced = set_share(state, 40, ANN_INSISTS, look=look, plan=PLAN)
    assert done(forced, state) == ("overruled", Phase.PAUSED, 4_000)
    assert isinstance(forced, Decision)
    assert forced.change is not None
    assert (forced.change.is_forced, forced.change.why, forced.change.by) == (True, ANN_INSISTS.why, "ann")
    assert "success rate" in forced.change.evidence


@pytest.mark.parametrize(
    ("phase", "then"),
    [
        (Phase.BASELINE, Phase.RAMPING),
        (Phase.RAMPING, Phase.RAMPING),
        (Phase.HOLD, Phase.RAMPING),
        (Phase.PAUSED, Phase.PAUSED),
        (Phase.COMPLETED, Phase.RAMPING),
    ],
    ids=str,
)
@pytest.mark.parametrize("asked", [None, {}, {"users": (0, 0)}], ids=str)
def test_what_is_not_known_is_no_objection_to_a_person(phase: Phase, then: Phase, asked: dict[str, Any] | None) -> None:
    state = at(phase)
    look = None if asked is None else look_of(state, **asked)
    assert done(set_share(state, 40, ANN, look=look, plan=PLAN), state) == ("raised", then, 4_000)


def test_force_that_was_not_needed_is_not_noted() -> None:
    state = begun()
    raised = set_share(state, 40, ANN_INSISTS, look=look_of(state), plan=PLAN)
    assert done(raised, state) == ("raised", Phase.RAMPING, 4_000)
    assert isinstance(raised, Decision)
    assert raised.change is not None
    assert not raised.change.is_forced


def test_what_is_missing_is_told_to_whom_raises_it() -> None:
    raised = set_share(begun(), 40, ANN, look=look_of(begun(), users=(3, 100)), plan=PLAN)
    assert isinstance(raised, Decision)
    assert raised.reasons[0] == "ann raised it from 10 % to 40 %"
    assert "3 users with the fine-tuned model" in raised.reasons[1]


@pytest.mark.parametrize("percent", [-0.01, 100.01, float("nan"), float("inf"), -1e9])
def test_what_is_no_percentage_changes_nothing(percent: float) -> None:
    assert "a share is 0 to 100" in wrong_percent(percent)
    assert "a share is 0 to 100" in refused(set_share(begun(), percent, ANN_INSISTS, look=None, plan=PLAN))


@pytest.mark.parametrize("percent", [0.001, 33.333, 99.9999])
def test_what_is_finer_than_the_buckets_changes_nothing(percent: float) -> None:
    assert "steps of 0.01 %" in wrong_percent(percent)
    assert "steps of 0.01 %" in refused(set_share(begun(), percent, ANN, look=None, plan=PLAN))


@pytest.mark.parametrize(("percent", "bps"), [(0.01, 1), (33.33, 3_333), (28.9, 2_890), (95, 9_500)])
def test_any_share_may_be_set_by_hand(percent: float, bps: int) -> None:
    assert wrong_percent(percent) == ""
    found = set_share(at(Phase.RAMPING, 9_000 if bps == 9_500 else 9_500), percent, ANN, look=None, plan=PLAN)
    assert isinstance(found, Decision)
    assert found.state.share_bps == bps


@pytest.mark.parametrize("order", [ANN, ANN_INSISTS], ids=str)
def test_all_means_all_but_the_holdback(order: Order) -> None:
    state = begun()
    found = set_share(state, 100, order, look=None, plan=PLAN)
    assert done(found, state) == ("raised", Phase.RAMPING, 9_500)
    assert any("95 % is the most" in reason for reason in found.reasons)
    assert "95 % already" in refused(set_share(at(Phase.RAMPING, 9_500), 100, order, look=None, plan=PLAN))


def test_a_share_that_is_so_already_is_no_change() -> None:
    assert "25 % already" in refused(set_share(at(Phase.PAUSED), 25, ANN, look=None, plan=PLAN))
    assert "0 % already" in refused(set_share(at(Phase.ROLLED_BACK), 0, ANN, look=None, plan=PLAN))


@pytest.mark.parametrize(
    ("phase", "share", "wanted"),
    [
        (Phase.BASELINE, 0, ("raised", Phase.RAMPING, 1_000)),
        (Phase.RAMPING, 1_000, ("raised", Phase.RAMPING, 2_500)),
        (Phase.RAMPING, 3_000, ("raised", Phase.RAMPING, 5_000)),
        (Phase.PAUSED, 2_500, ("raised", Phase.PAUSED, 5_000)),
        (Phase.RAMPING, 7_500, ("raised", Phase.RAMPING, 9_500)),
        (Phase.RAMPING, 9_500, ("completed", Phase.COMPLETED, 9_500)),
        (Phase.HOLD, 9_500, ("completed", Phase.COMPLETED, 9_500)),
        (Phase.PAUSED, 9_500, ("completed", Phase.COMPLETED, 9_500)),
    ],
    ids=str,
)
def test_the_next_stage_is_the_next_of_the_plan(phase: Phase, share: int, wanted: tuple[str, Phase, int]) -> None:
    state = at(phase, share)
    assert done(next_stage(state, ANN, look=look_of(state), plan=PLAN), state) == wanted


def test_what_the_evidence_objects_to_cannot_be_called_complete_even_by_force() -> None:
    state = at(Phase.RAMPING, 9_500)
    found = next_stage(state, ANN_INSISTS, look=look_of(state, **WORSE), plan=PLAN)
    assert "cannot be called complete" in refused(found)
    assert found == Refusal(found.reasons, can_force=False)
    over = at(Phase.COMPLETED, 9_500)
    assert "nothing to complete" in refused(next_stage(over, ANN, look=look_of(over), plan=PLAN))


@pytest.mark.parametrize("asked", [None, {}, BREACHED], ids=str)
@pytest.mark.parametrize("order", [ANN, ANN_INSISTS], ids=str)
def test_what_was_rolled_back_does_not_rise_before_it_is_rearmed(order: Order, asked: dict[str, Any] | None) -> None:
    state = at(Phase.ROLLED_BACK)
    look = None if asked is None else look_of(state, **asked)
    for found in (
        set_share(state, 10, order, look=look, plan=PLAN),
        next_stage(state, order, look=look, plan=PLAN),
        resume(state, order, look=look, plan=PLAN),
    ):
        assert "`gateway rollout rearm`" in refused(found)
        assert found == Refusal(found.reasons, can_force=False)


def test_rearming_begins_a_new_experiment_and_leaves_it_to_a_person_to_begin() -> None:
    state = at(Phase.ROLLED_BACK)
    found = rearm(state, ANN)
    assert done(found, state) == ("rearmed", Phase.BASELINE, 0)
    assert isinstance(found, Decision)
    assert found.state.experiment == state.experiment + 1
    assert found.state.first_stage == found.state.stage == state.stage + 1
    begins = next_stage(found.state, ANN, look=look_of(found.state, users=(0, 0)), plan=PLAN)
    assert begins.reasons == (
        "ann raised it from 0 % to 10 %",
        "at 0 % nobody has the fine-tuned model, so no evidence will come; `gateway rollout advance` begins at 10 %",
    )
    old = look_of(state, **BREACHED)
    raised = next_stage(found.state, ANN._replace(now_ms=LATER_MS + 1), look=old, plan=PLAN)
    assert done(raised, found.state) == ("raised", Phase.RAMPING, 1_000), "the breach was of the experiment before"


@pytest.mark.parametrize("asked", [None, {}, BREACHED], ids=str)
def test_whoever_resumes_is_told_what_the_plan_will_make_of_it(asked: dict[str, Any] | None) -> None:
    state = at(Phase.PAUSED)
    look = None if asked is None else look_of(state, **asked)
    found = resume(state, ANN, look=look, plan=PLAN)
    assert done(found, state) == ("resumed", Phase.RAMPING, 2_500)
    assert ("the evidence speaks against it:" in found.reasons) is (asked == BREACHED)


ORDERS: dict[Event, Callable[[RolloutState], Decision | Refusal]] = {
    Event.PAUSED: lambda state: pause(state, ANN),
    Event.RESUMED: lambda state: resume(state, ANN, look=None, plan=PLAN),
    Event.ROLLED_BACK: lambda state: roll_back(state, ANN),
    Event.REARMED: lambda state: rearm(state, ANN),
    Event.COMPLETED: lambda state: next_stage(state, ANN, look=None, plan=PLAN),
    Event.RAISED: lambda state: set_share(state, 95, ANN, look=None, plan=PLAN),
}


@pytest.mark.parametrize("phase", Phase, ids=str)
@pytest.mark.parametrize("event", ORDERS, ids=str)
def test_an_order_does_what_the_table_says_and_else_says_what_can_be_done(phase: Phase, event: Event) -> None:
    state = at(phase, 9_500 if event is Event.COMPLETED else 2_500)
    if event is Event.COMPLETED and state.share_bps == 0:
        return  # The next stage is then the first one.
    found = ORDERS[event](state)
    if (phase, event) in TRANSITIONS:
        action, then, share = done(found, state)
        assert (action, then) == (event.value, TRANSITIONS[phase, event])
        assert share == {Event.ROLLED_BACK: 0, Event.REARMED: 0, Event.RAISED: 9_500}.get(event, state.share_bps)
    else:
        assert refused(found).startswith(("there is nothing to", "it was rolled back", "it is running"))
        assert "by pilot" in refused(found)


def test_an_order_names_who_gives_it_and_does_not_tell_a_novel() -> None:
    assert "nobody is named" in refused(pause(begun(), ANN._replace(by="")))
    assert "longer than" in refused(pause(begun(), ANN._replace(why="x" * (MAX_WHY + 1))))
    assert isinstance(pause(begun(), ANN._replace(why="x" * MAX_WHY)), Decision)


def test_a_holdback_that_has_grown_is_met_by_lowering() -> None:
    state = at(Phase.COMPLETED, 9_500)
    grown = plan_of("holdback_percent = 20")
    assert done(set_share(state, 100, ANN, look=None, plan=grown), state) == ("lowered", Phase.PAUSED, 8_000)
