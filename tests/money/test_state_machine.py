"""The law of money, on the real parts: whatever is done in whatever order, no cap is overdrawn and nothing is lost.

Up to three processes, each a real Treasury (books, journal, bookkeeper) on one real SQLite ledger, are driven by one
clock that goes both ways. They reserve, settle, void, doubt, fail over, tell the store, find it locked, sleep beyond
their lease's time to live, take other rules, and are killed between any two writes or within one. What became of their
calls is told by the same way. Beside them the machine keeps its own list of what happened, and compares. Only threads
and time are taken out: what runs in the bookkeeper's thread runs at once, and other calls may come in its midst.
"""

import asyncio
import os
import shutil
import sqlite3
import tempfile
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, TypeVar

import msgspec
import pytest
from hypothesis import HealthCheck, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from gateway import treasury
from gateway.decide.budget import Hold, Shortfall
from gateway.decide.caps import Rule, rules_of
from gateway.domain.call import Attempt as Try
from gateway.domain.call import CallRecord
from gateway.domain.errors import Refused
from gateway.domain.ledger import Amounts, Dimensions, Held, InDoubt, LedgerRow, Line, Posted, Void, row_of
from gateway.domain.outcome import Outcome, outcome_of
from gateway.domain.policy import Cap
from gateway.domain.reading import Usd
from gateway.edge import bookkeeper, headroom
from gateway.edge.bookkeeper import Bookkeeper, Spent
from gateway.store import journal as journals
from gateway.store.experiments import Experiments
from gateway.store.journal import Journal
from gateway.store.ledger import Ledger
from gateway.store.sqlite import SqliteStore
from gateway.store.store import Batch, Spot, StoreError, Synced
from gateway.treasury import CannotKeepBooks, Treasury

T = TypeVar("T")
ENV = "test"
T0 = 1_800_000_000.0  # An hour begins, and it is 08:00 UTC.
CAPS = (
    Cap(per="hour", usd=Usd(1_000)),
    Cap(scope="user", per="total", usd=Usd(600)),
    Cap(per="total", requests=25),
    Cap(scope="agent+model", per="day", timezone="Asia/Kolkata", tokens=2_000),
    Cap(per="month", usd=Usd(3_000), only={"model": ["m2"]}),
)
LIMITS = {"usd": (300, 1_000, 3_000), "requests": (4, 25), "tokens": (500, 2_000)}
AMOUNTS = st.builds(Amounts, st.integers(0, 500), st.just(1), st.integers(0, 900))
DIMENSIONS = st.builds(
    lambda agent, user, model: Dimensions(agent=agent, user=user, model=model),
    agent=st.sampled_from(("a1", "a2")),
    user=st.sampled_from(("u1", "u2", "")),
    model=st.sampled_from(("m1", "m2")),
)
Fate = Literal["done", "locked", "dies before", "dies after", "meanwhile"]
End = Literal["within", "above", "void", "doubt"]
FATES = st.lists(st.sampled_from(("done", "done", "meanwhile", "locked", "dies before", "dies after")), max_size=2)
HOWS = st.sampled_from(("within", "within", "above", "void", "doubt"))


class Killed(BaseException):
    """SIGKILL reached the process at this point."""


class Clock:
    """Stands in for the module `time`: the hour, which may jump, and time that only passes."""

    def __init__(self) -> None:
        self.now_s = T0
        self.steady_s = 1_000.0

    def time(self) -> float:
        return self.now_s

    def monotonic(self) -> float:
        return self.steady_s


class Stepped(Bookkeeper):
    """The bookkeeper without its thread and its loop: it goes when it is told to, a few rows at a time."""

    async def _run(self) -> None:
        pass

    async def _sync(self, *, max_rows: int = 3, is_leaving: bool = False) -> None:
        await super()._sync(max_rows=max_rows, is_leaving=is_leaving)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return work()

    async def tick(self) -> None:
        """One round of its loop, without the flush."""
        with suppress(Refused):
            self._write_owed()
        try:
            await self._step()
        except StoreError as error:
            self._failed(error)


class Paper(Journal):
    """The journal on a disk that may be full, and under a process that may die while it writes."""

    is_full = False
    # How much of the next write gets to the disk before the process dies.
    tear: float | None = None
    wrote: Callable[[Line], None]

    def append(self, *lines: Line) -> None:
        before, size = self.path, self._size
        super().append(*lines)
        start = size if self.path == before else 0
        tear, Paper.tear = Paper.tear, None
        if tear is not None and lines:
            os.truncate(self.path, start + round(tear * (self._size - start)))
            survived = self.path.read_bytes()[start:].count(b"\n")
            lines = lines[:survived]
        for line in lines:
            self.wrote(line)
        if tear is not None:
            raise Killed

    def _write(self, data: bytes) -> None:
        if Paper.is_full:
            raise Refused("journal_unavailable", "the journal's disk is full")
        super()._write(data)


class Attempt:
    """What the machine knows of an attempt: its hold, whether the journal has it, and how the journal has its end."""

    def __init__(self, held: Held, hold: Hold) -> None:
        self.held = held
        self.hold = hold
        # What was set aside for it, or is counted as excess.
        self.covered = {Spot(account.name, account.start_s): amount for account, amount in hold.entries}
        self.is_written = False
        self.end: Posted | Void | InDoubt | None = None
        self.is_released = False

    def row(self) -> LedgerRow | None:
        """The row that the ledger is to have of it in the end."""
        if self.end is None:
            return None
        row = row_of(self.held, self.end)
        return msgspec.structs.replace(row, state="released") if self.is_released else row


class Process:
    """A gateway that is alive, and its calls."""

    def __init__(self, money: Treasury) -> None:
        self.money = money
        # Under way; and those that have ended in the books, with their ends, for the next write.
        self.open: list[Attempt] = []
        self.ended: list[tuple[Attempt, Posted | Void | InDoubt]] = []
        # All whose end the journal does not have.
        self.unsafe: list[Attempt] = []

    @property
    def bookkeeper(self) -> Stepped:
        assert isinstance(self.money.bookkeeper, Stepped)
        return self.money.bookkeeper

    @property
    def name(self) -> str:
        return self.money.journal.holder


class Wire:
    """The way from a process to the ledger, on which things happen."""

    def __init__(self, machine: "Money", store: SqliteStore) -> None:
        self._machine = machine
        self._store = store
        self.holder = ""

    def join(self, holder: str, rules: Sequence[Rule]) -> tuple[int, int]:
        self.holder = holder
        return self._through(lambda: self._store.join(holder, rules))

    def sync(self, batch: Batch) -> Synced:
        return self._through(lambda: self._checked(batch))

    def leave(self) -> None:
        self._through(self._store.leave)

    def close(self) -> None:
        self._store.close()

    def _through(self, work: Callable[[], T]) -> T:
        machine = self._machine
        fate = machine.fates.popleft() if machine.fates else "done"
        if fate == "dies before":
            raise Killed
        if fate == "locked":
            machine.reader.execute("BEGIN IMMEDIATE")
            try:
                return work()
            finally:
                machine.reader.execute("ROLLBACK")
        if fate == "meanwhile":
            machine.meanwhile(self.holder)
        found = work()
        if fate == "meanwhile":
            machine.meanwhile(self.holder)
        if fate == "dies after":
            raise Killed
        return found

    def _checked(self, batch: Batch) -> Synced:
        """Whoever is granted more of an account is granted what is there, and not a unit above."""
        machine = self._machine
        before = machine.leases_of(self.holder)
        found = self._store.sync(batch)
        after = machine.leases_of(self.holder)
        for ask in () if found.was_lost else batch.asks:
            if after.get(ask.spot, 0) > before.get(ask.spot, 0):
                assert machine.taken(ask.spot) <= ask.rule.limit, ask
        return found


class Money(RuleBasedStateMachine):
    """See the module."""

    def __init__(self) -> None:
        super().__init__()
        memory = Path("/dev/shm")
        self.root = Path(tempfile.mkdtemp(prefix="money-", dir=memory if os.access(memory, os.W_OK) else None))
        self.clock = Clock()
        self.loop = asyncio.new_event_loop()
        Paper.is_full, Paper.tear, Paper.wrote = False, None, staticmethod(self.wrote)  # type: ignore[assignment]
        self.patched = pytest.MonkeyPatch()
        self.patched.setattr(bookkeeper, "time", self.clock)
        self.patched.setattr(headroom, "time", self.clock)
        # Names of processes in an order that can be had again.
        names = count()
        self.patched.setattr(journals.uuid, "uuid4", lambda: SimpleNamespace(hex=f"{next(names):012x}"))
        self.patched.setattr(treasury, "Bookkeeper", Stepped)
        self.patched.setattr(treasury, "Journal", Paper)
        self.patched.setattr(treasury, "_MIB", 1)
        self.patched.setattr(treasury, "open_store", lambda _: Wire(self, self.open_store()))
        self.patched.setattr(treasury, "claim_all", self.claim_all)
        self.locked: list[tuple[Path, int]] = []
        self.stores: list[SqliteStore] = []
        self.fates: deque[Fate] = deque()
        self.interludes: list[Callable[[Process], None]] = []
        self.processes: list[Process] = []
        self.attempts: dict[str, Attempt] = {}
        # What became of the calls that a journal has.
        self.recorded: dict[str, Outcome] = {}
        self.calls = 0
        self.rules = rules_of(CAPS[:3], ENV)
        # Every rule that ever was in force, and the highest limit it ever had.
        self.known = {rule.id: rule for rule in self.rules}
        self.highest = {rule.id: rule.limit for rule in self.rules}
        # Rules that were left, and may have come back.
        self.left: set[str] = set()
        # What was taken above what was set aside for it, account by account.
        self.excess: dict[Spot, int] = {}
        self.ledger = Ledger(self.root / "ledger.db", clock=self.clock.time)
        self.experiments = Experiments(self.root / "ledger.db", clock=self.clock.time)
        self.reader = sqlite3.connect(self.root / "ledger.db", isolation_level=None)

    # --- The world ---------------------------------------------------------------------------------------------------

    def open_store(self) -> SqliteStore:
        store = SqliteStore(self.root / "ledger.db", clock=self.clock.time, busy_s=0.0)
        self.stores.append(store)
        return store

    def claim_all(self, root: Path) -> list[tuple[Path, int]]:
        self.locked = journals.claim_all(root)
        return list(self.locked)

    def run(self, work: Awaitable[T]) -> T:
        return self.loop.run_until_complete(work)

    def query(self, sql: str, *values: object) -> list[tuple[Any, ...]]:
        return self.reader.execute(sql, values).fetchall()

    def leases_of(self, holder: str) -> dict[Spot, int]:
        found = self.query("SELECT account, start_s, amount FROM leases WHERE holder = ?", holder)
        return {Spot(account, start_s): amount for account, start_s, amount in found}

    def taken(self, spot: Spot) -> int:
        """Posted or leased."""
        ((posted,),) = self.query("SELECT posted FROM accounts WHERE account = ? AND start_s = ?", *spot)
        ((leased,),) = self.query(
            "SELECT coalesce(sum(amount), 0) FROM leases WHERE account = ? AND start_s = ?", *spot
        )
        return int(posted + leased)

    def wrote(self, line: Line) -> None:
        """The journal of a process has this line."""
        if isinstance(line, CallRecord):
            outcome = outcome_of(line)
            assert outcome is not None
            assert self.recorded.setdefault(line.id, outcome) == outcome, "a call is over once"
            return
        attempt = self.attempts[line.id]
        if isinstance(line, Held):
            attempt.is_written = True
        elif attempt.end is None:
            self.over(attempt, line)
        else:
            assert line == attempt.end, "an attempt ends once"

    def over(self, attempt: Attempt, end: Posted | Void | InDoubt) -> None:
        """This is how it ended."""
        attempt.end = end
        self.count_excess(attempt, row_of(attempt.held, end).amounts)

    def count_excess(self, attempt: Attempt, taken: Amounts) -> None:
        """What is taken above what was set aside is in `excess`, once."""
        on, at_s = attempt.held.on, attempt.held.at_ms / 1000
        for each in self.known.values():
            if each.applies(on):
                spot = Spot(each.account(on), each.window(at_s).start_s)
                above = each.amount(taken) - attempt.covered.get(spot, 0)
                if above > 0:
                    attempt.covered[spot] = each.amount(taken)
                    self.excess[spot] = self.excess.get(spot, 0) + above

    def died(self, process: Process) -> None:
        """The process is gone, and what it knew. Holds whose end is in no journal are in doubt from now on."""
        self.processes.remove(process)
        journal = process.money.journal
        os.close(journal._fd)
        os.close(process.money._lock)
        for attempt in process.unsafe:
            if attempt.end is None and attempt.is_written:
                self.over(attempt, InDoubt(attempt.held.id))
            elif not attempt.is_written:
                del self.attempts[attempt.held.id]

    def alive(self, process: Process, work: Awaitable[object]) -> bool:
        """Run what may meet the process's death; whether it lives on."""
        try:
            self.run(work)
        except Killed:
            self.died(process)
            return False
        finally:
            self.fates.clear()
            self.interludes.clear()
            Paper.tear = None
        return True

    def meanwhile(self, holder: str) -> None:
        """What other calls of the process do while its bookkeeper is at the store."""
        for process in self.processes:
            if process.name == holder:
                for interlude in self.interludes:
                    interlude(process)

    # --- A call, as edge/open_call.py makes it -----------------------------------------------------------------------

    async def begin(self, process: Process, on: Dimensions, bound: Amounts) -> None:
        """Reserve, and ask the ledger for more until it has no more."""
        for _ in range(4):
            short = self.reserve(process, on, bound)
            if short is None:
                return
            asking = asyncio.ensure_future(process.bookkeeper.headroom.find(short, came_s=0.0, wait_s=0.0))
            try:
                await turns()
                if not asking.done():
                    await process.bookkeeper.tick()
                    await turns()
                # Where it is not done now, the call would hear nothing for as long as a call waits for the store.
                if not asking.done() or not asking.result():
                    return
            except Refused:
                return
            finally:
                asking.cancel()

    def reserve(self, process: Process, on: Dimensions, bound: Amounts) -> Shortfall | None:
        """Hold it and write it down, with the ends that are not written yet; or why not."""
        money = process.money
        found = money.books.reserve(on, bound, is_priced=True, now_s=self.clock.now_s)
        if isinstance(found, Shortfall):
            return found
        self.calls += 1
        held = Held(f"c{self.calls}.1", found.at_ms, ENV, on, bound)
        attempt = self.attempts[held.id] = Attempt(held, found)
        process.unsafe.append(attempt)
        try:
            self.write(process, held)
        except Refused:
            money.books.void(found)
            process.unsafe.remove(attempt)
            del self.attempts[held.id]
            return None
        money.bookkeeper.headroom.passed_on(found)
        process.open.append(attempt)
        return None

    def end(self, process: Process, attempt: Attempt, how: End, actual: Amounts) -> None:
        """End an attempt in the books. The journal has it with the next write."""
        books, id = process.money.books, attempt.held.id
        process.open.remove(attempt)
        if how == "void":
            books.void(attempt.hold)
            taken, end = Amounts(), Void(id)
        elif how == "doubt":
            books.doubt(attempt.hold)
            taken, end = attempt.held.amounts, InDoubt(id)
        else:
            books.settle(attempt.hold, actual)
            taken, end = actual, Posted(id, actual)
        process.ended.append((attempt, end))
        # What it did not take is there for others at once. If the process dies before this is written, all of the hold
        # is in doubt nevertheless, beside what the others took: too much is booked then, though not spent.
        for account, held in attempt.hold.entries:
            spot = Spot(account.name, account.start_s)
            attempt.covered[spot] = min(held, account.rule.amount(taken))
        self.count_excess(attempt, taken)

    def write(self, process: Process, *lines: Line) -> None:
        """All that has happened by one write; then it may be told."""
        process.money.journal.append(*(end for _, end in process.ended), *lines)
        for row, spent in self.rows_of(process):
            process.bookkeeper.resolved(row, spent)
        process.ended.clear()

    def finish(self, process: Process) -> None:
        """Write what has ended, with the records of the calls; what the disk does not take is owed."""
        records = [record_of(attempt) for attempt, _ in process.ended]
        try:
            self.write(process, *records)
        except Refused:
            process.bookkeeper.owe([*(end for _, end in process.ended), *records], self.rows_of(process))
            process.ended.clear()
            return
        for record in records:
            process.bookkeeper.recorded(record)

    def rows_of(self, process: Process) -> list[tuple[LedgerRow, Spent]]:
        found = []
        for attempt, end in process.ended:
            row = row_of(attempt.held, end)
            spent = tuple((account, account.rule.amount(row.amounts)) for account, _ in attempt.hold.entries)
            found.append((row, spent))
        return found

    # --- What happens ------------------------------------------------------------------------------------------------

    @initialize()
    def start_first(self) -> None:
        self.start_one([])

    @precondition(lambda self: len(self.processes) < 3)
    @rule(fates=st.lists(st.sampled_from(("done", "done", "locked", "dies before", "dies after")), max_size=6))
    def start(self, fates: list[Fate]) -> None:
        self.start_one(fates)

    def start_one(self, fates: list[Fate]) -> None:
        """A gateway starts, replays its journal and adopts those that were left behind; it may die at that."""
        journal = SimpleNamespace(
            dir=str(self.root / "journal"), sync="write", segment_mb=700, max_behind_mb=2**20, keep_segments=0
        )
        configured = SimpleNamespace(journal=journal, store=SimpleNamespace(timeout_ms=60_000))
        loaded: Any = SimpleNamespace(settings=configured, plan=SimpleNamespace(rules=self.rules))
        self.fates.extend(fates)
        try:
            self.processes.append(Process(self.run(Treasury.open(loaded, lambda _: None))))
        except (Killed, CannotKeepBooks) as error:
            note(f"start failed: {error!r}")
            self.unlock()
        finally:
            self.fates.clear()

    def unlock(self) -> None:
        """Of a process that died as it started, the system lets go what it had locked."""
        for path, fd in self.locked:
            with suppress(OSError):
                if os.path.samestat(os.fstat(fd), (path / journals.LOCK).stat()):
                    os.close(fd)

    @precondition(lambda self: self.processes)
    @rule(data=st.data(), calls=st.lists(st.tuples(DIMENSIONS, AMOUNTS), min_size=1, max_size=6))
    def call(self, data: st.DataObject, calls: list[tuple[Dimensions, Amounts]]) -> None:
        process = self.pick(data, self.processes)
        for on, bound in calls:
            self.run(self.begin(process, on, bound))

    @precondition(lambda self: self.processes)
    @rule(data=st.data(), on=DIMENSIONS, bound=AMOUNTS, fates=FATES)
    def call_in_bad_times(self, data: st.DataObject, on: Dimensions, bound: Amounts, fates: list[Fate]) -> None:
        self.fates.extend(fates)
        self.interludes = [self.interlude(data) for fate in fates if fate == "meanwhile"]
        process = self.pick(data, self.processes)
        self.alive(process, self.begin(process, on, bound))

    @precondition(lambda self: any(process.open for process in self.processes))
    @rule(data=st.data(), hows=st.lists(HOWS, min_size=1, max_size=4), is_disk_full=st.booleans())
    def answer(self, data: st.DataObject, hows: list[End], is_disk_full: bool) -> None:
        process = self.pick(data, [process for process in self.processes if process.open])
        Paper.is_full = is_disk_full
        for how in hows[: len(process.open)]:
            attempt = self.pick(data, process.open)
            self.end(process, attempt, how, data.draw(actual_of(how, attempt.held.amounts)))
            self.finish(process)
        Paper.is_full = False

    @precondition(lambda self: any(process.open for process in self.processes))
    @rule(data=st.data(), how=HOWS, on=DIMENSIONS, bound=AMOUNTS, fates=FATES)
    def fall_back(self, data: st.DataObject, how: End, on: Dimensions, bound: Amounts, fates: list[Fate]) -> None:
        """An attempt fails and the next is held; both are written at once."""
        process = self.pick(data, [process for process in self.processes if process.open])
        attempt = self.pick(data, process.open)
        self.end(process, attempt, how, data.draw(actual_of(how, attempt.held.amounts)))
        self.fates.extend(fate for fate in fates if fate != "meanwhile")
        if self.alive(process, self.begin(process, on, bound)):
            self.finish(process)

    @precondition(lambda self: self.processes)
    @rule(data=st.data(), fates=FATES)
    def tell(self, data: st.DataObject, fates: list[Fate]) -> None:
        """A bookkeeper's round."""
        self.fates.extend(fates)
        self.interludes = [self.interlude(data) for fate in fates if fate == "meanwhile"]
        process = self.pick(data, self.processes)
        self.alive(process, process.bookkeeper.tick())

    def interlude(self, data: st.DataObject) -> Callable[[Process], None]:
        is_call = data.draw(st.booleans())
        on, bound, how = data.draw(DIMENSIONS), data.draw(AMOUNTS), data.draw(HOWS)

        def do(process: Process) -> None:
            if is_call:
                self.reserve(process, on, bound)
            elif process.open:
                attempt = process.open[0]
                self.end(process, attempt, how, ACTUALS[how](attempt.held.amounts))
                self.finish(process)

        return do

    @precondition(lambda self: self.processes)
    @rule(data=st.data())
    def kill(self, data: st.DataObject) -> None:
        self.died(self.pick(data, self.processes))

    @precondition(lambda self: self.processes)
    @rule(data=st.data(), on=DIMENSIONS, bound=AMOUNTS, how=st.none() | HOWS, tear=st.floats(0, 1))
    def kill_within_a_write(
        self, data: st.DataObject, on: Dimensions, bound: Amounts, how: End | None, tear: float
    ) -> None:
        """Whatever it wrote last is torn: an end, a hold, or an end with the next one's hold."""
        process = self.pick(data, self.processes)
        if how is not None and process.open:
            attempt = self.pick(data, process.open)
            self.end(process, attempt, how, data.draw(actual_of(how, attempt.held.amounts)))
        Paper.tear = tear
        try:
            self.reserve(process, on, bound)
            self.finish(process)
        except Killed:
            self.died(process)
        finally:
            Paper.tear = None

    @precondition(lambda self: self.processes)
    @rule(data=st.data())
    def stop(self, data: st.DataObject) -> None:
        """A clean end: what is under way is left in doubt."""
        self.stop_one(self.pick(data, self.processes))

    def stop_one(self, process: Process) -> None:
        for attempt in list(process.open):
            self.end(process, attempt, "doubt", Amounts())
        self.finish(process)
        with suppress(Refused):
            process.bookkeeper._write_owed()
        self.run(process.money.close())
        assert self.leases_of(process.name) == {}
        self.processes.remove(process)

    @rule(seconds=st.sampled_from((0.3, 1.0, 3.0, 16.0, 61.0)))
    def pass_time(self, seconds: float) -> None:
        """More than 15 s: all who do not speak up are taken for dead by whoever does."""
        self.clock.now_s += seconds
        self.clock.steady_s += seconds

    @rule(hours=st.sampled_from((-30.0, -1.0, -0.01, 0.01, 1.0, 30.0, 800.0)))
    def put_the_clock(self, hours: float) -> None:
        self.clock.now_s += hours * 3600

    @rule(data=st.data())
    def change_rules(self, data: st.DataObject) -> None:
        """Another policy, which some processes hear of and others do not yet."""
        some = st.lists(st.sampled_from(CAPS), max_size=len(CAPS), unique_by=id)
        caps = data.draw(some | st.permutations(CAPS))
        self.rules = tuple(
            rule._replace(limit=data.draw(st.sampled_from(LIMITS[rule.unit]))) for rule in rules_of(caps, ENV)
        )
        self.left |= self.known.keys() - {each.id for each in self.rules}
        for each in self.rules:
            if each.id not in self.known:
                self.known[each.id] = each
                # What was reserved before it was there was not reserved in it.
                for attempt in self.attempts.values():
                    if attempt.end is not None:
                        self.count_excess(attempt, row_of(attempt.held, attempt.end).amounts)
            self.highest[each.id] = max(each.limit, self.highest.get(each.id, 0))
        for process in self.processes:
            if data.draw(st.booleans()):
                process.money.take_rules(self.rules)

    @precondition(lambda self: self.query("SELECT 1 FROM ledger WHERE state = 'in_doubt' LIMIT 1"))
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        """An admin ends a doubt."""
        row = self.pick(data, self.ledger.in_doubt(ENV))
        self.ledger.release(ENV, [row.id], who="me", why="I know")
        if row.id in self.attempts:
            self.attempts[row.id].is_released = True
            return
        # The rest of a lease. Its holder may be there, only asleep, and spend what was freed.
        ((account, at_ms),) = self.query("SELECT account, at_ms FROM ledger WHERE id = ?", row.id)
        for rule_id, each in self.known.items():
            if account == rule_id or account.startswith(f"{rule_id} "):
                spot = Spot(account, each.window(at_ms / 1000).start_s)
                self.excess[spot] = self.excess.get(spot, 0) + sum(row.amounts)

    def pick(self, data: st.DataObject, found: Sequence[T]) -> T:
        return found[data.draw(st.integers(0, len(found) - 1))]

    # --- The law -----------------------------------------------------------------------------------------------------

    @invariant()
    def no_cap_is_overdrawn(self) -> None:
        """Posted and leased stay within the limit, but for what was taken above what was set aside."""
        for account, start_s, rule_id in self.query("SELECT account, start_s, rule_id FROM accounts"):
            spot = Spot(account, start_s)
            if rule_id in self.left:
                # Rows that were told while nobody went by the rule have not used up its leases; when it comes back,
                # both are counted, and there is less to spend for a while.
                continue
            assert self.taken(spot) <= self.highest[rule_id] + self.excess.get(spot, 0), spot

    @invariant()
    def what_a_process_holds_is_leased_to_it(self) -> None:
        """Or is posted as in doubt, where it was taken for dead."""
        lost = (
            "SELECT coalesce(sum(nusd + requests + tokens), 0) FROM ledger "
            "WHERE holder = ? AND account = ? AND state = 'in_doubt'"
        )
        for process in self.processes:
            leases = self.leases_of(process.name)
            for account in process.money.books.accounts():
                spot = Spot(account.name, account.start_s)
                ((doubted,),) = self.query(lost, process.name, account.name)
                covered = leases.get(spot, 0) + doubted + self.excess.get(spot, 0)
                assert account.held + account.spent <= covered, (process.name, spot, account.held, account.spent)
                assert account.held >= 0
                assert account.available <= covered

    @invariant()
    def the_ledger_has_each_attempt_once_and_as_it_ended(self) -> None:
        for row in self.ledger.rows(ENV):
            if row.source != "lease":
                assert row == self.attempts[row.id].row()

    @invariant()
    def the_store_has_no_call_but_as_a_journal_has_it(self) -> None:
        for call in self.experiments.outcomes(ENV):
            assert call == self.recorded[call.id]

    @invariant()
    def sums_are_folds(self) -> None:
        assert self.ledger.verify(ENV) == []

    def teardown(self) -> None:
        try:
            self.settle_all()
        finally:
            self.close()

    def settle_all(self) -> None:
        """In the end everything is told, nothing is leased, and the ledger is the machine's own list."""
        self.fates.clear()
        for process in list(self.processes):
            self.stop_one(process)
        # Whoever starts adopts those who died.
        self.start_one([])
        self.stop_one(self.processes[0])
        assert self.query("SELECT * FROM leases") == []
        rows = {row.id: row for row in self.ledger.rows(ENV) if row.source != "lease"}
        assert rows == {id: attempt.row() for id, attempt in self.attempts.items()}
        assert {call.id: call for call in self.experiments.outcomes(ENV)} == self.recorded
        self.no_cap_is_overdrawn()
        self.sums_are_folds()

    def close(self) -> None:
        self.patched.undo()
        for process in list(self.processes):
            self.died(process)
        for store in self.stores:
            store.close()
        self.ledger.close()
        self.experiments.close()
        self.reader.close()
        self.loop.close()
        shutil.rmtree(self.root)
        Paper.is_full = False


async def turns() -> None:
    """Let everybody come who has something to do at once."""
    for _ in range(5):
        await asyncio.sleep(0)


def record_of(attempt: Attempt) -> CallRecord:
    """The record of a call that this attempt was the last of."""
    held = attempt.held
    tries = [Try(ref=held.on.model, started_ms=held.at_ms, status=200)]
    return CallRecord(
        id=held.id.partition(".")[0], at_ms=held.at_ms, env=ENV, agent=held.on.agent, attempts=tries, status=200
    )


def actual_of(how: End, held: Amounts) -> st.SearchStrategy[Amounts]:
    if how == "above":
        nusd, tokens = st.integers(held.nusd, held.nusd + 300), st.integers(held.tokens, held.tokens + 300)
        return st.builds(Amounts, nusd, st.just(1), tokens)
    return st.builds(Amounts, st.integers(0, held.nusd), st.just(1), st.integers(0, held.tokens))


ACTUALS: dict[End, Callable[[Amounts], Amounts]] = {
    "within": lambda held: Amounts(held.nusd // 2, 1, held.tokens),
    "above": lambda held: Amounts(held.nusd + 7, 1, held.tokens + 5),
    "void": lambda held: Amounts(),
    "doubt": lambda held: held,
}

TestMoney = Money.TestCase
TestMoney.settings = settings(
    max_examples=30, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
