"""Experiments in a store, as gateways would have left them: outcomes of users with habits, states, the audit log.

states = climb(store, plan, env="production", agent="qa_agent")    # 10 %, 25 % after three days, 50 % after six
tell(store, calls_of(states, env="production"))
"""

from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

from gateway.decide.assign import bucket_of, is_treated
from gateway.decide.rollout import Cause, begin, change_by
from gateway.decide.rollout_plan import RolloutPlan
from gateway.domain.outcome import Feedback, Outcome
from gateway.domain.rollout import PILOT, Event, RolloutState
from gateway.store.experiments import Experiments
from gateway.store.sqlite import SqliteStore
from gateway.store.store import Batch
from tests.ledgers import DAY_MS, NOON_MS

BEGAN_MS = NOON_MS - 7 * DAY_MS


class Effect(NamedTuple):
    """What the fine-tuned model does: its success rate, and how much slower, dearer and better liked it is."""

    success: float = 0.96
    slower: float = 0.9
    dearer: float = 1.2
    happier: float = 0.1


def climb(
    store: Path,
    plan: RolloutPlan,
    *,
    env: str,
    agent: str,
    steps: Sequence[tuple[int, int]] = ((3, 2_500), (6, 5_000)),
    began_ms: int = BEGAN_MS,
) -> list[tuple[int, RolloutState]]:
    """A rollout that begins and is raised, after so many days to such shares; each state with its beginning."""
    states = []
    with Experiments(store, clock=lambda: began_ms / 1000) as experiments:
        decision = begin(agent, plan=plan, now_ms=began_ms)
        assert decision.change is not None
        states.append((began_ms, experiments.begin(env, decision.change)))
        for days, share_bps in steps:
            at_ms = began_ms + days * DAY_MS
            reasons = ("every guardrail holds, and it has baked",)
            change = change_by(states[-1][1], Event.RAISED, share_bps, Cause(at_ms, PILOT, reasons)).change
            assert change is not None
            states.append((at_ms, experiments.apply(env, change)))
    return states


def calls_of(
    states: Sequence[tuple[int, RolloutState]],
    *,
    env: str,
    until_ms: int = NOON_MS,
    users: int = 600,
    effect: Effect = Effect(),  # noqa: B008 - it never changes
    seed: int = 7,
) -> list[Outcome]:
    """A call or so of each user on each day, more by day than by night."""
    random = Random(seed)
    agent = states[0][1].agent
    found = []
    for user in (f"user-{number:04}" for number in range(users)):
        bucket, pace = bucket_of(agent, user), random.lognormvariate(0, 0.4)
        at_ms = states[0][0]
        while (at_ms := at_ms + int(random.expovariate(1.3 * pace) * DAY_MS)) < until_ms:
            state = [state for since_ms, state in states if since_ms <= at_ms][-1]
            found.append(_call(random, state, user, bucket, at_ms, pace, effect, env))
    return sorted(found, key=lambda call: (call.at_ms, call.id))


def tell(store: Path, calls: Sequence[Outcome], *, liked: float = 0.3, seed: int = 8) -> None:
    """Bring calls to the store as a gateway does; users speak of some of them."""
    random = Random(seed)
    opened = SqliteStore(store, clock=lambda: NOON_MS / 1000)
    opened.join("gateway-1", ())
    opened.sync(Batch(outcomes=calls))
    opened.close()
    with Experiments(store, clock=lambda: NOON_MS / 1000) as experiments:
        for call in calls:
            if random.random() < liked:
                mood = 0.2 + (Effect().happier if call.variant == "finetuned" else 0)
                score = max(-1.0, min(1.0, random.gauss(mood, 0.5)))
                experiments.give_feedback(Feedback(call.id, call.key, call.at_ms + 60_000, score, ""))


def _call(
    random: Random, state: RolloutState, user: str, bucket: int, at_ms: int, pace: float, effect: Effect, env: str
) -> Outcome:  # fmt: skip
    treated = is_treated(bucket, state.share_bps)
    is_success: bool | None = random.random() < (effect.success if treated else 0.95)
    if random.random() < 0.004:
        is_success = None
    latency_ms = 800 * random.lognormvariate(0, 0.45) * (effect.slower if treated else 1) * pace**0.2
    cost_nusd = int(180_000 * random.lognormvariate(0, 0.5) * (effect.dearer if treated else 1))
    return Outcome(
        id=f"req-{state.agent}-{user}-{at_ms}", at_ms=at_ms, env=env, agent=state.agent, experiment=state.experiment,
        stage=state.stage, share_bps=state.share_bps, variant="finetuned" if treated else "baseline", bucket=bucket,
        user=user, key="web", operation="inference", model="mistral/ft" if treated else "mistral/base",
        is_success=is_success, is_fallback=treated and random.random() < 0.02,
        error="" if is_success is not False else random.choice(("server_error", "server_error", "stall")),
        latency_ms=latency_ms, first_chunk_ms=None, cost_nusd=cost_nusd, prompt_tokens=200, completion_tokens=300,
    )  # fmt: skip
