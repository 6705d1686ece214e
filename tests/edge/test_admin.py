"""The admin listener: probes, metrics, explanations, and who may see them."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from gateway.config import ConfigError
from gateway.domain.reading import Address
from tests.raw_http import (
    CANARY,
    RawConnection,
    Reply,
    check_ordinary,
    check_refusal,
    check_silence,
    connected,
    ordinary,
    request,
)
from tests.running import AGENTS, POLICY, RunningGateway, running_gateway

canary = CANARY.decode()


async def get(connection: RawConnection, target: str, headers: bytes = b"") -> Reply:
    connection.send(request("GET", target, headers=headers))
    return await connection.reply()


async def explained(connection: RawConnection, body: bytes, headers: bytes = b"") -> Reply:
    connection.send(request("POST", "/admin/explain", headers=headers, body=body))
    return await connection.reply()


# --- Probes ----------------------------------------------------------------------------------------------------------


async def test_a_gateway_that_serves_is_alive_and_ready(tmp_path: Path) -> None:
    async with running_gateway(tmp_path) as gateway, connected(gateway.admin_url) as connection:
        assert (await get(connection, "/livez")).json() == {"status": "alive"}
        reply = await get(connection, "/readyz")
        assert reply.status == 200
        assert reply.headers["server"] == "genesis-gateway"
        config = {"is_current": True, "reload_error": None, "at_next_start": []}
        assert reply.json() == {"status": "ready", "environment": "dev", "config": config}


async def test_a_draining_gateway_is_alive_and_not_ready(tmp_path: Path) -> None:
    async with running_gateway(tmp_path) as gateway, connected(gateway.admin_url) as connection:
        gateway.runtime.is_draining = True
        reply = await get(connection, "/readyz")
        assert (reply.status, reply.json()["status"]) == (503, "draining")
        assert (await get(connection, "/livez")).status == 200


async def test_readiness_asks_no_upstream(tmp_path: Path) -> None:
    nowhere = {"sim": "http://127.0.0.1:1/v1"}
    async with running_gateway(tmp_path, upstreams=nowhere) as gateway, connected(gateway.admin_url) as connection:
        assert (await get(connection, "/readyz")).status == 200


async def test_a_reload_that_fails_is_told_and_changes_nothing_else(tmp_path: Path) -> None:
    async with (
        running_gateway(tmp_path) as gateway,
        connected(gateway.admin_url) as admin,
        connected(gateway.data_url) as data,
    ):
        await gateway.reload(policy="[models]\nuse_finetunde = true\n")
        reply = await get(admin, "/readyz")
        assert (reply.status, reply.json()["status"]) == (200, "ready")
        assert not reply.json()["config"]["is_current"]
        assert 'did you mean "use_finetuned"?' in reply.json()["config"]["reload_error"]
        assert b"gateway_config_is_current 0.0" in (await get(admin, "/metrics")).body
        await check_ordinary(data)
        await gateway.reload(policy=POLICY)
        config = {"is_current": True, "reload_error": None, "at_next_start": []}
        assert (await get(admin, "/readyz")).json()["config"] == config
        metrics = (await get(admin, "/metrics")).body
        assert b"gateway_config_is_current 1.0" in metrics
        assert b'gateway_config_reloads_total{result="failed"} 1.0' in metrics
        assert b'gateway_config_reloads_total{result="ok"} 1.0' in metrics


# --- Refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "target", "status", "allow"),
    [
        ("GET", f"/{canary}", 404, None),
        ("GET", "/", 404, None),
        ("POST", "/v1/chat/completions", 404, None),
        ("GET", "/v1/models", 404, None),
        ("GET", "/admin", 404, None),
        ("POST", "/metrics", 405, "GET, HEAD"),
        ("DELETE", "/readyz", 405, "GET, HEAD"),
        ("GET", "/admin/explain", 405, "POST"),
        ("OPTIONS", "*", 404, None),
        ("CONNECT", "h:1", 404, None),
    ],
)
async def test_methods_and_paths_that_are_not_served(
    tmp_path: Path, method: str, target: str, status: int, allow: str | None
) -> None:
    async with running_gateway(tmp_path) as gateway, connected(gateway.admin_url) as connection:
        connection.send(request(method, target))
        reply = await connection.reply()
        check_refusal(reply, status, "not_found" if status == 404 else "method_not_allowed")
        assert reply.headers.get("allow") == allow
        assert (await get(connection, "/livez")).status == 200


async def test_explain_takes_bodies_as_the_data_listener_does(tmp_path: Path) -> None:
    limits = "max_body_bytes = 1000\nbody_timeout_s = 0.05"
    cases = [
        (request("POST", "/admin/explain", body=b"[" * 900), 400, "invalid_json"),
        (request("POST", "/admin/explain", body=b"null"), 400, "invalid_json"),
        (request("POST", "/admin/explain", headers=b"Content-Length: 1001\r\n"), 413, "body_too_large"),
        (
            request("POST", "/admin/explain", headers=b"Content-Encoding: gzip\r\n", body=b"x"),
            415,
            "unsupported_encoding",
        ),
        (
            request("POST", "/admin/explain", headers=b"Expect: " + CANARY + b"\r\n", body=b"x"),
            417,
            "unsupported_expectation",
        ),
        (request("POST", "/admin/explain", headers=b"Content-Length: 9\r\n"), 408, "request_timeout"),
    ]
    async with running_gateway(tmp_path, server=limits) as gateway:
        for sent, status, code in cases:
            async with connected(gateway.admin_url) as connection:
                connection.send(sent)
                check_refusal(await connection.reply(), status, code)
        async with connected(gateway.admin_url) as connection:
            assert (await explained(connection, ordinary())).status == 200


# --- Explanations ----------------------------------------------------------------------------------------------------

RICH_POLICY = """
[models]
use_finetuned    = true
fallback_enabled = true

[ab_testing]
enabled            = true
rollout_percentage = 50

[overrides]
variant  = true
fallback = true

[limits]
max_tokens  = 50
temperature = 1.0
n           = 2

[[caps]]
scope = "global"
per   = "hour"
usd   = "20"
"""
MISTRAL_AGENTS = AGENTS.replace('finetuned = "sim/ft:support"', 'finetuned = "other/ft:support"')

CALLS: dict[str, tuple[dict[str, Any], bytes]] = {
    "named": ({}, b""),
    "routed": ({"model": "auto", "messages": [{"role": "user", "content": "Where is my order?"}]}, b""),
    "routed to the default": ({"model": "auto"}, b""),
    "user 1": ({"user": "u-1"}, b""),
    "user 2": ({"user": "u-2"}, b""),
    "user 3": ({"user": "u-3"}, b"x-gateway-operation: training\r\n"),
    "user in the header": ({"user": "u-1"}, b"x-gateway-user: u-2\r\n"),
    "fine-tuned by force": ({}, b"x-gateway-variant: finetuned\r\n"),
    "baseline by force": ({"user": "u-1"}, b"x-gateway-variant: baseline\r\n"),
    "no fallback": ({"user": "u-1"}, b"x-gateway-fallback: off\r\n"),
    "fields lowered": ({"max_tokens": 4_000, "temperature": 1.9}, b""),
    "another dialect": (
        {"model": "support_agent", "user": "u-9", "seed": 1, "logprobs": True},
        b"x-gateway-variant: finetuned\r\n",
    ),
    "agent by header": ({"model": "gpt-4o"}, b"x-gateway-agent: support_agent\r\n"),
    "unknown model": ({"model": "gpt-4o"}, b""),
    "too many answers": ({"n": 3}, b""),
    "a bad header": ({}, b"x-gateway-user: a b\r\n"),
    "a bad field": ({"stream": "yes"}, b""),
    "a bad content": ({"model": "auto", "messages": [{"role": "user", "content": 3}]}, b""),
}


@pytest.mark.parametrize("name", CALLS)
async def test_the_explanation_is_what_the_call_then_does(tmp_path: Path, name: str) -> None:
    fields, headers = CALLS[name]
    body = ordinary(**fields)
    other = 'kind = "mistral"\nbase_url = "http://127.0.0.1:1/v1"'
    async with (
        running_gateway(
            tmp_path, upstreams={"other": other}, agents=MISTRAL_AGENTS, policy=RICH_POLICY, config=_PRICES
        ) as gateway,
        connected(gateway.admin_url) as admin,
        connected(gateway.data_url) as data,
    ):
        told = await explained(admin, body, headers)
        assert not gateway.simulator.calls
        assert not gateway.journal()
        data.send(request(headers=headers, body=body))
        done = await data.reply()
        if told.status != 200:
            assert (done.status, done.json()) == (told.status, told.json())
            return
        found = told.json()
        assert done.status == 200
        sent = done.headers
        route = f"{found['rule']}: {found['why']}" if found["rule"] else found["why"]
        assert (sent["x-gateway-agent"], sent["x-gateway-route"]) == (found["agent"], route)
        assert sent["x-gateway-variant"] == found["variant"]
        assert sent.get("x-gateway-bucket") == (None if found["bucket"] is None else str(found["bucket"]))
        models = [link["model"] for link in found["chain"]]
        (record,) = gateway.journal()
        # A model may be tried twice, which is nothing that can be known before.
        tried = list(dict.fromkeys(attempt.ref for attempt in record.attempts))
        assert tried == models[: len(tried)]
        served = found["chain"][len(tried) - 1]
        assert sent["x-gateway-model"] == served["model"]
        assert sent.get("x-gateway-fields-dropped", "") == ", ".join(served["fields_dropped"])
        assert sent.get("x-gateway-fields-lowered", "") == ", ".join(found["fields_lowered"])
        assert record.variant_from == found["variant_from"]
        seen = gateway.simulator.last_request
        assert seen is not None
        assert {key: seen.body[key] for key in ("temperature", "max_tokens")} == {
            key: found["sent"][key] for key in ("temperature", "max_tokens")
        }
        assert len(found["caps"]) == 1
        assert float(sent["x-gateway-cost-usd"]) <= float(served["at_most_usd"])


_PRICES = """
[prices."*"]
input_usd_per_mtok  = "0.20"
output_usd_per_mtok = "0.80"
"""


# --- Who may see -----------------------------------------------------------------------------------------------------

TOKEN = "adm-token-5e0c"
GUARDED = (("GET", "/admin/config", None), ("POST", "/admin/explain", ordinary()))


async def ask_guarded(gateway: RunningGateway, headers: bytes = b"") -> list[Reply]:
    async with connected(gateway.admin_url) as connection:
        replies = []
        for method, target, body in GUARDED:
            connection.send(request(method, target, headers=headers, body=body))
            replies.append(await connection.reply())
        return replies


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"Authorization: Bearer\r\n",
        b"Authorization: Bearer " + CANARY + b"\r\n",
        b"Authorization: Bearer " + TOKEN[:-1].encode() + b"\r\n",
        b"Authorization: Basic " + TOKEN.encode() + b"\r\n",
        b"Authorization: " + TOKEN.encode() + b"\r\n",
        b"Authorization: Bearer \xff\xfe\r\n",
    ],
)
async def test_where_a_token_is_set_it_must_be_shown(tmp_path: Path, header: bytes) -> None:
    server = 'admin_token = "${ADMIN_TOKEN}"'
    async with running_gateway(tmp_path, server=server, environ={"ADMIN_TOKEN": TOKEN}) as gateway:
        for reply in await ask_guarded(gateway, header):
            check_refusal(reply, 401, "invalid_api_key")
            assert TOKEN.encode() not in reply.head + reply.body
        for reply in await ask_guarded(gateway, b"Authorization: bearer " + TOKEN.encode() + b"\r\n"):
            assert reply.status == 200
            assert TOKEN.encode() not in reply.body
        # Probes and scrapes need none.
        async with connected(gateway.admin_url) as connection:
            for target in ("/livez", "/readyz", "/metrics"):
                assert (await get(connection, target, header)).status == 200


async def test_off_loopback_the_admin_api_stays_shut_without_a_token(tmp_path: Path) -> None:
    async with running_gateway(tmp_path) as gateway:
        assert [reply.status for reply in await ask_guarded(gateway)] == [200, 200]
        server = msgspec.structs.replace(gateway.runtime.server, admin=Address("192.0.2.1:9090"))
        gateway.runtime.server = server
        for header in (b"", b"Authorization: Bearer \r\n", b"Authorization: Bearer x\r\n"):
            for reply in await ask_guarded(gateway, header):
                check_refusal(reply, 401, "invalid_api_key")


async def test_the_configuration_is_shown_without_its_secrets(tmp_path: Path) -> None:
    secrets = {
        "PROVIDER_KEY": "sk-provider-77",
        "ADMIN_TOKEN": TOKEN,
        "SALT": "salt-of-ours-31",
        "HOOK": "https://hook/41",
    }
    async with (
        running_gateway(
            tmp_path,
            upstreams={"paid": 'kind = "openai"\nbase_url = "http://127.0.0.1:1/v1"\napi_key_env = "PROVIDER_KEY"'},
            server='admin_token = "${ADMIN_TOKEN}"\nuser_salt = "${SALT}"',
            policy=POLICY + '\nallow_raw_models = true\n[alerting]\nslack_webhook = "${HOOK}"\n',
            environ=secrets,
        ) as gateway,
        connected(gateway.admin_url) as connection,
    ):
        reply = await get(connection, "/admin/config", b"Authorization: Bearer " + TOKEN.encode() + b"\r\n")
        assert reply.status == 200
        for secret in secrets.values():
            assert secret.encode() not in reply.body
        found = reply.json()
        assert found["upstreams"]["paid"]["api_key"] == "***"
        assert found["server"]["user_salt"] == found["server"]["admin_token"] == "***"
        assert found["policy"]["alerting"]["slack_webhook"] == "***"
        assert found["environment"] == "dev"
        assert found["agents"]["qa_agent"]["baseline"] == "sim/simulator-small"


async def test_a_data_listener_off_loopback_without_keys_refuses_to_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"server\.data = \"0\.0\.0\.0:0\" +is not loopback"):
        async with running_gateway(tmp_path, data="0.0.0.0:0"):
            raise AssertionError("it served")


async def test_no_admin_answer_tells_of_the_software_below(tmp_path: Path) -> None:
    async with running_gateway(tmp_path) as gateway, connected(gateway.admin_url) as connection:
        for target in ("/livez", "/readyz", "/admin/config"):
            reply = await get(connection, target)
            check_silence(reply.head)
            assert reply.headers["server"] == "genesis-gateway"
