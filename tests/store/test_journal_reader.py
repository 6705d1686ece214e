"""Only what was written whole is believed; what was held and never ended is in doubt, and told once."""

from pathlib import Path
from zlib import crc32

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.domain.call import CallRecord
from gateway.domain.ledger import Amounts, Dimensions, Held, InDoubt, Line, Posted, Void
from gateway.store.journal import Journal, Position
from gateway.store.journal_reader import Replay, Torn, read_calls, read_segment
from tests.outcomes import outcome, record

ON = Dimensions("qa_agent", "key", "u1", "benchmark", "sim/small", "baseline")
BOUND = Amounts(500, 1, 90)


def held(id: str) -> Held:
    return Held(id, 1_800_000_000_000, "test", ON, BOUND)


def written(directory: Path, *lines: Line, segment_bytes: int = 2**20) -> Path:
    journal = Journal(directory, fsync=False, segment_bytes=segment_bytes)
    for line in lines:
        journal.append(line)
    journal.close()
    return journal.path


def test_a_line_that_was_altered_is_named_by_its_place_and_the_others_stay(tmp_path: Path) -> None:
    path = written(tmp_path, held("a"), held("b"), held("c"))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1].replace(b'"b"', b'"d"') + b"\n" + lines[2])
    assert list(read_segment(path)) == [held("a"), Torn(str(path), 2), held("c")]
    assert Replay(tmp_path, Position()).torn == [Torn(str(path), 2)]


def test_a_last_line_without_its_end_is_not_believed_as_it_will_be_cut_off(tmp_path: Path) -> None:
    path = written(tmp_path, held("a"), Posted("a", Amounts(1, 1, 1)))
    path.write_bytes(path.read_bytes()[:-1])
    left = Replay(tmp_path, Position())
    assert [row.state for row in left.rows] == ["in_doubt"]
    assert len(left.torn) == 1


@pytest.mark.parametrize(
    "text", [b'{"event":"of tomorrow","id":"a"}', b'{"id":"a"}', b"{}", b"[]", b"", b'{"event":"void"}', b"\xff"]
)
def test_a_whole_line_that_says_nothing_we_know_is_told_as_torn(tmp_path: Path, text: bytes) -> None:
    path = written(tmp_path, held("a"))
    with path.open("ab") as file:
        file.write(b"%08x %b\n" % (crc32(text), text))
    assert list(read_segment(path)) == [held("a"), Torn(str(path), 2)]


def test_a_line_of_an_older_gateway_with_fewer_dimensions_is_read(tmp_path: Path) -> None:
    text = b'{"event":"held","id":"a","at_ms":1,"env":"test","on":["qa_agent","k"],"amounts":[5]}'
    path = tmp_path / "00000001.journal"
    path.write_bytes(b"%08x %b\n" % (crc32(text), text))
    assert list(read_segment(path)) == [Held("a", 1, "test", Dimensions("qa_agent", "k"), Amounts(5))]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A journal of three lines, to be spoilt anew by every example."""
    return written(
        tmp_path_factory.mktemp("journal"), held("a"), Posted("a", BOUND), CallRecord(id="a", at_ms=1, env="test")
    )


@pytest.fixture(scope="module")
def whole(path: Path) -> bytes:
    return path.read_bytes()


@given(data=st.data())
def test_no_altered_byte_goes_unnoticed(path: Path, whole: bytes, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(whole) - 1))
    altered = data.draw(st.integers(0, 255).filter(lambda byte: byte != whole[at]))
    path.write_bytes(whole[:at] + bytes([altered]) + whole[at + 1 :])
    found = list(read_segment(path))
    wanted = [held("a"), Posted("a", BOUND), CallRecord(id="a", at_ms=1, env="test")]
    # A checksum may be written in more ways than one, which alters nothing that is said; all else must show.
    assert found == wanted or any(isinstance(each, Torn) for each in found)
    assert all(each in wanted for each in found if not isinstance(each, Torn))


@given(junk=st.binary(max_size=60))
def test_no_bytes_trip_the_reader(path: Path, whole: bytes, junk: bytes) -> None:
    path.write_bytes(junk + b"\n" + whole)
    found = list(read_segment(path))
    assert found[-3:] == [held("a"), Posted("a", BOUND), CallRecord(id="a", at_ms=1, env="test")]
    assert all(isinstance(each, Torn) for each in found[:-3])


def test_a_replay_has_a_row_for_each_end_and_a_doubt_for_each_hold_without_one(tmp_path: Path) -> None:
    written(
        tmp_path, held("a"), held("b"), held("c"), held("d"), Posted("b", Amounts(7, 1, 3), "estimate", 1, 2),
        Void("a"), InDoubt("d"), Posted("told before", BOUND), CallRecord(id="b", at_ms=1, env="test"),
    )  # fmt: skip
    left = Replay(tmp_path, Position())
    assert [(row.id, row.state, row.amounts, row.basis) for row in left.rows] == [
        ("b", "posted", (7, 1, 3), "estimate"),
        ("a", "void", (0, 0, 0), "none"),
        ("d", "in_doubt", BOUND, "bound"),
        ("c", "in_doubt", BOUND, "bound"),
    ]
    assert all((row.on, row.env, row.at_ms) == (ON, "test", held("a").at_ms) for row in left.rows)
    assert left.unresolved == [InDoubt("c")]


def test_a_replay_has_every_call_for_which_a_model_was_asked_and_that_was_written_after_what_is_told(
    tmp_path: Path,
) -> None:
    journal = Journal(tmp_path, fsync=False, segment_bytes=1)
    journal.append(record("told before"))
    told = journal.position()
    journal.append(record("c1"), record("refused", attempts=[]))
    journal.append(record("c2"))
    journal.close()
    assert Replay(tmp_path, told).outcomes == [outcome("c1"), outcome("c2")]


def test_a_doubt_that_was_written_down_is_no_doubt_at_the_next_start(tmp_path: Path) -> None:
    written(tmp_path, held("a"))
    first = Replay(tmp_path, Position())
    written(tmp_path, *first.unresolved)
    again = Replay(tmp_path, Position())
    assert again.rows == first.rows
    assert again.unresolved == []


def test_a_replay_begins_where_the_store_was_told_and_goes_on_through_the_segments(tmp_path: Path) -> None:
    lines = [line for number in range(9) for line in (held(f"{number}"), Void(f"{number}"))]
    path = written(tmp_path, *lines, segment_bytes=500)
    assert path.name > "00000003"
    first = tmp_path / "00000001.journal"
    offset = len(first.read_bytes().splitlines(keepends=True)[0])
    assert [row.id for row in Replay(tmp_path, Position()).rows] == [f"{number}" for number in range(9)]
    # Past the hold of 0: its end says nothing any more.
    assert [row.id for row in Replay(tmp_path, Position(1, offset)).rows] == [f"{number}" for number in range(1, 9)]
    left = Replay(tmp_path, Position(9_999, 0))
    assert (left.rows, left.unresolved, left.torn) == ([], [], [])
    # The disk lost what the store had been told of; what is written from now on must not be skipped for that.
    assert Replay(tmp_path, Position(int(path.stem), 10**9)).rows == []


def test_a_process_that_never_wrote_left_nothing(tmp_path: Path) -> None:
    left = Replay(tmp_path, Position())
    assert (left.rows, left.unresolved, left.torn) == ([], [], [])
    assert list(read_calls(tmp_path / "nowhere")) == []


def test_calls_are_read_over_all_processes(tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / name).mkdir()
        path = written(tmp_path / name, held(name), CallRecord(id=name, at_ms=1, env="test"))
    with path.open("ab") as file:
        file.write(b"torn")
    assert list(read_calls(tmp_path)) == [
        CallRecord(id="a", at_ms=1, env="test"),
        Torn(str(path), 3),
        CallRecord(id="b", at_ms=1, env="test"),
    ]
