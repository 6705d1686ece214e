"""Asks the providers how their models are, without spending tokens, and tells it: `/health`, metrics, the log.

Verdicts are `decide/health.py`'s. Here the providers are asked, for each model once, side by side, and what they say is
kept for a while. The invariants: however many ask at once, one round is under way at most; and a provider
that is silent costs one timeout or two, however many models it has.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, NamedTuple

from aiohttp import web

from gateway.decide.health import (
    DAY_S,
    AgentHealth,
    Condition,
    Finding,
    FirstChunks,
    ModelHealth,
    Overall,
    Probe,
    Verdict,
    arms_in_use,
    found,
    judge,
    judge_agent,
    judge_all,
    models_in_use,
    retirement,
    slow_halves,
)
from gateway.decide.plan import Plan
from gateway.decide.targets import Target
from gateway.domain.errors import FaultKind, Refused, UpstreamFault
from gateway.domain.model_card import ModelCard, read_card, read_cards
from gateway.domain.policy import Health as Limits
from gateway.domain.spans import format_time
from gateway.domain.wire import is_json
from gateway.edge.runtime import Runtime
from gateway.edge.upstream import Upstream
from gateway.telemetry.distribution import Figures
from gateway.telemetry.metrics import HEALTH, RETIRES

log = logging.getLogger("gateway.health")

# Requests under way at one provider. Its connections are for calls.
MAX_ABREAST = 4
# While the policy wants no looks of our own, so often it is asked whether it has changed its mind.
_IDLE_S = 60.0
_LEVELS = {Verdict.OK: 0.0, Verdict.SLOW: 1.0, Verdict.ERROR: 2.0}
_SILENT = (FaultKind.CONNECT, FaultKind.FIRST_BYTE)
# For these the list of all models is asked: the provider may have no cards of single ones.
_NO_CARD = (200, 404, 405, 501)


class _Provider:
    """One provider within one round: how many ask it at once, and whether it is worth asking on."""

    def __init__(self) -> None:
        self.turns = asyncio.Semaphore(MAX_ABREAST)
        self.silence = ""


class _Mark(NamedTuple):
    """What streams had been counted at an instant."""

    at_s: float
    first_chunks: FirstChunks


class Health:
    """What is known of the models' health, and asking for it anew."""

    def __init__(
        self, runtime: Runtime, *, clock: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time
    ) -> None:
        self._runtime = runtime
        self._clock, self._wall = clock, wall
        self._round: asyncio.Task[None] | None = None
        self._asked_plan: Plan | None = None
        self._asked_s = 0.0
        self._probes: dict[str, Probe] = {}
        # By model: the upstream that had it when it was last there; when it is withdrawn; the day of the last warning.
        self._was_at: dict[str, str] = {}
        self._retires_s: dict[str, float] = {}
        self._warned: dict[str, int] = {}
        self._marks: tuple[_Mark, ...] = ()
        runtime.observer.take_health(self.figures)

    # --- Asking ------------------------------------------------------------------------------------------------------

    async def run(self, _: web.Application) -> AsyncIterator[None]:
        """Look from time to time while the application runs, so that a model's end is noticed though nobody asks."""
        watching = asyncio.create_task(self._watch())
        yield
        tasks = [task for task in (watching, self._round) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _watch(self) -> None:
        while True:
            every_s = self._runtime.plan.health.every_s
            await asyncio.sleep(every_s or _IDLE_S)
            if every_s:
                try:
                    await self.look()
                except Exception:
                    # The loop must go on: without it no end is noticed any more, and nobody would hear of that.
                    log.exception("bug in the look at the models")

    async def look(self) -> None:
        """See that what the providers said is recent: ask them, or wait for those who are asking already."""
        # Twice where a reload comes in between: its models are others.
        for _ in range(2):
            plan = self._runtime.plan
            if self._asked_plan is plan and self._clock() < self._asked_s + plan.health.cache_s:
                return
            if self._round is None or self._round.done():
                self._round = asyncio.create_task(self._ask_all())
            # An asker that leaves must not end it for the others.
            await asyncio.shield(self._round)

    async def _ask_all(self) -> None:
        # Read at one instant: a reload swaps both.
        plan, upstreams = self._runtime.plan, self._runtime.upstreams
        targets = models_in_use(plan)
        providers = {target.upstream: _Provider() for target in targets.values()}
        probes = await asyncio.gather(
            *(
                self._ask(target, upstreams[target.upstream], providers[target.upstream], plan.health)
                for target in targets.values()
            )
        )
        self._probes = dict(zip(targets, probes, strict=True))
        self._notice_ends(targets, plan.health)
        self._asked_plan, self._asked_s = plan, self._clock()

    async def _ask(self, target: Target, upstream: Upstream, provider: _Provider, limits: Limits) -> Probe:
        async with provider.turns:
            since_s = self._clock()
            card = None
            if provider.silence:
                finding, said = Finding.FAILED, provider.silence
            else:
                try:
                    async with asyncio.timeout(limits.timeout_s):
                        status, card = await _card_of(target.model, upstream, limits.timeout_s)
                    was_there = self._was_at.get(target.ref) == target.upstream
                    finding, said = found(status, card, was_there=was_there)
                except TimeoutError:
                    finding, said = Finding.FAILED, f"{target.upstream} did not answer in time"
                    provider.silence = said
                except UpstreamFault as fault:
                    finding, said = Finding.FAILED, fault.message
                    provider.silence = said if fault.kind in _SILENT else ""
            now_s = self._clock()
            return Probe(now_s, (now_s - since_s) * 1000, finding, said, card)

    def _notice_ends(self, targets: Mapping[str, Target], limits: Limits) -> None:
        """Learn which models are there and which are withdrawn when; warn once a day of each whose end is near."""
        wall_s = self._wall()
        was_at, retires_s, warned = self._was_at, self._retires_s, self._warned
        self._was_at, self._retires_s, self._warned = {}, {}, {}
        for ref, target in targets.items():
            probe = self._probes[ref]
            is_known = was_at.get(ref) == target.upstream
            if is_known or probe.finding in (Finding.HERE, Finding.ARCHIVED):
                self._was_at[ref] = target.upstream
            ends_s = retirement(probe, retires_s.get(ref) if is_known else None, wall_s)
            if ends_s is None:
                continue
            self._retires_s[ref] = ends_s
            today = int(wall_s // DAY_S)
            if ends_s - wall_s <= limits.warn_days * DAY_S:
                if warned.get(ref) != today:
                    _warn(ref, ends_s, wall_s, probe)
                self._warned[ref] = today

    # --- Telling -----------------------------------------------------------------------------------------------------

    async def report(self) -> tuple[Overall, dict[str, Any]]:
        """All agents and their models."""
        await self.look()
        models = self._judged()
        agents = self._agents(models)
        overall = judge_all(agents.values())
        return overall, {
            "status": overall,
            "environment": self._runtime.plan.env,
            "agents": {name: self._agent_row(name, agent) for name, agent in agents.items()},
            "models": {ref: self._model_row(ref, health) for ref, health in models.items()},
        }

    async def report_on(self, agent: str) -> tuple[Condition, dict[str, Any]]:
        """One agent and its models. Raises `Refused` where there is none of that name."""
        if agent in self._runtime.plan.agents:
            await self.look()
        plan = self._runtime.plan
        if agent not in plan.agents:
            raise Refused("model_not_found", f"there is no such agent; known: {', '.join(sorted(plan.agents))}")
        models = self._judged()
        found_so = self._agents(models)[agent]
        refs = {target.ref for chain in arms_in_use(plan, plan.agents[agent]) for target in chain}
        return found_so.condition, {
            "agent": agent,
            **self._agent_row(agent, found_so),
            "environment": plan.env,
            "models": {ref: self._model_row(ref, health) for ref, health in models.items() if ref in refs},
        }

    def figures(self) -> list[Figures]:
        """For the metrics, asking nobody; of what nothing is known, nothing is told."""
        wall_s = self._wall()
        known = {ref: health for ref, health in self._judged().items() if health.age_s is not None}
        return [
            (HEALTH, [((ref,), _LEVELS[health.verdict]) for ref, health in known.items()]),
            (RETIRES, [((ref,), (ends_s - wall_s) / DAY_S) for ref, ends_s in self._retires_s.items()]),
        ]

    def _judged(self) -> dict[str, ModelHealth]:
        plan, now_s = self._runtime.plan, self._clock()
        halves = self._first_chunk_halves(plan.health.recent_s, now_s)
        judged = {}
        for ref, target in models_in_use(plan).items():
            breaker = self._runtime.standing.known(target.upstream, ref)
            recent = breaker.recent(now_s, plan.health.recent_s) if breaker is not None else None
            judged[ref] = judge(recent, halves.get(ref), self._probes.get(ref), plan.health, now_s)
        return judged

    def _first_chunk_halves(self, recent_s: float, now_s: float) -> dict[str, float]:
        """How late streams begin, from what was counted between a mark not long ago and now.

        The counters never go back, so a mark is all that a window needs. Two of them are kept, the older one in use.
        """
        observer = self._runtime.observer
        counted = observer.first_chunks()
        marks = tuple(mark for mark in self._marks if now_s - mark.at_s <= 2 * recent_s)
        halves = slow_halves(marks[0].first_chunks, counted, observer.edges_ms) if marks else {}
        if not marks or now_s - marks[-1].at_s >= recent_s / 2:
            marks = (*marks[-1:], _Mark(now_s, counted))
        self._marks = marks
        return halves

    def _agents(self, models: Mapping[str, ModelHealth]) -> dict[str, AgentHealth]:
        plan = self._runtime.plan
        return {name: judge_agent(arms_in_use(plan, agent), models) for name, agent in plan.agents.items()}

    def _agent_row(self, name: str, agent: AgentHealth) -> dict[str, Any]:
        plan = self._runtime.plan
        chains = arms_in_use(plan, plan.agents[name])
        return {
            "status": agent.condition,
            "reason": agent.reason,
            "chains": [[target.ref for target in chain] for chain in chains],
        }

    def _model_row(self, ref: str, health: ModelHealth) -> dict[str, Any]:
        probe, ends_s = self._probes.get(ref), self._retires_s.get(ref)
        return {
            "verdict": health.verdict,
            "reason": health.reason,
            "evidence": health.evidence,
            "age_s": round(health.age_s, 1) if health.age_s is not None else None,
            "probe": probe and {"finding": probe.finding, "latency_ms": round(probe.latency_ms, 1)},
            "retires_at": format_time(round(ends_s * 1000)) if ends_s is not None else None,
            "retires_in_days": round((ends_s - self._wall()) / DAY_S, 1) if ends_s is not None else None,
        }


async def _card_of(model: str, upstream: Upstream, within_s: float) -> tuple[int, ModelCard | None]:
    """The model's card: its own, or its entry in the list of all; and the status that the first question got."""
    status, body = await _get(upstream, model, within_s)
    card = read_card(body) if status == 200 else None
    if card is None and status in _NO_CARD:
        listed_status, listed = await _get(upstream, "", within_s)
        if listed_status == 200:
            card = (read_cards(listed) or {}).get(model)
    return status, card


async def _get(upstream: Upstream, model: str, within_s: float) -> tuple[int, bytes]:
    exchange = await upstream.look_up(model, within_s=within_s)
    is_sound = False
    try:
        body = await exchange.read()
        is_sound = is_json(body)
        return exchange.status, body
    finally:
        exchange.close(is_sound=is_sound)


def _warn(ref: str, ends_s: float, wall_s: float, probe: Probe) -> None:
    if ends_s <= wall_s:
        log.warning("model %s is withdrawn: %s", ref, probe.said)
        return
    # What a provider writes is shown with its control characters made visible.
    replacement = (
        f"; in its place the provider names {probe.card.replacement!r}" if probe.card and probe.card.replacement else ""
    )
    on, days = format_time(round(ends_s * 1000)), (ends_s - wall_s) / DAY_S
    log.warning("model %s is withdrawn on %s, in %.0f days%s", ref, on, days, replacement)
