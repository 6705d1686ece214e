"""A rollout by itself: up where everything is known to be well, back at a breach, and else where it is."""

import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gateway.decide.rollout import TRANSITIONS, Decision, advance, begin, recommendation
from gateway.decide.rollout_by_hand import Order, Refusal, next_stage, rearm, roll_back, set_share
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
        (Phase.HOLD, 1_000, MISMATCH, ("mismatched", Phase.HOLD, 1_000)),
        (Phase.HOLD, 1_000, BREACHED, ("rolled_back", Phase.ROLLED_BACK, 0)),
        (Phase.HOLD, 10_000, None, ("stay", Phase.HOLD, 10_000)),
        (Phase.COMPLETED, 9_500, {}, ("stay", Phase.COMPLETED, 9_500)),
        (Phase.COMPLETED, 9_500, WORSE, ("stay", Phase.COMPLETED, 9_500)),
        (Phase.COMPLETED, 9_500, MISMATCH, ("mismatched", Phase.COMPLETED, 9_500)),
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
@pytest.mark.parametrize("asked", [None, {}, WORSE, BREACHED], ids=str)
def test_what_a_person_has_in_hand_never_moves_by_itself(
    phase: Phase, share: int, asked: dict[str, Any] | None
) -> None:
    state = at(phase, share)
    look = None if asked is None else look_of(state, **asked)
    assert stepped(state, look) == ("stay", phase, share)
    assert "gateway rollout " in advance(state, look, now_ms=LATER_MS, plan=PLAN).reasons[0]


@pytest.mark.parametrize("asked", [None, {}, WORSE], ids=str)
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


@pytest.mark.parametrize("plan", [PLAN, MANUAL], ids=["automatic", "manual"])
@pytest.mark.parametrize("phase", [phase for phase in Phase if phase is not Phase.ROLLED_BACK], ids=str)
def test_a_mismatch_is_noted_once_in_every_phase_and_mode_and_moves_nobody(phase: Phase, plan: RolloutPlan) -> None:
    state = msgspec.structs.replace(at(phase), by="ann", why="holidays")
    look = look_of(state, **(MISMATCH | BREACHED if phase is Phase.PAUSED else MISMATCH))
    noted = advance(state, look, now_ms=LATER_MS, plan=plan)
    assert noted.change is not None
    is_held = phase is Phase.RAMPING and plan is PLAN
    assert (noted.action, noted.state.phase) == (("held", Phase.HOLD) if is_held else ("mismatched", phase))
    assert (noted.state.has_mismatch, noted.state.share_bps, noted.state.stage) == (True, 1_000, state.stage)
    assert noted.change.by == "pilot"
    assert "8.00 % of them were in the treated arm where 10.00 % belong" in noted.change.reasons[0]
    if not is_held:
        # Who has it in hand, and why, is what it was.
        assert (noted.state.by, noted.state.why, noted.state.changed_ms) == ("ann", "holidays", state.changed_ms)
    again = advance(noted.state, look_of(noted.state, **MISMATCH), now_ms=LATER_MS, plan=plan)
    assert again.change is None


def test_in_manual_mode_a_mismatch_stays_though_more_users_make_it_look_like_none() -> None:
    state = begun()
    noted = advance(state, look_of(state, **MISMATCH), now_ms=LATER_MS, plan=MANUAL).state
    clean = look_of(noted)
    assert recommendation(noted, clean, now_ms=LATER_MS, plan=MANUAL).word == "hold"
    order = Order("ann", LATER_MS, "the client is mended")
    refused = next_stage(noted, order, look=clean, plan=MANUAL)
    assert isinstance(refused, Refusal)
    assert refused.can_force
    assert "that stays for the whole of an experiment" in refused.reasons[1]
    # A person may still do what a person may.
    forced = next_stage(noted, order._replace(is_forced=True), look=clean, plan=MANUAL)
    assert isinstance(forced, Decision)
    assert (forced.action, forced.state.share_bps, forced.state.has_mismatch) == ("overruled", 2_500, True)
    back = roll_back(noted, order)
    assert isinstance(back, Decision)
    assert isinstance(rearm(back.state, order), Decision)


def test_a_mismatch_that_is_found_while_it_is_held_lets_nothing_clear_it() -> None:
    state = begun()
    held = advance(state, look_of(state, **WORSE), now_ms=LATER_MS, plan=PLAN).state
    assert (held.phase, held.has_mismatch) == (Phase.HOLD, False)
    noted = advance(held, look_of(held, **MISMATCH), now_ms=LATER_MS, plan=PLAN).state
    assert stepped(noted, look_of(noted)) == ("stay", Phase.HOLD, 1_000)


@pytest.mark.parametrize("change", [{"experiment": 0}, {"at_ms": LATER_MS - 120_001}], ids=str)
def test_a_mismatch_of_a_look_that_counts_as_none_is_not_noted(change: dict[str, int]) -> None:
    state = at(Phase.RAMPING, 10_000)
    look = look_of(state, LATER_MS, **MISMATCH)._replace(**change)
    assert stepped(state, look, MANUAL)[0] == "stay"


def test_a_hold_does_not_end_without_evidence_not_even_where_nobody_is_left_to_compare_with() -> None:
    plan = plan_of(AUTOMATIC.replace("holdback_percent = 5", "holdback_percent = 0"))
    held = at(Phase.HOLD, 10_000)
    for look in (None, look_of(held, LATER_MS - 120_001), look_of(held)._replace(experiment=0)):
        decision = advance(held, look, now_ms=LATER_MS, plan=plan)
        assert decision.change is None
        assert decision.reasons[0] == "a hold ends with fresh evidence alone"
    assert stepped(held, look_of(held), plan) == ("cleared", Phase.RAMPING, 10_000)


def test_above_what_a_reloaded_holdback_leaves_nothing_goes_on_and_a_person_is_told_how_to_lower_it() -> None:
    automatic = plan_of(AUTOMATIC.replace("holdback_percent = 5", "holdback_percent = 40"))
    state = at(Phase.RAMPING, 9_500)
    for plan in (automatic, automatic._replace(is_automatic=False)):
        decision = advance(state, look_of(state), now_ms=LATER_MS, plan=plan)
        assert (decision.change, decision.state) == (None, state)
        assert decision.reasons[0] == (
            "95 % is above the 60 % that rollout.holdback_percent leaves: nothing is raised or completed until "
            "`gateway rollout set 60` takes the last users added back"
        )
        advice = recommendation(state, look_of(state), now_ms=LATER_MS, plan=plan)
        assert (advice.word, advice.reasons[0]) == ("hold", decision.reasons[0])
    # What the evidence objects to is held and taken back as anywhere.
    assert stepped(state, look_of(state, **WORSE), automatic) == ("held", Phase.HOLD, 9_500)
    assert stepped(state, look_of(state, **BREACHED), automatic) == ("rolled_back", Phase.ROLLED_BACK, 0)
    assert recommendation(state, look_of(state, **BREACHED), now_ms=LATER_MS, plan=automatic).word == "roll back"
    assert stepped(at(Phase.RAMPING, 6_000), look_of(state), automatic) == ("completed", Phase.COMPLETED, 6_000)
    lowered = set_share(state, 60, Order("ann", LATER_MS), look=None, plan=automatic)
    assert isinstance(lowered, Decision)
    assert lowered.state.share_bps == 6_000


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
