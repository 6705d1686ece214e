"""What the kernel says a process tree has cost: CPU time and memory, read from /proc. Linux only.

Not a profiler. Its invariant: the CPU time of a tree never falls, also when children end, because the time
of a reaped child moves into its parent's `cutime` and `cstime`, which are counted too.
"""

import os
from pathlib import Path
from typing import NamedTuple

PROC = Path("/proc")
TICK_US = 1_000_000 // os.sysconf("SC_CLK_TCK")


class Stat(NamedTuple):
    pid: int
    name: str
    parent: int
    ticks: int


class Memory(NamedTuple):
    """Sums over a tree. Rss counts shared pages once per process, Pss once in all; None where unreadable."""

    rss_kb: int
    pss_kb: int | None


def parse_stat(text: str) -> Stat:
    """One /proc/PID/stat. The name is whatever the process chose, so it may hold spaces and brackets."""
    before, _, after = text.rpartition(")")
    pid, _, name = before.partition(" (")
    fields = after.split()
    # `after` begins with field 3 of proc(5): ppid is 4; utime, stime, cutime and cstime are 14 to 17.
    return Stat(int(pid), name, int(fields[1]), sum(int(ticks) for ticks in fields[11:15]))


def parse_kb(text: str, field: str) -> int | None:
    """The value of a `Field:   123 kB` line of status or smaps_rollup."""
    for line in text.splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    return None


def tree(pid: int, proc: Path = PROC) -> list[Stat]:
    """The process and everything below it, oldest ancestor first. Empty if it is gone."""
    stats: dict[int, Stat] = {}
    children: dict[int, list[int]] = {}
    for entry in os.scandir(proc):
        if entry.name.isdigit() and (text := _read(proc / entry.name / "stat")):
            stat = parse_stat(text)
            stats[stat.pid] = stat
            children.setdefault(stat.parent, []).append(stat.pid)
    found: list[Stat] = []
    waiting = [pid]
    while waiting:
        current = waiting.pop(0)
        if current in stats:
            found.append(stats[current])
            waiting.extend(children.get(current, []))
    return found


def cpu_us(pid: int, proc: Path = PROC) -> int:
    """CPU time of the tree so far, user and kernel, in microseconds; its grain is one clock tick (10 ms)."""
    return sum(stat.ticks for stat in tree(pid, proc)) * TICK_US


def memory(pid: int, proc: Path = PROC) -> Memory:
    rss_kb = 0
    pss_kb: int | None = 0
    for stat in tree(pid, proc):
        rss_kb += parse_kb(_read(proc / str(stat.pid) / "status"), "VmRSS") or 0
        pss = parse_kb(_read(proc / str(stat.pid) / "smaps_rollup"), "Pss")
        pss_kb = None if pss is None or pss_kb is None else pss_kb + pss
    return Memory(rss_kb, pss_kb)


def _read(path: Path) -> str:
    """Processes end while one reads about them, and some files need rights: either is an empty text."""
    try:
        return path.read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return ""
