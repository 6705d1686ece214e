"""A real Prometheus in front of a test's gateway, on the shipped rules with seconds for minutes.

async with prometheus(folder, gateway.admin_url.removeprefix("http://")) as url:
    ...                              # await asked(session, url, "up")
"""

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

PROMETHEUS = shutil.which("prometheus")
needs_prometheus = pytest.mark.skipif(
    not PROMETHEUS, reason="prometheus is not on PATH; Debian's package: prometheus"
)  # fmt: skip


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


async def asked(session: aiohttp.ClientSession, url: str, expression: str) -> list[dict[str, Any]]:
    """What an expression gives now, by series; an error fails the test."""
    async with session.post(f"{url}/api/v1/query", data={"query": expression}) as response:
        found = await response.json()
    assert found["status"] == "success", f"{expression}: {found.get('error')}"
    return found["data"]["result"]  # type: ignore[no-any-return]
