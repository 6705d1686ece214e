"""A journal read back: every line that can be believed, and what of its money and calls is not in the store yet."""

from collections.abc import Iterator
from pathlib import Path
from zlib import crc32

import msgspec

from gateway.domain.call import CallRecord
from gateway.domain.ledger import Held, InDoubt, LedgerRow, Line, Posted, Void, row_of
from gateway.domain.outcome import Outcome, outcome_of
from gateway.store.journal import Position, journal_files, segment_path, segments

_decoder = msgspec.json.Decoder(Line)


class Torn(msgspec.Struct, frozen=True):
    """A line that cannot be believed: its file, and its number in what was read of it."""

    path: str
    line: int


def read_segment(path: Path, offset: int = 0) -> Iterator[Line | Torn]:
    """Every line from `offset` on, oldest first; what is torn or altered comes as `Torn`."""
    with path.open("rb") as file:
        file.seek(offset)
        for number, line in enumerate(file, start=1):
            checksum, _, data = line.rstrip(b"\n").partition(b" ")
            if not line.strip():
                continue
            try:
                # A last line without its end is cut off by whoever writes on, so it is not believed here either.
                is_whole = int(checksum, 16) == crc32(data) and line.endswith(b"\n")
                yield _decoder.decode(data) if is_whole else Torn(str(path), number)
            except (ValueError, msgspec.DecodeError):
                yield Torn(str(path), number)


def read_calls(root: Path) -> Iterator[CallRecord | Torn]:
    """Every call that all processes under `root` have recorded."""
    for path in journal_files(root):
        for line in read_segment(path):
            if isinstance(line, CallRecord | Torn):
                yield line


class Replay:
    """What a process that ended left in its journal, from where the store had been told."""

    def __init__(self, directory: Path, told: Position) -> None:
        self.rows: list[LedgerRow] = []
        # Some of them may have been told before: an attempt that was under way keeps `told` from moving on.
        self.outcomes: list[Outcome] = []
        self.torn: list[Torn] = []
        held: dict[str, Held] = {}
        for number in segments(directory):
            if number < told.segment:
                continue
            offset = told.offset if number == told.segment else 0
            for line in read_segment(segment_path(directory, number), offset):
                match line:
                    case Held():
                        held[line.id] = line
                    case Posted() | Void() | InDoubt():
                        begun = held.pop(line.id, None)
                        # Without its beginning it was told before.
                        if begun is not None:
                            self.rows.append(row_of(begun, line))
                    case CallRecord():
                        outcome = outcome_of(line)
                        if outcome is not None:
                            self.outcomes.append(outcome)
                    case Torn():
                        self.torn.append(line)
        # Held and never resolved: it may have been billed, so it is never free.
        self.unresolved = [InDoubt(id) for id in held]
        self.rows += [row_of(begun, InDoubt(id)) for id, begun in held.items()]
