"""How a simulated answer goes out: the bytes of each part, what each waits for, and how the connection ends.

Still pure: `server` plays a `Reply`, and `faults` spoils a good one before that.
Invariant: a reply says everything the player does; the player decides nothing.
"""

from collections.abc import Iterator
from typing import Any, Literal

import msgspec
from msgspec import Struct

from gateway.domain.settings import SimulatorSettings
from gateway.simulator import chat
from gateway.simulator.chat import Answer, ChatRequest, Choice, RequestRefused

JSON = "application/json"
EVENTS = "text/event-stream; charset=utf-8"
DONE = b"data: [DONE]\n\n"

# Of the kind that a gateway hands on to its caller.
_LIMITS = {"x-ratelimit-limit-requests": "10000", "x-ratelimit-remaining-requests": "9999"}

PartKind = Literal["body", "role", "token", "finish", "usage", "done", "error"]
Ending = Literal["whole", "cut", "held"]


class Part(Struct, frozen=True):
    """Bytes that leave together, `wait_ms` after the part before."""

    data: bytes
    kind: PartKind
    wait_ms: float = 0.0


class Reply(Struct, frozen=True, kw_only=True):
    """One HTTP answer as a script."""

    status: int = 200
    headers: dict[str, str] = {}
    content_type: str = JSON
    parts: tuple[Part, ...] = ()
    declared_bytes: int | None = None
    """The Content-Length; without one the body is chunked."""
    ending: Ending = "whole"
    """`cut` closes the connection where the parts end, `held` leaves it open and says no more."""
    is_headless: bool = False
    """Nothing is sent, not even a status: `cut` is then a TCP reset, and `held` silence."""


class Pace(Struct, frozen=True):
    first_ms: float
    token_ms: float


def is_finetuned(request: ChatRequest) -> bool:
    """Whether the model's id says that it is a fine-tuned one."""
    return request.model.startswith("ft:")


def pace(request: ChatRequest, settings: SimulatorSettings) -> Pace:
    """This request's own speed: the configured one, strayed from by at most `jitter`."""
    dice = chat.request_dice(request, settings, "pace")
    speedup = settings.finetuned_speedup if is_finetuned(request) else 1.0
    first, token = (1 + settings.jitter * (2 * dice.fraction() - 1) for _ in range(2))
    return Pace(settings.first_token_ms * first / speedup, settings.per_token_ms * token / speedup)


def good_reply(request: ChatRequest, settings: SimulatorSettings, *, now_s: int) -> Reply:
    """The answer to a request, streamed or in one piece. Raises `RequestRefused`."""
    answer = chat.answer(request, settings)
    speed = pace(request, settings)
    headers = {"x-request-id": answer.id.replace("chatcmpl", "req"), **_LIMITS}
    if request.stream:
        parts = tuple(_events(answer, speed, now_s=now_s, with_usage=request.wants_usage))
        return Reply(headers=headers, content_type=EVENTS, parts=parts)
    longest = max(choice.tokens for choice in answer.choices)
    body = _encode(completion(answer, now_s=now_s))
    part = Part(body, "body", speed.first_ms + longest * speed.token_ms)
    return Reply(headers=headers, parts=(part,), declared_bytes=len(body))


def json_reply(status: int, body: Any, headers: dict[str, str] | None = None) -> Reply:
    data = _encode(body)
    return Reply(status=status, headers=headers or {}, parts=(Part(data, "body"),), declared_bytes=len(data))


def refused_reply(refusal: RequestRefused) -> Reply:
    headers = {} if refusal.retry_after_s is None else {"retry-after": str(refusal.retry_after_s)}
    return json_reply(refusal.status, refusal.body, headers)


def completion(answer: Answer, *, now_s: int) -> dict[str, Any]:
    """The body of a plain answer."""
    return {
        "id": answer.id,
        "object": "chat.completion",
        "created": now_s,
        "model": answer.model,
        "choices": [
            {
                "index": index,
                "message": _message(choice),
                "logprobs": None,
                "finish_reason": choice.finish_reason,
            }
            for index, choice in enumerate(answer.choices)
        ],
        "usage": answer.usage,
        "system_fingerprint": "fp_simulator",
    }


def model_card(model: str) -> dict[str, Any]:
    """What `GET /v1/models/{id}` says: OpenAI's fields, and Mistral's where they tell of an end."""
    if "retired" in model:
        raise chat.model_not_found(model)
    card: dict[str, Any] = {
        "id": model,
        "object": "model",
        "created": chat.CREATED_S,
        "owned_by": "genesis-simulator",
        "type": "base",
        "capabilities": {"completion_chat": True, "function_calling": True},
        "deprecation": None,
    }
    if "deprecated" in model:
        card["deprecation"] = chat.DEPRECATION
        card["deprecation_replacement_model"] = chat.MODELS[0]
    return card


def event(value: Any) -> bytes:
    return b"data: " + _encode(value) + b"\n\n"


def _message(choice: Choice) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
    if choice.tool_name is not None:
        function = {"name": choice.tool_name, "arguments": choice.text}
        message["content"] = None
        message["tool_calls"] = [{"id": choice.call_id, "type": "function", "function": function}]
    return message


def _events(answer: Answer, speed: Pace, *, now_s: int, with_usage: bool) -> Iterator[Part]:
    frame: dict[str, Any] = {
        "id": answer.id,
        "object": "chat.completion.chunk",
        "created": now_s,
        "model": answer.model,
        "system_fingerprint": "fp_simulator",
    }

    def chunk(index: int, delta: dict[str, Any], finish_reason: str | None = None) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        # With `include_usage`, OpenAI puts a null into every chunk but the last.
        return event({**frame, "choices": [choice], **({"usage": None} if with_usage else {})})

    deltas = [list(_deltas(choice)) for choice in answer.choices]
    for index, choice in enumerate(answer.choices):
        empty = None if choice.tool_name is not None else ""
        opening = {"role": "assistant", "content": empty, "refusal": None}
        yield Part(chunk(index, opening), "role", speed.first_ms if index == 0 else 0.0)
    for step in range(max(len(one) for one in deltas)):
        # The choices grow side by side, as on a real server: one wait for all of them.
        wait_ms = speed.token_ms
        for index, one in enumerate(deltas):
            if step < len(one):
                yield Part(chunk(index, one[step]), "token", wait_ms)
                wait_ms = 0.0
    for index, choice in enumerate(answer.choices):
        yield Part(chunk(index, {}, choice.finish_reason), "finish")
    if with_usage:
        yield Part(event({**frame, "choices": [], "usage": answer.usage}), "usage")
    yield Part(DONE, "done")


def _deltas(choice: Choice) -> Iterator[dict[str, Any]]:
    if choice.tool_name is None:
        for piece in choice.pieces:
            yield {"content": piece}
        return
    function = {"name": choice.tool_name, "arguments": ""}
    yield {"tool_calls": [{"index": 0, "id": choice.call_id, "type": "function", "function": function}]}
    for piece in choice.pieces:
        yield {"tool_calls": [{"index": 0, "function": {"arguments": piece}}]}


def _encode(value: Any) -> bytes:
    return msgspec.json.encode(value)
