"""One agent's rollout as its policy wants it, in whole users of 10,000: which share comes next, and what it waits for.

Knows no state. Its one invariant: no share it names is above `ceiling_bps`, so the holdback keeps its control.
"""

from typing import NamedTuple

from gateway.domain.experiment import Guardrail, Terms
from gateway.domain.policy import Policy
from gateway.domain.rollout_policy import ALL_BPS, RELATIVE_METRICS, RollbackOn, bps_of

# Evidence that nobody has renewed for so many checks counts as none: whoever gathers it has stopped.
STALE_CHECKS = 4


class Stage(NamedTuple):
    """A share, how long it must be left in force, and how many users each arm must have seen in that time."""

    share_bps: int
    bake_ms: int
    min_users: int


class RolloutPlan(NamedTuple):
    """What governs one agent's rollout. `stages` rise; `terms` are those of the comparison that its evidence is.

    `longest_ms`: whatever began so long ago has ended, so that it is known of either arm.
    """

    is_automatic: bool
    start_bps: int
    ceiling_bps: int
    stages: tuple[Stage, ...]
    terms: Terms
    rollback_on: RollbackOn
    check_every_s: float
    longest_ms: int = 0

    def stage_at(self, share_bps: int) -> Stage:
        """The stage that this share is in: the last one it has reached; the first where it has reached none."""
        reached = [stage for stage in self.stages if stage.share_bps <= share_bps]
        return reached[-1] if reached else self.stages[0]

    def next_bps(self, share_bps: int) -> int | None:
        """The first stage above this share, or None above all."""
        return next((stage.share_bps for stage in self.stages if stage.share_bps > share_bps), None)

    @property
    def stale_ms(self) -> float:
        """The age from which evidence counts as none."""
        return STALE_CHECKS * self.check_every_s * 1_000


def rollout_plan(policy: Policy, agent: str) -> RolloutPlan:
    """The plan of this agent, from a policy that was checked."""
    rollout = policy.rollout.of_agent(agent)
    ceiling = ALL_BPS - bps_of(rollout.holdback_percent)
    count = len(rollout.stages)
    bakes_s = rollout.bake_s if isinstance(rollout.bake_s, tuple) else (rollout.bake_s,) * count
    users = rollout.min_users if isinstance(rollout.min_users, tuple) else (rollout.min_users,) * count
    guardrails = tuple(
        Guardrail(metric, margin, metric in RELATIVE_METRICS) for metric, margin in rollout.guardrails.items()
    )
    return RolloutPlan(
        is_automatic=rollout.mode == "automatic",
        start_bps=min(bps_of(policy.ab_testing.rollout_percentage), ceiling),
        ceiling_bps=ceiling,
        stages=tuple(
            Stage(min(bps_of(percent), ceiling), round(bake_s * 1_000), least)
            for percent, bake_s, least in zip(rollout.stages, bakes_s, users, strict=True)
        ),
        terms=Terms(guardrails, rollout.alpha),
        rollback_on=rollout.rollback_on,
        check_every_s=rollout.check_every_s,
    )
