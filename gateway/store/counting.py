"""How rows of the ledger become sums in accounts: one row at a time as it comes, or all at once as a fold. SQL only.

Knows no leases and no clock, and begins no transaction: the caller has one. The invariant: an account that exists holds
what `fold` says, whoever brought the rows and in whatever order.
"""

import sqlite3
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

import msgspec

from gateway.decide.caps import Rule
from gateway.decide.windows import Window
from gateway.domain.ledger import Dimensions, LedgerRow
from gateway.domain.shadow_policy import SHADOW
from gateway.store.store import Spot

ROW_COLUMNS = (
    "id, at_ms, env, agent, key, user, operation, model, variant, nusd, requests, tokens, "
    "state, basis, prompt_tokens, completion_tokens, source, note"
)
# What counts: a void row cost nothing, a released one was freed by hand.
COUNTED = "state IN ('posted', 'in_doubt')"
COLUMN_OF = {"usd": "nusd", "requests": "requests", "tokens": "tokens"}
_INSERT = f"INSERT INTO ledger ({ROW_COLUMNS}) VALUES ({', '.join('?' * 18)}) ON CONFLICT (id) DO NOTHING"  # noqa: S608
# Adds to what an account holds, where there is one.
POST = "UPDATE accounts SET posted = posted + ?, in_doubt = in_doubt + ? WHERE account = ? AND start_s = ?"


class Counted(NamedTuple):
    """What an account holds. `in_doubt` is part of `posted`."""

    posted: int = 0
    in_doubt: int = 0

    def plus(self, other: "Counted") -> "Counted":
        """Both together."""
        return Counted(self.posted + other.posted, self.in_doubt + other.in_doubt)


def load_rules(database: sqlite3.Connection, env: str | None = None) -> list[Rule]:
    """The rules that rows are counted under, whoever brings them: of every environment or of one, by id."""
    found = database.execute("SELECT rule FROM rules WHERE ? IS NULL OR env = ? ORDER BY rule_id", (env, env))
    return [_decoded(rule) for (rule,) in found]


@lru_cache(maxsize=512)
def _decoded(rule: str) -> Rule:
    """Read at every sync, and changed once in a day."""
    return msgspec.json.decode(rule, type=Rule)


def insert_row(database: sqlite3.Connection, row: LedgerRow) -> bool:
    """Write a row down, if its id is not there yet. True: it is new, and is to be counted."""
    return database.execute(_INSERT, _flat(row)).rowcount == 1


def row_from(found: Sequence[object]) -> LedgerRow:
    """The row behind a record of `ROW_COLUMNS`."""
    id, at_ms, env, agent, key, user, operation, model, variant, nusd, requests, tokens, *rest = found
    names = ("state", "basis", "prompt_tokens", "completion_tokens", "source", "note")
    return msgspec.convert(
        {
            "id": id,
            "at_ms": at_ms,
            "env": env,
            "on": (agent, key, user, operation, model, variant),
            "amounts": (nusd, requests, tokens),
            **dict(zip(names, rest, strict=True)),
        },
        LedgerRow,
    )


def count_rows(
    database: sqlite3.Connection, rules: Sequence[Rule], rows: Iterable[LedgerRow], sign: int = 1
) -> dict[Spot, Counted]:
    """Add rows to every account that exists and that they count in; with `sign` of -1, take them out again.

    An account that does not exist yet is folded from the ledger when it is made, these rows with it. Returns what was
    added, also to accounts that do not exist.
    """
    changes: dict[Spot, Counted] = {}
    for row in rows:
        if row.state not in ("posted", "in_doubt"):
            continue
        for rule in rules:
            amount = rule.amount(row.amounts) * sign
            if amount and rule.env == row.env and rule.applies(row.on):
                spot = Spot(rule.account(row.on), rule.window(row.at_ms / 1000).start_s)
                change = Counted(amount, amount if row.state == "in_doubt" else 0)
                changes[spot] = changes.get(spot, Counted()).plus(change)
    # Once per account, not once per row: a large import must not keep the gateways from the database for long.
    database.executemany(POST, [(*change, *spot) for spot, change in changes.items()])
    return changes


def fold(database: sqlite3.Connection, rule: Rule, on: Dimensions, window: Window) -> Counted:
    """What the ledger says of the account that such a call counts in."""
    return folds(database, rule, window, on=on).get(rule.account(on), Counted())


def folds(
    database: sqlite3.Connection, rule: Rule, window: Window, *, on: Dimensions | None = None
) -> dict[str, Counted]:
    """What the ledger says of every account of a rule in a window, by account; with `on`, of that one alone."""
    where, values = _condition(rule, window.start_s * 1000, None if window.end_s is None else window.end_s * 1000)
    if on is not None:
        for name in rule.scope:
            # An empty value and "-" share an account, as the account's name has it.
            value = getattr(on, name) or "-"
            where += f" AND coalesce(nullif({name}, ''), '-') = ?"
            values.append(value)
    return {account: Counted(posted, in_doubt) for account, posted, in_doubt in _sums(database, rule, where, values)}


def spent(database: sqlite3.Connection, rule: Rule, since_ms: int, until_ms: int) -> dict[str, int]:
    """What each account of a rule was charged between two instants, by account."""
    where, values = _condition(rule, since_ms, until_ms)
    return {account: posted for account, posted, _ in _sums(database, rule, where, values)}


def _sums(database: sqlite3.Connection, rule: Rule, where: str, values: Sequence[object]) -> list[tuple[str, int, int]]:
    column = COLUMN_OF[rule.unit]
    names = [f"coalesce(nullif({name}, ''), '-')" for name in rule.scope]
    group = f" GROUP BY {', '.join(names)}" if names else ""
    # Only names of columns are put into the text; every value is bound.
    found = database.execute(
        f"SELECT {', '.join(names) + ', ' if names else ''}coalesce(sum({column}), 0), "  # noqa: S608
        f"coalesce(sum(CASE state WHEN 'in_doubt' THEN {column} END), 0) FROM ledger WHERE {where}{group}",
        values,
    )
    return [(" ".join([rule.id, *scope]), posted, in_doubt) for *scope, posted, in_doubt in found]


def _condition(rule: Rule, since_ms: int, until_ms: int | None) -> tuple[str, list[object]]:
    where = f"env = ? AND at_ms >= ? AND source <> 'lease' AND {COUNTED}"
    values: list[object] = [rule.env, since_ms]
    if until_ms is not None:
        where += " AND at_ms < ?"
        values.append(until_ms)
    if not rule.counts_shadows:
        where += " AND operation <> ?"
        values.append(SHADOW)
    for name, wanted in rule.only:
        where += f" AND {name} IN ({', '.join('?' * len(wanted))})"
        values.extend(sorted(wanted))
    return where, values


def _flat(row: LedgerRow) -> tuple[object, ...]:
    return (
        row.id, row.at_ms, row.env, *row.on, *row.amounts, row.state, row.basis,
        row.prompt_tokens, row.completion_tokens, row.source, row.note,
    )  # fmt: skip
