"""The `costs` commands with files: out whole or not at all, in whole or not at all, and compared with a provider's."""

import csv
import re
import sys
from io import StringIO
from pathlib import Path

import click
import pytest

from gateway.cli import cost_files
from gateway.domain.ledger import Amounts
from gateway.lab.ledger_csv import COLUMNS
from gateway.lab.provider_usage import UsageDay
from tests.ledgers import DAY_MS, LEGAL, NOON_MS, QA, USD, House, row

POLICY = '[[caps]]\nper = "day"\nusd = "20"\n'
YESTERDAY_MS = NOON_MS - DAY_MS


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> House:
    return House(tmp_path, monkeypatch, policy=POLICY)


# --- export, import --------------------------------------------------------------------------------------------------


def test_what_is_exported_comes_back_equal_in_another_house(
    house: House, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        row("a", 1_234_567_891, note='=cmd|"x"', prompt_tokens=60, completion_tokens=40),
        row("b", state="in_doubt", basis="bound"),
        row("c", state="void", basis="none", amounts=Amounts()),
        row("d", on=LEGAL, at_ms=NOON_MS + DAY_MS),
        row("e", env="dev"),
    ]
    house.serve(*rows)
    result = house.run("export", "out.csv")
    assert (result.exit_code, result.output) == (0, "4 rows to out.csv\n")
    assert sorted(path.name for path in house.path.glob("*out*")) == ["out.csv"]
    other = House(tmp_path_factory.mktemp("other"), monkeypatch, policy=POLICY)
    (other.path / "in.csv").write_bytes((house.path / "out.csv").read_bytes())
    said = other.run("import", "in.csv").output
    assert said == "in.csv: 4 rows, 3.234567891 usd; 4 added, 0 known before\n"
    with other.ledger() as ledger:
        assert list(ledger.rows("production")) == rows[:4]
        assert ledger.verify("production") == []
    # Once more, and nothing is counted twice.
    assert other.run("import", "in.csv").output.endswith("0 added, 4 known before\n")


def test_an_export_goes_to_stdout_for_a_pipe_and_holds_the_time_asked_for(house: House) -> None:
    house.serve(row("a", at_ms=YESTERDAY_MS), row("b"), row("c", at_ms=NOON_MS + DAY_MS))
    text = house.run("export", "-", "--since", "today", "--until", "2026-11-22").output
    lines = list(csv.DictReader(StringIO(text)))
    assert tuple(lines[0]) == COLUMNS
    assert [line["id"] for line in lines] == ["b"]
    assert len(list(csv.DictReader(StringIO(house.run("export", "-").output)))) == 3


def test_an_import_from_stdin_is_named_so(house: House) -> None:
    result = house.run("import", "-", stdin=b"time,agent,usd\n2026-11-21T11:00:00Z,qa_agent,0.50\n")
    assert result.output == "stdin: 1 row, 0.50 usd; 1 added, 0 known before\n"
    with house.ledger() as ledger:
        (booked,) = ledger.rows("production")
        assert (booked.amounts.nusd, booked.source, ledger.audit()[0].who) == (USD // 2, "import", "ann")


def test_every_problem_is_told_and_nothing_is_half_imported(house: House) -> None:
    lines = ["time,agent,usd", "2026-11-21,qa_agent,1", "yesterday,qa_agent,1,50", "2026-11-21,,-1"]
    (house.path / "bad.csv").write_text("\n".join(lines))
    result = house.run("import", "bad.csv")
    assert (result.exit_code, result.stdout) == (1, "")
    *problems, last = result.stderr.splitlines()
    assert [line.partition(" ")[0] for line in problems] == ["bad.csv:3:", "bad.csv:4:", "bad.csv:4:"]
    assert last == "3 problems; nothing was booked"
    with house.ledger() as ledger:
        assert list(ledger.rows("production")) == []


def test_an_id_that_says_something_else_is_refused_with_the_whole_file(house: House) -> None:
    house.serve(row("job-1"))
    (house.path / "in.csv").write_text("id,time,agent,usd\nnew,2026-11-21,qa_agent,1\njob-1,2026-11-21,qa_agent,2\n")
    result = house.run("import", "in.csv")
    assert result.exit_code == 1
    assert "with other content: job-1; nothing was booked" in result.stderr
    with house.ledger() as ledger:
        assert [booked.id for booked in ledger.rows("production")] == ["job-1"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["import", "no.csv"], "no.csv cannot be read: No such file or directory"),
        (["export", "no/out.csv"], "no/out.csv cannot be written: No such file or directory"),
        (["reconcile", "no.csv"], "no.csv cannot be read: No such file or directory"),
    ],
)
def test_a_file_that_is_not_there_is_said_in_one_line(house: House, arguments: list[str], said: str) -> None:
    house.serve()
    result = house.run(*arguments)
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", f"{said}\n")


# --- reconcile -------------------------------------------------------------------------------------------------------


def usage(house: House, *lines: str) -> str:
    (house.path / "usage.csv").write_text("\n".join(["day,model,prompt_tokens,completion_tokens,usd", *lines]) + "\n")
    return "usage.csv"


def test_figures_that_agree_are_exit_status_0(house: House) -> None:
    house.serve(row("a", at_ms=YESTERDAY_MS, prompt_tokens=60, completion_tokens=40))
    result = house.run("reconcile", usage(house, "2026-11-20,small,60,40,1.00"))
    assert result.exit_code == 0
    assert re.search(r"2026-11-20 +small +100 +100 +1\.00 +1\.00 +- +equal", result.output)


def test_figures_that_nothing_explains_are_exit_status_1(house: House) -> None:
    house.serve(row("a", at_ms=YESTERDAY_MS, prompt_tokens=60, completion_tokens=40))
    result = house.run("reconcile", usage(house, "2026-11-20,small,600,400,10.00"))
    assert result.exit_code == 1
    assert "unexplained" in result.output


def test_doubts_that_are_settled_are_named_and_with_apply_ended(house: House) -> None:
    doubt = row("req-2.1", at_ms=YESTERDAY_MS, state="in_doubt", basis="bound")
    house.serve(row("req-1.1", at_ms=YESTERDAY_MS, prompt_tokens=60, completion_tokens=40), doubt)
    file = usage(house, "2026-11-20,small,60,40,1.00")
    told = house.run("reconcile", file)
    assert "  req-2.1: not counted by the provider; can be freed\n" in told.output
    assert told.output.endswith("Give the same command with --apply to do so.\n")
    with house.ledger() as ledger:
        assert len(ledger.in_doubt("production")) == 1
    assert house.run("reconcile", file, "--apply").output.endswith(
        "1 out of doubt: 1 freed, 0 booked with what they did cost.\n"
    )
    with house.ledger() as ledger:
        assert ledger.in_doubt("production") == []
        assert ledger.audit()[0].who == "ann"
        assert '"why":"reconciled with usage.csv"' in ledger.audit()[0].details


def test_a_file_with_problems_compares_nothing(house: House) -> None:
    house.serve()
    result = house.run("reconcile", usage(house, "2026-11-20,small,sixty,40,1"))
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("usage.csv:2: prompt_tokens")
    assert result.stderr.endswith("1 problem; nothing was compared\n")


def test_where_neither_side_has_anything_it_says_so(house: House) -> None:
    house.serve()
    assert house.run("reconcile", usage(house)).output == "Neither side has anything in that time.\n"


def test_mistral_is_asked_with_a_key_or_not_at_all(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    house.serve(row("a", at_ms=YESTERDAY_MS, prompt_tokens=60, completion_tokens=40))
    result = house.run("reconcile", "mistral")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "upstreams.mistral has no key here; give an Admin API key by --key-file\n"
    asked: list[tuple[str, int, int]] = []

    async def answer(session: object, key: object, *, year: int, month: int) -> list[UsageDay]:
        asked.append((key.reveal(), year, month))  # type: ignore[attr-defined]
        return [UsageDay("2026-11-20", "small", 60, 40, USD)]

    monkeypatch.setattr("gateway.lab.provider_usage.fetch_mistral_usage", answer)
    (house.path / "key").write_text("adm-1\n")
    result = house.run("reconcile", "mistral", "--key-file", "key")
    assert (result.exit_code, asked) == (0, [("adm-1", 2026, 11)])
    assert "equal" in result.output
    assert house.run("reconcile", "mistral", "--key-file", "key", "--month", "2026-13").exit_code == 2
    assert house.run("reconcile", "mistral", "--upstream", "nobody").exit_code == 2


# --- report ----------------------------------------------------------------------------------------------------------


def test_the_report_is_written_where_it_is_wanted(house: House) -> None:
    house.serve(row("a"), row("b", on=QA._replace(agent="legal_agent")))
    result = house.run("report")
    assert result.exit_code == 0, result.stderr
    assert result.output == "reports/cost_dashboard.md, with 4 plots in reports/cost_dashboard\n"
    plots = sorted(path.name for path in (house.path / "reports" / "cost_dashboard").iterdir())
    assert plots == ["cap-1.svg", "model.svg", "operation.svg", "spend.svg"]
    assert house.run("report", "--out", "here.md", "--since", "30d").exit_code == 0
    assert (house.path / "here.md").is_file()


def test_a_report_that_cannot_be_written_says_why(house: House) -> None:
    house.serve()
    (house.path / "reports").write_text("a file in its way")
    result = house.run("report")
    assert result.exit_code == 1
    assert result.stderr.startswith("reports/cost_dashboard.md cannot be written: ")


def test_without_matplotlib_the_report_has_no_plots(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    house.serve(row("a"))
    result = house.run("report")
    assert (result.exit_code, result.stdout) == (0, "reports/cost_dashboard.md, without plots: it says why\n")
    assert "pip install 'genesis-gateway[reports]'" in (house.path / "reports" / "cost_dashboard.md").read_text()


def test_who_looks_on_sees_that_it_goes_on(
    house: House, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cost_files, "is_terminal", lambda: True)
    with cost_files.at_work("counting"):
        click.echo("done")
    assert capsys.readouterr().out == "done\n"
