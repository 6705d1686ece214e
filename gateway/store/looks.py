"""A look at an experiment: what its calls say by now, gathered from the store and compared.

Takes a second or so per 100,000 calls, so it is for a thread or a command, never for a call's way.
"""

from gateway.decide.compare import evidence_of
from gateway.decide.rollout_evidence import Look
from gateway.decide.rollout_plan import RolloutPlan
from gateway.domain.rollout import RolloutState
from gateway.store.experiments import Experiments


def look_at(experiments: Experiments, env: str, state: RolloutState, plan: RolloutPlan, *, now_ms: int) -> Look:
    """All that the present experiment of this rollout has seen until now. Raises `StoreError`."""
    agent, experiment = state.agent, state.experiment
    rows = experiments.user_sums(env, agent, experiment=experiment)
    arrivals = experiments.arrivals(env, agent, experiment=experiment)
    treated, control = experiments.users_at_stage(env, agent, experiment=experiment, stage=state.stage)
    return Look(evidence_of(rows, arrivals, plan.terms), now_ms, experiment, state.stage, treated, control)
