"""The figures of an A/B report, gathered from the store: arms, evidence and its way there, windows, the audit log.

Reads, and writes nothing. The invariant: the evidence is that of decide/compare.py over the very calls that the arms
count, and the recommendation is that of the whole experiment up to now, whatever time is shown.
"""

from collections.abc import Sequence
from typing import NamedTuple

from gateway.decide.compare import KINDS, evidence_of, merge
from gateway.decide.plan import Plan
from gateway.decide.rollout import Recommendation, recommendation
from gateway.decide.rollout_plan import RolloutPlan
from gateway.domain.experiment import Arrivals, Evidence, Finding, Terms, UserSums
from gateway.domain.rollout import Change, RolloutState
from gateway.domain.rollout_policy import RELATIVE_METRICS
from gateway.domain.spans import Span
from gateway.lab.ab_arms import Arms, arms_of
from gateway.lab.cost_figures import step_of
from gateway.store.experiments import Experiments
from gateway.store.looks import look_at

_POINTS = 30


class Asked(NamedTuple):
    """What is to be reported. `since_ms` of None: each agent since its experiment began. No `agents`: all of them.

    `windows` are lengths in ms with their names, each of which ends with the time that is shown; None: all of it.
    Those that are longer than it would say the same, and are left out.
    """

    since_ms: int | None
    until_ms: int
    agents: Sequence[str] = ()
    windows: Sequence[tuple[str, int | None]] = ()


class Point(NamedTuple):
    """What the evidence was at a moment, had one looked."""

    at_ms: int
    findings: tuple[Finding, ...]


class Effect(NamedTuple):
    """A finding on the scale it is judged on: latencies and cost as a ratio, the others in their own unit.

    `limit` is where its guardrail stands on that scale.
    """

    is_relative: bool
    value: float | None
    low: float | None
    high: float | None
    limit: float | None


class AgentFigures(NamedTuple):
    """One agent's rollout. `plan` and `advice` are None where no policy governs it any more; `why_not` says so."""

    agent: str
    state: RolloutState
    plan: RolloutPlan | None
    advice: Recommendation | None
    why_not: str
    span: Span
    step_s: int
    arms: Arms
    evidence: Evidence
    track: list[Point]
    windows: list[tuple[str, Evidence]]
    changes: list[Change]


class Figures(NamedTuple):
    """All that a report shows. `pooled` is None where there are fewer than two agents."""

    env: str
    now_ms: int
    is_experiment: bool
    alpha: float
    agents: list[AgentFigures]
    pooled: Evidence | None


def gather(experiments: Experiments, plan: Plan, now_ms: int, asked: Asked) -> Figures:
    """The figures of every rollout that has begun, or of one agent's. Raises `StoreError`."""
    states = experiments.states(plan.env)
    chosen = [state for name, state in states.items() if not asked.agents or name in asked.agents]
    found = [_agent(experiments, plan, state, now_ms, asked) for state in chosen]
    pooled = None
    if len(found) > 1:
        rows = [row for _, rows, _ in found for row in rows]
        arrivals = [arrival for _, _, arrivals in found for arrival in arrivals]
        # Guardrails are each agent's own.
        pooled = evidence_of(rows, arrivals, Terms(alpha=_alpha(plan)))
    return nothing(plan, now_ms)._replace(agents=[figures for figures, _, _ in found], pooled=pooled)


def nothing(plan: Plan, now_ms: int) -> Figures:
    """The figures of a store in which nothing is yet."""
    return Figures(plan.env, now_ms, plan.is_experiment, _alpha(plan), [], None)


def effect_of(finding: Finding) -> Effect:
    """A finding, and its guardrail, on the scale it is judged on."""
    is_relative = finding.metric in RELATIVE_METRICS and finding.relative is not None
    guardrail = finding.guardrail
    limit = None
    if guardrail is not None and guardrail.is_relative == is_relative:
        limit = -guardrail.margin if KINDS[finding.metric].is_higher_better else guardrail.margin
    if is_relative:
        return Effect(True, finding.relative, finding.relative_low, finding.relative_high, limit)
    return Effect(False, finding.difference, finding.low, finding.high, limit)


def _agent(
    experiments: Experiments, plan: Plan, state: RolloutState, now_ms: int, asked: Asked
) -> tuple[AgentFigures, list[UserSums], list[Arrivals]]:
    env, agent = plan.env, state.agent
    rollout = plan.rollouts.get(agent)
    terms = rollout.terms if rollout else Terms()
    span = _span(state, asked)
    step_s = step_of(span)
    calls = experiments.outcomes(env, agent=agent, since_ms=span.since_ms, until_ms=span.until_ms)
    arms = arms_of(calls, experiment=state.experiment, step_s=step_s)
    longest_ms = rollout.longest_ms if rollout else 0
    arrivals = experiments.arrivals(env, agent, experiment=state.experiment, until_ms=now_ms - longest_ms)
    track, rows = _track(experiments, env, state, span, terms)
    evidence = evidence_of(rows, arrivals, terms)
    windows = []
    for name, length_ms in asked.windows:
        if length_ms is None:
            windows.append((name, evidence))
        elif (since_ms := span.until_ms - length_ms) > span.since_ms:
            sums = _sums(experiments, env, state, Span(since_ms, span.until_ms))
            windows.append((name, evidence_of(sums, [], terms)))
    advice = None
    if rollout is not None:
        look = look_at(experiments, env, state, rollout, now_ms=now_ms)
        advice = recommendation(state, look, now_ms=now_ms, plan=rollout)
    figures = AgentFigures(
        agent=agent, state=state, plan=rollout, advice=advice, why_not=_why_not(plan, agent), span=span, step_s=step_s,
        arms=arms, evidence=evidence, track=track, windows=windows,
        changes=experiments.changes(env, agent),
    )  # fmt: skip
    return figures, rows, arrivals


def _span(state: RolloutState, asked: Asked) -> Span:
    since_ms = state.experiment_since_ms if asked.since_ms is None else asked.since_ms
    # A clock that went back must not make a time that ends before it begins.
    return Span(min(since_ms, asked.until_ms - 1), asked.until_ms)


def _track(
    experiments: Experiments, env: str, state: RolloutState, span: Span, terms: Terms
) -> tuple[list[Point], list[UserSums]]:
    """The evidence as it grew, and in the end all rows it rests on. Each call is read once."""
    rows: list[UserSums] = []
    track = []
    length_ms = span.until_ms - span.since_ms
    ends = sorted({span.since_ms + length_ms * number // _POINTS for number in range(1, _POINTS + 1)})
    before_ms = span.since_ms
    for end_ms in ends:
        rows = _merged([*rows, *_sums(experiments, env, state, Span(before_ms, end_ms))])
        track.append(Point(end_ms, evidence_of(rows, [], terms).findings))
        before_ms = end_ms
    return track, rows


def _sums(experiments: Experiments, env: str, state: RolloutState, span: Span) -> list[UserSums]:
    return experiments.user_sums(
        env, state.agent, experiment=state.experiment, since_ms=span.since_ms, until_ms=span.until_ms
    )


def _merged(rows: Sequence[UserSums]) -> list[UserSums]:
    return [row for arms in merge(rows).values() for arm in arms for row in arm.values()]


def _alpha(plan: Plan) -> float:
    """It is the same for all agents."""
    return next((rollout.terms.alpha for rollout in plan.rollouts.values()), Terms().alpha)


def _why_not(plan: Plan, agent: str) -> str:
    """Why no policy governs this agent's rollout, or ""."""
    if agent not in plan.agents:
        return "The configuration has no such agent any more, so nothing is recommended; what was seen of it is kept."
    if agent not in plan.rollouts:
        return "`ab_testing.enabled` is false here, so nothing is recommended; what was seen before is kept."
    return ""
