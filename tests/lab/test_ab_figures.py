"""The figures of an A/B report: the comparison's own, over the calls of the time that was asked for."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.decide.compare import evidence_of
from gateway.decide.plan import Plan
from gateway.decide.rollout import recommendation
from gateway.domain.experiment import METRICS, Finding, Guardrail, Terms
from gateway.domain.outcome import Outcome
from gateway.lab.ab_figures import AgentFigures, Asked, effect_of, gather, nothing
from gateway.store.experiments import Experiments
from gateway.store.looks import look_at
from tests.ledgers import DAY_MS, NOON_MS
from tests.planning import plan_of
from tests.trials import BEGAN_MS, calls_of, climb, tell

POLICY = """
[ab_testing]
enabled = true
rollout_percentage = 10
[rollout]
holdback_percent = 5
guardrails = { success_rate = 0.05, p95_latency = 0.20 }
"""
PLAN = plan_of(POLICY, env="production")
WINDOWS = (("24h", DAY_MS), ("6d", 6 * DAY_MS), ("30d", 30 * DAY_MS), ("all", None))
TODAY = Asked(NOON_MS - DAY_MS, NOON_MS)
NOW = Asked(None, NOON_MS, windows=WINDOWS)


class Desk:
    """Two agents' experiments, in their second week."""

    def __init__(self, path: Path) -> None:
        self.calls: dict[str, list[Outcome]] = {}
        for number, agent in enumerate(("qa_agent", "legal_agent")):
            states = climb(path, PLAN.rollouts[agent], env="production", agent=agent)
            self.calls[agent] = calls_of(states, env="production", users=400, seed=number)
            tell(path, self.calls[agent])
        self.experiments = Experiments(path, clock=lambda: NOON_MS / 1000)
        self.figures = gather(self.experiments, PLAN, NOON_MS, NOW)
        self.legal, self.qa = self.figures.agents

    def one(self, asked: Asked = TODAY, *, plan: Plan = PLAN, agent: str = "qa_agent") -> AgentFigures:
        (found,) = gather(self.experiments, plan, NOON_MS, asked._replace(agents=[agent])).agents
        return found


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    made = Desk(tmp_path_factory.mktemp("trial") / "gateway.db")
    yield made
    made.experiments.close()


def test_the_evidence_is_what_the_comparison_says_of_all_rows_at_once(desk: Desk) -> None:
    rows = desk.experiments.user_sums("production", "qa_agent", experiment=1)
    arrivals = desk.experiments.arrivals("production", "qa_agent", experiment=1)
    whole = evidence_of(rows, arrivals, PLAN.rollouts["qa_agent"].terms)
    found = desk.qa.evidence
    assert found.mismatch == whole.mismatch
    assert (found.users_treated, found.users_control) == (whole.users_treated, whole.users_control)
    for ours, theirs in zip(found.findings, whole.findings, strict=True):
        assert (ours.verdict, ours.guard) == (theirs.verdict, theirs.guard)
        assert (ours.calls_treated, ours.calls_control) == (theirs.calls_treated, theirs.calls_control)
        assert ours.treated == pytest.approx(theirs.treated)
        assert (ours.low, ours.high) == (pytest.approx(theirs.low), pytest.approx(theirs.high))


def test_the_track_ends_with_the_evidence_and_its_intervals_narrow(desk: Desk) -> None:
    found = desk.qa
    assert found.track[-1].findings == found.evidence.findings
    assert found.track[-1].at_ms == NOON_MS
    assert len(found.track) == 30
    calls = [point.findings[0].calls_control for point in found.track]
    assert calls == sorted(calls)
    widths = [one.high - one.low for point in found.track if (one := point.findings[0]).low is not None and one.high]
    assert widths[-1] < widths[0] / 2


def test_the_arms_are_all_calls_of_the_agent(desk: Desk) -> None:
    arms = desk.qa.arms
    mine = desk.calls["qa_agent"]
    assert arms.treated.calls + arms.control.calls == len(mine)
    assert arms.treated.cost_nusd == sum(call.cost_nusd for call in mine if call.variant == "finetuned")
    assert arms.outside.calls == 0
    left = desk.experiments.left("production", "qa_agent", experiment=1)
    assert (arms.treated.left, arms.control.left) == left
    assert arms.treated.users == desk.qa.evidence.users_treated


def test_a_time_that_is_asked_for_holds_its_beginning_and_not_its_end(desk: Desk) -> None:
    since_ms, until_ms = BEGAN_MS + DAY_MS, BEGAN_MS + 3 * DAY_MS
    found = desk.one(Asked(since_ms, until_ms))
    within = [call for call in desk.calls["qa_agent"] if since_ms <= call.at_ms < until_ms]
    assert found.arms.treated.calls + found.arms.control.calls == len(within)
    seen = found.evidence.findings[0]
    counted = [call for call in within if call.is_success is not None]
    assert seen.calls_treated + seen.calls_control == len(counted)


def test_the_recommendation_is_of_the_whole_experiment_whatever_time_is_shown(desk: Desk) -> None:
    state = desk.experiments.states("production")["qa_agent"]
    rollout = PLAN.rollouts["qa_agent"]
    look = look_at(desk.experiments, "production", state, rollout, now_ms=NOON_MS)
    expected = recommendation(state, look, now_ms=NOON_MS, plan=rollout)
    assert desk.qa.advice == desk.one(Asked(NOON_MS - DAY_MS, NOON_MS)).advice == expected


def test_windows_end_now_and_those_longer_than_the_time_are_left_out(desk: Desk) -> None:
    found = desk.qa
    assert [name for name, _ in found.windows] == ["24h", "6d", "all"]
    assert found.windows[-1][1] is found.evidence
    day = [call for call in desk.calls["qa_agent"] if call.at_ms >= NOON_MS - DAY_MS and call.is_success is not None]
    first = found.windows[0][1].findings[0]
    assert first.calls_treated + first.calls_control == len(day)


def test_all_agents_are_pooled_in_their_own_strata_without_guardrails(desk: Desk) -> None:
    figures = desk.figures
    assert [found.agent for found in figures.agents] == ["legal_agent", "qa_agent"]
    assert figures.pooled is not None
    own = [found.evidence.findings[0] for found in figures.agents]
    pooled = figures.pooled.findings[0]
    assert pooled.calls_treated == sum(finding.calls_treated for finding in own)
    assert {finding.guard for finding in figures.pooled.findings} == {"none"}
    assert pooled.alpha == figures.alpha == 0.05


def test_an_agent_that_is_gone_from_the_configuration_is_shown_without_advice(desk: Desk) -> None:
    agents = {name: agent for name, agent in PLAN.agents.items() if name != "qa_agent"}
    gone = PLAN._replace(agents=agents, rollouts={"legal_agent": PLAN.rollouts["legal_agent"]})
    found = desk.one(plan=gone)
    assert (found.plan, found.advice) == (None, None)
    assert "no such agent any more" in found.why_not
    assert found.arms.treated.calls > 0


def test_where_the_policy_makes_no_experiment_any_more_nothing_is_recommended(desk: Desk) -> None:
    found = desk.one(plan=plan_of("", env="production"))
    assert found.advice is None
    assert "`ab_testing.enabled` is false" in found.why_not


def test_an_empty_store_has_no_figures(tmp_path: Path) -> None:
    with Experiments(tmp_path / "gateway.db", clock=lambda: NOON_MS / 1000) as empty:
        assert gather(empty, PLAN, NOON_MS, NOW) == nothing(PLAN, NOON_MS)


@pytest.mark.parametrize("metric", METRICS)
def test_an_effect_is_on_the_scale_of_its_guardrail(metric: str) -> None:
    is_relative = metric in ("mean_latency", "p95_latency", "cost_per_request")
    rail = Guardrail(metric, 0.2, is_relative)  # type: ignore[arg-type]
    finding = Finding(
        metric, "undecided", "holds", treated=11.0, control=10.0, difference=1.0, low=-1.0, high=3.0, relative=0.1,
        relative_low=-0.1, relative_high=0.3, guardrail=rail, alpha=Terms().alpha,
    )  # type: ignore[arg-type]  # fmt: skip
    found = effect_of(finding)
    if is_relative:
        assert found == (True, 0.1, -0.1, 0.3, 0.2)
    else:
        assert found == (False, 1.0, -1.0, 3.0, -0.2)
