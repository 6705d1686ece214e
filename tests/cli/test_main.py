"""The `gateway` command as a person meets it: what it prints, where, and with which exit status."""

import os
import re
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from gateway.cli.main import main, to_toml
from gateway.config import effective, load
from gateway.decide.identify import find_caller
from gateway.domain.errors import Refused
from tests.test_config import SHIPPED, Files

ROOT = Path(__file__).parents[2]


def run(*arguments: str, **environ: str) -> Result:
    """`gateway ...` on the shipped files, within this process."""
    variables = {"GATEWAY_ENV": None, "GENESIS_ENV": None, "MISTRAL_API_KEY": None, **environ}
    return CliRunner().invoke(main, list(arguments), env=variables, catch_exceptions=False)


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a person who has just cloned the repository stands."""
    monkeypatch.chdir(ROOT)


def words(text: str) -> str:
    """The text without its layout."""
    return " ".join(text.split())


# --- Help ------------------------------------------------------------------------------------------------------------


def test_help_says_what_it_is_and_names_every_command() -> None:
    result = run("--help")
    assert result.exit_code == 0
    assert "gateway serve" in result.output
    assert "http://127.0.0.1:8080/v1" in result.output
    listed = re.findall(r"^  (\w+)  +\S", result.output.partition("Commands:")[2], re.M)
    assert listed == sorted(main.commands)
    assert {"serve", "check", "config", "explain", "keys", "ping", "simulator"} <= set(listed)


@pytest.mark.parametrize(
    "command", [["serve"], ["check"], ["config", "show"], ["config", "get"], ["explain"], ["ping"], ["simulator"]]
)
def test_every_command_and_every_option_explains_itself(command: list[str]) -> None:
    found: Any = main
    for part in command:
        found = found.commands[part]
    assert found.help
    # Cut short in the list of commands, a sentence helps nobody.
    assert "..." not in found.get_short_help_str(limit=66)
    assert not [option.name for option in found.params if option.param_type_name == "option" and not option.help]
    assert run(*command, "-h").exit_code == 0


def test_the_version_is_the_packages() -> None:
    assert re.fullmatch(r"gateway, version \d+\.\d+\.\d+\n", run("--version").output)


@pytest.mark.parametrize("arguments", [["srve"], ["config", "shw"], ["explain"], ["check", "--no-such"]])
def test_a_wrong_command_line_is_exit_status_2(arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert "Usage:" in result.stderr


# --- check -----------------------------------------------------------------------------------------------------------


def at(files: Files) -> list[str]:
    """The options that point at files of a test's own."""
    return ["--config", str(files.paths.config), "--policies", str(files.paths.policies)]


@pytest.fixture
def files(tmp_path: Path) -> Files:
    """Files that are in order, and can be spoilt."""
    return Files(tmp_path)


def test_check_passes_the_shipped_files_and_says_what_serving_them_would_need() -> None:
    result = run("check")
    assert result.exit_code == 0
    assert result.output.splitlines() == [
        "policies/dev.toml: ok",
        "policies/production.toml: ok   (to serve it, set MISTRAL_API_KEY)",
        "policies/staging.toml: ok   (to serve it, set MISTRAL_API_KEY)",
    ]


def test_check_wants_the_secrets_of_the_chosen_environment_only() -> None:
    result = run("check", GATEWAY_ENV="production")
    assert result.exit_code == 1
    assert "policies/staging.toml: ok" in result.stdout
    assert "set the environment variable MISTRAL_API_KEY" in result.stderr
    assert run("check", GATEWAY_ENV="production", MISTRAL_API_KEY="k").exit_code == 0


def test_check_tells_every_problem_of_every_environment_once(files: Files) -> None:
    files.write(dev="[modles]", staging="[models]\nunknown_agent = 1", production="[models]\nuse_finetuned = false")
    files.write(config=files.paths.config.read_text() + '\n[server]\nadmin = "nowhere"\n')
    result = run("check", *at(files))
    assert result.exit_code == 1
    assert result.stdout == ""
    said = result.stderr
    assert said.count("server.admin") == said.count("modles") == said.count("models.unknown_agent") == 1
    assert said.count("1 problem\n") == 3


def test_check_of_a_good_environment_is_told_beside_a_bad_one(files: Files) -> None:
    files.write(staging="[modles]")
    result = run("check", *at(files))
    assert result.exit_code == 1
    assert "dev.toml: ok" in result.stdout
    assert 'did you mean "models"?' in result.stderr


def test_check_notes_models_that_a_cap_in_dollars_will_refuse(files: Files) -> None:
    files.write(dev='[models]\nuse_finetuned = false\n[[caps]]\nper = "day"\nusd = "1"\n')
    result = run("check", *at(files))
    assert result.exit_code == 0
    assert "note: sim/small has no price, and a cap in dollars applies" in result.output


def test_check_notes_what_rests_while_fine_tuned_models_are_switched_off(files: Files) -> None:
    files.write(dev='[models]\nuse_finetuned = false\n[ab_testing]\nenabled = true\n[shadow]\npercent = 5\nusd = "1"\n')
    result = run("check", *at(files))
    assert result.exit_code == 0
    for name in ("ab_testing", "shadow"):
        assert f"note: [{name}] rests while models.use_finetuned is false" in result.output


@pytest.mark.parametrize("command", [["check"], ["serve"], ["config", "show"], ["ping"], ["explain", "hello"]])
def test_an_unknown_environment_is_refused_by_every_command(command: list[str]) -> None:
    for result in (run(*command, "--env", "prodution"), run(*command, GENESIS_ENV="prodution")):
        assert result.exit_code == 1
        assert 'did you mean "production"?' in result.stderr
        assert "known: dev, production, staging" in result.stderr


def test_a_newcomer_in_the_wrong_folder_is_told_where_to_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("serve")
    assert result.exit_code == 1
    assert "start where config.toml and policies/ are" in result.stderr


def test_serving_production_without_its_key_names_the_variable() -> None:
    result = run("serve", GATEWAY_ENV="production")
    assert result.exit_code == 1
    assert words(result.stderr) == (
        "config.toml: 1 problem upstreams.mistral.api_key "
        "set the environment variable MISTRAL_API_KEY; this environment sends calls to mistral"
    )


# --- config ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("env", ["dev", "staging", "production"])
def test_config_show_is_toml_of_all_that_is_in_force_without_secrets(env: str) -> None:
    result = run("config", "show", "--env", env, MISTRAL_API_KEY="very-secret", GATEWAY_ADMIN_TOKEN="very-secret")
    assert result.exit_code == 0
    assert "very-secret" not in result.output
    environ = {"MISTRAL_API_KEY": "k", "GATEWAY_ADMIN_TOKEN": "k"}
    loaded = load(SHIPPED, env, litellm_map={}, environ=environ)
    assert without_empty(tomllib.loads(result.output)) == without_empty(effective(loaded))


def without_empty(value: Any) -> Any:
    """Without empty tables, which the writer leaves out of lists; they say nothing."""
    if isinstance(value, dict):
        return {key: without_empty(item) for key, item in value.items() if item != {}}
    return [without_empty(item) for item in value] if isinstance(value, list) else value


@given(st.dictionaries(st.from_regex(r"[a-z]{1,5}", fullmatch=True), st.text() | st.lists(st.text())))
def test_whatever_a_text_holds_it_is_written_as_toml(table: dict[str, Any]) -> None:
    assert tomllib.loads(to_toml(table)) == table


@pytest.mark.parametrize(
    "key, env, printed",
    [
        ("models.use_finetuned", "production", "true"),
        ("models.use_finetuned", "dev", "false"),
        ("server.data", "dev", "127.0.0.1:8080"),
        ("caps.0.usd", "production", "20.00"),
        ("caps[0].warn_at", "production", "[0.25,0.5,0.83]"),
        ("upstreams.mistral.api_key", "dev", "${MISTRAL_API_KEY} (not set)"),
    ],
)
def test_config_get_prints_one_value_for_a_script_to_read(key: str, env: str, printed: str) -> None:
    result = run("config", "get", key, "--env", env)
    assert (result.exit_code, result.stdout) == (0, f"{printed}\n")


def test_config_get_of_what_is_not_there_suggests_what_is() -> None:
    result = run("config", "get", "models.use_finetund")
    assert (result.exit_code, result.stdout) == (1, "")
    assert 'did you mean "models.use_finetuned"?' in result.stderr


# --- explain ---------------------------------------------------------------------------------------------------------


def test_explain_says_who_would_answer_and_why() -> None:
    result = run("explain", "--env", "production", "--user", "u1", "Where is my order?")
    assert result.exit_code == 0
    said = dict(re.findall(r"^(\w+(?: \d)?) {2,}(.*)$", result.output, re.M))
    assert said["agent"].startswith("support_agent ")
    assert 'word "my order"' in said["agent"]
    assert re.search(r"\(experiment; bucket \d+ of 10000, share 10 %[,)]", said["variant"])
    assert said["chain 1"].startswith("mistral/")
    assert "usd per million tokens" in said["chain 1"]
    assert "20.00" in said["caps"]
    assert '"max_tokens":4096' in said["sent"]


def test_explain_as_json_is_one_object() -> None:
    result = run("explain", "--env", "production", "--json", "--header", "X-Gateway-Agent: legal_agent", "hello")
    found = msgspec.json.decode(result.output)
    assert (found["env"], found["agent"], found["agent_from"]) == ("production", "legal_agent", "header")
    assert found["chain"][0]["model"] == "mistral/open-mistral-7b"
    assert found["bucket"] is None
    assert len(found["caps"]) == 2


@pytest.mark.parametrize(
    "arguments, said",
    [
        (
            ["--model", "qa_agnet"],
            "refused: 404 model_not_found: there is no agent or model 'qa_agnet'; known: auto, qa_",
        ),
        (["--header", "x-gateway-variant: finetuned"], "refused: 403 override_not_allowed: "),
        (["--user", "x" * 600], "refused: 400 invalid_value: user must be at most 512"),
        (["--header", "x-gateway-user: a b"], "refused: 400 invalid_header: "),
    ],
)
def test_explain_refuses_what_the_gateway_would_refuse(arguments: list[str], said: str) -> None:
    result = run("explain", "--env", "production", *arguments, "hello")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith(said)


@pytest.mark.parametrize("header", ["x-gateway-agent", ": value", ""])
def test_explain_does_not_pass_over_a_header_it_cannot_read(header: str) -> None:
    result = run("explain", "--header", header, "hello")
    assert result.exit_code == 2
    assert "is not NAME:VALUE" in result.stderr


# --- keys ------------------------------------------------------------------------------------------------------------


def test_a_new_key_opens_what_its_entry_says(files: Files) -> None:
    first, second = (run("keys", "new", "--name", name, "--agent", "qa_agent").output for name in ("one", "two"))
    keys = [re.search(r"gw-\S+", text) for text in (first, second)]
    assert all(keys)
    shown = [found[0] for found in keys if found]
    assert shown[0] != shown[1]
    entries = [text[text.index("[[keys]]") :] for text in (first, second)]
    assert tomllib.loads(entries[0])["keys"][0]["sha256"] == sha256(shown[0].encode()).hexdigest()

    files.write(dev=f"{''.join(entries)}\n[models]\nuse_finetuned = false\n")
    plan = files.load().plan
    for key, name in zip(shown, ("one", "two"), strict=True):
        caller = find_caller(plan, {"Authorization": f"Bearer {key}"}, is_loopback=False)
        assert (caller.key, caller.agents) == (name, ("qa_agent",))
        with pytest.raises(Refused):
            find_caller(plan, {"Authorization": f"Bearer {key}x"}, is_loopback=True)


def test_a_key_for_every_agent_names_none(files: Files) -> None:
    entry = run("keys", "new", "--name", "all").output.partition("[[keys]]")[2]
    assert "agents" not in tomllib.loads(f"[[keys]]{entry}")["keys"][0]


@pytest.mark.parametrize("arguments", [["--name", "a b"], ["--name", ""], ["--name", "ok", "--agent", "qa agent"]])
def test_a_key_that_check_would_refuse_is_not_made(arguments: list[str]) -> None:
    result = run("keys", "new", *arguments)
    assert result.exit_code == 2
    assert "gw-" not in result.output


# --- ping ------------------------------------------------------------------------------------------------------------


class _Alive(BaseHTTPRequestHandler):
    """Answers as an admin listener would."""

    def do_GET(self) -> None:
        status = 200 if self.path == "/livez" else 404
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the test says what it saw."""


class _Stranger(_Alive):
    """Speaks something that is not HTTP."""

    def handle(self) -> None:
        self.wfile.write(b"SSH-2.0-OpenSSH_9.6\r\n")


@pytest.fixture(params=[_Alive])
def admin_url(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where it listens."""
    with HTTPServer(("127.0.0.1", 0), request.param) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_ping_of_a_live_gateway_is_exit_status_0(admin_url: str) -> None:
    result = run("ping", "--url", admin_url)
    assert (result.exit_code, result.output) == (0, f"{admin_url} is alive (200)\n")
    assert run("ping", "--url", f"{admin_url}/").exit_code == 0


def test_ping_finds_the_admin_listener_of_the_configuration(admin_url: str) -> None:
    port = admin_url.rpartition(":")[2]
    for host in ("127.0.0.1", "0.0.0.0"):
        result = run("ping", GATEWAY_ADMIN=f"{host}:{port}")
        assert (result.exit_code, result.stdout) == (0, f"{admin_url} is alive (200)\n")


def test_ping_asks_no_proxy(admin_url: str) -> None:
    # Port 9 refuses; a container's proxy could not reach the sidecar's loopback either.
    assert (
        run("ping", "--url", admin_url, http_proxy="http://127.0.0.1:9", HTTP_PROXY="http://127.0.0.1:9").exit_code == 0
    )


def test_ping_of_nobody_is_exit_status_1() -> None:
    with HTTPServer(("127.0.0.1", 0), _Alive) as closed:
        url = f"http://127.0.0.1:{closed.server_port}"
    result = run("ping", "--url", url)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == f"{url} does not answer as a gateway should: Connection refused\n"


@pytest.mark.parametrize("admin_url", [_Stranger], indirect=True)
def test_ping_of_something_else_is_exit_status_1(admin_url: str) -> None:
    result = run("ping", "--url", admin_url)
    assert result.exit_code == 1
    assert result.stderr == f"{admin_url} does not answer as a gateway should: it speaks no HTTP\n"


@pytest.mark.parametrize("url", ["file:///etc", "127.0.0.1:9090", "ftp://x"])
def test_ping_takes_web_addresses_only(url: str) -> None:
    assert run("ping", "--url", url).exit_code == 2


# --- As a process of its own -----------------------------------------------------------------------------------------


def process(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """`python -m gateway`, which is the same as the console entry."""
    return subprocess.run(
        [sys.executable, "-m", "gateway", *arguments],
        cwd=ROOT, env={**os.environ, **environ}, capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip


def serve_where_someone_is(admin_url: str, state: Path) -> subprocess.CompletedProcess[str]:
    """Start with an admin address that is taken."""
    address = admin_url.removeprefix("http://")
    return process("serve", GATEWAY_ADMIN=address, GATEWAY_DATA="127.0.0.1:0", GATEWAY_STATE=str(state))


def test_an_address_in_use_is_said_with_its_remedy_and_is_exit_status_1(admin_url: str, tmp_path: Path) -> None:
    done = serve_where_someone_is(admin_url, tmp_path)
    assert done.returncode == 1
    assert done.stdout == ""
    assert re.match(
        r"cannot serve: .*address already in use; \[server\] in config.toml can name another\n", done.stderr
    )
    assert "Traceback" not in done.stderr


def test_an_address_in_use_is_said_in_one_line(admin_url: str, tmp_path: Path) -> None:
    done = serve_where_someone_is(admin_url, tmp_path)
    assert len(done.stderr.splitlines()) == 1


def test_the_simulator_says_so_too_when_its_port_is_taken(admin_url: str) -> None:
    done = process("simulator", "--port", admin_url.rpartition(":")[2])
    assert done.returncode == 1
    assert done.stderr.startswith("cannot serve: ")
    assert "Traceback" not in done.stderr
