"""The bookkeeper between real books, a real journal and a real store that can be made to fail or to hang.

What is told to the store, when calls wait and in which order they go on; never how long, but where it hangs.
"""

import asyncio
import errno
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from gateway.decide.budget import Books, Hold, Shortfall
from gateway.decide.caps import Rule, rules_of
from gateway.domain.errors import Refused
from gateway.domain.ledger import Amounts, Dimensions, Held, LedgerRow, Posted, row_of
from gateway.domain.policy import Cap
from gateway.edge.bookkeeper import Bookkeeper
from gateway.store.journal import Journal, claim
from gateway.store.ledger import Ledger
from gateway.store.sqlite import SqliteStore
from gateway.store.store import Batch, Crossing, StoreError, Synced
from tests.journey import full_disk

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
        self.keeper = Bookkeeper(
            self.books, self.journal, self.store, tell=self.crossings.append, answer_s=answer_s, keep_segments=1
        )
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
            if not await self.keeper.find_headroom(found, came_s=came_s, wait_s=wait_s):
                return None
        self.keeper.passed_on(found)
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

    def rows(self) -> list[str]:
        with Ledger(self.folder / "gateway.db", clock=time.time) as ledger:
            assert ledger.verify("dev") == []
            return sorted(row.id for row in ledger.rows("dev"))

    async def until(self, is_so: Callable[[], object]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not is_so():
                self.keeper._wake.set()
                await asyncio.to_thread(lambda: None)

    async def told(self) -> None:
        """Wait until the store has everything."""
        await self.until(lambda: not (self.keeper._rows or self.keeper._owed))


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


# --- Telling ----------------------------------------------------------------------------------------------------------


async def test_what_is_resolved_is_told_once(tmp_path: Path) -> None:
    async with office(tmp_path) as here:
        for _ in range(5):
            here.post(here.take(10), 7)
        await here.told()
        (account,) = here.books.accounts()
        assert (account.posted, account.spent, account.held, account.granted) == (35, 0, 0, 65)
        assert len(here.rows()) == 5
        assert here.journal.behind_bytes == 0
    brought = [row.id for batch in here.store.batches for row in batch.rows]
    assert sorted(brought) == sorted(set(brought)) == here.rows()


async def test_what_the_store_did_not_take_is_told_again(tmp_path: Path) -> None:
    async with office(tmp_path) as here:
        here.store.error = StoreError("locked")
        for _ in range(3):
            here.post(here.take(10), 7)
            await here.until(lambda: here.keeper.store_error)
        (account,) = here.books.accounts()
        assert (account.posted, account.spent, account.granted) == (0, 21, 100)
        assert here.journal.behind_bytes > 0
        assert here.rows() == []
        here.store.error = None
        await here.told()
        assert (account.posted, account.spent, account.granted) == (21, 0, 79)
        assert len(here.rows()) == 3
        assert here.keeper.store_error == ""
        assert here.keeper.store_errors >= 1


async def test_a_bug_in_the_store_does_not_end_the_loop(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with office(tmp_path) as here:
        here.store.error = ZeroDivisionError("a bug")
        here.post(here.take(10), 7)
        await here.until(lambda: here.keeper.store_error)
        assert "ZeroDivisionError" in here.keeper.store_error
        assert "bug in the bookkeeper" in caplog.text
        here.store.error = None
        await here.told()
        assert len(here.rows()) == 1


async def test_what_the_journal_did_not_take_is_not_told_before_it_does(tmp_path: Path) -> None:
    async with office(tmp_path) as here:
        row, spent, lines = here.settled(here.take(10), 7)
        with full_disk(here.journal):
            with pytest.raises(Refused):
                here.journal.append(*lines)
            here.keeper.owe(lines, [(row, spent)])
            count = len(here.store.batches)
            await here.until(lambda: len(here.store.batches) > count or here.keeper._journal_error)
            (account,) = here.books.accounts()
            # The money is spent all the same.
            assert (account.spent, account.available) == (7, 93)
            assert here.rows() == []
        await here.told()
        assert here.rows() == [row.id]
        assert row.id.encode() in here.journal.path.read_bytes()


async def test_shares_that_are_reached_are_told_once(tmp_path: Path) -> None:
    async with office(tmp_path, usd(100, warn_at=(0.5,))) as here:
        for _ in range(8):
            here.post(here.take(10), 10)
            await here.told()
        assert [crossing.share for crossing in here.crossings] == [0.5]
        here.post(here.take(20), 20)
        await here.told()
        assert [crossing.share for crossing in here.crossings] == [0.5, 1.0]


async def test_other_rules_are_told_to_the_store_before_anything_else(tmp_path: Path) -> None:
    async with office(tmp_path) as here:
        rules = rules_of([usd(200)], "dev")
        here.books.change_rules(rules)
        here.keeper.take_rules(rules)
        await here.until(lambda: len(here.store.joined) == 2)
        assert here.store.joined[-1] == rules
        assert await here.wait_for(150) is not None


# --- Asking -----------------------------------------------------------------------------------------------------------


async def test_a_thousand_calls_that_need_a_lease_cost_one_transaction(tmp_path: Path) -> None:
    async with office(tmp_path, usd(10_000, scope="user")) as here:
        before = len(here.store.batches)
        found = await asyncio.gather(*[here.wait_for(10) for _ in range(1_000)])
        assert all(found)
        asked = [batch for batch in here.store.batches[before:] if batch.asks]
        assert len(asked) <= 3
        # Not one more, and nothing was held for the one that did not fit.
        assert await here.wait_for(1, wait_s=0) is None
        (account,) = here.books.accounts()
        assert (account.held, account.granted) == (10_000, 10_000)


async def test_a_slow_disk_does_not_keep_a_call_from_its_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    may_return, is_called = threading.Event(), threading.Event()

    def slow(_: int) -> None:
        is_called.set()
        assert may_return.wait(PATIENCE_S)

    async with office(tmp_path, usd(100, scope="user"), answer_s=PATIENCE_S / 2) as here:
        hold = await here.wait_for(10)
        assert hold is not None
        monkeypatch.setattr("gateway.store.journal.os.fsync", slow)
        here.post(hold, 10)
        await here.until(is_called.is_set)
        assert await here.wait_for(10, on=ON._replace(user="bob")) is not None
        await here.told()
        may_return.set()


async def test_a_disk_that_fails_to_flush_is_told_once_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tries = 0

    def fails(_: int) -> None:
        nonlocal tries
        tries += 1
        raise OSError(errno.EIO, "Input/output error")

    async with office(tmp_path) as here:
        monkeypatch.setattr("gateway.store.journal.os.fsync", fails)
        here.post(here.take(10), 7)
        await here.until(lambda: tries > 2)
        await here.told()
        monkeypatch.undo()
        await here.until(lambda: not here.keeper._journal_error)
    assert caplog.text.count("Input/output error") == 1


async def test_a_store_that_hangs_is_waited_for_so_long_and_no_longer(tmp_path: Path) -> None:
    async with office(tmp_path, usd(100, scope="user"), answer_s=0.05) as here:
        here.store.may_answer.clear()
        with pytest.raises(Refused) as refused:
            await here.wait_for(10)
        assert (refused.value.code, refused.value.status) == ("budget_unavailable", 503)
        assert refused.value.headers["Retry-After"] == "1"
        here.store.may_answer.set()
        await here.until(lambda: not here.keeper._asks)
        assert await here.wait_for(10) is not None


async def test_a_cap_that_stays_open_goes_on_without_its_store_and_is_one_again_with_it(tmp_path: Path) -> None:
    async with office(tmp_path, usd(100, scope="user", on_store_failure="open"), answer_s=0.05) as here:
        here.store.error = StoreError("gone")
        for _ in range(10):
            hold = await here.wait_for(10)
            assert hold is not None
            here.post(hold, 10)
        assert here.keeper.unleased_nusd == 100
        # What is spent as far as is known here stays spent, and is said at once.
        assert await here.wait_for(10) is None
        here.store.error = None
        await here.told()
        await here.until(lambda: not here.keeper.store_error)
        (account,) = here.books.accounts()
        assert (account.posted, account.spent, account.granted) == (100, 0, 0)
        assert await here.wait_for(1, wait_s=0) is None


# --- Waiting ----------------------------------------------------------------------------------------------------------


async def queue_up(here: Office, *amounts: int) -> list[asyncio.Task[Hold | None]]:
    """Calls that wait for so much each, in this order."""
    tasks = []
    for amount in amounts:
        tasks.append(asyncio.create_task(here.wait_for(amount)))
        await here.until(lambda: sum(map(len, here.keeper._waiting.values())) == len(tasks))
    return tasks


async def test_who_came_first_is_served_first_however_often_they_look(tmp_path: Path) -> None:
    async with office(tmp_path) as here:
        first = here.take(90)
        waiting = await queue_up(here, 60, 50, 40)
        # Each transaction has them look again, in vain.
        (account,) = here.books.accounts()
        seen_s = account.seen_s
        here.keeper._asked_s = float("-inf")
        await here.until(lambda: account.seen_s > seen_s)
        await here.until(lambda: sum(map(len, here.keeper._waiting.values())) == 3)
        here.post(first, 10)
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        assert [one.done() for one in waiting] == [True, False, False]
        for place in range(2):
            hold = waiting[place].result()
            assert hold is not None
            here.post(hold, 1)
            await asyncio.wait(waiting[place + 1 :], return_when=asyncio.FIRST_COMPLETED)
            assert waiting[place + 1].done()
        assert not here.keeper._waiting


async def test_what_one_gives_back_serves_as_many_as_it_can(tmp_path: Path) -> None:
    async with office(tmp_path) as here:
        first = here.take(100)
        waiting = await queue_up(here, 30, 30, 30, 30)
        here.post(first, 0)
        await asyncio.wait(waiting[:3])
        assert [one.done() for one in waiting] == [True, True, True, False]
        hold = waiting[0].result()
        assert hold is not None
        here.post(hold, 0)
        assert await waiting[3] is not None


async def test_who_leaves_when_it_is_their_turn_does_not_take_it_along(tmp_path: Path) -> None:
    async with office(tmp_path) as here:
        first = here.take(100)
        one, other = await queue_up(here, 60, 60)
        # In one turn of the loop: woken, and gone.
        here.post(first, 0)
        one.cancel()
        assert await other is not None
        assert one.cancelled()
        assert not here.keeper._waiting


async def test_what_will_not_come_is_not_waited_for(tmp_path: Path) -> None:
    async with office(tmp_path) as here:
        here.post(here.take(60), 60)
        # It is posted, not held: waiting for it would be in vain.
        assert await here.wait_for(50) is None
        hold = here.take(40)
        assert await here.wait_for(30, wait_s=0) is None
        assert await here.wait_for(30, wait_s=0.01) is None
        here.post(hold, 0)
        assert await here.wait_for(30) is not None


# --- The end ----------------------------------------------------------------------------------------------------------


async def test_at_the_end_everything_is_told_and_given_back(tmp_path: Path) -> None:
    async with office(tmp_path) as here:
        for _ in range(3):
            here.post(here.take(10), 7)
    assert len(here.rows()) == 3
    assert here.store.is_closed
    # Whoever comes next finds all that is left, and not a bit more.
    async with office(tmp_path) as again:
        again.take(79)
        assert isinstance(again.reserve(1), Shortfall)


async def test_an_end_without_a_store_leaves_the_rest_to_the_journal(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with office(tmp_path) as here:
        row = here.post(here.take(10), 7)
        here.store.error = StoreError("gone")
    assert "brought up to it at the next start" in caplog.text
    await asyncio.to_thread(here.keeper._thread.shutdown)
    assert here.store.is_closed
    assert row.id.encode() in here.journal.path.read_bytes()
