"""A real Prometheus scrapes a real gateway, and the shipped alert fires when its model fails. A few seconds."""

import asyncio
import re
import shutil
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.prometheus.promql import FOLDER
from tests.running import CHAT, chat, running_gateway

PROMETHEUS = shutil.which("prometheus")
PATIENCE_S = 40.0
AGENTS = """
[agents.qa_agent]
finetuned = "sim/ft:qa"
baseline  = "sim/fault:500"

[agents.support_agent]
finetuned = "sim/ft:support"
baseline  = "sim/simulator-small"
"""
POLICY = """
[models]
use_finetuned = false
[retries]
budget_percent = 0
budget_floor = 0
"""


def hurried(text: str) -> str:
    """The shipped rules with seconds for minutes: the five-minute windows are 3 s, and every `for` is 1 s."""
    return re.sub(r"for: \w+", "for: 1s", text.replace("[5m]", "[3s]"))


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@asynccontextmanager
async def prometheus(folder: Path, target: str) -> AsyncIterator[str]:
    """Prometheus on the hurried rules; its address. It is killed at the end."""
    for name in ("rules.yml", "alerts.yml"):
        (folder / name).write_text(hurried((FOLDER / name).read_text()))
    config = (FOLDER / "prometheus.yml").read_text().replace("127.0.0.1:9090", target)
    config = re.sub(r"alerting:.*?\n\n", "", config, flags=re.DOTALL).replace("interval: 15s", "interval: 250ms")
    (folder / "prometheus.yml").write_text(config)
    address = f"127.0.0.1:{free_port()}"
    child = await asyncio.create_subprocess_exec(
        str(PROMETHEUS), "--config.file=prometheus.yml", "--storage.tsdb.path=data", f"--web.listen-address={address}",
        "--log.level=error", cwd=folder, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    try:
        yield f"http://{address}"
    finally:
        if child.returncode is None:
            child.kill()
        await child.wait()


async def firing(session: aiohttp.ClientSession, url: str) -> list[dict[str, Any]]:
    """The alerts that fire now; none while Prometheus is not up yet."""
    try:
        async with session.get(f"{url}/api/v1/alerts") as response:
            found = (await response.json())["data"]["alerts"] if response.status == 200 else []
    except aiohttp.ClientConnectionError:
        return []
    return [alert for alert in found if alert["state"] == "firing"]


@pytest.mark.skipif(not PROMETHEUS, reason="prometheus is not on PATH; Debian's package: prometheus")
async def test_prometheus_fires_high_model_error_rate_when_the_model_fails(tmp_path: Path) -> None:
    folder = tmp_path / "prometheus"
    folder.mkdir()
    async with (
        running_gateway(tmp_path, agents=AGENTS, policy=POLICY) as gateway,
        prometheus(folder, gateway.admin_url.removeprefix("http://")) as url,
        aiohttp.ClientSession() as session,
        asyncio.timeout(PATIENCE_S),
    ):
        fired: dict[str, dict[str, Any]] = {}
        while not fired.keys() >= {"HighModelErrorRate", "LowSuccessRate"}:
            for model, status in (("qa_agent", 500), ("support_agent", 200)) * 5:
                async with session.post(f"{gateway.data_url}{CHAT}", json=chat(model=model)) as response:
                    assert response.status == status, await response.text()
            fired |= {alert["labels"]["alertname"]: alert for alert in await firing(session, url)}
            # That is traffic enough; the rest of the machine is Prometheus'.
            await asyncio.sleep(0.1)
    alert = fired["HighModelErrorRate"]
    assert alert["labels"] == {
        "alertname": "HighModelErrorRate",
        "severity": "critical",
        "job": "genesis-gateway",
        "agent": "qa_agent",
        "model": "sim/fault:500",
    }
    assert alert["annotations"]["summary"] == "sim/fault:500 fails 100% of the calls of qa_agent"
    assert alert["annotations"]["runbook"] == "docs/runbooks/model-failure.md#highmodelerrorrate"
    # The agent that is well is not accused.
    assert fired["LowSuccessRate"]["labels"]["agent"] == "qa_agent"
    assert "GatewayDown" not in fired
