"""Options and failures that all commands have in common."""

from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from gateway.cli.options import configured, fail, load_or_exit

ROOT = Path(__file__).parents[2]


@click.command()
@configured
def which(config: Path, policies: Path, env: str | None) -> None:
    """Say what is loaded."""
    click.echo(load_or_exit(config, policies, env, want_secrets=False).env)


@pytest.mark.parametrize(("env", "arguments", "said"), [
    (None, [], "dev"), ("staging", [], "staging"), ("staging", ["--env", "production"], "production"),
])  # fmt: skip
def test_the_option_goes_before_the_environment(
    env: str | None, arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    result = CliRunner().invoke(which, arguments, env={"GATEWAY_ENV": env, "GENESIS_ENV": None})
    assert (result.exit_code, result.output) == (0, f"{said}\n")


def test_a_configuration_with_problems_ends_in_words_and_status_1(tmp_path: Path) -> None:
    result = CliRunner().invoke(which, ["--config", str(tmp_path / "none.toml")], env={"GATEWAY_ENV": None})
    assert result.exit_code == 1
    assert "none.toml" in result.stderr
    assert result.stdout == ""


def test_failing_is_said_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        fail("no luck")
    assert caught.value.code == 1
    assert capsys.readouterr() == ("", "no luck\n")
