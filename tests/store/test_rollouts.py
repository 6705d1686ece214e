"""A rollout in the store is what its changes add up to, and only the next change can be made."""

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.decide.rollout import Cause, change_by
from gateway.domain.rollout import Change, Event, replay
from gateway.store.rollouts import (
    LEAD_MS,
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


def test_changes_follow_on_one_another_also_where_the_clock_went_back(database: sqlite3.Connection) -> None:
    state = make(database, "dev", begun())
    for number, hours in enumerate((2, 1, 3), start=2):
        change = change_by(
            state, Event.RAISED, number * 1_000, Cause(NOW_MS + hours * HOUR_MS, "ann", ("a test",))
        ).change
        assert change is not None
        state = make(database, "dev", change)
    for agent in ("qa_agent", None):
        changes = load_changes(database, "dev", agent, None)
        assert [change.version for change in changes] == [1, 2, 3, 4]
        assert replay(changes) == state
        assert [change.version for change in load_changes(database, "dev", agent, 1)] == [4]


def test_one_leads_until_it_lets_go_or_is_silent_for_too_long(database: sqlite3.Connection) -> None:
    def leads(holder: str, now_ms: int, env: str = "dev") -> bool:
        return take_lead(database, env, holder, now_ms=now_ms)

    assert leads("one", 0)
    assert not leads("other", LEAD_MS - 1)
    assert leads("other", LEAD_MS - 1, env="production")
    # Whoever says so again leads on.
    assert leads("one", LEAD_MS - 1)
    assert not leads("other", 2 * LEAD_MS - 2)
    assert leads("other", 2 * LEAD_MS - 1)
    assert not leads("one", 2 * LEAD_MS)
    drop_lead(database, "dev", "one")
    assert not leads("one", 2 * LEAD_MS)
    drop_lead(database, "dev", "other")
    assert leads("one", 2 * LEAD_MS)


@pytest.mark.parametrize("back_ms", [1, 400 * LEAD_MS])
def test_after_the_clock_went_back_nobody_waits_longer_than_a_lead_lasts(
    database: sqlite3.Connection, back_ms: int
) -> None:
    began_ms = 500 * LEAD_MS
    assert take_lead(database, "dev", "one", now_ms=began_ms)
    # It reaches further than any that was given by this clock, so it is none.
    now_ms = began_ms - back_ms
    assert take_lead(database, "dev", "other", now_ms=now_ms)
    assert not take_lead(database, "dev", "one", now_ms=now_ms)
    assert take_lead(database, "dev", "one", now_ms=now_ms + LEAD_MS)


def test_who_leads_leads_on_when_the_clock_goes_back(database: sqlite3.Connection) -> None:
    assert take_lead(database, "dev", "one", now_ms=3_600_000)
    assert take_lead(database, "dev", "one", now_ms=0)
    assert not take_lead(database, "dev", "other", now_ms=LEAD_MS - 1)
    assert take_lead(database, "dev", "other", now_ms=LEAD_MS)
