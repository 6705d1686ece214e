"""[rollout]: a schedule that goes down, leaves no control or watches nothing is found before it is relied on."""

import tomllib
from pathlib import Path

import pytest

from gateway.domain.reading import Problem, read_struct
from gateway.domain.rollout_policy import Rollout, bps_of, check_rollout

AGENTS = ("qa_agent", "legal_agent")


def read(text: str) -> tuple[Rollout | None, list[Problem]]:
    problems: list[Problem] = []
    return read_struct(Rollout, tomllib.loads(text), "rollout", problems), problems


def checked(text: str, *, is_experiment: bool = True) -> dict[str, str]:
    rollout, problems = read(text)
    assert rollout is not None, problems
    return {
        problem.key: f"{problem.found} {problem.fix}"
        for problem in check_rollout(rollout, AGENTS, is_experiment=is_experiment)
    }


def test_an_empty_section_is_a_good_one_and_raises_nothing_by_itself() -> None:
    assert checked("", is_experiment=False) == {}
    assert Rollout().mode == "manual"


def test_production_climbs_as_the_mission_says_and_keeps_a_control() -> None:
    shipped = (Path(__file__).parents[2] / "policies" / "production.toml").read_text(encoding="utf-8")
    problems: list[Problem] = []
    rollout = read_struct(Rollout, tomllib.loads(shipped)["rollout"], "rollout", problems)
    assert rollout is not None, problems
    assert (rollout.mode, rollout.stages, rollout.holdback_percent) == ("manual", (10, 25, 50, 75, 100), 5)
    assert rollout.rollback_on == "breached"
    assert rollout.guardrails["success_rate"] == 0.02
    # "Within a minute of the evidence."
    assert rollout.check_every_s < 60


@pytest.mark.parametrize(
    ("text", "key", "said"),
    [
        ("stages = []", "rollout.stages", "at least one percentage"),
        ("stages = [10, 50, 25]", "rollout.stages", "[10, 50, 25] must begin above 0 and rise"),
        ("stages = [10, 10]", "rollout.stages", "rise"),
        ("stages = [10, 10.001]", "rollout.stages", "by 0.01 at least"),
        ("stages = [0, 10]", "rollout.stages", "begin above 0"),
        ("stages = [50, 80, 100]\nholdback_percent = 20", "rollout.holdback_percent", "take stages from 80 on out"),
        ("bake_s = [60, 60]", "rollout.bake_s", "[60, 60] has 2 numbers for 5 stages"),
        ("min_users = [1, 2, 3, 4, 5, 6]", "rollout.min_users", "has 6 numbers for 5 stages"),
        ("guardrails.success_rate = 2", "rollout.guardrails.success_rate", "0.02 allows two points less"),
        ("guardrails.p95_latency = 0.04", "rollout.guardrails.p95_latency", "must not be below 0.05"),
        ("guardrails.p95_latency = 20", "rollout.guardrails.p95_latency", "0.20 allows a fifth more"),
        ('mode = "automatic"', "rollout.mode", "rollout.guardrails.success_rate = 0.02"),
        ("[agents.qa_agnet]\nmin_users = 5", "rollout.agents.qa_agnet", 'did you mean "qa_agent"?'),
        ("[agents.qa_agent]\nstages = [5, 1]", "rollout.agents.qa_agent.stages", "rise"),
        (
            "bake_s = [1, 2, 3, 4, 5]\n[agents.qa_agent]\nstages = [50]",
            "rollout.agents.qa_agent.bake_s",
            "for 1 stages",
        ),
        ('[agents.qa_agent]\nmode = "automatic"', "rollout.agents.qa_agent.mode", "wants a guardrail"),
    ],
)
def test_what_is_wrong_is_said_with_its_place_and_its_remedy(text: str, key: str, said: str) -> None:
    found = checked(text)
    assert list(found) == [key]
    assert said in found[key]


@pytest.mark.parametrize(
    ("text", "key", "said"),
    [
        ("stages = [10, 101]", "rollout.stages", "<= 100"),
        ("stages = [-1]", "rollout.stages", ">= 0"),
        ("stages = [nan]", "rollout.stages", ">= 0"),
        ("holdback_percent = 51", "rollout.holdback_percent", "<= 50"),
        ("guardrails.p95_latncy = 0.2", "rollout.guardrails.p95_latncy", 'did you mean "p95_latency"?'),
        ("guardrails.success_rate = -0.1", "rollout.guardrails.success_rate", ">= 0"),
        ('mode = "automatc"', "rollout.mode", 'did you mean "automatic"?'),
        ('rollback_on = "beached"', "rollout.rollback_on", 'did you mean "breached"?'),
        ("alpha = 0.5", "rollout.alpha", "< 0.5"),
        ("[agents.qa_agent]\nguardrails.happiness = 1", "rollout.agents.qa_agent.guardrails.happiness", "satisfaction"),
        ("stagse = [10]", "rollout.stagse", 'did you mean "stages"?'),
    ],
)
def test_what_cannot_be_read_is_said_likewise(text: str, key: str, said: str) -> None:
    rollout, problems = read(text)
    assert rollout is None
    assert [problem.key for problem in problems] == [key]
    assert said in problems[0].fix


def test_nothing_rolls_out_by_itself_where_there_is_no_experiment() -> None:
    text = 'mode = "automatic"\nguardrails.success_rate = 0.02'
    assert checked(text) == {}
    assert "ab_testing.enabled" in checked(text, is_experiment=False)["rollout.mode"]


def test_what_is_wrong_for_all_is_said_once() -> None:
    assert list(checked("stages = [2, 1]\n[agents.qa_agent]\nmin_users = 5")) == ["rollout.stages"]


@pytest.mark.parametrize("just", ["holdback_percent = 24.99", "stages = [75, 100]\nholdback_percent = 24"])
def test_a_holdback_that_lowers_the_last_stage_alone_is_fine(just: str) -> None:
    assert checked(just) == {}


def test_an_agent_has_its_own_values_and_else_those_of_all() -> None:
    rollout, _ = read(
        'min_users = 50\nguardrails = { success_rate = 0.02, p95_latency = 0.2 }\n'
        '[agents.qa_agent]\nmode = "automatic"\nholdback_percent = 0\nguardrails.p95_latency = 0.5'
    )  # fmt: skip
    assert rollout is not None
    own = rollout.of_agent("qa_agent")
    assert (own.mode, own.min_users, own.stages) == ("automatic", 50, rollout.stages)
    assert own.guardrails == {"success_rate": 0.02, "p95_latency": 0.5}
    assert rollout.of_agent("legal_agent") == rollout


@pytest.mark.parametrize(("percent", "bps"), [(0, 0), (0.01, 1), (10, 1_000), (33.33, 3_333), (100, 10_000)])
def test_a_percentage_is_so_many_users_of_ten_thousand(percent: float, bps: int) -> None:
    assert bps_of(percent) == bps
