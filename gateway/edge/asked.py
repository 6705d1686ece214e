"""What somebody asks of the gateway itself, as JSON: decoded and checked, or refused in OpenAI's shape."""

import re
from typing import TypeVar

import msgspec
from aiohttp import web
from msgspec.inspect import FloatType, IntType, LiteralType, StrType, StructType, UnionType, type_info

from gateway.domain.errors import Refused
from gateway.edge.replies import JSON
from gateway.store.store import StoreError

T = TypeVar("T")

# As msgspec words it. Values that it quotes come after these words, so only the beginning is looked at.
_MISSING = re.compile(r"Object missing required field `(\w+)`")
_UNKNOWN = re.compile(r"Object contains unknown field `([^`]*)`")
_TYPE = re.compile(r"Expected `[^`]*`, got `\w+`")
_PLACE = re.compile(r" - at `\$\.(\w+)[^`]*`$")


def decoded(body: bytes, kind: type[T]) -> T:
    """The body as `kind`. Raises `Refused` with invalid_json, missing_field, invalid_type or invalid_value."""
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise _refusal(str(error), kind) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise Refused("invalid_json", "the body is not one valid JSON object in UTF-8") from None


def _refusal(text: str, kind: type) -> Refused:
    place = _PLACE.search(text)
    message = text.partition(" - at `")[0].replace("`", "")
    message = message[:1].lower() + message[1:]
    if found := _MISSING.match(text):
        return Refused("missing_field", message, param=found[1])
    if found := _UNKNOWN.match(text):
        return Refused("invalid_value", message, param=found[1])
    param = place[1] if place else None
    if _TYPE.match(text):
        return Refused("invalid_type", message, param=param)
    # Of a range msgspec names the end that was passed, and of several values none.
    return Refused("invalid_value", _wanted(kind, param) or message, param=param)


def _wanted(kind: type, name: str | None) -> str:
    """What a field may hold, in words; empty where its type sets no bounds, or others than these."""
    struct = type_info(kind)
    fields = struct.fields if isinstance(struct, StructType) else ()
    wanted = next((field.type for field in fields if field.encode_name == name), None)
    for one in wanted.types if isinstance(wanted, UnionType) else (wanted,):
        match one:
            case LiteralType(values=values):
                return f"{name} is one of {', '.join(map(str, values))}"
            case FloatType(gt=None, lt=None, multiple_of=None) | IntType(gt=None, lt=None, multiple_of=None):
                return _between(f"{name} is", one.ge, one.le)
            case StrType(pattern=None):
                return _between(f"{name} has", one.min_length, one.max_length, " characters")
            case _:
                pass
    return ""


def _between(head: str, least: float | None, most: float | None, tail: str = "") -> str:
    if least is None:
        return "" if most is None else f"{head} at most {most}{tail}"
    return f"{head} at least {least}{tail}" if most is None else f"{head} {least} to {most}{tail}"


def unavailable(error: StoreError) -> Refused:
    """The refusal where the store is out of order: it may be tried again."""
    return Refused("budget_unavailable", str(error), headers={"Retry-After": "1"})


def refuse_web_pages(request: web.Request) -> None:
    """Browsers say where a page is from, and send JSON to another origin only if that allows it, which we never do."""
    if "Origin" in request.headers:
        raise Refused("origin_not_allowed", "nothing is changed for web pages", param="Origin")
    if request.content_type != JSON or "Content-Type" not in request.headers:
        raise Refused("invalid_header", f"send Content-Type: {JSON}", param="Content-Type")
