"""What a provider says when it refuses, in whichever of its shapes, as one small value.

OpenAI nests an object under `error`; Mistral is flat with `object: error`, a message that may be a list or hold
`detail`, and a numeric code; FastAPI servers send `detail`; proxies send HTML. The text is cut and never trusted to be
more than text.
"""

from typing import Any, NamedTuple

import msgspec

MAX_MESSAGE_CHARS = 1_000


class ProviderError(NamedTuple):
    """Message, type, code and param as the provider gave them; empty or None where it gave none."""

    message: str
    type: str | None = None
    code: str | None = None
    param: str | None = None


def read_error(status: int, body: bytes) -> ProviderError:
    """The provider's own words about an answer with `status`."""
    try:
        found = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return ProviderError(f"the provider answered {status} without an explanation")
    error = (found.get("error") or found) if isinstance(found, dict) else found
    try:
        text = _plain((error.get("message") or error.get("detail")) if isinstance(error, dict) else error)
    except RecursionError:
        text = ""
    if not isinstance(error, dict):
        error = {}
    return ProviderError(
        _cut(text) or f"the provider answered {status} without an explanation",
        _optional(error.get("type")),
        _optional(error.get("code")),
        _optional(error.get("param")),
    )


def _plain(value: Any) -> str:
    """Text out of a string, a list of problems, or `{detail: [...]}`."""
    match value:
        case str():
            return value
        case {"detail": detail}:
            return _plain(detail)
        case {"msg": str(text), "loc": list(place)}:
            return f"{'.'.join(map(str, place))}: {text}"
        case {"message": str(text)} | {"msg": str(text)}:
            return text
        case list():
            return "; ".join(filter(None, map(_plain, value)))
        case _:
            return ""


def _cut(text: str) -> str:
    clean = "".join(char if char.isprintable() else " " for char in text[: MAX_MESSAGE_CHARS + 1])
    return clean if len(clean) <= MAX_MESSAGE_CHARS else clean[:MAX_MESSAGE_CHARS] + "..."


def _optional(value: Any) -> str | None:
    # Mistral's code is often an int, as text it fits OpenAI's `code: string | null`.
    return str(value)[:100] if isinstance(value, str | int) and not isinstance(value, bool) else None
