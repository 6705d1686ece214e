"""Accounts that a race cannot overdraw: reserve, settle, void. Knows no clock: `now_s` is passed in.

Plain functions over plain ints, so nothing can interleave between the check and the hold. The invariant: for every
account `posted + held <= limit` at each reserve; what is posted later may exceed it only by what a provider billed
above the bound. One process's memory today, refilled from the journal at start; leases and the shared store follow
behind the same four verbs.
"""

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from functools import lru_cache
from typing import Literal, NamedTuple

from gateway.domain.money import format_usd
from gateway.domain.policy import Cap

Unit = Literal["usd", "requests", "tokens"]
# An upper bound for the tokens a provider adds around a message, so that holds stay sound for short prompts.
OVERHEAD_TOKENS = 64


class Amounts(NamedTuple):
    """What a call takes, or took, in each unit: nUSD, requests, tokens."""

    nusd: int = 0
    requests: int = 0
    tokens: int = 0


class Account:
    """One cap for one value of its scope in one window. Amounts in the cap's own unit."""

    __slots__ = ("held", "limit", "posted", "window_start_s")

    def __init__(self, limit: int, window_start_s: int) -> None:
        self.limit = limit
        self.posted = 0
        self.held = 0
        self.window_start_s = window_start_s


class Hold(NamedTuple):
    """A reservation: account, amount, unit of each entry, to be settled or voided exactly once."""

    entries: tuple[tuple[Account, int, Unit], ...]


class Shortfall(NamedTuple):
    """Why a reservation failed: which cap, when it resets, and whether calls in flight hold the rest."""

    cap: str
    reset_s: int | None
    is_only_held: bool
    needs_price: bool = False


class Books:
    """All accounts of this process."""

    def __init__(self, caps: Iterable[Cap]) -> None:
        self._caps = tuple(caps)
        self._accounts: dict[tuple[str, ...], Account] = {}

    def change_caps(self, caps: Iterable[Cap]) -> None:
        """Take over new caps; what is posted and held under a cap that stays is not touched."""
        self._caps = tuple(caps)

    def reserve(
        self, dimensions: Mapping[str, str], bound: Amounts, *, is_priced: bool, now_s: float
    ) -> Hold | Shortfall:
        """Hold `bound` in every account the call touches, or in none."""
        entries: list[tuple[Account, int, Unit]] = []
        for cap in self._caps:
            if not _applies(cap, dimensions):
                continue
            account = self._account(cap, dimensions, now_s)
            unit = unit_of(cap)
            if unit == "usd" and not is_priced:
                return Shortfall(label(cap), None, is_only_held=False, needs_price=True)
            amount = amount_in(bound, unit)
            if account.posted + account.held + amount > account.limit:
                is_only_held = account.posted + amount <= account.limit
                return Shortfall(label(cap), window_end_s(cap.per, account.window_start_s), is_only_held)
            entries.append((account, amount, unit))
        for account, amount, _ in entries:
            account.held += amount
        return Hold(tuple(entries))

    def settle(self, hold: Hold, actual: Amounts) -> None:
        """Release the hold and post what the call really took, in the window it was reserved in."""
        for account, amount, unit in hold.entries:
            account.held -= amount
            account.posted += amount_in(actual, unit)

    def void(self, hold: Hold) -> None:
        """Release the hold; nothing was taken."""
        self.settle(hold, Amounts())

    def remaining_nusd(self, dimensions: Mapping[str, str], *, now_s: float) -> int | None:
        """What is left, neither posted nor held, of the tightest cap in dollars on such a call; None without one."""
        left = [
            account.limit - account.posted - account.held
            for cap in self._caps
            if unit_of(cap) == "usd" and _applies(cap, dimensions)
            for account in (self._account(cap, dimensions, now_s),)
        ]
        return min(left, default=None)

    def post(self, dimensions: Mapping[str, str], actual: Amounts, *, now_s: float, at_s: float) -> None:
        """Book what a call of `at_s` took, as far as its window still runs: how the journal is read back in."""
        for cap in self._caps:
            if _applies(cap, dimensions):
                account = self._account(cap, dimensions, now_s)
                if at_s >= account.window_start_s:
                    account.posted += amount_in(actual, unit_of(cap))

    def _account(self, cap: Cap, dimensions: Mapping[str, str], now_s: float) -> Account:
        # The limit is not part of the key, so a cap that is changed keeps what was posted under it.
        only = repr(sorted((name, sorted(values)) for name, values in cap.only.items())) if cap.only else ""
        key = (cap.scope, cap.per, unit_of(cap), only, dimensions.get(cap.scope, ""))
        start_s = window_start_s(cap.per, now_s)
        account = self._accounts.get(key)
        # A new window is a new account: calls still in flight settle in the one they were reserved in. A clock that
        # goes backwards does not get here, so a window cannot be used twice.
        if account is None or start_s > account.window_start_s:
            account = self._accounts[key] = Account(limit_of(cap), start_s)
        account.limit = limit_of(cap)
        return account


def unit_of(cap: Cap) -> Unit:
    """The unit a cap counts in."""
    return "usd" if cap.usd is not None else "requests" if cap.requests is not None else "tokens"


def limit_of(cap: Cap) -> int:
    """A cap's ceiling in its own unit; nUSD for dollars."""
    return int(cap.usd if cap.usd is not None else cap.requests if cap.requests is not None else cap.tokens or 0)


def amount_in(amounts: Amounts, unit: Unit) -> int:
    """The figure of `amounts` that a cap in `unit` counts."""
    return amounts.nusd if unit == "usd" else amounts.requests if unit == "requests" else amounts.tokens


def label(cap: Cap) -> str:
    """A cap in words, as callers and logs see it: `global 20.00 usd per hour (operation benchmark)`."""
    unit = unit_of(cap)
    size = format_usd(limit_of(cap)) if unit == "usd" else str(limit_of(cap))
    only = "; ".join(f"{name} {', '.join(values)}" for name, values in cap.only.items())
    window = "in total" if cap.per == "total" else f"per {cap.per}"
    return f"{cap.scope} {size} {unit} {window}" + (f" ({only})" if only else "")


def caps_that_apply(caps: Iterable[Cap], dimensions: Mapping[str, str]) -> list[str]:
    """The caps a call would be held to, in words."""
    return [label(cap) for cap in caps if _applies(cap, dimensions)]


def window_start_s(per: str, now_s: float) -> int:
    """Start of the UTC window that holds `now_s`, unix seconds. `total` began at 0."""
    return _window_start_s(per, int(now_s // 3600))


@lru_cache(maxsize=64)
def _window_start_s(per: str, hour: int) -> int:
    """The same by hours since 1970: every window begins with an hour, so calendar arithmetic is done once in one."""
    moment = datetime.fromtimestamp(hour * 3600, UTC)
    match per:
        case "hour":
            return int(moment.timestamp())
        case "day":
            return int(moment.replace(hour=0).timestamp())
        case "month":
            return int(moment.replace(day=1, hour=0).timestamp())
        case _:
            return 0


def window_end_s(per: str, start_s: int) -> int | None:
    """End of the window that began at `start_s`; None for `total`, which never resets."""
    lengths = {"hour": 3600, "day": 86_400}
    if per in lengths:
        return start_s + lengths[per]
    if per == "month":
        start = datetime.fromtimestamp(start_s, UTC)
        return int(start.replace(year=start.year + start.month // 12, month=start.month % 12 + 1).timestamp())
    return None


def _applies(cap: Cap, dimensions: Mapping[str, str]) -> bool:
    return all(dimensions.get(name, "") in values for name, values in cap.only.items())


def bound_tokens(*, request_bytes: int, messages: int, max_tokens: int, n: int) -> tuple[int, int]:
    """Sound upper bounds for (input, output) tokens: a byte-level token is at least one byte of the request."""
    return request_bytes + OVERHEAD_TOKENS * messages, max_tokens * n
