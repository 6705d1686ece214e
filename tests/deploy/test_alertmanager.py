"""The shipped Alertmanager configuration, read by amtool, and run by a real Alertmanager before a Slack of our own."""

import asyncio
import re
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml
from aiohttp import web

from tests.deploy.compose import COMPOSE, DEPLOY, config_of, lay_out, substituted
from tests.prometheus.live import free_port
from tests.prometheus.promql import asked_by, recorded, rules_of, shown

AMTOOL = shutil.which("amtool")
ALERTMANAGER = shutil.which("alertmanager") or shutil.which("prometheus-alertmanager")
needs = "is not on PATH; Debian's package: prometheus-alertmanager"
SHIPPED = DEPLOY / "alertmanager" / "alertmanager.yml"
PATIENCE_S = 30.0
RULES = {rule["alert"]: rule for rule in rules_of("alerts.yml")}


def config() -> Any:
    return yaml.safe_load(SHIPPED.read_text())


def alert(name: str, **labels: str) -> dict[str, Any]:
    """One as Prometheus would send it."""
    rule = RULES[name]
    return {
        "labels": {"alertname": name, "job": "genesis-gateway", **rule["labels"], **labels},
        "annotations": {
            "summary": f"{name} in short",
            "description": f"{name} at length",
            "runbook": rule["annotations"]["runbook"],
        },
    }


@pytest.mark.skipif(not AMTOOL, reason=f"amtool {needs}")
def test_amtool_takes_it_as_it_is_mounted(tmp_path: Path) -> None:
    lay_out("alertmanager", tmp_path)
    command = [str(AMTOOL), "check-config", str(config_of("alertmanager", tmp_path, "--config.file"))]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr


def test_inhibitions_name_alerts_and_labels_that_there_are() -> None:
    series = shown() | recorded()
    for rule in config()["inhibit_rules"]:
        for matcher in (*rule["source_matchers"], *rule["target_matchers"]):
            found = re.fullmatch(r'alertname =~? "([\w|]+)"', matcher)
            assert found
            for name in found[1].split("|"):
                asked, grouped = asked_by(RULES[name]["expr"])
                assert set(rule["equal"]) <= grouped | frozenset().union(*(series[one.name] for one in asked))


def test_the_webhook_is_where_compose_puts_it() -> None:
    (slack,) = config()["receivers"][0]["slack_configs"]
    assert slack["api_url_file"] == "/run/secrets/slack_webhook"
    assert set(COMPOSE["secrets"]) == {"slack_webhook"}


@asynccontextmanager
async def alertmanager(folder: Path, webhook: str) -> AsyncIterator[str]:
    """A real one on the shipped configuration, but for its waits and its webhook; its address."""
    (folder / "webhook").write_text(webhook)
    text = SHIPPED.read_text().replace("/run/secrets/slack_webhook", str(folder / "webhook"))
    (folder / "alertmanager.yml").write_text(re.sub(r"group_wait: \w+", "group_wait: 1s", text))
    address = f"127.0.0.1:{free_port()}"
    child = await asyncio.create_subprocess_exec(
        str(ALERTMANAGER), "--config.file=alertmanager.yml", "--storage.path=data", "--cluster.listen-address=",
        f"--web.listen-address={address}", cwd=folder, stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    try:
        yield f"http://{address}"
    finally:
        if child.returncode is None:
            child.kill()
        await child.wait()


async def tell(session: aiohttp.ClientSession, url: str, alerts: list[dict[str, Any]]) -> None:
    """Hand alerts over, as soon as there is somebody to take them."""
    while True:
        try:
            async with session.post(f"{url}/api/v2/alerts", json=alerts) as response:
                assert response.status == 200, await response.text()
                return
        except aiohttp.ClientConnectionError:
            await asyncio.sleep(0.1)


@pytest.mark.skipif(not ALERTMANAGER, reason=f"alertmanager {needs}")
async def test_slack_hears_the_greater_of_two_alerts_with_its_runbook(tmp_path: Path) -> None:
    heard: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

    async def take(request: web.Request) -> web.Response:
        heard.put_nowait(await request.json())
        return web.Response(text="ok")

    app = web.Application()
    app.router.add_post("/services/own", take)
    runner = web.AppRunner(app, shutdown_timeout=0)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    same = {"agent": "qa_agent", "model": "mistral/a"}
    try:
        async with (
            alertmanager(tmp_path, f"http://127.0.0.1:{runner.addresses[0][1]}/services/own") as url,
            aiohttp.ClientSession() as session,
            asyncio.timeout(PATIENCE_S),
        ):
            pair = [alert("HighModelLatency", **same), alert("VeryHighModelLatency", **same)]
            await tell(session, url, [*pair, alert("HighModelLatency", agent="legal_agent", model="mistral/b")])
            messages = [(await heard.get())["attachments"][0] for _ in range(2)]
    finally:
        await runner.cleanup()
    by_title = {message["title"]: message for message in messages}
    critical = by_title["VeryHighModelLatency (critical)"]
    assert critical["color"] == "danger"
    assert "*VeryHighModelLatency in short*\nVeryHighModelLatency at length" in critical["text"]
    assert "Runbook: docs/runbooks/high-latency.md#veryhighmodellatency" in critical["text"]
    warning = by_title["HighModelLatency (warning)"]
    assert warning["color"] == "warning"
    # Of the two alerts of its name only the one that nothing greater speaks for.
    assert warning["text"].count("in short") == 1


@pytest.mark.skipif(not ALERTMANAGER, reason=f"alertmanager {needs}")
async def test_without_a_webhook_alerts_are_kept_and_shown(tmp_path: Path) -> None:
    nowhere = (DEPLOY / substituted(COMPOSE["secrets"]["slack_webhook"]["file"])).read_text()
    async with (
        alertmanager(tmp_path, nowhere) as url,
        aiohttp.ClientSession() as session,
        asyncio.timeout(PATIENCE_S),
    ):
        await tell(session, url, [alert("StoreDown", instance="gateway:9090")])
        failed = 'alertmanager_notification_requests_failed_total{integration="slack"} 0'
        text = failed
        while failed in text:
            async with session.get(f"{url}/metrics") as response:
                text = await response.text()
            await asyncio.sleep(0.1)
        async with session.get(f"{url}/api/v2/alerts") as response:
            (kept,) = await response.json()
        async with session.get(f"{url}/-/ready") as response:
            assert response.status == 200
    assert kept["labels"]["alertname"] == "StoreDown"
