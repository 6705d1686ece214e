"""The shape of a policy's [rollout] section: the stages a share climbs, and what must hold before each step.

It is the plan, and never the state: how far a rollout has come stands in the store (domain/rollout.py). Its one
invariant: what `check_rollout` passes is a schedule that only rises and leaves the control that it promises.
"""

from collections.abc import Collection
from itertools import pairwise
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from gateway.domain.experiment import GRID_RATIO, Metric
from gateway.domain.reading import Problem, join, nearest

Mode = Literal["manual", "automatic"]
RollbackOn = Literal["nothing", "breached", "worse"]
Percent = Annotated[float, Meta(ge=0, le=100)]
Holdback = Annotated[float, Meta(ge=0, le=50)]
# A stage may well last a week, so this reaches further than the Seconds of timeouts.
BakeSeconds = Annotated[float, Meta(ge=0, le=30 * 86_400)]
Users = Annotated[int, Meta(ge=1, le=10_000_000)]
Margin = Annotated[float, Meta(ge=0)]

ALL_BPS = 10_000
# The metrics whose margin is a share of the control's value; those of the others are in the metric's own unit.
RELATIVE_METRICS: frozenset[Metric] = frozenset({"mean_latency", "p95_latency", "cost_per_request"})
# How finely a p95 can be told (domain/experiment.py:GRID_RATIO).
P95_STEP = round(GRID_RATIO - 1, 9)
# Above these a margin allows anything. Mostly it is a percentage that was written as such.
_MOST: dict[Metric, tuple[float, str]] = {
    "success_rate": (0.5, "a share: 0.02 allows two points less"),
    "mean_latency": (10.0, "a ratio: 0.20 allows a fifth more"),
    "p95_latency": (10.0, "a ratio: 0.20 allows a fifth more"),
    "cost_per_request": (10.0, "a ratio: 0.20 allows a fifth more"),
    "satisfaction": (2.0, "on the scale from -1 to 1: 0.05 allows that much less"),
}


class AgentRollout(msgspec.Struct, frozen=True, kw_only=True):
    """What is otherwise for one agent. What is left out is as for all; guardrails are put in one by one."""

    mode: Mode | None = None
    stages: tuple[Percent, ...] | None = None
    holdback_percent: Holdback | None = None
    bake_s: BakeSeconds | tuple[BakeSeconds, ...] | None = None
    min_users: Users | tuple[Users, ...] | None = None
    guardrails: dict[Metric, Margin] = {}
    rollback_on: RollbackOn | None = None


class Rollout(msgspec.Struct, frozen=True, kw_only=True):
    """How the share of users with the fine-tuned model rises, and what takes it back.

    `bake_s` and `min_users` (in each arm) are one number for all stages, or one for each. `guardrails`: how much worse
    each metric may be. `mode` says who raises the share; `rollback_on`, in either mode, what takes it back by itself.
    """

    mode: Mode = "manual"
    stages: tuple[Percent, ...] = (10.0, 25.0, 50.0, 75.0, 100.0)
    holdback_percent: Holdback = 0.0
    bake_s: BakeSeconds | tuple[BakeSeconds, ...] = 86_400.0
    min_users: Users | tuple[Users, ...] = 200
    guardrails: dict[Metric, Margin] = {}
    rollback_on: RollbackOn = "breached"
    alpha: Annotated[float, Meta(gt=0, lt=0.5)] = 0.05
    check_every_s: Annotated[float, Meta(ge=1, le=3_600)] = 30.0
    agents: dict[str, AgentRollout] = {}

    def of_agent(self, agent: str) -> "Rollout":
        """The section as it holds for this agent."""
        own = self.agents.get(agent)
        if own is None:
            return self
        said = {name: value for name, value in msgspec.structs.asdict(own).items() if value is not None}
        said["guardrails"] = {**self.guardrails, **own.guardrails}
        return msgspec.structs.replace(self, **said)


def bps_of(percent: float) -> int:
    """A percentage in hundredths of a percent, which is how finely users can be divided."""
    return round(percent * ALL_BPS / 100)


def check_rollout(rollout: Rollout, agents: Collection[str], *, is_experiment: bool) -> list[Problem]:
    """What the types cannot say. `is_experiment`: whether ab_testing.enabled is true."""
    problems = _check_schedule("rollout", rollout, is_experiment=is_experiment)
    everywhere = {_bare("rollout", problem) for problem in problems}
    for agent in rollout.agents:
        key = join("rollout.agents", agent)
        if agent not in agents:
            known = ", ".join(sorted(agents))
            fix = f"no such agent; known: {known}{nearest(agent, agents)}"
            problems.append(Problem(key=key, found="", fix=fix))
        # What is wrong for all is said once.
        own = _check_schedule(key, rollout.of_agent(agent), is_experiment=is_experiment)
        problems += [problem for problem in own if _bare(key, problem) not in everywhere]
    return problems


def _check_schedule(key: str, rollout: Rollout, *, is_experiment: bool) -> list[Problem]:
    problems: list[Problem] = []

    def wrong(name: str, found: object, fix: str) -> None:
        problems.append(Problem(key=f"{key}.{name}", found=str(found), fix=fix))

    stages = [bps_of(percent) for percent in rollout.stages]
    shown = f"[{', '.join(f'{percent:g}' for percent in rollout.stages)}]"
    if not stages:
        wrong("stages", shown, "wants at least one percentage, such as [10, 25, 50, 75, 100]")
    elif stages[0] < 1 or any(after <= before for before, after in pairwise(stages)):
        wrong("stages", shown, "must begin above 0 and rise from stage to stage, by 0.01 at least")
    most = 100 - rollout.holdback_percent
    if len(stages) > 1 and stages[-2] >= bps_of(most):
        fix = f"leaves {most:g} %, and only the last stage may reach it; take stages from {most:g} on out, but the last"
        wrong("holdback_percent", f"{rollout.holdback_percent:g}", fix)
    for name, value in (("bake_s", rollout.bake_s), ("min_users", rollout.min_users)):
        if isinstance(value, tuple) and len(value) != len(stages):
            fix = f"has {len(value)} numbers for {len(stages)} stages; write one for each, or one number for all"
            wrong(name, f"[{', '.join(f'{number:g}' for number in value)}]", fix)
    for metric, margin in rollout.guardrails.items():
        highest, meaning = _MOST[metric]
        if margin > highest:
            wrong(f"guardrails.{metric}", f"{margin:g}", f"must not be above {highest:g}; it is {meaning}")
        if metric == "p95_latency" and margin < P95_STEP:
            fix = f"must not be below {P95_STEP:g}: latencies are counted in steps of {P95_STEP:.0%}"
            wrong(f"guardrails.{metric}", f"{margin:g}", fix)
    if rollout.mode == "automatic" and not rollout.guardrails:
        wrong("mode", '"automatic"', f"wants a guardrail to go by, such as {key}.guardrails.success_rate = 0.02")
    if rollout.mode == "automatic" and not is_experiment:
        wrong("mode", '"automatic"', "there is no rollout while ab_testing.enabled is false")
    return problems


def _bare(key: str, problem: Problem) -> tuple[str, str]:
    return problem.key.removeprefix(key), problem.found
