"""`gateway replay` as a person meets it, beside a journal that a gateway left."""

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from gateway.cli import replay as cli_replay
from gateway.cli.main import main
from gateway.decide.plan import Plan
from gateway.domain.call import Attempt, CallRecord
from gateway.domain.money import Usage, cost_nusd
from gateway.store.journal import Journal
from tests.ledgers import DAY_MS, HOUR_MS, NOON_MS, House

POLICY = "[ab_testing]\nenabled = true\nrollout_percentage = 10\n"
HALF = POLICY.replace("10", "50")
BUCKETS = (500, 2_000, 4_999, 5_000, 9_999)


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> House:
    house = House(tmp_path, monkeypatch, policy=POLICY)
    (tmp_path / "half.toml").write_text(HALF)
    plan = house.load().plan
    write(tmp_path, *(call(plan, agent, bucket) for agent in ("qa_agent", "legal_agent") for bucket in BUCKETS))
    return house


def call(plan: Plan, agent: str, bucket: int, *, at_ms: int = NOON_MS - HOUR_MS, env: str = "production") -> CallRecord:
    variant, why, _, chain = plan.assign_bucket(plan.agents[agent], bucket)
    usage, price = Usage(prompt_tokens=600, completion_tokens=400), chain[0].price
    assert price is not None
    cost = cost_nusd(price, usage)
    return CallRecord(
        id=f"req-{agent}-{bucket}", at_ms=at_ms, env=env, agent=agent, agent_from="model", variant=variant,
        variant_from=why, bucket=bucket, share_bps=1_000, user="u1", model_asked=agent, model_sent=chain[0].ref,
        attempts=[Attempt(ref=chain[0].ref, started_ms=0, status=200, cost_nusd=cost, tokens=1_000)], status=200,
        usage=usage, cost_nusd=cost, cost_basis="exact",
    )  # fmt: skip


def write(path: Path, *records: CallRecord) -> None:
    directory = path / "state" / "journal" / "gateway-1"
    directory.mkdir(parents=True, exist_ok=True)
    journal = Journal(directory, fsync=False)
    journal.append(*records)
    journal.close()


def run(*arguments: str, **environ: str) -> Result:
    variables = {"GATEWAY_ENV": "production", "GENESIS_ENV": None, **environ}
    return CliRunner().invoke(main, ["replay", *arguments], env=variables, catch_exceptions=False)


def test_another_share_tells_who_moves_where_and_what_it_costs(house: House) -> None:
    result = run("--policy", "half.toml")
    assert (result.exit_code, result.stderr) == (0, "")
    assert "calls made under policies/production.toml, replayed under half.toml" in result.output
    assert "4 of 10 calls would go otherwise." in result.output
    lines = [re.split(r"\s{2,}", line.strip()) for line in result.output.splitlines()]
    assert ["recorded", "10", "10", "0", "0", "0", "$0.0032", "10,000"] in lines
    assert ["replayed", "10", "10", "0", "0", "0", "$0.0056", "10,000"] in lines
    assert ["difference", "0", "0", "0", "0", "0", "+$0.0024", "0"] in lines
    assert ["qa_agent", "variant", "baseline -> finetuned", "2"] in lines
    assert ["qa_agent", "model", "mistral/base -> mistral/ft:qa", "2"] in lines
    assert ["qa_agent", "share", "10 % -> 50 %", "5"] in lines


def test_machines_get_the_same_as_json(house: House) -> None:
    result = run("--policy", "half.toml", "--json", "--limit", "1")
    found = json.loads(result.stdout)
    assert (found["env"], found["since"], found["policy"]) == ("production", "2026-11-20T12:00:00Z", "half.toml")
    assert found["whole"]["changed"] == 4
    assert found["whole"]["after"]["cost_usd"] == "0.0056"
    assert len(found["largest"]) == 1
    assert found["largest"][0]["difference_usd"] == "0.0006"


def test_the_same_policy_changes_nothing_and_is_told_apart_by_was(house: House) -> None:
    result = run("--policy", "policies/production.toml")
    assert "No call would go otherwise." in result.output
    assert "this is the policy of --was" in result.stderr
    assert run("--policy", "policies/production.toml", "--was", "half.toml").stderr == ""


def test_a_share_a_cap_and_another_configuration_can_be_tried(house: House, tmp_path: Path) -> None:
    assert "8 of 10 calls would go otherwise." in run("--policy", "half.toml", "--share", "100").output
    (tmp_path / "capped.toml").write_text(POLICY + '[[caps]]\nper = "hour"\nusd = "0.001"\n')
    capped = run("--policy", "capped.toml").output
    assert re.search(r"global 0\.001 usd per hour +2026-11-21T11:00:00Z +0 +\d", capped)
    salted = Path("config.toml").read_text().replace("[agents.qa_agent]", '[agents.qa_agent]\nsalt = "other"')
    (tmp_path / "salted.toml").write_text(salted)
    found = run("--policy", "half.toml", "--with-config", "salted.toml").output
    assert "2 of 10 calls would go otherwise." in found
    assert "5 calls: the agent's salt is another one" in found


def test_time_agent_and_environment_choose_the_calls(house: House, tmp_path: Path) -> None:
    plan = house.load().plan
    write(tmp_path, call(plan, "qa_agent", 3_000, at_ms=NOON_MS - 2 * DAY_MS), call(plan, "qa_agent", 3_000, env="dev"))
    first = run("--policy", "half.toml")
    assert "4 of 10 calls" in first.output
    assert first.stderr == "note: 1 call of other environments left out\n"
    assert "5 of 11 calls" in run("--policy", "half.toml", "--since", "7d").output
    assert "1 of 1 call" in run("--policy", "half.toml", "--since", "7d", "--until", "30h").output
    assert "2 of 5 calls" in run("--policy", "half.toml", "--agent", "legal_agent").output
    assert "No such call was recorded." in run("--policy", "half.toml", "--since", "5m").output


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "Missing option '--policy'"),
        (("--policy", "none.toml"), "none.toml: 1 problem"),
        (("--policy", "half.toml", "--since", "yesterdayish"), "'yesterdayish' wants a time such as 24h"),
        (("--policy", "half.toml", "--until", "2020-01-01"), "ends before that"),
        (("--policy", "half.toml", "--share", "101"), "101.0 is not in the range"),
        (("--policy", "half.toml", "--share", "nan"), "nan is no percentage"),
        (("--policy", "half.toml", "--share", "33.3333"), "33.3333 is too fine"),
        (("--policy", "half.toml", "--agent", "qa_agnt"), "did you mean \"qa_agent\"?"),
        (("--policy", "half.toml", "--env", "staging"), "unknown environment"),
        (("--policy", "half.toml", "--was", "none.toml"), "none.toml: 1 problem"),
        (("--policy", "half.toml", "--with-config", "none.toml"), "none.toml: 1 problem"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_exit_status_2(house: House, arguments: tuple[str, ...], message: str) -> None:
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr


def test_every_problem_of_the_other_policy_is_told_at_once(house: House, tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text('[ab_testing]\nrollout_percentage = 110\n[models]\nunknown_agent = "shrug"\n')
    result = run("--policy", "bad.toml")
    assert result.exit_code == 2
    assert "bad.toml: 2 problems" in result.stderr
    assert "ab_testing.rollout_percentage" in result.stderr
    assert "models.unknown_agent" in result.stderr


def test_without_a_journal_it_says_so_and_makes_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    House(tmp_path, monkeypatch, policy=POLICY)
    result = run("--policy", "policies/production.toml")
    assert result.exit_code == 2
    assert result.stderr == "there is no journal at state/journal; a gateway makes it when it first serves\n"
    assert not (tmp_path / "state").exists()


def test_torn_lines_are_told(house: House, tmp_path: Path) -> None:
    (path,) = tmp_path.rglob("*.journal")
    path.write_bytes(path.read_bytes() + b"deadbeef {}\n")
    assert "note: 1 torn line of the journal left out" in run("--policy", "half.toml").stderr


def test_somebody_who_looks_on_sees_how_far_it_is(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_replay, "is_terminal", lambda: True)
    result = run("--policy", "half.toml", "--json", FORCE_COLOR="1")
    assert json.loads(result.stdout)["whole"]["changed"] == 4
    assert "reading the journal" in result.stderr
    assert "replaying" in result.stderr
