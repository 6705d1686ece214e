"""Looks at experiments, beside the calls: store/look_process.py, started, asked and awaited.

The invariant: when a look is over, however it ended, its process is gone.
"""

import asyncio
import sys
from asyncio.subprocess import PIPE
from collections.abc import Iterable
from pathlib import Path

import msgspec

import gateway
from gateway.decide.rollout_evidence import Look
from gateway.decide.rollout_plan import RolloutPlan
from gateway.domain.rollout import RolloutState
from gateway.store.look_process import Asked, Found
from gateway.store.store import StoreError

# Its modules are found from here, also where the gateway was not installed but is run from its sources.
_HOME = Path(gateway.__file__).parent.parent
_COMMAND = (sys.executable, "-m", "gateway.store.look_process")


async def look_beside(
    store: Path, env: str, rollouts: Iterable[tuple[RolloutState, RolloutPlan]], *, now_ms: int
) -> tuple[Look, ...]:
    """A look at each of these, in their order. Raises `StoreError`."""
    asked = _asked(store, env, rollouts, now_ms)
    try:
        child = await asyncio.create_subprocess_exec(*_COMMAND, cwd=_HOME, stdin=PIPE, stdout=PIPE, stderr=PIPE)
    except OSError as error:
        raise StoreError(f"no look can be taken: no process can be started: {error.strerror}") from error
    try:
        said, complaint = await child.communicate(asked)
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
    if child.returncode:
        last = (complaint.decode(errors="replace").strip().splitlines() or [""])[-1]
        raise StoreError(f"no look can be taken: its process ended with {child.returncode}: {last}")
    found = msgspec.json.decode(said, type=Found)
    if found.error:
        raise StoreError(found.error)
    return found.looks


def _asked(store: Path, env: str, rollouts: Iterable[tuple[RolloutState, RolloutPlan]], now_ms: int) -> bytes:
    # The process works in another directory than we do.
    asked = Asked(store=str(store.absolute()), env=env, now_ms=now_ms, rollouts=tuple(rollouts))
    return msgspec.json.encode(asked)
