"""The daily reports: at the hour that the policy names, what `gateway report` writes on demand is written by itself.

By those very commands, in processes of their own and at a low priority: seconds of arithmetic and drawing would disturb
calls. The invariants: of all gateways that share a folder one writes, once a day, whatever restarts; and
whatever becomes of it, calls go on.
"""

import asyncio
import fcntl
import logging
import os
import shutil
import sys
import time
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from gateway.domain.policy import REPORT_FILES, Reports
from gateway.domain.spans import DAY_MS

log = logging.getLogger("gateway.reports")
# Locked while somebody writes; in it the instant, in unix ms, up to which reports are written.
LOCK = ".daily"
_LOOK_EVERY_S = 20.0
_PATIENCE_S = 1_800.0
# A tenth of what a call's process gets where both want the same core: calls hardly notice, and the report gets done.
_NICENESS = 10


class Daily:
    """One process's part in it. `arguments` say which configuration the reports are of; `niceness` is as of nice(1)."""

    def __init__(
        self,
        reports: Reports,
        arguments: Sequence[str],
        *,
        niceness: int = _NICENESS,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._reports = reports
        self._arguments = arguments
        nice = shutil.which("nice")
        self._command = [*([nice, "-n", str(niceness)] if nice else []), sys.executable, "-m", "gateway", "report"]
        self._clock = clock
        # What was due before this process began is written only where somebody has written before.
        self._began_ms = self._done_ms = round(clock() * 1000)
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Write from now on, whenever it is time."""
        self._task = asyncio.create_task(self._keep_on())

    def take_policy(self, reports: Reports) -> None:
        """The policy says something else now."""
        self._reports = reports

    async def stop(self) -> None:
        """What is being written is given up; the report of before stays."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    async def step(self) -> None:
        """Write the reports if they are due, and nobody has."""
        reports = self._reports
        now_ms = round(self._clock() * 1000)
        # What is above the present was written while the clock was ahead: nothing is to wait until it has come there.
        self._began_ms = min(self._began_ms, now_ms)
        due_ms = due_before(reports.daily_at, now_ms)
        if due_ms is None or due_ms == self._done_ms:
            return
        folder = Path(reports.dir)
        try:
            with _locked(folder) as lock:
                if lock is None:
                    return
                if due_ms > _written_ms(lock, now_ms, self._began_ms) and await self._write(reports):
                    os.pwrite(lock, f"{due_ms:020}".encode(), 0)
        except OSError as error:
            log.error("the daily reports cannot be written to %s: %s", folder, error.strerror or error)
        # What failed once today would fail again.
        self._done_ms = due_ms

    async def _write(self, reports: Reports) -> bool:
        is_whole = True
        for name in REPORT_FILES:
            wrong = await _run([*self._command, name, "--out", reports.path(name), *self._arguments])
            if wrong:
                log.error("the daily report %s could not be written: %s", reports.path(name), wrong)
                is_whole = False
        if is_whole:
            log.info("the daily reports are written to %s", reports.dir)
        return is_whole

    async def _keep_on(self) -> None:
        while True:
            await self.step()
            await asyncio.sleep(_LOOK_EVERY_S)


def due_before(daily_at: str, now_ms: int) -> int | None:
    """The last instant up to now at which reports were due, at a time of day such as 06:00 in UTC; None: never."""
    if not daily_at:
        return None
    hours, _, minutes = daily_at.partition(":")
    at_ms = now_ms - now_ms % DAY_MS + (int(hours) * 60 + int(minutes)) * 60_000
    return at_ms if at_ms <= now_ms else at_ms - DAY_MS


@contextmanager
def _locked(folder: Path) -> Iterator[int | None]:
    """The folder's lock, open; None where another process has it. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
        else:
            yield lock
    finally:
        os.close(lock)


def _written_ms(lock: int, now_ms: int, otherwise: int) -> int:
    """Up to when reports are written; 0 where somebody wrote and when cannot be told: once too often beats never."""
    text = os.pread(lock, 32, 0)
    if not text.isdigit():
        return otherwise
    return written_ms if (written_ms := int(text)) <= now_ms else 0


async def _run(command: Sequence[str]) -> str:
    """What went wrong, or ""."""
    process = await asyncio.create_subprocess_exec(*command, stdin=DEVNULL, stdout=DEVNULL, stderr=PIPE)
    try:
        async with asyncio.timeout(_PATIENCE_S):
            _, said = await process.communicate()
    except TimeoutError:
        return f"it was not done after {_PATIENCE_S:.0f} s"
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    lines = said.decode(errors="replace").strip().splitlines()
    return "" if process.returncode == 0 else (lines or [f"exit status {process.returncode}"])[-1]
