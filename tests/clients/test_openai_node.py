"""The openai package for Node against a running gateway. `node/ask.mjs` asks; what it saw is judged here.

The package is installed once, from the lock file, into the ignored `.cache/node`. Where node, npm or a registry is
missing the tests are skipped, and say so.
"""

import json
import os
import shutil
import subprocess
import tempfile
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from tests.clients.served import KEY, ROOT, Fixed, Served, wait_until

HERE = Path(__file__).parent / "node"
CACHE = ROOT / ".cache"
# Below the limit of a test, so that a registry that does not answer is a reason to skip and no failure.
INSTALL_S = 45


@pytest.fixture(scope="session")
def openai_module() -> Path:
    """The installed package's entry for `import`."""
    for program in ("node", "npm"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    manifests = [HERE / "package.json", HERE / "package-lock.json"]
    digest = sha256(b"".join(manifest.read_bytes() for manifest in manifests)).hexdigest()[:12]
    home = CACHE / "node" / digest
    module = home / "node_modules" / "openai" / "index.mjs"
    if not module.exists():
        _install(manifests, home)
    return module


def _install(manifests: list[Path], home: Path) -> None:
    """Install beside `home` and move it there whole, so that what stands there is never half of a package."""
    try:
        home.parent.mkdir(parents=True, exist_ok=True)
        (CACHE / ".gitignore").write_text("*\n")
        with tempfile.TemporaryDirectory(dir=home.parent) as name:
            for manifest in manifests:
                shutil.copy(manifest, name)
            command = [
                "npm",
                "ci",
                "--no-audit",
                "--no-fund",
                "--ignore-scripts",
                "--fetch-retries=0",
                "--loglevel=error",
            ]
            done = subprocess.run(command, cwd=name, capture_output=True, text=True, timeout=INSTALL_S, check=False)
            if done.returncode != 0:
                pytest.skip(f"npm could not install the openai package: {' '.join(done.stderr.split())[:200]}")
            shutil.copytree(name, home, dirs_exist_ok=True)
    except (OSError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"the openai package for Node could not be installed: {error}")


@pytest.fixture(scope="session")
def seen(openai_module: Path, served: Served) -> dict[str, Any]:
    """What one run of the script saw."""
    environment = {
        **os.environ,
        "OPENAI_MODULE": openai_module.as_uri(),
        "GATEWAY_URL": served.base_url,
        "GATEWAY_KEY": KEY,
    }
    command = ["node", str(HERE / "ask.mjs")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_an_answer_comes_whole_with_its_usage(seen: dict[str, Any]) -> None:
    plain = seen["plain"]
    assert plain["choices"][0]["message"]["content"]
    assert plain["choices"][0]["finish_reason"] == "stop"
    assert plain["usage"]["completion_tokens"] > 0
    assert plain["requestId"].startswith("req-")
    assert seen["headers"]["x-gateway-agent"] == "qa_agent"


def test_a_stream_says_what_the_plain_answer_says(seen: dict[str, Any]) -> None:
    stream = seen["stream"]
    text = seen["plain"]["choices"][0]["message"]["content"]
    assert stream["error"] is None
    assert stream["text"] == text
    assert stream["finishReasons"] == ["stop"]
    assert stream["usage"] == seen["plain"]["usage"]
    assert seen["helped"] == text


def test_a_tool_is_called(seen: dict[str, Any]) -> None:
    (call,) = seen["toolCalls"]
    assert call["function"]["name"] == "get_weather"
    assert set(json.loads(call["function"]["arguments"])) == {"city"}


def test_models_lists_what_may_be_asked_for(seen: dict[str, Any]) -> None:
    assert seen["models"][:2] == ["auto", "qa_agent"]


@pytest.mark.parametrize(
    "case, name, status, code",
    [
        ("unknown", "NotFoundError", 404, "model_not_found"),
        ("wrongKey", "AuthenticationError", 401, "invalid_api_key"),
        ("badRequest", "BadRequestError", 400, "invalid_value"),
        ("limited", "RateLimitError", 429, "rate_limit_exceeded"),
        ("broken", "InternalServerError", 500, "upstream_error"),
    ],
)
def test_errors_are_of_the_sdks_own_classes(seen: dict[str, Any], case: str, name: str, status: int, code: str) -> None:
    error = seen["errors"][case]
    assert (error["name"], error["status"], error["code"]) == (name, status, code)
    assert error["requestId"].startswith("req-")


def test_the_clients_own_timeout_is_told_as_such(seen: dict[str, Any], served: Served) -> None:
    assert seen["errors"]["late"]["name"] == "APIConnectionTimeoutError"
    wait_until(lambda: served.simulator.open_calls == 0)


@pytest.mark.parametrize(
    "case, code", [("cut", "upstream_cut"), ("differs", "upstream_cut"), ("stalled", "upstream_timeout")]
)
def test_a_stream_that_breaks_off_raises_and_never_looks_whole(seen: dict[str, Any], case: str, code: str) -> None:
    broken = seen[case]
    assert broken["error"]["name"] == "APIError"
    assert broken["error"]["code"] == code
    assert broken["text"]
    assert broken["finishReasons"] == []


def test_a_stream_that_breaks_off_and_can_be_joined_is_one_whole_answer(seen: dict[str, Any]) -> None:
    assert seen["joined"]["error"] is None
    assert seen["joined"]["text"] == "".join(Fixed.WORDS)
    assert seen["joined"]["finishReasons"] == ["stop"]


def test_a_malformed_event_is_left_out(seen: dict[str, Any]) -> None:
    assert seen["malformed"]["error"] is None
    assert seen["malformed"]["finishReasons"] == ["stop"]


def test_aborting_ends_the_providers_stream(seen: dict[str, Any], served: Served) -> None:
    assert seen["left"]["chunks"] >= 1
    assert not seen["left"]["finished"]
    wait_until(lambda: served.simulator.open_streams == 0)
