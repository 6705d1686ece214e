"""The plan of a rollout: each share, what it waits for, and a ceiling that no stage passes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.decide.rollout_plan import STALE_CHECKS, Stage, rollout_plan
from gateway.domain.experiment import Guardrail, Terms
from gateway.domain.policy import Policy
from gateway.domain.rollout_policy import Rollout, check_rollout
from tests.rolling import plan_of


def test_the_last_stage_is_lowered_by_the_holdback() -> None:
    plan = plan_of("stages = [10, 50, 100]\nholdback_percent = 5\nbake_s = [60, 120, 0.5]\nmin_users = 7")
    assert plan.stages == (Stage(1_000, 60_000, 7), Stage(5_000, 120_000, 7), Stage(9_500, 500, 7))
    assert plan.ceiling_bps == 9_500


@pytest.mark.parametrize(
    ("share", "next_share", "in_stage"),
    [(0, 1_000, 1_000), (999, 1_000, 1_000), (1_000, 5_000, 1_000), (4_999, 5_000, 1_000), (5_000, 10_000, 5_000),
     (9_999, 10_000, 5_000), (10_000, None, 10_000)],
)  # fmt: skip
def test_a_share_between_two_stages_is_in_the_one_it_has_reached(
    share: int, next_share: int | None, in_stage: int
) -> None:
    plan = plan_of("stages = [10, 50, 100]")
    assert plan.next_bps(share) == next_share
    assert plan.stage_at(share).share_bps == in_stage


@pytest.mark.parametrize(("start", "begins_at"), [(0, 0), (10, 1_000), (95, 9_500), (100, 9_500)])
def test_a_start_leaves_the_holdback(start: float, begins_at: int) -> None:
    assert plan_of("holdback_percent = 5", start=start).start_bps == begins_at


def test_the_margins_of_times_and_costs_are_ratios_and_those_of_rates_are_not() -> None:
    plan = plan_of(
        "guardrails = { success_rate = 0.02, p95_latency = 0.2, mean_latency = 0.1, cost_per_request = 4, "
        "satisfaction = 0.05 }"
    )
    assert set(plan.terms.guardrails) == {
        Guardrail("success_rate", 0.02, is_relative=False),
        Guardrail("p95_latency", 0.2, is_relative=True),
        Guardrail("mean_latency", 0.1, is_relative=True),
        Guardrail("cost_per_request", 4.0, is_relative=True),
        Guardrail("satisfaction", 0.05, is_relative=False),
    }


def test_an_agent_of_its_own_mind_has_a_plan_of_its_own() -> None:
    text = (
        "guardrails.success_rate = 0.02\nalpha = 0.01\ncheck_every_s = 10\n"
        '[agents.qa_agent]\nmode = "automatic"\nstages = [1]'
    )
    assert plan_of(text).is_automatic
    assert [stage.share_bps for stage in plan_of(text).stages] == [100]
    assert not plan_of(text, agent="legal_agent").is_automatic
    assert plan_of(text).terms == Terms((Guardrail("success_rate", 0.02),), alpha=0.01)
    assert plan_of(text).stale_ms == STALE_CHECKS * 10_000


@given(
    st.lists(st.integers(1, 10_000), min_size=1, max_size=8, unique=True),
    st.integers(0, 5_000),
    st.integers(0, 10_000),
)
def test_whatever_passes_the_check_only_rises_and_never_passes_the_ceiling(
    stages: list[int], holdback: int, share: int
) -> None:
    rollout = Rollout(stages=tuple(bps / 100 for bps in sorted(stages)), holdback_percent=holdback / 100)
    if check_rollout(rollout, (), is_experiment=True):
        return
    plan = rollout_plan(Policy(rollout=rollout), "qa_agent")
    shares = [stage.share_bps for stage in plan.stages]
    assert shares == sorted(set(shares))
    assert 0 < shares[0] <= shares[-1] <= plan.ceiling_bps == 10_000 - holdback
    following = plan.next_bps(share)
    assert following is None or following > share
