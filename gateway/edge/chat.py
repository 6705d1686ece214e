"""One call's way through the gateway: `chat` is the journey, and its steps have the names the documentation uses.

admit, identify, assign, reserve, attempt, relay, settle, record. Nothing is decided here that a pure function could
decide, and whatever waits, waits under a deadline. The invariants: every call that got an agent is settled and recorded
exactly once, and before the last byte of its answer leaves.
"""

import asyncio
import logging
import secrets
import time
from functools import partial

from aiohttp import web

from gateway.decide.fill import fill
from gateway.decide.identify import find_caller, identify
from gateway.domain.errors import GatewayError, Refused
from gateway.domain.wire import ChatBody, read_chat
from gateway.edge.admit import admit
from gateway.edge.attempt import Begun, Whole
from gateway.edge.failover import Failover
from gateway.edge.listener import tell_when_lost
from gateway.edge.open_call import OpenCall
from gateway.edge.relay import Relay
from gateway.edge.replies import JSON, SERVER_NAME, error_reply
from gateway.edge.runtime import RUNTIME
from gateway.edge.shadow import follow, plain_reply
from gateway.telemetry.logs import IN_CALL

log = logging.getLogger("gateway.call")


def new_call_id() -> str:
    """A name for a call: 48 bits of time and 80 of chance.

    Names that rise with time go side by side into the ledger's tree, which halves what a row costs there.
    """
    return f"req-{time.time_ns() // 1_000_000:012x}{secrets.token_hex(10)}"


async def chat(request: web.Request) -> web.StreamResponse:
    """`POST /v1/chat/completions`."""
    runtime = request.app[RUNTIME]
    call = OpenCall(runtime, new_call_id())
    runtime.observer.in_flight += 1
    IN_CALL.set(call.record)
    response: web.StreamResponse | None = None
    tell_when_lost(request, partial(_left, call, asyncio.current_task()))
    try:
        # Before the body is read: a stranger's must not cost us memory.
        caller = find_caller(call.plan, request.headers, is_loopback=is_loopback(request))
        call.trace.begin(request.headers, call.record, is_trusted=caller.is_trusted)
        body = read_chat(await admit(call, request))
        who = identify(call.plan, request.headers, body, caller, now_s=time.time())
        call.identified(who, caller, body)
        assignment = call.plan.assign(who.agent, who.user, variant=who.variant, allow_fallback=who.allow_fallback)
        filled = fill(body, who.agent.defaults, call.plan.limits, is_capped=call.plan.is_capped)
        call.assigned(who, assignment, filled, body)
        failover = Failover(call, call.within_budget(assignment), filled, body)
        answer = await failover.answer()
        if isinstance(answer, Whole):
            return await _reply(call, answer, body)
        response = web.StreamResponse(headers=_stream_headers(call, answer))
        relay = Relay(call, failover, answer, response, request.transport, wants_usage=body.include_usage)
        await relay.run(request)
        if call.record.client_left and request.transport is not None:
            request.transport.abort()
        follow(call, body)
        return response
    except GatewayError as error:
        return _refuse(call, error)
    except ConnectionError:
        # Only writing to the caller raises it: everything the upstream raises is a GatewayError by now.
        call.record.client_left = True
        if response is None:
            raise
        return response
    except Exception:
        log.exception("bug in a call")
        if response is not None and response.prepared:
            raise
        return _refuse(call, Refused("internal_error", f"internal error; the log has it under {call.record.id}"))
    finally:
        runtime.observer.in_flight -= 1
        tell_when_lost(request, None)
        call.hold_bytes(0)
        _close_books(call)
        # The connection's next words are not this call's.
        IN_CALL.set(None)


def _left(call: OpenCall, journey: "asyncio.Task[object] | None") -> None:
    """The caller has gone. An answer under way is read for its usage, within limits; all else ends now."""
    patience_s = call.left()
    if journey is None:
        return
    if patience_s is None:
        journey.cancel()
    else:
        # A drain does not see it: its connection is gone.
        call.runtime.lingering.add(journey)
        journey.add_done_callback(call.runtime.lingering.discard)
        call.ending = asyncio.get_running_loop().call_later(patience_s, journey.cancel)


async def _reply(call: OpenCall, answer: Whole, body: ChatBody) -> web.Response:
    """A plain answer, settled and recorded before its first byte leaves."""
    call.answered(answer.model, answer.finish_reason, answer.usage, content_bytes=len(answer.body))
    call.trace.answers((answer.body,))
    call.finish()
    await call.runtime.journal.flushed()
    headers = {"Server": SERVER_NAME, **answer.headers, **call.headers(), **call.closing_headers()}
    return plain_reply(call, body, body=answer.body, content_type=JSON, headers=headers)


def _stream_headers(call: OpenCall, begun: Begun) -> dict[str, str]:
    fixed = {"Server": SERVER_NAME, "Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"}
    return {**fixed, **begun.headers, **call.headers()}


def _refuse(call: OpenCall, error: GatewayError) -> web.Response:
    try:
        call.finish(error)
    except Refused as unrecorded:
        error = unrecorded
    reply = error_reply(error, headers=call.headers())
    if error.headers.get("Connection") == "close":
        reply.force_close()
    return reply


def _close_books(call: OpenCall) -> None:
    """Whatever ended the journey without closing its books closes them here: the caller left, or the drain is over."""
    if call.is_finished:
        return
    is_ours = call.runtime.is_draining and not call.record.client_left
    call.record.client_left = not is_ours
    try:
        call.finish(Refused("draining", "cut off by the gateway's shutdown") if is_ours else None)
    except Refused:
        log.exception("a call could not be recorded")


def is_loopback(request: web.BaseRequest) -> bool:
    """Whether the caller is on this machine, which is what trust without keys rests on."""
    peer = request.transport.get_extra_info("peername") if request.transport is not None else None
    return isinstance(peer, tuple) and (peer[0] == "::1" or str(peer[0]).startswith("127."))
