"""Journal, ledger and books of one process: what is told at a start, what is left at an end, and what stops a start."""

import errno
import os
import sqlite3
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path

import pytest

from gateway.config import Loaded, Paths, load
from gateway.decide.budget import Hold
from gateway.domain.ledger import Amounts, Dimensions, Held, LedgerRow, Line, Posted
from gateway.domain.outcome import Outcome
from gateway.edge.bookkeeper import RolloutStates
from gateway.store.experiments import Experiments
from gateway.store.journal import Journal, claim, journal_files
from gateway.store.ledger import Ledger
from gateway.store.store import Batch, Crossing
from gateway.treasury import CannotKeepBooks, Treasury, ledger_path, open_store
from tests.outcomes import AT_MS, outcome, record
from tests.rolling import first

ON = Dimensions(agent="qa_agent", model="first/a")
CAP = '[[caps]]\nper = "total"\nrequests = {limit}\n'


def loaded(folder: Path, *, limit: int = 10, url: str = "") -> Loaded:
    """A configuration whose journal and ledger stand in `folder`."""
    (folder / "policies").mkdir(exist_ok=True)
    (folder / "config.toml").write_text(
        f"""
        [upstreams.first]
        kind = "compatible"
        base_url = "http://127.0.0.1:1/v1"
        [agents.qa_agent]
        finetuned = "first/ft:a"
        baseline = "first/a"
        [journal]
        dir = "{folder / "journal"}"
        [store]
        url = "{url or f"sqlite:///{folder / 'gateway.db'}"}"
        """
    )
    (folder / "policies" / "routing.toml").write_text('default_agent = "qa_agent"\n')
    (folder / "policies" / "dev.toml").write_text("[models]\nuse_finetuned = false\n" + CAP.format(limit=limit))
    return load(Paths(folder / "config.toml", folder / "policies"), "dev", litellm_map={}, environ={})


@asynccontextmanager
async def treasury(folder: Path, *, limit: int = 10) -> AsyncIterator[Treasury]:
    opened = await Treasury.open(loaded(folder, limit=limit), _nothing)
    try:
        yield opened
    finally:
        await opened.close()


def _nothing(_: Crossing) -> None:
    """Nobody wants to know of shares that are reached."""


def rows(folder: Path) -> dict[str, LedgerRow]:
    with Ledger(folder / "gateway.db", clock=time.time) as ledger:
        assert ledger.verify("dev") == []
        return {row.id: row for row in ledger.rows("dev")}


def leave_behind(folder: Path, name: str, *lines: Line) -> None:
    """The journal of a process that was killed."""
    claimed = claim(folder / "journal" / name)
    assert claimed is not None
    directory, lock = claimed
    journal = Journal(directory, fsync=False)
    journal.append(*lines)
    journal.close()
    os.close(lock)


def held(id: str) -> Held:
    return Held(id, time.time_ns() // 1_000_000, "dev", ON, Amounts(5, 1, 3))


def reserved(opened: Treasury) -> bool:
    found = opened.books.reserve(ON, Amounts(0, 1, 0), is_priced=True, now_s=time.time())
    return isinstance(found, Hold)


async def test_what_the_last_life_left_is_told_before_anything_is_admitted(tmp_path: Path) -> None:
    (tmp_path / "journal").mkdir()
    leave_behind(tmp_path, "aaa", held("1"), Posted("1", Amounts(2, 1, 2)), held("2"))
    async with treasury(tmp_path, limit=3) as opened:
        found = rows(tmp_path)
        assert (found["1"].state, found["1"].amounts) == ("posted", (2, 1, 2))
        assert (found["2"].state, found["2"].amounts) == ("in_doubt", (5, 1, 3))
        (account,) = opened.books.accounts()
        assert (account.posted, account.in_doubt) == (2, 1)
        assert [reserved(opened) for _ in range(2)] == [True, False]


async def test_a_doubt_is_told_once_however_often_it_starts(tmp_path: Path) -> None:
    (tmp_path / "journal").mkdir()
    leave_behind(tmp_path, "aaa", held("1"))
    for _ in range(3):
        async with treasury(tmp_path) as opened:
            (account,) = opened.books.accounts()
            assert (account.posted, account.in_doubt) == (1, 1)
    assert list(rows(tmp_path)) == ["1"]


async def test_a_doubt_that_was_released_by_hand_stays_released(tmp_path: Path) -> None:
    (tmp_path / "journal").mkdir()
    leave_behind(tmp_path, "aaa", held("1"))
    async with treasury(tmp_path):
        pass
    with Ledger(tmp_path / "gateway.db", clock=time.time) as ledger:
        ledger.release("dev", ["1"], who="somebody", why="not on the bill")
    async with treasury(tmp_path) as opened:
        (account,) = opened.books.accounts()
        assert (account.posted, account.in_doubt) == (0, 0)
    assert rows(tmp_path)["1"].state == "released"


async def test_what_others_left_is_told_too_and_who_lives_is_let_be(tmp_path: Path) -> None:
    (tmp_path / "journal").mkdir()
    leave_behind(tmp_path, "aaa", held("a"), Posted("a", Amounts(2, 1, 2)))
    leave_behind(tmp_path, "bbb", held("b"))
    leave_behind(tmp_path, "ccc", held("c"))
    alive = claim(tmp_path / "journal" / "bbb")
    assert alive is not None
    async with treasury(tmp_path) as opened:
        assert {id: row.state for id, row in rows(tmp_path).items()} == {"a": "posted", "c": "in_doubt"}
        assert opened.journal.holder == "aaa"
        (account,) = opened.books.accounts()
        assert account.posted == 2
    os.close(alive[1])


def calls(folder: Path) -> list[Outcome]:
    with Experiments(folder / "gateway.db", clock=time.time) as experiments:
        return list(experiments.outcomes("dev"))


async def test_what_became_of_the_last_lifes_calls_is_told_once_however_often_it_starts(tmp_path: Path) -> None:
    (tmp_path / "journal").mkdir()
    # A hold without an end keeps the journal from being told beyond it.
    leave_behind(tmp_path, "aaa", held("1"), record("c1"), record("c2", at_ms=AT_MS + 1))
    for _ in range(2):
        opened = await Treasury.open(loaded(tmp_path), _nothing)
        assert calls(tmp_path) == [outcome("c1"), outcome("c2", at_ms=AT_MS + 1)]
        await opened.close()


async def test_what_became_of_others_calls_is_told_by_who_adopts_their_journals(tmp_path: Path) -> None:
    (tmp_path / "journal").mkdir()
    for number, name in enumerate(("aaa", "bbb", "ccc")):
        leave_behind(tmp_path, name, record(f"c{number}"))
    async with treasury(tmp_path):
        assert [call.id for call in calls(tmp_path)] == ["c0", "c1", "c2"]


async def test_where_the_rollouts_stand_is_heard_as_it_opens(tmp_path: Path) -> None:
    heard: list[RolloutStates] = []
    change = first().change
    assert change is not None
    with Experiments(tmp_path / "gateway.db", clock=time.time) as experiments:
        state = experiments.begin("dev", change)
    opened = await Treasury.open(loaded(tmp_path), _nothing, heard.append)
    assert heard == [{("dev", "qa_agent"): state}]
    await opened.close()


async def test_two_processes_have_journals_of_their_own_and_one_ledger(tmp_path: Path) -> None:
    async with treasury(tmp_path) as one, treasury(tmp_path) as other:
        assert one.journal.directory != other.journal.directory
    assert len({path.parent for path in journal_files(tmp_path / "journal")}) == 2


async def test_a_clean_end_gives_every_lease_back(tmp_path: Path) -> None:
    for _ in range(2):
        async with treasury(tmp_path) as opened:
            assert opened.books.rules
    with closing(sqlite3.connect(tmp_path / "gateway.db")) as database:
        assert database.execute("SELECT * FROM leases").fetchall() == []
        assert database.execute("SELECT * FROM holders WHERE NOT is_lost").fetchall() == []
    assert rows(tmp_path) == {}


async def test_a_disk_that_fails_at_the_end_is_told_once_and_keeps_nothing_locked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    opened = await Treasury.open(loaded(tmp_path), _nothing)
    assert claim(opened.journal.directory) is None
    # A pipe takes what is written, and cannot be flushed.
    reading, writing = os.pipe()
    os.dup2(writing, opened.journal._fd)
    os.close(writing)
    await opened.close()
    assert [
        record.name for record in caplog.records if "may not be on the disk: Invalid argument" in record.message
    ] == ["gateway.budget"]
    # Nobody has the other end open any more.
    assert os.read(reading, 1) == b""
    os.close(reading)
    claimed = claim(opened.journal.directory)
    assert claimed is not None
    os.close(claimed[1])
    async with treasury(tmp_path) as again:
        assert again.journal.directory == opened.journal.directory


async def test_other_rules_are_in_force_at_once(tmp_path: Path) -> None:
    async with treasury(tmp_path, limit=1) as opened:
        assert [reserved(opened) for _ in range(2)] == [True, False]
        opened.take_rules(loaded(tmp_path, limit=5).plan.rules)
        (account,) = opened.books.accounts()
        assert account.rule.limit == 5
        assert account.held == 1


# --- What stops a start -----------------------------------------------------------------------------------------------


def open_files() -> set[str]:
    """What this process has open, by name; only what is of a test."""
    found = set()
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            found.add(str(descriptor.readlink()))
        except FileNotFoundError:
            continue
    return {name for name in found if name.endswith((".journal", "lock", ".db"))}


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="this system does not show what is open")
@pytest.mark.parametrize("fault", ["no database", "the disk is full", "a file in the way"])
async def test_a_start_that_fails_says_why_and_leaves_nothing_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    (tmp_path / "journal").mkdir()
    for name in ("aaa", "bbb"):
        leave_behind(tmp_path, name, held(name))
    config = loaded(tmp_path)
    before = open_files()
    if fault == "no database":
        (tmp_path / "gateway.db").write_text("nothing of the kind" * 100)
        words = "gateway.db"
    elif fault == "the disk is full":

        def full(*_: object) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr("gateway.store.journal.os.write", full)
        words = "No space left on device"
    else:
        (tmp_path / "journal" / "aaa" / "lock").unlink()
        (tmp_path / "journal" / "aaa" / "lock").mkdir()
        words = f"the journal in {tmp_path / 'journal'} cannot be used: Is a directory"
    with pytest.raises(CannotKeepBooks, match=words):
        await Treasury.open(config, _nothing)
    monkeypatch.undo()
    assert open_files() == before


def test_only_the_store_there_is_can_be_named(tmp_path: Path) -> None:
    assert ledger_path(loaded(tmp_path).settings) == tmp_path / "gateway.db"


def test_calls_older_than_a_year_and_a_bit_are_not_kept(tmp_path: Path) -> None:
    settings = loaded(tmp_path).settings
    assert settings.store.keep_calls_days == 400
    day_ms, now_ms = 86_400_000, time.time_ns() // 1_000_000
    store = open_store(settings)
    store.join("one", ())
    store.sync(
        Batch(outcomes=[outcome("new", at_ms=now_ms - 399 * day_ms), outcome("old", at_ms=now_ms - 401 * day_ms)])
    )
    store.close()
    with Experiments(tmp_path / "gateway.db", clock=time.time) as experiments:
        assert (experiments.outcome("new") is None, experiments.outcome("old") is None) == (False, True)


async def test_a_store_that_is_not_there_yet_is_said_to_be(tmp_path: Path) -> None:
    with pytest.raises(CannotKeepBooks, match="PostgreSQL follows"):
        await Treasury.open(loaded(tmp_path, url="postgresql://localhost/gateway"), _nothing)
