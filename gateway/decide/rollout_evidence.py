"""What the evidence says of a rollout, whatever phase it is in: go on, wait, hold or roll back, and why.

Judges and changes nothing; the verdicts themselves are those of decide/compare.py. Its one invariant: `PROCEED` wants
every condition met at the present share, so where nothing is known it is never the answer.

Only metrics with a guardrail decide: the errors that `alpha` allows are shared out among these. The margin says how
much worse is still acceptable, so a metric that is worse within its margin is no objection; a fine-tuned model that
costs more would otherwise never get anywhere.
"""

from enum import StrEnum
from typing import NamedTuple

from gateway.decide.rollout_plan import RolloutPlan
from gateway.decide.rollout_words import MORE_IS_BETTER, compared, guarded, how_long, mismatched, percent
from gateway.domain.experiment import Evidence, Finding, Guardrail
from gateway.domain.rollout import Phase, RolloutState
from gateway.domain.rollout_policy import ALL_BPS
from gateway.domain.spans import format_time


class Look(NamedTuple):
    """What was found when an experiment was looked at: its evidence, and of when and what that is.

    `experiment` and `stage` are those of the state it was gathered for; `users_*` were seen in that stage alone.
    """

    evidence: Evidence
    at_ms: int
    experiment: int
    stage: int
    users_treated: int
    users_control: int


class Opinion(StrEnum):
    """What the evidence says. Only `HOLD` and `ROLL_BACK` speak against a raise by hand."""

    PROCEED = "proceed"
    WAIT = "wait"  # Nothing against it, and not yet enough for it.
    NO_DATA = "no data"
    HOLD = "hold"
    ROLL_BACK = "roll back"

    @property
    def is_objection(self) -> bool:
        """Whether it speaks against more users."""
        return self in (Opinion.HOLD, Opinion.ROLL_BACK)

    @property
    def recommendation(self) -> str:
        """In the three words that reports use: proceed, hold or roll back."""
        return "hold" if self in (Opinion.WAIT, Opinion.NO_DATA) else self.value


class Judgement(NamedTuple):
    """An opinion and its reasons, at least one."""

    opinion: Opinion
    reasons: tuple[str, ...]


def judge(state: RolloutState, look: Look | None, *, now_ms: int, plan: RolloutPlan) -> Judgement:
    """What this look says of this rollout, at `now_ms`."""
    missing = _why_no_data(state, look, now_ms=now_ms, plan=plan)
    if look is None or missing:
        return _with_one_arm(state, now_ms=now_ms, plan=plan) or Judgement(Opinion.NO_DATA, (missing,))
    guards = [(_finding(look.evidence, guardrail), guardrail) for guardrail in plan.terms.guardrails]
    breached = [guarded(found, by) for found, by in guards if found and found.guard == "breached"]
    worse = [(found, by) for found, by in guards if found and found.verdict == "worse" and _is_open(found)]
    told = [guarded(found, by) for found, by in worse]
    mismatch = _mismatch(state, look)
    if breached or (worse and plan.rollback_on == "worse"):
        return Judgement(Opinion.ROLL_BACK, (*breached, *told, *mismatch))
    # What is certainly worse, and by its likeliest value within the margin, is waited for: a model that costs more
    # would else be held at the beginning of every rollout.
    if mismatch or any(_is_past(found, by) for found, by in worse):
        return Judgement(Opinion.HOLD, (*mismatch, *told))
    if (alone := _with_one_arm(state, now_ms=now_ms, plan=plan)) is not None:
        return alone
    waits = [*_why_wait(state, look, now_ms=now_ms, plan=plan), *_why_unsure(guards)]
    if waits:
        return Judgement(Opinion.WAIT, tuple(waits))
    return Judgement(Opinion.PROCEED, (*(guarded(found, by) for found, by in guards if found), _enough(look, plan)))


def _mismatch(state: RolloutState, look: Look) -> list[str]:
    """That the arms do not have their users; a test that has decided stays decided for as long as its experiment."""
    if look.evidence.mismatch.is_found:
        return [mismatched(look.evidence.mismatch)]
    if state.has_mismatch:
        return ["the arms were found not to have the users they should, and that stays for the whole of an experiment"]
    return []


def summary(look: Look | None) -> str:
    """The evidence in one line, as the audit log keeps it; "" where there was none."""
    if look is None:
        return ""
    evidence = look.evidence
    found = [f"{compared(finding)} [{finding.verdict}, guardrail: {finding.guard}]" for finding in evidence.findings]
    arrivals = mismatched(evidence.mismatch) if evidence.mismatch.is_found else "users arrive as assigned"
    when = f"at {format_time(look.at_ms)}, experiment {look.experiment}, stage {look.stage}"
    users = f"users at this stage: {look.users_treated:,} and {look.users_control:,}"
    return "; ".join((when, users, *found, arrivals))


def asides(look: Look | None, plan: RolloutPlan) -> tuple[str, ...]:
    """What is worse and decides nothing, since no guardrail is set on it."""
    guarded_by = {guardrail.metric for guardrail in plan.terms.guardrails}
    findings = look.evidence.findings if look else ()
    return tuple(
        f"{compared(finding)}: worse, which decides nothing as long as no guardrail is set on it"
        for finding in findings
        if finding.verdict == "worse" and finding.metric not in guarded_by
    )


def _why_no_data(state: RolloutState, look: Look | None, *, now_ms: int, plan: RolloutPlan) -> str:
    """Why this look counts as none, or ""."""
    if look is None:
        return "there is no evidence yet, and without it no share is raised"
    if look.experiment != state.experiment:
        return f"the evidence is of experiment {look.experiment}, this is experiment {state.experiment}"
    if now_ms - look.at_ms > plan.stale_ms:
        age, every = how_long(now_ms - look.at_ms), how_long(plan.check_every_s * 1_000)
        return f"the evidence is {age} old, though it is gathered every {every}: it counts as none"
    return ""


def _with_one_arm(state: RolloutState, *, now_ms: int, plan: RolloutPlan) -> Judgement | None:
    """Where one arm is empty, so that no evidence will come; None where both have users."""
    # 1. Nobody has the fine-tuned model, and only a person changes that, whatever one waits for.
    if state.phase is Phase.BASELINE:
        first = percent(plan.stages[0].share_bps)
        said = f"at {percent(state.share_bps)} nobody has the fine-tuned model, so no evidence will come"
        return Judgement(Opinion.WAIT, (f"{said}; `gateway rollout advance` begins at {first}",))
    # 2. Everybody has it, without a holdback: there is no control to compare with, so only time can tell.
    if state.share_bps < ALL_BPS:
        return None
    baking = _why_baking(state, now_ms=now_ms, plan=plan)
    said = "no control is left to compare with; rollout.holdback_percent would keep one"
    return Judgement(Opinion.WAIT if baking else Opinion.PROCEED, (*baking, said))


def _why_wait(state: RolloutState, look: Look, *, now_ms: int, plan: RolloutPlan) -> list[str]:
    if look.stage != state.stage:
        return [f"the evidence is from before the share became {percent(state.share_bps)}"]
    waits = _why_baking(state, now_ms=now_ms, plan=plan)
    least = plan.stage_at(state.share_bps).min_users
    if min(look.users_treated, look.users_control) < least:
        waits.append(
            f"{look.users_treated:,} users with the fine-tuned model and {look.users_control:,} with the baseline "
            f"were seen at {percent(state.share_bps)}; {least:,} of each are wanted"
        )
    return waits


def _why_baking(state: RolloutState, *, now_ms: int, plan: RolloutPlan) -> list[str]:
    bake_ms, lasted_ms = plan.stage_at(state.share_bps).bake_ms, now_ms - state.share_since_ms
    if lasted_ms >= bake_ms:
        return []
    share, lasted = percent(state.share_bps), how_long(max(0, lasted_ms))
    return [f"{share} has been in force for {lasted} of the {how_long(bake_ms)} that this stage bakes"]


def _why_unsure(guards: list[tuple[Finding | None, Guardrail]]) -> list[str]:
    unsure = [] if guards else ["no guardrail is set, so nothing says what would be good enough: rollout.guardrails"]
    for finding, guardrail in guards:
        if finding is None:
            unsure.append(f"{guardrail.metric} has a guardrail, and the evidence does not speak of it")
        elif finding.guard != "holds":
            unsure.append(guarded(finding, guardrail))
    return unsure


def _enough(look: Look, plan: RolloutPlan) -> str:
    count = len(plan.terms.guardrails)
    rails = "its guardrail holds" if count == 1 else f"{count} guardrails hold"
    return f"{rails}, in {look.users_treated:,} and {look.users_control:,} users at this stage, and it has baked"


def _finding(evidence: Evidence, guardrail: Guardrail) -> Finding | None:
    """What the evidence says of this guardrail; None where it was judged by another margin, before a reload say."""
    found = (finding for finding in evidence.findings if finding.metric == guardrail.metric)
    return next((finding for finding in found if finding.guardrail == guardrail), None)


def _is_past(finding: Finding, guardrail: Guardrail) -> bool:
    """Whether the likeliest value is worse by more than the margin."""
    change = finding.relative if guardrail.is_relative else finding.difference
    loss = 0.0 if change is None else -change if guardrail.metric in MORE_IS_BETTER else change
    return loss > guardrail.margin


def _is_open(finding: Finding) -> bool:
    return finding.guard not in ("holds", "breached")
