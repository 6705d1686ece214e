"""For tests of one process's money: a bookkeeper at work between real books, a real journal and a real store.

The store can be made to fail or to hang.
"""

import asyncio
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from gateway.decide.budget import Books, Hold, Shortfall
from gateway.decide.caps import Rule, rules_of
from gateway.domain.ledger import Amounts, Dimensions, Held, LedgerRow, Posted, row_of
from gateway.domain.policy import Cap
from gateway.edge.bookkeeper import Bookkeeper, RolloutStates
from gateway.store.experiments import Experiments
from gateway.store.journal import Journal, claim
from gateway.store.ledger import Ledger
from gateway.store.sqlite import SqliteStore
from gateway.store.store import Batch, Crossing, Synced

ON = Dimensions(agent="qa_agent", user="ann", model="first/a")
PATIENCE_S = 15.0


class Moody:
    """A store that fails, hangs or breaks when it is told to, and keeps what it was brought."""

    def __init__(self, path: Path) -> None:
        self._store = SqliteStore(path, clock=time.time)
        self.error: Exception | None = None
        self.may_answer = threading.Event()
        self.may_answer.set()
        self.batches: list[Batch] = []
        self.joined: list[Sequence[Rule]] = []
        self.is_closed = False

    def join(self, holder: str, rules: Sequence[Rule]) -> tuple[int, int]:
        if self.error is not None:
            raise self.error
        self.joined.append(rules)
        return self._store.join(holder, rules)

    def sync(self, batch: Batch) -> Synced:
        assert self.may_answer.wait(PATIENCE_S)
        if self.error is not None:
            raise self.error
        self.batches.append(batch)
        return self._store.sync(batch)

    def leave(self) -> None:
        if self.error is not None:
            raise self.error
        self._store.leave()

    def close(self) -> None:
        self.is_closed = True
        self._store.close()


class Office:
    """A bookkeeper at work, and everything around it."""

    def __init__(self, folder: Path, *caps: Cap, answer_s: float) -> None:
        claimed = claim(folder / "journal")
        assert claimed is not None
        self.folder, self.lock = folder, claimed[1]
        rules = rules_of(caps, "dev")
        self.books = Books(rules)
        self.journal = Journal(claimed[0], fsync=False)
        self.store = Moody(folder / "gateway.db")
        self.store.join(self.journal.holder, rules)
        self.crossings: list[Crossing] = []
        # All that was heard of rollouts, each time that something was.
        self.rollouts: list[RolloutStates] = []
        self.keeper = Bookkeeper(
            self.books, self.journal, self.store, tell=self.crossings.append, answer_s=answer_s, keep_segments=1,
            take_rollouts=self.rollouts.append,
        )  # fmt: skip
        self._count = 0
        self._came = 0

    def reserve(self, nusd: int, on: Dimensions = ON) -> Hold | Shortfall:
        return self.books.reserve(on, Amounts(nusd, 1, 0), is_priced=True, now_s=time.time())

    def take(self, nusd: int) -> Hold:
        found = self.reserve(nusd)
        assert isinstance(found, Hold)
        return found

    async def wait_for(self, nusd: int, *, wait_s: float = PATIENCE_S, on: Dimensions = ON) -> Hold | None:
        """A hold as a call gets it, waiting where it must; None where it is told not to wait any longer."""
        self._came += 1
        came_s = float(self._came)
        while isinstance(found := self.reserve(nusd, on), Shortfall):
            if not await self.keeper.headroom.find(found, came_s=came_s, wait_s=wait_s):
                return None
        self.keeper.headroom.passed_on(found)
        return found

    def post(self, hold: Hold, nusd: int, on: Dimensions = ON) -> LedgerRow:
        """Settle, write down, and hand over, as a call does."""
        row, spent, lines = self.settled(hold, nusd, on)
        self.journal.append(*lines)
        self.keeper.resolved(row, spent)
        return row

    def settled(self, hold: Hold, nusd: int, on: Dimensions = ON) -> tuple[LedgerRow, Any, tuple[Held, Posted]]:
        self._count += 1
        held = Held(f"call.{self._count}", time.time_ns() // 1_000_000, "dev", on, Amounts(nusd, 1, 0))
        posted = Posted(held.id, held.amounts)
        self.books.settle(hold, posted.amounts)
        spent = tuple((account, account.rule.amount(posted.amounts)) for account, _ in hold.entries)
        return row_of(held, posted), spent, (held, posted)

    def calls(self) -> list[str]:
        with Experiments(self.folder / "gateway.db", clock=time.time) as experiments:
            return sorted(call.id for call in experiments.outcomes("dev"))

    def rows(self) -> list[str]:
        with Ledger(self.folder / "gateway.db", clock=time.time) as ledger:
            assert ledger.verify("dev") == []
            return sorted(row.id for row in ledger.rows("dev"))

    async def until(self, is_so: Callable[[], object]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not is_so():
                self.keeper._wake.set()
                await asyncio.to_thread(lambda: None)

    async def quiet(self) -> None:
        """Let the bookkeeper end what it is at, and those it wakes look again."""
        for _ in range(5):
            await self.keeper._in_thread(lambda: None)
            for _ in range(10):
                await asyncio.sleep(0)

    async def told(self) -> None:
        """Wait until the store has everything."""
        await self.until(lambda: not (self.keeper._rows or self.keeper._outcomes or self.keeper._owed))


def usd(nusd: int, **more: Any) -> Cap:
    return Cap(per="total", usd=nusd, **more)  # type: ignore[arg-type]


@asynccontextmanager
async def office(folder: Path, *caps: Cap, answer_s: float = PATIENCE_S) -> AsyncIterator[Office]:
    found = Office(folder, *(caps or (usd(100),)), answer_s=answer_s)
    await found.keeper.start([])
    try:
        yield found
    finally:
        found.store.may_answer.set()
        await found.keeper.stop()
        found.journal.close()
        os.close(found.lock)
