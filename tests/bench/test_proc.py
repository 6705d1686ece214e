"""What is read from /proc: on written-down files, and once on this very process."""

import os
from pathlib import Path

import pytest

from bench import proc


def stat_line(pid: int, parent: int, name: str = "worker", times: str = "10 5 2 1") -> str:
    return f"{pid} ({name}) S {parent} 1 1 0 -1 4194560 100 0 0 0 {times} 20 0 1 0 100 200 300\n"


def add(root: Path, pid: int, parent: int, *, rss_kb: int = 0, pss_kb: int | None = None, **stat: str) -> None:
    entry = root / str(pid)
    entry.mkdir()
    (entry / "stat").write_text(stat_line(pid, parent, **stat))
    (entry / "status").write_text(f"Name:\tx\nVmPeak:\t  999 kB\nVmRSS:\t  {rss_kb} kB\n")
    if pss_kb is not None:
        (entry / "smaps_rollup").write_text(f"0-1 ---p 0 00:00 0 [rollup]\nPss:     {pss_kb} kB\nPss_Anon: 1 kB\n")


@pytest.mark.parametrize("name", ["nginx", "my worker", "a) S 9 (b", "(", "nginx: worker process"])
def test_a_process_may_call_itself_anything(name: str) -> None:
    assert proc.parse_stat(stat_line(42, 7, name)) == proc.Stat(pid=42, name=name, parent=7, ticks=18)


def test_cpu_time_counts_user_kernel_and_reaped_children() -> None:
    assert proc.parse_stat(stat_line(1, 0, times="1000 200 30 4")).ticks == 1234


def test_a_tree_holds_all_descendants_and_nobody_else(tmp_path: Path) -> None:
    for pid, parent in ((10, 1), (11, 10), (12, 11), (13, 10), (20, 1), (21, 20)):
        add(tmp_path, pid, parent)
    (tmp_path / "meminfo").write_text("not a process")
    assert sorted(stat.pid for stat in proc.tree(10, tmp_path)) == [10, 11, 12, 13]
    assert proc.cpu_us(10, tmp_path) == 4 * 18 * proc.TICK_US


def test_a_process_that_is_gone_costs_nothing(tmp_path: Path) -> None:
    (tmp_path / "77").mkdir()
    assert proc.tree(77, tmp_path) == []
    assert proc.memory(77, tmp_path) == proc.Memory(0, 0)


def test_memory_is_summed_over_the_tree(tmp_path: Path) -> None:
    add(tmp_path, 10, 1, rss_kb=1000, pss_kb=600)
    add(tmp_path, 11, 10, rss_kb=500, pss_kb=200)
    assert proc.memory(10, tmp_path) == proc.Memory(rss_kb=1500, pss_kb=800)


def test_an_unreadable_pss_is_absent_and_not_zero(tmp_path: Path) -> None:
    add(tmp_path, 10, 1, rss_kb=1000, pss_kb=600)
    add(tmp_path, 11, 10, rss_kb=500)
    assert proc.memory(10, tmp_path) == proc.Memory(rss_kb=1500, pss_kb=None)


@pytest.mark.parametrize("field", ["Vm", "RSS", "VmSwap"])
def test_a_field_is_matched_whole(field: str) -> None:
    assert proc.parse_kb("VmRSS:\t 12 kB\n", field) is None


def test_this_process_has_used_memory() -> None:
    assert proc.memory(os.getpid()).rss_kb > 1000
