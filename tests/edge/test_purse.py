"""The lines a call's money leaves in the journal, their order, and what is told to nobody before it is written."""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from gateway.domain.call import CallRecord
from gateway.domain.errors import Refused
from gateway.domain.ledger import Dimensions, Held, InDoubt, Posted, Void
from gateway.domain.money import Usage
from gateway.edge import bookkeeper, failover
from gateway.edge.purse import Purse
from gateway.store.experiments import Experiments
from gateway.store.journal_reader import read_segment
from tests.journey import NO_RETRIES, POLICY, Journey, full_disk, journey
from tests.outcomes import outcome, record
from tests.scripted import Scene, Turn, refuses, resets, says
from tests.store.test_journal import Disk

ON = Dimensions("qa_agent", "", "u1", "inference", "first/a", "baseline")


def lines(trip: Journey) -> list[object]:
    return list(read_segment(trip.gateway.runtime.journal.path))


def purse_of(trip: Journey, max_tokens: int = 10) -> Purse:
    runtime = trip.gateway.runtime
    purse = Purse(runtime, runtime.plan, "req-1")
    purse.fill({"messages": b'[{"role":"user","content":"hi"}]'}, max_tokens, 1)  # type: ignore[dict-item]
    return purse


async def reserve(trip: Journey, purse: Purse) -> None:
    await purse.reserve(trip.gateway.runtime.plan.agents["qa_agent"].baseline[0], ON, left_s=10)


def held(trip: Journey) -> set[int]:
    return {account.held for account in trip.gateway.runtime.books.accounts()}


async def test_a_hold_is_in_the_journal_before_the_provider_hears_of_it(tmp_path: Path) -> None:
    seen: list[list[object]] = []
    async with journey(tmp_path) as trip:

        async def looks(turn):  # type: ignore[no-untyped-def]
            seen.append(lines(trip))
            await says("Paris")(turn)

        trip.first.then(looks)
        assert (await trip.ask()).status == 200
        assert [type(line) for line in seen[0]] == [Held]
        assert [type(line) for line in lines(trip)] == [Held, Posted, CallRecord]


@pytest.mark.parametrize(("fault", "end"), [(refuses(503), Void), (resets, InDoubt)])
async def test_an_attempt_ends_in_the_journal_before_the_next_one_begins(
    tmp_path: Path, fault: object, end: type
) -> None:
    async with journey(tmp_path, fault, policy=POLICY + NO_RETRIES) as trip:  # type: ignore[arg-type]
        await trip.ask()
        found = lines(trip)
        assert [type(line) for line in found] == [Held, end, Held, Posted, CallRecord]
        assert isinstance(found[-1], CallRecord)
        ids = [line.id.removeprefix(found[-1].id) for line in found]  # type: ignore[attr-defined]
        assert ids == [".1", ".1", ".2", ".2", ""]


@pytest.mark.parametrize(("fault", "state"), [(refuses(503), "void"), (resets, "in_doubt")])
async def test_an_attempt_that_failed_is_told_before_anybody_waits_to_try_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: object, state: str
) -> None:
    is_waiting, may_go_on = asyncio.Event(), asyncio.Event()

    async def wait(_: float) -> None:
        is_waiting.set()
        await may_go_on.wait()

    monkeypatch.setattr(failover, "asyncio", SimpleNamespace(sleep=wait))
    async with journey(tmp_path, fault, says("Paris")) as trip:  # type: ignore[arg-type]
        asking = asyncio.create_task(trip.ask())
        await is_waiting.wait()
        # A crash in this moment would find nothing held, and others may hold what came back.
        assert [row.state for row in await trip.booked()] == [state]
        may_go_on.set()
        assert (await asking).status == 200


async def test_an_end_counts_once_whatever_comes_after_it(tmp_path: Path) -> None:
    async with journey(tmp_path) as trip:
        purse = purse_of(trip)
        await reserve(trip, purse)
        assert purse.is_open
        assert purse.post(Usage(prompt_tokens=1, completion_tokens=1)) is not None
        for end in (purse.post_bound, purse.doubt, purse.void):
            assert end() is None
        purse.close(None)
        assert [type(line) for line in lines(trip)] == [Held, Posted]
        assert held(trip) == {0}


async def test_without_a_journal_nothing_is_held(tmp_path: Path) -> None:
    async with journey(tmp_path) as trip:
        journal, purse = trip.gateway.runtime.journal, purse_of(trip)
        kept, journal._fd = journal._fd, os.open(journal.path, os.O_RDONLY)
        with pytest.raises(Refused, match="cannot be written") as refused:
            await reserve(trip, purse)
        assert refused.value.code == "journal_unavailable"
        assert (held(trip), purse.is_open, lines(trip)) == ({0}, False, [])
        os.close(journal._fd)
        journal._fd = kept
        await reserve(trip, purse)
        assert held(trip) != {0}
        purse.void()
        purse.close(None)
        # The hold that was not is not written later either: nothing would ever end it.
        assert [type(line) for line in lines(trip)] == [Held, Void]


async def test_what_one_gives_back_goes_from_call_to_call_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So the bookkeeper has nobody look again by itself.
    monkeypatch.setattr(bookkeeper, "TICK_S", 600.0)
    cap, patient = '[[caps]]\nper = "total"\ntokens = 1000\n', '[budget]\nwhen_short = "refuse"\nwait_ms = 10000\n'
    async with journey(tmp_path, caps=cap, budget=patient) as trip:
        queues = trip.gateway.runtime.bookkeeper.headroom._waiting
        large, *small = (purse_of(trip, max_tokens) for max_tokens in (700, 300, 300))
        await reserve(trip, large)
        waiting = [asyncio.create_task(reserve(trip, purse)) for purse in small]
        await trip.until(lambda: sum(map(len, queues.values())) == 2)
        large.void()
        large.close(None)
        await asyncio.gather(*waiting)
        for purse in small:
            purse.void()
            purse.close(None)


async def test_what_the_disk_did_not_take_is_written_once_it_does(tmp_path: Path) -> None:
    async with journey(tmp_path) as trip:
        journal, purse = trip.gateway.runtime.journal, purse_of(trip)
        await reserve(trip, purse)
        kept, journal._fd = journal._fd, os.open(journal.path, os.O_RDONLY)
        purse.post(Usage(prompt_tokens=3, completion_tokens=2))
        with pytest.raises(Refused, match="cannot be written"):
            purse.close(CallRecord(id="req-1", at_ms=1, env="dev", agent="qa_agent"))
        os.close(journal._fd)
        journal._fd = kept
        (row,) = await trip.booked()
        assert (row.id, row.state, row.amounts.tokens) == ("req-1.1", "posted", 5)
        assert [type(line) for line in lines(trip)] == [Held, Posted, CallRecord]


async def test_a_call_is_known_to_experiments_once_the_journal_has_it(tmp_path: Path) -> None:
    async with journey(tmp_path) as trip:
        bookkeeper, purse = trip.gateway.runtime.bookkeeper, purse_of(trip)
        purse.close(record("c1"))
        assert list(bookkeeper._outcomes) == [outcome("c1")]
        await trip.booked()
        with full_disk(trip.gateway.runtime.journal):
            with pytest.raises(Refused):
                purse_of(trip).close(record("c2"))
            assert list(bookkeeper._outcomes) == []
        await trip.booked()
        purse_of(trip).close(None)
        assert list(bookkeeper._outcomes) == []
        with Experiments(tmp_path / "gateway.db", clock=time.time) as experiments:
            assert list(experiments.outcomes("dev")) == [outcome("c1"), outcome("c2")]


# --- With the disk ----------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    """The disk that everything is flushed to; at the end it is well."""
    disk = Disk(monkeypatch)
    yield disk
    disk.fails = False
    disk.gate.set()


@asynccontextmanager
async def flushing(tmp_path: Path, *scenes: Scene) -> AsyncIterator[Journey]:
    """With `sync = "fsync"`."""
    async with journey(tmp_path, *scenes) as trip:
        trip.gateway.runtime.journal._fsync = True
        yield trip


async def test_the_provider_hears_nothing_before_the_disk_has_the_hold(tmp_path: Path, disk: Disk) -> None:
    async with flushing(tmp_path, says("Paris")) as trip:
        disk.gate.clear()
        asking = asyncio.create_task(trip.ask())
        await trip.until(lambda: lines(trip) and disk.count)
        await trip.let_others_act()
        assert trip.first.turns == []
        disk.gate.set()
        assert (await asking).status == 200


@pytest.mark.parametrize("stream", [False, True])
async def test_no_answer_ends_before_the_disk_has_what_it_cost(tmp_path: Path, disk: Disk, stream: bool) -> None:
    async def answers(turn: Turn) -> None:
        disk.gate.clear()
        await says("Paris")(turn)

    async with flushing(tmp_path, answers) as trip:
        asking = asyncio.create_task(trip.ask(stream=stream))
        await trip.until(lambda: len(lines(trip)) == 3)
        await trip.let_others_act()
        assert not asking.done()
        disk.gate.set()
        assert (await asking).status == 200


async def test_a_hold_that_the_disk_does_not_keep_is_given_back_and_nobody_is_asked(tmp_path: Path, disk: Disk) -> None:
    async with flushing(tmp_path, says("Paris")) as trip:
        disk.fails = True
        answer = await trip.ask()
        assert (answer.status, answer.error["code"]) == (503, "journal_unavailable")
        assert trip.first.turns == []
        assert held(trip) == {0}
        assert [type(line) for line in lines(trip)] == [Held, Void, CallRecord]
        disk.fails = False
        assert (await trip.ask()).status == 200
