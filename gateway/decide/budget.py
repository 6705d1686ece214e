"""Accounts that a race cannot overdraw: reserve, settle, void, doubt. Knows no clock and no store: both are told to it.

A process spends from leases: slices of an account that the store has granted it. Plain functions over plain ints, so
nothing can interleave between the check and the hold. The invariant, for every account at each reserve:
`held + spent <= granted`; and since the store grants no more than there is, `posted + held <= limit` over all
processes. What is spent may exceed it only by what a provider billed above the bound.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

from gateway.decide.caps import Rule
from gateway.decide.windows import Window
from gateway.domain.ledger import Amounts, Dimensions

# What a process keeps of an account that other processes want, too: what it took in about so many seconds.
KEEP_S = 5.0
# An account that nobody asked for in so long gives its lease back and is forgotten, until somebody asks again.
IDLE_S = 60.0
# So many accounts are looked at in one go for what they can give back: 0.5 ms.
SWEEP = 500
# Scopes whose values the configuration names, so that there are few of them. What is used of such an account is shown
# to whoever watches the caps, also while nobody calls.
BOUNDED_SCOPES = frozenset({"agent"})


class Account:
    """One cap for one value of its scope in one window, as this process knows it. Amounts in the cap's own unit.

    Of ours: `granted` by the store, `spent` of it and not yet told to the store, `held` by calls in flight. Of all, as
    the store told last: `posted`, with `in_doubt` as a part of it, and `elsewhere`, what others have been granted.
    """

    __slots__ = (
        "elsewhere", "end_s", "granted", "held", "in_doubt", "is_wanted", "name", "on", "posted", "recent", "rule",
        "seen_s", "spent", "start_s", "swept_s", "used_s",
    )  # fmt: skip

    def __init__(self, rule: Rule, name: str, on: Dimensions, window: Window, now_s: float) -> None:
        self.rule = rule
        self.name = name
        self.on = on
        self.start_s, self.end_s = window
        self.granted = self.spent = self.held = 0
        self.posted = self.in_doubt = self.elsewhere = 0
        self.is_wanted = False
        # When the store last told of it, and when a call last asked for it, or we did for its sake.
        self.seen_s = float("-inf")
        self.used_s = float("-inf")
        # What was taken of late, decaying from sweep to sweep.
        self.recent = 0.0
        self.swept_s = now_s

    @property
    def available(self) -> int:
        """What can be held now, from memory."""
        return self.granted - self.spent - self.held

    @property
    def at_store(self) -> int:
        """What the store could still grant, as far as is known."""
        return max(0, self.rule.limit - self.posted - self.granted - self.elsewhere)

    @property
    def is_bounded(self) -> bool:
        """Whether there are few of its kind: that of everybody, or of one agent."""
        return BOUNDED_SCOPES.issuperset(self.rule.scope)

    @property
    def used(self) -> int:
        """Posted or in doubt, over all processes as far as is known."""
        return self.posted + self.spent

    @property
    def remaining(self) -> int:
        """Neither posted, nor in doubt, nor held here."""
        return max(0, self.rule.limit - self.used - self.held)


class Balance(NamedTuple):
    """What the store says of an account. `leased` is this process's own, `elsewhere` all others'.

    `posted` holds what is in doubt, too. `is_wanted`: another process was refused of late, or more is leased than there
    is, so nothing is to be kept.
    """

    leased: int
    posted: int
    in_doubt: int
    elsewhere: int
    is_wanted: bool = False


class Hold(NamedTuple):
    """A reservation: the accounts and what is held in each, to be ended exactly once.

    `at_ms` lies in the window of every account of it, also where the clock went back: the time its row is to bear.
    """

    entries: tuple[tuple[Account, int], ...]
    at_ms: int


class Shortfall(NamedTuple):
    """Why a reservation failed: which account, and what it would have had to give."""

    account: Account
    amount: int
    needs_price: bool = False

    @property
    def missing(self) -> int:
        """How much more the process would have to be granted."""
        return self.amount - self.account.available

    @property
    def is_only_held(self) -> bool:
        """Whether the money is there, and only set aside for calls in flight, here or elsewhere."""
        return self.account.used + self.amount <= self.account.rule.limit


class Books:
    """All accounts of this process."""

    def __init__(self, rules: Iterable[Rule]) -> None:
        self._rules = tuple(rules)
        self._accounts: dict[str, Account] = {}
        # Of windows that are over, until the last call in them has settled and the lease has gone back.
        self._past: dict[tuple[str, int], Account] = {}
        # Accounts in which something is held, or spent and not told.
        self._busy: dict[Account, None] = {}
        # Accounts to be looked at for what they can give back: those that others want, and the rest of a round.
        self._wanted: dict[Account, None] = {}
        self._round: Iterator[Account] = iter(())
        # The latest time we were told. No window is left for an earlier one, whatever the clock does.
        self._latest_s = float("-inf")
        # Counts changes of rules, so that a call in flight can tell cheaply that it need not look again.
        self.version = 0

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The rules in force."""
        return self._rules

    def change_rules(self, rules: Iterable[Rule]) -> None:
        """Take over new rules; what is posted and held under a cap that stays is not touched."""
        self._rules = tuple(rules)
        self.version += 1
        by_id = {rule.id: rule for rule in self._rules}
        for name, account in list(self._accounts.items()):
            if account.rule.id in by_id:
                account.rule = by_id[account.rule.id]
            else:
                self._past[name, account.start_s] = self._accounts.pop(name)

    # --- The four verbs ----------------------------------------------------------------------------------------------

    def reserve(self, on: Dimensions, bound: Amounts, *, is_priced: bool, now_s: float) -> Hold | Shortfall:
        """Hold `bound` in every account the attempt touches, or in none."""
        entries: list[tuple[Account, int]] = []
        self._latest_s = max(self._latest_s, now_s)
        for rule in self._rules:
            if not rule.applies(on):
                continue
            account = self._account(rule, on, now_s)
            if rule.unit == "usd" and not is_priced:
                return Shortfall(account, 0, needs_price=True)
            amount = rule.amount(bound)
            account.used_s = now_s
            # The second: a limit that was lowered holds at once, whatever is still leased under the old one.
            taken = account.spent + account.held + amount
            if taken > account.granted or account.posted + taken > rule.limit:
                return Shortfall(account, amount)
            entries.append((account, amount))
        for account, amount in entries:
            account.held += amount
            account.recent += amount
            self._busy[account] = None
        return Hold(tuple(entries), int(self._latest_s * 1000))

    def settle(self, hold: Hold, actual: Amounts) -> int:
        """End the hold and spend what it really took, in the window it was reserved in.

        Returns the nUSD by which this took an account over its limit; 0 but for a provider that bills above the bound.
        """
        overshoot = 0
        for account, held in hold.entries:
            rule = account.rule
            taken = rule.amount(actual)
            self._end(account, held, taken)
            if taken > held and rule.unit == "usd":
                overshoot = max(overshoot, min(taken - held, account.used + account.held - rule.limit))
        return overshoot

    def void(self, hold: Hold) -> None:
        """End the hold; nothing was taken."""
        for account, held in hold.entries:
            self._end(account, held, 0)

    def doubt(self, hold: Hold) -> None:
        """End the hold; all of it may have been taken, and stays set aside until somebody knows."""
        for account, held in hold.entries:
            self._end(account, held, held)

    def _end(self, account: Account, held: int, taken: int) -> None:
        account.held -= held
        account.spent += taken
        self._rest(account)

    def _rest(self, account: Account) -> None:
        if not account.held and not account.spent:
            self._busy.pop(account, None)

    # --- What callers ask --------------------------------------------------------------------------------------------

    def remaining_nusd(self, on: Dimensions, *, now_s: float) -> int | None:
        """What is left of the tightest cap in dollars on such an attempt; None without one."""
        found = [account.remaining for account in self._touched(on, now_s) if account.rule.unit == "usd"]
        return min(found, default=None)

    def affordable(self, on: Dimensions, *, now_s: float, is_in_time: bool = False) -> tuple[int | None, int | None]:
        """(nUSD, tokens) that one more attempt could hold now, here or with a further grant; None: no cap on it.

        `is_in_time`: once all that is held has come back, at best.
        """
        left: dict[str, int] = {}
        for account in self._touched(on, now_s):
            unit, limit = account.rule.unit, account.rule.limit
            most = limit - account.used if is_in_time else min(account.available + account.at_store, account.remaining)
            left[unit] = min(left.get(unit, 2**62), max(0, most))
        return left.get("usd"), left.get("tokens")

    def cheaper(self, on: Dimensions, *, now_s: float) -> Rule | None:
        """The rule whose account has come to the share from which its cheaper model is to be used; None: none has."""
        for rule in self._rules:
            if rule.over_share is not None and rule.applies(on):
                account = self._account(rule, on, now_s)
                if account.used + account.held >= rule.over_share * rule.limit:
                    return rule
        return None

    def is_revoked(self, hold: Hold) -> bool:
        """Whether a limit was lowered below what is posted while the attempt was under way."""
        return any(account.used > account.rule.limit for account, _ in hold.entries)

    # --- What the bookkeeper tells and asks --------------------------------------------------------------------------

    def shared_accounts(self, now_s: float) -> list[Account]:
        """The accounts that every call may touch, made where they were not asked for yet."""
        return [self._account(rule, Dimensions(), now_s) for rule in self._rules if not rule.scope]

    def accounts(self) -> Iterator[Account]:
        """Every account there is, those of past windows included."""
        yield from self._accounts.values()
        yield from self._past.values()

    def outstanding(self) -> dict[Account, int]:
        """What is held, or spent and not told, account by account: all that leases must go on to cover."""
        return {account: account.held + account.spent for account in self._busy}

    def find(self, name: str, start_s: int) -> Account | None:
        """An account by its name and its window's start; None where this process has forgotten it."""
        account = self._accounts.get(name)
        if account is not None and account.start_s == start_s:
            return account
        return self._past.get((name, start_s))

    def heard(self, account: Account, balance: Balance, *, seen_s: float) -> None:
        """What the store said of an account."""
        account.granted, account.posted, account.in_doubt, account.elsewhere, account.is_wanted = balance
        account.seen_s = seen_s
        if balance.is_wanted:
            self._wanted[account] = None

    def returns(self, now_s: float, *, holders: int, is_leaving: bool = False) -> list[tuple[Account, int]]:
        """What is to be given back to the store, account by account; taken out of what is granted at once.

        Looks at what others want, and at the next few of the rest; also forgets what is settled and idle, for a million
        users must not cost memory. A used account of one agent is kept until its window ends, and every IDLE_S nothing
        is given back of it: the store answers with how it stands, and others may spend of it.
        """
        looked_at = list(self.accounts()) if is_leaving else [*self._wanted, *islice(self._round, SWEEP)]
        self._wanted.clear()
        if not looked_at:
            self._round = iter(list(self.accounts()))
        found = []
        for account in looked_at:
            is_over = account.end_s is not None and account.end_s <= now_s
            is_idle = now_s - account.used_s > IDLE_S and bool(account.rule.scope or holders > 1)
            elapsed_s = min(max(0.0, now_s - account.swept_s), IDLE_S)
            account.recent *= 0.5 ** (elapsed_s / KEEP_S)
            account.swept_s = now_s
            spare = account.available
            if not (is_over or is_idle or is_leaving or account.is_wanted):
                # Alone, there is nobody to leave anything to.
                spare = spare - round(account.recent) if holders > 1 else 0
            if spare > 0:
                account.granted -= spare
                found.append((account, spare))
            elif is_idle and not is_over and account.used and account.is_bounded and self._is_present(account):
                account.used_s = now_s
                found.append((account, 0))
            elif is_over or is_idle:
                self._forget(account)
        return found

    def _forget(self, account: Account) -> None:
        """Drop an account that is settled and given back. Whoever asks for it again finds it in the store."""
        if account.held or account.spent or account.granted > 0:
            return
        if self._past.get((account.name, account.start_s)) is account:
            del self._past[account.name, account.start_s]
        elif account.rule.scope and self._is_present(account):
            del self._accounts[account.name]

    def _is_present(self, account: Account) -> bool:
        """Whether its rule is in force, and no later window of it has begun."""
        return self._accounts.get(account.name) is account

    def told(self, spent: Sequence[tuple[Account, int]]) -> None:
        """The store has these amounts now: in its `posted`, no longer in our `spent`, and gone from our leases."""
        for account, amount in spent:
            account.spent -= amount
            account.granted -= amount
            self._rest(account)

    def _touched(self, on: Dimensions, now_s: float) -> list[Account]:
        return [self._account(rule, on, now_s) for rule in self._rules if rule.applies(on)]

    def _account(self, rule: Rule, on: Dimensions, now_s: float) -> Account:
        name = rule.account(on)
        account = self._accounts.get(name)
        now_s = self._latest_s = max(self._latest_s, now_s)
        if account is not None and (account.end_s is None or now_s < account.end_s):
            return account
        window = rule.window(now_s)
        if account is not None:
            # Calls still in flight settle in the window they were reserved in.
            self._past[name, account.start_s] = account
        # A cap that was taken out and put back goes on with what is leased and held under it.
        account = self._past.pop((name, window.start_s), None) or Account(rule, name, on, window, now_s)
        account.rule = rule
        self._accounts[name] = account
        return account
