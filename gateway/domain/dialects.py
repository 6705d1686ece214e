"""What each kind of upstream does with each OpenAI field: a table per kind, read by one small function.

`openai` and `compatible` take nearly every field as it is. Mistral's schema is closed: an unknown field is a 422,
also inside messages, so what is not in its table is dropped and named to the caller. Source of the Mistral rows: the
request and response models of mistralai 3.7, held against this table by tests/domain/test_dialects.py.
Its one invariant: a request is never widened; only fields that the caller or the agent's defaults set are sent.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import msgspec
from msgspec import Raw

from gateway.domain.errors import Refused
from gateway.domain.wire import Fields, raw


class Pass(NamedTuple):
    """Sent as it is."""


class Rename(NamedTuple):
    """Sent under another name, unless that name is set too."""

    to: str


class Clamp(NamedTuple):
    """A number, brought into the range the provider takes."""

    low: float
    high: float


class Only(NamedTuple):
    """Sent where it has one of these values, dropped otherwise."""

    values: frozenset[str]


class Rewrite(NamedTuple):
    """Sent in the provider's own form."""

    into: Callable[[Any], Any]


Op = Pass | Rename | Clamp | Only | Rewrite


class Dialect(NamedTuple):
    """One kind of upstream. Closed: fields not in the table are dropped. `message_keys` of None: messages untouched.

    `continuation`: what marks an answer as begun, in its message and in the request, and whether what comes then may
    begin with that answer.
    """

    fields: Mapping[str, Op]
    is_closed: bool
    message_keys: Mapping[str, frozenset[str]] | None
    asks_for_usage: bool
    continuation: Mapping[str, Any]
    rewrite_answer: Callable[[bytes], bytes] | None
    rewrite_chunk: Callable[[bytes], list[bytes]] | None


def translate(dialect: Dialect, fields: Fields) -> tuple[Fields, list[str]]:
    """The fields as this upstream takes them, and the names of those that had to be dropped."""
    sent: Fields = {}
    dropped: list[str] = []
    for name, value in fields.items():
        # A null says the same as nothing, and a closed schema takes it for some fields only.
        if dialect.is_closed and _is_null(value):
            continue
        match dialect.fields.get(name):
            case None if not dialect.is_closed:
                # What was renamed to this name stays: it is here only where this is null.
                sent.setdefault(name, value)
            case None:
                # stream_options asks for what this provider sends anyway, so nothing is lost with it.
                if name != "stream_options":
                    dropped.append(name)
            case Pass():
                sent[name] = value
            case Rename(to):
                if to not in fields or _is_null(fields[to]):
                    sent[to] = value
            case Clamp(low, high):
                sent[name] = _clamped(value, low, high)
            case Rewrite(into):
                sent[name] = raw(into(_decoded(value)))
            case Only(values):
                chosen = _decoded(value)
                if isinstance(chosen, str) and chosen in values:
                    sent[name] = value
                else:
                    dropped.append(name)
    if dialect.message_keys is not None and "messages" in sent:
        sent["messages"], inside = _messages(dialect.message_keys, sent["messages"])
        dropped += inside
    return sent, dropped


def continued(dialect: Dialect, fields: Fields, text: str) -> Fields:
    """A request whose answer has begun with `text`, for a model that goes on from there."""
    messages: list[Any] = _decoded(fields["messages"])
    marks, asked = dialect.continuation["message"], dialect.continuation["request"]
    begun = {"role": "assistant", "content": text, **marks}
    return {**fields, "messages": raw([*messages, begun]), **{name: raw(value) for name, value in asked.items()}}


def _is_null(value: Raw) -> bool:
    return bytes(value) == b"null"


def _decoded(value: Raw) -> Any:
    try:
        return msgspec.json.decode(value)
    except RecursionError:
        # The stack is deeper here than where the body was read, so what passed there may not pass again.
        raise Refused("invalid_json", "the body is nested too deeply") from None


def _clamped(value: Raw, low: float, high: float) -> Raw:
    number = _decoded(value)
    if not isinstance(number, int | float) or low <= number <= high:
        return value
    return raw(min(max(number, low), high))


def _messages(keys_by_role: Mapping[str, frozenset[str]], value: Raw) -> tuple[Raw, list[str]]:
    messages: list[dict[str, Any]] = _decoded(value)
    dropped: dict[str, None] = {}
    for index, message in enumerate(messages):
        role = message["role"] = "system" if message["role"] == "developer" else message["role"]
        known = keys_by_role.get(role)
        if known is None:
            where = f"messages[{index}].role"
            raise Refused("invalid_value", f"this model knows no role {role!r}", param=where)
        for key in [key for key in message if key not in known]:
            # A null says nothing, so losing it needs no mention (SDKs echo `refusal: null` back).
            if message.pop(key) is not None:
                dropped[f"messages[].{key}"] = None
    return raw(messages), list(dropped)


# --- Mistral ---------------------------------------------------------------------------------------------------------


def _mistral_tools(tools: Any) -> Any:
    """OpenAI lets a function do without parameters and takes nulls in it; Mistral wants the one and not the others."""
    for tool in tools if isinstance(tools, list) else ():
        function = tool.get("function") if isinstance(tool, dict) else None
        if isinstance(function, dict):
            for name in [name for name, value in function.items() if value is None]:
                del function[name]
            function.setdefault("parameters", {"type": "object", "properties": {}})
    return tools


_MISTRAL_FIELDS: Mapping[str, Op] = {
    **dict.fromkeys(
        (
            "model", "messages", "top_p", "max_tokens", "stream", "stop", "random_seed", "metadata", "response_format",
            "tool_choice", "presence_penalty", "frequency_penalty", "min_tokens", "repetition_penalty",
            "top_k", "logprobs", "top_logprobs", "n", "prediction", "parallel_tool_calls", "reasoning_effort",
            "prompt_mode", "guardrails", "prompt_cache_key", "safe_prompt",
        ),
        Pass(),
    ),
    "temperature": Clamp(0.0, 1.5),
    "tools": Rewrite(_mistral_tools),
    "max_completion_tokens": Rename("max_tokens"),
    "seed": Rename("random_seed"),
    "service_tier": Only(frozenset({"auto", "standard_only"})),
}  # fmt: skip

_MISTRAL_MESSAGE_KEYS: Mapping[str, frozenset[str]] = {
    "system": frozenset({"role", "content"}),
    "user": frozenset({"role", "content"}),
    "assistant": frozenset({"role", "content", "tool_calls", "prefix"}),
    "tool": frozenset({"role", "content", "tool_call_id", "name"}),
}

# `error` is not a reason an OpenAI client knows; the gateway turns it into a fault before it gets this far.
_FINISH_REASONS = {"model_length": "length"}


def _mistral_choice(choice: dict[str, Any]) -> None:
    choice["finish_reason"] = _FINISH_REASONS.get(choice.get("finish_reason") or "", choice.get("finish_reason"))
    part = choice.get("delta") or choice.get("message") or {}
    if isinstance(part.get("content"), list):
        texts = (item.get("text") for item in part["content"] if isinstance(item, dict) and item.get("type") == "text")
        part["content"] = "".join(text for text in texts if isinstance(text, str))
    for index, call in enumerate(part.get("tool_calls") or ()):
        function = call.get("function") or {}
        if not isinstance(function.get("arguments"), str | None):
            function["arguments"] = msgspec.json.encode(function["arguments"]).decode()
        call["type"] = call.get("type") or "function"
        if "delta" in choice:
            call.setdefault("index", index)


def _mistral_usage(usage: dict[str, Any]) -> None:
    cached = usage.pop("num_cached_tokens", None)
    if isinstance(cached, int) and not usage.get("prompt_tokens_details"):
        usage["prompt_tokens_details"] = {"cached_tokens": cached}


def _rewrite(body: bytes) -> dict[str, Any] | None:
    try:
        answer = msgspec.json.decode(body)
        for choice in answer.get("choices") or ():
            _mistral_choice(choice)
        if isinstance(answer.get("usage"), dict):
            _mistral_usage(answer["usage"])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, AttributeError, TypeError):
        return None  # Not Mistral's shape: left as it is, for the reader of answers to judge.
    return answer  # type: ignore[no-any-return]


def _mistral_answer(body: bytes) -> bytes:
    answer = _rewrite(body)
    return body if answer is None else msgspec.json.encode(answer)


def _mistral_chunk(data: bytes) -> list[bytes]:
    chunk = _rewrite(data)
    if chunk is None:
        return [data]
    usage = chunk.pop("usage", None)
    if not usage:
        return [msgspec.json.encode(chunk)]
    # OpenAI sends usage in a chunk of its own, after the one that finishes.
    return [msgspec.json.encode(chunk), msgspec.json.encode({**chunk, "choices": [], "usage": usage})]


_UNMARKED: Mapping[str, Any] = {"message": {}, "request": {}, "may_repeat": True}
# vLLM's names; servers that do not know them leave them aside.
_VLLM: Mapping[str, Any] = {
    "message": {},
    "request": {"add_generation_prompt": False, "continue_final_message": True},
    "may_repeat": False,
}
# Its documentation has the answer begin with the prefix; whether a stream does, was not tried.
_PREFIX: Mapping[str, Any] = {"message": {"prefix": True}, "request": {}, "may_repeat": True}

DIALECTS: Mapping[str, Dialect] = {
    # OpenAI's reasoning models refuse the older name, and all its chat models take the newer one.
    "openai": Dialect({"max_tokens": Rename("max_completion_tokens")}, False, None, True, _UNMARKED, None, None),
    "compatible": Dialect({}, False, None, True, _VLLM, None, None),
    "simulator": Dialect({}, False, None, True, _UNMARKED, None, None),
    "mistral": Dialect(_MISTRAL_FIELDS, True, _MISTRAL_MESSAGE_KEYS, False, _PREFIX, _mistral_answer, _mistral_chunk),
}
