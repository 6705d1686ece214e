"""Starting the bench's processes on their cores, and ending every one of them.

Not a supervisor: nothing is restarted. Its invariant: a `Process` leads a session of its own, and `stop`
leaves nobody of that session alive, however the run ended.
"""

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import msgspec

from bench import wire
from bench.orders import Order, Result

ROOT = Path(__file__).resolve().parent.parent
STOP_S = 3.0
# Direct to loopback, whatever proxy the machine's environment names.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Cores(NamedTuple):
    """Which core the subject has for itself, and which one generator, mock and conductor share."""

    subject: int | None
    load: int | None
    note: str


def choose_cores() -> Cores:
    usable = sorted(os.sched_getaffinity(0))
    if len(usable) < 2:
        return Cores(None, None, "one core only: subject, generator and mock share it; nothing is pinned")
    subject, load = usable[-1], usable[0]
    note = f"subject on core {subject}, generator and mock on core {load}"
    siblings = Path(f"/sys/devices/system/cpu/cpu{subject}/topology/thread_siblings_list")
    if siblings.exists() and str(load) in siblings.read_text().strip().replace("-", ",").split(","):
        note += " (two threads of one physical core)"
    return Cores(subject, load, note)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((wire.HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def python(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", module, *arguments]


class Process:
    """One child on one core. Its standard input stays open as long as this object is not stopped."""

    def __init__(self, command: list[str], *, core: int | None, log: Path, cwd: Path = ROOT) -> None:
        environment = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
        self.log = log
        self.started = time.perf_counter()
        with log.open("wb") as errors:
            self.child = subprocess.Popen(
                command,
                cwd=cwd,
                env=environment | {"PYTHONPATH": str(ROOT)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
                preexec_fn=None if core is None else lambda: os.sched_setaffinity(0, {core}),
            )
        self.pid = self.child.pid

    def read_line(self, timeout_s: float) -> bytes:
        """The next line of standard output. Raises TimeoutError, or RuntimeError if the process has ended."""
        assert self.child.stdout is not None
        if not select.select([self.child.stdout], [], [], timeout_s)[0]:
            raise TimeoutError(f"no word within {timeout_s:g} s; {self.last_words()}")
        line: bytes = self.child.stdout.readline()
        if not line:
            raise RuntimeError(self.last_words())
        return line

    def write_line(self, line: bytes) -> None:
        assert self.child.stdin is not None
        self.child.stdin.write(line + b"\n")
        self.child.stdin.flush()

    def last_words(self) -> str:
        lines = self.log.read_text(errors="replace").split("\n")
        ended = "" if self.child.poll() is None else f"ended with {self.child.returncode}: "
        return ended + " | ".join([line.strip() for line in lines if line.strip()][-3:])

    def stop(self) -> None:
        """A polite end for the leader, then the whole session is killed, whatever is left of it."""
        if self.child.poll() is None:
            self.child.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.child.wait(STOP_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        for pipe in (self.child.stdin, self.child.stdout):
            if pipe is not None:
                pipe.close()
        self.child.wait()


class Mock(Process):
    """The upstream, see bench/mock.py."""

    def __init__(self, *, core: int | None, log: Path) -> None:
        super().__init__(python("bench.mock"), core=core, log=log)
        self.port = int(self.read_line(10))

    def counts(self) -> dict[str, int]:
        with _OPENER.open(f"http://{wire.HOST}:{self.port}/counts", timeout=5) as answer:
            counts: dict[str, int] = json.load(answer)
            return counts


class Load(Process):
    """The generator, see bench/load.py."""

    def __init__(self, *, core: int | None, log: Path) -> None:
        super().__init__(python("bench.load"), core=core, log=log)

    def run(self, order: Order) -> Result:
        self.write_line(msgspec.json.encode(order))
        return msgspec.json.decode(self.read_line(order.warm_s + order.window_s + 20), type=Result)


def status_of(url: str, body: bytes | None = None) -> int:
    """The HTTP status of one GET or JSON POST; 0 where nobody answers yet."""
    request = urllib.request.Request(url, data=body, headers={"Content-Type": "application/json"})
    try:
        with _OPENER.open(request, timeout=5) as answer:
            status: int = answer.status
            return status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def wait_until(is_true: Callable[[], bool], process: Process, timeout_s: float) -> None:
    """Asks every 2 ms. Raises RuntimeError if the process ends first, or TimeoutError."""
    deadline = time.perf_counter() + timeout_s
    while not is_true():
        if process.child.poll() is not None:
            raise RuntimeError(process.last_words())
        if time.perf_counter() > deadline:
            raise TimeoutError(f"not ready within {timeout_s:g} s; {process.last_words()}")
        time.sleep(0.002)
