"""One call's way through the gateway: `chat` is the journey, and its steps have the names the documentation uses.

admit, identify, assign, reserve, attempt, relay, settle, record. Nothing is decided here that a pure function could
decide, and whatever waits, waits under a deadline. The invariants: every call that got an agent is settled and recorded
exactly once, and before the last byte of its answer leaves.
"""

import logging
import time
import uuid

from aiohttp import web

from gateway.decide.fallback import Step, next_step
from gateway.decide.fill import Filled, fill
from gateway.decide.identify import find_caller, identify
from gateway.decide.plan import Assignment
from gateway.domain.errors import GatewayError, Refused, UpstreamFault
from gateway.domain.wire import ChatBody, read_chat
from gateway.edge.admit import admit
from gateway.edge.attempt import Begun, Whole, attempt, request_body, sent_headers
from gateway.edge.open_call import OpenCall
from gateway.edge.relay import Relay
from gateway.edge.replies import JSON, SERVER_NAME, error_reply
from gateway.edge.runtime import RUNTIME

log = logging.getLogger("gateway.call")


async def chat(request: web.Request) -> web.StreamResponse:
    """`POST /v1/chat/completions`."""
    runtime = request.app[RUNTIME]
    call = OpenCall(runtime, f"req-{uuid.uuid4().hex}")
    runtime.observer.in_flight += 1
    response: web.StreamResponse | None = None
    try:
        # Before the body is read: a stranger's must not cost us memory.
        caller = find_caller(call.plan, request.headers, is_loopback=is_loopback(request))
        body = read_chat(await admit(runtime, request))
        who = identify(call.plan, request.headers, body, caller, now_s=time.time())
        call.identified(who, caller, body)
        assignment = call.plan.assign(who.agent, who.user, variant=who.variant, allow_fallback=who.allow_fallback)
        filled = fill(body, who.agent.defaults, call.plan.limits)
        call.assigned(who, assignment, filled, body)
        answer = await _first_that_answers(call, assignment, filled, body, request)
        if isinstance(answer, Whole):
            return _reply(call, answer)
        response = web.StreamResponse(headers=_stream_headers(call, answer))
        return await _stream(call, answer, request, response, body)
    except GatewayError as error:
        return _refuse(call, error)
    except ConnectionError:
        # Only writing to the caller raises it: everything the upstream raises is a GatewayError by now.
        call.record.client_left = True
        if response is None:
            raise
        return response
    except Exception:
        log.exception("bug in call %s", call.record.id)
        if response is not None and response.prepared:
            raise
        return _refuse(call, Refused("internal_error", f"internal error; the log has it under {call.record.id}"))
    finally:
        runtime.observer.in_flight -= 1
        _close_books(call)


async def _first_that_answers(
    call: OpenCall, assignment: Assignment, filled: Filled, body: ChatBody, request: web.Request
) -> Whole | Begun:
    """Down the chain until a model answers. Raises the last fault where none does."""
    chain = assignment.chain
    headers = sent_headers(request.headers)
    for index, target in enumerate(chain):
        upstream = call.upstreams[target.upstream]
        call.start_clock(upstream.timeouts.total_s)
        payload, call.dropped = request_body(target, filled, body, stream_usage=upstream.stream_usage)
        call.reserve(target)
        try:
            answer = await attempt(call, upstream, target, payload, headers, stream=body.stream)
        except UpstreamFault as fault:
            call.failed(fault)
            left = len(chain) - index - 1
            step = next_step(fault.kind, models_left=left, left_s=call.left_s, has_sent_bytes=False)
            if step is Step.GIVE_UP:
                raise _with_attempts(fault, call) from fault
        else:
            return answer
    raise AssertionError("BUG: a chain without a model")


def _with_attempts(fault: UpstreamFault, call: OpenCall) -> UpstreamFault:
    """The last fault, told with what was tried before it."""
    if len(call.record.attempts) > 1:
        tried = "; ".join(f"{one.ref}: {one.fault}" for one in call.record.attempts)
        fault.message = f"{fault.message} (tried {tried})"
    return fault


def _reply(call: OpenCall, answer: Whole) -> web.Response:
    """A plain answer, settled and recorded before its first byte leaves."""
    call.answered(answer.model, answer.finish_reason, answer.usage)
    call.finish()
    headers = {"Server": SERVER_NAME, **answer.headers, **call.headers(), **call.closing_headers()}
    return web.Response(body=answer.body, content_type=JSON, headers=headers)


async def _stream(
    call: OpenCall, begun: Begun, request: web.Request, response: web.StreamResponse, body: ChatBody
) -> web.StreamResponse:
    """A streamed answer; the exchange with the provider ends with it, however it ends."""
    try:
        await response.prepare(request)
        await Relay(call, begun, response, request.transport, wants_usage=body.include_usage, n=body.n).run()
    finally:
        begun.exchange.close()
    if call.record.client_left and request.transport is not None:
        request.transport.abort()
    return response


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
    is_ours = call.runtime.is_draining
    call.record.client_left = not is_ours
    try:
        call.finish(Refused("draining", "cut off by the gateway's shutdown") if is_ours else None)
    except Refused:
        log.exception("call %s could not be recorded", call.record.id)


def is_loopback(request: web.BaseRequest) -> bool:
    """Whether the caller is on this machine, which is what trust without keys rests on."""
    peer = request.transport.get_extra_info("peername") if request.transport is not None else None
    return isinstance(peer, tuple) and (peer[0] == "::1" or str(peer[0]).startswith("127."))
