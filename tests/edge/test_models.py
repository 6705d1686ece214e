"""`GET /v1/models`: what a caller may put into `model`, and that each of these names is then served."""

from hashlib import sha256
from pathlib import Path

from tests.raw_http import CANARY, RawConnection, check_refusal, connected, ordinary, request
from tests.running import running_gateway

KEYS = f"""
[[keys]]
name   = "narrow"
sha256 = "{sha256(b"narrow").hexdigest()}"
agents = ["support_agent"]
"""
RAW = "[models]\nallow_raw_models = true\n"


async def names(connection: RawConnection, headers: bytes = b"") -> list[str]:
    connection.send(request("GET", "/v1/models", headers=headers))
    reply = await connection.reply()
    assert reply.status == 200
    assert reply.headers["content-type"].startswith("application/json")
    assert reply.headers["server"] == "genesis-gateway"
    body = reply.json()
    assert body["object"] == "list"
    for model in body["data"]:
        assert {"id", "object", "created", "owned_by"} <= set(model)
        assert model["object"] == "model"
    return [model["id"] for model in body["data"]]


async def test_every_name_that_is_listed_is_served_and_found_by_itself(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, policy=RAW) as gateway, connected(gateway.data_url) as connection:
        listed = await names(connection)
        assert listed[:3] == ["auto", "qa_agent", "support_agent"]
        # With slashes and colons, as such names have them.
        assert "sim/ft:qa" in listed
        assert len(set(listed)) == len(listed)
        for name in listed:
            connection.send(request("GET", f"/v1/models/{name}"))
            assert (await connection.reply()).json()["id"] == name
            connection.send(request(body=ordinary(model=name)))
            assert (await connection.reply()).status == 200, name


async def test_models_outright_are_listed_only_where_the_policy_lets_them_pass(tmp_path: Path) -> None:
    async with running_gateway(tmp_path) as gateway, connected(gateway.data_url) as connection:
        assert await names(connection) == ["auto", "qa_agent", "support_agent"]
        connection.send(request("GET", "/v1/models/sim/ft:qa"))
        check_refusal(await connection.reply(), 404, "model_not_found", param="model")


async def test_a_key_sees_its_own_agents_only(tmp_path: Path) -> None:
    shown = b"Authorization: Bearer narrow\r\n"
    async with running_gateway(tmp_path, policy=RAW + KEYS) as gateway, connected(gateway.data_url) as connection:
        assert await names(connection, shown) == ["auto", "support_agent"]
        for hidden in ("qa_agent", "sim/ft:support"):
            connection.send(request("GET", f"/v1/models/{hidden}", headers=shown))
            check_refusal(await connection.reply(), 404, "model_not_found", param="model")


async def test_an_unknown_name_is_not_told_back(tmp_path: Path) -> None:
    async with running_gateway(tmp_path) as gateway, connected(gateway.data_url) as connection:
        for name in (CANARY.decode(), "%3Cscript%3E" + CANARY.decode(), "qa_agent/", "QA_AGENT", "%00", "a%20b"):
            connection.send(request("GET", f"/v1/models/{name}"))
            check_refusal(await connection.reply(), 404, "model_not_found", param="model")


async def test_asking_for_models_asks_no_provider_and_leaves_no_record(tmp_path: Path) -> None:
    async with running_gateway(tmp_path) as gateway, connected(gateway.data_url) as connection:
        await names(connection)
        assert gateway.simulator.last_request is None
        assert not gateway.journal()


async def test_a_reload_changes_the_list(tmp_path: Path) -> None:
    async with running_gateway(tmp_path) as gateway, connected(gateway.data_url) as connection:
        await gateway.reload(policy=RAW)
        assert "sim/simulator-small" in await names(connection)
