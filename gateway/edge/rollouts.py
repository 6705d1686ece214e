"""The shares in force in this process: where the rollouts stand in the store, whatever the policy started them at.

States come from two sides, the store's news and what is asked of it at a reload, and may overtake each other. The
invariants: the plan in force is always the one of the files with the latest states put in, whichever came last; and a
rollout never goes back to a state it has left.
"""

import logging
from collections.abc import Iterator, Mapping

from gateway.decide.plan import Plan
from gateway.decide.rollout_words import percent
from gateway.domain.rollout import Phase, RolloutState
from gateway.edge.runtime import Runtime
from gateway.telemetry.distribution import Figures
from gateway.telemetry.metrics import PHASE, STAGE

log = logging.getLogger("gateway.rollout")
# By environment and agent: a store may serve several environments.
States = Mapping[tuple[str, str], RolloutState]


class Rollouts:
    """Puts states into plans."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        # As the files have it.
        self._plan = runtime.plan
        # Also of agents that the files name no more: they may come back, and their users with them.
        self._states: dict[str, RolloutState] = {}

    @property
    def states(self) -> Mapping[str, RolloutState]:
        """Where the rollouts of this environment stand, by agent."""
        return self._states

    def heard(self, states: States) -> None:
        """The store tells of these: calls that begin from now on go by those of ours."""
        self._learn(states)
        self._put_in_force()

    def take_plan(self, plan: Plan, states: States) -> None:
        """The files say something else now, and these rollouts were found or begun for it."""
        before, self._plan = self._plan, plan
        self._learn(states)
        self._put_in_force()
        if before.is_experiment and plan.is_experiment:
            self._warn_of_start(before, plan)

    def figures(self) -> Iterator[Figures]:
        """How far the rollouts of the agents there are have come."""
        shown = [state for agent, state in self._states.items() if agent in self._plan.rollouts]
        yield PHASE, [((state.agent, phase.value), float(state.phase is phase)) for state in shown for phase in Phase]
        yield STAGE, [((state.agent,), state.stage) for state in shown]

    def _learn(self, states: States) -> None:
        for (env, agent), state in states.items():
            known = self._states.get(agent)
            if env == self._plan.env and (known is None or state.version > known.version):
                self._states[agent] = state

    def _put_in_force(self) -> None:
        runtime = self._runtime
        plan = self._plan.with_rollouts(self._states)
        runtime.observer.take_plan(plan)
        # Last, in one assignment: a call sees the old plan or the new one.
        runtime.plan = plan

    def _warn_of_start(self, before: Plan, plan: Plan) -> None:
        """Somebody who writes another start into the policy most likely means the share."""
        stay = [
            state
            for agent, state in self._states.items()
            if agent in plan.agents
            and agent in before.agents
            and before.agents[agent].share_bps != plan.agents[agent].share_bps != state.share_bps
        ]
        if stay:
            shares = ", ".join(f"{state.agent} at {percent(state.share_bps)}" for state in stay)
            wanted = plan.agents[stay[0].agent].share_bps / 100
            log.warning(
                "ab_testing.rollout_percentage is %g now, and says only where a rollout starts; those that have begun "
                "stay where they are: %s. `gateway rollout set %g` changes that",
                wanted, shares, wanted,
            )  # fmt: skip
