"""The pilot: looks at the evidence every so often, and takes the step that the policy and the evidence call for.

One process does it for all that share the store: whoever holds the lead there. What to do is decided in
decide/rollout.py. The invariants: a step is taken by one transaction, with its row in the audit log, only from the
state it was decided on and under the plan that is in force by then; and whatever happens here, calls go on at the
shares that are in force.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

from gateway.decide.plan import Plan
from gateway.decide.rollout import advance, begin, recommendation
from gateway.decide.rollout_evidence import Look
from gateway.decide.rollout_words import percent
from gateway.domain.rollout import PILOT, Change, Event, RolloutState
from gateway.edge.alerts import Alerts
from gateway.edge.looking import look_beside
from gateway.edge.runtime import Runtime
from gateway.store.experiments import Conflict, Experiments
from gateway.store.store import StoreError
from gateway.telemetry.distribution import Figures
from gateway.telemetry.metrics import LEADING, RECOMMENDED

T = TypeVar("T")
log = logging.getLogger("gateway.rollout")
# How often whoever leads says so again, also while it looks, and others try whether it is gone: some times in LEAD_MS.
RENEW_S = 5.0
# A million users take a minute or two.
_PATIENCE_S = 900.0
_LEVELS = {"proceed": 1.0, "hold": 0.0, "roll back": -1.0}


class Pilot:
    """One process's part in it."""

    def __init__(self, runtime: Runtime, store: Path, *, holder: str, clock: Callable[[], float] = time.time) -> None:
        self._runtime = runtime
        self._store = store
        self._holder = holder
        self._clock = clock
        self._is_failing = False
        self._may_lead = False
        self._is_stopped = False
        self._task: asyncio.Task[None] | None = None
        self._acting: asyncio.Task[None] | None = None
        # One thread, so that what is asked of the store is done in the order it was asked: to resign comes last.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="pilot")
        self.is_leading = False
        # What the evidence recommended at the last look, by agent; of the leader only.
        self.recommended: dict[str, str] = {}

    async def begin(self, plan: Plan) -> dict[tuple[str, str], RolloutState]:
        """See that every agent's rollout has begun, and tell where they stand. Raises `StoreError`."""
        if not plan.rollouts:
            return {}
        states = await self._at_store(partial(_begun, plan=plan, now_ms=self._now_ms()))
        return {(plan.env, agent): state for agent, state in states.items()}

    def start(self) -> None:
        """Look from now on."""
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Let go of the lead. What is being carried out is, and is told; what is only looked at is not."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
        if self._acting is not None:
            await asyncio.wait({self._acting})
            if (error := self._acting.exception()) is not None:
                log.error("the pilot's last step failed: %s", error)
        if self._may_lead:
            with suppress(StoreError):
                await self._at_store(lambda experiments: experiments.resign(self._runtime.plan.env, self._holder))
        self.is_leading = False
        self._is_stopped = True
        self._thread.shutdown(wait=False)

    async def step(self) -> None:
        """One look at every rollout, if it is for us to look, and the steps that follow."""
        plan = self._runtime.plan
        try:
            states = await self._states_to_look_at(plan)
            self.is_leading = bool(states)
            if not states:
                self.recommended = {}
                self._mended()
                return
            looks = await self._look_and_lead_on(plan, states)
            self._acting = asyncio.create_task(self._act(plan, states, looks))
            # Whoever ends this step does not end halfway what was decided.
            await asyncio.shield(self._acting)
            self._acting = None
        except (StoreError, TimeoutError) as error:
            self._acting = None
            # Others are not kept from the lead by it; but nobody is to think that somebody looks.
            self.is_leading = False
            if not self._is_failing:
                why = str(error) or f"a look has taken {_PATIENCE_S:g} s and no end"
                log.error("no rollout is looked at until this is mended, and none is taken back: %s", why)
            self._is_failing = True
            return
        self._mended()

    def _mended(self) -> None:
        if self._is_failing:
            log.warning("the rollouts are looked at again")
        self._is_failing = False

    def figures(self) -> Iterator[Figures]:
        """Who leads, and what the evidence recommends."""
        yield LEADING, [((), float(self.is_leading))]
        yield RECOMMENDED, [((agent,), _LEVELS[word]) for agent, word in self.recommended.items()]

    async def _run(self) -> None:
        while True:
            try:
                await self.step()
            except Exception:
                # The loop must go on: without it no rollout is taken back.
                log.exception("bug in the pilot")
            await self._rest(_every_s(self._runtime.plan))

    async def _rest(self, for_s: float) -> None:
        """Lead on until the next look; it is due at once where the one who led is gone."""
        until_s = time.monotonic() + for_s
        was_leading = self.is_leading
        while (left_s := until_s - time.monotonic()) > 0:
            await asyncio.sleep(min(left_s, RENEW_S))
            # What is wrong with the store the next look says.
            with suppress(StoreError):
                if await self._leads(self._runtime.plan) and not was_leading:
                    return

    async def _look_and_lead_on(self, plan: Plan, states: Sequence[RolloutState]) -> Sequence[Look]:
        """The looks, while nobody takes us for gone, however long they take. Raises `StoreError`, TimeoutError."""
        asked = [(state, plan.rollouts[state.agent]) for state in states]
        looking = asyncio.create_task(look_beside(self._store, plan.env, asked, now_ms=self._now_ms()))
        try:
            async with asyncio.timeout(_PATIENCE_S):
                while not (await asyncio.wait({looking}, timeout=RENEW_S))[0]:
                    if not await self._leads(plan):
                        raise StoreError("another gateway has taken the lead during a look")
            return looking.result()
        finally:
            # Its process goes with it.
            looking.cancel()
            await asyncio.wait({looking})

    async def _leads(self, plan: Plan) -> bool:
        """Whether this is the one that leads, still or from now on. Raises `StoreError`."""
        if not plan.rollouts:
            return False
        self._may_lead = True
        return await self._at_store(lambda experiments: experiments.lead(plan.env, self._holder))

    async def _states_to_look_at(self, plan: Plan) -> Sequence[RolloutState]:
        """Where the rollouts stand, in the order of the plan; none where another process looks at them."""
        if not await self._leads(plan):
            return ()
        states = await self._at_store(partial(_begun, plan=plan, now_ms=self._now_ms()))
        return [states[agent] for agent in plan.rollouts]

    async def _act(self, plan: Plan, states: Sequence[RolloutState], looks: Sequence[Look]) -> None:
        found = list(zip(states, looks, strict=True))
        # As of when it was looked: what took long is not stale, or a large experiment were never acted on.
        self.recommended = {
            state.agent: recommendation(state, look, now_ms=look.at_ms, plan=plan.rollouts[state.agent]).word
            for state, look in found
            if self._is_in_force(plan, state.agent)
        }
        for state, look in found:
            # Asked before each step, since the one before it may have waited for the store.
            if not self._is_in_force(plan, state.agent):
                log.info("%s was looked at under a policy that a reload has replaced: no step follows", state.agent)
                continue
            change = advance(state, look, now_ms=look.at_ms, plan=plan.rollouts[state.agent]).change
            if change is not None and await self._at_store(partial(_is_applied, env=plan.env, change=change)):
                tell(self._runtime.alerts, change)

    def _is_in_force(self, plan: Plan, agent: str) -> bool:
        """Whether a reload has left this agent's rollout as it was in that plan; a look may take minutes."""
        return self._runtime.plan.rollouts.get(agent) == plan.rollouts[agent]

    async def _at_store(self, work: Callable[[Experiments], T]) -> T:
        def open_and_work() -> T:
            # A store that was moved away is out of order: a new one would begin everything anew.
            with Experiments(self._store, clock=self._clock, is_new_allowed=False) as experiments:
                return work(experiments)

        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, open_and_work)
        except RuntimeError as error:
            if not self._is_stopped:
                raise
            raise StoreError("the pilot has stopped") from error

    def _now_ms(self) -> int:
        return round(self._clock() * 1000)


def tell(alerts: Alerts, change: Change) -> None:
    """Let people hear of a change."""
    text = f"Rollout of {change.agent}: {change.event}, {percent(change.from_bps)} -> {percent(change.share_bps)}"
    why = change.why or change.reasons[0]
    fields = {"agent": change.agent, "event": change.event, "phase": change.phase, "by": change.by, "why": why}
    is_bad = change.event is Event.ROLLED_BACK and change.by == PILOT
    alerts.tell_text(
        f"{text}, by {change.by}: {why}", fields, level=logging.ERROR if is_bad else logging.WARNING
    )  # fmt: skip


def _every_s(plan: Plan) -> float:
    return min((rollout.check_every_s for rollout in plan.rollouts.values()), default=30.0)


def _begun(experiments: Experiments, *, plan: Plan, now_ms: int) -> Mapping[str, RolloutState]:
    """The states, those made that were missing. Of several processes the first one's stay."""
    states = experiments.states(plan.env)
    for agent, rollout in plan.rollouts.items():
        if agent not in states:
            change = begin(agent, plan=rollout, now_ms=now_ms).change
            assert change is not None, "BUG: a beginning is a change"
            states[agent] = experiments.begin(plan.env, change)
    return states


def _is_applied(experiments: Experiments, *, env: str, change: Change) -> bool:
    """False where somebody was quicker, by hand for instance; the next look starts from there."""
    try:
        experiments.apply(env, change)
    except Conflict:
        return False
    return True
