"""`gateway health` as a person and a script meet it: tables, JSON, exit statuses. `gateway ping` is in test_main.py."""

import asyncio
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.cli.test_main import ROOT, run
from tests.running import running_gateway
from tests.scripted import refusing_port

MODEL: dict[str, Any] = {
    "verdict": "OK", "reason": "the provider knows it", "evidence": "probe", "age_s": 2.4,
    "probe": {"finding": "here", "latency_ms": 1.5}, "retires_at": None, "retires_in_days": None,
}  # fmt: skip
AGENT: dict[str, Any] = {"status": "ok", "reason": "sim/small: the provider knows it", "chains": [["sim/small"]]}
HEALTHY: dict[str, Any] = {
    "status": "healthy", "environment": "dev", "agents": {"qa_agent": AGENT}, "models": {"sim/small": MODEL},
}  # fmt: skip


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where config.toml is."""
    monkeypatch.chdir(ROOT)


class _Admin(BaseHTTPRequestHandler):
    """An admin listener that says what a test wants it to, and remembers who asked."""

    reply: tuple[int, bytes] = (200, b"")
    asked: list[tuple[str, dict[str, str]]]

    def do_GET(self) -> None:
        self.asked.append((self.path, dict(self.headers)))
        status, body = self.reply
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the test says what it saw."""


@pytest.fixture
def admin() -> Iterator[tuple[str, type[_Admin]]]:
    """Where it listens, and the class to set its answer on."""
    handler = type("Admin", (_Admin,), {"asked": []})
    with HTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", handler
        server.shutdown()
        thread.join()


def told(found: dict[str, Any], status: int = 200) -> tuple[int, bytes]:
    return status, msgspec.json.encode(found)


@pytest.mark.parametrize(
    ("status", "http", "exit_status"), [("healthy", 200, 0), ("degraded", 200, 1), ("error", 503, 1)]
)
def test_the_exit_status_tells_a_script(
    admin: tuple[str, type[_Admin]], status: str, http: int, exit_status: int
) -> None:
    url, handler = admin
    handler.reply = told({**HEALTHY, "status": status}, http)
    for options in ((), ("--json",)):
        result = run("health", "--url", url, *options)
        assert result.exit_code == exit_status
        assert status in result.stdout
        assert not result.stderr


def test_the_tables_name_every_agent_and_model_with_its_reason(admin: tuple[str, type[_Admin]]) -> None:
    url, handler = admin
    slow = {**MODEL, "verdict": "SLOW", "reason": "[red]took long[/red]", "age_s": None}
    ends = {**MODEL, "retires_at": "2026-12-31T00:00:00Z", "retires_in_days": 39.7}
    agents = {"qa_agent": AGENT, "law_agent": {**AGENT, "status": "degraded", "reason": "why not"}}
    handler.reply = told({**HEALTHY, "agents": agents, "models": {"sim/small": slow, "sim/old": ends}})
    lines = run("health", "--url", url).stdout.splitlines()

    def row(name: str) -> list[str]:
        return next(line.split() for line in lines if line.split()[:1] == [name])

    assert row("qa_agent")[1] == "ok"
    assert row("law_agent")[1:] == ["degraded", "why", "not"]
    # What a provider or a file says is text, not markup.
    assert row("sim/small")[1:] == ["SLOW", "probe", "–", "[red]took", "long[/red]"]
    assert " ".join(row("sim/old")).endswith("2026-12-31, in 39.7 d")


def test_json_is_what_the_gateway_said(admin: tuple[str, type[_Admin]]) -> None:
    url, handler = admin
    handler.reply = told(HEALTHY)
    assert msgspec.json.decode(run("health", "--url", url, "--json").stdout) == HEALTHY


def test_the_gateway_of_the_configuration_is_asked_without_its_token(admin: tuple[str, type[_Admin]]) -> None:
    url, handler = admin
    handler.reply = told(HEALTHY)
    address = url.removeprefix("http://")
    result = run("health", GATEWAY_ADMIN=address, GATEWAY_ADMIN_TOKEN="very-secret")
    assert (result.exit_code, len(handler.asked)) == (0, 1)
    path, headers = handler.asked[0]
    assert path == "/health"
    assert "very-secret" not in result.output + str(headers)


@pytest.mark.parametrize(
    "reply",
    [
        (404, b'{"error": {"message": "no such path"}}'),
        (200, b"<html>"),
        (200, b"[]"),
        (200, b'{"status": 7, "agents": {}, "models": {}}'),
    ],
)
def test_what_is_no_gateway_is_exit_status_2(admin: tuple[str, type[_Admin]], reply: tuple[int, bytes]) -> None:
    url, handler = admin
    handler.reply = reply
    result = run("health", "--url", url)
    assert (result.exit_code, result.stdout) == (2, "")
    assert url in result.stderr


def test_where_nobody_listens_is_exit_status_2() -> None:
    with refusing_port() as closed:
        result = run("health", "--url", f"http://127.0.0.1:{closed.getsockname()[1]}")
    assert result.exit_code == 2
    assert "does not answer as a gateway should" in result.stderr


def test_an_address_that_is_none_is_a_wrong_command_line() -> None:
    result = run("health", "--url", "file:///etc/passwd")
    assert result.exit_code == 2
    assert "Usage:" in result.stderr


async def test_a_gateway_that_serves_is_healthy(tmp_path: Path) -> None:
    async with running_gateway(tmp_path) as gateway:
        result = await asyncio.to_thread(run, "health", "--url", gateway.admin_url)
    assert result.exit_code == 0
    assert "environment dev: healthy" in result.stdout
    assert "sim/simulator-small" in result.stdout
