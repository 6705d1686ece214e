"""Keeps the books in step with the store: tells it what was spent, fetches leases, gives unused ones back.

One transaction at a time, in a thread, with everything in it that has come up meanwhile; so a thousand calls that need
a lease cost one. Calls wait here for headroom, and only here. The invariant: nothing is told to the store before it is
in the journal, and what the store did not take is told again.
"""

import asyncio
import logging
import time
from bisect import insort
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from operator import itemgetter
from typing import TypeVar

from gateway.decide.budget import Account, Books, Hold, News, Shortfall
from gateway.decide.caps import Rule
from gateway.domain.errors import Refused
from gateway.domain.ledger import Dimensions, LedgerRow, Line
from gateway.store.journal import Journal
from gateway.store.leases import TTL_S
from gateway.store.store import Ask, Batch, Crossing, Spot, Stop, Store, StoreError, Synced

T = TypeVar("T")

log = logging.getLogger("gateway.budget")
# How often the store is told, where no call waits for it. The journal is flushed to the disk as often.
TICK_S = 0.1
# The store is asked at least so often, even with nothing to tell: for kill switches, and to be seen alive.
ASK_S = 0.25
# What is known of an account is believed for so long before the store is asked about it again.
FRESH_S = 0.1
# What is told at the end may take so long; what is not told by then is told at the next start.
CLOSING_S = 5.0
# Rows of one transaction; a backlog is told in several.
MAX_ROWS = 2_000

Spent = tuple[tuple[Account, int], ...]


class Bookkeeper:
    """The only one who talks to the store while the gateway serves."""

    def __init__(
        self,
        books: Books,
        journal: Journal,
        store: Store,
        *,
        tell: Callable[[Crossing], None],
        answer_s: float,
        keep_segments: int,
    ) -> None:
        """`answer_s`: a store that takes longer is out of order, and no call waits for it any longer."""
        self._books = books
        self._journal = journal
        self._store = store
        self._tell = tell
        self._answer_s = answer_s
        self._keep_segments = keep_segments
        self._rows: deque[tuple[LedgerRow, Spent]] = deque()
        self._owed: deque[tuple[Sequence[Line], Sequence[tuple[LedgerRow, Spent]]]] = deque()
        self._asks: dict[Account, Ask] = {}
        # Accounts that went on without the store: it is asked of them as soon as it answers.
        self._lent: dict[Account, None] = {}
        # Calls that wait for headroom which others hold, first come, first served, account by account.
        self._waiting: dict[Account, list[tuple[float, asyncio.Future[None]]]] = {}
        self._wake = asyncio.Event()
        self._synced: asyncio.Future[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ledger")
        self._task: asyncio.Task[None] | None = None
        self._is_closing = False
        self._asked_s = float("-inf")
        # When the sync began that the store took last, by the clock and by time that only passes.
        self._heard_at_s = self._heard_s = float("-inf")
        self._rules: Sequence[Rule] | None = None
        self.stops: tuple[Stop, ...] = ()
        self.holders = 1
        # Why the store is out of order; empty while it is not.
        self.store_error = ""
        self.store_errors = 0
        self._journal_error = ""
        # nUSD granted by ourselves, where a cap stays open without its store.
        self.unleased_nusd = 0

    # --- From the journey --------------------------------------------------------------------------------------------

    def resolved(self, row: LedgerRow, spent: Spent) -> None:
        """An attempt's money is known, or is known to be in doubt, and the journal has it."""
        self._rows.append((row, spent))
        if self._waiting:
            self._freed(account for account, _ in spent)

    def owe(self, lines: Sequence[Line], rows: Sequence[tuple[LedgerRow, Spent]]) -> None:
        """The journal did not take these lines; they are written as soon as it does, and the rows are told then."""
        self._owed.append((lines, rows))

    def _write_owed(self) -> None:
        while self._owed:
            lines, rows = self._owed[0]
            self._journal.append(*lines)
            self._owed.popleft()
            for row, spent in rows:
                self.resolved(row, spent)

    def _freed(self, accounts: Iterable[Account]) -> None:
        """Wake the first who waits for each of these accounts: something was given back."""
        for account in accounts:
            self._wake_next(account)

    def stopped(self, env: str, on: Dimensions) -> Stop | None:
        """The kill switch that stops such a call, if one does."""
        return next((stop for stop in self.stops if stop.covers(env, on)), None)

    async def find_headroom(self, short: Shortfall, *, came_s: float, wait_s: float) -> bool:
        """Wait until it is worth trying again, `wait_s` at most for what others hold; False where it is not.

        `came_s`: since when the call wants it; who tries again in vain keeps its place. Raises `Refused` where the
        store is out of order and the cap is closed then.
        """
        account = short.account
        if time.monotonic() - account.seen_s > FRESH_S or 0 < short.missing <= account.at_store:
            before = account.seen_s
            await self._ask(short)
            if min(account.available, account.remaining) >= short.amount or account.seen_s > before == float("-inf"):
                return True
        if not short.is_only_held:
            # Whoever waits behind this one may wait for what will not come, too.
            self._wake_next(account)
            return False
        if wait_s <= 0:
            return False
        return await self._wait(short, came_s, wait_s)

    async def _ask(self, short: Shortfall) -> None:
        account = short.account
        rule = account.rule
        if self.store_error and not rule.is_closed:
            self._lend(short)
            return
        pending = self._asks.get(account)
        needed = max(0, short.missing, pending.needed if pending else 0)
        wanted = max(needed, round(account.recent))
        self._asks[account] = _ask_of(account, needed, wanted)
        if self._synced is None:
            self._synced = asyncio.get_running_loop().create_future()
        answer = self._synced
        self._wake.set()
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
        while queue:
            _, mine = queue.pop(0)
            if not mine.done():
                mine.set_result(None)
                return

    def passed_on(self, hold: Hold) -> None:
        """A call that had waited got its headroom; there may be some left for the next."""
        if self._waiting:
            self._freed([account for account, _ in hold.entries])

    # --- The loop ----------------------------------------------------------------------------------------------------

    async def start(self, rows: Sequence[LedgerRow]) -> None:
        """Tell what the journal still held, open the accounts of all, and go on from there. Raises `StoreError`."""
        self._rows.extend((row, ()) for row in rows)
        for account in self._books.shared_accounts(time.time()):
            self._asks[account] = _ask_of(account)
        # All at once: with this the leases of the last life end.
        await self._sync(max_rows=len(self._rows))
        self._task = asyncio.create_task(self._run())

    def take_rules(self, rules: Sequence[Rule]) -> None:
        """New rules are in force: the store is told of them before anything else."""
        self._rules = rules
        self._wake.set()

    async def stop(self) -> None:
        """Tell everything, give everything back, let go. What the store does not take now stays in the journal."""
        self._is_closing = True
        self._wake.set()
        if self._task is not None:
            await self._task
        try:
            self._write_owed()
        except Refused as refused:
            self._journal_failed(str(refused))
        try:
            async with asyncio.timeout(CLOSING_S):
                while self._rows:
                    await self._sync()
                await self._sync(is_leaving=True)
                await self._in_thread(self._store.leave)
                await self._in_thread(self._store.close)
        except (StoreError, TimeoutError) as error:
            log.error("the ledger is behind the journal and is brought up to it at the next start: %s", error)
            # Behind whatever the store is still at.
            self._thread.submit(self._store.close)
        self._thread.shutdown(wait=False)

    async def _run(self) -> None:
        flushing: asyncio.Task[None] | None = None
        while not self._is_closing:
            try:
                async with asyncio.timeout(TICK_S):
                    await self._wake.wait()
            except TimeoutError:
                pass
            self._wake.clear()
            if flushing is None or flushing.done():
                # Beside the rest: a slow disk must not keep a call from its lease.
                flushing = asyncio.create_task(self._flush())
            try:
                await self._step()
            except StoreError as error:
                self._failed(error)
            except Exception as error:
                # The loop must go on: without it nothing is told any more, and no lease comes.
                log.exception("bug in the bookkeeper")
                self._failed(StoreError(f"a bug: {type(error).__name__}"))
        if flushing is not None:
            await flushing

    async def _flush(self) -> None:
        """Write what the journal did not take before, and have all of it kept by the disk."""
        try:
            self._write_owed()
            await self._journal.flush()
            self._journal_error = ""
        except (Refused, OSError) as error:
            self._journal_failed(str(error))

    async def _step(self) -> None:
        now_s = time.monotonic()
        if self.store_error and not self._asks and now_s - self._asked_s < ASK_S:
            return
        if self._rules is not None:
            rules, self._rules = self._rules, None
            try:
                await self._in_thread(partial(self._store.join, self._journal.holder, rules))
            except StoreError:
                self._rules = rules
                raise
        if self._rows or self._asks or self._waiting or now_s - self._asked_s >= ASK_S:
            await self._sync()

    async def _sync(self, *, max_rows: int = MAX_ROWS, is_leaving: bool = False) -> None:
        """One transaction. What it does not take is put back."""
        now_s = time.time()
        self._asked_s = time.monotonic()
        rows = [self._rows[index] for index in range(min(len(self._rows), max_rows))]
        is_all = len(rows) == len(self._rows)
        written, position = self._journal.written_bytes, self._journal.position()
        asks, self._asks = self._asks, {}
        lent = list(self._lent)
        for account in lent:
            asks.setdefault(account, _ask_of(account))
        answer, self._synced = self._synced, None
        # Whoever was silent for so long may have lost its leases, and the store must then be told all that they cover.
        # So everything is given back, lest calls hold more of it while the store is asked.
        silent_s = max(now_s - self._heard_at_s, self._asked_s - self._heard_s)
        is_leaving = is_leaving or silent_s > TTL_S / 2
        returns = self._books.returns(now_s, holders=self.holders, is_leaving=is_leaving)
        for account, amount in returns:
            if account in asks:
                # What is missing was counted without this. Two processes that each have a part of what a call needs
                # would else exchange their parts for ever.
                asks[account] = asks[account]._replace(needed=asks[account].needed + amount)
        batch = Batch(
            rows=[row for row, _ in rows],
            asks=list(asks.values()),
            returns=[(Spot(account.name, account.start_s), amount) for account, amount in returns],
            held=self._outstanding(rows),
            told=position if is_all else None,
        )
        asked_s = self._asked_s
        try:
            found = await self._in_thread(partial(self._store.sync, batch))
        except StoreError as error:
            for account, amount in returns:
                account.granted += amount
            if answer is not None:
                answer.set_exception(error)
                answer.exception()  # Whoever waits hears of it; nobody need.
            raise
        self._heard_at_s, self._heard_s = now_s, asked_s
        for _ in rows:
            _, spent = self._rows.popleft()
            self._books.told(spent)
        for account in lent:
            self._lent.pop(account, None)
        if is_all:
            self._journal.told(written)
            self._journal.prune(position, self._keep_segments)
        self._take(found)
        if answer is not None and not answer.done():
            answer.set_result(None)
        for account in list(self._waiting):
            self._wake_next(account)
        # They take what they were granted before the next transaction gives it back to others who want it, or nobody
        # would ever have it for long enough. An answer is shielded, so it needs two turns of the loop to arrive.
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    def _outstanding(self, told: Iterable[tuple[LedgerRow, Spent]]) -> list[tuple[Spot, int]]:
        """What leases must still cover when these rows are told, whether or not the rest is in the journal yet."""
        outstanding = self._books.outstanding()
        for _, spent in told:
            for account, amount in spent:
                if amount:
                    outstanding[account] -= amount
        return [(Spot(account.name, account.start_s), amount) for account, amount in outstanding.items() if amount]

    def _take(self, found: Synced) -> None:
        """What the store said, into the books."""
        if self.store_error:
            log.warning("the ledger's store is back")
            self.store_error = ""
        if found.was_lost and self._task is not None:
            log.warning("this process was silent for so long that its leases were taken back; they are put right now")
        self.holders, self.stops = found.holders, tuple(found.stops)
        now_s = time.monotonic()
        for spot, standing in found.accounts.items():
            account = self._books.find(*spot)
            if account is not None:
                news = News(
                    standing.leased, standing.posted, standing.in_doubt, standing.leased_elsewhere, standing.is_wanted
                )
                self._books.heard(account, news, seen_s=now_s)
                if news.is_wanted and account.available > 0:
                    # What nobody here takes at once goes back at once: somebody waits for it.
                    self._asked_s = float("-inf")
                    self._wake.set()
        for crossing in found.crossings:
            self._tell(crossing)

    def _journal_failed(self, why: str) -> None:
        if why != self._journal_error:
            log.error("%s", why)
        self._journal_error = why

    def _failed(self, error: StoreError) -> None:
        self.store_errors += 1
        if not self.store_error:
            log.error("%s; leases are spent as far as they go, and the journal keeps the rest", error)
        self.store_error = str(error)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)


def _ask_of(account: Account, needed: int = 0, wanted: int = 0) -> Ask:
    """With nothing needed: how it stands, and what there is to be had."""
    return Ask(account.rule, account.on, Spot(account.name, account.start_s), account.end_s, needed, wanted)
