"""Leases: how large a slice of an account a process gets, and what becomes of the lease of one that vanished. SQL only.

Begins no transaction and reads no clock: the caller has both. The invariant: a lease ends in one of three ways, spent,
given back by its holder, or posted as in doubt; nobody else ever frees it. So whoever dies or sleeps can only leave
less to spend for the others, until it is back and says what it really spent.
"""

import sqlite3
from collections.abc import Iterable
from typing import NamedTuple

import msgspec

from gateway.decide.windows import Window
from gateway.domain.ledger import Dimensions
from gateway.store.counting import COLUMN_OF, COUNTED, POST, ROW_COLUMNS, Counted
from gateway.store.store import Spot

# A process tells that it lives every two seconds; one that is paused for this long is taken for dead.
TTL_S = 15.0
_NOTE_LOST = "leased to {holder}, which vanished; taken back when it returns"
_NOTE_BACK = "the holder came back and told what it spent"


class _Lost(NamedTuple):
    """A lease of somebody who vanished, and the account it is in."""

    account: str
    start_s: int
    end_s: int | None
    env: str
    unit: str
    dims: str
    amount: int


def slice_of(remaining: int, needed: int, wanted: int, holders: int, is_wanted: bool) -> int:
    """How much of an account to lease to one that needs `needed` more and would like `wanted`. 0: it is refused.

    `remaining` is neither posted nor leased; `holders` share it. `is_wanted`: one of them was refused just now.
    """
    if needed > remaining:
        return 0
    if holders <= 1:
        return remaining
    step = max(needed, 1)
    if is_wanted:
        return min(step, remaining)
    # Half of an even share: slices shrink as the cap comes near, and at its end they are single calls.
    amount = min(max(wanted, 0), remaining // (2 * holders))
    return min(max(amount - amount % step, step), remaining)


def count_alive(database: sqlite3.Connection, now_ms: int) -> int:
    """How many processes take part."""
    found = database.execute("SELECT count(*) FROM holders WHERE NOT is_lost AND seen_ms > ?", (now_ms - TTL_S * 1000,))
    (alive,) = found.fetchone()
    return int(alive)


def post_lost(database: sqlite3.Connection, holder: str, now_ms: int) -> set[Spot]:
    """Post the leases of all who vanished, `holder` itself excepted, as in doubt. Returns the accounts they were in."""
    vanished = database.execute(
        "SELECT holder, seen_ms FROM holders WHERE NOT is_lost AND seen_ms <= ? AND holder <> ?",
        (now_ms - TTL_S * 1000, holder),
    ).fetchall()
    spots = set()
    for other, seen_ms in vanished:
        leases = database.execute(
            "SELECT account, start_s, end_s, env, unit, dims, amount "
            "FROM leases JOIN accounts USING (account, start_s) WHERE holder = ? AND amount > 0",
            (other,),
        ).fetchall()
        for lease in map(_Lost._make, leases):
            _post_in_doubt(database, other, seen_ms, lease)
            spots.add(Spot(lease.account, lease.start_s))
        database.execute("DELETE FROM leases WHERE holder = ?", (other,))
        database.execute("UPDATE holders SET is_lost = 1 WHERE holder = ?", (other,))
    return spots


def _post_in_doubt(database: sqlite3.Connection, holder: str, seen_ms: int, lease: _Lost) -> None:
    id = first = f"lease:{holder}:{lease.account}:{lease.start_s}"
    tries = 1
    # Whoever vanishes twice within a window leaves two rows; the first one's history is not written over.
    while database.execute("SELECT 1 FROM ledger WHERE id = ?", (id,)).fetchone():
        tries += 1
        id = f"{first}:{tries}"
    at_ms = max(seen_ms, lease.start_s * 1000)
    if lease.end_s is not None:
        at_ms = min(at_ms, lease.end_s * 1000 - 1)
    amounts = {column: lease.amount if unit == lease.unit else 0 for unit, column in COLUMN_OF.items()}
    on = msgspec.json.decode(lease.dims, type=Dimensions)
    database.execute(
        f"INSERT INTO ledger ({ROW_COLUMNS}, account, holder) VALUES ({', '.join('?' * 20)})",  # noqa: S608
        (
            id, at_ms, lease.env, *on, amounts["nusd"], amounts["requests"], amounts["tokens"], "in_doubt", "bound",
            0, 0, "lease", _NOTE_LOST.format(holder=holder), lease.account, holder,
        ),
    )  # fmt: skip
    database.execute(POST, (lease.amount, lease.amount, lease.account, lease.start_s))


def take_back(database: sqlite3.Connection, holder: str) -> set[Spot]:
    """Undo what `post_lost` posted for a process that is there again and has told its rows; each row once.

    What an admin has released or posted meanwhile is not in doubt any more and stays as it is. Returns every account
    a lease of this process was ever lost in, so that it hears of all that it has no more.
    """
    found = database.execute(
        "SELECT l.id, l.state, l.nusd + l.requests + l.tokens, l.account, a.start_s FROM ledger l LEFT JOIN accounts a "
        "ON a.account = l.account AND a.start_s * 1000 <= l.at_ms AND (a.end_s IS NULL OR l.at_ms < a.end_s * 1000) "
        "WHERE l.holder = ?",
        (holder,),
    ).fetchall()
    for id, state, amount, account, start_s in found:
        if state != "in_doubt":
            continue
        database.execute("UPDATE ledger SET state = 'released', note = ? WHERE id = ?", (_NOTE_BACK, id))
        database.execute(POST, (-amount, -amount, account, start_s))
    return {Spot(account, start_s) for _, _, _, account, start_s in found if start_s is not None}


def lost_in(database: sqlite3.Connection, account: str, window: Window) -> Counted:
    """What the rows of lost leases add to an account: they count there alone, whatever their dimensions."""
    found = database.execute(
        "SELECT coalesce(sum(nusd + requests + tokens), 0), "  # noqa: S608
        "coalesce(sum(CASE state WHEN 'in_doubt' THEN nusd + requests + tokens END), 0) "
        f"FROM ledger WHERE account = ? AND at_ms >= ? AND at_ms < ? AND {COUNTED}",
        (account, window.start_s * 1000, 2**62 if window.end_s is None else window.end_s * 1000),
    )
    return Counted(*found.fetchone())


def drop_leases(database: sqlite3.Connection, holder: str) -> None:
    """End every lease of a process."""
    database.execute("DELETE FROM leases WHERE holder = ?", (holder,))


def force_leases(database: sqlite3.Connection, holder: str, held: Iterable[tuple[Spot, int]]) -> None:
    """Lease exactly what calls in flight hold, even above a limit: they cannot be called back."""
    database.executemany(
        "INSERT OR REPLACE INTO leases "
        "SELECT account, start_s, ?, ?, 0 FROM accounts WHERE account = ? AND start_s = ?",
        [(holder, amount, spot.account, spot.start_s) for spot, amount in held if amount > 0],
    )


def shrink_leases(database: sqlite3.Connection, holder: str, by: Iterable[tuple[Spot, int]]) -> None:
    """Take what was spent, or is given back, out of a process's leases, as far as they go."""
    database.executemany(
        "UPDATE leases SET amount = amount - min(amount, ?) WHERE account = ? AND start_s = ? AND holder = ?",
        [(amount, spot.account, spot.start_s, holder) for spot, amount in by if amount > 0],
    )
