"""`gateway rollout` as a person meets it, beside a store that a gateway left."""

import json
import sqlite3
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from gateway.cli.main import main
from gateway.decide.rollout import begin
from gateway.domain.rollout import Event, Phase
from gateway.store.experiments import Experiments
from tests.ledgers import NOON_MS, NOON_S, House
from tests.steering import MANUAL, bring, told, users_at

HOUR_MS = 3_600_000
ENV = "production"


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> House:
    """Two agents whose rollouts began an hour ago, at 10 %."""
    monkeypatch.setenv("LOGNAME", "ann")
    house = House(tmp_path, monkeypatch, policy=MANUAL)
    house.ledger_path.parent.mkdir()
    with Experiments(house.ledger_path, clock=lambda: NOON_S) as experiments:
        for agent, plan in house.load().plan.rollouts.items():
            change = begin(agent, plan=plan, now_ms=NOON_MS - HOUR_MS).change
            assert change is not None
            experiments.begin(ENV, change)
    return house


def run(*arguments: str, env: str = ENV) -> Result:
    variables = {"GATEWAY_ENV": env, "GENESIS_ENV": None, "LOGNAME": "ann"}
    return CliRunner().invoke(main, ["rollout", *arguments], env=variables, catch_exceptions=False)


def see(house: House, **what: object) -> None:
    state = told(house.ledger_path, ENV)[0]["qa_agent"]
    bring(house.ledger_path, users_at(state, env=ENV, **what))  # type: ignore[arg-type]


# --- Status ----------------------------------------------------------------------------------------------------------


def test_the_status_says_where_each_stands_what_was_seen_and_what_to_do(house: House) -> None:
    see(house)
    before = told(house.ledger_path, ENV)
    result = run("status")
    assert (result.exit_code, result.stderr) == (0, "")
    qa, legal = result.stdout.strip().split("\n\n")
    assert qa.startswith(
        "qa_agent: ramping at 10 % since 2026-11-21T11:00:00Z (manual, experiment 1, next 25 %)\n"
        "  last change by pilot: the policy's ab_testing.rollout_percentage starts it at 10 %\n"
    )
    assert "\n  recommendation: proceed\n" in qa
    assert "success rate 9" in qa
    assert legal.startswith("legal_agent: ramping at 10 %")
    assert "recommendation: hold" in legal
    assert told(house.ledger_path, ENV) == before


def test_the_status_of_one_is_json_too(house: House) -> None:
    result = run("status", "--agent", "qa_agent", "--json")
    (one,) = json.loads(result.stdout)
    assert (one["agent"], one["share_percent"], one["phase"]) == ("qa_agent", 10.0, "ramping")
    assert (result.exit_code, result.stderr) == (0, "")


def test_what_no_gateway_has_begun_is_told_and_not_begun(house: House) -> None:
    (house.path / "policies" / "dev.toml").write_text(MANUAL)
    result = run("status", env="dev")
    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr.splitlines() == [
        f"{agent}: has not begun; a gateway begins it when it next starts or reloads"
        for agent in ("qa_agent", "legal_agent")
    ]
    assert told(house.ledger_path, "dev") == ({}, [])


def test_at_the_baseline_it_says_how_to_begin_and_nothing_to_wait_for(house: House) -> None:
    for order in ("rollback", "rearm"):
        assert run(order, "--agent", "qa_agent").exit_code == 0
    result = run("status", "--agent", "qa_agent")
    said = "at 0 % nobody has the fine-tuned model, so no evidence will come; `gateway rollout advance` begins at 10 %"
    assert f"\n  recommendation: hold\n    {said}\n  success rate" in result.stdout
    begun = run("advance", "--agent", "qa_agent")
    assert begun.stdout.splitlines()[1:] == ["    ann raised it from 0 % to 10 %", f"    {said}"]


# --- Orders ----------------------------------------------------------------------------------------------------------


def test_a_share_is_set_for_one_and_signed(house: House) -> None:
    result = run("set", "25", "--agent", "qa_agent", "--why", "a try")
    assert (result.exit_code, result.stderr) == (0, "")
    first, *reasons = result.stdout.splitlines()
    assert first == "2026-11-21T12:00:00Z  qa_agent: raised by ann, 10 % -> 25 % (a try)"
    assert reasons[0] == "    ann raised it from 10 % to 25 %"
    states, changes = told(house.ledger_path, ENV)
    assert (states["qa_agent"].share_bps, states["legal_agent"].share_bps) == (2500, 1000)
    assert (changes[-1].by, changes[-1].why) == ("ann", "a try")


def test_what_a_person_begins_without_a_gateway_is_signed_by_them(house: House) -> None:
    (house.path / "policies" / "dev.toml").write_text(MANUAL)
    assert run("set", "25", "--agent", "qa_agent", "--who", "bob", env="dev").exit_code == 0
    changes = told(house.ledger_path, "dev")[1]
    assert [(change.event, change.by) for change in changes] == [("began", "bob"), ("raised", "bob")]


def test_without_agent_it_is_for_all(house: House) -> None:
    assert run("advance", "--who", "bob").exit_code == 0
    states, changes = told(house.ledger_path, ENV)
    assert {state.share_bps for state in states.values()} == {2500}
    assert [change.by for change in changes[2:]] == ["bob", "bob"]


@pytest.mark.parametrize(
    ("way", "phase"),
    [
        (["pause"], Phase.PAUSED), (["pause", "resume"], Phase.RAMPING), (["rollback"], Phase.ROLLED_BACK),
        (["rollback", "rearm"], Phase.BASELINE),
    ],
)  # fmt: skip
def test_each_order_does_what_it_says(house: House, way: list[str], phase: Phase) -> None:
    for order in way:
        assert run(order, "--agent", "qa_agent", "--why", "because").exit_code == 0
    assert told(house.ledger_path, ENV)[0]["qa_agent"].phase is phase


def test_what_the_evidence_is_against_is_refused_and_says_how_to_overrule_it(house: House) -> None:
    see(house, success=(0.97, 0.5))
    before = told(house.ledger_path, ENV)
    result = run("set", "25", "--agent", "qa_agent")
    assert (result.exit_code, result.stdout) == (1, "")
    first, *more, last = result.stderr.splitlines()
    assert first == "qa_agent: refused: the evidence speaks against 25 %"
    assert "past the guardrail of 10 points less" in more[0]
    assert last == "  --force --why '...' overrules it"
    assert told(house.ledger_path, ENV) == before
    forced = run("set", "25", "--agent", "qa_agent", "--force", "--why", "known")
    assert forced.exit_code == 0
    assert forced.stdout.startswith("2026-11-21T12:00:00Z  qa_agent: overruled by ann, forced, 10 % -> 25 % (known)\n")
    change = next(change for change in told(house.ledger_path, ENV)[1] if change.event is Event.OVERRULED)
    assert (change.is_forced, change.why) == (True, "known")


def test_what_one_refuses_keeps_it_from_no_other(house: House) -> None:
    run("rollback", "--agent", "qa_agent")
    result = run("set", "25")
    assert result.exit_code == 1
    assert "qa_agent: refused: it was rolled back; `gateway rollout rearm`" in result.stderr
    assert told(house.ledger_path, ENV)[0]["legal_agent"].share_bps == 2500


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["set", "101"], 2, "101.0 is not in the range 0<=x<=100"),
        (["set", "--", "-1"], 2, "-1.0 is not in the range 0<=x<=100"),
        (["set", "nan"], 2, "Invalid value for 'PERCENT': nan is no percentage"),
        (["set", "inf"], 2, "inf is not in the range"),
        (["set", "ten"], 2, "'ten' is not a valid float"),
        (["set"], 2, "Missing argument 'PERCENT'"),
        (["set", "12.345"], 2, "Invalid value for 'PERCENT': 12.345 is too fine"),
        (["set", "1e-10"], 2, "1e-10 is too fine"),
        (["set", "10"], 1, "the share is 10 % already"),
        (["set", "25", "--agent", "qa_agnt"], 2, 'known: qa_agent, legal_agent; did you mean "qa_agent"?'),
        (["set", "25", "--force"], 2, "--force wants a reason"),
        (["advance", "--force", "--why", " "], 2, "--force wants a reason"),
        (["set", "25", "--why", "w" * 1_001], 2, "is longer than 1000 characters"),
        (["set", "25", "--who", " "], 2, "the audit log wants a name"),
        (["set", "25", "--who", "pilot"], 2, "pilot is the gateway's own"),
        (["pause", "--force"], 2, "No such option"),
        (["resume"], 1, "there is nothing to resume"),
        (["rearm"], 1, "it is running"),
        (["skip"], 2, "No such command 'skip'"),
        (["history", "--limit", "0"], 2, "0 is not in the range"),
        (["history", "--agent", "nobody"], 2, "there is no agent 'nobody'"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_wrong_is_said_and_changes_nothing(house: House, arguments: list[str], status: int, said: str) -> None:
    before = told(house.ledger_path, ENV)
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (status, "")
    assert said in " ".join(result.stderr.split())
    assert told(house.ledger_path, ENV) == before


# --- History ---------------------------------------------------------------------------------------------------------


def test_the_history_tells_who_when_why_and_on_which_evidence(house: House) -> None:
    run("set", "25", "--agent", "qa_agent", "--why", "a try")
    result = run("history", "--agent", "qa_agent")
    assert (result.exit_code, result.stderr) == (0, "")
    heads = [line for line in result.stdout.splitlines() if not line.startswith(" ")]
    assert heads == [
        "2026-11-21T11:00:00Z  qa_agent: began by pilot, 0 % -> 10 %",
        "2026-11-21T12:00:00Z  qa_agent: raised by ann, 10 % -> 25 % (a try)",
    ]
    (last,) = json.loads(run("history", "--limit", "1", "--json").stdout)
    assert (last["by"], last["why"], last["forced"]) == ("ann", "a try", False)
    assert last["evidence"].startswith("at 2026-11-21T12:00:00Z, experiment 1, stage 1")


def test_an_agent_that_left_the_configuration_has_a_history_still(house: House) -> None:
    config = house.path / "config.toml"
    config.write_text(config.read_text().replace("[agents.legal_agent]", "[agents.contract_agent]"))
    routing = house.path / "policies" / "routing.toml"
    routing.write_text(routing.read_text().replace("legal_agent", "contract_agent"))
    assert "legal_agent: began by pilot" in run("history", "--agent", "legal_agent").stdout
    assert "there is no agent 'legal_agent'" in run("status", "--agent", "legal_agent").stderr


def test_without_any_history_it_says_so(house: House) -> None:
    (house.path / "policies" / "dev.toml").write_text(MANUAL)
    result = run("history", env="dev")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "no rollout has begun here\n")


# --- Stores ----------------------------------------------------------------------------------------------------------

COMMANDS = [["status"], ["set", "25"], ["rollback"], ["history"]]


@pytest.mark.parametrize("arguments", COMMANDS, ids=str)
def test_where_there_is_no_store_none_is_made(house: House, arguments: list[str]) -> None:
    house.ledger_path.unlink()
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "there is no ledger at state/gateway.db; a gateway makes it when it first serves\n"
    assert not house.ledger_path.exists()


@pytest.mark.parametrize("arguments", COMMANDS, ids=str)
def test_a_damaged_store_is_said_to_be(house: House, arguments: list[str]) -> None:
    for path in house.ledger_path.parent.glob("gateway.db-*"):
        path.unlink()
    house.ledger_path.write_bytes(b"not a ledger " * 1_000)
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "it is not a ledger, or damaged; restore it" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_store_that_somebody_keeps_locked_is_said_to_be(house: House) -> None:
    before = told(house.ledger_path, ENV)
    holder = sqlite3.connect(house.ledger_path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    try:
        result = run("rollback")
    finally:
        holder.execute("ROLLBACK")
        holder.close()
    assert (result.exit_code, result.stdout) == (1, "")
    assert "another process keeps it locked" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert told(house.ledger_path, ENV) == before


def test_without_an_experiment_there_is_nothing_to_steer(house: House) -> None:
    (house.path / "policies" / "production.toml").write_text("")
    result = run("status")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "the policy of 'production' makes no experiment: ab_testing.enabled is false\n"
    off = MANUAL.replace("use_finetuned = true", "use_finetuned = false")
    (house.path / "policies" / "production.toml").write_text(off)
    assert run("status").stderr.endswith("makes no experiment: models.use_finetuned is false\n")
    # What has been is told all the same.
    assert "qa_agent: began by pilot" in run("history").stdout


def test_who_takes_back_waits_for_no_figures(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    see(house)

    def never(*_: object, **__: object) -> None:
        raise AssertionError("a comparison of a million calls takes minutes")

    monkeypatch.setattr("gateway.store.looks.evidence_of", never)
    for order in (["set", "5"], ["rollback", "--why", "fire"]):
        assert run(*order).exit_code == 0
    assert told(house.ledger_path, ENV)[0]["qa_agent"].phase is Phase.ROLLED_BACK


@pytest.mark.parametrize("command", ["status", "set", "advance", "pause", "resume", "rollback", "rearm", "history"])
def test_each_command_says_what_it_does(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    usage, text, *_ = result.stdout.split("\n\n")
    assert usage.startswith(f"Usage: main rollout {command}")
    assert text.rstrip().endswith(".")
