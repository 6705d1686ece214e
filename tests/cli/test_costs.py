"""`gateway costs` as a person meets it, beside a ledger that a gateway left."""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import msgspec
import pytest

from gateway.cli.costs import costs
from gateway.cli.main import main
from gateway.decide.by_hand import SWITCHES
from gateway.domain.ledger import Amounts
from gateway.store.store import Stop
from tests.ledgers import DAY_MS, HOUR_MS, LEGAL, NOON_MS, QA, USD, House, row

ROOT = Path(__file__).parents[2]
POLICY = """
[[caps]]
per = "hour"
usd = "20"
[[caps]]
scope = "agent"
per = "day"
usd = "5"
[[caps]]
per = "total"
usd = "30"
only = { operation = ["benchmark", "finetune"] }
"""


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> House:
    return House(tmp_path, monkeypatch, policy=POLICY)


def cells(line: str) -> list[str]:
    """The columns of a table's line."""
    return re.split(r"\s{2,}", line.strip())


# --- Status ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command", ["", "stop --why fire", "log --agent qa_agent --cost 1", "resume", "audit", "verify", "release"]
)
def test_without_a_ledger_it_says_so_and_makes_none(house: House, command: str) -> None:
    # A kill switch in a ledger that nobody reads would stop nothing.
    result = house.run(*command.split())
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "there is no ledger at state/gateway.db; a gateway makes it when it first serves\n"
    assert not house.ledger_path.exists()


def test_every_account_in_force_has_a_row(house: House) -> None:
    house.serve(row("a"), row("b", 2 * USD, on=LEGAL), row("c", USD // 2, state="in_doubt"), held=1_000_000)
    result = house.run()
    assert (result.exit_code, result.stderr) == (0, "")
    rows = [cells(line) for line in result.output.splitlines() if re.match("global|agent", line)]
    assert [line[:5] for line in rows] == [
        ["global 20.00 usd per hour", "$3.00", "$0.001", "$0.50", "$16.499"],
        ["agent 5.00 usd per day", "$2.00", "$0.001", "$0.00", "$2.999"],
        ["agent 5.00 usd per day", "$1.00", "$0.001", "$0.50", "$3.499"],
        ["global 30.00 usd in total (operation benchmark,", "$2.00", "$0.001", "$0.00", "$27.999"],
    ]
    assert re.findall(r"^  (\S+=\S+)", result.output, re.M) == ["agent=legal_agent", "agent=qa_agent"]
    assert re.findall(r"([0-9.]+) %", result.output) == ["17.5", "40.0", "30.0", "6.6"]
    assert [cells(line)[-1] for line in result.output.splitlines() if line.startswith("global")] == ["in 1 h", "never"]
    assert "In doubt: 0.50 usd in 1 attempt; see them with `gateway costs release`." in result.output


def test_a_cap_that_is_used_up_is_told_and_is_exit_status_0(house: House) -> None:
    house.serve(row("a", 20 * USD))
    result = house.run()
    assert result.exit_code == 0
    (line,) = [line for line in result.output.splitlines() if line.startswith("global 20.00")]
    assert "██████████ 100.0 %" in line
    assert "used up" in line


def test_kill_switches_come_first(house: House) -> None:
    house.serve()
    with house.ledger() as ledger:
        ledger.stop(Stop("production", "user", "abc", by="bob", why="runs [bold]wild", at_ms=NOON_MS))
    lines = house.run().output.splitlines()
    assert lines[1].startswith("STOPPED: user=abc, by bob at 2026-11-21T12:00:00Z: runs [bold]wild (")
    assert "`gateway costs resume user-hash=abc`" in lines[1]


@pytest.mark.parametrize(
    ("arguments", "groups"),
    [
        (["--by", "agent"], {"qa_agent": "1.00", "legal_agent": "2.00"}),
        (["--by", "model"], {"mistral/small": "1.00", "mistral/base": "2.00"}),
        (["--by", "variant"], {"finetuned": "1.00", "baseline": "2.00"}),
        (["--by", "operation"], {"inference": "1.00", "benchmark": "2.00"}),
        (["--by", "key"], {"web": "1.00", "-": "2.00"}),
        (["--by", "user"], {"u1": "1.00", "u2": "2.00"}),
        (["--by", "day"], {"2026-11-19": "4.00", "2026-11-21": "3.00"}),
        (["--since", "2026-11-19"], {"qa_agent": "5.00", "legal_agent": "2.00"}),
        (["--since", "2026-11-19", "--until", "today"], {"qa_agent": "4.00"}),
        (["--by", "agent", "--since", "1h"], {"qa_agent": "1.00"}),
    ],
)
def test_spend_is_by_any_dimension_and_of_any_time(house: House, arguments: list[str], groups: dict[str, str]) -> None:
    house.serve(
        row("a"),
        row("b", 2 * USD, on=LEGAL, at_ms=NOON_MS - 2 * HOUR_MS),
        row("c", 4 * USD, at_ms=NOON_MS - 2 * DAY_MS),
    )
    table = house.run(*arguments).output.partition("\nSpent from ")[2].splitlines()[3:]
    assert {cells(line)[0]: cells(line)[1] for line in table} == groups
    spent = msgspec.json.decode(house.run(*arguments, "--json").output)["spend"]["groups"]
    assert {group["group"] or "-": group["usd"] for group in spent} == groups


def test_where_nothing_is_capped_and_nothing_spent_it_says_so(house: House) -> None:
    (house.path / "policies" / "production.toml").write_text("")
    house.serve()
    result = house.run("--by", "agent")
    assert "No cap is in force in production; [[caps]] in policies/production.toml makes one." in result.output
    assert result.output.endswith("in doubt included:\n  nothing\n")


def test_a_cap_whose_accounts_nobody_has_touched_is_not_passed_over(house: House) -> None:
    house.serve(row("a", env="dev"))
    (house.path / "policies" / "production.toml").write_text(
        POLICY + '[[caps]]\nscope = "user"\nper = "day"\nusd = "1"'
    )
    assert "Nobody has called yet under: user 1.00 usd per day" in house.run().output


def test_options_go_where_they_belong(house: House) -> None:
    result = house.run("--by", "agent", "verify")
    assert result.exit_code == 2
    assert "gateway costs verify" in result.stderr
    house.serve()
    # The environment of the group is that of its command.
    assert house.run("--env", "dev", "verify").output.startswith("Every account of dev ")
    assert house.run("verify", "--env", "dev").output.startswith("Every account of dev ")
    assert house.run("verify").output.startswith("Every account of production ")


@pytest.mark.parametrize("option", [["--since", "yesterday"], ["--until", "x"], ["--by", "colour"]])
def test_a_wrong_option_is_exit_status_2(house: House, option: list[str]) -> None:
    house.serve()
    assert house.run("--by", "agent", *option).exit_code == 2


# --- log -------------------------------------------------------------------------------------------------------------


def test_an_entry_by_hand_counts_and_says_where(house: House) -> None:
    house.serve()
    result = house.run("log", "--agent", "qa_agent", "--operation", "finetune", "--cost", "0.50", "--note", "job 7")
    assert (result.exit_code, result.stderr) == (0, "")
    first, *caps = result.output.splitlines()
    assert re.fullmatch(
        r"booked 0\.50 usd for qa_agent \(finetune\), 2026-11-21T12:00:00Z, as manual-[0-9a-f]{16}", first
    )
    assert caps == [
        "  counts in global 20.00 usd per hour: 19.50 usd remain, 2.5 % is used",
        "  counts in agent 5.00 usd per day (agent=qa_agent): 4.50 usd remain, 10 % is used",
        "  counts in global 30.00 usd in total (operation benchmark, finetune): 29.50 usd remain, 1.6 % is used",
    ]
    with house.ledger() as ledger:
        (booked,) = ledger.rows("production")
        assert (booked.amounts, booked.basis, booked.source, booked.note) == (
            Amounts(500_000_000), "manual", "manual", "job 7",
        )  # fmt: skip
        assert ledger.audit()[0].who == "ann"
        assert ledger.verify("production") == []


def test_an_entry_of_another_time_counts_in_the_windows_of_then(house: House) -> None:
    house.serve()
    result = house.run("log", "--agent", "qa_agent", "--cost", "1", "--at", "3h", "--who", "bob")
    assert "counts in global 20.00 usd per hour, in a window that is not the present one" in result.output
    assert "counts in agent 5.00 usd per day (agent=qa_agent): 4.00 usd remain" in result.output
    with house.ledger() as ledger:
        assert [booked.at_ms for booked in ledger.rows("production")] == [NOON_MS - 3 * HOUR_MS]
        assert ledger.audit()[0].who == "bob"


def test_an_agent_nobody_knows_is_booked_and_told(house: House) -> None:
    house.serve()
    result = house.run("log", "--agent", "qa_agnt", "--cost", "1")
    assert result.exit_code == 0
    assert result.stderr == (
        "note: the configuration has no agent 'qa_agnt'; did you mean \"qa_agent\"?; booked all the same\n"
    )
    # Its account begins with the first call that asks for it, and finds the row then.
    assert "  counts in agent 5.00 usd per day (agent=qa_agnt)\n" in result.output


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--agent", "qa_agent", "--cost", "-1"], 1, "usd is negative"),
        (["--agent", "qa_agent", "--cost", "1e3"], 1, "usd: '1e3' is not an amount"),
        (["--agent", "a b", "--cost", "1"], 1, "agent 'a b' may hold letters"),
        (["--agent", "qa_agent", "--cost", "1", "--at", "noon"], 2, "--at"),
        (["--cost", "1"], 2, "--agent"),
        (["--agent", "qa_agent"], 2, "--cost"),
    ],
)
def test_an_entry_that_cannot_be_is_not_booked(house: House, arguments: list[str], code: int, said: str) -> None:
    house.serve()
    result = house.run("log", *arguments)
    assert (result.exit_code, result.stdout) == (code, "")
    assert said in result.stderr
    with house.ledger() as ledger:
        assert list(ledger.rows("production")) == []


# --- release ---------------------------------------------------------------------------------------------------------


def test_without_arguments_it_lists_what_is_in_doubt_and_changes_nothing(house: House) -> None:
    house.serve(row("req-1.1", 2 * USD, state="in_doubt"), row("req-2.1"))
    result = house.run("release")
    assert result.exit_code == 0
    (line,) = [cells(line) for line in result.output.splitlines() if line.startswith("req-")]
    assert line[:7] == [
        "req-1.1", "2026-11-21T12:00:00Z", "qa_agent", "mistral/small", "inference", "2.00", "100",
    ]  # fmt: skip
    with house.ledger() as ledger:
        assert len(ledger.in_doubt("production")) == 1
        assert ledger.audit() == []


def test_doubts_end_freed_or_with_what_it_did_cost(house: House) -> None:
    house.serve(*(row(f"req-{n}.1", 2 * USD, state="in_doubt") for n in range(3)))
    result = house.run("release", "req-0.1", "--why", "checked", "--actual", "0.25")
    assert result.output == "req-0.1: booked 0.25 of 2.00 usd\n1 out of doubt, 1.75 usd free again.\n"
    result = house.run("release", "--all", "--why", "checked")
    assert result.output.endswith("2 out of doubt, 4.00 usd free again.\n")
    with house.ledger() as ledger:
        found = {booked.id: (booked.state, booked.amounts) for booked in ledger.rows("production")}
        assert found["req-0.1"] == ("posted", Amounts(USD // 4, 1, 100))
        assert found["req-1.1"][0] == found["req-2.1"][0] == "released"
        assert ledger.verify("production") == []
        assert [(entry.who, entry.what) for entry in ledger.audit()] == [("ann", "doubt released")] * 2
    assert house.run("release").output == "Nothing is in doubt in production.\n"


def test_an_actual_amount_above_the_hold_is_booked_in_full(house: House) -> None:
    house.serve(row("req-1.1", USD, state="in_doubt"))
    result = house.run("release", "req-1.1", "--why", "invoice", "--actual", "3")
    assert "booked 3.00 of 1.00 usd" in result.output
    assert "1 out of doubt, -2.00 usd free again." in result.output


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["req-1.1"], 2, "--why"),
        (["--all", "--why", "  "], 2, "--why"),
        (["req-1.1", "--all", "--why", "x"], 2, "not both"),
        (["req-1.1", "req-2.1", "--why", "x", "--actual", "1"], 2, "exactly one"),
        (["--all", "--why", "x", "--actual", "1"], 2, "exactly one"),
        (["req-1.1", "req-2.1", "--why", "x"], 1, "req-2.1 (posted); nothing was released"),
        (["req-9.1", "--why", "x"], 1, "req-9.1 (unknown)"),
        (["req-1.1", "--why", "x", "--actual", "-1"], 1, "usd is negative"),
    ],
)
def test_a_release_that_cannot_be_releases_nothing(house: House, arguments: list[str], code: int, said: str) -> None:
    house.serve(row("req-1.1", state="in_doubt"), row("req-2.1"))
    result = house.run("release", *arguments)
    assert (result.exit_code, result.stdout) == (code, "")
    assert said in result.stderr
    with house.ledger() as ledger:
        assert [found.id for found in ledger.in_doubt("production")] == ["req-1.1"]


# --- Kill switch -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scope", "thrown"),
    [
        ([], ("", "")),
        (["agent=qa_agent"], ("agent", "qa_agent")),
        (["operation=benchmark"], ("operation", "benchmark")),
        (["model=mistral/base"], ("model", "mistral/base")),
        (["user-hash=ab"], ("user", "ab")),
    ],
)
def test_what_is_stopped_can_be_resumed(house: House, scope: list[str], thrown: tuple[str, str]) -> None:
    house.serve()
    stopped = house.run("stop", *scope, "--why", "runs wild")
    assert stopped.exit_code == 0
    with house.ledger() as ledger:
        (found,) = ledger.stops("production")
        assert (found.dimension, found.value, found.by, found.why) == (*thrown, "ann", "runs wild")
    # It says itself how it is taken back.
    command = re.findall(r"`gateway costs (resume.*)`", stopped.output)[0].split()
    resumed = house.run(*command, "--why", "all is well")
    assert (resumed.exit_code, resumed.stderr) == (0, "")
    with house.ledger() as ledger:
        assert ledger.stops("production") == []
        assert [(entry.what, entry.who) for entry in ledger.audit()] == [("resumed", "ann"), ("stopped", "ann")]


def test_a_user_is_stopped_by_the_hash_that_calls_have(house: House) -> None:
    house.serve()
    house.run("stop", "user=ann@example.org", "--why", "x")
    with house.ledger() as ledger:
        (found,) = ledger.stops("production")
    assert found.covers("production", QA._replace(user=house.load().plan.kept_user("ann@example.org")))
    assert "ann@" not in house.ledger_path.read_bytes().decode("latin-1")


@pytest.mark.parametrize("scope", ["agent=qa_agnt", "qa_agent", "colour=red", "key=nobody"])
def test_a_switch_that_would_stop_nothing_is_not_thrown(house: House, scope: str) -> None:
    house.serve()
    result = house.run("stop", scope, "--why", "x")
    assert (result.exit_code, result.stdout) == (1, "")
    with house.ledger() as ledger:
        assert ledger.stops("production") == []
    assert house.run("stop", "agent=qa_agent").exit_code == 2


def test_resuming_what_runs_is_exit_status_1_and_names_what_does_not(house: House) -> None:
    house.serve()
    house.run("stop", "agent=qa_agent", "--why", "x")
    result = house.run("resume")
    assert result.exit_code == 1
    assert result.stderr == "no kill switch was thrown for everything in production\n"
    assert result.stdout.startswith("Still STOPPED: agent=qa_agent, by ann")


# --- audit, verify ---------------------------------------------------------------------------------------------------


def test_the_audit_log_tells_who_did_what(house: House) -> None:
    house.serve()
    assert house.run("audit").output == "Nobody has done anything by hand.\n"
    house.run("stop", "--why", "first", "--who", "bob")
    house.run("resume", "--why", "second")
    lines = [cells(line) for line in house.run("audit").output.splitlines()[2:]]
    assert [line[:3] for line in lines] == [
        ["2026-11-21T12:00:00Z", "ann", "resumed"], ["2026-11-21T12:00:00Z", "bob", "stopped"],
    ]  # fmt: skip
    (latest,) = msgspec.json.decode(house.run("audit", "--json", "--limit", "1").output)
    assert (latest["who"], latest["details"]["why"]) == ("ann", "second")


def test_verify_finds_what_somebody_wrote_into_the_file(house: House) -> None:
    house.serve(row("a"))
    assert house.run("verify").exit_code == 0
    import sqlite3

    with sqlite3.connect(house.ledger_path) as database:
        database.execute("UPDATE ledger SET nusd = nusd - 1")
    database.close()
    result = house.run("verify")
    assert result.exit_code == 1
    assert "holds 1000000000, of it 0 in doubt; the ledger says 999999999" in result.output


# --- Help ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [None, *costs.commands])
def test_every_command_and_every_option_explains_itself(house: House, name: str | None) -> None:
    command = costs.commands[name] if name else main.commands["costs"]
    assert command.help
    assert "..." not in command.get_short_help_str(limit=66)
    assert not [option for option in command.params if option.param_type_name == "option" and not option.help]
    assert house.run(*([name] if name else []), "-h").exit_code == 0


@pytest.mark.parametrize("name", costs.commands)
def test_every_command_is_documented(name: str) -> None:
    for document in ("cli.md", "costs.md"):
        text = (ROOT / "docs" / document).read_text()
        assert re.search(rf"costs {name}\b|`{name} ", text), document


def test_every_scope_of_the_kill_switch_is_documented() -> None:
    text = (ROOT / "docs" / "costs.md").read_text()
    assert not [name for name in SWITCHES if f"`{name}=" not in text]


class Slack(BaseHTTPRequestHandler):
    """A receiver of webhooks, on a thread beside the command."""

    told: ClassVar[list[str]] = []
    status = 200

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.told.append(body["text"])
        self.send_response(self.status)
        self.end_headers()

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.mark.parametrize("status", [200, 404])
def test_a_kill_switch_is_told_in_slack_by_who_throws_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    monkeypatch.setattr(Slack, "told", [])
    monkeypatch.setattr(Slack, "status", status)
    with ThreadingHTTPServer(("127.0.0.1", 0), Slack) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            hook = f"http://127.0.0.1:{server.server_port}/hook/secret"
            policy = f'[alerting]\nenabled = true\nslack_webhook = "{hook}"\n'
            house = House(tmp_path, monkeypatch, policy=policy)
            house.serve()
            stopped = house.run("stop", "agent=qa_agent", "--why", "runs wild")
            resumed = house.run("resume", "agent=qa_agent")
        finally:
            server.shutdown()
            thread.join()
    # What Slack says does not touch the switch.
    assert (stopped.exit_code, resumed.exit_code) == (0, 0)
    assert ("Slack could not be told" in stopped.stderr) is (status != 200)
    assert "secret" not in stopped.output + resumed.output
    assert [text.partition(",")[0] for text in Slack.told] == [
        "Calls of agent `qa_agent` are refused", "Calls of agent `qa_agent` are let through again",
    ]  # fmt: skip
