"""The Dockerfile, proved as far as can be without a container engine: linted, parsed, its sources looked for.

It does not build the image. The builder's steps are plain pip calls on the locks test_toolchain.py checks.
"""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import click
import pytest

from gateway.cli.main import main

ROOT = Path(__file__).parent.parent


class Step(NamedTuple):
    """One instruction and the stage it belongs to."""

    stage: int
    word: str
    rest: str


def read_steps() -> list[Step]:
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    steps: list[Step] = []
    stage = -1
    for line in text.replace("\\\n", " ").splitlines():
        if not line.strip():
            continue
        word, rest = line.split(None, 1)
        stage += word == "FROM"
        steps.append(Step(stage, word, " ".join(rest.split())))
    return steps


STEPS = read_steps()
LAST = [step for step in STEPS if step.stage == STEPS[-1].stage]


def only(word: str) -> str:
    """The one instruction of that name in the final stage."""
    [found] = [step.rest for step in LAST if step.word == word]
    return found


def copied_from_the_tree() -> list[str]:
    copies = [step.rest.split() for step in STEPS if step.word == "COPY" and "--from=" not in step.rest]
    return [source for words in copies for source in words[:-1]]


def is_sent_to_the_builder(path: str) -> bool:
    """Docker's rule: the last pattern that matches a path or one of its parents decides."""
    sent = True
    parents = [path, *(str(p) for p in Path(path).parents if str(p) != ".")]
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        pattern = re.escape(line.removeprefix("!").strip("/"))
        pattern = pattern.replace(r"\*\*/", "(?:.*/)?").replace(r"\*", "[^/]*")
        if any(re.fullmatch(pattern, parent) for parent in parents):
            sent = line.startswith("!")
    return sent


def test_hadolint_finds_nothing() -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([hadolint, "Dockerfile"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.parametrize("source", copied_from_the_tree())
def test_what_is_copied_exists_and_reaches_the_builder(source: str) -> None:
    assert (ROOT / source).exists()
    assert (ROOT / source).is_dir() == source.endswith("/")
    assert is_sent_to_the_builder(source.rstrip("/"))


@pytest.mark.parametrize("secret", [".env", ".git", "state", "reports", ".venv", "gateway/__pycache__", "tests"])
def test_what_is_private_never_reaches_the_builder(secret: str) -> None:
    assert not is_sent_to_the_builder(secret)


def test_files_the_build_backend_reads_are_copied() -> None:
    assert {"pyproject.toml", "README.md", "LICENSE", "gateway/"} <= set(copied_from_the_tree())


def test_it_runs_as_a_number_that_is_not_root() -> None:
    assert only("USER") == "10001:10001"
    assert LAST.index(Step(LAST[0].stage, "USER", only("USER"))) > max(
        index for index, step in enumerate(LAST) if step.word in ("RUN", "COPY")
    )


def test_it_writes_nowhere_but_to_its_volume() -> None:
    assert only("VOLUME") == "/state"
    assert "PYTHONDONTWRITEBYTECODE=1" in only("ENV")
    # config.toml's relative paths are taken from the working directory.
    assert only("WORKDIR") == "/app"
    assert "ln -s /state /app/state" in only("RUN")


def test_every_package_is_installed_by_its_hash_and_none_is_compiled() -> None:
    fetches = [
        command
        for step in STEPS
        if step.word == "RUN"
        for command in step.rest.split("&&")
        if re.search(r"\bpip\b.* (?:install|download) ", command)
    ]
    assert len(fetches) == 3
    for command in fetches:
        by_hash = "--require-hashes" in command and "--only-binary=:all:" in command
        assert by_hash or "--no-deps --no-build-isolation ." in command, command


def test_the_final_stage_takes_the_venv_and_no_tool_that_made_it() -> None:
    assert [step.rest for step in LAST if "--from=" in step.rest] == ["--from=builder /venv /venv"]
    assert "--without-pip" in " ".join(step.rest for step in STEPS if step.word == "RUN")


def test_both_stages_stand_on_the_same_python() -> None:
    # A venv links to its interpreter, so another base would leave it dangling.
    bases = [step.rest.split()[0] for step in STEPS if step.word == "FROM"]
    assert len(bases) == 2
    assert len(set(bases)) == 1


def test_its_commands_are_commands_of_the_gateway() -> None:
    assert isinstance(main, click.Group)
    assert json.loads(only("ENTRYPOINT")) == ["gateway"]
    assert json.loads(only("CMD"))[0] in main.commands
    program, command = json.loads(only("HEALTHCHECK").split(" CMD ")[1])
    assert program == "gateway"
    assert command in main.commands


def test_it_drains_on_the_signal_a_pod_sends() -> None:
    assert only("STOPSIGNAL") == "SIGTERM"


def test_it_names_the_ports_of_both_listeners() -> None:
    assert only("EXPOSE") == "8080 9090"
