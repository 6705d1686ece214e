"""Looks at experiments, beside the calls: store/look_process.py, started, asked and awaited.

The invariants: when a look is over, however it ended, its process is gone; and however many wait for one and the same,
it is taken once.
"""

import asyncio
import sys
import time
from asyncio.subprocess import PIPE
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec

import gateway
from gateway.decide.rollout_evidence import Look
from gateway.decide.rollout_plan import RolloutPlan
from gateway.domain.rollout import RolloutState
from gateway.store.look_process import Asked, Found
from gateway.store.store import StoreError

_What = tuple[str, tuple[tuple[RolloutState, RolloutPlan], ...]]
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


class SharedLooks:
    """Looks for any number who ask, one process at a time, none for longer than `patience_s`, its turn included."""

    def __init__(self, store: Path, *, patience_s: float, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._patience_s = patience_s
        self._clock = clock
        self._turn = asyncio.Semaphore(1)
        # By all that a look depends on, so that nobody is given what was asked of a state or a plan that is no more.
        self._under_way: dict[_What, _Shared] = {}

    async def look(self, env: str, rollouts: Iterable[tuple[RolloutState, RolloutPlan]]) -> tuple[Look, ...]:
        """A look at each of these, in their order: the one that others wait for already, or a new one.

        Either was begun as long ago as it takes, and says in `at_ms` when that was. Raises `StoreError`.
        """
        what = env, tuple(rollouts)
        shared = self._under_way.get(what)
        if shared is None:
            shared = self._under_way[what] = _Shared(asyncio.create_task(self._take(*what)))
        shared.waiting += 1
        try:
            # Others may wait for it still when we have gone.
            return await asyncio.shield(shared.task)
        finally:
            shared.waiting -= 1
            if shared.task.done() or not shared.waiting:
                # It is over, or nobody wants it any more: whoever comes now begins another.
                if self._under_way.get(what) is shared:
                    del self._under_way[what]
                shared.task.cancel()
                await asyncio.wait({shared.task})

    async def _take(self, env: str, rollouts: tuple[tuple[RolloutState, RolloutPlan], ...]) -> tuple[Look, ...]:
        try:
            async with asyncio.timeout(self._patience_s), self._turn:
                return await look_beside(self._store, env, rollouts, now_ms=round(self._clock() * 1000))
        except TimeoutError:
            raise StoreError(f"no look can be taken: none was done after {self._patience_s:g} s") from None


class _Shared:
    """A look under way, and how many wait for it."""

    def __init__(self, task: asyncio.Task[tuple[Look, ...]]) -> None:
        self.task = task
        self.waiting = 0


def _asked(store: Path, env: str, rollouts: Iterable[tuple[RolloutState, RolloutPlan]], now_ms: int) -> bytes:
    # The process works in another directory than we do.
    asked = Asked(store=str(store.absolute()), env=env, now_ms=now_ms, rollouts=tuple(rollouts))
    return msgspec.json.encode(asked)
