"""What was appended can be read back, whatever ends the process and whatever happens to the file."""

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.domain.call import Attempt, CallRecord
from gateway.domain.errors import FaultKind, Refused
from gateway.domain.money import Usage
from gateway.store.journal import FILE_NAME, Journal, Torn, read_journal

ROOT = Path(__file__).parents[2]


def record(number: int, **fields: object) -> CallRecord:
    return CallRecord(id=f"call-{number}", at_ms=1_763_700_000_000 + number, env="test", agent="qa_agent", **fields)  # type: ignore[arg-type]


def ids(path: Path) -> list[str]:
    """The ids that can be read back, `torn` for a line that cannot."""
    return ["torn" if isinstance(found, Torn) else found.id for found in read_journal(path)]


def written(directory: Path, *numbers: int) -> Path:
    journal = Journal(directory, fsync=False)
    for number in numbers:
        journal.append(record(number))
    journal.close()
    return journal.path


@pytest.mark.parametrize("fsync", [False, True])
def test_records_come_back_as_they_were_in_their_order(tmp_path: Path, fsync: bool) -> None:
    records = [
        record(1),
        record(
            2,
            attempts=[
                Attempt(ref="a/b", started_ms=0, fault=FaultKind.FIRST_BYTE, status=504),
                Attempt(ref="c", started_ms=1),
            ],
            usage=Usage(prompt_tokens=3, completion_tokens=4, cached_tokens=1),
            variant="finetuned",
            bucket=0,
            cost_nusd=2**53,
            model_answered="line\nbreak \u2028 " + chr(0x1F642),
        ),
    ]
    journal = Journal(tmp_path, fsync=fsync)
    for each in records:
        journal.append(each)
    # Also before it is closed: nothing waits in a buffer of ours.
    assert list(read_journal(journal.path)) == records
    journal.close()
    assert list(read_journal(journal.path)) == records


def test_the_file_is_for_its_owner_only_and_its_directory_is_made(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        path = written(tmp_path / "a" / "b", 1)
    finally:
        os.umask(before)
    assert path == tmp_path / "a" / "b" / FILE_NAME
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_restart_appends(tmp_path: Path) -> None:
    written(tmp_path, 1, 2)
    path = written(tmp_path, 3)
    assert ids(path) == ["call-1", "call-2", "call-3"]
    assert path.read_bytes().count(b"\n") == 3


def test_an_empty_journal_holds_nothing(tmp_path: Path) -> None:
    path = written(tmp_path)
    assert ids(path) == []
    path.write_bytes(b"\n\n  \n")
    assert ids(path) == []


def test_a_torn_last_line_is_told_at_every_length_and_the_next_one_stands_apart(tmp_path: Path) -> None:
    path = written(tmp_path, 1, 2)
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for size in range(first, len(whole)):
        path.write_bytes(whole[:size])
        # Without its newline only, the line is whole; without anything of it, there is none.
        torn = [] if size == first else ["call-2"] if size == len(whole) - 1 else ["torn"]
        assert ids(path) == ["call-1", *torn]
        written(tmp_path, 3)
        assert ids(path) == ["call-1", *torn, "call-3"]


def test_a_torn_line_is_named_by_its_number(tmp_path: Path) -> None:
    path = written(tmp_path, 1, 2, 3)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1].replace(b"call-2", b"call-9") + lines[2])
    assert list(read_journal(path)) == [record(1), Torn(2), record(3)]


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A journal of three records, to be spoilt anew by every example."""
    return written(tmp_path_factory.mktemp("journal"), 0, 1, 2)


@pytest.fixture(scope="module")
def whole(scratch: Path) -> bytes:
    return scratch.read_bytes()


@given(data=st.data())
def test_no_altered_byte_goes_unnoticed(scratch: Path, whole: bytes, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(whole) - 1))
    altered = data.draw(st.integers(0, 255).filter(lambda byte: byte != whole[at]))
    scratch.write_bytes(whole[:at] + bytes([altered]) + whole[at + 1 :])
    found = list(read_journal(scratch))
    wanted = [record(number) for number in range(3)]
    # Hex digits may be written in capitals, which alters nothing that is said; all else must show.
    assert found == wanted or any(isinstance(each, Torn) for each in found)
    assert all(each in wanted for each in found if isinstance(each, CallRecord))


@given(junk=st.binary(max_size=60))
def test_no_bytes_trip_the_reader(scratch: Path, whole: bytes, junk: bytes) -> None:
    scratch.write_bytes(junk + b"\n" + whole.splitlines(keepends=True)[0])
    found = list(read_journal(scratch))
    assert found[-1] == record(0)
    assert all(isinstance(each, Torn) for each in found[:-1])


def run(program: str, *arguments: str, kill: bool = False) -> str:
    """A process of its own that writes; what it printed. `kill`: with SIGKILL, as soon as it says that it is ready."""
    command = [sys.executable, "-c", HEAD + program, *arguments]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        if not kill:
            return process.communicate(timeout=30)[0]
        said = process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        assert process.wait(timeout=30) == -signal.SIGKILL
        return said


HEAD = """
import resource, sys, time
from pathlib import Path
from gateway.domain.call import CallRecord
from gateway.domain.errors import Refused
from gateway.store.journal import Journal
journal = Journal(Path(sys.argv[1]), fsync=False)
def record(number):
    return CallRecord(id=f"call-{number}", at_ms=number, env="test")
def append(number):
    try:
        journal.append(record(number))
        print(number, "written")
    except Refused as refused:
        print(number, refused.code)
"""


def test_a_process_that_is_killed_right_after_it_wrote_loses_nothing(tmp_path: Path) -> None:
    said = run(
        "for number in range(500): journal.append(record(number))\nprint('ready', flush=True)\ntime.sleep(60)",
        str(tmp_path),
        kill=True,
    )
    assert said == "ready\n"
    assert ids(tmp_path / FILE_NAME) == [f"call-{number}" for number in range(500)]


@pytest.mark.parametrize("room", [0, 1, 20, 40, 41])
def test_a_full_disk_refuses_and_what_comes_after_it_stays_readable(tmp_path: Path, room: int) -> None:
    """RLIMIT_FSIZE ends the disk `room` bytes after the second line, and is lifted again after two refusals."""
    said = run(
        """
append(1)
append(2)
size = journal.path.stat().st_size
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (size + int(sys.argv[2]), hard))
append(3)
append(4)
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
append(5)
append(6)
journal.close()
""",
        str(tmp_path),
        str(room),
    )
    assert said.splitlines() == [
        "1 written", "2 written", "3 journal_unavailable", "4 journal_unavailable", "5 written", "6 written",
    ]  # fmt: skip
    found = ids(tmp_path / FILE_NAME)
    assert [each for each in found if each != "torn"] == ["call-1", "call-2", "call-5", "call-6"]
    assert len(found) == (4 if room == 0 else 5)


def test_a_restart_on_a_full_disk_gets_as_far_as_its_first_record(tmp_path: Path) -> None:
    path = written(tmp_path, 1)
    path.write_bytes(path.read_bytes() + b"torn")
    said = run(
        "resource.setrlimit(resource.RLIMIT_FSIZE, (journal.path.stat().st_size,) * 2)\nappend(2)\nappend(3)",
        str(tmp_path),
    )
    assert said.splitlines() == ["2 journal_unavailable", "3 journal_unavailable"]
    assert ids(path) == ["call-1", "torn"]


def test_a_write_that_fails_is_a_refusal_with_the_system_s_reason(tmp_path: Path) -> None:
    journal = Journal(tmp_path, fsync=False)
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, journal._fd)
    os.close(full)
    with pytest.raises(Refused) as caught:
        journal.append(record(1))
    os.close(journal._fd)
    assert (caught.value.code, caught.value.status) == ("journal_unavailable", 503)
    assert "No space left" in caught.value.message
    assert str(tmp_path) not in caught.value.message


def test_a_directory_that_cannot_be_written_is_said_at_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        Journal(tmp_path / "file", fsync=False)


def test_after_a_failed_write_a_check_tells_whether_the_disk_takes_a_line_again(tmp_path: Path) -> None:
    script = """
import resource, sys
from pathlib import Path
from gateway.domain.call import CallRecord
from gateway.domain.errors import Refused
from gateway.store.journal import Journal, read_journal

journal = Journal(Path(sys.argv[1]), fsync=False)
record = CallRecord(id="x" * 300, at_ms=1, env="dev")
journal.append(record)
journal.check()
size = journal.path.stat().st_size
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
for verb in (lambda: journal.append(record), journal.check):
    try:
        verb()
    except Refused as refused:
        print(refused.code)
resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
journal.check()
journal.append(record)
print(len([one for one in read_journal(journal.path) if isinstance(one, CallRecord)]))
"""
    command = [sys.executable, "-c", "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n" + script]
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["journal_unavailable", "journal_unavailable", "2"]
