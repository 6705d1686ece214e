"""What was appended can be read back, whatever ends the process and whatever happens to the disk."""

import asyncio
import os
import random
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.domain.call import CallRecord
from gateway.domain.errors import Refused
from gateway.domain.ledger import Amounts, Dimensions, Held, InDoubt, Line, Posted, Void
from gateway.store import journal as journals
from gateway.store.journal import Journal, Position, claim, claim_all, journal_files, segment_path, segments
from gateway.store.journal_reader import Replay, Torn, read_calls, read_segment

ROOT = Path(__file__).parents[2]
ON = Dimensions(agent="qa_agent", user="line\nbreak \u2028 \U0001f642")


def held(id: str) -> Held:
    return Held(id, 1_800_000_000_000, "test", ON, Amounts(2**53, 1, 7))


def lines_of(directory: Path) -> list[Line | Torn]:
    return [line for number in segments(directory) for line in read_segment(segment_path(directory, number))]


def ids(directory: Path) -> list[str]:
    return ["torn" if isinstance(line, Torn) else line.id for line in lines_of(directory)]


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    (tmp_path / "me").mkdir()
    opened = Journal(tmp_path / "me", fsync=False)
    yield opened
    opened.close()


def reopened(directory: Path, **options: int) -> Journal:
    return Journal(directory, fsync=False, **options)


def test_every_kind_of_line_comes_back_as_it_was_in_its_order(journal: Journal) -> None:
    wanted = [
        held("a.1"), Posted("a.1", Amounts(3, 1, 4), "estimate", 1, 3), held("a.2"), Void("a.2"), held("a.3"),
        InDoubt("a.3"), CallRecord(id="a", at_ms=1, env="test", user=ON.user, cost_nusd=2**53),
    ]  # fmt: skip
    journal.append(*wanted[:3])
    journal.append(*wanted[3:])
    journal.append()
    # Also before it is closed: nothing waits in a buffer of ours.
    assert lines_of(journal.directory) == wanted
    assert list(read_calls(journal.directory.parent)) == wanted[-1:]
    assert journal.written_bytes == journal.path.stat().st_size


def test_files_are_for_their_owner_only(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        (directory, lock), *_ = claim_all(tmp_path / "root")
        journal = reopened(directory)
    finally:
        os.umask(before)
    journal.close()
    os.close(lock)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert stat.S_IMODE(journal.path.stat().st_mode) == 0o600
    assert stat.S_IMODE((directory / "lock").stat().st_mode) == 0o600


# --- What is torn ----------------------------------------------------------------------------------------------------


def test_a_tail_torn_at_any_byte_is_cut_off_and_the_lines_before_it_stay(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    journal = reopened(tmp_path)
    journal.append(held("a"))
    journal.append(held("b"), Void("b"))
    journal.close()
    whole = journal.path.read_bytes()
    ends = [index + 1 for index, byte in enumerate(whole) if byte == ord("\n")]
    for size in range(len(whole) + 1):
        journal.path.write_bytes(whole[:size])
        survived = ["a", "b", "b"][: sum(end <= size for end in ends)]
        is_torn = size not in (0, *ends)
        assert ids(tmp_path) == survived + ["torn"] * is_torn
        caplog.clear()
        again = reopened(tmp_path)
        assert len(caplog.records) == is_torn
        assert again.path.stat().st_size == max([0, *(end for end in ends if end <= size)])
        again.append(Void("c"))
        again.close()
        assert ids(tmp_path) == [*survived, "c"]


def test_a_last_line_longer_than_a_block_is_found(tmp_path: Path) -> None:
    journal = reopened(tmp_path)
    long = CallRecord(id="long", at_ms=1, env="x" * 200_000)
    journal.append(Void("a"), long)
    journal.close()
    with journal.path.open("ab") as file:
        file.write(b"y" * 300_000)
    reopened(tmp_path).close()
    assert lines_of(tmp_path) == [Void("a"), long]
    journal.path.write_bytes(b"z" * 300_000)
    reopened(tmp_path).close()
    assert journal.path.stat().st_size == 0


# --- Segments --------------------------------------------------------------------------------------------------------


def test_segments_rotate_before_they_are_too_large_and_no_write_is_split(tmp_path: Path) -> None:
    journal = reopened(tmp_path, segment_bytes=400)
    for number in range(20):
        journal.append(held(f"{number}"), Void(f"{number}"))
    journal.append(CallRecord(id="larger than a segment", at_ms=1, env="x" * 1_000))
    journal.append(Void("last"))
    journal.close()
    assert ids(tmp_path) == [f"{n // 2}" for n in range(40)] + ["larger than a segment", "last"]
    sizes = [segment_path(tmp_path, number).stat().st_size for number in segments(tmp_path)]
    assert sum(size > 400 for size in sizes) == 1
    for number in segments(tmp_path)[:-2]:
        assert len(list(read_segment(segment_path(tmp_path, number)))) % 2 == 0
    assert segments(tmp_path) == list(range(1, len(sizes) + 1))
    again = reopened(tmp_path)
    assert again.path == segment_path(tmp_path, len(sizes))
    again.close()


def test_what_is_no_segment_is_left_alone(tmp_path: Path) -> None:
    for name in ("notes.txt", "x.journal", "1.journal.gz", "lock"):
        (tmp_path / name).write_text("mine")
    assert segments(tmp_path) == []
    journal = reopened(tmp_path)
    journal.prune(Position(9, 0), 0)
    journal.close()
    assert (tmp_path / "x.journal").read_text() == "mine"
    assert list(journal_files(tmp_path.parent / "nowhere")) == []


def test_reading_begins_at_the_oldest_attempt_that_is_open(journal: Journal) -> None:
    assert journal.position() == (1, 0)
    journal.append(held("a"))
    before_b = journal.path.stat().st_size
    journal.append(held("b"))
    assert journal.position() == (1, 0)
    journal.append(Posted("a", Amounts()), held("c"))
    assert journal.position() == (1, before_b)
    journal.append(Void("b"))
    # `c` was held by the write before, together with the end of `a`.
    assert journal.position().offset < journal.path.stat().st_size
    journal.append(InDoubt("c"))
    assert journal.position() == (1, journal.path.stat().st_size)
    journal.append(Void("of another life"))
    assert journal.position() == (1, journal.path.stat().st_size)


def test_from_any_position_it_gave_a_replay_finds_all_that_was_not_told(tmp_path: Path) -> None:
    journal = reopened(tmp_path, segment_bytes=300)
    rng = random.Random(4)
    open_: list[str] = []
    ended: dict[str, int] = {}
    for number in range(200):
        if open_ and rng.random() < 0.5:
            id = open_.pop(rng.randrange(len(open_)))
            journal.append(Void(id))
            ended[id] = number
        else:
            open_.append(f"{number}")
            journal.append(held(f"{number}"))
        position, told = journal.position(), set(ended)
        if number % 10 == 0:
            journal.prune(position, 0)
            left = Replay(tmp_path, position)
            assert {line.id for line in left.unresolved} == set(open_)
            assert {row.id for row in left.rows} <= told | set(open_)
            assert left.torn == []
    journal.close()


def test_pruning_keeps_what_is_open_what_is_written_and_so_many_more(tmp_path: Path) -> None:
    journal = reopened(tmp_path, segment_bytes=100)
    journal.append(Void("x"))
    journal.append(held("open"))
    where = journal.position().segment
    for number in range(10):
        journal.append(held(f"{number}"), Void(f"{number}"))
    last = segments(tmp_path)[-1]
    journal.prune(journal.position(), 0)
    assert segments(tmp_path) == list(range(where, last + 1))
    journal.append(Void("open"))
    last = segments(tmp_path)[-1]
    journal.prune(journal.position(), 3)
    assert segments(tmp_path) == list(range(last - 3, last + 1))
    journal.prune(Position(10**6, 0), 0)
    assert segments(tmp_path) == [last]
    journal.close()


def test_admission_stops_while_the_store_is_too_far_behind(tmp_path: Path) -> None:
    journal = reopened(tmp_path, max_behind_bytes=100)
    journal.check()
    while journal.behind_bytes <= 100:
        journal.append(Void("a"))
    with pytest.raises(Refused) as caught:
        journal.check()
    assert (caught.value.code, caught.value.status, caught.value.headers) == (
        "journal_unavailable", 503, {"Retry-After": "1"},
    )  # fmt: skip
    # What was admitted is still written down.
    journal.append(Void("b"))
    journal.told(journal.written_bytes)
    journal.check()
    assert journal.behind_bytes == 0
    journal.close()


# --- To the disk -----------------------------------------------------------------------------------------------------


class Disk:
    """Stands in for `os.fsync`: counts, waits until it is let go, and fails when told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self.fails = False
        self.gate = threading.Event()
        self.gate.set()
        monkeypatch.setattr(journals.os, "fsync", self)

    def __call__(self, fd: int) -> None:
        os.fstat(fd)
        self.count += 1
        assert self.gate.wait(30)
        if self.fails:
            raise OSError(5, "Input/output error")


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


async def test_many_who_wait_share_one_flush(tmp_path: Path, disk: Disk) -> None:
    journal = Journal(tmp_path, fsync=True)
    journal.append(Void("first"))
    disk.gate.clear()
    first = asyncio.create_task(journal.flushed())
    while not disk.count:  # noqa: ASYNC110 - it is a thread that is waited for
        await asyncio.sleep(0)
    others = []
    for number in range(100):
        journal.append(Void(f"{number}"))
        others.append(asyncio.create_task(journal.flushed()))
    await asyncio.sleep(0)
    disk.gate.set()
    await asyncio.gather(first, *others)
    # One for the first, and one for all who came while it ran.
    assert disk.count == 2
    await journal.flushed()
    await journal.flush()
    assert disk.count == 2
    journal.close()


async def test_a_flush_that_fails_is_told_to_all_who_wait_and_the_next_is_tried(tmp_path: Path, disk: Disk) -> None:
    journal = Journal(tmp_path, fsync=True)
    journal.append(Void("a"))
    disk.fails = True
    found = await asyncio.gather(*(journal.flushed() for _ in range(5)), return_exceptions=True)
    assert [getattr(each, "code", each) for each in found] == ["journal_unavailable"] * 5
    disk.fails = False
    await journal.flushed()
    assert disk.count == 2
    journal.close()


async def test_one_who_waits_may_leave_and_the_others_still_hear(tmp_path: Path, disk: Disk) -> None:
    journal = Journal(tmp_path, fsync=True)
    journal.append(Void("a"))
    disk.gate.clear()
    one, other = asyncio.create_task(journal.flushed()), asyncio.create_task(journal.flushed())
    await asyncio.sleep(0)
    one.cancel()
    await asyncio.sleep(0)
    assert one.cancelled()
    disk.gate.set()
    await other
    assert disk.count == 1
    journal.close()


async def test_where_all_have_left_a_failure_is_nobody_s_and_is_not_shouted(
    tmp_path: Path, disk: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    journal = Journal(tmp_path, fsync=True)
    journal.append(Void("a"))
    disk.gate.clear()
    disk.fails = True
    only = asyncio.create_task(journal.flushed())
    await asyncio.sleep(0)
    flushing = journal._syncing
    assert flushing is not None
    only.cancel()
    disk.gate.set()
    await asyncio.wait([only, flushing])
    disk.fails = False
    del only, flushing
    await asyncio.sleep(0)
    assert [record.message for record in caplog.records if "never retrieved" in record.message] == []
    journal.close()


async def test_a_rotation_in_the_midst_of_a_flush_takes_nothing_from_it(tmp_path: Path, disk: Disk) -> None:
    journal = Journal(tmp_path, fsync=True, segment_bytes=50)
    journal.append(Void("a"))
    disk.gate.clear()
    waiting = asyncio.create_task(journal.flushed())
    while not disk.count:  # noqa: ASYNC110 - it is a thread that is waited for
        await asyncio.sleep(0)
    disk.gate.set()
    journal.append(Void("the next segment's"))
    await waiting
    await journal.flushed()
    assert segments(tmp_path) == [1, 2]
    journal.close()


async def test_without_fsync_nobody_waits_and_the_loop_flushes(tmp_path: Path, disk: Disk) -> None:
    journal = Journal(tmp_path, fsync=False)
    journal.append(Void("a"))
    await journal.flushed()
    assert disk.count == 0
    await journal.flush()
    assert disk.count == 1
    journal.close()


# --- Who writes where ------------------------------------------------------------------------------------------------


def test_a_directory_is_one_process_s_until_it_ends(tmp_path: Path) -> None:
    program = "import sys, gateway.store.journal as j\nfrom pathlib import Path\n"
    program += "found = j.claim_all(Path(sys.argv[1]))\nprint(*sorted(p.name for p, _ in found), flush=True)\ninput()"
    command = [sys.executable, "-c", program, str(tmp_path)]
    started = []

    def start() -> list[str]:
        process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        return process.stdout.readline().split()

    try:
        (one,), (two,) = start(), start()
        assert one != two
        assert claim(tmp_path / one) is None
        started[0].kill()
        started[0].wait()
        assert start() == [one]
        for process in started:
            process.kill()
            process.wait()
        assert start() == sorted([one, two])
        (mine, lock), *rest = claim_all(tmp_path)
        assert mine.name not in (one, two)
        assert rest == []
        os.close(lock)
    finally:
        for process in started:
            process.kill()
            process.communicate()


def test_a_new_directory_that_somebody_else_was_quicker_to_lock_is_left_to_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever starts at the same time sees it as soon as it is made."""
    taken: list[tuple[Path, int]] = []

    def raced(directory: Path) -> tuple[Path, int] | None:
        found = claim(directory)
        if found is not None and not taken:
            taken.append(found)
            return None
        return found

    monkeypatch.setattr(journals, "claim", raced)
    ((mine, lock),) = claim_all(tmp_path)
    assert mine != taken[0][0]
    for fd in (lock, taken[0][1]):
        os.close(fd)


def test_a_file_system_without_locks_is_an_error_and_no_endless_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(fd: int, operation: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(journals.fcntl, "flock", refuse)
    with pytest.raises(OSError, match="No locks"):
        claim_all(tmp_path)


# --- A disk that is full, gone or read-only --------------------------------------------------------------------------

HEAD = """
import resource, signal, sys, time
from pathlib import Path
from gateway.domain.errors import Refused
from gateway.domain.ledger import Amounts, Dimensions, Held, Posted, Void
from gateway.store.journal import Journal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
directory = Path(sys.argv[1])
def room(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
def told(verb, *lines):
    try:
        verb(*lines)
        print("done", flush=True)
    except Refused as refused:
        print(refused.code, flush=True)
"""


def said(program: str, *arguments: object) -> list[str]:
    command = [sys.executable, "-c", HEAD + program, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=50)
    return done.stdout.split()


FULL = """
journal = Journal(directory, fsync=False)
for size in range(0, 130, int(sys.argv[2])):
    told(journal.append, Void("a"))
    before = journal.path.stat().st_size
    room(before + size)
    told(journal.append, Void("b" * 50), Void("c" * 50))
    assert journal.path.stat().st_size == before, "nothing half-written stays"
    told(journal.append, Void("d" * 100))
    room(before)
    told(journal.check)
    room(resource.RLIM_INFINITY)
    told(journal.check)
    told(journal.append, Void("e"))
"""


def test_a_full_disk_refuses_leaves_nothing_behind_and_goes_on_when_there_is_room(tmp_path: Path) -> None:
    found = said(FULL, tmp_path, 13)
    assert found == ["done", *["journal_unavailable"] * 3, "done", "done"] * 10
    assert ids(tmp_path) == ["a", "e"] * 10


def test_a_new_segment_on_a_full_disk_is_tried_again(tmp_path: Path) -> None:
    program = """
journal = Journal(directory, fsync=False, segment_bytes=60)
told(journal.append, Void("a"))
room(0)
told(journal.append, Void("b" * 30))
told(journal.check)
room(resource.RLIM_INFINITY)
told(journal.append, Void("c"))
"""
    assert said(program, tmp_path) == ["done", "journal_unavailable", "journal_unavailable", "done"]
    assert ids(tmp_path) == ["a", "c"]


def test_a_write_that_fails_is_a_refusal_with_the_system_s_reason_and_no_path(journal: Journal) -> None:
    whole = os.dup(journal._fd)
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, journal._fd)
    with pytest.raises(Refused, match="No space left") as caught:
        journal.append(held("a"))
    assert str(journal.directory) not in caught.value.message
    assert journal.position() == (1, 0)
    with pytest.raises(Refused):
        journal.check()
    os.dup2(whole, journal._fd)
    for fd in (whole, full):
        os.close(fd)
    journal.check()
    journal.append(Void("b"))
    assert ids(journal.directory) == ["b"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_directory_is_said_at_start(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match=str(tmp_path)):
        reopened(tmp_path)
    with pytest.raises(PermissionError):
        claim_all(tmp_path / "new")


def test_a_directory_that_is_a_file_is_said_at_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        reopened(tmp_path / "file")
    with pytest.raises(OSError, match="file"):
        claim_all(tmp_path / "file")


# --- kill -9 ---------------------------------------------------------------------------------------------------------

WRITER = """
journal = Journal(directory, fsync=False, segment_bytes=20_000)
on = Dimensions("qa_agent", "", "u" * 40)
first = int(sys.argv[2])
for number in range(first, first + 1_000_000):
    journal.append(Held(f"{number}", number, "test", on, Amounts(1, 1, 1)))
    print("h", number, flush=True)
    journal.append(Posted(f"{number}", Amounts(1, 1, 1)), Held(f"{number}x", number, "test", on, Amounts()))
    print("p", number, flush=True)
"""


def test_whoever_is_killed_at_any_moment_has_lost_nothing_that_was_reported(tmp_path: Path) -> None:
    rng = random.Random(7)
    reported: set[tuple[str, str]] = set()
    for round_ in range(20):
        command = [sys.executable, "-c", HEAD + WRITER, str(tmp_path), str(round_ * 1_000_000)]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for _ in range(rng.randrange(1, 200)):
                reported.add(tuple(process.stdout.readline().split()))  # type: ignore[arg-type]
            process.send_signal(signal.SIGKILL)
            rest = process.stdout.read().splitlines(keepends=True)
            # What it said with its last breath may be half a word.
            reported |= {tuple(line.split()) for line in rest if line.endswith("\n")}  # type: ignore[misc]
    reopened(tmp_path).close()
    lines = lines_of(tmp_path)
    assert not [line for line in lines if isinstance(line, Torn)]
    found = {("h" if isinstance(line, Held) else "p", line.id) for line in lines if not isinstance(line, Torn)}
    assert reported
    assert reported <= found
    assert len(segments(tmp_path)) > 1
