"""The rollouts over HTTP: where they stand, orders, and clear refusals that have changed nothing."""

import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gateway.decide.rollout_evidence import Look
from gateway.domain.rollout import Change, Phase, RolloutState
from gateway.edge import admin_rollout, looking
from gateway.edge.looking import look_beside
from tests.raw_http import RawConnection, Reply, check_refusal, connected, request
from tests.running import RunningGateway, running_gateway
from tests.steering import MANUAL, bring, of_agent, told, users_at

JSON = b"Content-Type: application/json\r\n"
TOKEN = "adm-token-5e0c"
BAD = (0.97, 0.5)


class Admin:
    """A connection to the admin listener, and the store behind it."""

    def __init__(self, gateway: RunningGateway, connection: RawConnection, store: Path) -> None:
        self.gateway, self._connection, self.store = gateway, connection, store

    async def get(self, path: str = "", headers: bytes = b"") -> Reply:
        self._connection.send(request("GET", f"/admin/rollout{path}", headers=headers))
        return await self._connection.reply()

    async def post(self, path: str, body: Any, headers: bytes = JSON) -> Reply:
        content = body if isinstance(body, bytes) else msgspec.json.encode(body)
        self._connection.send(request("POST", f"/admin/rollout/{path}", headers=headers, body=content))
        return await self._connection.reply()

    @property
    def state(self) -> RolloutState:
        return told(self.store)[0]["qa_agent"]

    @property
    def last(self) -> Change:
        return of_agent(told(self.store)[1], "qa_agent")[-1]


@asynccontextmanager
async def admin(tmp_path: Path, *, policy: str = MANUAL, server: str = "", **environ: str) -> AsyncIterator[Admin]:
    async with (
        running_gateway(tmp_path, policy=policy, server=server, environ=environ) as gateway,
        connected(gateway.admin_url) as connection,
    ):
        yield Admin(gateway, connection, tmp_path / "gateway.db")


# --- Reading ---------------------------------------------------------------------------------------------------------


async def test_every_rollout_is_shown_or_the_one_that_is_asked_for(tmp_path: Path) -> None:
    async with admin(tmp_path) as here:
        bring(here.store, users_at(here.state))
        before = told(here.store)
        found = (await here.get()).json()
        assert found["env"] == "dev"
        assert [one["agent"] for one in found["rollouts"]] == ["qa_agent", "support_agent"]
        (one,) = (await here.get("?agent=qa_agent")).json()["rollouts"]
        assert (one["phase"], one["share_percent"], one["mode"]) == ("ramping", 10.0, "manual")
        assert sum(one["users"].values()) == 2_000
        assert one["recommendation"] == "hold"
        assert told(here.store) == before


async def test_the_history_is_the_audit_log(tmp_path: Path) -> None:
    async with admin(tmp_path) as here:
        for percent in (25, 50):
            assert (await here.post("qa_agent/set", {"percent": percent, "who": "ann", "why": "a try"})).status == 200
        found = (await here.get("/history?agent=qa_agent")).json()
        assert [(line["event"], line["share_percent"]) for line in found["changes"]] == [
            ("began", 10.0), ("raised", 25.0), ("raised", 50.0),
        ]  # fmt: skip
        assert [line["why"] for line in found["changes"][1:]] == ["a try", "a try"]
        (last,) = (await here.get("/history?limit=1")).json()["changes"]
        assert last == found["changes"][-1]


@pytest.mark.parametrize(
    ("path", "status", "code", "param"),
    [
        ("?agent=qa_agnt", 404, "model_not_found", "agent"), ("/history?agent=nobody", 404, "model_not_found", "agent"),
        ("/history?limit=0", 400, "invalid_value", "limit"), ("/history?limit=x", 400, "invalid_value", "limit"),
        ("/history?limit=99999", 400, "invalid_value", "limit"),
    ],
)  # fmt: skip
async def test_a_question_that_means_nothing_is_refused(
    tmp_path: Path, path: str, status: int, code: str, param: str
) -> None:
    async with admin(tmp_path) as here:
        message = check_refusal(await here.get(path), status, code, param=param)
        if "agnt" in path:
            assert 'did you mean "qa_agent"?' in message


async def test_where_there_is_no_experiment_there_is_no_rollout(tmp_path: Path) -> None:
    async with admin(tmp_path, policy="[models]\nuse_finetuned = true\n") as here:
        assert (await here.get()).json() == {"env": "dev", "rollouts": []}
        refused = await here.post("qa_agent/set", {"percent": 25})
        assert "there is no experiment" in check_refusal(refused, 404, "model_not_found", param="agent")


# --- Orders ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("action", "body", "phase", "share_bps"),
    [
        ("set", {"percent": 25}, Phase.RAMPING, 2500), ("set", {"percent": 12.5}, Phase.RAMPING, 1250),
        ("set", {"percent": 0}, Phase.BASELINE, 0), ("set", {"percent": 100}, Phase.RAMPING, 9500),
        ("advance", {}, Phase.RAMPING, 2500), ("pause", {}, Phase.PAUSED, 1000),
        ("rollback", {"why": "complaints"}, Phase.ROLLED_BACK, 0),
    ],
)  # fmt: skip
async def test_an_order_is_carried_out_told_and_in_force(
    tmp_path: Path, action: str, body: dict[str, Any], phase: Phase, share_bps: int
) -> None:
    async with admin(tmp_path) as here:
        reply = await here.post(f"qa_agent/{action}", {"who": "ann", **body})
        assert reply.status == 200, reply
        change = reply.json()["change"]
        assert (change["by"], change["phase"], change["share_percent"]) == ("ann", phase.value, share_bps / 100)
        assert (here.state.phase, here.state.share_bps) == (phase, share_bps)
        assert here.last.evidence or action == "pause"
        assert told(here.store)[0]["support_agent"].share_bps == 1000
        async with connected(here.gateway.admin_url) as other:
            line = f'gateway_rollout_share{{agent="qa_agent"}} {share_bps / 10_000}'.encode()
            while True:
                other.send(request("GET", "/metrics"))
                if line in (await other.reply()).body.split(b"\n"):
                    break


async def test_what_the_evidence_is_against_wants_force_and_a_reason(tmp_path: Path) -> None:
    policy = MANUAL.replace("[rollout]", '[rollout]\nrollback_on = "nothing"')
    async with admin(tmp_path, policy=policy) as here:
        bring(here.store, users_at(here.state, success=BAD))
        before = told(here.store)
        refused = await here.post("qa_agent/set", {"percent": 25})
        message = check_refusal(refused, 409, "rollout_refused")
        assert "past the guardrail" in message
        assert message.endswith("force with a reason overrules it")
        for why in ("", " "):
            refused = await here.post("qa_agent/set", {"percent": 25, "force": True, "why": why})
            check_refusal(refused, 400, "invalid_value", param="why")
        assert told(here.store) == before
        forced = await here.post("qa_agent/set", {"percent": 25, "force": True, "why": "known", "who": "ann"})
        assert (forced.status, forced.json()["change"]["forced"]) == (200, True)
        assert (here.last.is_forced, here.last.why, here.state.phase) == (True, "known", Phase.PAUSED)


@pytest.mark.parametrize(
    ("path", "body", "status", "code", "param"),
    [
        ("qa_agent/set", {"percent": 101}, 400, "invalid_value", "percent"),
        ("qa_agent/set", {"percent": -0.01}, 400, "invalid_value", "percent"),
        ("qa_agent/set", {"percent": "25"}, 400, "invalid_type", "percent"),
        ("qa_agent/set", {"percent": True}, 400, "invalid_type", "percent"),
        ("qa_agent/set", {"percent": None}, 400, "invalid_value", "percent"),
        ("qa_agent/set", {}, 400, "invalid_value", "percent"),
        ("qa_agent/set", {"percent": 12.345}, 400, "invalid_value", "percent"),
        ("qa_agent/set", {"percent": 0.001}, 400, "invalid_value", "percent"),
        ("qa_agent/set", b'{"percent": 1e400}', 400, "invalid_value", "percent"),
        ("qa_agent/set", {"percent": 10}, 409, "rollout_refused", None),
        ("qa_agent/set", b'{"percent": NaN}', 400, "invalid_json", None),
        ("qa_agent/set", b"percent=25", 400, "invalid_json", None),
        ("qa_agent/set", b"", 400, "invalid_json", None),
        ("qa_agent/set", [25], 400, "invalid_type", None),
        ("qa_agent/set", {"percent": 25, "reason": "?"}, 400, "invalid_value", "reason"),
        ("qa_agent/set", {"percent": 25, "why": 1}, 400, "invalid_type", "why"),
        ("qa_agent/set", {"percent": 25, "why": "w" * 1_001}, 400, "invalid_value", "why"),
        ("qa_agent/set", {"percent": 25, "who": " "}, 400, "invalid_value", "who"),
        ("qa_agent/set", {"percent": 25, "who": "pilot"}, 400, "invalid_value", "who"),
        ("qa_agent/set", {"percent": 25, "who": "a\x1b[31m"}, 400, "invalid_value", "who"),
        ("qa_agent/set", {"percent": 25, "who": "w" * 201}, 400, "invalid_value", "who"),
        ("qa_agent/set", {"percent": 25, "force": "yes", "why": "x"}, 400, "invalid_type", "force"),
        ("qa_agent/advance", {"force": True}, 400, "invalid_value", "why"),
        ("qa_agent/advance", {"percent": 25}, 400, "invalid_value", "percent"),
        ("qa_agent/rollback", {"force": True, "why": "x"}, 400, "invalid_value", "force"),
        ("qa_agent/resume", {}, 409, "rollout_refused", None),
        ("qa_agent/rearm", {}, 409, "rollout_refused", None),
        ("qa_agent/skip", {}, 404, "not_found", None),
        ("qa_agnt/set", {"percent": 25}, 404, "model_not_found", "agent"),
        ("*/set", {"percent": 25}, 404, "model_not_found", "agent"),
    ],
    ids=str,
)
async def test_what_is_wrong_with_an_order_is_named_and_changes_nothing(
    tmp_path: Path, path: str, body: Any, status: int, code: str, param: str | None
) -> None:
    async with admin(tmp_path) as here:
        before = told(here.store)
        check_refusal(await here.post(path, body), status, code, param=param)
        assert told(here.store) == before


@pytest.mark.parametrize(
    ("headers", "status", "code", "param"),
    [
        (JSON + b"Origin: http://evil.example\r\n", 403, "origin_not_allowed", "Origin"),
        (b"Content-Type: text/plain\r\n", 400, "invalid_header", "Content-Type"),
        (b"", 400, "invalid_header", "Content-Type"),
    ],
    ids=["a web page", "a form", "no type"],
)
async def test_nothing_is_changed_for_a_web_page(
    tmp_path: Path, headers: bytes, status: int, code: str, param: str
) -> None:
    async with admin(tmp_path) as here:
        before = told(here.store)
        check_refusal(await here.post("qa_agent/rollback", {}, headers=headers), status, code, param=param)
        assert told(here.store) == before


async def test_where_there_is_a_token_it_is_wanted(tmp_path: Path) -> None:
    server = 'admin_token = "${GATEWAY_ADMIN_TOKEN}"'
    async with admin(tmp_path, server=server, GATEWAY_ADMIN_TOKEN=TOKEN) as here:
        before = told(here.store)
        check_refusal(await here.get(), 401, "invalid_api_key")
        check_refusal(await here.get("/history"), 401, "invalid_api_key")
        check_refusal(await here.post("qa_agent/rollback", {}), 401, "invalid_api_key")
        assert told(here.store) == before
        token = f"Authorization: Bearer {TOKEN}\r\n".encode()
        assert (await here.post("qa_agent/rollback", {}, headers=JSON + token)).status == 200


async def test_a_store_that_is_away_is_said_to_be_and_is_not_made_anew(tmp_path: Path) -> None:
    async with admin(tmp_path) as here:
        here.store.rename(tmp_path / "away.db")
        replies = [await here.get(), await here.get("/history"), await here.post("qa_agent/rollback", {})]
        for reply in replies:
            assert "there is no ledger at" in check_refusal(reply, 503, "budget_unavailable")
            assert reply.headers["retry-after"] == "1"
        assert not here.store.exists()
        (tmp_path / "away.db").rename(here.store)
        assert (await here.post("qa_agent/rollback", {})).status == 200


async def test_taking_back_waits_for_no_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # No process can be started, as where memory is short.
    monkeypatch.setattr("gateway.edge.looking._COMMAND", ("/nowhere/python",))
    async with admin(tmp_path) as here:
        check_refusal(await here.post("qa_agent/set", {"percent": 25}), 503, "budget_unavailable")
        assert (await here.post("qa_agent/set", {"percent": 5})).status == 200
        assert (await here.post("qa_agent/rollback", {})).status == 200
        assert (here.state.phase, here.last.evidence) == (Phase.ROLLED_BACK, "")


async def test_a_look_without_an_end_is_said_to_have_none_and_keeps_nobody_from_taking_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admin_rollout, "_PATIENCE_S", 0.2)
    monkeypatch.setattr(admin_rollout, "_FIGURES_S", 0.1)
    async with admin(tmp_path) as here:
        monkeypatch.setattr(looking, "_COMMAND", (sys.executable, "-c", "import signal; signal.pause()"))
        before = told(here.store)
        for reply in (await here.get(), await here.post("qa_agent/set", {"percent": 25})):
            message = check_refusal(reply, 503, "budget_unavailable")
            assert message == "no look can be taken: none was done after 0.2 s"
        assert told(here.store) == before
        assert (await here.post("qa_agent/rollback", {})).status == 200
        assert (here.state.phase, here.last.evidence) == (Phase.ROLLED_BACK, "")


async def test_a_look_that_took_long_counts_as_of_when_it_was_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def slowly(*asked: Any, now_ms: int) -> Sequence[Look]:
        return await look_beside(*asked, now_ms=now_ms - 5 * 3_600_000)

    policy = MANUAL.replace("check_every_s = 3600", "check_every_s = 1")
    policy = policy.replace("[rollout]", '[rollout]\nrollback_on = "nothing"')
    async with admin(tmp_path, policy=policy) as here:
        bring(here.store, users_at(here.state, success=BAD))
        monkeypatch.setattr(looking, "look_beside", slowly)
        (one,) = (await here.get("?agent=qa_agent")).json()["rollouts"]
        assert one["recommendation"] == "roll back"
        message = check_refusal(await here.post("qa_agent/set", {"percent": 25}), 409, "rollout_refused")
        assert "past the guardrail" in message
