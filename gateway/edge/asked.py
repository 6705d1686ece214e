"""What somebody asks of the gateway itself, as JSON: decoded and checked, or refused in OpenAI's shape."""

import re
from typing import Any, Literal, TypeVar

import msgspec
from aiohttp import web

from gateway.domain.errors import Refused
from gateway.edge.replies import JSON

T = TypeVar("T")

_MISSING = re.compile(r"missing required field `(\w+)`")
_UNKNOWN = re.compile(r"unknown field `([^`]*)`")
_PLACE = re.compile(r"`\$\.(\w+)")


def decoded(body: bytes, kind: type[T]) -> T:
    """The body as `kind`. Raises `Refused` with invalid_json, missing_field, invalid_type or invalid_value."""
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        text = str(error)
        code: Literal["missing_field", "invalid_value", "invalid_type"] = "invalid_type"
        place: Any = _PLACE.search(text)
        if found := _MISSING.search(text):
            code, place = "missing_field", found
        elif found := _UNKNOWN.search(text):
            code, place = "invalid_value", found
        message = text.partition(" - at `")[0].replace("`", "")
        raise Refused(code, message[:1].lower() + message[1:], param=place[1] if place else None) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise Refused("invalid_json", "the body is not one valid JSON object in UTF-8") from None


def refuse_web_pages(request: web.Request) -> None:
    """Browsers say where a page is from, and send JSON to another origin only if that allows it, which we never do."""
    if "Origin" in request.headers:
        raise Refused("origin_not_allowed", "nothing is changed for web pages", param="Origin")
    if request.content_type != JSON or "Content-Type" not in request.headers:
        raise Refused("invalid_header", f"send Content-Type: {JSON}", param="Content-Type")
