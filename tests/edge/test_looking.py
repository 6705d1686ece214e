"""A look beside the calls is the look that would have been taken here, and what goes wrong is said in words."""

import os
import sys
from pathlib import Path

import pytest

from gateway.edge import looking
from gateway.edge.looking import look_beside
from gateway.store.experiments import Experiments
from gateway.store.looks import look_at
from gateway.store.store import StoreError
from tests.rolling import PLAN, first
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
