"""`POST /v1/feedback`: what a caller says of a call, joined to it by its id, however late.

Once per caller and call: what is said last counts, whatever it waited for. The invariants: it is kept before it is
acknowledged; a caller hears of no call but its own key's; and calls wait neither for it nor for the store it waits for.
"""

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from aiohttp import web
from msgspec import Meta

from gateway.decide.identify import find_caller
from gateway.domain.errors import GatewayError, Refused
from gateway.domain.outcome import Feedback
from gateway.domain.shadow_policy import SHADOW
from gateway.edge.admit import read_body
from gateway.edge.asked import decoded, unavailable
from gateway.edge.chat import is_loopback
from gateway.edge.replies import JSON, SERVER_NAME, error_reply
from gateway.edge.runtime import RUNTIME, Runtime
from gateway.store.experiments import Experiments
from gateway.store.store import StoreError

PATH = "/v1/feedback"
# The longest that is in order, with every character escaped, is below 4 KiB. So little is not counted in what requests
# may take at once.
MAX_BYTES = 16 * 2**10
_THUMBS = {"up": 1.0, "down": -1.0}
# A call is told to the store a moment after its answer has left, by whichever process served it; a program may be
# quicker than that. After each of these waits the store is asked again.
_WAITS_S = (0.1, 0.2, 0.3)
# With its waits, and with those before it; a locked store is waited for 2 s.
_PATIENCE_S = 3.0
# Half a millisecond each where the store is in order.
_MAX_WAITING = 256
_RETRY = {"Retry-After": "1"}


class Said(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`call_id` is the answer's `x-request-id`. A score or a thumb, and the caller's own word for it."""

    call_id: Annotated[str, Meta(min_length=1, max_length=128)]
    score: Annotated[float, Meta(ge=-1, le=1)] | None = None
    thumbs: Literal["up", "down"] | None = None
    label: Annotated[str, Meta(max_length=100)] = ""


class FeedbackDesk:
    """The handler, over the store in this file."""

    def __init__(self, store: Path) -> None:
        self._store = store
        # Its own: in asyncio's, which are six on two cores, a locked store would have calls and scrapes wait behind it.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="feedback")
        self._waiting = 0
        self._last_ms = 0

    async def take(self, request: web.Request) -> web.Response:
        """Keep what is said, or say why not. A 503 is to be sent again; whether it was kept is not known."""
        runtime = request.app[RUNTIME]
        try:
            caller = find_caller(runtime.plan, request.headers, is_loopback=is_loopback(request))
            said = decoded(await _body(runtime, request), Said)
            found = _feedback(said, caller.key, self._arrived_ms())
            await self._keep(runtime, found)
        except GatewayError as error:
            runtime.observer.feedback(ok=False)
            return error_reply(error)
        runtime.observer.feedback(ok=True)
        body = {"object": "feedback", "call_id": found.call_id, "score": found.score, "label": found.label}
        return web.Response(body=msgspec.json.encode(body), content_type=JSON, headers={"Server": SERVER_NAME})

    async def close(self, _: web.Application) -> None:
        """Let go of the thread. Nobody waits for it any more; what it is at ends by itself, within 2 s."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _arrived_ms(self) -> int:
        """No two are the same, and none is before the last: the clock may stand still, or be set back."""
        self._last_ms = max(_now_ms(), self._last_ms + 1)
        return self._last_ms

    async def _keep(self, runtime: Runtime, feedback: Feedback) -> None:
        """Keep it once the store knows its call. Raises `Refused` where the store does not."""
        journal, bookkeeper, is_told = runtime.journal, runtime.bookkeeper, False
        written_bytes = journal.written_bytes
        try:
            async with asyncio.timeout(_PATIENCE_S):
                for wait_s in (0.0, *_WAITS_S):
                    await asyncio.sleep(wait_s)
                    # Before the store is asked: what it is told in between would count as told, and not be found.
                    told_bytes = journal.written_bytes - journal.behind_bytes
                    is_told = told_bytes >= written_bytes and not bookkeeper.store_error
                    if await self._is_given(feedback):
                        return
        except TimeoutError:
            raise unavailable(StoreError("the ledger's store does not answer in time")) from None
        if not is_told:
            # The call may be one of those that the store has not heard of, and its caller is not to give up on it.
            raise unavailable(StoreError("the ledger's store has not heard of the latest calls yet"))
        message = f"no call {feedback.call_id} of yours is known; call_id is the x-request-id of its answer"
        raise Refused("call_not_found", message, param="call_id")

    async def _is_given(self, feedback: Feedback) -> bool:
        if self._waiting >= _MAX_WAITING:
            raise Refused("overloaded", "too much feedback at once", headers=_RETRY)
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, _give, self._store, feedback)
        finally:
            self._waiting -= 1


async def _body(runtime: Runtime, request: web.Request) -> bytes:
    """The request's body, of which there is little. Raises `Refused`."""
    if runtime.is_draining:
        raise Refused("draining", "the gateway is shutting down", headers={**_RETRY, "Connection": "close"})
    limit = min(MAX_BYTES, runtime.server.max_body_bytes)
    too_large = Refused("body_too_large", f"feedback is over {limit} bytes", headers={"Connection": "close"})
    if request.content_length is not None and request.content_length > limit:
        raise too_large
    try:
        return await read_body(runtime, request.clone(client_max_size=limit))
    except Refused as error:
        # Its words are those of a call's body, which may be longer.
        raise (too_large if error.code == too_large.code else error) from None


def _feedback(said: Said, caller: str, at_ms: int) -> Feedback:
    if (said.score is None) == (said.thumbs is None):
        raise Refused("invalid_value", "give a score from -1 to 1, or thumbs up or down", param="score")
    score = _THUMBS[said.thumbs] if said.thumbs is not None else said.score
    assert score is not None, "BUG: one of the two is there"
    return Feedback(said.call_id, caller, at_ms, score, said.label)


def _give(store: Path, feedback: Feedback) -> bool:
    """Whether there is such a call; then its feedback is kept."""
    try:
        with Experiments(store, clock=time.time, is_new_allowed=False) as experiments:
            call = experiments.outcome(feedback.call_id)
            # Of shadow calls no caller knows.
            is_theirs = call is not None and call.key == feedback.caller and call.operation != SHADOW
            return is_theirs and experiments.give_feedback(feedback)
    except StoreError as error:
        raise unavailable(error) from error


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
