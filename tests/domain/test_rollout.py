"""A rollout's state is the sum of its changes: nothing is left out, nothing is made up."""

import msgspec
import pytest

from gateway.domain.rollout import PILOT, Change, Event, Phase, RolloutState, after, replay

START = Change(
    agent="qa_agent",
    version=1,
    at_ms=1_000,
    by=PILOT,
    event=Event.BEGAN,
    from_phase=Phase.BASELINE,
    phase=Phase.RAMPING,
    from_bps=0,
    share_bps=1_000,
    experiment=1,
    why="",
    reasons=("it begins",),
    evidence="",
)
RAISED = msgspec.structs.replace(
    START, version=2, at_ms=2_000, event=Event.RAISED, from_phase=Phase.RAMPING, from_bps=1_000, share_bps=2_500
)
PAUSED = msgspec.structs.replace(
    RAISED, version=3, at_ms=3_000, event=Event.PAUSED, phase=Phase.PAUSED, from_bps=2_500, by="ann", why="holidays"
)
ROLLED_BACK = msgspec.structs.replace(
    PAUSED, version=4, at_ms=4_000, event=Event.ROLLED_BACK, from_phase=Phase.PAUSED, phase=Phase.ROLLED_BACK,
    share_bps=0,
)  # fmt: skip
REARMED = msgspec.structs.replace(
    ROLLED_BACK, version=5, at_ms=5_000, event=Event.REARMED, from_phase=Phase.ROLLED_BACK, phase=Phase.BASELINE,
    from_bps=0, experiment=2,
)  # fmt: skip
LOG = [START, RAISED, PAUSED, ROLLED_BACK, REARMED]


def test_a_state_says_since_when_its_share_holds_and_which_was_before() -> None:
    state = replay(LOG[:2])
    assert state == RolloutState(
        agent="qa_agent", version=2, phase=Phase.RAMPING, share_bps=2_500, previous_bps=1_000, stage=2,
        share_since_ms=2_000, experiment=1, experiment_since_ms=1_000, first_stage=1, changed_ms=2_000, by=PILOT,
        why="it begins",
    )  # fmt: skip
    assert state.stratum == "qa_agent/2"


def test_a_change_that_moves_nobody_begins_no_new_stage() -> None:
    raised, paused = replay(LOG[:2]), replay(LOG[:3])
    assert (paused.stage, paused.share_since_ms, paused.previous_bps) == (raised.stage, 2_000, 1_000)
    assert (paused.phase, paused.changed_ms, paused.by, paused.why) == (Phase.PAUSED, 3_000, "ann", "holidays")


def test_a_mismatch_that_is_noted_changes_nothing_of_who_brought_it_there() -> None:
    paused = replay(LOG[:3])
    note = msgspec.structs.replace(
        PAUSED, version=4, at_ms=3_500, event=Event.MISMATCHED, by=PILOT, why="", from_phase=Phase.PAUSED,
        from_bps=2_500, has_mismatch=True,
    )  # fmt: skip
    assert after(paused, note) == msgspec.structs.replace(paused, version=4, has_mismatch=True)


def test_a_new_experiment_is_a_new_stage_though_the_share_is_the_same() -> None:
    rolled_back, rearmed = replay(LOG[:4]), replay(LOG)
    assert rolled_back.share_bps == rearmed.share_bps == 0
    assert (rolled_back.stage, rolled_back.experiment, rolled_back.first_stage) == (3, 1, 1)
    assert (rearmed.stage, rearmed.experiment, rearmed.first_stage) == (4, 2, 4)
    assert (rearmed.experiment_since_ms, rearmed.share_since_ms) == (5_000, 5_000)


def test_the_log_tells_the_same_after_it_was_written_and_read() -> None:
    lines = [msgspec.json.encode(change) for change in LOG]
    assert replay(msgspec.json.decode(line, type=Change) for line in lines) == replay(LOG)
    assert msgspec.json.decode(msgspec.json.encode(replay(LOG)), type=RolloutState) == replay(LOG)


@pytest.mark.parametrize("missing", range(len(LOG) - 1))
def test_a_log_with_a_gap_is_not_believed(missing: int) -> None:
    with pytest.raises(ValueError, match="does not follow"):
        replay(LOG[:missing] + LOG[missing + 1 :])


@pytest.mark.parametrize(
    "wrong",
    [
        {"version": 4},
        {"version": 2},
        {"agent": "legal_agent"},
        {"from_phase": Phase.HOLD},
        {"from_bps": 1_000},
        {"experiment": 2},
        {"event": Event.REARMED},
        {"event": Event.BEGAN},
    ],
    ids=str,
)
def test_a_change_that_tells_of_another_state_is_not_believed(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="does not follow"):
        after(replay(LOG[:2]), msgspec.structs.replace(PAUSED, **wrong))


def test_a_log_begins_with_a_beginning_and_has_one_alone() -> None:
    with pytest.raises(ValueError, match="does not follow"):
        after(None, msgspec.structs.replace(START, event=Event.RAISED, experiment=0))
    with pytest.raises(ValueError, match="does not follow"):
        after(replay(LOG[:2]), msgspec.structs.replace(PAUSED, event=Event.BEGAN, experiment=2))


def test_nothing_happened_so_there_is_no_state() -> None:
    with pytest.raises(ValueError, match="no change"):
        replay([])
