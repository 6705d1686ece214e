"""A look has all that the present experiment saw, and nothing of another one or of another stage."""

from pathlib import Path

import pytest

from gateway.decide.rollout import Cause, change_by
from gateway.domain.rollout import Event, RolloutState
from gateway.store.experiments import Experiments
from gateway.store.looks import look_at
from tests.rolling import NOW_MS, PLAN, first
from tests.steering import bring, users_at


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "gateway.db"


def begun(store: Path) -> RolloutState:
    change = first().change
    assert change is not None
    with Experiments(store, clock=lambda: NOW_MS / 1000) as experiments:
        return experiments.begin("dev", change)


def changed(store: Path, state: RolloutState, event: Event, share_bps: int) -> RolloutState:
    change = change_by(state, event, share_bps, Cause(state.changed_ms + 1, "ann", ("a test",))).change
    assert change is not None
    with Experiments(store, clock=lambda: NOW_MS / 1000) as experiments:
        return experiments.apply("dev", change)


def look(store: Path, state: RolloutState) -> tuple[int, int, int, int]:
    with Experiments(store, clock=lambda: NOW_MS / 1000) as experiments:
        found = look_at(experiments, "dev", state, PLAN, now_ms=NOW_MS)
    assert (found.experiment, found.stage, found.at_ms) == (state.experiment, state.stage, NOW_MS)
    return found.evidence.users_treated, found.evidence.users_control, found.users_treated, found.users_control


def test_where_nobody_was_seen_there_is_nothing(store: Path) -> None:
    assert look(store, begun(store)) == (0, 0, 0, 0)


def test_all_stages_of_an_experiment_are_evidence_and_only_the_present_one_is_counted_for_its_bake(store: Path) -> None:
    first_state = begun(store)
    bring(store, users_at(first_state, users=400))
    second = changed(store, first_state, Event.RAISED, 2500)
    treated, control, at_stage, _ = look(store, second)
    assert treated + control == 400
    assert at_stage == 0
    bring(store, users_at(second, users=100))
    _, _, at_stage, others = look(store, second)
    assert at_stage + others == 100


def test_users_arrive_once_every_call_that_began_with_theirs_has_ended(store: Path) -> None:
    state = begun(store)
    seen = users_at(state, users=400)
    bring(store, seen)
    begins_ms = seen[0].at_ms  # One user comes each millisecond.
    with Experiments(store, clock=lambda: NOW_MS / 1000) as experiments:
        # Of those who came later the faster arm's are known already, and the slower one's are not.
        for users in (0, 10, 399, 400):
            now_ms = begins_ms + users + 5_000
            found = look_at(experiments, "dev", state, PLAN._replace(longest_ms=5_000), now_ms=now_ms).evidence
            assert (found.mismatch.users, found.users_treated + found.users_control) == (users, 400)


def test_what_an_earlier_experiment_saw_does_not_count(store: Path) -> None:
    state = begun(store)
    bring(store, users_at(state, users=400))
    state = changed(store, changed(store, state, Event.ROLLED_BACK, 0), Event.REARMED, 0)
    assert state.experiment == 2
    assert look(store, state) == (0, 0, 0, 0)
