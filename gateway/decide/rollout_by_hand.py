"""What a person may order of a rollout: each order leads to a step, or to a refusal that says what to do instead.

Lowering is always allowed. Raising is refused where the evidence speaks against it, unless the person overrules it with
a reason: then the rollout is paused, as it is theirs from there on. The one invariant: what was rolled back does not
rise again before it was re-armed, whoever orders it.
"""

from typing import NamedTuple

from gateway.decide.rollout import TRANSITIONS, Cause, Decision, change_by
from gateway.decide.rollout_evidence import Look, asides, judge, summary
from gateway.decide.rollout_plan import RolloutPlan
from gateway.decide.rollout_words import above_ceiling, percent, standing
from gateway.domain.rollout import Event, Phase, RolloutState
from gateway.domain.rollout_policy import bps_of

MAX_WHY = 1_000
_FINEST_PERCENT = 0.01


class Order(NamedTuple):
    """Who orders it, when, why, and whether the evidence is to be overruled. `why` may be "" unless it is."""

    by: str
    now_ms: int
    why: str = ""
    is_forced: bool = False


class Refusal(NamedTuple):
    """Why an order was not carried out; nothing has changed. `can_force`: with force and a reason it would be."""

    reasons: tuple[str, ...]
    can_force: bool = False


def wrong_percent(to_percent: float) -> str:
    """Why this can be no share, however a rollout stands; "" where it can."""
    if not 0 <= to_percent <= 100:  # So that nan is none, either.
        return f"{to_percent:g} is no percentage: a share is 0 to 100"
    is_lost = to_percent > 0 and not bps_of(to_percent)
    if is_lost or abs(bps_of(to_percent) * _FINEST_PERCENT - to_percent) > 1e-9:
        return f"{to_percent:g} is too fine: shares go in steps of {_FINEST_PERCENT:g} %"
    return ""


def set_share(
    state: RolloutState, to_percent: float, order: Order, *, look: Look | None, plan: RolloutPlan
) -> Decision | Refusal:
    """A share by its percentage, of the plan or not. The holdback stays: 100 means all but it."""
    if wrong := wrong_percent(to_percent):
        return Refusal((wrong,))
    wanted = min(bps_of(to_percent), plan.ceiling_bps)
    notes = _held_back(bps_of(to_percent), plan)
    if wanted == state.share_bps:
        return Refusal((f"the share is {percent(wanted)} already", *notes))
    if wanted > state.share_bps:
        return _raise(state, wanted, order, look=look, plan=plan, notes=notes)
    said = f"{order.by} lowered it from {percent(state.share_bps)} to {percent(wanted)}"
    taken = "the last users added have the baseline again"
    event = Event.LOWERED if wanted else Event.EMPTIED
    return _carry_out(state, event, wanted, order, look=look, reasons=(f"{said}: {taken}", *notes))


def next_stage(state: RolloutState, order: Order, *, look: Look | None, plan: RolloutPlan) -> Decision | Refusal:
    """One stage up; at the last stage the rollout is completed."""
    if above := above_ceiling(state.share_bps, plan.ceiling_bps):
        return Refusal(above)
    share = plan.next_bps(state.share_bps)
    if share is not None:
        return _raise(state, share, order, look=look, plan=plan)
    judged = judge(state, look, now_ms=order.now_ms, plan=plan)
    if judged.opinion.is_objection:
        # Nobody's model would change, so force would be for the word alone.
        return Refusal(("the rollout is at its last stage, and cannot be called complete", *judged.reasons))
    said = f"{order.by} completed it at {percent(state.share_bps)}"
    return _carry_out(state, Event.COMPLETED, state.share_bps, order, look=look, reasons=(said, *judged.reasons))


def pause(state: RolloutState, order: Order) -> Decision | Refusal:
    """From now on nothing moves by itself, neither up nor back."""
    said = f"{order.by} paused it at {percent(state.share_bps)}"
    return _carry_out(state, Event.PAUSED, state.share_bps, order, reasons=(said,))


def resume(state: RolloutState, order: Order, *, look: Look | None, plan: RolloutPlan) -> Decision | Refusal:
    """Gives it back to the plan, which may take it back at once if the evidence says so."""
    judged = judge(state, look, now_ms=order.now_ms, plan=plan)
    said = f"{order.by} resumed it at {percent(state.share_bps)}"
    warned = ("the evidence speaks against it:", *judged.reasons) if judged.opinion.is_objection else ()
    return _carry_out(state, Event.RESUMED, state.share_bps, order, look=look, reasons=(said, *warned))


def roll_back(state: RolloutState, order: Order, *, look: Look | None = None) -> Decision | Refusal:
    """Everyone gets the baseline, until it is re-armed."""
    said = f"{order.by} rolled it back from {percent(state.share_bps)}: everyone has the baseline"
    return _carry_out(state, Event.ROLLED_BACK, 0, order, look=look, reasons=(said,))


def rearm(state: RolloutState, order: Order) -> Decision | Refusal:
    """A new experiment from the baseline; what earlier ones saw no longer counts."""
    said = f"{order.by} re-armed it: experiment {state.experiment + 1} begins, with nobody in it yet"
    return _carry_out(state, Event.REARMED, 0, order, reasons=(said,))


def _raise(
    state: RolloutState,
    share_bps: int,
    order: Order,
    *,
    look: Look | None,
    plan: RolloutPlan,
    notes: tuple[str, ...] = (),
) -> Decision | Refusal:
    said = f"{order.by} raised it from {percent(state.share_bps)} to {percent(share_bps)}"
    judged = judge(state, look, now_ms=order.now_ms, plan=plan)
    reasons = (said, *notes, *judged.reasons, *asides(look, plan))
    if not judged.opinion.is_objection:
        return _carry_out(state, Event.RAISED, share_bps, order, look=look, reasons=reasons)
    # Where even force would not do, that is told and not the evidence.
    if (state.phase, Event.OVERRULED) in TRANSITIONS and not order.is_forced:
        return Refusal((f"the evidence speaks against {percent(share_bps)}", *judged.reasons), can_force=True)
    paused = "against the evidence, so it is paused: `gateway rollout resume` gives it back to the plan"
    return _carry_out(state, Event.OVERRULED, share_bps, order, look=look, reasons=(*reasons, paused))


def _carry_out(
    state: RolloutState,
    event: Event,
    share_bps: int,
    order: Order,
    *,
    look: Look | None = None,
    reasons: tuple[str, ...],
) -> Decision | Refusal:
    """The step, if there is one from here, and if the order says what it must."""
    if (state.phase, event) not in TRANSITIONS:
        return Refusal((_cannot(state, event), standing(state)))
    if not order.by:
        return Refusal(("nobody is named who orders it, and the audit log wants to know",))
    if len(order.why) > MAX_WHY:
        return Refusal((f"the reason is longer than {MAX_WHY} characters",))
    is_forced = event is Event.OVERRULED
    if is_forced and not order.why.strip():
        return Refusal(("to overrule the evidence wants a reason, which the audit log keeps",), can_force=True)
    cause = Cause(order.now_ms, order.by, reasons, summary(look), order.why, is_forced)
    return change_by(state, event, share_bps, cause)


def _cannot(state: RolloutState, event: Event) -> str:
    """Why there is no such step from this phase, and which one there is."""
    if state.phase is Phase.ROLLED_BACK and event is not Event.ROLLED_BACK:
        return "it was rolled back; `gateway rollout rearm` begins a new experiment, from which it can rise"
    if event is Event.REARMED:
        return f"it is running ({state.phase}); `gateway rollout rollback` or `pause` it first"
    return {
        Event.PAUSED: f"there is nothing to pause: it is {state.phase}",
        Event.RESUMED: f"there is nothing to resume: it is {state.phase}",
        Event.COMPLETED: f"there is nothing to complete: it is {state.phase}",
        Event.ROLLED_BACK: f"there is nothing to roll back: it is {state.phase}",
    }.get(event, f"from {state.phase} there is no such step")


def _held_back(asked_bps: int, plan: RolloutPlan) -> tuple[str, ...]:
    if asked_bps <= plan.ceiling_bps:
        return ()
    return (f"rollout.holdback_percent keeps a control, so {percent(plan.ceiling_bps)} is the most",)
