"""The ledger over HTTP, on the admin listener: balances, entries by hand, releases, kill switches, the audit log.

What `gateway costs` does, for programs. SQLite blocks, so each request opens the ledger in a thread of its own. The
invariant: nothing is changed for a web page, whichever name it got this machine to answer to.
"""

import asyncio
import re
import secrets
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar, cast, get_args

import msgspec
from aiohttp import web

from gateway.decide.by_hand import Entry, actual_of, doubts_about, read_switch, row_of_entry
from gateway.domain.errors import GatewayError, Refused
from gateway.domain.spans import read_instant, read_span
from gateway.edge.admit import leave_to_read_body, read_body
from gateway.edge.asked import decoded, refuse_web_pages, unavailable
from gateway.edge.guard import Handler, guarded
from gateway.edge.replies import JSON, error_reply
from gateway.edge.runtime import Runtime
from gateway.store.ledger import By, Ledger
from gateway.store.statement import row_line, statement_of
from gateway.store.store import Stop, StoreError

T = TypeVar("T")
Serve = Callable[["Costs", web.Request], Awaitable[object]]

_MOST_AUDITED = 10_000
_MAX_TEXT = 1_000


class _By(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Abstract: what somebody wants changed, and who that is."""

    who: str = "admin API"


class NewEntry(Entry, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Money spent past the gateway. With an `id`, sent twice it counts once."""

    who: str = "admin API"


class Release(_By, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The end of doubts: freed, or where `actual_usd` is given for the one id, booked with that."""

    why: str
    ids: list[str] = []
    all: bool = False
    actual_usd: str = ""


class Throw(_By, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A kill switch to be thrown; an empty scope is everything."""

    why: str
    scope: str = ""


class Resume(_By, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A kill switch to be taken back."""

    scope: str = ""
    why: str = ""


class Costs:
    """The paths below /admin/costs, over one ledger."""

    def __init__(self, runtime: Runtime, ledger: Path) -> None:
        self._runtime = runtime
        self._path = ledger

    def add_to(self, app: web.Application) -> None:
        """Register them, behind the guard of all of /admin."""
        reads: dict[str, Serve] = {"": Costs.show, "/release": Costs.doubts, "/audit": Costs.audit}
        changes: dict[str, Serve] = {
            "/entries": Costs.enter, "/release": Costs.release, "/stop": Costs.stop, "/resume": Costs.resume,
        }  # fmt: skip
        for path, serve in reads.items():
            app.router.add_get(f"/admin/costs{path}", guarded(self._answering(serve)))
        for path, serve in changes.items():
            handler = guarded(self._answering(serve, is_change=True))
            app.router.add_post(f"/admin/costs{path}", handler, expect_handler=leave_to_read_body)

    async def show(self, request: web.Request) -> object:
        """How every account stands, and with `by` what was spent `since`."""
        by, since, until = (request.query.get(name, "") for name in ("by", "since", "until"))
        if by and by not in get_args(By):
            raise Refused("invalid_value", f"by is one of {', '.join(get_args(By))}", param="by")
        now_s = time.time()
        try:
            span = read_span(since or ("7d" if by == "day" else "today"), until, int(now_s * 1000))
        except ValueError as error:
            raise Refused("invalid_value", str(error), param="since") from None
        plan = self._runtime.plan
        group = cast(By, by or "agent") if by or since or until else None
        return await self._at(lambda ledger: statement_of(ledger, plan.env, plan.rules, now_s, group, span))

    async def doubts(self, request: web.Request) -> object:
        """What is in doubt, row by row."""
        env = self._runtime.plan.env
        rows = await self._at(lambda ledger: ledger.in_doubt(env))
        return {"env": env, "in_doubt": [row_line(row) for row in rows]}

    async def audit(self, request: web.Request) -> object:
        """Who did what by hand, latest first."""
        limit = request.query.get("limit", "100")
        if not re.fullmatch(r"[0-9]{1,5}", limit) or not 1 <= int(limit) <= _MOST_AUDITED:
            raise Refused("invalid_value", f"limit is from 1 to {_MOST_AUDITED}", param="limit")
        entries = await self._at(lambda ledger: ledger.audit(int(limit)))
        return {"audit": [{**entry._asdict(), "details": msgspec.Raw(entry.details.encode())} for entry in entries]}

    async def enter(self, request: web.Request) -> object:
        """Book an entry by hand."""
        entry = await self._read(request, NewEntry)
        plan = self._runtime.plan
        now_ms = int(time.time() * 1000)
        try:
            at_ms = read_instant(entry.at, now_ms) if entry.at else now_ms
        except ValueError as error:
            raise Refused("invalid_value", str(error), param="at") from None
        if entry.id and not entry.at:
            raise Refused("missing_field", "an entry with an id of its own says when it was, too", param="at")
        row = row_of_entry(plan, entry, id=entry.id or f"manual-{secrets.token_hex(8)}", at_ms=at_ms)
        added = await self._at(lambda ledger: ledger.add([row], who=entry.who))
        return {"id": row.id, "added": added.added, "known": added.known, "notes": doubts_about(plan, row)}

    async def release(self, request: web.Request) -> object:
        """End doubts."""
        wanted = await self._read(request, Release)
        if wanted.all == bool(wanted.ids):
            raise Refused("invalid_value", "give ids, or all = true", param="ids")
        if wanted.actual_usd and len(wanted.ids) != 1:
            raise Refused("invalid_value", "actual_usd is for exactly one id", param="actual_usd")
        env = self._runtime.plan.env

        def work(ledger: Ledger) -> object:
            rows = ledger.in_doubt(env)
            ids = list(dict.fromkeys(wanted.ids)) or [row.id for row in rows]
            actual = {row.id: actual_of(row, wanted.actual_usd) for row in rows if wanted.actual_usd and row.id in ids}
            ended = ledger.release(env, ids, who=wanted.who, why=wanted.why, actual=actual)
            return {"released": [row_line(row) for row in ended]}

        return await self._at(work)

    async def stop(self, request: web.Request) -> object:
        """Throw a kill switch; gateways on this ledger see it within half a second."""
        wanted = await self._read(request, Throw)
        plan = self._runtime.plan
        switch = read_switch(plan, wanted.scope)
        stop = Stop(plan.env, *switch, by=wanted.who, why=wanted.why, at_ms=int(time.time() * 1000))
        await self._at(lambda ledger: ledger.stop(stop))
        self._runtime.alerts.told_stop(stop)
        return {"env": plan.env, "stopped": switch._asdict()}

    async def resume(self, request: web.Request) -> object:
        """Take a kill switch back."""
        wanted = await self._read(request, Resume)
        plan = self._runtime.plan
        switch = read_switch(plan, wanted.scope, is_known_only=False)
        was = await self._at(lambda ledger: ledger.resume(plan.env, *switch, who=wanted.who, why=wanted.why))
        if was:
            lifted = Stop(plan.env, *switch, by=wanted.who, why=wanted.why, at_ms=int(time.time() * 1000))
            self._runtime.alerts.told_stop(lifted, is_lifted=True)
        return {"env": plan.env, "resumed": switch._asdict(), "was_stopped": was}

    def _answering(self, serve: Serve, *, is_change: bool = False) -> Handler:
        async def answer(request: web.Request) -> web.StreamResponse:
            try:
                if is_change:
                    refuse_web_pages(request)
                found = await serve(self, request)
            except GatewayError as error:
                return error_reply(error)
            return web.Response(body=msgspec.json.encode(found), content_type=JSON)

        return answer

    async def _read(self, request: web.Request, kind: type[T]) -> T:
        """The body as `kind`. Texts that are kept have an end."""
        wanted = decoded(await read_body(self._runtime, request), kind)
        for name in ("who", "why"):
            text = getattr(wanted, name, "-")
            is_needed = name == "who" or isinstance(wanted, Release | Throw)
            if (is_needed and not text.strip()) or len(text) > _MAX_TEXT:
                raise Refused("invalid_value", f"{name} wants 1 to {_MAX_TEXT} characters", param=name)
        return wanted

    async def _at(self, work: Callable[[Ledger], T]) -> T:
        return await asyncio.to_thread(_work_at, self._path, work)


def _work_at(path: Path, work: Callable[[Ledger], T]) -> T:
    try:
        ledger = Ledger(path, clock=time.time, is_new_allowed=False)
    except StoreError as error:
        raise unavailable(error) from error
    with ledger:
        try:
            return work(ledger)
        except StoreError as error:
            # The database's own troubles come of an error of its own; the rest is about what was asked.
            raise unavailable(error) if error.__cause__ else Refused("invalid_value", str(error)) from error
