"""The ledger over HTTP: the same figures, the same changes, and nothing for web pages."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gateway.domain.ledger import Amounts, LedgerRow
from gateway.edge.admin import admin_app
from gateway.store.ledger import Ledger
from tests.ledgers import LEGAL, NOON_MS, NOON_S, USD, row
from tests.raw_http import CHAT, RawConnection, Reply, check_refusal, connected, ordinary, request
from tests.running import POLICY, RunningGateway, running_gateway

CAPS = """
[[caps]]
per = "total"
usd = "20"
"""
JSON = b"Content-Type: application/json\r\n"
TOKEN = "adm-token-5e0c"
CHANGES = ("entries", "release", "stop", "resume")


class Admin:
    """A connection to the admin listener, and the ledger behind it."""

    def __init__(self, gateway: RunningGateway, connection: RawConnection, path: Path) -> None:
        self.gateway = gateway
        self._connection = connection
        self._path = path

    def ledger(self) -> Ledger:
        return Ledger(self._path, clock=lambda: NOON_S)

    def add(self, *rows: LedgerRow) -> None:
        with self.ledger() as ledger:
            ledger.add([msgspec.structs.replace(row, env="dev") for row in rows], who="test")

    async def get(self, path: str = "", headers: bytes = b"") -> Reply:
        self._connection.send(raw("GET", path, headers=headers))
        return await self._connection.reply()

    async def post(self, path: str, body: Any, headers: bytes = JSON, host: bytes = b"127.0.0.1:9090") -> Reply:
        content = body if isinstance(body, bytes) else msgspec.json.encode(body)
        self._connection.send(raw("POST", path, headers=headers, body=content, host=host))
        return await self._connection.reply()


def raw(method: str, path: str, *, headers: bytes, body: bytes | None = None, host: bytes = b"localhost") -> bytes:
    sent = request(method, f"/admin/costs{path}", headers=headers, body=body)
    return sent.replace(b"Host: localhost", b"Host: " + host, 1)


@asynccontextmanager
async def admin(tmp_path: Path, *, server: str = "", **environ: str) -> AsyncIterator[Admin]:
    async with (
        running_gateway(tmp_path, policy=POLICY + CAPS, server=server, environ=environ) as gateway,
        connected(gateway.admin_url) as connection,
    ):
        yield Admin(gateway, connection, tmp_path / "gateway.db")


# --- Reading ---------------------------------------------------------------------------------------------------------


async def test_balances_are_those_of_the_ledger(tmp_path: Path) -> None:
    async with admin(tmp_path) as here:
        here.add(row("a", 1_234_567_891), row("b", USD, state="in_doubt"))
        reply = await here.get()
        assert (reply.status, reply.headers["content-type"]) == (200, "application/json")
        found = reply.json()
        (account,) = found["accounts"]
        assert (found["env"], found["spend"], found["in_doubt_usd"]) == ("dev", None, "1.00")
        assert (account["limit"], account["posted"], account["in_doubt"]) == ("20.00", "1.234567891", "1.00")
        assert (account["remaining"], account["resets"]) == ("17.765432109", None)


@pytest.mark.parametrize("query", ["?by=agent&since=2026-11-21&until=2026-11-22", "?since=2026-11-21&until=2026-11-22"])
async def test_spend_is_by_group_and_time(tmp_path: Path, query: str) -> None:
    async with admin(tmp_path) as here:
        here.add(row("a", 3 * USD), row("b", USD, on=LEGAL), row("c", at_ms=NOON_MS - 86_400_000))
        spend = (await here.get(query)).json()["spend"]
        assert (spend["by"], spend["since"], spend["until"]) == (
            "agent", "2026-11-21T00:00:00Z", "2026-11-22T00:00:00Z",
        )  # fmt: skip
        assert {group["group"]: group["usd"] for group in spend["groups"]} == {
            "qa_agent": "3.00",
            "legal_agent": "1.00",
        }


@pytest.mark.parametrize(
    ("path", "param"),
    [
        ("?by=colour", "by"), ("?since=yesterday", "since"), ("?since=2026-11-22&until=2026-11-21", "since"),
        ("/audit?limit=0", "limit"), ("/audit?limit=x", "limit"), ("/audit?limit=99999", "limit"),
    ],
)  # fmt: skip
async def test_a_question_that_means_nothing_is_refused(tmp_path: Path, path: str, param: str) -> None:
    async with admin(tmp_path) as here:
        check_refusal(await here.get(path), 400, "invalid_value", param=param)


async def test_doubts_and_audit_are_listed(tmp_path: Path) -> None:
    async with admin(tmp_path) as here:
        here.add(row("a", state="in_doubt"), row("b"))
        (doubt,) = (await here.get("/release")).json()["in_doubt"]
        assert (doubt["id"], doubt["usd"], doubt["agent"]) == ("a", "1.00", "qa_agent")
        (entry,) = (await here.get("/audit?limit=1")).json()["audit"]
        assert (entry["who"], entry["what"], entry["details"]["added"]) == ("test", "entries added", 2)


async def test_a_ledger_that_is_out_of_order_is_said_to_be(tmp_path: Path) -> None:
    async with admin(tmp_path) as here:
        (tmp_path / "gateway.db").rename(tmp_path / "moved.db")
        reply = await here.get()
        message = check_refusal(reply, 503, "budget_unavailable")
        assert "there is no ledger at" in message
        assert reply.headers["retry-after"] == "1"
        (tmp_path / "moved.db").rename(tmp_path / "gateway.db")
        assert (await here.get()).status == 200


# --- Changing --------------------------------------------------------------------------------------------------------


async def test_an_entry_is_booked_once_however_often_it_is_sent(tmp_path: Path) -> None:
    entry = {"agent": "qa_agnt", "usd": "0.50", "operation": "finetune", "id": "job-7", "at": "2026-11-21T12:00:00Z"}
    async with admin(tmp_path) as here:
        first = (await here.post("/entries", {**entry, "who": "ann"})).json()
        assert (first["id"], first["added"], first["known"]) == ("job-7", 1, 0)
        assert 'did you mean "qa_agent"?' in first["notes"][0]
        again = (await here.post("/entries", entry)).json()
        assert (again["added"], again["known"]) == (0, 1)
        other = await here.post("/entries", {**entry, "usd": "0.51"})
        assert "with other content: job-7" in check_refusal(other, 400, "invalid_value")
        with here.ledger() as ledger:
            (booked,) = ledger.rows("dev")
            assert (booked.amounts, booked.at_ms, booked.source) == (Amounts(USD // 2), NOON_MS, "manual")
            assert [line.who for line in ledger.audit()] == ["ann"]


async def test_an_entry_without_an_id_is_of_now_and_new_each_time(tmp_path: Path) -> None:
    async with admin(tmp_path) as here:
        ids = {(await here.post("/entries", {"agent": "qa_agent", "usd": "1"})).json()["id"] for _ in range(2)}
        assert len(ids) == 2
        assert (await here.get()).json()["accounts"][0]["posted"] == "2.00"


async def test_doubts_end_by_the_api(tmp_path: Path) -> None:
    async with admin(tmp_path) as here:
        here.add(*(row(name, state="in_doubt") for name in "abc"))
        priced = await here.post("/release", {"ids": ["a"], "why": "invoice", "actual_usd": "0.25"})
        assert [(line["state"], line["usd"]) for line in priced.json()["released"]] == [("posted", "0.25")]
        freed = await here.post("/release", {"all": True, "why": "checked", "who": "ann"})
        assert {line["id"]: line["state"] for line in freed.json()["released"]} == {"b": "released", "c": "released"}
        with here.ledger() as ledger:
            assert ledger.in_doubt("dev") == []
            assert ledger.verify("dev") == []
            assert [line.who for line in ledger.audit()][:2] == ["ann", "admin API"]


async def test_a_kill_switch_stops_calls_and_is_taken_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with admin(tmp_path) as here, connected(here.gateway.data_url) as data:
        stopped = await here.post("/stop", {"scope": "agent=qa_agent", "why": "runs wild"})
        assert stopped.json() == {"env": "dev", "stopped": {"dimension": "agent", "value": "qa_agent"}}
        (told,) = (await here.get()).json()["stops"]
        assert (told["dimension"], told["value"], told["by"], told["why"]) == (
            "agent", "qa_agent", "admin API", "runs wild",
        )  # fmt: skip
        assert await status_becomes(data, 403) == 403
        resumed = await here.post("/resume", {"scope": "agent=qa_agent"})
        assert resumed.json()["was_stopped"] is True
        assert (await here.post("/resume", {"scope": "agent=qa_agent"})).json()["was_stopped"] is False
        assert await status_becomes(data, 200) == 200
    # Once each, and nothing of the switch that was not thrown.
    told = [line.getMessage() for line in caplog.records if line.getMessage().startswith("Calls of")]
    assert told == [
        "Calls of agent qa_agent are refused, by admin API: runs wild",
        "Calls of agent qa_agent are let through again, by admin API",
    ]


async def status_becomes(data: RawConnection, wanted: int) -> int:
    """Call until the status is as wanted; the gateway looks for switches every half second, the test does not wait."""
    status = 0
    for _ in range(2_000):
        data.send(request(target=CHAT, body=ordinary()))
        status = (await data.reply()).status
        if status == wanted:
            break
    return status


@pytest.mark.parametrize(
    ("path", "body", "code", "param"),
    [
        ("/entries", b"{", "invalid_json", None),
        ("/entries", b"\xff", "invalid_json", None),
        ("/entries", [], "invalid_type", None),
        ("/entries", {"usd": "1"}, "missing_field", "agent"),
        ("/entries", {"agent": "qa_agent", "usd": 1.5}, "invalid_type", "usd"),
        ("/entries", {"agent": "qa_agent", "usd": "-1"}, "invalid_value", "usd"),
        ("/entries", {"agent": "a b", "usd": "1"}, "invalid_value", "agent"),
        ("/entries", {"agent": "qa_agent", "usd": "1", "cost": "1"}, "invalid_value", "cost"),
        ("/entries", {"agent": "qa_agent", "usd": "1", "at": "noon"}, "invalid_value", "at"),
        ("/entries", {"agent": "qa_agent", "usd": "1", "id": "x"}, "missing_field", "at"),
        ("/entries", {"agent": "qa_agent", "usd": "1", "who": " "}, "invalid_value", "who"),
        ("/release", {"ids": ["a"]}, "missing_field", "why"),
        ("/release", {"ids": ["a"], "why": ""}, "invalid_value", "why"),
        ("/release", {"why": "x"}, "invalid_value", "ids"),
        ("/release", {"why": "x", "all": True, "ids": ["a"]}, "invalid_value", "ids"),
        ("/release", {"why": "x", "all": True, "actual_usd": "1"}, "invalid_value", "actual_usd"),
        ("/release", {"why": "x", "ids": ["nobody"]}, "invalid_value", None),
        ("/release", {"why": "x", "ids": [1]}, "invalid_type", "ids"),
        ("/stop", {}, "missing_field", "why"),
        ("/stop", {"why": "x" * 1001}, "invalid_value", "why"),
        ("/stop", {"scope": "agent=qa_agnt", "why": "x"}, "invalid_value", "scope"),
        ("/resume", {"scope": "colour=red"}, "invalid_value", "scope"),
    ],
)
async def test_what_cannot_be_done_is_refused_by_name(
    tmp_path: Path, path: str, body: Any, code: str, param: str | None
) -> None:
    async with admin(tmp_path) as here:
        check_refusal(await here.post(path, body), 400, code, param=param)
        with here.ledger() as ledger:
            assert ledger.audit() == []


# --- Who may ---------------------------------------------------------------------------------------------------------

GOOD = {"agent": "qa_agent", "usd": "1"}


@pytest.mark.parametrize(
    ("headers", "host", "status", "code", "param"),
    [
        (JSON + b"Origin: https://evil.example\r\n", b"127.0.0.1:9090", 403, "origin_not_allowed", "Origin"),
        (JSON + b"Origin: http://127.0.0.1:9090\r\n", b"127.0.0.1:9090", 403, "origin_not_allowed", "Origin"),
        (JSON + b"Origin: null\r\n", b"127.0.0.1:9090", 403, "origin_not_allowed", "Origin"),
        (JSON, b"evil.example", 403, "origin_not_allowed", "Host"),
        (JSON, b"evil.example:9090", 403, "origin_not_allowed", "Host"),
        (JSON, b"127.0.0.1.evil.example", 403, "origin_not_allowed", "Host"),
        (JSON, b"localhost.evil.example", 403, "origin_not_allowed", "Host"),
        (JSON, b"192.0.2.1", 403, "origin_not_allowed", "Host"),
        (JSON, b"[::1", 403, "origin_not_allowed", "Host"),
        (JSON, b"", 403, "origin_not_allowed", "Host"),
        (b"", b"127.0.0.1:9090", 400, "invalid_header", "Content-Type"),
        (b"Content-Type: text/plain\r\n", b"127.0.0.1", 400, "invalid_header", "Content-Type"),
        (b"Content-Type: application/x-www-form-urlencoded\r\n", b"127.0.0.1", 400, "invalid_header", "Content-Type"),
    ],
)
async def test_no_web_page_changes_the_ledger(
    tmp_path: Path, headers: bytes, host: bytes, status: int, code: str, param: str
) -> None:
    async with admin(tmp_path) as here:
        for change in CHANGES:
            check_refusal(await here.post(f"/{change}", GOOD, headers, host), status, code, param=param)
        with here.ledger() as ledger:
            assert ledger.audit() == []


@pytest.mark.parametrize("host", [b"localhost", b"LOCALHOST:9090", b"127.0.0.1", b"127.0.0.2:1", b"[::1]:9090"])
async def test_a_program_on_this_machine_does(tmp_path: Path, host: bytes) -> None:
    async with admin(tmp_path) as here:
        headers = b"Content-Type: application/json; charset=utf-8\r\n"
        assert (await here.post("/entries", GOOD, headers, host)).status == 200


async def test_where_a_token_is_set_it_must_be_shown_and_any_host_will_do(tmp_path: Path) -> None:
    async with admin(tmp_path, server='admin_token = "${ADMIN_TOKEN}"', ADMIN_TOKEN=TOKEN) as here:
        right = JSON + f"Authorization: Bearer {TOKEN}\r\n".encode()
        wrong = JSON + b"Authorization: Bearer x\r\n"
        for headers in (JSON, wrong):
            for path in ("", "/release", "/audit"):
                check_refusal(await here.get(path, headers), 401, "invalid_api_key")
            for change in CHANGES:
                check_refusal(await here.post(f"/{change}", GOOD, headers), 401, "invalid_api_key")
        assert (await here.get("", right)).status == 200
        assert (await here.post("/entries", GOOD, right, b"gateway.internal")).status == 200
        # A page of the operator's own may not, either: browsers would send what anybody's page says.
        check_refusal(
            await here.post("/entries", GOOD, right + b"Origin: https://gateway.internal\r\n"),
            403, "origin_not_allowed", param="Origin",
        )  # fmt: skip


async def test_other_methods_are_named(tmp_path: Path) -> None:
    async with admin(tmp_path) as here:
        reply = await here.post("", GOOD)
        check_refusal(reply, 405, "method_not_allowed")
        assert reply.headers["allow"] == "GET, HEAD"
        assert (await here.get("/stop")).headers["allow"] == "POST"


async def test_every_path_is_documented(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
    async with admin(tmp_path) as here:
        app = admin_app(here.gateway.runtime, tmp_path / "gateway.db")
    served = {
        f"`{route.method} {route.resource.canonical}`"
        for route in app.router.routes()
        if route.resource is not None and route.resource.canonical.startswith("/admin") and route.method != "HEAD"
    }
    assert len(served) >= 9
    assert not [path for path in served if path not in text]
