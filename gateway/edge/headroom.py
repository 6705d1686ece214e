"""Where calls wait for headroom: for a lease from the store first, then for what other calls hold. Nowhere else.

Talks to nobody: the bookkeeper takes along what is asked for here, and says how it went. The invariant: whoever came
first is served first, account by account, and what one gives back is never lost on somebody who has gone.
"""

import asyncio
import time
from bisect import insort
from collections.abc import Callable, Iterable, Sequence
from math import inf
from operator import itemgetter
from typing import NamedTuple

from gateway.decide.budget import Account, Hold, Shortfall
from gateway.domain.errors import Refused
from gateway.store.store import Ask, Spot, StoreError

# What is known of an account is believed for so long before the store is asked about it again.
FRESH_S = 0.1


class Wishes(NamedTuple):
    """What a transaction is to ask for, which accounts went on without the store, and who waits for the answer."""

    asks: dict[Account, Ask]
    lent: Sequence[Account]
    answer: asyncio.Future[None] | None


class Headroom:
    """All calls of this process that found an account short."""

    def __init__(self, *, answer_s: float, wake: Callable[[], None]) -> None:
        """`answer_s`: no call waits for the store any longer. `wake` has the bookkeeper go to it at once."""
        self._answer_s = answer_s
        self._wake = wake
        self._asks: dict[Account, Ask] = {}
        # Accounts that went on without the store: it is asked of them as soon as it answers.
        self._lent: dict[Account, None] = {}
        # Calls that wait for what others hold, by when they came, account by account.
        self._waiting: dict[Account, list[tuple[float, asyncio.Future[None]]]] = {}
        # When the calls came that are asking the store; one that was woken to do so keeps its place meanwhile.
        self._asking: dict[Account, list[float]] = {}
        self._answer: asyncio.Future[None] | None = None
        # While the store is out of order nobody waits for it whose cap stays open without.
        self.is_store_out = False
        # nUSD granted by ourselves, where a cap stays open without its store.
        self.unleased_nusd = 0

    # --- From the journey --------------------------------------------------------------------------------------------

    async def find(self, short: Shortfall, *, came_s: float, wait_s: float) -> bool:
        """Wait until it is worth trying again, `wait_s` at most for what others hold; False where it is not.

        `came_s`: since when the call wants it; who tries again in vain keeps its place. Raises `Refused` where the
        store is out of order and the cap is closed then.
        """
        account = short.account
        if time.monotonic() - account.seen_s > FRESH_S or 0 < short.missing <= account.at_store:
            before = account.seen_s
            await self._ask_in_turn(short, came_s)
            if min(account.available, account.remaining) >= short.amount or account.seen_s > before == -inf:
                return True
        if not short.is_only_held:
            # Whoever waits behind this one may wait for what will not come, too.
            self._wake_next(account)
            return False
        if wait_s <= 0:
            self._wake_next(account)
            return False
        return await self._wait(short, came_s, wait_s)

    def freed(self, accounts: Iterable[Account]) -> None:
        """Wake the first who waits for each of these accounts: something was given back."""
        if self._waiting:
            for account in accounts:
                self._wake_next(account)

    def passed_on(self, hold: Hold) -> None:
        """A call that had waited got its headroom; there may be some left for the next."""
        self.freed(account for account, _ in hold.entries)

    async def _ask_in_turn(self, short: Shortfall, came_s: float) -> None:
        """Ask the store. What is given back meanwhile is not for those who came later; this call looks again after."""
        account = short.account
        asking = self._asking.setdefault(account, [])
        asking.append(came_s)
        is_answered = False
        try:
            await self._ask_for(short)
            is_answered = True
        finally:
            asking.remove(came_s)
            if not asking:
                del self._asking[account]
            if not is_answered:
                self._wake_next(account)

    async def _ask_for(self, short: Shortfall) -> None:
        account = short.account
        rule = account.rule
        if self.is_store_out and not rule.is_closed:
            self._lend(short)
            return
        pending = self._asks.get(account)
        needed = max(0, short.missing, pending.needed if pending else 0)
        self.ask(account, needed, max(needed, round(account.recent)))
        if self._answer is None:
            self._answer = asyncio.get_running_loop().create_future()
        answer = self._answer
        self._wake()
        try:
            async with asyncio.timeout(self._answer_s):
                await asyncio.shield(answer)
        except (TimeoutError, StoreError):
            if not rule.is_closed:
                self._lend(short)
                return
            message = f"the ledger's store does not answer, and this cap stays closed without it: {rule.label}"
            raise Refused("budget_unavailable", message, headers={"Retry-After": "1"}) from None

    def _lend(self, short: Shortfall) -> None:
        """Go on without the store, as the policy has it for this cap. What is spent so is told as all else is."""
        account, missing = short.account, short.missing
        account.granted += missing
        self._lent[account] = None
        if account.rule.unit == "usd":
            self.unleased_nusd += missing

    async def _wait(self, short: Shortfall, came_s: float, wait_s: float) -> bool:
        """In the account's queue until something is given back; False where that took too long."""
        account = short.account
        mine: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        queue = self._waiting.setdefault(account, [])
        place = came_s, mine
        insort(queue, place, key=itemgetter(0))
        is_woken = False
        try:
            async with asyncio.timeout(wait_s):
                await mine
            is_woken = True
            return True
        except TimeoutError:
            return False
        finally:
            if place in queue:
                queue.remove(place)
            elif not is_woken:
                # Woken and gone in the same moment: what was given back is for the next one.
                self._wake_next(account)
            # Another who was woken with us may have let go of the queue already, and a new one begun.
            if not queue and self._waiting.get(account) is queue:
                del self._waiting[account]

    def _wake_next(self, account: Account) -> None:
        queue = self._waiting.get(account)
        asking_since_s = min(self._asking.get(account, ()), default=inf)
        while queue and queue[0][0] < asking_since_s:
            _, mine = queue.pop(0)
            if not mine.done():
                mine.set_result(None)
                return

    # --- From the bookkeeper -----------------------------------------------------------------------------------------

    @property
    def has_asks(self) -> bool:
        """Whether the store is to be asked for something."""
        return bool(self._asks)

    @property
    def waiting_calls(self) -> int:
        """How many calls wait."""
        return sum(map(len, self._waiting.values()))

    @property
    def has_waiting(self) -> bool:
        """Whether somebody waits for what others hold, in this process or elsewhere."""
        return bool(self._waiting)

    def ask(self, account: Account, needed: int = 0, wanted: int = 0) -> None:
        """Have the next transaction ask for more; with nothing needed: how it stands, and what there is to be had."""
        self._asks[account] = _ask_of(account, needed, wanted)

    def collect(self) -> Wishes:
        """What the next transaction is to ask for; from now on it is that transaction's affair."""
        asks, self._asks = self._asks, {}
        lent = list(self._lent)
        for account in lent:
            asks.setdefault(account, _ask_of(account))
        answer, self._answer = self._answer, None
        return Wishes(asks, lent, answer)

    def failed(self, wishes: Wishes, error: StoreError) -> None:
        """The transaction came to nothing."""
        if wishes.answer is not None:
            wishes.answer.set_exception(error)
            wishes.answer.exception()  # Whoever waits hears of it; nobody need.

    def answered(self, wishes: Wishes) -> None:
        """The store has answered, and the books know it: everybody looks again."""
        for account in wishes.lent:
            self._lent.pop(account, None)
        if wishes.answer is not None and not wishes.answer.done():
            wishes.answer.set_result(None)
        self.freed(list(self._waiting))


def _ask_of(account: Account, needed: int = 0, wanted: int = 0) -> Ask:
    return Ask(account.rule, account.on, Spot(account.name, account.start_s), account.end_s, needed, wanted)
