"""`gateway report`: files for people, JSON for programs, and what cannot be done said in a line."""

from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner, Result

from gateway.cli.main import main
from gateway.domain.policy import REPORT_FILES
from tests.ledgers import NOON_MS, House, row
from tests.trials import calls_of, climb, tell

POLICY = """
[ab_testing]
enabled = true
rollout_percentage = 25
[rollout]
guardrails = { success_rate = 0.02 }
"""
OUT = Path("reports/ab_testing_results.md")


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> House:
    return House(tmp_path, monkeypatch, policy=POLICY)


def report(*arguments: str) -> Result:
    variables = {"GATEWAY_ENV": "production", "GENESIS_ENV": None}
    return CliRunner().invoke(main, ["report", *arguments], env=variables, catch_exceptions=False)


def tried(house: House, *agents: str) -> None:
    """Gateways have served these agents for a week."""
    house.serve()
    for agent in agents:
        states = climb(
            house.ledger_path, house.load().plan.rollouts["qa_agent"], env="production", agent=agent, steps=()
        )
        tell(house.ledger_path, calls_of(states, env="production", users=30))


def test_a_report_is_written_with_its_plots(house: House) -> None:
    tried(house, "qa_agent")
    result = report("ab")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == f"{OUT}, with 2 plots in reports/ab_testing_results\n"
    assert OUT.read_text().startswith("# A/B tests of production\n")


def test_as_json_nothing_is_written(house: House) -> None:
    tried(house, "qa_agent")
    result = report("ab", "--json", "--window", "24h")
    found = msgspec.json.decode(result.stdout)
    assert (found["now_ms"], [one["agent"] for one in found["agents"]]) == (NOON_MS, ["qa_agent"])
    assert [name for name, _ in found["agents"][0]["windows"]] == ["24h"]
    assert not OUT.exists()


def test_only_some_agents_are_reported_and_one_that_is_gone_may_be_named(house: House) -> None:
    tried(house, "qa_agent", "old_agent")
    found = msgspec.json.decode(report("ab", "--json", "--agent", "old_agent").stdout)
    assert [(one["agent"], one["advice"]) for one in found["agents"]] == [("old_agent", None)]


def test_a_time_is_what_was_asked_for(house: House) -> None:
    tried(house, "qa_agent")
    (whole,) = msgspec.json.decode(report("ab", "--json").stdout)["agents"]
    (day,) = msgspec.json.decode(report("ab", "--json", "--since", "2026-11-19", "--until", "2026-11-20").stdout)[
        "agents"
    ]
    assert day["span"]["until_ms"] - day["span"]["since_ms"] == 86_400_000
    assert 0 < day["arms"]["control"]["calls"] < whole["arms"]["control"]["calls"]


def test_without_a_ledger_the_report_says_that_there_is_nothing_yet(house: House) -> None:
    result = report("ab")
    assert (result.exit_code, result.stdout) == (0, f"{OUT}, without plots: it says why\n")
    assert result.stderr == "there is no ledger at state/gateway.db yet; a gateway makes it when it first serves\n"
    assert "**No rollout has begun in production**" in OUT.read_text()
    assert not house.ledger_path.exists()


def test_without_any_call_it_is_no_failure(house: House) -> None:
    house.serve()
    assert (report("ab").exit_code, report("ab", "--json").exit_code) == (0, 0)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--agent", "qa_agnt"],
            "there is no agent 'qa_agnt'; known: legal_agent, qa_agent; did you mean \"qa_agent\"?",
        ),
        (["--since", "yesterday"], "'yesterday' wants a time such as 24h"),
        (["--since", "2026-11-20", "--until", "2026-11-19"], "ends before that"),
        (["--until", "soon"], "'soon' wants a time such as 24h"),
        (["--window", "24h,week"], "'week' wants a length such as 24h, 7d or all"),
        (["--window", "0h"], "'0h' wants a length such as 24h, 7d or all"),
    ],
)
def test_bad_input_is_exit_status_2_and_writes_nothing(house: House, arguments: list[str], said: str) -> None:
    house.serve()
    result = report("ab", *arguments)
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.replace("│", " ").split())
    assert not OUT.exists()


def test_a_place_that_cannot_be_written_to_is_named(house: House) -> None:
    house.serve()
    (house.path / "reports").write_text("a file in its way")
    result = report("ab")
    assert (result.exit_code, result.stderr) == (1, f"{OUT} cannot be written: File exists\n")


def test_a_ledger_that_is_none_is_said_in_one_line(house: House) -> None:
    house.ledger_path.parent.mkdir()
    house.ledger_path.write_text("no database " * 100)
    result = report("ab")
    assert result.exit_code == 1
    assert result.stderr.startswith("the ledger at state/gateway.db cannot be used: ")
    assert len(result.stderr.splitlines()) == 1


def test_costs_are_reported_here_too(house: House) -> None:
    house.serve(row("a"))
    result = report("costs")
    assert result.exit_code == 0
    assert result.stdout.startswith("reports/cost_dashboard.md, with ")


def test_both_are_written_where_the_policy_has_its_reports(house: House) -> None:
    with (house.path / "policies" / "production.toml").open("a") as policy:
        policy.write('\n[reports]\ndir = "elsewhere"\n')
    house.serve(row("a"))
    assert report("ab").stdout.startswith("elsewhere/ab_testing_results.md, with")
    assert report("costs").stdout.startswith("elsewhere/cost_dashboard.md, with ")
    assert sorted(path.name for path in (house.path / "elsewhere").glob("*.md")) == sorted(REPORT_FILES.values())
    assert not OUT.exists()
