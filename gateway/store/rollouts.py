"""Where rollouts stand, the changes that led there, and who leads, in the store. SQL only.

Begins no transaction: the caller has one. The invariant: a state is what its changes add up to, since both are written
together, and only as domain/rollout.py:after has it.
"""

import sqlite3
from functools import lru_cache

import msgspec

from gateway.domain.rollout import Change, RolloutState, after
from gateway.store.store import StoreError

# Whoever leads says so again before it is over; one that is gone is followed after it. The same for all, so that a
# lead of a clock that went back is told from one that was given now.
LEAD_MS = 20_000


class Conflict(StoreError):
    """The rollout has moved on meanwhile: what was decided rests on a version that is not the latest any more."""


def load_rollouts(database: sqlite3.Connection) -> list[tuple[str, RolloutState]]:
    """Every rollout with its environment."""
    found = database.execute("SELECT env, state FROM rollouts ORDER BY env, agent")
    return [(env, _decoded(state)) for env, state in found]


def load_states(database: sqlite3.Connection, env: str) -> dict[str, RolloutState]:
    """The rollouts of one environment by agent."""
    found = database.execute("SELECT agent, state FROM rollouts WHERE env = ? ORDER BY agent", (env,))
    return {agent: _decoded(state) for agent, state in found}


def load_changes(database: sqlite3.Connection, env: str, agent: str | None, limit: int | None) -> list[Change]:
    """The latest `limit` changes, or all, oldest first; with `agent` of None those of all agents."""
    # Each agent's follow on one another whatever the clock did meanwhile; among agents it is all there is to go by.
    text = (
        "SELECT change, max(at_ms) OVER (PARTITION BY agent ORDER BY version) AS known_ms "
        "FROM rollout_changes WHERE env = ? AND ? IN (agent, '') "
        "ORDER BY known_ms DESC, agent DESC, version DESC LIMIT ?"
    )
    # A negative limit is none, in SQLite.
    found = database.execute(text, (env, agent or "", -1 if limit is None else max(0, limit)))
    return [msgspec.json.decode(change, type=Change) for change, _ in found][::-1]


def load_state(database: sqlite3.Connection, env: str, agent: str) -> RolloutState | None:
    """Where one rollout stands; None where it has not begun."""
    found = database.execute("SELECT state FROM rollouts WHERE env = ? AND agent = ?", (env, agent)).fetchone()
    return None if found is None else _decoded(found[0])


def make(database: sqlite3.Connection, env: str, change: Change) -> RolloutState:
    """Carry out a change. Raises `Conflict` if it does not follow on the state there is."""
    before = load_state(database, env, change.agent)
    try:
        state = after(before, change)
    except ValueError as error:
        version, by = (before.version, before.by) if before else (0, "nobody")
        raise Conflict(
            f"the rollout of {change.agent} has moved on meanwhile: it is at version {version}, by {by}, "
            f"and this change leads to version {change.version}"
        ) from error
    database.execute(
        "INSERT INTO rollout_changes (env, agent, version, at_ms, change) VALUES (?, ?, ?, ?, ?)",
        (env, change.agent, change.version, change.at_ms, msgspec.json.encode(change).decode()),
    )
    database.execute(
        "INSERT OR REPLACE INTO rollouts (env, agent, version, state) VALUES (?, ?, ?, ?)",
        (env, state.agent, state.version, msgspec.json.encode(state).decode()),
    )
    return state


def take_lead(database: sqlite3.Connection, env: str, holder: str, *, now_ms: int) -> bool:
    """Become or stay the one who leads in this environment, for `LEAD_MS`. False: another does."""
    found = database.execute("SELECT holder, until_ms FROM leaders WHERE env = ?", (env,)).fetchone()
    # A lead that reaches further than one is ever given for is from before the clock went back.
    if found is not None and found[0] != holder and now_ms < found[1] <= now_ms + LEAD_MS:
        return False
    database.execute(
        "INSERT OR REPLACE INTO leaders (env, holder, until_ms) VALUES (?, ?, ?)", (env, holder, now_ms + LEAD_MS)
    )
    return True


def drop_lead(database: sqlite3.Connection, env: str, holder: str) -> None:
    """Let another lead, where this one does."""
    database.execute("DELETE FROM leaders WHERE env = ? AND holder = ?", (env, holder))


@lru_cache(maxsize=512)
def _decoded(state: str) -> RolloutState:
    """Read at every sync, and changed once in a day."""
    return msgspec.json.decode(state, type=RolloutState)
