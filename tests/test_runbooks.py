"""Every command that a runbook says can be typed is typed, beside a real gateway, and must succeed.

One `gateway serve` for all of them, in production's policy, on the simulator, after some calls: `qa_agent` has a
baseline that answers 503, and calls of `legal_agent` ran out of time, so that there is something to see.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
RUNBOOKS = sorted((ROOT / "docs" / "runbooks").glob("*.md"))
BLOCK = re.compile(r"^```sh run\n(.*?)^```$", re.DOTALL | re.MULTILINE)
MISSING = [tool for tool in ("bash", "curl", "grep", "sed", "awk") if shutil.which(tool) is None]
PATIENCE_S = 30.0
ASK = "curl -s -o /dev/null -H 'x-gateway-user: u-{user}' {more} 127.0.0.1:8080/v1/chat/completions -d '{body}' &"
BODY = '{{"model": "{agent}", "max_tokens": {most}, "messages": [{{"role": "user", "content": "What of {user}?"}}]}}'


class Shell(NamedTuple):
    """Where a runbook is worked through."""

    folder: Path
    environ: dict[str, str]
    addresses: dict[str, str]

    def lay_out(self) -> None:
        """The shipped files, on the simulator, with a baseline that fails."""
        config = (ROOT / "config.toml").read_text()
        begin = config.index("[agents.qa_agent]")
        config = config[:begin] + config[begin:].replace("mistral/open-mistral-7b", "mistral/fault:503", 1)
        config += '\n[prices."mistral/fault:*"]\ninput_usd_per_mtok = "0.2"\noutput_usd_per_mtok = "0.2"\n'
        policy = (ROOT / "policies" / "production.toml").read_text()
        policy = policy.replace("[models]\n", '[models]\nupstream = "simulator"\n', 1)
        (self.folder / "policies").mkdir(exist_ok=True)
        for name in ("dev.toml", "staging.toml", "routing.toml"):
            shutil.copy(ROOT / "policies" / name, self.folder / "policies" / name)
        # As an editor does it: the gateway, which watches, sees the old file or the new one.
        for name, text in (("config.toml", config), ("policies/production.toml", policy)):
            (self.folder / "draft").write_text(text)
            (self.folder / "draft").replace(self.folder / name)

    def type(self, commands: str) -> subprocess.CompletedProcess[str]:
        """Type them as they stand, but for the ports; the first that fails ends it."""
        for written, real in self.addresses.items():
            commands = commands.replace(written, real)
        return subprocess.run(
            ["bash", "-euo", "pipefail", "-c", commands], cwd=self.folder, env=self.environ,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=PATIENCE_S,
        )  # fmt: skip


@contextmanager
def gateway(folder: Path) -> Iterator[Shell]:
    """A gateway that has served some calls; killed at the end."""
    (folder / "bin").mkdir()
    command = folder / "bin" / "gateway"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m gateway "$@"\n')
    command.chmod(0o755)
    environ = {
        **os.environ,
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "GATEWAY_ENV": "production",
        "GATEWAY_DATA": "127.0.0.1:0",
        "GATEWAY_ADMIN": "127.0.0.1:0",
    }
    shell = Shell(folder, environ, {})
    shell.lay_out()
    with (folder / "log").open("w") as log:
        child = subprocess.Popen(
            [command, "serve"], cwd=folder, env=environ, stdout=subprocess.PIPE, stderr=log, text=True
        )
    try:
        assert child.stdout is not None
        said = ""
        while not (found := re.search(r"agents +http://(\S+)/v1 .*?admin +http://(\S+) ", said, re.DOTALL)):
            line = child.stdout.readline()
            assert line, said + (folder / "log").read_text()
            said += line
        shell.addresses.update({"127.0.0.1:8080": found[1], "127.0.0.1:9090": found[2]})
        yield shell
    finally:
        child.kill()
        child.communicate()


def ask_all(shell: Shell) -> None:
    """Calls that are answered, fail over, are refused or run out of time; all at once."""
    asked = [("qa_agent", user, 32, "") for user in range(12)] + [("support_agent", user, 32, "") for user in range(3)]
    asked += [("nobody", 0, 1, "")]
    asked += [("legal_agent", user, 64, "-H 'x-gateway-timeout-ms: 50'") for user in range(4)]
    lines = [
        ASK.format(user=user, more=more, body=BODY.format(agent=agent, most=most, user=user))
        for agent, user, most, more in asked
    ]
    done = shell.type("\n".join([*lines, "wait"]))
    assert done.returncode == 0, done.stdout


# Some sixty processes, one after the other.
@pytest.mark.timeout(240)
@pytest.mark.skipif(bool(MISSING), reason=f"not on PATH: {', '.join(MISSING)}")
def test_every_command_of_the_runbooks_runs(tmp_path: Path) -> None:
    with gateway(tmp_path) as shell:
        ask_all(shell)
        for path in RUNBOOKS:
            shell.lay_out()
            for block in BLOCK.findall(path.read_text()):
                done = shell.type(block)
                assert done.returncode == 0, f"{path.name}:\n{block}\n{done.stdout}\n{(tmp_path / 'log').read_text()}"
                # A command that shows nothing shows its reader nothing.
                assert done.stdout.strip(), f"{path.name}:\n{block}"


@pytest.mark.parametrize("path", [path for path in RUNBOOKS if path.name != "README.md"], ids=lambda path: path.name)
def test_a_runbook_leads_from_the_first_look_to_the_end(path: Path) -> None:
    text = path.read_text()
    titles = re.findall(r"^## (.*)$", text, flags=re.MULTILINE)
    assert titles[0] in {"First look", "Before each step"}
    assert {"The alerts", "Decide", "It is over when", "Escalate"} <= set(titles)
    assert len(BLOCK.findall(text)) >= 3
    # Each block is followed by what it showed.
    assert len(re.findall(r"^```sh run\n.*?^```\n\n?```\n", text, flags=re.DOTALL | re.MULTILINE)) == len(
        BLOCK.findall(text)
    )


def test_the_index_names_every_runbook_and_alert() -> None:
    index = (ROOT / "docs" / "runbooks" / "README.md").read_text()
    assert not [path.name for path in RUNBOOKS if path.name != "README.md" and f"({path.name})" not in index]
    alerts = re.findall(r"- alert: (\w+)", (ROOT / "prometheus" / "alerts.yml").read_text())
    rows = {
        alert: file
        for file, alerts_ in re.findall(r"^\| \[(\S+)\]\(\S+\) \| (.*) \|$", index, flags=re.MULTILINE)
        for alert in alerts_.replace(";", ",").split(", ")
    }
    for alert in alerts:
        assert f"### {alert}\n" in (ROOT / "docs" / "runbooks" / rows[alert]).read_text()
