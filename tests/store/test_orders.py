"""Orders: carried out whole with their row in the audit log, or refused with nothing changed."""

from pathlib import Path

import pytest

from gateway.decide.rollout import Decision
from gateway.decide.rollout_by_hand import Order, Refusal, pause
from gateway.domain.rollout import Event, Phase, RolloutState
from gateway.store.experiments import Experiments
from gateway.store.looks import look_at
from gateway.store.orders import ACTIONS, Action, Wish, carry_out, rests_on_evidence, state_of
from tests.rolling import NOW_MS, PLAN
from tests.steering import bring, told, users_at

ANN = Order("ann", NOW_MS + 1_000, "because")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "gateway.db"


def opened(store: Path) -> Experiments:
    return Experiments(store, clock=lambda: NOW_MS / 1000)


def begun(experiments: Experiments) -> RolloutState:
    return state_of(experiments, "dev", "qa_agent", PLAN, now_ms=NOW_MS, by="ann")


def ordered(store: Path, action: Action, percent: float = 0.0, order: Order = ANN) -> Decision | Refusal:
    """By what the store says now."""
    with opened(store) as experiments:
        state = begun(experiments)
        look = look_at(experiments, "dev", state, PLAN, now_ms=order.now_ms)
        return carry_out(experiments, "dev", PLAN, Wish(action, percent), order, state=state, look=look)


def test_what_nobody_has_begun_begins_once(store: Path) -> None:
    with opened(store) as experiments:
        assert begun(experiments) == state_of(experiments, "dev", "qa_agent", PLAN, now_ms=NOW_MS + 5, by="bob")
    assert [(change.event, change.by) for change in told(store)[1]] == [("began", "ann")]


@pytest.mark.parametrize(
    ("way", "phase", "share_bps"),
    [
        ([("set", 25)], Phase.RAMPING, 2500),
        ([("set", 5)], Phase.PAUSED, 500),
        ([("set", 100)], Phase.RAMPING, 9500),
        ([("advance", 0)], Phase.RAMPING, 2500),
        ([("pause", 0)], Phase.PAUSED, 1000),
        ([("pause", 0), ("resume", 0)], Phase.RAMPING, 1000),
        ([("rollback", 0)], Phase.ROLLED_BACK, 0),
        ([("rollback", 0), ("rearm", 0)], Phase.BASELINE, 0),
    ],
    ids=str,
)
def test_each_order_is_carried_out_and_audited(
    store: Path, way: list[tuple[Action, float]], phase: Phase, share_bps: int
) -> None:
    for action, percent in way:
        done = ordered(store, action, percent)
        assert isinstance(done, Decision)
    states, changes = told(store)
    assert (states["qa_agent"].phase, states["qa_agent"].share_bps) == (phase, share_bps)
    assert [(change.by, change.why) for change in changes[1:]] == [("ann", "because")] * len(way)


@pytest.mark.parametrize(
    ("action", "percent"),
    [("set", 101), ("set", -1), ("set", float("nan")), ("set", 10), ("resume", 0), ("rearm", 0)],
)
def test_what_cannot_be_done_changes_nothing(store: Path, action: Action, percent: float) -> None:
    with opened(store) as experiments:
        begun(experiments)
    before = told(store)
    assert isinstance(ordered(store, action, percent), Refusal)
    assert told(store) == before


def test_raising_against_the_evidence_wants_force_and_a_reason(store: Path) -> None:
    with opened(store) as experiments:
        bring(store, users_at(begun(experiments), success=(0.97, 0.5)))
    before = told(store)
    for order in (ANN, Order("ann", NOW_MS, "", is_forced=True)):
        refused = ordered(store, "set", 25, order)
        assert isinstance(refused, Refusal)
        assert refused.can_force
        assert told(store) == before
    done = ordered(store, "set", 25, ANN._replace(is_forced=True))
    assert isinstance(done, Decision)
    (*_, change) = told(store)[1]
    assert (change.event, change.is_forced, change.phase) == (Event.OVERRULED, True, Phase.PAUSED)


def test_what_somebody_else_changed_meanwhile_is_not_overwritten(store: Path) -> None:
    with opened(store) as experiments:
        state = begun(experiments)
        other = pause(state, Order("bob", NOW_MS))
        assert isinstance(other, Decision)
        assert other.change is not None
        experiments.apply("dev", other.change)
        before = told(store)
        refused = carry_out(experiments, "dev", PLAN, Wish("rollback"), ANN, state=state, look=None)
    assert isinstance(refused, Refusal)
    assert "somebody else has just changed it" in refused.reasons[0]
    assert told(store) == before


def test_only_what_gives_more_users_the_model_rests_on_the_evidence(store: Path) -> None:
    with opened(store) as experiments:
        state = begun(experiments)
    assert {action for action in ACTIONS if rests_on_evidence(state, Wish(action))} == {"advance", "resume"}
    found = [rests_on_evidence(state, Wish("set", percent)) for percent in (0, 9.99, 10, 10.01, 100)]
    assert found == [False, False, False, True, True]
