"""A look at an experiment: what its calls say by now, gathered from the store and compared.

Takes a second or so per 100,000 calls, so it is for a process or a command, never for a call's way.
"""

from gateway.decide.compare import evidence_of
from gateway.decide.rollout_evidence import Look
from gateway.decide.rollout_plan import RolloutPlan
from gateway.domain.rollout import RolloutState
from gateway.store.experiments import Experiments


def look_at(experiments: Experiments, env: str, state: RolloutState, plan: RolloutPlan, *, now_ms: int) -> Look:
    """All that the present experiment of this rollout has seen until now. Raises `StoreError`.

    Users arrive with their first call, of which the store hears at its end. Those of the slower arm would be missing
    for longer, so arrivals are counted up to when every call has ended, whatever it is.
    """
    agent, experiment = state.agent, state.experiment
    rows = experiments.user_sums(env, agent, experiment=experiment)
    arrivals = experiments.arrivals(env, agent, experiment=experiment, until_ms=now_ms - plan.longest_ms)
    treated, control = experiments.users_at_stage(env, agent, experiment=experiment, stage=state.stage)
    return Look(evidence_of(rows, arrivals, plan.terms), now_ms, experiment, state.stage, treated, control)
