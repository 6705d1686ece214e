"""What people ask of the ledger, and do to it by hand: balances, totals, entries, releases, kill switches. One file.

No part of any call's way, and it needs no gateway that runs: it reads and writes the database that gateways share, one
transaction at a time. The invariant: what is changed by hand is in the audit log, by the same transaction.
"""

import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from datetime import UTC, datetime
from typing import Literal, NamedTuple, get_args
from zoneinfo import ZoneInfo

import msgspec

from gateway.decide.caps import Rule
from gateway.decide.windows import Window, window_of
from gateway.domain.ledger import Amounts, Dimensions, LedgerRow, State
from gateway.domain.money import MAX_NUSD
from gateway.store.balances import AccountStatus as AccountStatus
from gateway.store.balances import balances
from gateway.store.counting import COUNTED, ROW_COLUMNS, Counted, count_rows, folds, insert_row, load_rules, row_from
from gateway.store.leases import lost_in
from gateway.store.outcomes import add_cost
from gateway.store.schema import OpenFile, unusable
from gateway.store.store import Stop, StoreError, Total

Group = Literal["agent", "model", "variant", "operation", "key", "user"]
By = Literal["agent", "model", "variant", "operation", "key", "user", "day"]

_QUARTER_MS = 900_000
_MAX_STEPS = 100_000
_YEAR_10000_MS = 253_402_300_800_000
# How many ids or conflicts an error names before it only counts them.
_NAMED = 5
_SPENT = f"env = ? AND at_ms >= ? AND at_ms < ? AND source <> 'lease' AND {COUNTED}"


class Series(NamedTuple):
    """Spend over time, in nUSD: for each group one figure per step, the largest group first."""

    starts_ms: list[int]
    groups: dict[str, list[int]]


class Added(NamedTuple):
    """How many rows are new, and how many were there already."""

    added: int
    known: int


class AuditEntry(NamedTuple):
    """Who did what by hand, and when. `details` is a JSON object."""

    at_ms: int
    who: str
    what: str
    details: str


class Ledger(OpenFile):
    """The ledger in one SQLite file. Every method raises `StoreError`. From any thread, but one call at a time.

    `clock` gives unix seconds. `since_ms` is inclusive and `until_ms` is not.
    """

    def accounts(self, env: str, rules: Sequence[Rule], now_s: float) -> list[AccountStatus]:
        """Every account of these rules in the window that holds `now_s`, in the rules' order and by name.

        A global account is there also before it is used; those of a scope once a call has touched them.
        """
        with self._transaction("DEFERRED") as database:
            return [status for rule in rules if rule.env == env for status in balances(database, rule, now_s)]

    def totals(self, env: str, by: By, *, since_ms: int, until_ms: int, zone: str = "UTC") -> list[Total]:
        """Spend by group, the largest first; by day in order, written 2026-11-21 as the calendar of `zone` has it.

        What is void, released or only leased is left out. Sums of in-doubt holds are part of `amounts`.
        """
        # Days differ by zone, and a quarter of an hour lies in one day in every zone.
        column = f"at_ms / {_QUARTER_MS}" if by == "day" else _column(by)
        with self._transaction("DEFERRED") as database:
            found = database.execute(
                f"SELECT {column}, sum(nusd), sum(requests), sum(tokens), "  # noqa: S608 - no value is in the text
                f"coalesce(sum(CASE state WHEN 'in_doubt' THEN nusd END), 0), count(*) FROM ledger WHERE {_SPENT} "
                "GROUP BY 1 ORDER BY 2 DESC, 1",
                (env, since_ms, until_ms),
            )
            totals = [Total(group, Amounts(*amounts), doubt, rows) for group, *amounts, doubt, rows in found]
        return _by_day(totals, zone) if by == "day" else totals

    def series(self, env: str, *, since_ms: int, until_ms: int, step_s: int, by: Group | None = None) -> Series:
        """Spend per step, counted from `since_ms`, for each group; with `by` of None all in one group, ""."""
        step_ms = step_s * 1000
        steps = -((since_ms - until_ms) // step_ms) if step_ms > 0 else 0
        if not 0 < steps <= _MAX_STEPS:
            raise StoreError(f"from {since_ms} to {until_ms} ms by {step_s} s is not 1 to {_MAX_STEPS} steps")
        group = "''" if by is None else _column(by)
        with self._transaction("DEFERRED") as database:
            found = database.execute(
                f"SELECT {group}, (at_ms - ?) / ?, sum(nusd) FROM ledger WHERE {_SPENT} GROUP BY 1, 2",  # noqa: S608
                (since_ms, step_ms, env, since_ms, until_ms),
            ).fetchall()
        groups: dict[str, list[int]] = {}
        for name, step, nusd in found:
            groups.setdefault(name, [0] * steps)[step] = nusd
        ranked = sorted(groups.items(), key=lambda item: (-sum(item[1]), item[0]))
        return Series([since_ms + step * step_ms for step in range(steps)], dict(ranked))

    def rows(
        self, env: str, *, since_ms: int = 0, until_ms: int | None = None, states: Sequence[State] | None = None
    ) -> Iterator[LedgerRow]:
        """Rows in order of time, as they stood when the first was asked for; with `states` of None in any state."""
        wanted = get_args(State) if states is None else states
        where = f"env = ? AND at_ms >= ? AND at_ms < ? AND state IN ({', '.join('?' * len(wanted))})"
        values = (env, since_ms, 2**63 - 1 if until_ms is None else until_ms, *wanted)
        text = f"SELECT {ROW_COLUMNS} FROM ledger WHERE {where} ORDER BY at_ms, id"  # noqa: S608
        try:
            with closing(self._database.execute(text, values)) as found:
                for record in found:
                    yield row_from(record)
        except sqlite3.Error as error:
            raise unusable(self._path, error) from error

    def add(self, rows: Sequence[LedgerRow], *, who: str) -> Added:
        """Book entries by hand, all or none. What is spent is spent: they count in full, also above a cap.

        An entry that is there already is known by its id; if it says something else under it, that is an error.
        """
        fresh: dict[str, LedgerRow] = {}
        conflicts: dict[str, None] = {}
        for row in rows:
            _check(row)
        for unit in Amounts._fields:
            if sum(getattr(row.amounts, unit) for row in rows) >= MAX_NUSD:
                raise StoreError(f"the {unit} of these entries add up to {MAX_NUSD} or more; that cannot be right")
        with self._transaction("IMMEDIATE") as database:
            for row in rows:
                there = fresh.get(row.id) or _row(database, row.id)
                if there is None:
                    fresh[row.id] = row
                elif there != row:
                    conflicts[row.id] = None
            if conflicts:
                raise StoreError(
                    f"in the ledger with other content: {_named(conflicts)}; nothing was booked. An entry is never "
                    "changed: give the new one an id of its own"
                )
            for row in fresh.values():
                insert_row(database, row)
            count_rows(database, load_rules(database), fresh.values())
            added = Added(len(fresh), len(rows) - len(fresh))
            if fresh:
                self._note(
                    database, who, "entries added", added=added.added, known=added.known,
                    nusd=sum(row.amounts.nusd for row in fresh.values()), ids=_named(fresh),
                )  # fmt: skip
        return added

    def in_doubt(self, env: str) -> list[LedgerRow]:
        """Rows that may have cost their whole hold, oldest first."""
        return list(self.rows(env, states=["in_doubt"]))

    def release(
        self, env: str, ids: Sequence[str], *, who: str, why: str, actual: Mapping[str, Amounts] | None = None
    ) -> list[LedgerRow]:
        """End the doubt about rows: they are freed, or posted with what they did cost where `actual` says it.

        All or none. Returns the rows as they are now. Ids that are unknown or not in doubt are named in the error.
        """
        actual = actual or {}
        strays = [id for id in actual if id not in ids]
        if strays:
            raise StoreError(f"an amount, but no release, is given for {_named(strays)}")
        ended = []
        with self._transaction("IMMEDIATE") as database:
            found = {id: _row(database, id) for id in ids}
            wrong = [
                f"{id} (unknown)" if row is None or row.env != env else f"{id} ({row.state})"
                for id, row in found.items()
                if row is None or row.env != env or row.state != "in_doubt"
            ]
            if wrong:
                raise StoreError(f"not in doubt in {env}: {_named(wrong)}; nothing was released")
            priced = [id for id, row in found.items() if id in actual and row is not None and row.source == "lease"]
            if priced:
                raise StoreError(
                    f"the rest of a lease, not a call: {_named(priced)}; free it, and add what was spent of it"
                )
            rules = load_rules(database)
            for row in found.values():
                assert row is not None
                ended.append(_end_doubt(database, rules, row, actual.get(row.id)))
            if ended:
                freed = sum(row.amounts.nusd for row in ended if row.state == "released")
                self._note(
                    database, who, "doubt released", env=env, why=why, ids=list(found),
                    freed_nusd=freed, posted={id: list(amounts) for id, amounts in actual.items()},
                )  # fmt: skip
        return ended

    def stop(self, stop: Stop) -> None:
        """Throw a kill switch; one that is thrown already gets the new reason."""
        _check_switch(stop.dimension, stop.value)
        with self._transaction("IMMEDIATE") as database:
            database.execute(
                "INSERT OR REPLACE INTO stops (env, dimension, value, by, why, at_ms) VALUES (?, ?, ?, ?, ?, ?)", stop
            )
            self._note(
                database, stop.by, "stopped", env=stop.env, dimension=stop.dimension, value=stop.value, why=stop.why
            )

    def resume(self, env: str, dimension: str, value: str, *, who: str, why: str) -> bool:
        """Take a kill switch back. False: it was not thrown."""
        _check_switch(dimension, value)
        with self._transaction("IMMEDIATE") as database:
            where = "env = ? AND dimension = ? AND value = ?"
            gone = database.execute(f"DELETE FROM stops WHERE {where}", (env, dimension, value)).rowcount  # noqa: S608
            if gone:
                self._note(database, who, "resumed", env=env, dimension=dimension, value=value, why=why)
        return gone > 0

    def stops(self, env: str) -> list[Stop]:
        """The kill switches that are thrown, oldest first."""
        with self._transaction("DEFERRED") as database:
            columns = ", ".join(Stop._fields)
            text = f"SELECT {columns} FROM stops WHERE env = ? ORDER BY at_ms, dimension, value"  # noqa: S608
            return [Stop(*found) for found in database.execute(text, (env,))]

    def audit(self, limit: int = 100) -> list[AuditEntry]:
        """What was done by hand, latest first."""
        with self._transaction("DEFERRED") as database:
            text = "SELECT at_ms, who, what, details FROM audit ORDER BY id DESC LIMIT ?"
            return [AuditEntry(*found) for found in database.execute(text, (max(0, limit),))]

    def verify(self, env: str) -> list[str]:
        """Accounts that do not hold what the ledger says: none, unless somebody wrote into the file."""
        wrong = []
        with self._transaction("DEFERRED") as database:
            for rule in load_rules(database, env):
                text = "SELECT account, start_s, end_s, posted, in_doubt FROM accounts WHERE rule_id = ?"
                said: dict[Window, dict[str, Counted]] = {}
                for account, start_s, end_s, posted, in_doubt in database.execute(text, (rule.id,)).fetchall():
                    window = Window(start_s, end_s)
                    if window not in said:
                        said[window] = folds(database, rule, window)
                    right = said[window].get(account, Counted()).plus(lost_in(database, account, window))
                    if right != (posted, in_doubt):
                        since = datetime.fromtimestamp(start_s, UTC).isoformat()
                        wrong.append(
                            f"{account} since {since}: holds {posted}, of it {in_doubt} in doubt; "
                            f"the ledger says {right.posted}, of it {right.in_doubt} in doubt"
                        )
        return wrong

    def _note(self, database: sqlite3.Connection, who: str, what: str, **details: object) -> None:
        text = "INSERT INTO audit (at_ms, who, what, details) VALUES (?, ?, ?, ?)"
        database.execute(text, (int(self._clock() * 1000), who, what, msgspec.json.encode(details).decode()))


def _by_day(quarters: Sequence[Total], zone: str) -> list[Total]:
    """Sums by quarters of an hour since 1970, added up to days."""
    days: dict[str, Total] = {}
    for total in sorted(quarters, key=lambda total: int(total.group)):
        start_s = window_of("day", zone, int(total.group) * _QUARTER_MS // 1000).start_s
        day = datetime.fromtimestamp(start_s, ZoneInfo(zone)).date().isoformat()
        before = days.get(day, Total(day, Amounts(), 0, 0))
        days[day] = Total(
            day,
            Amounts(*map(sum, zip(before.amounts, total.amounts, strict=True))),
            before.in_doubt_nusd + total.in_doubt_nusd,
            before.rows + total.rows,
        )
    return list(days.values())


def _end_doubt(database: sqlite3.Connection, rules: Sequence[Rule], row: LedgerRow, cost: Amounts | None) -> LedgerRow:
    # A released row keeps its amounts, so that it can be seen what was freed; they count nowhere.
    end = (
        msgspec.structs.replace(row, state="released")
        if cost is None
        else msgspec.structs.replace(row, state="posted", amounts=Amounts(*cost), basis="manual")
    )
    if cost is not None:
        _check(end)
    database.execute(
        "UPDATE ledger SET state = ?, basis = ?, nusd = ?, requests = ?, tokens = ? WHERE id = ?",
        (end.state, end.basis, *end.amounts, end.id),
    )
    if row.source == "lease":
        # It counts in the one account it was leased from, which alone knows its window.
        database.execute(
            "UPDATE accounts SET posted = posted - ?, in_doubt = in_doubt - ? WHERE start_s * 1000 <= ? "
            "AND (end_s IS NULL OR end_s * 1000 > ?) AND account = (SELECT account FROM ledger WHERE id = ?)",
            (sum(row.amounts), sum(row.amounts), row.at_ms, row.at_ms, row.id),
        )
    else:
        count_rows(database, rules, [row], sign=-1)
        count_rows(database, rules, [end])
    if cost is not None:
        add_cost(database, row.id.rpartition(".")[0], cost.nusd)
    return end


def _row(database: sqlite3.Connection, id: str) -> LedgerRow | None:
    found = database.execute(f"SELECT {ROW_COLUMNS} FROM ledger WHERE id = ?", (id,)).fetchone()  # noqa: S608
    return None if found is None else row_from(found)


def _check(row: LedgerRow) -> None:
    """What would spoil the sums is kept out, whoever made the row."""
    for name, value, limit in (
        *((name, value, MAX_NUSD) for name, value in row.amounts._asdict().items()),
        ("at_ms", row.at_ms, _YEAR_10000_MS),
    ):
        if not 0 <= value < limit:
            raise StoreError(f"{row.id}: {name} is {value}, and must be from 0 to below {limit}")
    if row.source == "lease":
        raise StoreError(f"{row.id}: only the store itself books leases")
    if not row.id or not row.env:
        raise StoreError(f"an entry needs an id and an environment; this has {row.id!r} and {row.env!r}")


def _check_switch(dimension: str, value: str) -> None:
    if dimension and dimension not in Dimensions._fields:
        raise StoreError(f"there is no {dimension!r} to stop; one of {', '.join(Dimensions._fields)}, or all of it")
    if bool(dimension) != bool(value):
        raise StoreError("a kill switch wants both a dimension and its value, such as agent and qa_agent, or neither")


def _column(by: str) -> str:
    if by not in get_args(Group):
        raise StoreError(f"{by!r} is nothing to group by; one of {', '.join(get_args(By))}")
    return by


def _named(names: Sequence[str] | Mapping[str, object]) -> str:
    named = list(names)
    rest = f" and {len(named) - _NAMED} more" if len(named) > _NAMED else ""
    return ", ".join(named[:_NAMED]) + rest
