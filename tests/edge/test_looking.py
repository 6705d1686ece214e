"""A look beside the calls is the look that would have been taken here, and what goes wrong is said in words."""

import asyncio
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from gateway.decide.rollout_evidence import Look
from gateway.edge import looking
from gateway.edge.looking import SharedLooks, look_beside
from gateway.store.experiments import Experiments
from gateway.store.looks import look_at
from gateway.store.store import StoreError
from tests.rolling import MANUAL, NOW_MS, PLAN, begun, first, look_of
from tests.steering import NOON_MS, bring, users_at


@pytest.fixture
def store(tmp_path: Path) -> Path:
    path = tmp_path / "gateway.db"
    change = first().change
    assert change is not None
    with Experiments(path, clock=lambda: 0.0) as experiments:
        bring(path, users_at(experiments.begin("dev", change), users=800))
    return path


async def test_it_is_the_look_that_is_taken_here(store: Path) -> None:
    with Experiments(store, clock=lambda: 0.0) as experiments:
        state = experiments.states("dev")["qa_agent"]
        here = look_at(experiments, "dev", state, PLAN, now_ms=NOON_MS)
    asked = [(state, PLAN), (state, PLAN)]
    assert await look_beside(store, "dev", asked, now_ms=NOON_MS) == (here, here)
    assert here.evidence.users_treated > 0


async def test_a_path_from_here_is_one_from_there(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(store.parent)
    assert len(await look_beside(Path(store.name), "dev", [(first().state, PLAN)], now_ms=NOON_MS)) == 1


def put_in_place_of(store: Path, damage: str) -> None:
    store.unlink()
    if damage == "damaged":
        store.write_bytes(b"no ledger at all" * 500)
    if damage == "a folder":
        store.mkdir()


@pytest.mark.parametrize("damage", ["missing", "damaged", "a folder"])
async def test_a_store_that_cannot_be_read_is_the_stores_own_words(store: Path, damage: str) -> None:
    put_in_place_of(store, damage)
    with pytest.raises(StoreError, match=r"^(there is no ledger at|the ledger at) ") as raised:
        await look_beside(store, "dev", [(first().state, PLAN)], now_ms=NOON_MS)
    assert "\n" not in str(raised.value)
    assert (store.name in os.listdir(store.parent)) is (damage != "missing")


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ((sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"), "ended with -9"),
        ((sys.executable, "-c", "raise MemoryError('all of it')"), "ended with 1: MemoryError: all of it"),
        (("/nowhere/python",), "no process can be started"),
    ],
    ids=["killed", "failed", "not there"],
)
async def test_a_process_that_ends_badly_is_no_look(
    store: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...], said: str
) -> None:
    monkeypatch.setattr(looking, "_COMMAND", command)
    with pytest.raises(StoreError) as raised:
        await look_beside(store, "dev", [(first().state, PLAN)], now_ms=NOON_MS)
    assert said in str(raised.value)


# --- Shared ----------------------------------------------------------------------------------------------------------

ONE = (begun(), PLAN)


class Gate:
    """In place of processes: looks that go on until they are let end. Of each that began, what was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun: list[tuple[Any, ...]] = []
        self.under_way = 0
        self._may_end = asyncio.Event()
        monkeypatch.setattr(looking, "look_beside", self._look)

    def open(self) -> None:
        self._may_end.set()

    async def comes(self) -> None:
        """Everybody has got as far as they can."""
        for _ in range(10):
            await asyncio.sleep(0)

    async def _look(self, store: Path, env: str, rollouts: tuple[Any, ...], *, now_ms: int) -> tuple[Look, ...]:
        self.begun.append(rollouts)
        self.under_way += 1
        assert self.under_way == 1, "one at a time"
        try:
            await self._may_end.wait()
            return tuple(look_of(state, now_ms) for state, _ in rollouts)
        finally:
            self.under_way -= 1


@pytest.fixture
async def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(monkeypatch)


def shared(patience_s: float = 3_600) -> SharedLooks:
    return SharedLooks(Path("gateway.db"), patience_s=patience_s, clock=lambda: NOW_MS / 1000)


async def test_all_who_wait_for_the_same_share_one_look_and_who_comes_after_it_gets_another(gate: Gate) -> None:
    looks = shared()
    asking = [asyncio.create_task(looks.look("dev", [ONE])) for _ in range(16)]
    await gate.comes()
    gate.open()
    found = await asyncio.gather(*asking)
    assert found == [(look_of(ONE[0], NOW_MS),)] * 16
    assert gate.begun == [(ONE,)]
    await looks.look("dev", [ONE])
    assert len(gate.begun) == 2


async def test_of_another_state_or_plan_another_look_is_taken_one_after_the_other(gate: Gate) -> None:
    looks = shared()
    raised = (first(PLAN._replace(start_bps=2_500)).state, PLAN)
    wanted = [("dev", [ONE]), ("dev", [raised]), ("dev", [(ONE[0], MANUAL)]), ("dev", [ONE, raised]), ("test", [ONE])]
    asking = [asyncio.create_task(looks.look(env, rollouts)) for env, rollouts in wanted]
    await gate.comes()
    assert gate.begun == [(ONE,)]
    gate.open()
    await asyncio.gather(*asking)
    assert gate.begun == [tuple(rollouts) for _, rollouts in wanted]


async def test_who_leaves_ends_the_look_for_nobody_else_and_the_last_one_ends_it(gate: Gate) -> None:
    looks = shared()
    one, two = (asyncio.create_task(looks.look("dev", [ONE])) for _ in range(2))
    await gate.comes()
    one.cancel()
    await asyncio.wait({one})
    assert gate.under_way == 1
    two.cancel()
    await asyncio.wait({two})
    assert gate.under_way == 0
    # Whoever comes now is given one that goes on.
    gate.open()
    assert len(await looks.look("dev", [ONE])) == 1
    assert len(gate.begun) == 2


async def test_who_comes_while_a_look_is_being_given_up_gets_another(gate: Gate) -> None:
    looks = shared()
    one = asyncio.create_task(looks.look("dev", [ONE]))
    await gate.comes()
    one.cancel()
    two = asyncio.create_task(looks.look("dev", [ONE]))
    await asyncio.wait({one})
    gate.open()
    assert len(await two) == 1


async def test_a_look_without_an_end_is_given_up_and_whoever_waits_is_told(gate: Gate) -> None:
    looks = shared(patience_s=0.01)
    other = (ONE[0], MANUAL)
    found = await asyncio.gather(*(looks.look("dev", [it]) for it in (ONE, ONE, other)), return_exceptions=True)
    for error in found:
        assert isinstance(error, StoreError)
        assert str(error) == "no look can be taken: none was done after 0.01 s"
    assert gate.under_way == 0
    gate.open()
    assert len(await looks.look("dev", [ONE])) == 1


async def test_what_is_wrong_with_a_look_is_told_to_all_who_wait(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(looking, "_COMMAND", ("/nowhere/python",))
    looks = SharedLooks(store, patience_s=3_600)
    found = await asyncio.gather(*(looks.look("dev", [ONE]) for _ in range(3)), return_exceptions=True)
    assert {str(error) for error in found} == {
        "no look can be taken: no process can be started: No such file or directory"
    }
