"""A real Prometheus scrapes a real gateway, and the shipped alert fires when its model fails. A few seconds."""

import asyncio
from pathlib import Path
from typing import Any

import aiohttp

from tests.prometheus.live import firing, needs_prometheus, prometheus
from tests.running import CHAT, chat, running_gateway

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


@needs_prometheus
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
