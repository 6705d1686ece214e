"""The lines a call's money leaves in the journal, their order, and what is told to nobody before it is written."""

import os
from pathlib import Path

import pytest

from gateway.domain.call import CallRecord
from gateway.domain.errors import Refused
from gateway.domain.ledger import Dimensions, Held, InDoubt, Posted, Void
from gateway.domain.money import Usage
from gateway.edge.purse import Purse
from gateway.store.journal_reader import read_segment
from tests.journey import NO_RETRIES, POLICY, Journey, journey
from tests.scripted import refuses, resets, says

ON = Dimensions("qa_agent", "", "u1", "inference", "first/a", "baseline")


def lines(trip: Journey) -> list[object]:
    return list(read_segment(trip.gateway.runtime.journal.path))


def purse_of(trip: Journey) -> Purse:
    runtime = trip.gateway.runtime
    purse = Purse(runtime, runtime.plan, "req-1")
    purse.fill({"messages": b'[{"role":"user","content":"hi"}]'}, 10, 1)  # type: ignore[dict-item]
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
