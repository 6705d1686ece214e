"""Keeps books and store in step: tells what was spent and what became of calls, fetches leases, gives unused ones back.

One transaction at a time, in a thread, with everything in it that has come up meanwhile; so a thousand calls that need
a lease cost one; where they wait is headroom.py. The invariant: nothing is told to the store before it is in the
journal, and what the store did not take is told again.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import TypeVar

from gateway.decide.budget import Account, Books
from gateway.decide.caps import Rule
from gateway.domain.call import CallRecord
from gateway.domain.errors import Refused
from gateway.domain.ledger import Dimensions, LedgerRow, Line
from gateway.domain.outcome import Outcome, outcome_of
from gateway.domain.rollout import RolloutState
from gateway.edge.headroom import Headroom
from gateway.store.journal import Journal, Position
from gateway.store.leases import TTL_S
from gateway.store.store import Batch, Crossing, Spot, Stop, Store, StoreError, Synced

T = TypeVar("T")

log = logging.getLogger("gateway.budget")
# How often the store is told, where no call waits for it. The journal is flushed to the disk as often.
TICK_S = 0.1
# The store is asked at least so often, even with nothing to tell: for kill switches, and to be seen alive.
ASK_S = 0.25
# What is told at the end may take so long; what is not told by then is told at the next start.
CLOSING_S = 5.0
# Rows of one transaction, and calls; a backlog is told in several.
MAX_ROWS = 2_000

Spent = tuple[tuple[Account, int], ...]
# By environment and agent.
RolloutStates = Mapping[tuple[str, str], RolloutState]


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
        take_rollouts: Callable[[RolloutStates], None] = lambda _: None,
    ) -> None:
        """`answer_s`: a store that takes longer is out of order, and no call waits for it any longer.

        `take_rollouts` is told of all rollouts whenever one has changed, within `ASK_S` and what a transaction takes.
        """
        self._books = books
        self._journal = journal
        self._store = store
        self._tell = tell
        self._take_rollouts = take_rollouts
        self._keep_segments = keep_segments
        self._rows: deque[tuple[LedgerRow, Spent]] = deque()
        self._outcomes: deque[Outcome] = deque()
        self._owed: deque[tuple[Sequence[Line], Sequence[tuple[LedgerRow, Spent]]]] = deque()
        self._wake = asyncio.Event()
        self.headroom = Headroom(answer_s=answer_s, wake=self._wake.set)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ledger")
        self._task: asyncio.Task[None] | None = None
        self._is_closing = False
        self._asked_s = float("-inf")
        # When the sync began that the store took last, by the clock and by time that only passes.
        self._heard_at_s = self._heard_s = float("-inf")
        self._rules: Sequence[Rule] | None = None
        self.stops: tuple[Stop, ...] = ()
        self.rollouts: RolloutStates = {}
        self.holders = 1
        # Why the store is out of order; empty while it is not.
        self.store_error = ""
        self.store_errors = 0
        self._journal_error = ""

    # --- From the journey --------------------------------------------------------------------------------------------

    def resolved(self, row: LedgerRow, spent: Spent) -> None:
        """An attempt's money is known, or is known to be in doubt, and the journal has it."""
        self._rows.append((row, spent))
        self.headroom.freed(account for account, _ in spent)

    def recorded(self, record: CallRecord) -> None:
        """A call is over, and the journal has it."""
        outcome = outcome_of(record)
        if outcome is not None:
            self._outcomes.append(outcome)

    def owe(self, lines: Sequence[Line], rows: Sequence[tuple[LedgerRow, Spent]]) -> None:
        """The journal did not take these lines; they are written as soon as it does, and all of it is told then."""
        self._owed.append((lines, rows))

    def _write_owed(self) -> None:
        while self._owed:
            lines, rows = self._owed[0]
            self._journal.append(*lines)
            self._owed.popleft()
            for row, spent in rows:
                self.resolved(row, spent)
            for line in lines:
                if isinstance(line, CallRecord):
                    self.recorded(line)

    def stopped(self, env: str, on: Dimensions) -> Stop | None:
        """The kill switch that stops such a call, if one does."""
        return next((stop for stop in self.stops if stop.covers(env, on)), None)

    # --- The loop ----------------------------------------------------------------------------------------------------

    async def start(self, rows: Sequence[LedgerRow], outcomes: Sequence[Outcome] = ()) -> None:
        """Tell what the journal still held, open the accounts of all, and go on from there. Raises `StoreError`."""
        self._rows.extend((row, ()) for row in rows)
        self._outcomes.extend(outcomes)
        for account in self._books.shared_accounts(time.time()):
            self.headroom.ask(account)
        # All at once: with this the leases of the last life end.
        await self._sync(max_rows=max(len(self._rows), len(self._outcomes)))
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
                while self._rows or self._outcomes:
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
        if self.store_error and not self.headroom.has_asks and now_s - self._asked_s < ASK_S:
            return
        if self._rules is not None:
            rules, self._rules = self._rules, None
            try:
                await self._in_thread(partial(self._store.join, self._journal.holder, rules))
            except StoreError:
                self._rules = rules
                raise
        is_wanted = self._rows or self._outcomes or self.headroom.has_asks or self.headroom.has_waiting
        if is_wanted or now_s - self._asked_s >= ASK_S:
            await self._sync()

    async def _sync(self, *, max_rows: int = MAX_ROWS, is_leaving: bool = False) -> None:
        """One transaction. What it does not take is put back."""
        now_s = time.time()
        self._asked_s = time.monotonic()
        rows, outcomes = list(islice(self._rows, max_rows)), list(islice(self._outcomes, max_rows))
        is_all = len(rows) == len(self._rows) and len(outcomes) == len(self._outcomes)
        written, position = self._journal.written_bytes, self._journal.position()
        wishes = self.headroom.collect()
        asks = wishes.asks
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
            outcomes=outcomes,
        )
        asked_s = self._asked_s
        try:
            found = await self._in_thread(partial(self._store.sync, batch))
        except StoreError as error:
            for account, amount in returns:
                account.granted += amount
            self.headroom.failed(wishes, error)
            raise
        self._heard_at_s, self._heard_s = now_s, asked_s
        for _ in rows:
            _, spent = self._rows.popleft()
            self._books.told(spent)
        for _ in outcomes:
            self._outcomes.popleft()
        if is_all:
            self._journal.told(written)
        self._take(found)
        self.headroom.answered(wishes)
        if is_all:
            self._prune(position)
        # They take what they were granted before the next transaction gives it back to others who want it, or nobody
        # would ever have it for long enough. An answer is shielded, so it needs two turns of the loop to arrive.
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        self._hear({(env, state.agent): state for env, state in found.rollouts})

    def _prune(self, position: Position) -> None:
        """Let go of what the store has. What cannot go now is looked at again with the next transaction."""
        try:
            self._journal.prune(position, self._keep_segments)
        except OSError as error:
            log.warning("old segments of the journal cannot be deleted: %s", error.strerror)

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
            self.headroom.is_store_out = False
        if found.was_lost and self._task is not None:
            log.warning("this process was silent for so long that its leases were taken back; they are put right now")
        self.holders, self.stops = found.holders, tuple(found.stops)
        now_s = time.monotonic()
        for spot, balance in found.accounts.items():
            account = self._books.find(*spot)
            if account is not None:
                self._books.heard(account, balance, seen_s=now_s)
                if balance.is_wanted and account.available > 0:
                    # What nobody here takes at once goes back at once: somebody waits for it.
                    self._asked_s = float("-inf")
                    self._wake.set()
        for crossing in found.crossings:
            self._tell(crossing)

    def _hear(self, rollouts: RolloutStates) -> None:
        if rollouts != self.rollouts:
            self.rollouts = rollouts
            self._take_rollouts(rollouts)

    def _journal_failed(self, why: str) -> None:
        if why != self._journal_error:
            log.error("%s", why)
        self._journal_error = why

    def _failed(self, error: StoreError) -> None:
        self.store_errors += 1
        if not self.store_error:
            log.error("%s; leases are spent as far as they go, and the journal keeps the rest", error)
        self.store_error = str(error)
        self.headroom.is_store_out = True

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)
