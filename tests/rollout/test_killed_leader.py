"""kill -9 of whoever takes a step: the store has the whole step or nothing of it, and another takes over in time."""

import asyncio
import signal
import sys
from pathlib import Path

import pytest

from gateway.decide.rollout import begin
from gateway.domain.rollout import Phase
from gateway.edge.pilot import Pilot
from gateway.store.experiments import Experiments
from gateway.store.rollouts import LEAD_MS
from tests.rolling import plan_of
from tests.running import running_gateway
from tests.steering import NOON_MS, ROLLOUT, Clock, bring, told, users_at

ROOT = Path(__file__).parents[2]
# It leads, has decided, and is killed at the first statement that begins so.
LEADER = """
import os, signal, sys
from pathlib import Path
from gateway.decide.rollout import Cause, change_by
from gateway.domain.rollout import Event
from gateway.store.experiments import Experiments
store, at_ms, statement = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
experiments = Experiments(store, clock=lambda: at_ms / 1000)
assert experiments.lead("dev", "dead")
state = experiments.states("dev")["qa_agent"]
change = change_by(state, Event.ROLLED_BACK, 0, Cause(at_ms, "pilot", ("breached",))).change
def trace(sql):
    if sql.startswith(statement):
        os.kill(os.getpid(), signal.SIGKILL)
experiments._database.set_trace_callback(trace)
experiments.apply("dev", change)
experiments._database.set_trace_callback(None)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(
    ("statement", "is_done"),
    [
        ("BEGIN", False), ("SELECT state", False), ("INSERT INTO rollout_changes", False),
        ("INSERT OR REPLACE INTO rollouts", False), ("COMMIT", False), ("after it", True),
    ],
)  # fmt: skip
async def test_a_leader_killed_within_a_step_has_taken_all_of_it_or_nothing(
    tmp_path: Path, statement: str, is_done: bool
) -> None:
    async with running_gateway(tmp_path, policy=ROLLOUT) as gateway:
        own = gateway.gateway._pilot
        assert own is not None
        await own.stop()
        store = tmp_path / "gateway.db"
        before = told(store)
        state = before[0]["qa_agent"]
        bring(store, users_at(state, success=(0.97, 0.5)))
        at_ms = state.share_since_ms + 60_000
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-c", LEADER, str(store), str(at_ms), statement, cwd=ROOT, stderr=asyncio.subprocess.PIPE
        )
        _, said = await child.communicate()
        assert child.returncode == -signal.SIGKILL, said
        states, changes = told(store)
        assert len(changes) == len(before[1]) + is_done
        assert (states["qa_agent"].phase is Phase.ROLLED_BACK) is is_done

        # The next one waits for the lead to end, and takes the step if it was not taken.
        clock = Clock(at_ms + LEAD_MS - 1_000)
        pilot = Pilot(gateway.runtime, store, holder="next", clock=clock)
        await pilot.step()
        assert (pilot.is_leading, told(store)) == (False, (states, changes))
        clock.passes(1)
        await pilot.step()
        assert pilot.is_leading
        states, changes = told(store)
        assert (len(changes), states["qa_agent"].phase) == (len(before[1]) + 1, Phase.ROLLED_BACK)


def test_a_beginning_is_begun_once_whoever_is_quicker(tmp_path: Path) -> None:
    store, plan = tmp_path / "gateway.db", plan_of()
    for at_ms in (NOON_MS, NOON_MS + 1):
        with Experiments(store, clock=lambda: NOON_MS / 1000) as experiments:
            change = begin("qa_agent", plan=plan, now_ms=at_ms).change
            assert change is not None
            assert experiments.begin("dev", change).share_since_ms == NOON_MS
    assert len(told(store)[1]) == 1
