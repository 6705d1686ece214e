"""The process that looks: one request in, one answer out, and nothing written."""

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from gateway.store.experiments import Experiments
from gateway.store.look_process import Asked, Found, answer
from gateway.store.looks import look_at
from tests.rolling import PLAN, first
from tests.steering import NOON_MS, bring, told, users_at

ROOT = Path(__file__).parents[2]


@pytest.fixture
def asked(tmp_path: Path) -> Asked:
    store = tmp_path / "gateway.db"
    change = first().change
    assert change is not None
    with Experiments(store, clock=lambda: 0.0) as experiments:
        state = experiments.begin("dev", change)
    bring(store, users_at(state, users=600, success=(0.9, 0.8)))
    return Asked(store=str(store), env="dev", now_ms=NOON_MS, rollouts=((state, PLAN),))


def test_what_goes_out_is_to_the_last_digit_what_was_found(asked: Asked) -> None:
    before = told(Path(asked.store))
    done = subprocess.run(
        [sys.executable, "-m", "gateway.store.look_process"],
        input=msgspec.json.encode(asked), capture_output=True, cwd=ROOT, timeout=30,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")
    with Experiments(Path(asked.store), clock=lambda: 0.0) as experiments:
        look = look_at(experiments, "dev", asked.rollouts[0][0], PLAN, now_ms=NOON_MS)
    assert msgspec.json.decode(done.stdout, type=Found) == Found(looks=(look,))
    assert told(Path(asked.store)) == before


def test_a_store_that_is_not_there_is_an_answer_and_is_not_made(asked: Asked, tmp_path: Path) -> None:
    missing = tmp_path / "missing.db"
    found = answer(msgspec.structs.replace(asked, store=str(missing)))
    assert (found.looks, missing.exists()) == ((), False)
    assert found.error.startswith("there is no ledger at")
