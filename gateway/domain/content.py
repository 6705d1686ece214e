"""A call's texts as OpenTelemetry's conventions write messages: roles and parts, scrubbed, each of bounded length.

Only texts and the names and arguments of tool calls; pictures and sound are told of, not shown. Format:
`gen_ai.input.messages` and `gen_ai.output.messages` of the semantic conventions for generative AI.
"""

from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec import Raw

from gateway.domain.scrub import scrub

# What a mask would cover must not be cut in two before it is covered.
_MARGIN_CHARS = 256
MAX_MESSAGES = 100
# What a request sets, by the names of the conventions; those that are not here are not told.
_ASKED = {
    "max_tokens": "max_tokens",
    "max_completion_tokens": "max_tokens",
    "temperature": "temperature",
    "top_p": "top_p",
    "seed": "seed",
    "frequency_penalty": "frequency_penalty",
    "presence_penalty": "presence_penalty",
    "n": "choice.count",
}
_number = msgspec.json.Decoder(int | float | None)
# A span has room for 64 bits, and one number that does not fit would cost its whole batch.
_MOST = 2**63 - 1


def asked(fields: Mapping[str, Raw]) -> dict[str, int | float]:
    """The numbers that a request sets. Never raises: what is no number is its provider's to refuse, and is not told."""
    found = {}
    for field, name in _ASKED.items():
        value = _read_number(fields[field]) if field in fields else None
        if value is not None:
            found[name] = value
    return found


def input_messages(messages: Raw, *, max_chars: int) -> str:
    """The prompt. The last MAX_MESSAGES of it, as they say most of what was asked."""
    found = _decoded(messages)
    shown = [_message(message, max_chars) for message in found[-MAX_MESSAGES:] if isinstance(message, dict)]
    return msgspec.json.encode(shown).decode()


def output_messages(choices: Any, *, max_chars: int) -> str:
    """The answer, of the choices of a plain one."""
    shown = []
    for choice in choices if isinstance(choices, list) else []:
        if isinstance(choice, dict) and isinstance(choice.get("message"), dict):
            reason = str(choice.get("finish_reason") or "")
            shown.append(_message(choice["message"], max_chars) | {"finish_reason": reason})
    return msgspec.json.encode(shown).decode()


def read_choices(body: bytes) -> Any:
    """The choices of a plain answer; None where it is none."""
    try:
        answer = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return answer.get("choices") if isinstance(answer, dict) else None


def _read_number(value: Raw) -> int | float | None:
    try:
        number = _number.decode(value)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return None if isinstance(number, int) and not -_MOST <= number <= _MOST else number


def _decoded(messages: Raw) -> list[Any]:
    try:
        found = msgspec.json.decode(messages)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return []
    return found if isinstance(found, list) else []


def _message(message: Mapping[str, Any], max_chars: int) -> dict[str, Any]:
    role, content = str(message.get("role", "assistant")), message.get("content")
    if role == "tool":
        response = _shown(content if isinstance(content, str) else "", max_chars)
        return {"role": role, "parts": [{"type": "tool_call_response", "response": response}]}
    parts = [{"type": "text", "content": _shown(content, max_chars)}] if isinstance(content, str) and content else []
    for part in content if isinstance(content, list) else []:
        kind = str(part.get("type", "")) if isinstance(part, dict) else ""
        if kind == "text":
            parts.append({"type": kind, "content": _shown(str(part.get("text", "")), max_chars)})
        else:
            parts.append({"type": _shown(kind, max_chars)})
    calls = message.get("tool_calls")
    for call in calls if isinstance(calls, list) else []:
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict):
            name, arguments = str(function.get("name", "")), str(function.get("arguments", ""))
            parts.append({"type": "tool_call", "name": name, "arguments": _shown(arguments, max_chars)})
    return {"role": role, "parts": parts}


def _shown(text: str, max_chars: int) -> str:
    scrubbed = scrub(text[: max_chars + _MARGIN_CHARS])
    return scrubbed if len(scrubbed) <= max_chars else f"{scrubbed[:max_chars]}…"
