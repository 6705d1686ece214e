"""The append-only journal: this process's own truth about its calls and their money.

A directory per process, `<dir>/<holder>/00000001.journal`, which a lock keeps for one process at a time. One line per
event, `<crc32 in hex> <json>`; what belongs together is written by a single `write()`, which the kernel keeps even
when this process is killed the next instant. The invariant: what can be read back whole was written whole; a torn last
line is cut off and reported. Reading is `journal_reader.py`.
"""

import asyncio
import fcntl
import logging
import os
import re
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

import msgspec

from gateway.domain.errors import Refused
from gateway.domain.ledger import Held, InDoubt, Line, Posted, Void

log = logging.getLogger("gateway.journal")
SUFFIX = ".journal"
LOCK = "lock"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_RETRY = {"Retry-After": "1"}


class Position(NamedTuple):
    """A place in a journal: number of the segment, and bytes into it."""

    segment: int = 0
    offset: int = 0


class Journal:
    """Writes this process's events. Opened once, before the first call."""

    def __init__(
        self, directory: Path, *, fsync: bool, segment_bytes: int = 64 * 2**20, max_behind_bytes: int = 32 * 2**20
    ) -> None:
        """`directory` is one that `claim` has locked. Raises OSError."""
        self.directory = directory
        self.holder = directory.name
        self._fsync = fsync
        self._segment_bytes = segment_bytes
        self._max_behind_bytes = max_behind_bytes
        self._encoder = msgspec.json.Encoder()
        # Attempts that are held and not resolved, by id, in the order in which they were held.
        self._open: dict[str, Position] = {}
        self._has_failed = False
        # Bytes over all segments, for telling how far the store and the disk are behind.
        self._written = self._told = self._synced = 0
        self._syncing: asyncio.Task[None] | None = None
        numbers = segments(directory)
        self._segment = numbers[-1] if numbers else 1
        self._fd, self._size = self._open_segment(self._segment)

    # --- Writing -----------------------------------------------------------------------------------------------------

    def append(self, *lines: Line) -> None:
        """Write events, all of them by one `write()`. Raises `Refused` where the disk does not take them whole."""
        if not lines:
            return
        encode = self._encoder.encode
        data = b"".join([b"%08x %b\n" % (crc32(text), text) for text in map(encode, lines)])
        if self._size + len(data) > self._segment_bytes and self._size > 0:
            self._rotate()
        place = Position(self._segment, self._size)
        self._write(data)
        for line in lines:
            if isinstance(line, Held):
                self._open[line.id] = place
            elif isinstance(line, Posted | Void | InDoubt):
                self._open.pop(line.id, None)

    def check(self) -> None:
        """Before a call is admitted: the store is not too far behind, and a disk that failed takes lines again.

        Raises `Refused`.
        """
        if self._has_failed:
            self._write(b"\n")
        if self.behind_bytes > self._max_behind_bytes:
            message = "the ledger's store is too far behind the journal"
            raise Refused("journal_unavailable", message, headers=_RETRY)

    async def flushed(self) -> None:
        """With `sync = "fsync"`: wait until all that was written is on the disk, together with whoever else waits."""
        if not self._fsync:
            return
        target = self._written
        while self._synced < target:
            await self.flush()

    async def flush(self) -> None:
        """Bring what was written to the disk, off the event loop. Raises `Refused`."""
        if self._synced == self._written:
            return
        if self._syncing is None:
            self._syncing = asyncio.create_task(self._flush_once())
            # Where all who wait are cancelled, nobody else looks at what came of it.
            self._syncing.add_done_callback(lambda task: task.cancelled() or task.exception())
        # Shielded: whoever else waits for the same flush must not lose it with us.
        await asyncio.shield(self._syncing)

    async def _flush_once(self) -> None:
        mark = self._written
        try:
            fd = os.dup(self._fd)  # A rotation may close ours meanwhile; it flushes what it closes.
            try:
                await asyncio.to_thread(os.fsync, fd)
            finally:
                os.close(fd)
        except OSError as error:
            raise _unavailable(error) from error
        finally:
            self._syncing = None
        self._synced = mark

    @property
    def path(self) -> Path:
        """The segment that is written."""
        return segment_path(self.directory, self._segment)

    # --- How far others are ------------------------------------------------------------------------------------------

    def position(self) -> Position:
        """Where reading is to begin after a crash, if all resolved attempts so far are in the store."""
        return next(iter(self._open.values()), Position(self._segment, self._size))

    @property
    def written_bytes(self) -> int:
        """What was written in this process's life."""
        return self._written

    @property
    def behind_bytes(self) -> int:
        """What was written and the store does not have yet."""
        return self._written - self._told

    def told(self, written_bytes: int) -> None:
        """The store has all that was resolved when `written_bytes` were written."""
        self._told = written_bytes

    def prune(self, position: Position, keep: int) -> None:
        """Delete segments that lie wholly before `position`, but for the newest `keep` of them."""
        old = [number for number in segments(self.directory) if number < min(position.segment, self._segment)]
        for number in old[: max(0, len(old) - keep)]:
            segment_path(self.directory, number).unlink(missing_ok=True)

    def close(self) -> None:
        """Flush to the disk and close. Raises OSError where the disk fails; it is closed then, too."""
        try:
            os.fsync(self._fd)
        finally:
            os.close(self._fd)

    # --- The file ----------------------------------------------------------------------------------------------------

    def _write(self, data: bytes) -> None:
        was_failing, self._has_failed = self._has_failed, True
        try:
            if was_failing:
                # The rest of a line that the disk took in part, and that could not be taken back then.
                os.ftruncate(self._fd, self._size)
            written = os.write(self._fd, data)
            if written != len(data):
                # What fitted is taken back at once: whoever reads this after a crash shall not find half of it.
                os.ftruncate(self._fd, self._size)
                raise Refused("journal_unavailable", "the journal's disk is full", headers=_RETRY)
        except OSError as error:
            raise _unavailable(error) from error
        self._size += written
        self._written += written
        self._has_failed = False

    def _rotate(self) -> None:
        try:
            os.fsync(self._fd)
            fd, size = self._open_segment(self._segment + 1)
        except OSError as error:
            raise _unavailable(error) from error
        os.close(self._fd)
        self._fd, self._size = fd, size
        self._segment += 1

    def _open_segment(self, number: int) -> tuple[int, int]:
        path = segment_path(self.directory, number)
        # 0600: records tell who used what and when.
        fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        size = _whole_size(fd)
        torn = os.fstat(fd).st_size - size
        if torn:
            # Half a line tells nothing, and the next one would be torn by it.
            log.warning("the last %d bytes of %s were torn by a crash and are cut off", torn, path)
            os.ftruncate(fd, size)
        return fd, size


def claim(directory: Path) -> tuple[Path, int] | None:
    """Lock a process's directory; its path and the lock's descriptor, or None where a living process has it."""
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    fd = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        if isinstance(error, BlockingIOError):
            return None
        raise
    return directory, fd


def claim_all(root: Path) -> list[tuple[Path, int]]:
    """Every directory under `root` whose process has gone, locked for us, at least one: new, where there is none.

    The first is to be written on; the others were left behind, and are to be told to the store and released.
    """
    root.mkdir(parents=True, exist_ok=True)
    found = [claimed for path in _directories(root) if (claimed := claim(path)) is not None]
    while not found:
        # Unique over machines, too: a fleet's store tells processes apart by this name. Whoever starts at the same time
        # may see the new directory and lock it before we do; then we make another.
        fresh = claim(root / uuid.uuid4().hex[:12])
        if fresh is not None:
            found.append(fresh)
    return found


def _directories(root: Path) -> list[Path]:
    """The processes' directories. A mounted volume may have others, such as `lost+found`."""
    return sorted(path for path in root.iterdir() if _NAME.fullmatch(path.name) and path.is_dir())


def segments(directory: Path) -> list[int]:
    """The numbers of a journal's segments, oldest first."""
    return sorted(int(path.stem) for path in directory.glob(f"*{SUFFIX}") if path.stem.isdecimal())


def segment_path(directory: Path, number: int) -> Path:
    """Where a segment stands."""
    return directory / f"{number:08d}{SUFFIX}"


def journal_files(root: Path) -> Iterator[Path]:
    """Every segment of every process under `root`, each process's oldest first."""
    for directory in _directories(root) if root.is_dir() else ():
        for number in segments(directory):
            yield segment_path(directory, number)


def _whole_size(fd: int) -> int:
    """Bytes up to the end of the last whole line."""
    end = os.fstat(fd).st_size
    while end > 0:
        start = max(0, end - 64 * 2**10)
        found = os.pread(fd, end - start, start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


def _unavailable(error: OSError) -> Refused:
    return Refused("journal_unavailable", f"the journal cannot be written: {error.strerror}", headers=_RETRY)
