"""What the bookkeeper tells the store, and when; on a real one that can be made to fail or to hang."""

import asyncio
import errno
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from gateway.decide.budget import Shortfall
from gateway.decide.caps import rules_of
from gateway.decide.rollout import Cause, change_by
from gateway.domain.call import CallRecord
from gateway.domain.errors import Refused
from gateway.domain.rollout import Event
from gateway.edge import bookkeeper
from gateway.store.experiments import Experiments
from gateway.store.journal_reader import read_segment
from gateway.store.leases import TTL_S
from gateway.store.sqlite import SqliteStore
from gateway.store.store import Ask, Batch, Spot, StoreError
from tests.journey import full_disk
from tests.office import ON, PATIENCE_S, Office, office, usd
from tests.outcomes import outcome, record
from tests.rolling import NOW_MS, first

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


def over(here: Office, id: str, **changes: object) -> CallRecord:
    """A call is over, and the journal has it."""
    found = record(id, **changes)
    here.journal.append(found)
    here.keeper.recorded(found)
    return found


async def test_what_became_of_a_call_is_told_once_with_all_else_there_is_to_tell(tmp_path: Path) -> None:
    async with by_hand(tmp_path) as here:
        here.post(here.take(10), 7)
        over(here, "c1")
        await here.keeper._sync()
        over(here, "c2")
        over(here, "nobody was asked", attempts=[])
        await here.keeper._sync()
        await here.keeper._sync()
        assert [(len(batch.rows), len(batch.outcomes)) for batch in here.store.batches[-3:]] == [(1, 1), (0, 1), (0, 0)]
        assert here.store.batches[-3].outcomes == [outcome("c1")]
        assert here.calls() == ["c1", "c2"]


async def test_what_became_of_a_call_is_told_again_where_the_store_did_not_take_it(tmp_path: Path) -> None:
    async with office(tmp_path) as here:
        here.store.error = StoreError("locked")
        over(here, "c1")
        await here.until(lambda: here.keeper.store_error)
        over(here, "c2")
        assert here.calls() == []
        assert here.journal.behind_bytes > 0
        here.store.error = None
        await here.told()
        assert here.calls() == ["c1", "c2"]
        assert here.journal.behind_bytes == 0


async def test_the_journal_is_told_only_when_all_calls_are(tmp_path: Path) -> None:
    async with by_hand(tmp_path) as here:
        for number in range(3):
            over(here, f"c{number}")
        await here.keeper._sync(max_rows=2)
        assert here.store.batches[-1].told is None
        assert here.journal.behind_bytes == here.journal.written_bytes
        await here.keeper._sync(max_rows=2)
        assert here.store.batches[-1].told == here.journal.position()
        assert here.journal.behind_bytes == 0
        assert here.calls() == ["c0", "c1", "c2"]


async def test_a_call_that_the_journal_did_not_take_is_not_told_before_it_does(tmp_path: Path) -> None:
    async with by_hand(tmp_path) as here:
        late = record("c1")
        with full_disk(here.journal):
            here.keeper.owe([late], [])
            with pytest.raises(Refused):
                here.keeper._write_owed()
            await here.keeper._sync()
            assert here.calls() == []
    # The end writes what is owed, and tells it.
    assert here.calls() == ["c1"]
    assert list(read_segment(here.journal.path)) == [late]


async def test_what_became_of_calls_is_told_at_the_end_too(tmp_path: Path) -> None:
    async with by_hand(tmp_path) as here:
        over(here, "c1")
    assert here.calls() == ["c1"]


async def test_a_rollout_that_has_changed_is_heard_of_once_by_who_has_nothing_to_tell(tmp_path: Path) -> None:
    async with office(tmp_path) as here:
        with Experiments(tmp_path / "gateway.db", clock=time.time) as experiments:
            change = first().change
            assert change is not None
            state = experiments.begin("dev", change)
            await here.until(lambda: here.rollouts)
            count = len(here.store.batches)
            await here.until(lambda: len(here.store.batches) > count + 1)
            assert here.rollouts == [{("dev", "qa_agent"): state}]
            raised = change_by(state, Event.RAISED, 2_500, Cause(NOW_MS, "ann", ("because",))).change
            assert raised is not None
            after = experiments.apply("dev", raised)
            await here.until(lambda: len(here.rollouts) > 1)
        assert here.rollouts[1:] == [{("dev", "qa_agent"): after}]
        assert here.keeper.rollouts == here.rollouts[-1]


async def test_a_start_hears_where_the_rollouts_stand(tmp_path: Path) -> None:
    change = first().change
    assert change is not None
    with Experiments(tmp_path / "gateway.db", clock=time.time) as experiments:
        state = experiments.begin("dev", change)
    async with by_hand(tmp_path) as here:
        assert here.rollouts == [{("dev", "qa_agent"): state}]


async def test_shares_that_are_reached_are_told_once(tmp_path: Path) -> None:
    async with office(tmp_path, usd(100, warn_at=(0.5,))) as here:
        for _ in range(8):
            here.post(here.take(10), 10)
            await here.told()
        assert [crossing.share for crossing in here.crossings] == [0.5]
        here.post(here.take(20), 20)
        await here.told()
        assert [crossing.share for crossing in here.crossings] == [0.5, 1.0]


async def test_a_share_is_told_though_the_journals_folder_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with office(tmp_path, usd(100, warn_at=(0.5,))) as here:

        def breaks(*_: object) -> None:
            raise OSError(24, "Too many open files")

        monkeypatch.setattr(here.journal, "prune", breaks)
        here.post(here.take(60), 60)
        await here.told()
        # The store has written down that it was told, so nobody tells of it again.
        assert [crossing.share for crossing in here.crossings] == [0.5]
    assert "old segments of the journal cannot be deleted: Too many open files" in caplog.text


async def test_other_rules_are_told_to_the_store_before_anything_else(tmp_path: Path) -> None:
    async with office(tmp_path) as here:
        rules = rules_of([usd(200)], "dev")
        here.books.change_rules(rules)
        here.keeper.take_rules(rules)
        await here.until(lambda: len(here.store.joined) == 2)
        assert here.store.joined[-1] == rules
        assert await here.wait_for(150) is not None


async def test_rules_that_the_store_did_not_take_are_told_again(tmp_path: Path) -> None:
    async with office(tmp_path) as here:
        rules = rules_of([usd(200)], "dev")
        here.store.error = StoreError("locked")
        here.books.change_rules(rules)
        here.keeper.take_rules(rules)
        await here.until(lambda: here.keeper.store_error)
        here.store.error = None
        await here.until(lambda: here.store.joined[-1] == rules)


async def test_what_another_process_wants_goes_back_as_soon_as_that_is_heard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So the bookkeeper does not go by itself.
    monkeypatch.setattr(bookkeeper, "TICK_S", 600.0)
    async with office(tmp_path) as here:
        (account,) = here.books.accounts()
        other = SqliteStore(tmp_path / "gateway.db", clock=time.time)
        other.join("other", here.books.rules)
        spot = Spot(account.name, account.start_s)
        refused = other.sync(Batch(asks=[Ask(account.rule, ON, spot, account.end_s, 50, 50)]))
        assert refused.accounts[spot].leased == 0
        here.keeper._asked_s = float("-inf")
        here.keeper._wake.set()
        async with asyncio.timeout(PATIENCE_S):
            while not any(batch.returns for batch in here.store.batches):
                await asyncio.to_thread(lambda: None)
        await here.quiet()
        assert other.sync(Batch(asks=[Ask(account.rule, ON, spot, account.end_s, 50, 50)])).accounts[spot].leased == 50
        other.leave()
        other.close()


# --- One transaction --------------------------------------------------------------------------------------------------


@asynccontextmanager
async def by_hand(folder: Path) -> AsyncIterator[Office]:
    """An office whose bookkeeper goes to the store only when it is sent."""
    async with office(folder) as here:
        here.keeper._is_closing = True
        here.keeper._wake.set()
        assert here.keeper._task is not None
        await here.keeper._task
        yield here


async def test_what_is_told_needs_no_lease_any_more_and_what_is_in_flight_still_does(tmp_path: Path) -> None:
    async with by_hand(tmp_path) as here:
        in_flight = here.take(30)
        here.post(here.take(10), 7)
        here.post(here.take(10), 5)
        await here.keeper._sync(max_rows=1)
        # What is spent and not told is covered, too, and the journal must be read again for it.
        assert here.store.batches[-1].told is None
        assert here.journal.behind_bytes == here.journal.written_bytes
        assert [amount for _, amount in here.store.batches[-1].held] == [35]
        await here.keeper._sync()
        assert here.store.batches[-1].told == here.journal.position()
        assert here.journal.behind_bytes == 0
        assert [amount for _, amount in here.store.batches[-1].held] == [30]
        here.post(in_flight, 0)
        await here.keeper._sync()
        assert here.store.batches[-1].held == []


@pytest.mark.parametrize("clock", ["_heard_s", "_heard_at_s"])
async def test_after_a_long_silence_all_that_no_call_holds_is_given_back(tmp_path: Path, clock: str) -> None:
    async with by_hand(tmp_path) as here:
        in_flight = here.take(30)
        setattr(here.keeper, clock, getattr(here.keeper, clock) - TTL_S / 2 + 2)
        await here.keeper._sync()
        assert here.store.batches[-1].returns == []
        # Asleep, whichever of the clocks stood still meanwhile.
        setattr(here.keeper, clock, getattr(here.keeper, clock) - TTL_S / 2)
        await here.keeper._sync()
        assert [amount for _, amount in here.store.batches[-1].returns] == [70]
        (account,) = here.books.accounts()
        assert (account.granted, account.held) == (30, 30)
        here.post(in_flight, 1)


async def test_what_is_written_while_the_store_is_told_is_not_taken_for_told(tmp_path: Path) -> None:
    async with by_hand(tmp_path) as here:
        here.post(here.take(10), 7)
        told_bytes = here.journal.written_bytes
        here.store.may_answer.clear()
        telling = asyncio.create_task(here.keeper._sync())
        await asyncio.sleep(0)
        here.post(here.take(10), 7)
        here.store.may_answer.set()
        await telling
        assert here.journal.behind_bytes == here.journal.written_bytes - told_bytes > 0
        await here.keeper._sync()
        assert here.journal.behind_bytes == 0


async def test_what_the_store_did_not_take_back_can_still_be_spent(tmp_path: Path) -> None:
    async with by_hand(tmp_path) as here:
        here.keeper._heard_s -= TTL_S
        here.store.error = StoreError("locked")
        with pytest.raises(StoreError):
            await here.keeper._sync()
        (account,) = here.books.accounts()
        assert (account.granted, account.available) == (100, 100)
        here.store.error = None


async def test_what_the_journal_takes_only_at_the_end_is_told_all_the_same(tmp_path: Path) -> None:
    async with by_hand(tmp_path) as here:
        row, spent, lines = here.settled(here.take(10), 7)
        here.keeper.owe(lines, [(row, spent)])
    assert here.rows() == [row.id]
    assert row.id.encode() in here.journal.path.read_bytes()


# --- The disk ---------------------------------------------------------------------------------------------------------


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
