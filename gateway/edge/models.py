"""`GET /v1/models` and `/v1/models/{id}`: what a caller may put into `model`. Asks no provider."""

from typing import Any

import msgspec
from aiohttp import web

from gateway.decide.identify import AUTO, Caller, find_caller
from gateway.decide.plan import Plan
from gateway.domain.errors import GatewayError, Refused
from gateway.edge.chat import is_loopback
from gateway.edge.replies import JSON, SERVER_NAME, error_reply
from gateway.edge.runtime import RUNTIME

# The SDKs want a time of creation; agents have none, so it is the same for all.
_CREATED_S = 0


async def list_models(request: web.Request) -> web.Response:
    """Every name this caller may ask for."""
    plan = request.app[RUNTIME].plan
    try:
        caller = find_caller(plan, request.headers, is_loopback=is_loopback(request))
    except GatewayError as error:
        return error_reply(error)
    found = [_model(name) for name in _names(plan, caller)]
    return _json({"object": "list", "data": found})


async def show_model(request: web.Request) -> web.Response:
    """One of them."""
    plan = request.app[RUNTIME].plan
    name = request.match_info["id"]
    try:
        caller = find_caller(plan, request.headers, is_loopback=is_loopback(request))
        if name not in _names(plan, caller):
            raise Refused("model_not_found", "there is no such agent or model", param="model")
    except GatewayError as error:
        return error_reply(error)
    return _json(_model(name))


def _names(plan: Plan, caller: Caller) -> list[str]:
    agents = [name for name in plan.agents if not caller.agents or name in caller.agents]
    targets = (target for agent in plan.agents.values() for target in (*agent.finetuned, *agent.baseline))
    named_outright = dict.fromkeys(target.ref for target in targets) if plan.allow_raw_models else {}
    return [AUTO, *agents, *(named_outright if not caller.agents else ())]


def _model(name: str) -> dict[str, Any]:
    card = {"id": name, "object": "model", "created": _CREATED_S, "owned_by": "genesis-gateway"}
    # Mistral's own client refuses a card without these two; nobody else minds them.
    return {**card, "type": "base", "capabilities": {}}


def _json(value: Any) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), content_type=JSON, headers={"Server": SERVER_NAME})
