"""The rollouts over HTTP, on the admin listener: where they stand, and orders; `gateway rollout` for programs.

SQLite blocks, so it is asked in a thread; a comparison computes, so it has a process of its own, one at a time, shared
by all who ask for the same. Evidence is judged as of when it was looked: what took long is not stale. The invariant:
nothing is changed for a web page.
"""

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

import msgspec
from aiohttp import web

from gateway.decide.rollout_by_hand import MAX_WHY, Order, Refusal, wrong_percent
from gateway.decide.rollout_evidence import Look
from gateway.decide.rollout_plan import RolloutPlan
from gateway.domain.errors import GatewayError, Refused
from gateway.domain.reading import nearest
from gateway.domain.rollout import PILOT, RolloutState
from gateway.edge.admit import leave_to_read_body, read_body
from gateway.edge.asked import decoded, refuse_web_pages, unavailable
from gateway.edge.guard import Handler, guarded
from gateway.edge.looking import SharedLooks
from gateway.edge.pilot import tell
from gateway.edge.replies import JSON, error_reply
from gateway.edge.runtime import Runtime
from gateway.store.experiments import Experiments
from gateway.store.orders import ACTIONS, FORCED, Action, Wish, carry_out, rests_on_evidence, state_of
from gateway.store.rollout_status import change_line, status_of
from gateway.store.store import StoreError

T = TypeVar("T")
_MAX_WHO = 200
_MOST_CHANGES = 10_000
# A million users take a minute or two; whoever waits is told after this that no look can be had.
_PATIENCE_S = 300.0
# What is taken back waits so long for the figures that the audit log would like to have with it.
_FIGURES_S = 5.0


class Ordered(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An order. `percent` goes with `set` only."""

    percent: float | None = None
    why: str = ""
    who: str = "admin API"
    force: bool = False


class RolloutPaths:
    """The paths below /admin/rollout, over one store."""

    def __init__(self, runtime: Runtime, store: Path) -> None:
        self._runtime = runtime
        self._store = store
        self._looking = SharedLooks(store, patience_s=_PATIENCE_S)

    def add_to(self, app: web.Application) -> None:
        """Register them, behind the guard of all of /admin."""
        app.router.add_get("/admin/rollout", guarded(self._answering(self.show)))
        app.router.add_get("/admin/rollout/history", guarded(self._answering(self.history)))
        app.router.add_post(
            "/admin/rollout/{agent}/{action}",
            guarded(self._answering(self.order)),
            expect_handler=leave_to_read_body,
        )

    async def show(self, request: web.Request) -> object:
        """Where every rollout stands, or that of `agent`."""
        plan = self._runtime.plan
        wanted = request.query.get("agent", "")
        chosen = {wanted: self._plan_of(wanted)} if wanted else plan.rollouts
        states = await self._at(lambda experiments: experiments.states(plan.env))
        begun = [(states[agent], rollout) for agent, rollout in chosen.items() if agent in states]
        looks = await self._looks(begun)
        found = [
            status_of(state, look, rollout, now_ms=look.at_ms)
            for (state, rollout), look in zip(begun, looks, strict=True)
        ]
        return {"env": plan.env, "rollouts": found}

    async def history(self, request: web.Request) -> object:
        """The latest `limit` rows of the audit log, oldest first; of one `agent`."""
        env, agent, limit = (
            self._runtime.plan.env,
            request.query.get("agent") or None,
            request.query.get("limit", "100"),
        )
        if not re.fullmatch(r"[0-9]{1,5}", limit) or not 1 <= int(limit) <= _MOST_CHANGES:
            raise Refused("invalid_value", f"limit is from 1 to {_MOST_CHANGES}", param="limit")
        changes = await self._at(lambda experiments: experiments.changes(env, agent, limit=int(limit)))
        if agent and not changes:
            # Only one that left the configuration has a history and no plan.
            self._plan_of(agent)
        return {"env": env, "changes": [change_line(change) for change in changes]}

    async def order(self, request: web.Request) -> object:
        """Carry out an order; 409 where the evidence or the state speaks against it."""
        refuse_web_pages(request)
        agent, action = request.match_info["agent"], request.match_info["action"]
        if action not in ACTIONS:
            raise Refused("not_found", f"there is no such order; there are {', '.join(ACTIONS)}")
        rollout = self._plan_of(agent)
        wanted = decoded(await read_body(self._runtime, request), Ordered)
        _check(wanted, action)
        wish = Wish(action, wanted.percent or 0.0)
        env, order = self._runtime.plan.env, Order(wanted.who, _now_ms(), wanted.why, wanted.force)
        state = await self._at(
            partial(state_of, env=env, agent=agent, plan=rollout, now_ms=order.now_ms, by=order.by)
        )  # fmt: skip
        look: Look | None
        if rests_on_evidence(state, wish):
            (look,) = await self._looks([(state, rollout)])
            order = order._replace(now_ms=look.at_ms)
        else:
            look = await self._figures_at_hand(state, rollout)
        done = await self._at(
            lambda experiments: carry_out(experiments, env, rollout, wish, order, state=state, look=look)
        )
        if isinstance(done, Refusal):
            hint = "; force with a reason overrules it" if done.can_force else ""
            raise Refused("rollout_refused", f"{'; '.join(done.reasons)}{hint}")
        assert done.change is not None, "BUG: an order that was carried out is a change"
        tell(self._runtime.alerts, done.change)
        return {"env": env, "change": change_line(done.change)}

    async def _figures_at_hand(self, state: RolloutState, rollout: RolloutPlan) -> Look | None:
        """Whoever takes back does not wait for figures, and is not kept from it by whatever is wrong with them."""
        with suppress(TimeoutError, Refused):
            async with asyncio.timeout(_FIGURES_S):
                (look,) = await self._looks([(state, rollout)])
                return look
        return None

    async def _looks(self, rollouts: Sequence[tuple[RolloutState, RolloutPlan]]) -> Sequence[Look]:
        if not rollouts:
            return ()
        try:
            return await self._looking.look(self._runtime.plan.env, rollouts)
        except StoreError as error:
            raise unavailable(error) from error

    def _plan_of(self, agent: str) -> RolloutPlan:
        rollouts = self._runtime.plan.rollouts
        if agent not in rollouts:
            known = f"known: {', '.join(rollouts)}{nearest(agent, rollouts)}" if rollouts else "there is no experiment"
            raise Refused("model_not_found", f"no rollout of {agent!r}; {known}", param="agent")
        return rollouts[agent]

    def _answering(self, serve: Callable[[web.Request], Awaitable[object]]) -> Handler:
        async def answer(request: web.Request) -> web.StreamResponse:
            try:
                found = await serve(request)
            except GatewayError as error:
                return error_reply(error)
            return web.Response(body=msgspec.json.encode(found), content_type=JSON)

        return answer

    async def _at(self, work: Callable[[Experiments], T]) -> T:
        return await asyncio.to_thread(_work_at, self._store, work)


def _work_at(store: Path, work: Callable[[Experiments], T]) -> T:
    try:
        with Experiments(store, clock=time.time, is_new_allowed=False) as experiments:
            return work(experiments)
    except StoreError as error:
        raise unavailable(error) from error


def _check(wanted: Ordered, action: Action) -> None:
    if (wanted.percent is not None) != (action == "set"):
        raise Refused("invalid_value", "percent goes with set, and set wants it", param="percent")
    if wanted.percent is not None and (wrong := wrong_percent(wanted.percent)):
        raise Refused("invalid_value", wrong, param="percent")
    if not wanted.who.strip() or len(wanted.who) > _MAX_WHO or not wanted.who.isprintable():
        raise Refused("invalid_value", f"who wants 1 to {_MAX_WHO} characters that can be printed", param="who")
    if wanted.who.strip() == PILOT:
        raise Refused("invalid_value", f"{PILOT} is the gateway's own name in the audit log", param="who")
    if len(wanted.why) > MAX_WHY:
        raise Refused("invalid_value", f"why is longer than {MAX_WHY} characters", param="why")
    if wanted.force and action not in FORCED:
        raise Refused("invalid_value", f"force goes with {' and '.join(FORCED)}", param="force")
    if wanted.force and not wanted.why.strip():
        raise Refused("invalid_value", "force wants a reason, which the audit log keeps", param="why")


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
