"""The shared truth in one SQLite file, for all gateway processes of one machine.

Each verb is one transaction, and writers take the lock as they begin (`BEGIN IMMEDIATE`), so what is read in it cannot
have changed when it is written. The invariant: a `sync` that fails has changed nothing, and may be tried again; a row
that is brought twice counts once.
"""

import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import msgspec

from gateway.decide.budget import Balance
from gateway.decide.caps import Rule
from gateway.decide.windows import Window
from gateway.domain.ledger import LedgerRow
from gateway.domain.outcome import Outcome
from gateway.store.accounts import ids_of, make_account, prune, register, retire
from gateway.store.counting import count_rows, insert_row, load_rules
from gateway.store.leases import (
    count_alive,
    drop_leases,
    force_leases,
    post_lost,
    shrink_leases,
    slice_of,
    take_back,
)
from gateway.store.outcomes import forget_outcomes, insert_outcomes
from gateway.store.rollouts import load_rollouts
from gateway.store.schema import BUSY_S, OpenFile
from gateway.store.store import Ask, Batch, Crossing, Spot, Stop, Synced

# Where nothing else is to be written, a process says this often that it is alive.
HEARTBEAT_S = 2.0
# For this long after somebody was refused, the others keep nothing that they do not need.
WANTED_S = 1.0
# For each call that comes in, so many may go that are too old. More than one, so that a shorter limit takes effect.
_FORGOTTEN_PER_CALL = 2
# Where more accounts than this are leased, all of them are looked at only every so often.
_MANY_LEASES = 500
_LOOK_S = 5.0

# An account, what this process has of it, and what all have.
_ACCOUNT = """
    SELECT a.account, a.start_s, a.rule_id, a.posted, a.in_doubt, a.wanted_ms, coalesce(mine.amount, 0),
        (SELECT coalesce(sum(amount), 0) FROM leases o WHERE o.account = a.account AND o.start_s = a.start_s)
"""
_ACCOUNTS_LEASED = f"""{_ACCOUNT}
    FROM leases mine JOIN accounts a USING (account, start_s) WHERE mine.holder = ?
"""
_ACCOUNTS_WANTED = f"""{_ACCOUNT}
    FROM accounts a JOIN leases mine
    ON mine.account = a.account AND mine.start_s = a.start_s AND mine.holder = ?
    WHERE a.wanted_ms > 0 AND a.wanted_ms > ?
"""
_ACCOUNT_AT = f"""{_ACCOUNT}
    FROM accounts a LEFT JOIN leases mine
    ON mine.account = a.account AND mine.start_s = a.start_s AND mine.holder = ? WHERE a.account = ? AND a.start_s = ?
"""


class SqliteStore(OpenFile):
    """The ledger's file, as a process uses it while it serves. See `Store`. `clock` tells unix seconds.

    `keep_calls_ms`: what became of calls is let go of when it is older than that; 0 is for ever.
    """

    def __init__(
        self, path: Path, *, clock: Callable[[], float], busy_s: float = BUSY_S, keep_calls_ms: int = 0
    ) -> None:
        super().__init__(path, clock=clock, is_checked=True, busy_s=busy_s)
        self._keep_calls_ms = keep_calls_ms
        self._holder = ""
        self._rules: tuple[Rule, ...] = ()
        # Limits as this process knows them, those of rules it has left behind, too: its leases may outlast them.
        self._limits: dict[str, int] = {}
        # What is below is changed only after a commit.
        self._has_settled = False
        self._seen_ms = 0
        self._held: dict[Spot, int] = {}
        self._told: tuple[int, int] | None = None
        self._leased = 0
        self._looked_ms = 0

    def join(self, holder: str, rules: Sequence[Rule]) -> tuple[int, int]:
        """Begin to take part. Leases of a last life end in the first `sync`, with the rows that say what they paid."""
        if holder != self._holder:
            self._has_settled = False
        now_ms = self._now_ms()
        with self._transaction() as database:
            known = database.execute(
                "SELECT told_segment, told_offset, rule_ids FROM holders WHERE holder = ?", (holder,)
            ).fetchone()
            segment, offset, rule_ids = known or (0, 0, "[]")
            # One that was lost stays so until its next sync has put that right.
            database.execute(
                "INSERT INTO holders (holder, seen_ms, rule_ids) VALUES (?, ?, ?) "
                "ON CONFLICT DO UPDATE SET seen_ms = excluded.seen_ms, rule_ids = excluded.rule_ids",
                (holder, now_ms, ids_of(rules)),
            )
            register(database, rules)
            retire(database, rules, msgspec.json.decode(rule_ids, type=list[str]))
            prune(database, now_ms)
        self._holder = holder
        self._rules = tuple(rules)
        self._limits.update((rule.id, rule.limit) for rule in rules)
        self._seen_ms = now_ms
        return segment, offset

    def sync(self, batch: Batch) -> Synced:
        """One transaction: what is told goes in, what is asked comes out. Without news nothing is written."""
        now_ms = self._now_ms()
        if not self._has_news(batch, now_ms):
            with self._transaction("DEFERRED") as database:
                return self._answer(database, set(), [], now_ms, was_lost=False)
        with self._transaction() as database:
            was_lost = self._is_lost(database, batch, now_ms)
            changed = self._post(database, batch.rows)
            insert_outcomes(database, batch.outcomes)
            self._forget(database, batch.outcomes, now_ms)
            shrink_leases(database, self._holder, batch.returns)
            if was_lost or not self._has_settled:
                # All that was spent is told by now, so what is left of the leases is free again, or was in doubt and
                # is not any more. Only what calls in flight hold goes on.
                drop_leases(database, self._holder)
                changed |= take_back(database, self._holder)
                force_leases(database, self._holder, batch.held)
            self._hold(database, batch.held)
            holders = count_alive(database, now_ms)
            for ask in batch.asks:
                changed |= self._grant(database, ask, holders, now_ms)
            changed |= post_lost(database, self._holder, now_ms)
            if now_ms // 3_600_000 != self._seen_ms // 3_600_000:
                prune(database, now_ms)
            crossings = self._cross(database, changed, now_ms)
            touched = changed | {ask.spot for ask in batch.asks} | {spot for spot, _ in batch.returns}
            synced = self._answer(database, touched, crossings, now_ms, was_lost=was_lost)
        self._has_settled = True
        self._seen_ms = now_ms
        self._held = dict(batch.held)
        self._told = batch.told or self._told
        return synced

    def _forget(self, database: sqlite3.Connection, outcomes: Sequence[Outcome], now_ms: int) -> None:
        # As they come, they go: no transaction is ever long, and there is no job that could fall behind.
        if self._keep_calls_ms:
            before_ms = now_ms - self._keep_calls_ms
            for env, count in Counter(outcome.env for outcome in outcomes).items():
                forget_outcomes(database, env, before_ms=before_ms, limit=_FORGOTTEN_PER_CALL * count)

    def leave(self) -> None:
        """End for good: every lease goes back."""
        with self._transaction() as database:
            drop_leases(database, self._holder)
            # Not alive any more, and not forgotten: how far its journal was told spares its next life the reading.
            database.execute(
                "UPDATE holders SET is_lost = 1, seen_ms = ? WHERE holder = ?", (self._now_ms(), self._holder)
            )
        self._holder = ""

    def _now_ms(self) -> int:
        return int(self._clock() * 1000)

    def _has_news(self, batch: Batch, now_ms: int) -> bool:
        return bool(
            batch.rows
            or batch.outcomes
            or batch.asks
            or batch.returns
            or not self._has_settled
            or dict(batch.held) != self._held
            or (batch.told is not None and batch.told != self._told)
            or not 0 <= now_ms - self._seen_ms < HEARTBEAT_S * 1000
        )

    def _is_lost(self, database: sqlite3.Connection, batch: Batch, now_ms: int) -> bool:
        """Say that this process lives, and learn whether it was taken for dead."""
        found = database.execute("SELECT is_lost FROM holders WHERE holder = ?", (self._holder,)).fetchone()
        was_lost = found is None or bool(found[0])
        if was_lost:
            # While it was not counted, its rules may have been retired; the newer words of others stand.
            known = {rule.id for rule in load_rules(database)}
            register(database, [rule for rule in self._rules if rule.id not in known])
            database.execute(
                "INSERT INTO holders (holder, seen_ms, rule_ids) VALUES (?, ?, ?) "
                "ON CONFLICT DO UPDATE SET is_lost = 0",
                (self._holder, now_ms, ids_of(self._rules)),
            )
        segment, offset = batch.told or (None, None)
        database.execute(
            "UPDATE holders SET seen_ms = ?, told_segment = coalesce(?, told_segment), "
            "told_offset = coalesce(?, told_offset) WHERE holder = ?",
            (now_ms, segment, offset, self._holder),
        )
        return was_lost

    def _post(self, database: sqlite3.Connection, rows: Sequence[LedgerRow]) -> set[Spot]:
        """Write down the rows that are new, and add them to every account there is that they count in."""
        rules = load_rules(database) if rows else []
        fresh = [row for row in rows if insert_row(database, row)]
        # An entry by hand is no spending of this process, and takes nothing out of its leases.
        spent = count_rows(database, rules, [row for row in fresh if row.source == "gateway"])
        booked = count_rows(database, rules, [row for row in fresh if row.source != "gateway"])
        shrink_leases(database, self._holder, [(spot, counted.posted) for spot, counted in spent.items()])
        return {*spent, *booked}

    def _hold(self, database: sqlite3.Connection, held: Iterable[tuple[Spot, int]]) -> None:
        database.execute("UPDATE leases SET held = 0 WHERE holder = ? AND held <> 0", (self._holder,))
        database.executemany(
            "UPDATE leases SET held = ? WHERE account = ? AND start_s = ? AND holder = ?",
            [(amount, spot.account, spot.start_s, self._holder) for spot, amount in held],
        )
        database.execute("DELETE FROM leases WHERE holder = ? AND amount = 0 AND held = 0", (self._holder,))

    def _grant(self, database: sqlite3.Connection, ask: Ask, holders: int, now_ms: int) -> set[Spot]:
        """Lease a slice, or note who was refused. Returns the account if it was made for this."""
        self._limits[ask.rule.id] = ask.rule.limit
        found = database.execute(_ACCOUNT_AT, (self._holder, *ask.spot)).fetchone()
        made = set()
        if found is None:
            make_account(database, ask)
            found = database.execute(_ACCOUNT_AT, (self._holder, *ask.spot)).fetchone()
            made.add(ask.spot)
        _, _, _, posted, _, wanted_ms, _, leased = found
        is_wanted = 0 <= now_ms - wanted_ms < WANTED_S * 1000
        granted = slice_of(ask.rule.limit - posted - leased, ask.needed, ask.wanted, holders, is_wanted)
        if granted > 0:
            database.execute(
                "INSERT INTO leases VALUES (?, ?, ?, ?, 0) ON CONFLICT DO UPDATE SET amount = amount + excluded.amount",
                (*ask.spot, self._holder, granted),
            )
        elif ask.needed > 0:
            database.execute("UPDATE accounts SET wanted_ms = ? WHERE account = ? AND start_s = ?", (now_ms, *ask.spot))
        return made

    def _cross(self, database: sqlite3.Connection, changed: set[Spot], now_ms: int) -> list[Crossing]:
        """The shares of a limit that have been reached, each told once in its window, whoever comes first."""
        rules = {rule.id: rule for rule in (*load_rules(database), *self._rules)} if changed else {}
        crossings = []
        for account, start_s in sorted(changed):
            found = database.execute(
                "SELECT rule_id, end_s, posted FROM accounts WHERE account = ? AND start_s = ?", (account, start_s)
            ).fetchone()
            if found is None or found[0] not in rules:
                continue
            rule_id, end_s, posted = found
            rule = rules[rule_id]
            for share in rule.warn_at:
                is_first = posted >= share * rule.limit and (
                    database.execute(
                        "INSERT OR IGNORE INTO crossings VALUES (?, ?, ?, ?)", (account, start_s, share, now_ms)
                    ).rowcount
                    == 1
                )
                if is_first:
                    window = Window(start_s, end_s)
                    crossings.append(
                        Crossing(rule_id, rule.label, account, window, share, rule.unit, posted, rule.limit)
                    )
        return crossings

    def _answer(
        self,
        database: sqlite3.Connection,
        touched: set[Spot],
        crossings: list[Crossing],
        now_ms: int,
        *,
        was_lost: bool,
    ) -> Synced:
        holders = count_alive(database, now_ms)
        registered = {rule.id: rule.limit for rule in load_rules(database)}
        if self._leased <= _MANY_LEASES or not 0 <= now_ms - self._looked_ms < _LOOK_S * 1000:
            found = database.execute(_ACCOUNTS_LEASED, (self._holder,)).fetchall()
            self._leased, self._looked_ms = len(found), now_ms
        else:
            wanted_since_ms = now_ms - int(WANTED_S * 1000)
            found = database.execute(_ACCOUNTS_WANTED, (self._holder, wanted_since_ms)).fetchall()
        leased_to_us = {Spot(account, start_s) for account, start_s, *_ in found}
        for spot in touched - leased_to_us:
            found += database.execute(_ACCOUNT_AT, (self._holder, *spot)).fetchall()
        accounts = {}
        for account, start_s, rule_id, posted, in_doubt, wanted_ms, mine, all_leased in found:
            # A rule that nobody knows any more allows nothing: what is leased under it is to go back.
            limit = self._limits.get(rule_id, registered.get(rule_id, 0))
            is_refused = holders > 1 and 0 <= now_ms - wanted_ms < WANTED_S * 1000
            is_over = mine > 0 and posted + all_leased > limit
            accounts[Spot(account, start_s)] = Balance(mine, posted, in_doubt, all_leased - mine, is_refused or is_over)
        stops = [
            Stop(*stop)
            for stop in database.execute("SELECT env, dimension, value, by, why, at_ms FROM stops ORDER BY at_ms")
        ]
        return Synced(accounts, crossings, stops, holders, was_lost, load_rollouts(database))
