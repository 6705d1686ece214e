"""Rollouts: a share of users that climbs from stage to stage while the evidence holds, and falls when it does not.

Pure: it is told the time and the evidence, and answers with the next state. What people order is in
decide/rollout_by_hand.py. The invariants: without evidence nothing rises; what is paused, rolled back or not begun
moves by a person's hand alone; a mismatch that was found once stays found; and each change says why.
"""

from typing import NamedTuple

from gateway.decide.rollout_evidence import Judgement, Look, Opinion, asides, judge, summary
from gateway.decide.rollout_plan import RolloutPlan
from gateway.decide.rollout_words import above_ceiling, mismatched, percent, standing
from gateway.domain.rollout import PILOT, Change, Event, Phase, RolloutState, after

# What is not in the table does not happen. docs/rollouts.md draws it from here.
TRANSITIONS: dict[tuple[Phase, Event], Phase] = {
    (Phase.BASELINE, Event.RAISED): Phase.RAMPING,
    (Phase.BASELINE, Event.OVERRULED): Phase.PAUSED,
    (Phase.BASELINE, Event.REARMED): Phase.BASELINE,
    (Phase.BASELINE, Event.MISMATCHED): Phase.BASELINE,
    (Phase.RAMPING, Event.RAISED): Phase.RAMPING,
    (Phase.RAMPING, Event.OVERRULED): Phase.PAUSED,
    (Phase.RAMPING, Event.LOWERED): Phase.PAUSED,
    (Phase.RAMPING, Event.EMPTIED): Phase.BASELINE,
    (Phase.RAMPING, Event.HELD): Phase.HOLD,
    (Phase.RAMPING, Event.PAUSED): Phase.PAUSED,
    (Phase.RAMPING, Event.COMPLETED): Phase.COMPLETED,
    (Phase.RAMPING, Event.ROLLED_BACK): Phase.ROLLED_BACK,
    (Phase.RAMPING, Event.MISMATCHED): Phase.RAMPING,
    (Phase.HOLD, Event.RAISED): Phase.RAMPING,
    (Phase.HOLD, Event.OVERRULED): Phase.PAUSED,
    (Phase.HOLD, Event.LOWERED): Phase.PAUSED,
    (Phase.HOLD, Event.EMPTIED): Phase.BASELINE,
    (Phase.HOLD, Event.CLEARED): Phase.RAMPING,
    (Phase.HOLD, Event.PAUSED): Phase.PAUSED,
    (Phase.HOLD, Event.COMPLETED): Phase.COMPLETED,
    (Phase.HOLD, Event.ROLLED_BACK): Phase.ROLLED_BACK,
    (Phase.HOLD, Event.MISMATCHED): Phase.HOLD,
    (Phase.PAUSED, Event.RAISED): Phase.PAUSED,
    (Phase.PAUSED, Event.OVERRULED): Phase.PAUSED,
    (Phase.PAUSED, Event.LOWERED): Phase.PAUSED,
    (Phase.PAUSED, Event.EMPTIED): Phase.BASELINE,
    (Phase.PAUSED, Event.RESUMED): Phase.RAMPING,
    (Phase.PAUSED, Event.COMPLETED): Phase.COMPLETED,
    (Phase.PAUSED, Event.ROLLED_BACK): Phase.ROLLED_BACK,
    (Phase.PAUSED, Event.REARMED): Phase.BASELINE,
    (Phase.PAUSED, Event.MISMATCHED): Phase.PAUSED,
    (Phase.COMPLETED, Event.RAISED): Phase.RAMPING,
    (Phase.COMPLETED, Event.OVERRULED): Phase.PAUSED,
    (Phase.COMPLETED, Event.LOWERED): Phase.PAUSED,
    (Phase.COMPLETED, Event.EMPTIED): Phase.BASELINE,
    (Phase.COMPLETED, Event.PAUSED): Phase.PAUSED,
    (Phase.COMPLETED, Event.ROLLED_BACK): Phase.ROLLED_BACK,
    (Phase.COMPLETED, Event.REARMED): Phase.BASELINE,
    (Phase.COMPLETED, Event.MISMATCHED): Phase.COMPLETED,
    (Phase.ROLLED_BACK, Event.REARMED): Phase.BASELINE,
}
_IN_A_PERSONS_HANDS = {
    Phase.BASELINE: "nobody has the fine-tuned model; the first step is a person's: `gateway rollout advance`",
    Phase.PAUSED: "it is paused and nothing moves by itself; `gateway rollout resume` lets it go on",
    Phase.ROLLED_BACK: "it was rolled back; `gateway rollout rearm` begins a new experiment",
}


class Decision(NamedTuple):
    """What becomes of a rollout: its next state, and the change that leads there; None where it stays as it is."""

    state: RolloutState
    change: Change | None
    reasons: tuple[str, ...]
    evidence: str

    @property
    def action(self) -> str:
        """What happened, in a word; "stay" where nothing did."""
        return self.change.event.value if self.change else "stay"


class Recommendation(NamedTuple):
    """What a report says should be done: proceed, hold or roll back."""

    word: str
    reasons: tuple[str, ...]


class Cause(NamedTuple):
    """What a change rests on. `why` is what a person said."""

    at_ms: int
    by: str
    reasons: tuple[str, ...]
    evidence: str = ""
    why: str = ""
    is_forced: bool = False
    has_mismatch: bool = False


def begin(agent: str, *, plan: RolloutPlan, now_ms: int, by: str = PILOT) -> Decision:
    """An agent's first state, at the share where its policy says that a rollout starts."""
    share = plan.start_bps
    reasons = (f"the policy's ab_testing.rollout_percentage starts it at {percent(share)}",)
    change = Change(
        agent=agent,
        version=1,
        at_ms=now_ms,
        by=by,
        event=Event.BEGAN,
        from_phase=Phase.BASELINE,
        phase=Phase.RAMPING if share else Phase.BASELINE,
        from_bps=0,
        share_bps=share,
        experiment=1,
        why="",
        reasons=reasons,
        evidence="",
    )
    return Decision(after(None, change), change, reasons, "")


def advance(state: RolloutState, look: Look | None, *, now_ms: int, plan: RolloutPlan) -> Decision:
    """The next step that a rollout takes by itself, one at most; `look` is None where nothing is known."""
    judged = judge(state, look, now_ms=now_ms, plan=plan)
    figures = summary(look)
    known = _that_counts(state, look, now_ms=now_ms, plan=plan)
    is_found = known is not None and known.evidence.mismatch.is_found
    above = above_ceiling(state.share_bps, plan.ceiling_bps)

    def goes(event: Event, share_bps: int, reasons: tuple[str, ...] = judged.reasons) -> Decision:
        return change_by(state, event, share_bps, Cause(now_ms, PILOT, reasons, figures, has_mismatch=is_found))

    def stays(*first: str) -> Decision:
        # With more users a mismatch may look like none again, so the first one is noted, whoever has it in hand.
        if known is not None and is_found and not state.has_mismatch and (state.phase, Event.MISMATCHED) in TRANSITIONS:
            return goes(Event.MISMATCHED, state.share_bps, (mismatched(known.evidence.mismatch),))
        return Decision(state, None, (*first, *judged.reasons), figures)

    # 1. Whoever took it in hand keeps it, whatever the evidence says: that is told, and they decide.
    if state.phase in _IN_A_PERSONS_HANDS:
        return stays(_IN_A_PERSONS_HANDS[state.phase], standing(state))
    # 2. Taking back is not a step of the plan: it happens in manual mode, too.
    if judged.opinion is Opinion.ROLL_BACK and plan.rollback_on != "nothing":
        return goes(Event.ROLLED_BACK, 0)
    if not plan.is_automatic:
        return stays(*above or ("rollout.mode is manual: `gateway rollout advance` takes the next step",))
    if state.phase is Phase.COMPLETED:
        return stays("the rollout is complete, and still watched", *above)
    # 3. A hold ends when fresh evidence no longer objects; missing evidence ends nothing.
    if judged.opinion.is_objection:
        return stays(*above) if state.phase is Phase.HOLD else goes(Event.HELD, state.share_bps)
    if state.phase is Phase.HOLD:
        if known is None:
            return stays("a hold ends with fresh evidence alone", *above)
        return goes(Event.CLEARED, state.share_bps)
    # 4. A reload moves no share, not even one that the holdback no longer leaves room for: its users are a person's to
    # take back. Until then there is no next step.
    if above or judged.opinion is not Opinion.PROCEED:
        return stays(*above)
    # 5. Every condition is met.
    share = plan.next_bps(state.share_bps)
    return goes(Event.COMPLETED, state.share_bps) if share is None else goes(Event.RAISED, share)


def recommendation(state: RolloutState, look: Look | None, *, now_ms: int, plan: RolloutPlan) -> Recommendation:
    """What should be done with a rollout by its evidence, whoever has it in hand; for reports."""
    judged = judge(state, look, now_ms=now_ms, plan=plan)
    above = above_ceiling(state.share_bps, plan.ceiling_bps)
    if state.phase is Phase.ROLLED_BACK:
        judged = Judgement(Opinion.HOLD, (_IN_A_PERSONS_HANDS[state.phase], standing(state)))
    elif above and judged.opinion is not Opinion.ROLL_BACK:
        judged = Judgement(Opinion.HOLD, (*above, *judged.reasons))
    return Recommendation(judged.opinion.recommendation, (*judged.reasons, *asides(look, plan)))


def _that_counts(state: RolloutState, look: Look | None, *, now_ms: int, plan: RolloutPlan) -> Look | None:
    """This look where `judge` goes by it: one of this experiment, and not stale."""
    if look is None or look.experiment != state.experiment or now_ms - look.at_ms > plan.stale_ms:
        return None
    return look


def change_by(state: RolloutState, event: Event, share_bps: int, cause: Cause) -> Decision:
    """The step that the table has for this event, with its row in the audit log."""
    change = Change(
        agent=state.agent,
        version=state.version + 1,
        at_ms=cause.at_ms,
        by=cause.by,
        event=event,
        from_phase=state.phase,
        phase=TRANSITIONS[state.phase, event],
        from_bps=state.share_bps,
        share_bps=share_bps,
        experiment=state.experiment + (event is Event.REARMED),
        why=cause.why,
        reasons=cause.reasons,
        evidence=cause.evidence,
        is_forced=cause.is_forced,
        has_mismatch=cause.has_mismatch,
    )
    return Decision(after(state, change), change, cause.reasons, cause.evidence)
