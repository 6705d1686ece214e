"""A ledger goes to CSV and comes back equal; a file that is wrong says where, what and how to mend it, all at once."""

import csv
from io import BytesIO, StringIO
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.domain.ledger import Amounts, Dimensions, LedgerRow
from gateway.domain.money import MAX_NUSD
from gateway.lab.ledger_csv import COLUMNS, CsvProblems, export_csv, read_csv, read_time
from gateway.store.ledger import Added, Ledger

NOON_MS = 1_795_262_400_000  # 2026-11-21T12:00:00Z
HEADER = "time,agent,usd\n"
LINE = "2026-11-21,qa_agent,0.50\n"

NAMES = st.text("abcdefghijklmnopqrstuvwxyzABC0189_.-", min_size=1, max_size=12)
IDS = st.text("abcxyzABC0189._:@/-", min_size=1, max_size=20)
# Whatever can be typed or pasted, formulas, quotes and line breaks among it, but NUL and halves of surrogate pairs.
NOTES = st.one_of(
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])),
    st.builds("".join, st.lists(st.sampled_from(list("'=+-@\t\r\n\",; a")), max_size=6)),
)
PRINTABLE = st.text(st.characters(categories=["L", "N", "P", "S"]), max_size=30)
FIGURES = st.integers(0, MAX_NUSD - 1)
ROWS = st.builds(
    LedgerRow,
    id=IDS,
    at_ms=st.integers(0, 253_402_300_799_999),
    env=NAMES,
    on=st.builds(
        Dimensions,
        agent=NAMES,
        key=st.just("") | NAMES,
        user=PRINTABLE,
        operation=IDS,
        model=PRINTABLE,
        variant=st.sampled_from(["", "finetuned", "baseline"]),
    ),
    amounts=st.builds(Amounts, FIGURES, FIGURES, FIGURES),
    state=st.sampled_from(["posted", "void", "in_doubt", "released"]),
    basis=st.sampled_from(["exact", "estimate", "bound", "none", "manual"]),
    prompt_tokens=FIGURES,
    completion_tokens=FIGURES,
    source=st.sampled_from(["gateway", "manual", "import"]),
    note=NOTES,
)


def exported(rows: list[LedgerRow]) -> bytes:
    file = StringIO(newline="")
    export_csv(rows, file)
    return file.getvalue().encode()


def read(content: bytes | str, env: str = "dev") -> list[LedgerRow]:
    return read_csv(BytesIO(content.encode() if isinstance(content, str) else content), "costs.csv", env=env)


def problems_of(content: bytes | str) -> list[str]:
    with pytest.raises(CsvProblems) as caught:
        read(content)
    return [f"{problem.file} {problem.key} {problem.found}: {problem.fix}" for problem in caught.value.problems]


# --- There and back --------------------------------------------------------------------------------------------------


@given(rows=st.lists(ROWS, max_size=6, unique_by=lambda row: row.id))
def test_what_is_exported_comes_back_equal(rows: list[LedgerRow]) -> None:
    assert read(exported(rows)) == rows


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(ROWS, max_size=4, unique_by=lambda row: row.id))
def test_a_ledger_is_copied_to_an_empty_one_and_a_second_time_adds_nothing(
    tmp_path_factory: pytest.TempPathFactory, rows: list[LedgerRow]
) -> None:
    folder = tmp_path_factory.mktemp("copy")
    rows = [LedgerRow(**{name: getattr(row, name) for name in row.__struct_fields__} | {"env": "dev"}) for row in rows]
    # What sums up to more than a ledger may hold is its own test.
    rows = rows if all(sum(unit) < MAX_NUSD for unit in zip(*(row.amounts for row in rows), strict=True)) else []
    with Ledger(folder / "a.db", clock=lambda: 0.0) as one, Ledger(folder / "b.db", clock=lambda: 0.0) as other:
        one.add(rows, who="ann")
        content = exported(list(one.rows("dev")))
        assert other.add(read(content), who="ann") == Added(len(rows), 0)
        assert other.add(read(content), who="ann") == Added(0, len(rows))
        assert list(other.rows("dev")) == list(one.rows("dev"))
        assert exported(list(other.rows("dev"))) == content


def test_an_export_reads_as_people_write() -> None:
    row = LedgerRow(
        id="req-1f0c.2", at_ms=NOON_MS + 5, env="production", on=Dimensions("qa_agent", "web", "u1", model="m/x"),
        amounts=Amounts(1_500_000_000, 1, 30), prompt_tokens=10, completion_tokens=20, note='said "no", twice',
    )  # fmt: skip
    header, line = exported([row]).decode().split("\r\n")[:2]
    assert header == ",".join(COLUMNS)
    assert line == (
        "req-1f0c.2,2026-11-21T12:00:00.005Z,qa_agent,web,u1,inference,m/x,,1.50,1,30,10,20,posted,exact,gateway,"
        '"said ""no"", twice",production'
    )


@pytest.mark.parametrize("note", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "'=1", "'", "'''@x", "it's", "'quoted'"])
def test_no_cell_begins_as_a_formula(note: str) -> None:
    row = LedgerRow(
        id="-1", at_ms=0, env="dev", on=Dimensions(agent="-a", user="@u", model="=m"), amounts=Amounts(1), note=note
    )
    content = exported([row])
    (_, cells) = csv.reader(StringIO(content.decode(), newline=""))
    assert not [cell for cell in cells if cell.startswith(("=", "+", "-", "@", "\t", "\r"))]
    assert read(content) == [row]


def test_a_lease_is_not_spend_and_stays_at_home() -> None:
    lease = LedgerRow(id="l", at_ms=0, env="dev", on=Dimensions(), amounts=Amounts(5), state="in_doubt", source="lease")
    assert export_csv([lease], StringIO()) == 0
    assert read(exported([lease])) == []


# --- The least there is ----------------------------------------------------------------------------------------------


def test_time_agent_and_dollars_are_enough() -> None:
    (row,) = read(HEADER + LINE)
    assert row.id.startswith("import-")
    assert (row.at_ms, row.env, row.on) == (NOON_MS - 12 * 3_600_000, "dev", Dimensions(agent="qa_agent"))
    assert row.amounts == Amounts(500_000_000, 0, 0)
    assert (row.state, row.basis, row.source) == ("posted", "manual", "import")


def test_ids_follow_from_content_and_not_from_the_place_in_the_file() -> None:
    other = "2026-11-21,qa_agent,0.60\n"
    first = [row.id for row in read(HEADER + LINE + LINE + other)]
    again = [row.id for row in read(HEADER + other + "\n" + LINE + LINE)]
    assert len(set(first)) == 3
    assert set(first) == set(again)
    # The same spend twice is two rows, of which a longer file knows both.
    assert set(first) < {row.id for row in read(HEADER + LINE + LINE + LINE + other)}


def test_the_order_of_columns_and_the_byte_order_mark_change_nothing() -> None:
    (row,) = read(HEADER + LINE)
    assert read(b"\xef\xbb\xbfUSD , time,agent\r\n0.5, 2026-11-21 ,qa_agent\r\n") == [row]


def test_tokens_are_what_their_parts_add_up_to_unless_they_are_told() -> None:
    content = "time,agent,usd,prompt_tokens,completion_tokens,tokens\n2026-11-21,a,1,10,5,\n2026-11-21,a,1,10,5,99\n"
    assert [row.amounts.tokens for row in read(content)] == [15, 99]


def test_the_same_row_twice_under_its_id_counts_once() -> None:
    line = "r1,2026-11-21,qa_agent,1\n"
    assert [row.id for row in read("id,time,agent,usd\n" + line + line)] == ["r1"]


@pytest.mark.parametrize(
    ("text", "at_ms"),
    [
        ("2026-11-21T12:00:00Z", NOON_MS),
        ("2026-11-21 12:00", NOON_MS),
        ("2026-11-21T13:00:00+01:00", NOON_MS),
        ("2026-11-21T12:00:00.001999Z", NOON_MS + 1),
        ("1970-01-01", 0),
    ],
)
def test_times_are_utc_unless_they_say_else(text: str, at_ms: int) -> None:
    assert read_time(text) == at_ms


# --- What is wrong with it -------------------------------------------------------------------------------------------

CELLS = [
    ("time", "21.11.2026", "time \"21.11.2026\": wants a date or time from 1970 on as ISO 8601"),
    ("time", "", 'time "": wants a date'),
    ("time", "2026-02-30", "wants a date"),
    ("time", "1969-12-31", "wants a date"),
    ("time", "0001-01-01T00:00:00+14:00", "wants a date"),
    ("time", "1795262400", "wants a date"),
    ("agent", "", 'agent "": must not be empty'),
    ("agent", "qa agent", 'agent "qa agent": may hold letters, digits'),
    ("usd", "", 'usd "": must not be empty'),
    ("usd", "1,50", 'usd "1,50": decimals stand behind a point: 1.50'),
    ("usd", "-0.50", "must not be negative"),
    ("usd", "0.1234567891", "has more than nine decimals"),
    ("usd", "9007199.254740992", "is above the largest amount, 9007199.254740992 dollars"),
    ("usd", "1e3", "is not an amount in dollars"),
    ("usd", "$5", "without a currency sign"),
    ("usd", "NaN", "is not an amount in dollars"),
    ("usd", "9" * 5000, "is above the largest amount"),
    ("requests", "1.5", "wants a whole number"),
    ("requests", "-1", "wants a whole number"),
    ("tokens", "9007199254740992", "wants a whole number"),
    ("prompt_tokens", "ten", "wants a whole number"),
    ("completion_tokens", "\u0661", "wants a whole number"),
    ("state", "postd", 'state "postd": one of posted, void, in_doubt, released; did you mean "posted"?'),
    ("basis", "exactly", 'one of exact, estimate, bound, none, manual; did you mean "exact"?'),
    ("source", "lease", "one of gateway, manual, import"),
    ("variant", "fine-tuned", 'did you mean "finetuned"?'),
    ("operation", "fine tune", 'operation "fine tune": may hold A-Z a-z 0-9'),
    ("key", "a b", "may hold letters"),
    ("user", "u" * 513, "at most 512 printable characters"),
    ("user", "a\u0007b", "printable"),
    ("env", "pro duction", "may hold letters"),
]  # fmt: skip


@pytest.mark.parametrize(("column", "cell", "said"), CELLS)
def test_each_wrong_cell_is_named_with_its_line_its_column_and_the_fix(column: str, cell: str, said: str) -> None:
    cells = {"time": "2026-11-21", "agent": "qa_agent", "usd": "1"} | {column: cell}
    file = StringIO(newline="")
    writer = csv.writer(file)
    writer.writerows([cells, ["2026-11-21", "qa_agent", "2", *[""] * (len(cells) - 3)], cells.values()])
    (found,) = problems_of(file.getvalue())
    assert found.startswith(f"costs.csv:3 {column}")
    assert said in found
    assert len(found) < 300


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "costs.csv:1 header : the file is empty; its first line names the columns: time,agent,usd at least"),
        (b"\n \n\n", "the file is empty"),
        (b"\xef\xbb\xbf", "the file is empty"),
        (b"tiem,agent,usd\n", 'costs.csv:1 tiem : no such column; did you mean "time"?'),
        (b"time,usd\n", "costs.csv:1 agent : this column is missing"),
        (b"time,agent,usd,colour\n", "costs.csv:1 colour : no such column; known: id, time"),
        (b"time,agent,usd,usd\n", "costs.csv:1 usd : this column is there twice"),
        (b"\n\ntime,agent,usd,\n", "costs.csv:3 header : no such column"),
        (b"time;agent;usd\n2026-11-21;qa;1\n", "columns are separated by something else than commas"),
        (b"time,agent,usd\n2026-11-21,qa\0,1\n", "costs.csv:2 encoding a NUL byte: this is no text in UTF-8"),
        (b"time,agent,usd\n2026-11-21,caf\xe9,1\n", "costs.csv:2 encoding byte 0xe9: this is not UTF-8"),
        ("time,agent,usd\n".encode("utf-16"), "costs.csv:1 encoding"),
        (b"time,agent,usd\n2026-11-21,qa\n", "costs.csv:2 columns 2: the header has 3"),
        (b"time,agent,usd\n2026-11-21,qa,1,50\n", "costs.csv:2 columns 4: the header has 3"),
        (b'time,agent,usd\n2026-11-21,"qa,1\n', "costs.csv:2 quotes"),
        (b'time,agent,usd\n2026-11-21,"q"a,1\n', "costs.csv:2 quotes"),
        (b"\x89PNG\r\n\x1a\n\x00\x00", "encoding"),
    ],
)
def test_a_file_that_is_no_such_table_says_why(content: bytes, said: str) -> None:
    assert said in "\n".join(problems_of(content))


def test_every_problem_is_told_at_once_and_lines_are_counted_through_quotes() -> None:
    content = (
        "time,agent,usd,note\n"
        "yesterday,qa agent,1,\n"
        '2026-11-21,qa_agent,1,"two\nlines"\n'
        "2026-11-21,qa_agent\n"
        "2026-11-21,qa_agent,-1,\n"
    )
    assert [found.split(": ")[0] for found in problems_of(content)] == [
        'costs.csv:2 agent "qa agent"',
        'costs.csv:2 time "yesterday"',
        "costs.csv:5 columns 2",
        'costs.csv:6 usd "-1"',
    ]


def test_one_id_for_two_rows_names_both_lines() -> None:
    content = "id,time,agent,usd\nr1,2026-11-21,qa_agent,1\nr2,2026-11-21,qa_agent,1\nr1,2026-11-21,qa_agent,2\n"
    assert problems_of(content) == [
        'costs.csv:4 id "r1": line 2 has the same id with other content; give one of them an id of its own'
    ]


def test_a_file_with_one_problem_leaves_the_ledger_as_it_was(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.db", clock=lambda: 0.0) as ledger:
        with pytest.raises(CsvProblems, match=r"costs\.csv:3: usd"):
            ledger.add(read(HEADER + LINE + "2026-11-21,qa_agent,x\n"), who="ann")
        assert list(ledger.rows("dev")) == []
        assert ledger.audit() == []


@given(
    content=st.binary(max_size=200)
    | st.text(max_size=200).map(lambda text: HEADER.encode() + text.encode("utf-8", "replace"))
)
def test_whatever_the_file_holds_it_is_read_or_its_problems_are_named(content: bytes) -> None:
    problems = None
    try:
        read(content)
    except CsvProblems as caught:
        problems = caught.problems
    assert problems != []
    assert all(problem.file.startswith("costs.csv:") and problem.fix for problem in problems or ())
