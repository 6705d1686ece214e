"""How accounts stand now: limit, posted, held, what is left, and how long that lasts. Reads, and changes nothing.

Begins no transaction: the caller has one, so that all figures are of one moment.
"""

import sqlite3
from collections.abc import Iterator
from typing import NamedTuple

import msgspec

from gateway.decide.caps import Rule, Unit
from gateway.decide.windows import Window
from gateway.domain.ledger import Dimensions
from gateway.store.counting import fold, spent

_HOUR_S = 3600
# What is spent in a window's first seconds says little of its hour; a shorter time is taken for this long.
_LEAST_BURN_S = 60
_NOBODY = msgspec.json.encode(Dimensions())


class AccountStatus(NamedTuple):
    """One account in the window that holds now. Amounts are in the rule's unit: nUSD, requests or tokens.

    `posted` is without doubt. `leased` and `held` are sums over all processes. `remaining` is what nobody has used or
    holds, below zero where a cap was lowered or a provider billed above a hold. `burn_per_hour` is that of the last
    hour, or since the window began. `exhausted_in_s` of None: the window ends before the cap is reached.
    """

    rule_id: str
    label: str
    account: str
    scope: tuple[tuple[str, str], ...]
    """Name and value of each dimension, such as (("agent", "qa_agent"),); () for a global cap."""
    unit: Unit
    limit: int
    posted: int
    in_doubt: int
    leased: int
    held: int
    remaining: int
    window: Window
    burn_per_hour: int
    exhausted_in_s: int | None
    warn_at: tuple[float, ...]


def balances(database: sqlite3.Connection, rule: Rule, now_s: float) -> Iterator[AccountStatus]:
    """The accounts of a rule in the window that holds `now_s`, by name; a global one also before it is used."""
    window = rule.window(now_s)
    # Names of a rule's accounts begin with its id, and a blank comes before "!": so the primary key finds them.
    found = database.execute(
        "SELECT a.account, a.dims, a.posted, a.in_doubt, coalesce(sum(l.amount), 0), coalesce(sum(l.held), 0) "
        "FROM accounts a LEFT JOIN leases l USING (account, start_s) WHERE a.account >= ? AND a.account < ? "
        "AND a.rule_id = ? AND a.start_s = ? GROUP BY a.account ORDER BY a.account",
        (rule.id, f"{rule.id}!", rule.id, window.start_s),
    ).fetchall()
    if not found and not rule.scope:
        found = [(rule.id, _NOBODY, *fold(database, rule, Dimensions(), window), 0, 0)]
    until_ms = int(now_s * 1000)
    since_ms = max(window.start_s * 1000, until_ms - _HOUR_S * 1000)
    charged = spent(database, rule, since_ms, until_ms + 1)
    burnt_s = max(_LEAST_BURN_S, (until_ms - since_ms) // 1000)
    for account, dims, posted, in_doubt, leased, held in found:
        remaining = rule.limit - posted - held
        burn = charged.get(account, 0) * _HOUR_S // burnt_s
        exhausted_in_s = 0 if remaining <= 0 else remaining * _HOUR_S // burn if burn > 0 else None
        if exhausted_in_s is not None and window.end_s is not None and now_s + exhausted_in_s >= window.end_s:
            exhausted_in_s = None
        on = msgspec.json.decode(dims, type=Dimensions)
        yield AccountStatus(
            rule_id=rule.id,
            label=rule.label,
            account=account,
            scope=tuple((name, getattr(on, name) or "-") for name in rule.scope),
            unit=rule.unit,
            limit=rule.limit,
            posted=posted - in_doubt,
            in_doubt=in_doubt,
            leased=leased,
            held=held,
            remaining=remaining,
            window=window,
            burn_per_hour=burn,
            exhausted_in_s=exhausted_in_s,
            warn_at=rule.warn_at,
        )
