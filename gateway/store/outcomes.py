"""What became of calls, and what was said of them: rows in, sums out. SQL only.

Begins no transaction: the caller has one. The invariant: a call is in once, whoever brings it and however often.
A comparison counts a call if the rollout chose its arm, it has a user, and its caller stayed to the end; one whose
caller left is told by `left`. Everything here but `left` and `newest` counts those calls and no others.
"""

import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any, NamedTuple

from gateway.decide.mismatch import chance_of
from gateway.domain.experiment import Arrivals, UserSums, bucket_of_ms
from gateway.domain.outcome import Feedback, Outcome

CALL_COLUMNS = (
    "id, at_ms, env, agent, experiment, stage, share_bps, variant, bucket, user, key, operation, model, "
    "is_success, is_fallback, error, latency_us, first_chunk_us, cost_nusd, prompt_tokens, completion_tokens"
)
_INSERT = (
    f"INSERT INTO calls ({CALL_COLUMNS}, latency_cell) "  # noqa: S608 - no value is in the text
    f"VALUES ({', '.join('?' * 22)}) ON CONFLICT (id) DO NOTHING"
)
_IS_TREATED = "variant = 'finetuned'"
_COUNTED = "experiment > 0 AND user <> '' AND is_success IS NOT NULL"
# A call of which several callers spoke counts with the mean of what they said.
_SCORE = "(SELECT avg(score) FROM feedback WHERE call_id = calls.id)"
_ALWAYS_MS = 2**63 - 1


class Scope(NamedTuple):
    """Which calls: of an agent, of one experiment or of all (None), from `since_ms` up to but without `until_ms`."""

    env: str
    agent: str
    experiment: int | None = None
    since_ms: int = 0
    until_ms: int | None = None

    @property
    def where(self) -> tuple[str, list[object]]:
        """As a condition on calls, and its values."""
        until_ms = _ALWAYS_MS if self.until_ms is None else self.until_ms
        values: list[object] = [self.env, self.agent, self.since_ms, until_ms]
        if self.experiment is not None:
            values.append(self.experiment)
        of_one = "" if self.experiment is None else " AND experiment = ?"
        return f"env = ? AND agent = ? AND at_ms >= ? AND at_ms < ?{of_one}", values


def insert_outcomes(database: sqlite3.Connection, outcomes: Iterable[Outcome]) -> None:
    """Write calls down, but for those that are there already."""
    database.executemany(_INSERT, [_flat(outcome) for outcome in outcomes])


def forget_outcomes(database: sqlite3.Connection, env: str, *, before_ms: int, limit: int) -> None:
    """Let go of the oldest calls of before `before_ms`, `limit` at most, with what was said of them."""
    text = "SELECT id FROM calls WHERE env = ? AND at_ms < ? ORDER BY at_ms LIMIT ?"
    ids = database.execute(text, (env, before_ms, limit)).fetchall()
    if ids:
        database.executemany("DELETE FROM feedback WHERE call_id = ?", ids)
        database.executemany("DELETE FROM calls WHERE id = ?", ids)


def add_cost(database: sqlite3.Connection, call_id: str, nusd: int) -> None:
    """What an attempt of a call did cost after all, once nobody doubts it any more; of a call that is kept still."""
    database.execute("UPDATE calls SET cost_nusd = cost_nusd + ? WHERE id = ?", (nusd, call_id))


def load_outcome(database: sqlite3.Connection, call_id: str) -> Outcome | None:
    """One call, or None where it is not known."""
    text = f"SELECT {CALL_COLUMNS} FROM calls WHERE id = ?"  # noqa: S608
    found = database.execute(text, (call_id,)).fetchone()
    return None if found is None else _outcome(found)


def load_outcomes(
    database: sqlite3.Connection, env: str, agent: str | None, since_ms: int, until_ms: int | None
) -> Iterator[Outcome]:
    """Calls in order of time, as they stood when the first was asked for; with `agent` of None all agents'."""
    where = "env = ? AND at_ms >= ? AND at_ms < ? AND ? IN (agent, '')"
    text = f"SELECT {CALL_COLUMNS} FROM calls WHERE {where} ORDER BY at_ms, id"  # noqa: S608
    values = (env, since_ms, _ALWAYS_MS if until_ms is None else until_ms, agent or "")
    for found in database.execute(text, values):
        yield _outcome(found)


def user_sums(database: sqlite3.Connection, scope: Scope) -> list[UserSums]:
    """All calls of each user in each stage and arm; feedback counts whenever it came.

    The latencies are those of all calls that count, failed ones, too: which calls fail is an effect of the treatment,
    and to leave them out would compare different users.
    """
    where, values = scope.where
    columns = (
        f"user, stage, {_IS_TREATED} AS is_treated, is_success, latency_us, latency_cell, cost_nusd, {_SCORE} AS score"
    )
    found = database.execute(
        "SELECT user, stage, is_treated, count(*), sum(is_success), sum(latency_us), sum(cost_nusd), "  # noqa: S608
        "count(score), total(score), group_concat(latency_cell) "
        # The limit is none, and keeps SQLite from looking up each call's score twice.
        f"FROM (SELECT {columns} FROM calls WHERE {where} AND {_COUNTED} LIMIT -1) GROUP BY user, stage, is_treated",
        values,
    )
    return [
        UserSums(
            user=user,
            stage=f"{scope.agent}/{stage}",
            is_treated=bool(is_treated),
            calls=calls,
            successes=successes,
            latency_ms=latency_us / 1000,
            cost_nusd=cost_nusd,
            scores=scores,
            score_sum=score_sum,
            latencies=Counter(map(int, cells.split(","))),
        )
        for user, stage, is_treated, calls, successes, latency_us, cost_nusd, scores, score_sum, cells in found
    ]


def arrivals(database: sqlite3.Connection, scope: Scope) -> list[Arrivals]:
    """The users at their first call in each stage, by the chance that they had to be treated there.

    What that is follows from the stages they were seen in before: decide/mismatch.py:chance_of.
    """
    where, values = scope.where
    # SQLite takes the other columns from the row that has the minimum.
    found = database.execute(
        f"SELECT user, stage, share_bps, {_IS_TREATED}, min(at_ms) FROM calls "  # noqa: S608
        f"WHERE {where} AND {_COUNTED} GROUP BY user, stage ORDER BY user, 5, stage",
        values,
    )
    counts: dict[tuple[int, float], list[int]] = {}
    for _, firsts in groupby(found, key=itemgetter(0)):
        earlier: list[tuple[int, bool]] = []
        for _, stage, share_bps, treated, _ in firsts:
            chance = chance_of(share_bps, earlier)
            earlier.append((share_bps, bool(treated)))
            if chance is not None:
                counts.setdefault((stage, chance), [0, 0])[treated] += 1
    return [
        Arrivals(f"{scope.agent}/{stage}", share, treated, control)
        for (stage, share), (control, treated) in sorted(counts.items())
    ]


def users_at_stage(database: sqlite3.Connection, scope: Scope, stage: int) -> tuple[int, int]:
    """How many users were seen in a stage: treated, control."""
    where, values = scope.where
    return _by_arm(database, "count(DISTINCT user)", f"{where} AND stage = ? AND {_COUNTED}", [*values, stage])


def left(database: sqlite3.Connection, scope: Scope) -> tuple[int, int]:
    """How many calls had their callers leave before the end: treated, control."""
    where, values = scope.where
    return _by_arm(database, "count(*)", f"{where} AND experiment > 0 AND is_success IS NULL", values)


def newest_ms(database: sqlite3.Connection, scope: Scope) -> int | None:
    """When the last call came, whether it counts or not; None where there was none."""
    where, values = scope.where
    (newest,) = database.execute(f"SELECT max(at_ms) FROM calls WHERE {where}", values).fetchone()  # noqa: S608
    return newest if newest is None else int(newest)


def put_feedback(database: sqlite3.Connection, feedback: Feedback) -> bool:
    """Keep what a caller says of a call, in place of what the same caller said before. False: no such call.

    What was said later, by `at_ms`, stays: feedback may wait for its call, and be overtaken meanwhile.
    """
    if database.execute("SELECT 1 FROM calls WHERE id = ?", (feedback.call_id,)).fetchone() is None:
        return False
    database.execute(
        "INSERT INTO feedback (call_id, caller, at_ms, score, label) VALUES (?, ?, ?, ?, ?) "
        "ON CONFLICT (call_id, caller) DO UPDATE "
        "SET at_ms = excluded.at_ms, score = excluded.score, label = excluded.label "
        "WHERE excluded.at_ms >= feedback.at_ms",
        feedback,
    )
    return True


def load_feedback(database: sqlite3.Connection, call_id: str) -> list[Feedback]:
    """What was said of a call, by caller."""
    text = "SELECT call_id, caller, at_ms, score, label FROM feedback WHERE call_id = ? ORDER BY caller"
    return [Feedback(*found) for found in database.execute(text, (call_id,))]


def _by_arm(database: sqlite3.Connection, what: str, where: str, values: Sequence[object]) -> tuple[int, int]:
    text = f"SELECT {_IS_TREATED}, {what} FROM calls WHERE {where} GROUP BY 1"  # noqa: S608
    found = dict(database.execute(text, values).fetchall())
    return found.get(1, 0), found.get(0, 0)


def _flat(call: Outcome) -> tuple[object, ...]:
    first_chunk_us = None if call.first_chunk_ms is None else round(call.first_chunk_ms * 1000)
    return (
        *call[:16], round(call.latency_ms * 1000), first_chunk_us, *call[18:], bucket_of_ms(call.latency_ms),
    )  # fmt: skip


def _outcome(found: Sequence[Any]) -> Outcome:
    *head, is_success, is_fallback, error, latency_us, first_chunk_us, cost_nusd, prompt, completion = found
    went_well = None if is_success is None else bool(is_success)
    first_chunk_ms = None if first_chunk_us is None else first_chunk_us / 1000
    rest = error, latency_us / 1000, first_chunk_ms, cost_nusd, prompt, completion
    return Outcome._make((*head, went_well, bool(is_fallback), *rest))
