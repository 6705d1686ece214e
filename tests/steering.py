"""Rollouts in a store for tests of those who steer them: what users saw at a share, and a time that is handed in.

bring(store, users_at(state))                          # 2,000 users, a call each or two, nothing wrong
bring(store, users_at(state, success=(0.97, 0.5)))     # ... and the fine-tuned model fails half of them
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from random import Random

from gateway.decide.assign import bucket_of, is_treated
from gateway.domain.outcome import Outcome
from gateway.domain.rollout import Change, RolloutState, replay
from gateway.store.experiments import Experiments
from gateway.store.sqlite import SqliteStore
from gateway.store.store import Batch
from tests.outcomes import outcome

DAY_MS = 86_400_000
NOON_MS = 1_795_262_400_000  # 2026-11-21T12:00:00Z
# An hour to bake, 50 users in each arm, 5 % held back; looked at by hand only.
ROLLOUT = """
[models]
use_finetuned = true
[ab_testing]
enabled = true
rollout_percentage = 10
[rollout]
mode = "automatic"
holdback_percent = 5
bake_s = 3600
min_users = 50
check_every_s = 3600
guardrails = { success_rate = 0.1, p95_latency = 0.5 }
[overrides]
variant = false
"""
MANUAL = ROLLOUT.replace('"automatic"', '"manual"')


class Clock:
    """A time that passes only where a test says so."""

    def __init__(self, now_ms: int = NOON_MS) -> None:
        self.now_ms = now_ms

    def __call__(self) -> float:
        return self.now_ms / 1000

    def passes(self, seconds: float) -> None:
        self.now_ms += round(seconds * 1000)


def users_at(
    state: RolloutState,
    *,
    users: int = 2_000,
    success: tuple[float, float] = (0.97, 0.97),
    dropped: float = 0.0,
    env: str = "dev",
    seed: int = 7,
) -> list[Outcome]:
    """A call or two of each user in the state's stage; `success` of baseline and fine-tuned model.

    `dropped`: so many of the treated users never arrive.
    """
    random = Random(seed)
    found = []
    for number in range(users):
        user = f"user-{number}"
        bucket = bucket_of(state.agent, user)
        treated = is_treated(bucket, state.share_bps)
        if treated and random.random() < dropped:
            continue
        for call in range(random.randint(1, 2)):
            found.append(
                outcome(
                    f"{state.agent}-{state.stage}-{number}-{call}",
                    at_ms=state.share_since_ms + 1_000 + number,
                    env=env, agent=state.agent, experiment=state.experiment, stage=state.stage,
                    share_bps=state.share_bps, variant="finetuned" if treated else "baseline", bucket=bucket,
                    user=user, is_success=random.random() < success[treated],
                    latency_ms=800 * random.lognormvariate(0, 0.3),
                )
            )  # fmt: skip
    return found


def bring(store: Path, calls: Sequence[Outcome]) -> None:
    """Tell the store of calls, as a gateway does."""
    opened = SqliteStore(store, clock=lambda: NOON_MS / 1000)
    opened.join("another-gateway", ())
    opened.sync(Batch(outcomes=calls))
    opened.leave()
    opened.close()


def told(store: Path, env: str = "dev") -> tuple[dict[str, RolloutState], list[Change]]:
    """Where the rollouts stand and every change to them; the changes lead there, without a gap."""
    with Experiments(store, clock=lambda: NOON_MS / 1000, is_new_allowed=False) as experiments:
        states, changes = experiments.states(env), experiments.changes(env)
    for agent, state in states.items():
        assert replay(of_agent(changes, agent)) == state
    return states, changes


def of_agent(changes: Iterable[Change], agent: str) -> list[Change]:
    """Its changes, in their order."""
    return sorted((change for change in changes if change.agent == agent), key=lambda change: change.version)
