"""Log lines: their two shapes, one per call at most, and what never stands in any of them."""

import io
import logging
from collections import Counter
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gateway.simulator.server import Simulator
from gateway.store.journal import journal_files
from gateway.telemetry.logs import set_up_logs
from tests.raw_http import RawConnection, connected, ordinary, request
from tests.running import AT_ONCE, RunningGateway, running_gateway


@pytest.fixture
def output() -> Iterator[io.StringIO]:
    """Where the test sends its logs; what pytest had set up is put back."""
    root, own = logging.getLogger(), logging.getLogger("gateway")
    before = (root.handlers[:], root.level, own.level)
    yield io.StringIO()
    root.handlers[:], level, own_level = before
    root.setLevel(level)
    own.setLevel(own_level)


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def lines(output: io.StringIO) -> list[dict[str, Any]]:
    return [msgspec.json.decode(line) for line in output.getvalue().splitlines()]


# --- Shapes ----------------------------------------------------------------------------------------------------------


def test_json_has_one_object_per_line_whatever_the_message(output: io.StringIO) -> None:
    set_up_logs("json", "info", output)
    log = logging.getLogger("gateway.test")
    log.info(
        'two\nlines, "quotes" and %s', "\x1b[31mcolours", extra={"fields": {"ms": 1.5, "id": "r-1", "path": Path("/x")}}
    )
    log.warning("odd \udcff bytes")
    try:
        raise ValueError("why")
    except ValueError:
        log.exception("failed")
    first, second, third = lines(output)
    assert first["message"] == 'two\nlines, "quotes" and \x1b[31mcolours'
    assert (first["level"], first["logger"], first["ms"], first["path"]) == ("info", "gateway.test", 1.5, "/x")
    assert first["time"].endswith("+00:00")
    assert (second["level"], second["message"]) == ("warning", "odd \\udcff bytes")
    assert "ValueError: why" in third["exception"]


def test_text_is_short_and_leaves_out_what_is_empty(output: io.StringIO) -> None:
    set_up_logs("text", "info", output)
    logging.getLogger("gateway.call").info("call", extra={"fields": {"id": "r-1", "error": "", "status": 200}})
    assert output.getvalue().split(" ", 1)[1] == "info    gateway.call: call id=r-1 status=200\n"


def test_auto_asks_whether_a_person_reads(output: io.StringIO) -> None:
    terminal = Terminal()
    set_up_logs("auto", "info", terminal)
    logging.getLogger("gateway").info("hello")
    assert "info    gateway: hello" in terminal.getvalue()
    set_up_logs("auto", "info", output)
    logging.getLogger("gateway").info("hello")
    assert lines(output)[0]["message"] == "hello"


def test_libraries_are_heard_only_when_they_warn(output: io.StringIO) -> None:
    set_up_logs("json", "debug", output)
    logging.getLogger("aiohttp.server").info("quotes a request")
    logging.getLogger("aiohttp.server").warning("trouble")
    logging.getLogger("gateway.call").debug("call")
    assert [line["message"] for line in lines(output)] == ["trouble", "call"]


# --- One line per call -----------------------------------------------------------------------------------------------

AGENTS = """
[agents.qa_agent]
finetuned = "paid/ft:qa"
baseline  = "paid/simulator-small"

[agents.support_agent]
finetuned = "paid/ft:fault:503"
baseline  = "paid/simulator-small"

[agents.broken_agent]
finetuned = "paid/ft:fault:401"
baseline  = "paid/fault:400-filter"
"""

# Planted where secrets stand. Each is unlike every other string there is.
PROMPT, USER, KEY = "zq-prompt-4417", "zq-user-9031@example.org", "zq-caller-key-5520"
PROVIDER_KEY, ADMIN_TOKEN, SALT = "zq-provider-key-7713", "zq-admin-token-6642", "zq-salt-8806"
SECRETS = (PROMPT, USER, KEY, PROVIDER_KEY, ADMIN_TOKEN, SALT)
ENVIRON = {"PROVIDER_KEY": PROVIDER_KEY, "ADMIN_TOKEN": ADMIN_TOKEN, "SALT": SALT}
SERVER = 'admin_token = "${ADMIN_TOKEN}"\nuser_salt = "${SALT}"'


def policy(level: str) -> str:
    return f"""
[models]
use_finetuned = true

[[keys]]
name   = "app"
sha256 = "{sha256(KEY.encode()).hexdigest()}"

[log]
level = "{level}"
"""


async def make_calls(gateway: RunningGateway) -> bytes:
    """Calls of every ending, full of secrets; every reply but the good ones, whose content is the model's."""
    shown = f"Authorization: Bearer {KEY}\r\nx-gateway-user: {USER}\r\n".encode()
    said = [{"role": "system", "content": PROMPT}, {"role": "user", "content": f"{PROMPT} where is it?"}]
    asked = [
        request(headers=shown, body=ordinary(messages=said)),
        request(headers=shown, body=ordinary(messages=said, stream=True)),
        request(headers=shown, body=ordinary(messages=said, model="auto", metadata={"user_id": USER})),
        request(headers=shown, body=ordinary(messages=said, model="support_agent")),
        request(headers=shown, body=ordinary(messages=said, model="broken_agent")),
        request(headers=shown, body=ordinary(messages=said, model=f"{PROMPT} ?")),
        request(headers=shown, body=ordinary(messages=PROMPT)),
        request(headers=shown, body=ordinary(messages=said)[:-1]),
        request(headers=f"Authorization: Bearer {KEY}x\r\n".encode(), body=ordinary(messages=said)),
        request(headers=shown + f"x-gateway-operation: {PROMPT} ?\r\n".encode(), body=ordinary(messages=said)),
        request("GET", f"/{PROMPT}?key={KEY}", headers=shown),
        request("GET", f"/v1/models/{PROMPT}", headers=shown),
        request("POST", headers=shown + f"Content-Encoding: {PROMPT}\r\n".encode(), body=b""),
    ]
    found = b""
    for one in asked:
        async with connected(gateway.data_url) as connection:
            connection.send(one)
            reply = await connection.reply()
            found += reply.head + (b"" if reply.status == 200 else reply.body)
    async with connected(gateway.data_url) as connection:
        connection.send(f"GET /{PROMPT} HTTP/9.9\r\n{PROMPT} {KEY}\r\n\r\n".encode())
        found += await connection.rest()
    return found + await _admin_replies(gateway)


async def _admin_replies(gateway: RunningGateway) -> bytes:
    found = b""
    shown = f"Authorization: Bearer {ADMIN_TOKEN}\r\n".encode()
    async with connected(gateway.admin_url) as connection:
        for target in ("/metrics", "/readyz", "/admin/config"):
            connection.send(request("GET", target, headers=shown))
            reply = await connection.reply()
            assert reply.status == 200
            found += reply.head + reply.body
        found += await _explanation(connection, shown)
    return found


async def _explanation(connection: RawConnection, shown: bytes) -> bytes:
    connection.send(request("POST", "/admin/explain", headers=shown, body=ordinary(PROMPT)))
    reply = await connection.reply()
    assert reply.status == 200
    return reply.head + reply.body


@pytest.mark.parametrize("style", ["json", "text"])
async def test_no_secret_is_in_any_log_record_metric_or_error(
    tmp_path: Path, output: io.StringIO, style: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_up_logs(style, "debug", output)
    provider = await Simulator.start(AT_ONCE)
    paid = f'kind = "openai"\nbase_url = "{provider.base_url}"\napi_key_env = "PROVIDER_KEY"'
    try:
        async with running_gateway(
            tmp_path, upstreams={"paid": paid}, agents=AGENTS, policy=policy("debug"), server=SERVER, environ=ENVIRON
        ) as gateway:
            told = await make_calls(gateway)
            # A bug in the middle of a call has a traceback, which quotes code and not values.
            with monkeypatch.context() as broken:
                broken.setattr(gateway.runtime, "upstreams", {})
                told += await make_calls(gateway)
            assert "KeyError" in output.getvalue()
            await gateway.reload(policy=policy("debug") + "\nbroken = 1\n")
            told += await _admin_replies(gateway)
            assert provider.last_request is not None
            assert provider.last_request.headers["authorization"] == f"Bearer {PROVIDER_KEY}"
            assert not {USER, KEY} & set(provider.last_request.headers.values())
            kept = b"".join(path.read_bytes() for path in journal_files(tmp_path / "journal"))
            everything = {"replies": told.decode("latin-1"), "logs": output.getvalue(), "journal": kept.decode()}
            for where, text in everything.items():
                assert text
                for secret in SECRETS:
                    assert secret not in text, f"{secret} is in the {where}"
    finally:
        await provider.stop()


@pytest.mark.parametrize("level", ["debug", "info"])
async def test_a_call_has_one_line_at_most(tmp_path: Path, output: io.StringIO, level: str) -> None:
    set_up_logs("json", level, output)
    async with running_gateway(tmp_path, agents=AGENTS.replace("paid/", "sim/"), policy="[log]\n") as gateway:
        ids = []
        async with connected(gateway.data_url) as connection:
            for fields in ({}, {"stream": True}, {"model": "support_agent"}, {"model": "broken_agent"}, {"model": "x"}):
                connection.send(request(body=ordinary(**fields)))
                reply = await connection.reply()
                ids.append((reply.headers["x-request-id"], reply.status))
        seen = Counter(line["id"] for line in lines(output) if line["logger"] == "gateway.call")
        for request_id, status in ids:
            # Below debug, only what failed is worth a line.
            assert seen.pop(request_id, 0) == (1 if level == "debug" or status != 200 else 0)
        assert not seen
        failed = next(line for line in lines(output) if line["id"] == ids[3][0])
        assert (failed["agent"], failed["level"], failed["status"]) == ("broken_agent", "info", ids[3][1])
