"""The demo itself, quick: a real gateway, the real SDK, and checks that hold."""

import signal
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from gateway.domain.call import CallRecord
from gateway.lab import demo
from gateway.lab.questions import read_questions
from gateway.lab.trial_gateway import Tables, read_tables
from gateway.simulator.faults import fault_of

ROOT = Path(__file__).parents[2]
QUESTIONS = ROOT / "tests" / "data" / "mt_bench_questions.jsonl"
CHECKS = 8


def shipped(env: str) -> Tables:
    return read_tables(ROOT / "config.toml", ROOT / "policies", env)


async def shown(env: str, share_percent: float | None) -> list[str]:
    """The lines of a quick run that must end well."""
    order = demo.Order(shipped(env), demo.quick(read_questions(QUESTIONS)), demo.QUICK_USERS, share_percent)
    paper = StringIO()
    assert await demo.run_demo(order, Console(file=paper, width=demo.FILE_COLUMNS)), paper.getvalue()
    return paper.getvalue().splitlines()


def row(lines: list[str], *begins: str) -> list[str]:
    return next(cells for line in lines if (cells := line.split())[: len(begins)] == list(begins))


async def test_at_half_the_users_both_variants_answer_and_a_faulty_model_is_fallen_back_from() -> None:
    lines = await shown("production", 50)
    assert len([line for line in lines if line.startswith("ok")]) == CHECKS
    assert not [line for line in lines if line.startswith("FAILED")]
    total = row(lines, "all", "80")
    fallbacks, errors = map(int, total[-2:])
    assert errors == 0
    # The simulator's faults are decided by the request, so they are the same ones every time.
    assert fallbacks == int(row(lines, "qa_agent", "finetuned")[-2]) > 0
    assert int(row(lines, "content_agent", "finetuned")[2]) + int(row(lines, "content_agent", "baseline")[2]) == 20
    assert any("x-gateway-route: " in line for line in lines)


async def test_without_an_experiment_everybody_gets_the_baseline_and_nothing_fails_on_purpose() -> None:
    lines = await shown("dev", None)
    assert not [line for line in lines if "On purpose" in line]
    assert not [line for line in lines if "finetuned" in line]
    assert "No experiment ran." in lines
    assert len([line for line in lines if line.startswith("ok")]) == CHECKS


def test_a_quick_run_asks_one_question_of_each_kind() -> None:
    questions = demo.quick(read_questions(QUESTIONS))
    assert len(questions) == len({question.category for question in questions}) == 8
    assert len(demo.quick(questions[:3])) == 3


def test_a_run_whose_checks_fail_shows_them_with_the_gateways_own_words() -> None:
    paper = StringIO()
    lost = CallRecord(id="req-1", at_ms=0, env="production", agent="qa_agent")
    outcome = demo.Outcome([], [lost], torn=1, journal=b"", metrics="", log="disk on fire", took_s=1.0)
    assert not demo.show_checks(outcome, shipped("production"), Console(file=paper, width=demo.FILE_COLUMNS))
    text = paper.getvalue()
    assert text.count("FAILED") == CHECKS + 1
    assert "1 lines of the journal are torn" in text
    assert "disk on fire" in text


def test_the_fault_is_one_that_the_simulator_knows() -> None:
    fault = fault_of(f"ft:m:fault:{demo.FAULT}")
    assert fault is not None
    assert (fault.name, fault.rate) == ("503", 0.2)


def run_cli(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "gateway", "demo", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=50)


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (("--questions", "nowhere.jsonl"), "nowhere.jsonl"),
        (("--questions", "config.toml"), "config.toml:1: not a question"),
        (("--env", "prodution"), "production"),
    ],
)
def test_a_wrong_argument_is_said_in_a_line_and_ends_in_1(arguments: tuple[str, ...], complaint: str) -> None:
    done = run_cli(*arguments)
    assert done.returncode == 1
    assert complaint in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopping_it_takes_the_gateway_down_too(tmp_path: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "gateway", "demo"]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={"TMPDIR": str(tmp_path), "PATH": ""},
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stderr is not None
        # The last line before the work begins.
        assert any("On purpose" in line for line in process.stdout)
        process.send_signal(number)
        # The gateway holds the other end of the pipe no longer than it lives.
        errors = process.stderr.read()
        assert process.wait() == 1
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []
