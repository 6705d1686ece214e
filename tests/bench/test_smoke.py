"""A run of a second over the naive proxy: all is started, asked, counted and ended. No speed is asserted."""

import os
import select
import sys
from pathlib import Path

import pytest

from bench import proc
from bench.figures import rows_of
from bench.measure import MEASURES, Settings, measure
from bench.processes import Cores, Process
from bench.subjects import SUBJECTS, Launch, Subject

if not sys.platform.startswith("linux"):
    pytest.skip("the bench reads /proc, which only Linux has", allow_module_level=True)

SHORT = Settings(rounds=1, window_s=0.05, warm_s=0.0, connections=4)
UNPINNED = Cores(None, None, "not pinned")


def test_a_short_run_brings_home_every_measure_and_leaves_nobody_behind() -> None:
    subjects = [subject for subject in SUBJECTS if subject.name in ("direct", "naive")]
    told: list[str] = []
    visits = measure(subjects, SHORT, UNPINNED, told.append)
    assert [visit.failure for visit in visits] == ["", ""]
    assert len(told) == len(subjects) * len(MEASURES)
    for visit in visits:
        assert visit.results.keys() == {one.name for one in MEASURES}
        assert [result.first_error for result in visit.results.values()] == [""] * len(MEASURES)
        assert sum(result.asked for result in visit.results.values()) == visit.upstream_calls
    assert rows_of(visits)[1].figures["start_s"].rounds == 1


def test_a_subject_that_does_not_start_is_told_and_the_run_goes_on() -> None:
    broken = Subject("broken", "", lambda *_: Launch([sys.executable, "-c", "raise SystemExit('no such option')"]))
    visits = measure([broken, SUBJECTS[0]], SHORT, UNPINNED, lambda _: None)
    assert "no such option" in visits[0].failure
    assert visits[1].results["plain"].completed > 0


def test_a_child_of_a_subject_ends_with_it(tmp_path: Path) -> None:
    spawn = "import subprocess, sys; c = subprocess.Popen([sys.executable, '-c', 'input()'], stdin=-1);"
    process = Process(
        [sys.executable, "-c", spawn + "print(c.pid, flush=True); c.wait()"], core=None, log=tmp_path / "log"
    )
    child = int(process.read_line(20))
    assert [stat.pid for stat in proc.tree(process.pid)] == [process.pid, child]
    end_of_child = os.pidfd_open(child)
    process.stop()
    assert proc.tree(process.pid) == []
    # The kill is sent, the end comes when the kernel gets to it; the descriptor is readable then.
    ended, _, _ = select.select([end_of_child], [], [], 20)
    os.close(end_of_child)
    assert ended
