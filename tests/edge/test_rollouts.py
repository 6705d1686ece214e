"""The shares in force: the files' plan with the latest states put in, whichever of the two came last."""

import logging
from collections.abc import Mapping
from pathlib import Path

import msgspec
import pytest

from gateway.domain.rollout import Phase, RolloutState
from gateway.edge.rollouts import Rollouts
from tests.rolling import begun
from tests.running import running_gateway
from tests.steering import ROLLOUT

FIRST = begun()


def at(share_bps: int, version: int, agent: str = "qa_agent") -> RolloutState:
    return msgspec.structs.replace(FIRST, agent=agent, share_bps=share_bps, version=version, stage=version)


def news(*states: RolloutState, env: str = "dev") -> Mapping[tuple[str, str], RolloutState]:
    return {(env, state.agent): state for state in states}


async def test_calls_go_by_the_store_and_not_by_the_policy(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, policy=ROLLOUT) as gateway:
        runtime = gateway.runtime
        rollouts = Rollouts(runtime)
        rollouts.heard(news(at(2500, 7)))
        plan = runtime.plan.agents["qa_agent"]
        assert (plan.share_bps, plan.stage, plan.experiment) == (2500, 7, 1)
        # Of another environment on the same store.
        rollouts.heard(news(at(7500, 8), env="staging"))
        assert runtime.plan.agents["qa_agent"].share_bps == 2500


async def test_old_news_changes_nothing_whichever_way_it_comes(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, policy=ROLLOUT) as gateway:
        rollouts, plan = Rollouts(gateway.runtime), gateway.runtime.plan
        rollouts.heard(news(at(2500, 7)))
        # What a reload asked for before, and what a sync had read before that.
        rollouts.take_plan(plan, news(at(1000, 6)))
        rollouts.heard(news(at(1000, 6)))
        assert gateway.runtime.plan.agents["qa_agent"].share_bps == 2500
        # News that does not have it at all, as it was read before it began.
        rollouts.heard({})
        assert gateway.runtime.plan.agents["qa_agent"].share_bps == 2500
        rollouts.take_plan(plan, news(at(0, 8)))
        assert gateway.runtime.plan.agents["qa_agent"].share_bps == 0


async def test_an_agent_that_left_the_files_and_came_back_has_its_share_again(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, policy=ROLLOUT) as gateway:
        rollouts, plan = Rollouts(gateway.runtime), gateway.runtime.plan
        rollouts.heard(news(at(2500, 7), at(5000, 3, "left_agent")))
        smaller = plan._replace(
            agents={"support_agent": plan.agents["support_agent"]},
            rollouts={"support_agent": plan.rollouts["support_agent"]},
        )
        rollouts.take_plan(smaller, {})
        shown = {labels for _, values in rollouts.figures() for labels, _ in values}
        assert not {labels for labels in shown if "qa_agent" in labels or "left_agent" in labels}
        rollouts.heard(news(at(5000, 8)))
        rollouts.take_plan(plan, {})
        assert gateway.runtime.plan.agents["qa_agent"].share_bps == 5000


async def test_the_phase_is_one_among_all(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, policy=ROLLOUT) as gateway:
        rollouts = Rollouts(gateway.runtime)
        rollouts.heard(news(at(2500, 7)))
        figures = {declared.name: dict(values) for declared, values in rollouts.figures()}
        phases = {phase: figures["gateway_rollout_phase"]["qa_agent", phase.value] for phase in Phase}
        assert phases == {phase: float(phase is Phase.RAMPING) for phase in Phase}
        assert figures["gateway_rollout_stage"] == {("qa_agent",): 7}


@pytest.mark.parametrize(
    ("start", "warned"), [("10", False), ("25", True), ("0", True)], ids=["the same", "higher", "lower"]
)
async def test_another_start_than_before_is_told_to_change_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, start: str, warned: bool
) -> None:
    policy = ROLLOUT.replace("rollout_percentage = 10", f"rollout_percentage = {start}")
    async with running_gateway(tmp_path, policy=ROLLOUT) as gateway:
        with caplog.at_level(logging.WARNING, "gateway.rollout"):
            await gateway.reload(policy=policy)
            # The next reload changes nothing more.
            await gateway.reload()
        assert {agent.share_bps for agent in gateway.runtime.plan.agents.values()} == {1000}
        found = [record.message for record in caplog.records]
        assert len(found) == warned
        for line in found:
            assert f"rollout_percentage is {start} now, and says only where a rollout starts" in line
            assert f"qa_agent at 10 %, support_agent at 10 %. `gateway rollout set {start}` changes that" in line


async def test_who_writes_into_the_files_what_is_in_force_is_not_warned(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with running_gateway(tmp_path, policy=ROLLOUT) as gateway:
        assert gateway.gateway._rollouts is not None
        gateway.gateway._rollouts.heard(news(at(2500, 7), at(2500, 7, "support_agent")))
        with caplog.at_level(logging.WARNING, "gateway.rollout"):
            await gateway.reload(policy=ROLLOUT.replace("rollout_percentage = 10", "rollout_percentage = 25"))
        assert caplog.records == []
