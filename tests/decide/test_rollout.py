"""A rollout by itself: up where everything is known to be well, back at a breach, and else where it is."""

import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gateway.decide.rollout import TRANSITIONS, Decision, advance, begin, recommendation
from gateway.decide.rollout_by_hand import Order, rearm, roll_back
from gateway.decide.rollout_evidence import Look
from gateway.decide.rollout_plan import RolloutPlan
from gateway.domain.rollout import Event, Phase, RolloutState, after
from tests.rolling import AUTOMATIC, HOUR_MS, MANUAL, NOW_MS, PLAN, Found, begun, look_of, plan_of

LATER_MS = NOW_MS + HOUR_MS
BREACHED: dict[str, Any] = {"success_rate": Found("breached", "worse")}
WORSE: dict[str, Any] = {"success_rate": Found("undecided", "worse")}
MISMATCH: dict[str, Any] = {"is_mismatch": True}
TOO_FEW: dict[str, Any] = {"users": (99, 100)}
UNDECIDED: dict[str, Any] = {"p95_latency": Found("undecided")}
DOCS = Path(__file__).parents[2] / "docs" / "rollouts.md"


def at(phase: Phase, share_bps: int = 1_000) -> RolloutState:
    return msgspec.structs.replace(begun(), phase=phase, share_bps=share_bps)


def stepped(state: RolloutState, look: Look | None, plan: RolloutPlan = PLAN) -> tuple[str, Phase, int]:
    decision = advance(state, look, now_ms=LATER_MS, plan=plan)
    assert decision.reasons
    assert decision.state == (after(state, decision.change) if decision.change else state)
    return decision.action, decision.state.phase, decision.state.share_bps


@pytest.mark.parametrize(
    ("start", "phase", "share"), [(10, Phase.RAMPING, 1_000), (0, Phase.BASELINE, 0), (100, Phase.RAMPING, 9_500)]
)
def test_it_begins_where_the_policy_says(start: float, phase: Phase, share: int) -> None:
    decision = begin("qa_agent", plan=plan_of(start=start), now_ms=NOW_MS)
    assert (decision.action, decision.state.phase, decision.state.share_bps) == ("began", phase, share)
    assert (decision.state.version, decision.state.experiment, decision.state.stage) == (1, 1, 1)
    assert decision.change is not None
    assert decision.state == after(None, decision.change)


@pytest.mark.parametrize(
    ("phase", "share", "asked", "wanted"),
    [
        (Phase.RAMPING, 1_000, {}, ("raised", Phase.RAMPING, 2_500)),
        (Phase.RAMPING, 1_200, {}, ("raised", Phase.RAMPING, 2_500)),
        (Phase.RAMPING, 7_500, {}, ("raised", Phase.RAMPING, 9_500)),
        (Phase.RAMPING, 9_500, {}, ("completed", Phase.COMPLETED, 9_500)),
        (Phase.RAMPING, 1_000, None, ("stay", Phase.RAMPING, 1_000)),
        (Phase.RAMPING, 1_000, TOO_FEW, ("stay", Phase.RAMPING, 1_000)),
        (Phase.RAMPING, 1_000, UNDECIDED, ("stay", Phase.RAMPING, 1_000)),
        (Phase.RAMPING, 1_000, MISMATCH, ("held", Phase.HOLD, 1_000)),
        (Phase.RAMPING, 1_000, WORSE, ("held", Phase.HOLD, 1_000)),
        (Phase.RAMPING, 9_500, WORSE, ("held", Phase.HOLD, 9_500)),
        (Phase.RAMPING, 5_000, BREACHED, ("rolled_back", Phase.ROLLED_BACK, 0)),
        (Phase.HOLD, 1_000, {}, ("cleared", Phase.RAMPING, 1_000)),
        (Phase.HOLD, 1_000, TOO_FEW, ("cleared", Phase.RAMPING, 1_000)),
        (Phase.HOLD, 1_000, None, ("stay", Phase.HOLD, 1_000)),
        (Phase.HOLD, 1_000, WORSE, ("stay", Phase.HOLD, 1_000)),
        (Phase.HOLD, 1_000, MISMATCH, ("stay", Phase.HOLD, 1_000)),
        (Phase.HOLD, 1_000, BREACHED, ("rolled_back", Phase.ROLLED_BACK, 0)),
        (Phase.COMPLETED, 9_500, {}, ("stay", Phase.COMPLETED, 9_500)),
        (Phase.COMPLETED, 9_500, WORSE, ("stay", Phase.COMPLETED, 9_500)),
        (Phase.COMPLETED, 9_500, BREACHED, ("rolled_back", Phase.ROLLED_BACK, 0)),
    ],
    ids=str,
)
def test_what_it_does_by_itself(
    phase: Phase, share: int, asked: dict[str, Any] | None, wanted: tuple[str, Phase, int]
) -> None:
    state = at(phase, share)
    assert stepped(state, None if asked is None else look_of(state, **asked)) == wanted


@pytest.mark.parametrize(
    ("phase", "share"), [(Phase.BASELINE, 0), (Phase.PAUSED, 2_500), (Phase.ROLLED_BACK, 0)], ids=str
)
@pytest.mark.parametrize("asked", [None, {}, MISMATCH, WORSE, BREACHED], ids=str)
def test_what_a_person_has_in_hand_never_moves_by_itself(
    phase: Phase, share: int, asked: dict[str, Any] | None
) -> None:
    state = at(phase, share)
    look = None if asked is None else look_of(state, **asked)
    assert stepped(state, look) == ("stay", phase, share)
    assert "gateway rollout " in advance(state, look, now_ms=LATER_MS, plan=PLAN).reasons[0]


@pytest.mark.parametrize("asked", [None, {}, MISMATCH, WORSE], ids=str)
@pytest.mark.parametrize("phase", [Phase.RAMPING, Phase.HOLD, Phase.COMPLETED], ids=str)
def test_in_manual_mode_nothing_is_raised_or_held_by_itself(phase: Phase, asked: dict[str, Any] | None) -> None:
    state = at(phase)
    assert stepped(state, None if asked is None else look_of(state, **asked), MANUAL) == ("stay", phase, 1_000)


@pytest.mark.parametrize("phase", [Phase.RAMPING, Phase.HOLD, Phase.COMPLETED], ids=str)
def test_in_manual_mode_a_breach_is_taken_back_all_the_same(phase: Phase) -> None:
    state = at(phase)
    assert stepped(state, look_of(state, **BREACHED), MANUAL) == ("rolled_back", Phase.ROLLED_BACK, 0)


def test_what_takes_a_share_back_is_the_policys_choice() -> None:
    state = begun()
    worse, breached = look_of(state, **WORSE), look_of(state, **BREACHED)
    nothing = plan_of(AUTOMATIC + 'rollback_on = "nothing"')
    assert stepped(state, breached, nothing) == ("held", Phase.HOLD, 1_000)
    either = plan_of(AUTOMATIC + 'rollback_on = "worse"')
    assert stepped(state, worse, either) == ("rolled_back", Phase.ROLLED_BACK, 0)
    assert recommendation(state, breached, now_ms=LATER_MS, plan=nothing).word == "roll back"


def test_a_step_waits_for_evidence_of_its_own_stage() -> None:
    state = begun()
    look = look_of(state)
    raised = advance(state, look, now_ms=LATER_MS, plan=PLAN).state
    again = advance(raised, look, now_ms=LATER_MS + 1, plan=PLAN)
    assert again.action == "stay"
    assert "before the share became 25 %" in again.reasons[0]


def test_a_step_is_told_with_its_figures_to_the_audit_log() -> None:
    state = begun()
    change = advance(state, look_of(state, **BREACHED), now_ms=LATER_MS, plan=PLAN).change
    assert change is not None
    assert (change.version, change.by, change.event, change.is_forced) == (2, "pilot", Event.ROLLED_BACK, False)
    assert (change.from_phase, change.from_bps, change.at_ms) == (Phase.RAMPING, 1_000, LATER_MS)
    assert "past the guardrail of 2 points less" in change.reasons[0]
    assert "success rate 56.00 % against 80.00 %" in change.evidence


def test_a_mismatch_is_kept_until_a_new_experiment_begins() -> None:
    state = begun()
    held = advance(state, look_of(state, **MISMATCH), now_ms=LATER_MS, plan=PLAN).state
    assert (held.phase, held.has_mismatch) == (Phase.HOLD, True)
    # The evidence is good again, and the test has decided all the same.
    again = advance(held, look_of(held, at_ms=LATER_MS), now_ms=LATER_MS, plan=PLAN)
    assert again.change is None
    back = roll_back(held, Order("ann", LATER_MS))
    assert isinstance(back, Decision)
    anew = rearm(back.state, Order("ann", LATER_MS))
    assert isinstance(anew, Decision)
    assert not anew.state.has_mismatch


def test_a_stage_that_a_reload_took_away_is_no_obstacle() -> None:
    state = at(Phase.RAMPING, 2_500)
    plan = plan_of(AUTOMATIC + "stages = [20, 40]")
    assert stepped(state, look_of(state), plan) == ("raised", Phase.RAMPING, 4_000)
    assert stepped(at(Phase.RAMPING, 5_000), look_of(state), plan) == ("completed", Phase.COMPLETED, 5_000)


@pytest.mark.parametrize(
    ("phase", "asked", "word", "said"),
    [
        (Phase.RAMPING, {}, "proceed", "2 guardrails hold"),
        (Phase.RAMPING, TOO_FEW, "hold", "99 users"),
        (Phase.RAMPING, None, "hold", "no evidence yet"),
        (Phase.RAMPING, MISMATCH, "hold", "the arms do not have"),
        (Phase.PAUSED, {}, "proceed", "2 guardrails hold"),
        (Phase.PAUSED, BREACHED, "roll back", "past the guardrail"),
        (Phase.COMPLETED, BREACHED, "roll back", "past the guardrail"),
        (Phase.ROLLED_BACK, {}, "hold", "gateway rollout rearm"),
        (Phase.ROLLED_BACK, BREACHED, "hold", "gateway rollout rearm"),
        (Phase.RAMPING, {"cost_per_request": Found("none", "worse")}, "proceed", "no guardrail is set on it"),
    ],
    ids=str,
)
def test_a_report_says_what_should_be_done_and_why(
    phase: Phase, asked: dict[str, Any] | None, word: str, said: str
) -> None:
    state = at(phase)
    look = None if asked is None else look_of(state, **asked)
    found = recommendation(state, look, now_ms=LATER_MS, plan=MANUAL)
    assert found.word == word
    assert said in "\n".join(found.reasons)


def test_every_transition_is_documented_and_every_documented_one_exists() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \| `(\w+)` \|", DOCS.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert sorted(rows) == sorted((*key, phase) for key, phase in TRANSITIONS.items())


def test_no_phase_is_without_a_way_out() -> None:
    assert {phase for phase, _ in TRANSITIONS} == set(Phase)
    assert {event for _, event in TRANSITIONS} == set(Event) - {Event.BEGAN}
