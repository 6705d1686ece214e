"""Faults on demand: a model id that contains `fault:<name>` makes the simulator misbehave in that way.

`fault:503@0.2` does so on a fifth of the requests, chosen by the request itself, so that a test can count on
which. Pure: a fault is a `Reply` in place of the good one, or the good one spoilt.
Invariant: every name in `FAULTS` is known to `spoilt`, and no other.
"""

import re

import msgspec
from msgspec import Struct

from gateway.domain.settings import SimulatorSettings
from gateway.simulator import chat
from gateway.simulator.chat import ChatRequest, RequestRefused
from gateway.simulator.reply import (
    EVENTS,
    Part,
    PartKind,
    Reply,
    event,
    good_reply,
    is_finetuned,
    json_reply,
    pace,
    refused_reply,
)

SLOW_FIRST_MS = 20_000.0
RETRY_AFTER_S = 2

FAULTS = {
    "400-context": "400 `context_length_exceeded`: the prompt is said to be too long.",
    "400-filter": "400 `content_filter`: the prompt is said to break a policy.",
    "401": "401 `invalid_api_key`.",
    "429": "429 `rate_limit_exceeded` with `Retry-After: 2`.",
    "429-bare": "429 `rate_limit_exceeded` without a `Retry-After`.",
    "429-quota": "429 `insufficient_quota`: retrying will not help.",
    "500": "500 `server_error`.",
    "503": "503 `server_error`, overloaded.",
    "cut": "The connection closes after two thirds of the answer, in the middle of the body.",
    "empty": "200 with an empty body.",
    "error-in-200": "200 whose body is a JSON error, also when a stream was asked for.",
    "error-in-stream": "An error event after half of the stream, then the end. Plain: as `error-in-200`.",
    "html": "502 with an HTML page, as a proxy in between would send.",
    "malformed": "One event in the middle of the stream is not JSON. Plain: the body is not JSON.",
    "no-done": "The stream ends without `[DONE]`. Plain: nothing is wrong.",
    "no-usage": "No `usage`, whether asked for or not.",
    "reset": "The request is read, then the TCP connection is reset: no status, no headers.",
    "short": "The stream ends tidily after two thirds: no finish chunk, no `[DONE]`. Plain: as `empty`.",
    "silent": "The request is read and never answered.",
    "slow-first": "Headers at once, the first byte of the body after 20 s.",
    "stall": "The first half of the answer, then nothing; the connection stays open.",
}
"""What each fault does, by name. docs/cli.md has a copy, which tests/test_house.py holds to it."""

_OVERLOADED = RequestRefused(503, "The simulator is overloaded.", type_="server_error")
_HTML = b"<html>\n<head><title>502 Bad Gateway</title></head>\n<body><h1>502 Bad Gateway</h1></body>\n</html>\n"


def _rate_limited(*, retry_after_s: int | None) -> RequestRefused:
    return RequestRefused(
        429,
        "Rate limit reached.",
        type_="rate_limit_error",
        code="rate_limit_exceeded",
        retry_after_s=retry_after_s,
    )


_REFUSALS = {
    "400-context": RequestRefused(
        400,
        "This model's maximum context length is 8192 tokens. Please reduce the length of the messages.",
        code="context_length_exceeded",
        param="messages",
    ),
    "400-filter": RequestRefused(400, "The prompt breaks a content policy.", code="content_filter", param="prompt"),
    "401": RequestRefused(401, "Incorrect API key provided.", code="invalid_api_key"),
    "429": _rate_limited(retry_after_s=RETRY_AFTER_S),
    "429-bare": _rate_limited(retry_after_s=None),
    "429-quota": RequestRefused(
        429, "You exceeded your current quota.", type_="insufficient_quota", code="insufficient_quota"
    ),
    "500": RequestRefused(500, "The server had an error.", type_="server_error"),
    "503": _OVERLOADED,
}


class Fault(Struct, frozen=True):
    name: str
    rate: float = 1.0


def fault_of(model: str) -> Fault | None:
    """The fault a model id asks for, if any. Raises `RequestRefused` for one that is not in `FAULTS`."""
    # A letter before it belongs to another word, such as `default:`.
    found = re.search(r"(?<![A-Za-z])fault:([A-Za-z0-9-]*)(?:@([0-9.]*))?", model)
    if found is None:
        return None
    name, rate = found.groups()
    if name not in FAULTS:
        known = ", ".join(FAULTS)
        raise RequestRefused(400, f"No fault is called '{name}'. Known: {known}.", code="unknown_fault", param="model")
    if rate is None:
        return Fault(name)
    try:
        share = float(rate)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        message = f"The rate in 'fault:{name}@{rate}' is not a number from 0 to 1."
        raise RequestRefused(400, message, code="unknown_fault", param="model")
    return Fault(name, share)


def reply_to(request: ChatRequest, settings: SimulatorSettings, *, now_s: int) -> Reply:
    """What is sent for a request, faults included."""
    try:
        fault = fault_of(request.model)
        if fault is not None and chat.request_dice(request, settings, "fault").fraction() < fault.rate:
            return spoilt(fault.name, request, settings, now_s=now_s)
        if fault is None and fails(request, settings):
            return _failed(request, settings)
        return good_reply(request, settings, now_s=now_s)
    except RequestRefused as refusal:
        return refused_reply(refusal)


def fails(request: ChatRequest, settings: SimulatorSettings) -> bool:
    """Whether this request is one of those that its model fails at: by the error rates, always the same ones."""
    rate = settings.finetuned_error_rate if is_finetuned(request) else settings.baseline_error_rate
    return rate > 0 and chat.request_dice(request, settings, "error").fraction() < rate


def _failed(request: ChatRequest, settings: SimulatorSettings) -> Reply:
    """Its 500, when a good answer would have begun: an error that is quicker would make its model look fast."""
    reply = refused_reply(_REFUSALS["500"])
    late = msgspec.structs.replace(reply.parts[0], wait_ms=pace(request, settings).first_ms)
    return msgspec.structs.replace(reply, parts=(late,))


def spoilt(name: str, request: ChatRequest, settings: SimulatorSettings, *, now_s: int) -> Reply:
    """The reply of one fault."""
    if name in _REFUSALS:
        return refused_reply(_REFUSALS[name])
    match name:
        case "reset":
            return Reply(is_headless=True, ending="cut")
        case "silent":
            return Reply(is_headless=True, ending="held")
        case "html":
            part = Part(_HTML, "body")
            return Reply(status=502, content_type="text/html", parts=(part,), declared_bytes=len(_HTML))
        case "error-in-200":
            return json_reply(200, _OVERLOADED.body)
    good = good_reply(request, settings, now_s=now_s)
    if name == "empty":
        return msgspec.structs.replace(good, parts=(), declared_bytes=0)
    if name == "slow-first":
        first = msgspec.structs.replace(good.parts[0], wait_ms=SLOW_FIRST_MS)
        return msgspec.structs.replace(good, parts=(first, *good.parts[1:]))
    return _spoilt_stream(name, good) if good.content_type == EVENTS else _spoilt_body(name, good)


def _spoilt_stream(name: str, good: Reply) -> Reply:
    parts = good.parts
    match name:
        case "cut":
            return msgspec.structs.replace(good, parts=_begun(parts, 2 / 3), ending="cut")
        case "short":
            return msgspec.structs.replace(good, parts=_begun(parts, 2 / 3))
        case "stall":
            return msgspec.structs.replace(good, parts=_begun(parts, 1 / 2), ending="held")
        case "error-in-stream":
            error = Part(event(_OVERLOADED.body), "error")
            return msgspec.structs.replace(good, parts=(*_begun(parts, 1 / 2), error))
        case "malformed":
            begun = _begun(parts, 1 / 2)
            broken = Part(b'data: {"id": "chatcmpl-sim", "choices": [{"delta": {"con\n\n', "error")
            return msgspec.structs.replace(good, parts=(*begun, broken, *parts[len(begun) :]))
        case "no-done":
            return _without(good, "done")
        case "no-usage":
            return _without(good, "usage")
    raise AssertionError(f"BUG: no stream for the fault {name!r}")


def _spoilt_body(name: str, good: Reply) -> Reply:
    body, wait_ms = good.parts[0].data, good.parts[0].wait_ms
    match name:
        case "cut":
            return msgspec.structs.replace(
                good, parts=(Part(body[: len(body) * 2 // 3], "body", wait_ms),), ending="cut"
            )
        case "stall":
            return msgspec.structs.replace(good, parts=(Part(body[: len(body) // 2], "body", wait_ms),), ending="held")
        case "short":
            return msgspec.structs.replace(good, parts=(), declared_bytes=0)
        case "error-in-stream":
            return json_reply(200, _OVERLOADED.body)
        case "malformed":
            broken = body[: len(body) // 2]
            return msgspec.structs.replace(good, parts=(Part(broken, "body", wait_ms),), declared_bytes=len(broken))
        case "no-done":
            return good
        case "no-usage":
            decoded = msgspec.json.decode(body)
            del decoded["usage"]
            return json_reply(200, decoded, good.headers)
    raise AssertionError(f"BUG: no body for the fault {name!r}")


def _begun(parts: tuple[Part, ...], share: float) -> tuple[Part, ...]:
    """The parts up to a share of the tokens; never the last token, so that what is missing is missed."""
    tokens = [index for index, part in enumerate(parts) if part.kind == "token"]
    return parts[: tokens[int(len(tokens) * share)]] if tokens else parts[:1]


def _without(good: Reply, kind: PartKind) -> Reply:
    return msgspec.structs.replace(good, parts=tuple(part for part in good.parts if part.kind != kind))
