"""What the ledger says of one environment at one moment, as plain values that a terminal and a web client can show.

Dollars are decimal text, so that they stay exact; requests and tokens are whole numbers. Reads, and changes nothing.
"""

from collections.abc import Sequence

import msgspec

from gateway.decide.caps import Rule, Unit
from gateway.domain.ledger import LedgerRow
from gateway.domain.money import format_usd
from gateway.domain.spans import Span, format_time
from gateway.store.ledger import AccountStatus, By, Ledger
from gateway.store.store import Stop, Total

Amount = str | int
# Of a cap with an account for each user, and of spend by user, only the largest are shown: there may be a million.
MOST_ACCOUNTS = 100
_MOST_GROUPS = 1_000


class AccountLine(msgspec.Struct, frozen=True, kw_only=True):
    """An account in its window. Amounts are in `unit`. Times are ISO 8601; None where there is none."""

    cap: str
    scope: dict[str, str]
    unit: Unit
    limit: Amount
    posted: Amount
    held: Amount
    in_doubt: Amount
    remaining: Amount
    leased: Amount
    used_percent: float
    burn_per_hour: Amount
    exhausted_in_s: int | None
    since: str
    resets: str | None
    resets_in_s: int | None


class GroupLine(msgspec.Struct, frozen=True, kw_only=True):
    """Spend of one group. What is in doubt is part of it."""

    group: str
    usd: str
    requests: int
    tokens: int
    in_doubt_usd: str
    rows: int


class StopLine(msgspec.Struct, frozen=True, kw_only=True):
    """A kill switch that is thrown; an empty dimension stops everything."""

    dimension: str
    value: str
    by: str
    why: str
    at: str


class Spend(msgspec.Struct, frozen=True, kw_only=True):
    """Spend within a time, by some dimension."""

    by: By
    since: str
    until: str
    groups: list[GroupLine]
    groups_left_out: int


class Statement(msgspec.Struct, frozen=True, kw_only=True):
    """All of it."""

    env: str
    at: str
    accounts: list[AccountLine]
    accounts_left_out: dict[str, int]
    """How many accounts of a cap are not shown, all of them less used than those that are."""
    idle: list[str]
    """Caps whose accounts are made as calls touch them, and that have none now."""
    stops: list[StopLine]
    in_doubt_usd: str
    in_doubt_rows: int
    spend: Spend | None


def statement_of(ledger: Ledger, env: str, rules: Sequence[Rule], now_s: float, by: By | None, span: Span) -> Statement:
    """How things stand, and where `by` is given what was spent in `span`. Raises `StoreError`."""
    doubts = ledger.in_doubt(env)
    accounts = ledger.accounts(env, rules, now_s)
    used = {status.rule_id for status in accounts}
    fullest, left_out = fullest_of(accounts)
    return Statement(
        env=env,
        at=format_time(int(now_s * 1000)),
        accounts=[account_line(status, now_s) for status in fullest],
        accounts_left_out=left_out,
        idle=[rule.label for rule in rules if rule.id not in used],
        stops=[stop_line(stop) for stop in ledger.stops(env)],
        in_doubt_usd=format_usd(sum(row.amounts.nusd for row in doubts)),
        in_doubt_rows=len(doubts),
        spend=None if by is None else _spend(ledger, env, by, span),
    )


def fullest_of(accounts: Sequence[AccountStatus]) -> tuple[list[AccountStatus], dict[str, int]]:
    """The accounts that are most used of each cap, and how many more it has, by its label."""
    by_cap: dict[str, list[AccountStatus]] = {}
    for status in accounts:
        by_cap.setdefault(status.rule_id, []).append(status)
    kept: list[AccountStatus] = []
    left_out: dict[str, int] = {}
    for found in by_cap.values():
        if len(found) > MOST_ACCOUNTS:
            left_out[found[0].label] = len(found) - MOST_ACCOUNTS
            found = sorted(found, key=lambda status: (status.remaining, status.account))[:MOST_ACCOUNTS]
        kept += found
    return kept, left_out


def account_line(status: AccountStatus, now_s: float) -> AccountLine:
    """An account as it is shown."""
    unit = status.unit
    start_s, end_s = status.window
    return AccountLine(
        cap=status.label,
        scope=dict(status.scope),
        unit=unit,
        limit=amount_of(unit, status.limit),
        posted=amount_of(unit, status.posted),
        held=amount_of(unit, status.held),
        in_doubt=amount_of(unit, status.in_doubt),
        remaining=amount_of(unit, status.remaining),
        leased=amount_of(unit, status.leased),
        used_percent=used_percent(status),
        burn_per_hour=amount_of(unit, status.burn_per_hour),
        exhausted_in_s=status.exhausted_in_s,
        since=format_time(start_s * 1000),
        resets=None if end_s is None else format_time(end_s * 1000),
        resets_in_s=None if end_s is None else int(end_s - now_s),
    )


def used_percent(status: AccountStatus) -> float:
    """How much of a limit is gone, to a tenth, rounded down: 100 is said only of what is really used up."""
    used = status.limit - status.remaining
    return used * 1000 // status.limit / 10 if status.limit else 100.0


def amount_of(unit: Unit, amount: int) -> Amount:
    """An amount in its unit: dollars as text."""
    return format_usd(amount) if unit == "usd" else amount


def stop_line(stop: Stop) -> StopLine:
    """A kill switch as it is shown."""
    return StopLine(
        dimension=stop.dimension, value=stop.value, by=stop.by, why=stop.why, at=format_time(stop.at_ms)
    )  # fmt: skip


def group_line(total: Total) -> GroupLine:
    """A group as it is shown."""
    nusd, requests, tokens = total.amounts
    doubt = format_usd(total.in_doubt_nusd)
    return GroupLine(
        group=total.group, usd=format_usd(nusd), requests=requests, tokens=tokens, in_doubt_usd=doubt, rows=total.rows
    )


def row_line(row: LedgerRow) -> dict[str, object]:
    """A row as it is shown."""
    return {
        "id": row.id, "at": format_time(row.at_ms), **row.on._asdict(), "usd": format_usd(row.amounts.nusd),
        "requests": row.amounts.requests, "tokens": row.amounts.tokens, "state": row.state, "basis": row.basis,
        "source": row.source, "note": row.note,
    }  # fmt: skip


def _spend(ledger: Ledger, env: str, by: By, span: Span) -> Spend:
    totals = ledger.totals(env, by, since_ms=span.since_ms, until_ms=span.until_ms)
    # Days come in order of time and not of spend, and there are never so many.
    most = len(totals) if by == "day" else _MOST_GROUPS
    return Spend(
        by=by,
        since=format_time(span.since_ms),
        until=format_time(span.until_ms),
        groups=[group_line(total) for total in totals[:most]],
        groups_left_out=max(0, len(totals) - most),
    )
