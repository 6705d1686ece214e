"""A rollout in the store is what its changes add up to, and only the next change can be made."""

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.decide.rollout import Cause, change_by
from gateway.domain.rollout import Change, Event, replay
from gateway.store.rollouts import (
    Conflict,
    drop_lead,
    load_changes,
    load_rollouts,
    load_state,
    load_states,
    make,
    take_lead,
)
from gateway.store.schema import open_database
from tests.rolling import HOUR_MS, NOW_MS, first


@pytest.fixture
def database(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    database = open_database(tmp_path / "ledger.db")
    yield database
    database.close()


def changed(before: object, event: Event, share_bps: int, at_ms: int = NOW_MS + HOUR_MS) -> Change:
    decision = change_by(before, event, share_bps, Cause(at_ms, "ann", ("because",)))  # type: ignore[arg-type]
    assert decision.change is not None
    return decision.change


def begun() -> Change:
    change = first().change
    assert change is not None
    return change


def test_a_state_is_what_the_changes_add_up_to(database: sqlite3.Connection) -> None:
    state = make(database, "dev", begun())
    for event, share in ((Event.RAISED, 2_500), (Event.PAUSED, 2_500), (Event.RESUMED, 2_500), (Event.ROLLED_BACK, 0)):
        state = make(database, "dev", changed(state, event, share))
        assert load_state(database, "dev", "qa_agent") == state == replay(load_changes(database, "dev", None, None))
    assert load_states(database, "dev") == {"qa_agent": state}
    assert load_rollouts(database) == [("dev", state)]
    assert load_states(database, "production") == {}
    assert load_state(database, "dev", "legal_agent") is None


def test_a_change_that_comes_late_is_refused_and_nothing_is_written(database: sqlite3.Connection) -> None:
    state = make(database, "dev", begun())
    raised, paused = changed(state, Event.RAISED, 2_500), changed(state, Event.PAUSED, 1_000)
    after = make(database, "dev", raised)
    with pytest.raises(Conflict, match=r"qa_agent has moved on meanwhile: it is at version 2, by ann, .* version 2"):
        make(database, "dev", paused)
    with pytest.raises(Conflict, match="has moved on"):
        make(database, "dev", begun())
    assert load_states(database, "dev") == {"qa_agent": after}
    assert load_changes(database, "dev", "qa_agent", None) == [begun(), raised]


def test_a_rollout_that_has_not_begun_cannot_go_on(database: sqlite3.Connection) -> None:
    with pytest.raises(Conflict, match="version 0, by nobody"):
        make(database, "dev", changed(first().state, Event.RAISED, 2_500))
    assert load_rollouts(database) == []
    assert load_changes(database, "dev", None, None) == []


def test_the_log_tells_the_latest_changes_oldest_first(database: sqlite3.Connection) -> None:
    state = make(database, "dev", begun())
    raised = changed(state, Event.RAISED, 2_500)
    make(database, "dev", raised)
    make(database, "production", begun())
    assert load_changes(database, "dev", None, None) == [begun(), raised]
    assert load_changes(database, "dev", "qa_agent", 1) == [raised]
    assert load_changes(database, "dev", None, 0) == []
    assert load_changes(database, "dev", "legal_agent", None) == []
    assert load_changes(database, "production", None, 5) == [begun()]


def test_one_leads_until_it_lets_go_or_is_silent_for_too_long(database: sqlite3.Connection) -> None:
    def leads(holder: str, now_ms: int, env: str = "dev") -> bool:
        return take_lead(database, env, holder, now_ms=now_ms, ttl_ms=1_000)

    assert leads("one", 0)
    assert not leads("other", 999)
    assert leads("other", 999, env="production")
    # Whoever says so again leads on.
    assert leads("one", 999)
    assert not leads("other", 1_998)
    assert leads("other", 1_999)
    assert not leads("one", 2_000)
    drop_lead(database, "dev", "one")
    assert not leads("one", 2_000)
    drop_lead(database, "dev", "other")
    assert leads("one", 2_000)


def test_a_lead_from_before_the_clock_went_back_is_none(database: sqlite3.Connection) -> None:
    assert take_lead(database, "dev", "one", now_ms=3_600_000, ttl_ms=1_000)
    assert take_lead(database, "dev", "other", now_ms=0, ttl_ms=1_000)
    assert not take_lead(database, "dev", "one", now_ms=1, ttl_ms=1_000)
