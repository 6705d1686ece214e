"""The figures of caps and ledger, read from the books at each scrape. Nothing here is on the hot path.

Accounts of users and keys are left out: only what every call shares may become a label, so that strangers cannot grow
the number of series. `gateway costs` shows them all. The invariant: figures are those of the window that holds now, of
caps that are in force.
"""

import time
from collections.abc import Callable, Iterator

from gateway.decide.budget import Account, Books
from gateway.domain.money import NUSD_PER_USD
from gateway.edge.alerts import Alerts
from gateway.edge.bookkeeper import Bookkeeper
from gateway.store.journal import Journal
from gateway.telemetry.distribution import Figures
from gateway.telemetry.metrics import (
    ALERTS,
    BEHIND,
    CAP_HELD,
    CAP_IN_DOUBT,
    CAP_LIMIT,
    CAP_POSTED,
    HOLDERS,
    STOPS,
    STORE_ERRORS,
    STORE_OK,
    UNLEASED,
    WAITING,
)


def money_figures(
    books: Books, bookkeeper: Bookkeeper, journal: Journal, alerts: Alerts, *, clock: Callable[[], float] = time.time
) -> Iterator[Figures]:
    """Every metric of caps and ledger with its present values."""
    now_s, in_force = clock(), {rule.id for rule in books.rules}
    # The present window comes first, and a past one that still settles has the same name.
    found: dict[str, Account] = {}
    for account in books.accounts():
        if account.is_bounded and account.rule.id in in_force:
            found.setdefault(account.name, account)
    shown = list(found.values())

    def of(value: str) -> list[tuple[tuple[str, ...], float]]:
        return [(_labels(account), _figure(account, value, now_s)) for account in shown]

    yield CAP_LIMIT, [(_labels(account), _in_unit(account, account.rule.limit)) for account in shown]
    yield CAP_POSTED, of("used")
    yield CAP_HELD, of("held")
    yield CAP_IN_DOUBT, of("in_doubt")
    yield STOPS, [((), len(bookkeeper.stops))]
    yield BEHIND, [((), journal.behind_bytes)]
    yield STORE_OK, [((), 0.0 if bookkeeper.store_error else 1.0)]
    yield STORE_ERRORS, [((), bookkeeper.store_errors)]
    yield UNLEASED, [((), bookkeeper.headroom.unleased_nusd)]
    yield WAITING, [((), bookkeeper.headroom.waiting_calls)]
    yield ALERTS, [(("sent",), alerts.sent), (("failed",), alerts.failed), (("dropped",), alerts.dropped)]
    yield HOLDERS, [((), bookkeeper.holders)]


def _labels(account: Account) -> tuple[str, str]:
    return account.name, account.rule.unit


def _figure(account: Account, name: str, now_s: float) -> float:
    """Of a window that is over nothing counts any more, though no call may have begun the next one here."""
    is_over = account.end_s is not None and account.end_s <= now_s
    return 0.0 if is_over else _in_unit(account, getattr(account, name))


def _in_unit(account: Account, amount: int) -> float:
    return amount / NUSD_PER_USD if account.rule.unit == "usd" else float(amount)
