"""The application behind the admin listener: probes, metrics, and what explains the gateway to people.

Readiness never depends on an upstream or a store: in a pod it counts for the agent beside us, too.
"""

import time
from pathlib import Path
from typing import Any

import msgspec
from aiohttp import web

from gateway.decide.explain import explain
from gateway.decide.health import Condition, Overall
from gateway.decide.identify import Caller
from gateway.domain.errors import GatewayError
from gateway.domain.wire import read_chat
from gateway.edge.admin_costs import Costs
from gateway.edge.admin_rollout import RolloutPaths
from gateway.edge.admit import leave_to_read_body, read_body
from gateway.edge.data_app import add_no_such_path
from gateway.edge.guard import Handler, guarded
from gateway.edge.health import Health
from gateway.edge.replies import JSON, error_reply
from gateway.edge.runtime import RUNTIME, Runtime
from gateway.telemetry.exposition import Exposition


def admin_app(runtime: Runtime, ledger: Path) -> web.Application:
    """Probes and metrics for machines, `/admin` for people. `ledger` is the file of the ledger."""
    app = web.Application(client_max_size=runtime.server.max_body_bytes)
    app[RUNTIME] = runtime
    app.router.add_get("/livez", _livez)
    app.router.add_get("/readyz", _readyz)
    app.router.add_get("/metrics", _metrics_of(runtime))
    health = Health(runtime)
    app.cleanup_ctx.append(health.run)
    app.router.add_get("/health", _health_of(health))
    app.router.add_get("/health/{agent}", _agent_health_of(health))
    app.router.add_get("/admin/config", guarded(_config))
    app.router.add_post("/admin/explain", guarded(_explain), expect_handler=leave_to_read_body)
    Costs(runtime, ledger).add_to(app)
    RolloutPaths(runtime, ledger).add_to(app)
    add_no_such_path(app)
    return app


async def _livez(request: web.Request) -> web.Response:
    """The loop turns, or this would not be answered."""
    return _json({"status": "alive"})


async def _readyz(request: web.Request) -> web.Response:
    """Ready once the configuration is loaded, until draining. A reload that failed is told, but does not unready us."""
    runtime = request.app[RUNTIME]
    body = {
        "status": "draining" if runtime.is_draining else "ready",
        "environment": runtime.plan.env,
        "config": {
            "is_current": not runtime.reload_error,
            "reload_error": runtime.reload_error or None,
            "at_next_start": runtime.at_next_start,
        },
    }
    return _json(body, status=503 if runtime.is_draining else 200)


def _health_of(health: Health) -> Handler:
    async def tell(request: web.Request) -> web.Response:
        """Of all agents. 503 only where one has no model that answers: a degraded gateway still serves."""
        overall, found = await health.report()
        return _json(found, status=503 if overall is Overall.ERROR else 200)

    return tell


def _agent_health_of(health: Health) -> Handler:
    async def tell(request: web.Request) -> web.Response:
        """Of one agent, likewise."""
        try:
            condition, found = await health.report_on(request.match_info["agent"])
        except GatewayError as error:
            return error_reply(error)
        return _json(found, status=503 if condition is Condition.ERROR else 200)

    return tell


def _metrics_of(runtime: Runtime) -> Handler:
    exposition = Exposition(runtime.observer.figures)

    async def metrics(request: web.Request) -> web.Response:
        text, content_type = await exposition.text(request.headers.get("Accept", ""))
        return web.Response(body=text, headers={"Content-Type": content_type})

    return metrics


async def _config(request: web.Request) -> web.Response:
    """The effective configuration, secrets masked."""
    return _json(request.app[RUNTIME].effective)


async def _explain(request: web.Request) -> web.Response:
    """What would happen to this very request, headers and body, at the data listener. Calls no one."""
    runtime = request.app[RUNTIME]
    try:
        body = read_chat(await read_body(runtime, request))
        # Who may ask here may ask for anyone.
        caller = Caller("", (), is_trusted=True)
        return _json(explain(runtime.plan, request.headers, body, caller, now_s=time.time()))
    except GatewayError as error:
        return error_reply(error)


def _json(value: Any, status: int = 200) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), status=status, content_type=JSON)
