"""How well each model, each agent and the whole are, from what real calls told and what the provider says of a model.

Pure: nobody is asked here, and `now_s` is passed in. Two kinds of evidence: the outcomes of recent calls, which the
breakers keep anyway, and a look at the provider's list of models, which costs no tokens. The invariant: calls that are
recent decide, whatever the look says; the look decides where there are none; and each verdict names what it rests on.
"""

from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from typing import NamedTuple

from gateway.decide.breaker import Recent
from gateway.decide.plan import AgentPlan, Plan
from gateway.decide.targets import Target
from gateway.domain.model_card import ModelCard
from gateway.domain.policy import Health

DAY_S = 86_400
# Fewer streams have no median worth the name.
MIN_STREAMS = 5
# By (agent, model, variant): the fallbacks among the answers, and the streams by the edge before which they began.
FirstChunks = Mapping[tuple[str, str, str], tuple[int, tuple[int, ...]]]


class Verdict(StrEnum):
    """Of a model."""

    OK = "OK"
    SLOW = "SLOW"
    ERROR = "ERROR"


class Condition(StrEnum):
    """Of an agent, better before worse. Degraded: only a fallback is well. Error: no model of its chain is."""

    OK = "ok"
    SLOW = "slow"
    DEGRADED = "degraded"
    ERROR = "error"


class Overall(StrEnum):
    """Of the whole: degraded where some agent is slow or degraded, error where some agent has no model."""

    HEALTHY = "healthy"
    DEGRADED = "degraded"
    ERROR = "error"


class Evidence(StrEnum):
    """What a verdict rests on: the outcomes of real calls, or the provider's word."""

    CALLS = "calls"
    PROBE = "probe"


class Finding(StrEnum):
    """What a look at the provider found."""

    HERE = "here"
    ARCHIVED = "archived"  # It is there, and closed.
    GONE = "gone"  # It was there when somebody looked before.
    UNTOLD = "untold"  # The provider tells nothing of it: no such endpoint, or not all models are listed.
    LIMITED = "limited"  # 429.
    FAILED = "failed"  # No answer, 5xx, or our key is refused.


class Probe(NamedTuple):
    """One look, and what is to be said of it."""

    at_s: float
    latency_ms: float
    finding: Finding
    said: str
    card: ModelCard | None = None


class ModelHealth(NamedTuple):
    """A verdict, why, on which evidence, and how old that is; None: there is none."""

    verdict: Verdict
    reason: str
    evidence: Evidence
    age_s: float | None


class AgentHealth(NamedTuple):
    """How an agent is, and why."""

    condition: Condition
    reason: str


def found(status: int, card: ModelCard | None, *, was_there: bool) -> tuple[Finding, str]:
    """What an answer means; `card` is the model's own or its entry in the list, where there is one."""
    if card is not None:
        if card.is_archived:
            return Finding.ARCHIVED, "the provider has archived it"
        return Finding.HERE, "the provider knows it"
    if status in (200, 404, 405, 501):
        if was_there:
            return Finding.GONE, "the provider does not know it any more"
        return Finding.UNTOLD, "the provider does not tell of it"
    if status == 429:
        return Finding.LIMITED, "the provider limits our rate"
    if status in (401, 403):
        return Finding.FAILED, f"the provider refuses our key ({status})"
    return Finding.FAILED, f"the provider answers {status}"


def judge(
    recent: Recent | None, first_chunk_ms: float | None, probe: Probe | None, limits: Health, now_s: float
) -> ModelHealth:
    """The verdict on one model. `first_chunk_ms`: half of its recent streams began no sooner; None: too few of them."""
    if recent is not None and (recent.calls or recent.is_shut):
        verdict, reason = _by_calls(recent, first_chunk_ms, limits)
        return ModelHealth(verdict, reason, Evidence.CALLS, _age_s(recent.last_s, now_s))
    if probe is not None and probe.finding is not Finding.UNTOLD:
        verdict, reason = _by_probe(probe, limits)
        return ModelHealth(verdict, reason, Evidence.PROBE, _age_s(probe.at_s, now_s))
    said = probe.said if probe is not None else "the provider has not been asked yet"
    if recent is not None:
        # Old, and still the best there is.
        verdict, how = (Verdict.ERROR, "failed") if recent.has_last_failed else (Verdict.OK, "succeeded")
        return ModelHealth(verdict, f"its last call {how}; {said}", Evidence.CALLS, _age_s(recent.last_s, now_s))
    age_s = _age_s(probe.at_s, now_s) if probe is not None else None
    return ModelHealth(Verdict.ERROR, f"{said}, and no call was made that could tell", Evidence.PROBE, age_s)


def _by_calls(recent: Recent, first_chunk_ms: float | None, limits: Health) -> tuple[Verdict, str]:
    calls, failures = recent.calls, recent.failures
    of = f"of {calls} call{'s' if calls != 1 else ''} in {limits.recent_s:g} s"
    if recent.is_shut:
        return Verdict.ERROR, f"its breaker is open; {failures} {of} failed"
    if failures * 2 >= calls:
        return Verdict.ERROR, f"{failures} {of} failed"
    if first_chunk_ms is not None and first_chunk_ms >= limits.slow_first_chunk_ms:
        return Verdict.SLOW, f"half of its recent streams began after {first_chunk_ms:g} ms or later"
    return Verdict.OK, f"{calls - failures} {of} succeeded"


def _by_probe(probe: Probe, limits: Health) -> tuple[Verdict, str]:
    if probe.finding is Finding.LIMITED:
        return Verdict.SLOW, probe.said
    if probe.finding is not Finding.HERE:
        return Verdict.ERROR, probe.said
    if probe.latency_ms >= limits.slow_ms:
        return Verdict.SLOW, f"{probe.said}, but took {probe.latency_ms:.0f} ms to say so"
    return Verdict.OK, probe.said


def _age_s(at_s: float, now_s: float) -> float:
    return max(0.0, now_s - at_s)


def arms_in_use(plan: Plan, agent: AgentPlan) -> tuple[tuple[Target, ...], ...]:
    """The chains that callers of this agent get now."""
    if not plan.use_finetuned:
        return (agent.baseline,)
    if not plan.is_experiment:
        return (agent.finetuned,)
    # Whoever names no user is outside of the experiment, and gets the baseline at any share.
    return (agent.finetuned, agent.baseline) if agent.share_bps > 0 else (agent.baseline,)


def models_in_use(plan: Plan) -> dict[str, Target]:
    """Every model of a chain that is in use, once, by its reference."""
    chains = (chain for agent in plan.agents.values() for chain in arms_in_use(plan, agent))
    return {target.ref: target for chain in chains for target in chain}


def judge_agent(chains: Iterable[Sequence[Target]], models: Mapping[str, ModelHealth]) -> AgentHealth:
    """An agent is as its worst chain is: the first model decides, and where that is in error, whoever stands in."""
    order = list(Condition)
    return max((_of_chain(chain, models) for chain in chains), key=lambda one: order.index(one.condition))


def _of_chain(chain: Sequence[Target], models: Mapping[str, ModelHealth]) -> AgentHealth:
    first = chain[0].ref
    verdict, reason = models[first].verdict, f"{first}: {models[first].reason}"
    if verdict is not Verdict.ERROR:
        return AgentHealth(Condition.OK if verdict is Verdict.OK else Condition.SLOW, reason)
    standing_in = next((target.ref for target in chain if models[target.ref].verdict is not Verdict.ERROR), None)
    if standing_in is None:
        return AgentHealth(Condition.ERROR, f"{reason}; no other model of the chain is well")
    return AgentHealth(Condition.DEGRADED, f"{reason}; {standing_in} stands in")


def judge_all(agents: Iterable[AgentHealth]) -> Overall:
    """The whole, from its agents."""
    conditions = {agent.condition for agent in agents}
    if Condition.ERROR in conditions:
        return Overall.ERROR
    return Overall.HEALTHY if conditions <= {Condition.OK} else Overall.DEGRADED


def slow_halves(before: FirstChunks, now: FirstChunks, edges_ms: Sequence[float]) -> dict[str, float]:
    """By model: the time before which at most half of the streams between two counts began, as far as edges tell.

    Where an answer was a fallback, the time it took is also that of the models before it, so such cells tell nothing.
    """
    counts: dict[str, list[int]] = {}
    for labels, (fallbacks, streams) in now.items():
        fallbacks_before, streams_before = before.get(labels, (0, (0,) * len(streams)))
        if fallbacks == fallbacks_before:
            total = counts.setdefault(labels[1], [0] * len(streams))
            for place, (later, earlier) in enumerate(zip(streams, streams_before, strict=True)):
                total[place] += later - earlier
    return {
        model: _edge_below_median(streams, edges_ms)
        for model, streams in counts.items()
        if sum(streams) >= MIN_STREAMS
    }  # fmt: skip


def _edge_below_median(streams: Sequence[int], edges_ms: Sequence[float]) -> float:
    half, seen = sum(streams) / 2, 0
    for lower, count in zip((0.0, *edges_ms), streams, strict=True):
        seen += count
        if seen > half:
            return lower
    raise AssertionError("BUG: no streams have no median")


def retirement(probe: Probe, known_s: float | None, wall_s: float) -> float | None:
    """When a model is withdrawn, in unix seconds: `known_s` is what was known, which a look that failed leaves be."""
    if probe.finding is Finding.HERE:
        return probe.card.retires_s if probe.card is not None else None
    if probe.finding in (Finding.GONE, Finding.ARCHIVED):
        return wall_s if known_s is None else min(known_s, wall_s)
    return known_s
