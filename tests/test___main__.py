"""`python -m gateway` is the same as `gateway`: the same words, the same exit status."""

from tests.cli.test_main import process


def test_the_module_is_the_command() -> None:
    done = process("check", GATEWAY_ENV="production")
    assert done.returncode == 1
    assert "policies/dev.toml: ok" in done.stdout
    assert "MISTRAL_API_KEY" in done.stderr
    assert "Traceback" not in done.stderr
