"""The ledger as CSV: written so that a spreadsheet can show it, and read back with every problem named, not the first.

Columns: id, time (ISO 8601, UTC where no zone is given), agent, key, user, operation, model, variant, usd (decimal),
requests, tokens, prompt_tokens, completion_tokens, state, basis, source, note, env. Only time, agent and usd must be
there. The invariants: what is exported comes back equal, and a file with one problem gives no row at all.

Rows of source "lease" are not exported: they are a store's own reservation for a process it lost, not spend.
"""

import csv
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from hashlib import sha256
from io import StringIO
from typing import BinaryIO, NamedTuple, TextIO, get_args

import msgspec

from gateway.domain.call import Basis, Variant
from gateway.domain.ledger import Amounts, Dimensions, LedgerRow, Source, State
from gateway.domain.money import MAX_NUSD, format_usd, nusd_from_usd
from gateway.domain.names import ID, NAME, is_id, is_name
from gateway.domain.reading import Problem, nearest, shown

COLUMNS = (
    "id", "time", "agent", "key", "user", "operation", "model", "variant", "usd", "requests", "tokens",
    "prompt_tokens", "completion_tokens", "state", "basis", "source", "note", "env",
)  # fmt: skip
REQUIRED = ("time", "agent", "usd")
_COUNTS = ("requests", "tokens", "prompt_tokens", "completion_tokens")
_CHOICES: Mapping[str, tuple[str, ...]] = {
    "variant": ("", *get_args(Variant)),
    "state": get_args(State),
    "basis": get_args(Basis),
    "source": tuple(source for source in get_args(Source) if source != "lease"),
}
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MS = timedelta(milliseconds=1)
_COUNT = re.compile(r"[0-9]{1,16}")
_MAX_TEXT = 512
# What makes a spreadsheet take a text for a formula, behind any number of the marks that say it is none.
_FORMULA = re.compile(r"'*[=+\-@\t\r]")


class CsvProblems(Exception):
    """A file that cannot be read as it is: each problem with its file and line, its column, what is there, and the fix.

    `file` of a problem is "file:line" and its `key` the column.
    """

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("\n".join(f"{problem.file}: {problem}" for problem in problems))
        self.problems = list(problems)


class Line(NamedTuple):
    """One record of a file by its columns, and the line it begins on."""

    number: int
    cells: dict[str, str]


def export_csv(rows: Iterable[LedgerRow], file: TextIO) -> int:
    """Write rows, a header first, and say how many. `file` was opened with encoding="utf-8" and newline=""."""
    writer = csv.writer(file)
    writer.writerow(COLUMNS)
    count = 0
    for row in rows:
        if row.source == "lease":
            continue
        figures = (format_usd(row.amounts.nusd), row.amounts.requests, row.amounts.tokens)
        tokens = (row.prompt_tokens, row.completion_tokens)
        texts = (row.id, _format_time(row.at_ms), *row.on, *figures, *tokens, row.state, row.basis, row.source)
        writer.writerow([_disarmed(str(text)) for text in (*texts, row.note, row.env)])
        count += 1
    return count


def read_csv(file: BinaryIO, name: str, *, env: str) -> list[LedgerRow]:
    """The rows of a file, which problems call `name`; `env` is that of rows which name none. Raises `CsvProblems`.

    A row without an id gets one that follows from its content and from how often that stood in the file before, so a
    file that is read twice names the same rows. The same row under the same id counts once.
    """
    problems: list[Problem] = []
    rows: dict[str, tuple[int, LedgerRow]] = {}
    seen: dict[bytes, int] = {}
    for line in read_lines(file, name, COLUMNS, REQUIRED, problems):
        row = _Reader(line, name, env, problems).row()
        if row is None:
            continue
        if not row.id:
            content = msgspec.json.encode(row)
            seen[content] = seen.get(content, 0) + 1
            digest = sha256(content + b"#%d" % seen[content]).hexdigest()
            row = msgspec.structs.replace(row, id=f"import-{digest[:32]}")
        first, there = rows.setdefault(row.id, (line.number, row))
        if there != row:
            fix = f"line {first} has the same id with other content; give one of them an id of its own"
            problems.append(Problem(key="id", found=shown(row.id), fix=fix, file=f"{name}:{line.number}"))
    if problems:
        raise CsvProblems(problems)
    return [row for _, row in rows.values()]


def read_lines(
    file: BinaryIO, name: str, known: Sequence[str] | None, required: Sequence[str], problems: list[Problem]
) -> Iterator[Line]:
    """The records of a CSV file with a header, those that have the header's shape. Appends what is wrong to `problems`.

    Columns that are not `known` are wrong; with None, any may be there, and is passed on.
    Nothing comes of a file whose encoding or header is wrong, since every line would be.
    """

    def wrong(number: int, key: str, found: str, fix: str) -> None:
        problems.append(Problem(key=key, found=found, fix=fix, file=f"{name}:{number}"))

    text = _decoded(file.read(), wrong)
    if text is None:
        return
    reader = csv.reader(StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    number = 1
    while True:
        # A record may span lines, in quotes; it is named by its first.
        number = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            # What follows a quote that is never closed cannot be told apart any more.
            wrong(number, "quotes", "", f"{error}; text with a comma, quote or line break stands in one pair of quotes")
            return
        if not any(cell.strip() for cell in cells):
            continue
        if header is None:
            header = [cell.strip().lower() for cell in cells]
            if not _is_header(header, known, required, partial(wrong, number)):
                return
        elif len(cells) != len(header):
            wrong(number, "columns", str(len(cells)), f"the header has {len(header)}; is a comma missing, or unquoted?")
        else:
            yield Line(number, dict(zip(header, cells, strict=True)))
    if header is None:
        wrong(1, "header", "", f"the file is empty; its first line names the columns: {','.join(required)} at least")


class _Reader:
    """One record as a row; each of its cells that is wrong becomes a problem."""

    def __init__(self, line: Line, name: str, env: str, problems: list[Problem]) -> None:
        self._line = line
        self._file = f"{name}:{line.number}"
        self._env = env
        self._problems = problems

    def row(self) -> LedgerRow | None:
        before = len(self._problems)
        on = Dimensions(
            agent=self._named("agent", is_name, NAME),
            key=self._named("key", is_name, NAME),
            user=self._text("user", _MAX_TEXT),
            operation=self._named("operation", is_id, ID) or "inference",
            model=self._text("model", _MAX_TEXT),
            variant=self._choice("variant", ""),
        )
        at_ms, nusd = self._time(), self._nusd()
        requests, tokens, prompt, completion = (self._count(name) for name in _COUNTS)
        state, basis, source = (
            self._choice(name, default)
            for name, default in (("state", "posted"), ("basis", "manual"), ("source", "import"))
        )
        id, env = self._text("id", _MAX_TEXT), self._named("env", is_name, NAME) or self._env
        if len(self._problems) > before:
            return None
        if tokens is None:
            tokens = (prompt or 0) + (completion or 0)
        return msgspec.convert(
            {
                "id": id, "at_ms": at_ms, "env": env, "on": on, "amounts": Amounts(nusd, requests or 0, tokens),
                "state": state, "basis": basis, "prompt_tokens": prompt or 0, "completion_tokens": completion or 0,
                "source": source, "note": self._cell("note"),
            },
            LedgerRow,
        )  # fmt: skip

    def _cell(self, column: str) -> str:
        return _armed(self._line.cells.get(column, ""))

    def _wrong(self, column: str, fix: str) -> None:
        found = shown(self._line.cells.get(column, ""))
        self._problems.append(Problem(key=column, found=found, fix=fix, file=self._file))

    def _named(self, column: str, is_right: Callable[[str], bool], wanted: str) -> str:
        text = self._cell(column).strip()
        if not text and column in REQUIRED:
            self._wrong(column, "must not be empty")
        elif text and not is_right(text):
            self._wrong(column, f"may hold {wanted}")
        return text

    def _text(self, column: str, limit: int) -> str:
        text = self._cell(column).strip()
        if len(text) > limit or not text.isprintable():
            self._wrong(column, f"may hold at most {limit} printable characters")
        return text

    def _choice(self, column: str, default: str) -> str:
        text = self._cell(column).strip().lower() or default
        if text not in _CHOICES[column]:
            listed = ", ".join(choice for choice in _CHOICES[column] if choice)
            self._wrong(column, f"one of {listed}{nearest(text, _CHOICES[column])}")
        return text

    def _count(self, column: str) -> int | None:
        text = self._cell(column).strip()
        if not text:
            return None
        if not _COUNT.fullmatch(text) or int(text) >= MAX_NUSD:
            self._wrong(column, "wants a whole number of zero or more, digits only")
            return None
        return int(text)

    def _nusd(self) -> int:
        text = self._cell("usd").strip()
        try:
            return nusd_from_usd(text)
        except ValueError as error:
            self._wrong("usd", _advice_on_usd(text, str(error)))
            return 0

    def _time(self) -> int:
        text = self._cell("time").strip()
        try:
            return read_time(text)
        except ValueError:
            self._wrong("time", "wants a date or time from 1970 on as ISO 8601, such as 2026-11-21T06:40:00Z")
            return 0


def read_time(text: str) -> int:
    """Unix milliseconds of a time in ISO 8601, rounded down; UTC where it names no zone. Raises ValueError."""
    found = datetime.fromisoformat(text)
    found = found if found.tzinfo else found.replace(tzinfo=UTC)
    at_ms = (found - _EPOCH) // _MS
    if at_ms < 0:
        raise ValueError("before 1970")
    return at_ms


def _format_time(at_ms: int) -> str:
    return (_EPOCH + at_ms * _MS).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _advice_on_usd(text: str, reason: str) -> str:
    if not text:
        return "must not be empty"
    if text.startswith("-"):
        return "must not be negative; what was booked in error is released, not booked back"
    if re.fullmatch(r"[0-9]+,[0-9]+", text):
        return f"decimals stand behind a point: {text.replace(',', '.')}"
    if text.lstrip("$€ ") != text:
        return "wants the number alone, without a currency sign"
    return re.sub(r"""^(["']).*\1 """, "", reason)


def _decoded(content: bytes, wrong: Callable[[int, str, str, str], None]) -> str | None:
    if b"\0" in content:
        line = content[: content.index(b"\0")].count(b"\n") + 1
        wrong(line, "encoding", "a NUL byte", "this is no text in UTF-8; save it as CSV in UTF-8")
        return None
    try:
        # Spreadsheets put a byte order mark first.
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        wrong(line, "encoding", f"byte 0x{content[error.start]:02x}", "this is not UTF-8; save it as CSV in UTF-8")
        return None


def _is_header(
    header: Sequence[str], known: Sequence[str] | None, required: Sequence[str], wrong: Callable[[str, str, str], None]
) -> bool:
    """Whether the columns can be worked with: those that are required are there, all are known, none is there twice."""
    if len(header) == 1 and any(mark in header[0] for mark in ";\t"):
        wrong("header", shown(header[0]), "columns are separated by something else than commas; save it with commas")
        return False
    is_right = True
    for index, column in enumerate(header):
        if column in header[:index]:
            wrong(column or "header", "", "this column is there twice")
            is_right = False
        elif known is not None and column not in known:
            advice = nearest(column, known) or f"; known: {', '.join(known)}"
            wrong(column or "header", "", f"no such column{advice}")
            is_right = False
    for column in required:
        if column not in header:
            wrong(column, "", "this column is missing")
            is_right = False
    return is_right


def _disarmed(text: str) -> str:
    return f"'{text}" if _FORMULA.match(text) else text


def _armed(text: str) -> str:
    return text[1:] if text.startswith("'") and _FORMULA.match(text) else text
