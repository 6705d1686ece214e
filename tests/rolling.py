"""Evidence and plans for tests of rollouts, each a good one unless something else is asked for.

look = look_of(state, success_rate=found("breached", verdict="worse"))
"""

import tomllib
from typing import NamedTuple

from gateway.decide.rollout import Decision, begin
from gateway.decide.rollout_evidence import Look
from gateway.decide.rollout_plan import RolloutPlan, rollout_plan
from gateway.decide.rollout_words import MORE_IS_BETTER
from gateway.domain.experiment import (
    METRICS,
    Evidence,
    Finding,
    Guardrail,
    GuardVerdict,
    Metric,
    Mismatch,
    Verdict,
)
from gateway.domain.policy import Policy
from gateway.domain.reading import Problem, read_struct
from gateway.domain.rollout import RolloutState

NOW_MS = 1_795_219_200_000
HOUR_MS = 3_600_000
# Two guardrails, an hour to bake, 100 users in each arm, 5 % held back.
AUTOMATIC = """
mode = "automatic"
holdback_percent = 5
bake_s = 3600
min_users = 100
guardrails = { success_rate = 0.02, p95_latency = 0.20 }
"""


def plan_of(rollout: str = AUTOMATIC, *, start: float = 10, agent: str = "qa_agent") -> RolloutPlan:
    """The plan of an agent under a policy with this [rollout] section."""
    problems: list[Problem] = []
    table = {"ab_testing": {"enabled": True, "rollout_percentage": start}, "rollout": tomllib.loads(rollout)}
    policy = read_struct(Policy, table, "", problems)
    assert policy is not None, problems
    return rollout_plan(policy, agent)


PLAN = plan_of()
MANUAL = plan_of(AUTOMATIC.replace('"automatic"', '"manual"'))


class Found(NamedTuple):
    """What is concluded from a metric."""

    guard: GuardVerdict
    verdict: Verdict = "undecided"
    # Worse, and by its likeliest value within every margin there is here.
    is_slight: bool = False


def begun(plan: RolloutPlan = PLAN) -> RolloutState:
    """A rollout that has just begun."""
    return first(plan).state


def first(plan: RolloutPlan = PLAN) -> Decision:
    """Its first step."""
    return begin("qa_agent", plan=plan, now_ms=NOW_MS)


def look_of(
    state: RolloutState,
    at_ms: int = NOW_MS + HOUR_MS,
    *,
    plan: RolloutPlan = PLAN,
    users: tuple[int, int] = (100, 100),
    is_mismatch: bool = False,
    **found: Found,
) -> Look:
    """A look at this state's experiment. Where nothing else is asked for every guardrail holds."""
    guardrails = {guardrail.metric: guardrail for guardrail in plan.terms.guardrails}
    findings = tuple(finding_of(metric, found.get(metric), guardrails.get(metric)) for metric in METRICS)
    mismatch = Mismatch(is_mismatch, 5_000.0 if is_mismatch else 0.7, 0.10, 0.08 if is_mismatch else 0.10, 4_000)
    evidence = Evidence(findings, 2_000, 9_000, mismatch)
    return Look(evidence, at_ms, state.experiment, state.stage, *users)


def finding_of(metric: Metric, found: Found | None, guardrail: Guardrail | None) -> Finding:
    """One metric's finding, the treated arm a tenth above the control, or worse by three tenths."""
    guard, verdict, is_slight = found or Found("holds" if guardrail else "none")
    control = {"success_rate": 0.80, "cost_per_request": 200_000.0, "satisfaction": 0.4}.get(metric, 800.0)
    change = 0.1
    if verdict == "worse":
        change = (0.01 if is_slight else 0.3) * (-1 if metric in MORE_IS_BETTER else 1)
    return Finding(
        metric, verdict, guard, treated=control * (1 + change), control=control, difference=control * change,
        low=control * (change - 0.2), high=control * (change + 0.2), relative=change, relative_low=change - 0.2,
        relative_high=change + 0.2, users_treated=2_000, users_control=9_000, calls_treated=4_000,
        calls_control=18_000, guardrail=guardrail,
    )  # fmt: skip
