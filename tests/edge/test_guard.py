"""Who may use /admin without a token: this machine under its own name, and nobody else's name for it."""

from pathlib import Path

import aiohttp
import pytest

from gateway.edge.guard import _is_own_name
from tests.running import running_gateway


@pytest.mark.parametrize("path", ["/admin/config", "/admin/costs", "/admin/costs/audit"])
@pytest.mark.parametrize(
    ("host", "status"),
    [("localhost:1", 200), ("127.0.0.1", 200), ("[::1]:9", 200), ("evil.example", 403), ("", 403), ("[::1", 403)],
)
async def test_nothing_is_shown_under_a_strangers_name(tmp_path: Path, path: str, host: str, status: int) -> None:
    async with (
        running_gateway(tmp_path) as gateway,
        aiohttp.ClientSession() as session,
        session.get(f"{gateway.admin_url}{path}", headers={"Host": host}) as reply,
    ):
        assert reply.status == status
        if status == 403:
            assert (await reply.json())["error"]["code"] == "origin_not_allowed"


async def test_who_knows_the_token_may_come_under_any_name(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, server='admin_token = "t-1"') as gateway, aiohttp.ClientSession() as session:
        for token, status in (("t-1", 200), ("t-2", 401)):
            said = {"Host": "gateway.internal", "Authorization": f"Bearer {token}"}
            async with session.get(f"{gateway.admin_url}/admin/config", headers=said) as reply:
                assert reply.status == status


@pytest.mark.parametrize(
    ("host", "is_own"), [("gw.local:9090", True), ("GW.local", True), ("gw.local.evil", False), ("192.0.2.1", False)]
)
def test_an_own_name_is_loopback_or_that_of_the_listener(host: str, is_own: bool) -> None:
    assert _is_own_name(host, "gw.local") is is_own
