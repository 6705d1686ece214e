"""What people and the pilot ask of experiments, and do to rollouts: outcomes, feedback, states, changes, the lead.

No part of any call's way, and it needs no gateway that runs: it reads and writes the file that gateways share, one
transaction at a time. The invariant: what only reads sees one moment and keeps no writer waiting, and a rollout changes
together with its row in the audit log.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import AbstractContextManager

from gateway.domain.experiment import Arrivals, UserSums
from gateway.domain.outcome import Feedback, Outcome
from gateway.domain.rollout import Change, RolloutState
from gateway.store import outcomes, rollouts
from gateway.store.outcomes import Scope
from gateway.store.rollouts import Conflict as Conflict
from gateway.store.schema import OpenFile, unusable


class Experiments(OpenFile):
    """The experiments in one SQLite file. Every method raises `StoreError`. From any thread, but one call at a time.

    `clock` gives unix seconds. `since_ms` is inclusive and `until_ms` is not. What counts in a comparison and what does
    not is said in outcomes.py.
    """

    # --- What was seen -----------------------------------------------------------------------------------------------

    def user_sums(
        self, env: str, agent: str, *, experiment: int | None = None, since_ms: int = 0, until_ms: int | None = None
    ) -> list[UserSums]:
        """All calls that count, by user, stage and arm, of one experiment or of all; with feedback, however late."""
        with self._reading() as database:
            return outcomes.user_sums(database, Scope(env, agent, experiment, since_ms, until_ms))

    def arrivals(self, env: str, agent: str, *, experiment: int, until_ms: int | None = None) -> list[Arrivals]:
        """Users at their first call that counts in each stage, by the chance that they had to be treated there."""
        with self._reading() as database:
            return outcomes.arrivals(database, Scope(env, agent, experiment, until_ms=until_ms))

    def users_at_stage(self, env: str, agent: str, *, experiment: int, stage: int) -> tuple[int, int]:
        """How many users have calls that count in a stage: treated, control."""
        with self._reading() as database:
            return outcomes.users_at_stage(database, Scope(env, agent, experiment), stage)

    def left(self, env: str, agent: str, *, experiment: int) -> tuple[int, int]:
        """How many calls had their callers leave before the end: treated, control."""
        with self._reading() as database:
            return outcomes.left(database, Scope(env, agent, experiment))

    def newest_ms(self, env: str, agent: str, *, experiment: int) -> int | None:
        """When the experiment's last call came, whether it counts or not; None where there was none."""
        with self._reading() as database:
            return outcomes.newest_ms(database, Scope(env, agent, experiment))

    def outcomes(
        self, env: str, *, agent: str | None = None, since_ms: int = 0, until_ms: int | None = None
    ) -> Iterator[Outcome]:
        """Calls in order of time, as they stood when the first was asked for; with `agent` of None all agents'."""
        try:
            yield from outcomes.load_outcomes(self._database, env, agent, since_ms, until_ms)
        except sqlite3.Error as error:
            raise unusable(self._path, error) from error

    def outcome(self, call_id: str) -> Outcome | None:
        """One call, or None where it is not known: of a gateway that has not told of it yet, or of none."""
        with self._reading() as database:
            return outcomes.load_outcome(database, call_id)

    def give_feedback(self, feedback: Feedback) -> bool:
        """Keep what a caller says of a call; what is said last counts. False where the call is not known."""
        with self._writing() as database:
            return outcomes.put_feedback(database, feedback)

    def feedback(self, call_id: str) -> list[Feedback]:
        """What was said of a call, by caller."""
        with self._reading() as database:
            return outcomes.load_feedback(database, call_id)

    # --- Rollouts ----------------------------------------------------------------------------------------------------

    def states(self, env: str) -> dict[str, RolloutState]:
        """Where the rollouts stand, by agent; those that have begun."""
        with self._reading() as database:
            return rollouts.load_states(database, env)

    def changes(self, env: str, agent: str | None = None, *, limit: int | None = None) -> list[Change]:
        """The latest `limit` changes, or all, oldest first; with `agent` of None those of all agents."""
        with self._reading() as database:
            return rollouts.load_changes(database, env, agent, limit)

    def begin(self, env: str, change: Change) -> RolloutState:
        """The state there is; where there is none, the one that this change leads to."""
        with self._writing() as database:
            return rollouts.load_state(database, env, change.agent) or rollouts.make(database, env, change)

    def apply(self, env: str, change: Change) -> RolloutState:
        """Carry out a change. Raises `Conflict` if it does not follow on the state there is; nothing changes then."""
        with self._writing() as database:
            return rollouts.make(database, env, change)

    def lead(self, env: str, holder: str) -> bool:
        """Become or stay the one who leads, for `LEAD_MS` from now. False: another does."""
        with self._writing() as database:
            now_ms = int(self._clock() * 1000)
            return rollouts.take_lead(database, env, holder, now_ms=now_ms)

    def resign(self, env: str, holder: str) -> None:
        """Let another lead at once; nothing happens where this one does not."""
        with self._writing() as database:
            rollouts.drop_lead(database, env, holder)

    def _reading(self) -> AbstractContextManager[sqlite3.Connection]:
        return self._transaction("DEFERRED")

    def _writing(self) -> AbstractContextManager[sqlite3.Connection]:
        return self._transaction("IMMEDIATE")
