"""How far an agent's rollout has come, and each change to it as the audit log keeps it. Values only.

What may follow what is decided in decide/rollout.py. The one invariant: a state is the sum of its changes, and nothing
else. `after` is the only way from one state to the next, so the audit log can leave nothing out.
"""

from collections.abc import Iterable
from enum import StrEnum

import msgspec

# Who made a change that no person made.
PILOT = "pilot"


class Phase(StrEnum):
    """Where a rollout stands. Only ramping, hold and completed ever change without a person."""

    BASELINE = "baseline"  # Nobody has the fine-tuned model, and nobody was refused it.
    RAMPING = "ramping"
    HOLD = "hold"  # The evidence speaks against a further step; it goes on when that clears.
    PAUSED = "paused"  # A person has it in hand.
    ROLLED_BACK = "rolled_back"
    COMPLETED = "completed"  # The last stage has baked, too.


class Event(StrEnum):
    """What can happen to a rollout."""

    BEGAN = "began"
    RAISED = "raised"
    OVERRULED = "overruled"  # Raised by a person against the evidence.
    LOWERED = "lowered"
    EMPTIED = "emptied"  # Lowered to nobody.
    HELD = "held"
    CLEARED = "cleared"
    PAUSED = "paused"
    RESUMED = "resumed"
    COMPLETED = "completed"
    ROLLED_BACK = "rolled_back"
    REARMED = "rearmed"
    MISMATCHED = "mismatched"  # The arms were found not to have their users. A note: it moves nothing.


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """One row of the audit log: who changed what, when, why, and on which evidence.

    `version` is that of the state it leads to. `why` is what the person said; `reasons` are the gateway's own sentences
    and `evidence` the figures at that time. `is_forced`: the evidence said no. `has_mismatch`: the arms were found not
    to have the users they should.
    """

    agent: str
    version: int
    at_ms: int
    by: str
    event: Event
    from_phase: Phase
    phase: Phase
    from_bps: int
    share_bps: int
    experiment: int
    why: str
    reasons: tuple[str, ...]
    evidence: str
    is_forced: bool = False
    has_mismatch: bool = False


class RolloutState(msgspec.Struct, frozen=True, kw_only=True):
    """One agent's rollout. Times are unix milliseconds, shares of 10,000.

    `version` rises by one with each change, so a store can tell who came late. `stage` counts the times with one share
    each: it names the stratum that calls belong to. `experiment` counts from 1, and began with `first_stage`: what
    earlier stages saw is not evidence of this one. `previous_bps` is the share before the present one. `changed_ms`,
    `by` and `why` tell who brought it where it stands. `has_mismatch`: the arms of this experiment were once found not
    to have the users they should; that stays until a new one begins.
    """

    agent: str
    version: int
    phase: Phase
    share_bps: int
    previous_bps: int
    stage: int
    share_since_ms: int
    experiment: int
    experiment_since_ms: int
    first_stage: int
    changed_ms: int
    by: str
    why: str
    has_mismatch: bool = False

    @property
    def stratum(self) -> str:
        """The name of its present stage, as calls are counted by."""
        return f"{self.agent}/{self.stage}"


def after(state: RolloutState | None, change: Change) -> RolloutState:
    """The state that a change leads to; None is before the first. Raises ValueError if it does not follow on it."""
    before = (change.agent, 0, Phase.BASELINE, 0, 0) if state is None else _place(state)
    experiment = before[-1] + (change.event in (Event.BEGAN, Event.REARMED))
    said = (change.agent, change.version - 1, change.from_phase, change.from_bps, before[-1])
    if said != before or change.experiment != experiment or (state is None) != (change.event is Event.BEGAN):
        raise ValueError(f"change {change.version} of {change.agent!r} does not follow on version {before[1]}")
    is_new_experiment = state is None or experiment != state.experiment
    is_new_stage = is_new_experiment or change.share_bps != change.from_bps
    stage = (state.stage if state else 0) + is_new_stage
    changed_ms, by, why = _brought(state, change)
    return RolloutState(
        agent=change.agent,
        version=change.version,
        phase=change.phase,
        share_bps=change.share_bps,
        previous_bps=_kept(state, change),
        stage=stage,
        share_since_ms=change.at_ms if state is None or is_new_stage else state.share_since_ms,
        experiment=experiment,
        experiment_since_ms=change.at_ms if state is None or is_new_experiment else state.experiment_since_ms,
        first_stage=stage if state is None or is_new_experiment else state.first_stage,
        changed_ms=changed_ms,
        by=by,
        why=why,
        has_mismatch=change.has_mismatch or (state is not None and not is_new_experiment and state.has_mismatch),
    )


def replay(changes: Iterable[Change]) -> RolloutState:
    """The state that an agent's whole audit log tells of. Raises ValueError at a gap, or where there is nothing."""
    state: RolloutState | None = None
    for change in changes:
        state = after(state, change)
    if state is None:
        raise ValueError("no change, so no state")
    return state


def _place(state: RolloutState) -> tuple[str, int, Phase, int, int]:
    return state.agent, state.version, state.phase, state.share_bps, state.experiment


def _brought(state: RolloutState | None, change: Change) -> tuple[int, str, str]:
    """When it came where it stands, by whom and why. A note is no step: who paused it stays the one who did."""
    if state is not None and change.event is Event.MISMATCHED:
        return state.changed_ms, state.by, state.why
    return change.at_ms, change.by, change.why or change.reasons[0]


def _kept(state: RolloutState | None, change: Change) -> int:
    """The share before the present one: a change that moves nobody leaves it as it was."""
    if state is None or change.share_bps != change.from_bps:
        return change.from_bps
    return state.previous_bps
