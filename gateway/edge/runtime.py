"""What a request needs, in one place: built by app.py, read by the rooms of the edge.

A reload swaps `plan`, `upstreams` and `effective`, between two requests and never within one; all else stays for the
life of the process.
"""

import asyncio
from collections.abc import Mapping
from random import Random
from typing import Any

from aiohttp import web

from gateway.decide.budget import Books
from gateway.decide.plan import Plan
from gateway.decide.standing import Standing
from gateway.domain.settings import Server
from gateway.edge.alerts import Alerts
from gateway.edge.bookkeeper import Bookkeeper
from gateway.edge.upstream import Upstream
from gateway.store.journal import Journal
from gateway.telemetry.observe import Observer
from gateway.telemetry.tracing import Tracing


class Runtime:
    """One running gateway."""

    def __init__(
        self,
        *,
        plan: Plan,
        server: Server,
        upstreams: Mapping[str, Upstream],
        books: Books,
        bookkeeper: Bookkeeper,
        journal: Journal,
        observer: Observer,
        standing: Standing,
        tracing: Tracing,
        alerts: Alerts,
        dice: Random,
        effective: Mapping[str, Any],
    ) -> None:
        self.plan = plan
        self.server = server
        self.upstreams = upstreams
        self.books = books
        self.bookkeeper = bookkeeper
        self.journal = journal
        self.observer = observer
        self.standing = standing
        self.tracing = tracing
        self.alerts = alerts
        self.dice = dice
        self.effective = effective
        self.buffered_bytes = 0
        # Journeys whose callers have left, and which read on for the usage.
        self.lingering: set[asyncio.Task[object]] = set()
        # Shadow calls under way; they linger, too.
        self.shadows: set[asyncio.Task[None]] = set()
        self.is_draining = False
        self.reload_error = ""
        self.at_next_start: tuple[str, ...] = ()

    async def end_lingering(self, within_s: float) -> None:
        """Give the journeys whose callers have left so long, and then end them."""
        if self.lingering:
            await asyncio.wait(self.lingering, timeout=max(0.0, within_s))
        for journey in list(self.lingering):
            journey.cancel()
        if self.lingering:
            await asyncio.wait(self.lingering)


RUNTIME: web.AppKey[Runtime] = web.AppKey("runtime", Runtime)
