"""`POST /v1/feedback`: what a caller says of a call, joined to it by its id, however late.

Once per caller and call: what is said last counts. The invariants: it is kept before it is acknowledged; and a caller
hears of no call but its own key's.
"""

import asyncio
import time
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from aiohttp import web
from msgspec import Meta

from gateway.decide.identify import find_caller
from gateway.domain.errors import GatewayError, Refused
from gateway.domain.outcome import Feedback
from gateway.edge.admit import read_body
from gateway.edge.asked import decoded
from gateway.edge.chat import is_loopback
from gateway.edge.guard import Handler
from gateway.edge.replies import JSON, SERVER_NAME, error_reply
from gateway.edge.runtime import RUNTIME
from gateway.store.experiments import Experiments
from gateway.store.store import StoreError

PATH = "/v1/feedback"
_THUMBS = {"up": 1.0, "down": -1.0}
# A call is told to the store a moment after its answer has left, by whichever process served it; a program may be
# quicker than that. After each of these waits the store is asked again.
_WAITS_S = (0.1, 0.2, 0.3)


class Said(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`call_id` is the answer's `x-request-id`. A score or a thumb, and the caller's own word for it."""

    call_id: Annotated[str, Meta(min_length=1, max_length=128)]
    score: Annotated[float, Meta(ge=-1, le=1)] | None = None
    thumbs: Literal["up", "down"] | None = None
    label: Annotated[str, Meta(max_length=100)] = ""


def feedback_to(store: Path) -> Handler:
    """The handler, over the store in this file."""

    async def take(request: web.Request) -> web.Response:
        runtime = request.app[RUNTIME]
        try:
            caller = find_caller(runtime.plan, request.headers, is_loopback=is_loopback(request))
            said = decoded(await read_body(runtime, request), Said)
            found = _feedback(said, caller.key)
            if not await _keep(store, found):
                message = f"no call {said.call_id} of yours is known; call_id is the x-request-id of its answer"
                raise Refused("call_not_found", message, param="call_id")
        except GatewayError as error:
            runtime.observer.feedback(ok=False)
            return error_reply(error)
        runtime.observer.feedback(ok=True)
        body = {"object": "feedback", "call_id": found.call_id, "score": found.score, "label": found.label}
        return web.Response(body=msgspec.json.encode(body), content_type=JSON, headers={"Server": SERVER_NAME})

    return take


def _feedback(said: Said, caller: str) -> Feedback:
    if (said.score is None) == (said.thumbs is None):
        raise Refused("invalid_value", "give a score from -1 to 1, or thumbs up or down", param="score")
    score = _THUMBS[said.thumbs] if said.thumbs is not None else said.score
    assert score is not None, "BUG: one of the two is there"
    return Feedback(said.call_id, caller, time.time_ns() // 1_000_000, score, said.label)


async def _keep(store: Path, feedback: Feedback) -> bool:
    """Whether there is such a call; then its feedback is kept."""
    for wait_s in (*_WAITS_S, 0.0):
        if await asyncio.to_thread(_give, store, feedback):
            return True
        await asyncio.sleep(wait_s)
    return False


def _give(store: Path, feedback: Feedback) -> bool:
    try:
        with Experiments(store, clock=time.time, is_new_allowed=False) as experiments:
            call = experiments.outcome(feedback.call_id)
            return call is not None and call.key == feedback.caller and experiments.give_feedback(feedback)
    except StoreError as error:
        raise Refused("budget_unavailable", str(error), headers={"Retry-After": "1"}) from error
