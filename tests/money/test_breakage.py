"""Whatever breaks under the ledger: calls go on as far as they may, the rest is refused in plain words, none is lost.

In one process where that is enough; where files, limits or death are the matter, with a `gateway serve` of its own.
"""

import asyncio
import os
import resource
import signal
import sqlite3
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest

from gateway.edge import bookkeeper, purse
from gateway.store.journal import journal_files
from tests.journey import AT_ONCE, Answer, Journey, journey
from tests.process import PATIENCE_S, POLICY, Files, Process, failed_start, process
from tests.scripted import Turn, completion, delta, event, says, scripted, silent

QUICK_STORE = "timeout_ms = 100"


def cap(lines: str, *, scope: str = "global", per: str = "total") -> str:
    return f'[[caps]]\nscope = "{scope}"\nper = "{per}"\n{lines}\n'


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """In this block another process is in the middle of writing to the ledger."""
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("BEGIN IMMEDIATE")
        yield
        database.execute("ROLLBACK")


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that is locked says so at once, so that no test waits for it."""
    connect = sqlite3.connect

    def quickly(*args: Any, **more: Any) -> sqlite3.Connection:
        return connect(*args, **more | {"timeout": 0.01})

    monkeypatch.setattr("gateway.store.schema.sqlite3.connect", quickly)


def database(trip: Journey) -> Path:
    return trip.gateway.runtime.journal.directory.parent.parent / "gateway.db"


async def store_fails(trip: Journey) -> None:
    """Wait until the bookkeeper knows."""
    keeper = trip.gateway.runtime.bookkeeper
    keeper._asked_s = float("-inf")
    await trip.until(lambda: keeper.store_error)


async def store_is_back(trip: Journey) -> None:
    await trip.until(lambda: not trip.gateway.runtime.bookkeeper.store_error)


# --- The store --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("impatient")
async def test_what_is_leased_is_spent_without_the_store_and_told_when_it_is_back(tmp_path: Path) -> None:
    async with journey(tmp_path, says("Paris"), caps=cap("requests = 5"), budget=AT_ONCE) as trip:
        with locked(database(trip)):
            statuses = []
            for place in range(7):
                statuses.append((await trip.ask()).status)
                if place == 2:
                    await store_fails(trip)
            # To the last request, and not one more.
            assert statuses == [200] * 5 + [429] * 2 or statuses == [200] * 5 + [503] * 2
            assert len(trip.gateway.ledger()) == 0
            async with trip.session.get(f"{trip.gateway.admin_url}/metrics") as response:
                assert "gateway_store_is_up 0.0" in (await response.text()).split("\n")
        await store_is_back(trip)
        rows = await trip.booked()
        answered = {record.id for record in trip.gateway.journal() if record.status == 200}
        assert {row.id for row in rows} == {f"{id}.1" for id in answered}
        assert trip.used() == [5]
        # Told again and again while it was locked, and there once.
        assert len(trip.gateway.ledger()) == len(rows) == 5
        refused = await trip.ask()
        assert (refused.status, refused.error["code"]) == (429, "budget_exceeded")


@pytest.mark.usefixtures("impatient")
async def test_without_a_lease_and_a_store_a_closed_cap_refuses_soon(tmp_path: Path) -> None:
    caps = cap("requests = 2", scope="user")
    async with journey(tmp_path, says("Paris"), caps=caps, store=QUICK_STORE) as trip:
        assert (await trip.ask(user="ann")).status == 200
        with locked(database(trip)):
            await store_fails(trip)
            # Ann's account is leased, Bob's is not.
            assert (await trip.ask(user="ann")).status == 200
            refused = await trip.ask(user="bob")
            assert (refused.status, refused.error["code"]) == (503, "budget_unavailable")
            assert refused.error["type"] == "server_error"
            assert int(refused.headers["Retry-After"]) >= 1
            assert trip.record_of(refused).duration_ms < 5_000
        await store_is_back(trip)
        assert [(await trip.ask(user=user)).status for user in ("bob", "ann", "bob", "bob")] == [200, 429, 200, 429]
        assert Counter(row.on.user for row in await trip.booked()).most_common(1)[0][1] == 2
        trip.check_at_rest()


async def test_a_store_that_hangs_is_not_waited_for(tmp_path: Path) -> None:
    caps = cap("requests = 2", scope="user")
    async with journey(tmp_path, says("Paris"), caps=caps, store=QUICK_STORE) as trip:
        # Its own patience with a lock is two seconds.
        with locked(database(trip)):
            refused = await trip.ask(user="bob")
            assert (refused.status, refused.error["code"]) == (503, "budget_unavailable")
            assert trip.record_of(refused).duration_ms < 1_500
        await trip.until(lambda: not trip.gateway.runtime.bookkeeper.headroom._asks)
        assert (await trip.ask(user="bob")).status == 200


@pytest.mark.usefixtures("impatient")
async def test_an_open_cap_lets_calls_through_without_the_store_and_counts_them(tmp_path: Path) -> None:
    caps = cap('usd = "0.001"\non_store_failure = "open"', scope="user")
    async with journey(tmp_path, says("Paris"), caps=caps, store=QUICK_STORE) as trip:
        with locked(database(trip)):
            await store_fails(trip)
            for _ in range(5):
                assert (await trip.ask(user="ann")).status == 200
            assert trip.gateway.runtime.bookkeeper.headroom.unleased_nusd > 0
        await store_is_back(trip)
        rows = await trip.booked()
        # Each of them, once; and with the store there the cap is one again.
        assert [row.amounts.nusd for row in rows] == [25_000] * 5
        assert trip.used() == [125_000]
        trip.check_at_rest()
        (account,) = trip.gateway.runtime.books.accounts()
        assert account.granted <= 1_000_000 - 125_000
        statuses = [(await trip.ask(user="ann", max_tokens=200)).status for _ in range(30)]
        assert 429 in statuses
        assert (await trip.booked())[-1].amounts.nusd == 25_000
        assert trip.used()[0] <= 1_000_000


@pytest.mark.usefixtures("impatient")
async def test_a_sync_that_fails_gives_nothing_away(tmp_path: Path) -> None:
    async with journey(tmp_path, says("Paris"), caps=cap("requests = 9")) as trip:
        keeper, (account,) = trip.gateway.runtime.bookkeeper, trip.gateway.runtime.books.accounts()
        with locked(database(trip)):
            for _ in range(3):
                await trip.ask()
                await store_fails(trip)
                assert (account.granted, account.spent) == (9, len(trip.first.turns))
        await store_is_back(trip)
        await trip.booked()
        assert (account.granted, account.spent, account.posted) == (6, 0, 3)
        assert keeper.store_errors >= 1


async def test_a_journal_that_is_too_far_ahead_of_the_store_takes_no_more_calls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with journey(tmp_path, says("Paris")) as trip:
        journal = trip.gateway.runtime.journal
        journal._max_behind_bytes, enough = 100, journal._max_behind_bytes
        journal.told(journal.written_bytes - 101)
        # The bookkeeper, which has told everything, would say so at its next turn.
        monkeypatch.setattr(journal, "told", lambda written_bytes: None)
        refused = await trip.ask()
        assert (refused.status, refused.error["code"]) == (503, "journal_unavailable")
        assert "behind" in refused.error["message"]
        assert refused.headers["Retry-After"] == "1"
        assert trip.first.turns == []
        journal._max_behind_bytes = enough
        assert (await trip.ask()).status == 200


# --- The clock --------------------------------------------------------------------------------------------------------


class Clock:
    """The wall clock as the journey and the bookkeeper read it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at_s: float) -> None:
        self.at_s = at_s
        told = SimpleNamespace(
            time=lambda: self.at_s,
            time_ns=lambda: int(self.at_s * 1e9),
            monotonic=time.monotonic,
            perf_counter=time.perf_counter,
        )
        for module in (bookkeeper, purse):
            monkeypatch.setattr(module, "time", told)


async def test_a_clock_that_goes_back_over_a_windows_edge_opens_no_cap_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edge_s = (time.time() // 3_600 + 1) * 3_600
    clock = Clock(monkeypatch, edge_s - 30)
    async with journey(tmp_path, says("Paris"), caps=cap("requests = 2", per="hour")) as trip:
        assert [(await trip.ask()).status for _ in range(3)] == [200, 200, 429]
        clock.at_s = edge_s + 30
        assert [(await trip.ask()).status for _ in range(3)] == [200, 200, 429]
        # Back over the edge: neither window has anything left.
        clock.at_s = edge_s - 30
        assert (await trip.ask()).status == 429
        clock.at_s = edge_s + 60
        assert (await trip.ask()).status == 429
        clock.at_s = edge_s + 3_601
        assert (await trip.ask()).status == 200
        assert len(await trip.booked()) == 5
        trip.check_at_rest()


async def test_while_the_clock_is_behind_calls_count_in_the_window_that_has_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edge_s = (time.time() // 3_600 + 1) * 3_600
    clock = Clock(monkeypatch, edge_s + 30)
    async with journey(tmp_path, says("Paris"), caps=cap("requests = 3", per="hour")) as trip:
        assert (await trip.ask()).status == 200
        clock.at_s = edge_s - 30
        for _ in range(2):
            assert (await trip.ask()).status == 200
            # Told to the store, which counts by the time a row bears.
            await trip.booked()
        assert (await trip.ask()).status == 429
        clock.at_s = edge_s + 60
        assert (await trip.ask()).status == 429
        assert [row.at_ms >= edge_s * 1000 for row in await trip.booked()] == [True] * 3
        assert trip.used() == [3]


async def test_a_call_counts_in_the_window_in_which_it_was_reserved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_answer = asyncio.Event()

    async def waits(turn: Turn) -> None:
        await may_answer.wait()
        await turn.reply(completion())

    edge_s = (time.time() // 3_600 + 1) * 3_600
    clock = Clock(monkeypatch, edge_s - 30)
    async with journey(tmp_path, waits, caps=cap("requests = 1", per="hour")) as trip:
        early = asyncio.create_task(trip.ask())
        await trip.first.turn()
        clock.at_s = edge_s + 1
        late = asyncio.create_task(trip.ask())
        await trip.first.turn(1)
        may_answer.set()
        assert [(await one).status for one in (early, late)] == [200, 200]
        rows = await trip.booked()
        assert [row.at_ms // 1000 for row in rows] == [int(edge_s - 30), int(edge_s + 1)]
        assert trip.gateway.runtime.books is not None
        refused: Answer = await trip.ask()
        assert refused.error["code"] == "budget_exceeded"


# --- The disk ---------------------------------------------------------------------------------------------------------


def limit_files(child: Process, size_bytes: int) -> None:
    """No file of this process may grow beyond so many bytes: to it, the disk is full there."""
    _, hard = resource.prlimit(child.child.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(child.child.pid, resource.RLIMIT_FSIZE, (size_bytes, hard))


async def asked(gateway: Process, **fields: Any) -> tuple[int, str, str]:
    """Status, call id, and the error's code, "" without one."""
    status, id, body = await gateway.ask(**fields)
    return status, id, body.get("error", {}).get("code", "")


@pytest.mark.parametrize("sync", ["write", "fsync"])
async def test_a_full_disk_stops_admission_loses_nothing_and_is_recovered_from(tmp_path: Path, sync: str) -> None:
    async with scripted(says("Paris")) as provider:
        files = Files(tmp_path, provider)
        files.write_config(journal=f'sync = "{sync}"')
        files.write_policy(POLICY + cap("requests = 1000"))
        async with process(files) as gateway:
            answered = [(await asked(gateway))[1] for _ in range(3)]
            (segment,) = journal_files(tmp_path / "journal")
            # Room for one call and a half, as far as one can tell.
            limit_files(gateway, segment.stat().st_size + segment.stat().st_size // 2)
            found = [await asked(gateway) for _ in range(6)]
            assert found[-1][0::2] == (503, "journal_unavailable")
            asked_in_vain = len(provider.turns)
            assert (await asked(gateway))[0] == 503
            assert len(provider.turns) == asked_in_vain
            answered += [id for status, id, _ in found if status == 200]
            _, unlimited = resource.prlimit(gateway.child.pid, resource.RLIMIT_FSIZE)
            resource.prlimit(gateway.child.pid, resource.RLIMIT_FSIZE, (unlimited, unlimited))
            status, id, _ = await asked(gateway)
            assert status == 200
            answered.append(id)
            gateway.child.send_signal(signal.SIGTERM)
            assert await gateway.ended() == 0
        rows = {row.id: row for row in files.ledger()}
        assert {f"{id}.1" for id in answered} <= set(rows)
        assert all(rows[f"{id}.1"].state == "posted" for id in answered)
        # Whoever was asked is paid for, whether the caller got the answer or not.
        assert sum(row.amounts.requests for row in rows.values()) == len(provider.turns)


async def test_an_end_with_a_full_disk_leaves_a_doubt_and_not_a_gap(tmp_path: Path) -> None:
    may_answer = asyncio.Event()

    async def waits(turn: Turn) -> None:
        await may_answer.wait()
        await turn.reply(completion())

    async with scripted(waits) as provider:
        files = Files(tmp_path, provider)
        async with process(files) as gateway:
            asking = asyncio.create_task(asked(gateway))
            await provider.turn()
            (segment,) = journal_files(tmp_path / "journal")
            limit_files(gateway, segment.stat().st_size)
            may_answer.set()
            status, id, code = await asking
            assert (status, code) == (503, "journal_unavailable")
            gateway.child.send_signal(signal.SIGTERM)
            assert await gateway.ended() == 0
        async with process(files):
            (row,) = files.ledger()
            assert (row.id, row.state, row.basis) == (f"{id}.1", "in_doubt", "bound")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
async def test_a_directory_that_cannot_be_written_to_is_said_at_start(tmp_path: Path) -> None:
    async with scripted(silent) as provider:
        files = Files(tmp_path, provider)
        (tmp_path / "journal").mkdir(mode=0o500)
        code, said = await failed_start(files)
        assert code == 1
        assert f"the journal in {tmp_path / 'journal'} cannot be used: Permission denied" in said


@pytest.mark.parametrize("place", ["journal", "gateway.db"])
async def test_a_place_that_cannot_be_used_is_said_at_start(tmp_path: Path, place: str) -> None:
    async with scripted(silent) as provider:
        files = Files(tmp_path, provider)
        if place == "journal":
            (tmp_path / "journal").write_text("a file where a directory is wanted")
        else:
            (tmp_path / "gateway.db").mkdir()
        code, said = await failed_start(files)
        assert code == 1
        assert str(tmp_path / place) in said
        assert "Traceback" not in said
        assert len(said.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "damage, words",
    [("scribbled over", "damaged"), ("no database", "not a ledger"), ("of the future", "newer gateway")],
)
async def test_a_ledger_that_cannot_be_trusted_is_said_at_start(tmp_path: Path, damage: str, words: str) -> None:
    async with scripted(says("Paris")) as provider:
        files = Files(tmp_path, provider)
        path = tmp_path / "gateway.db"
        if damage == "no database":
            path.write_bytes(b"These are not the bytes of a database." * 100)
        else:
            async with process(files) as gateway:
                await gateway.ask()
                gateway.child.send_signal(signal.SIGTERM)
                await gateway.ended()
            if damage == "of the future":
                with closing(sqlite3.connect(path)) as file:
                    file.execute("PRAGMA user_version = 99")
            else:
                whole = path.read_bytes()
                path.write_bytes(whole[:4_096] + b"\xa5" * (len(whole) - 4_096))
        before = path.read_bytes()
        code, said = await failed_start(files)
        assert code == 1
        assert str(path) in said
        assert words in said
        assert "Traceback" not in said
        # It was not touched: whoever comes to mend it finds it as it was.
        assert path.read_bytes() == before


# --- Death ------------------------------------------------------------------------------------------------------------


async def test_what_was_in_flight_at_a_kill_is_in_doubt_and_what_was_answered_is_exact(tmp_path: Path) -> None:
    async def waits(turn: Turn) -> None:
        if not turn.json().get("stream"):
            await turn.reply(completion())
            return
        await turn.begin_stream()
        await turn.event(delta("Pa"))
        await silent(turn)

    async with scripted(waits) as provider:
        files = Files(tmp_path, provider)
        files.write_policy(POLICY + AT_ONCE + cap("requests = 5"))
        async with process(files) as gateway:
            answered = [(await asked(gateway))[1] for _ in range(2)]
            async with gateway.post(stream=True) as response:
                await response.content.readuntil(event(delta("Pa")))
                in_flight = response.headers["x-request-id"]
                gateway.child.kill()
                await gateway.ended()
                with pytest.raises(aiohttp.ClientError):
                    await response.read()
        async with process(files) as gateway:
            await gateway.logged("under way when this gateway ended last")
            rows = {row.id: row for row in files.ledger()}
            assert {id: row.state for id, row in rows.items()} == {
                **{f"{id}.1": "posted" for id in answered},
                f"{in_flight}.1": "in_doubt",
            }
            assert rows[f"{in_flight}.1"].amounts.requests == 1
            # What is in doubt stays set aside: two are left of five.
            assert [(await asked(gateway))[0] for _ in range(3)] == [200, 200, 429]
            gateway.child.kill()
            await gateway.ended()
        # And the doubt is told once, however often it starts.
        for _ in range(2):
            async with process(files) as gateway:
                assert (await asked(gateway))[2] == "budget_exceeded"
                gateway.child.kill()
                await gateway.ended()
        assert Counter(row.state for row in files.ledger()) == {"posted": 4, "in_doubt": 1}


async def served(gateway: Process) -> int:
    """The status, once what was reserved for others has come back, for which an SDK tries again."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            status, _, code = await asked(gateway)
            if code != "budget_reserved":
                return status


async def test_what_another_process_left_is_told_by_the_next_one(tmp_path: Path) -> None:
    async with scripted(says("Paris")) as provider:
        files = Files(tmp_path, provider)
        files.write_policy(POLICY + cap("requests = 6"))
        async with process(files) as one, process(files) as other:
            assert [await served(gateway) for gateway in (one, other, one, other)] == [200] * 4
            for gateway in (one, other):
                gateway.child.kill()
                await gateway.ended()
        async with process(files) as gateway:
            assert len(files.ledger()) == 4
            assert sorted(call.id for call in files.calls()) == sorted(record.id for record in files.records())
            assert len(files.calls()) == 4
            assert [await served(gateway) for _ in range(3)] == [200, 200, 429]


async def test_a_drain_waits_for_an_answer_that_is_only_read_for_its_usage(tmp_path: Path) -> None:
    may_go_on = asyncio.Event()

    async def waits(turn: Turn) -> None:
        await may_go_on.wait()
        await turn.reply(completion())

    async with scripted(waits) as provider:
        files = Files(tmp_path, provider)
        files.write_policy(POLICY + cap("requests = 6"))
        async with process(files) as gateway:
            asking = asyncio.create_task(gateway.ask())
            turn = await provider.turn()
            asking.cancel()
            gateway.child.send_signal(signal.SIGTERM)
            await gateway.logged("draining")
            assert not turn.peer_left.is_set()
            may_go_on.set()
            assert await gateway.ended() == 0
        (row,) = files.ledger()
        assert (row.state, row.basis, row.amounts.tokens) == ("posted", "exact", 18)
        (record,) = files.records()
        assert record.client_left


async def test_a_drain_that_is_over_leaves_what_nobody_waits_for_at_its_bound(tmp_path: Path) -> None:
    async with scripted(silent) as provider:
        files = Files(tmp_path, provider)
        files.write_config(server="drain_s = 0.1")
        async with process(files) as gateway:
            asking = asyncio.create_task(gateway.ask())
            await provider.turn()
            asking.cancel()
            gateway.child.send_signal(signal.SIGTERM)
            assert await gateway.ended() == 0
        (row,) = files.ledger()
        assert row.basis == "bound"
        assert row.amounts.tokens > 18
