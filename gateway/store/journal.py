"""The append-only journal: this process's own truth about its calls.

One line per event, `<crc32 in hex> <json>`, written by a single `write()`, which the kernel keeps even when this
process is killed the next instant. The invariant: a line that can be read back whole was written whole; a torn last
line is noticed by its checksum, reported and stepped over. Rotation, fsync in groups and the hand-over to the shared
store come with the ledger, behind the same two verbs.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from zlib import crc32

import msgspec

from gateway.domain.call import CallRecord
from gateway.domain.errors import Refused

FILE_NAME = "calls.journal"


class Journal:
    """Writes call records. Opened once per process, before the first request."""

    def __init__(self, directory: Path, *, fsync: bool) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._path = directory / FILE_NAME
        self._fsync = fsync
        # 0600: records tell who used what and when.
        self._fd = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        self._encoder = msgspec.json.Encoder()
        # A crash may have left a line without its end.
        size = os.fstat(self._fd).st_size
        self._is_torn = size > 0 and os.pread(self._fd, 1, size - 1) != b"\n"
        self._has_failed = False

    @property
    def path(self) -> Path:
        """The file that is written."""
        return self._path

    def append(self, record: CallRecord) -> None:
        """Write one record. Raises `Refused` with journal_unavailable where the disk does not take it whole."""
        data = self._encoder.encode(record)
        self._write(b"%08x %b\n" % (crc32(data), data))

    def check(self) -> None:
        """Before a call is admitted: see, after a failed write, whether the disk takes one again. Raises `Refused`."""
        if self._has_failed:
            self._write(b"\n")

    def _write(self, line: bytes) -> None:
        # The newline in front parts a torn line from this one.
        line = b"\n" + line if self._is_torn else line
        self._has_failed = True
        try:
            written = os.write(self._fd, line)
            self._is_torn = written != len(line)
            if self._fsync:
                os.fsync(self._fd)
        except OSError as error:
            message = f"the journal cannot be written: {error.strerror}"
            raise Refused("journal_unavailable", message, headers={"Retry-After": "1"}) from error
        # A full disk takes a part, and most likely no newline either; the next line brings it.
        if self._is_torn:
            raise Refused("journal_unavailable", "the journal's disk is full", headers={"Retry-After": "1"})
        self._has_failed = False

    def close(self) -> None:
        """Flush to the disk and close."""
        os.fsync(self._fd)
        os.close(self._fd)


class Torn(msgspec.Struct, frozen=True):
    """A line that cannot be believed, by its number."""

    line: int


def read_journal(path: Path) -> Iterator[CallRecord | Torn]:
    """Every record, oldest first; what is torn or altered comes as `Torn`."""
    decoder = msgspec.json.Decoder(CallRecord)
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            checksum, _, data = line.rstrip(b"\n").partition(b" ")
            if not line.strip():
                continue
            try:
                is_whole = int(checksum, 16) == crc32(data)
                yield decoder.decode(data) if is_whole else Torn(number)
            except (ValueError, msgspec.DecodeError):
                yield Torn(number)
