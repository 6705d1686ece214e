"""What an agent's defaults add to a request, and what the policy's ceilings take from it.

Its one invariant: a field the caller set is never replaced by a default; only a ceiling may lower it, and then the
caller is told.
"""

from collections.abc import Mapping
from typing import NamedTuple

import msgspec
from msgspec import Raw

from gateway.domain.errors import Refused
from gateway.domain.policy import Limits
from gateway.domain.wire import ChatBody, Fields, raw


class Filled(NamedTuple):
    """The fields to send, the output limit in force (tokens per choice), and the names of what was lowered."""

    fields: Fields
    max_tokens: int
    lowered: tuple[str, ...]


# Service at the price in the table, or below it. The others cost up to six times as much, which no hold reckons with.
_TIERS_AT_LIST_PRICE = frozenset({b"null", b'"default"', b'"flex"'})


def fill(body: ChatBody, defaults: Mapping[str, Raw], limits: Limits, *, is_capped: bool = False) -> Filled:
    """Complete a request. `defaults` must hold max_tokens. Raises `Refused` for more choices than the policy allows.

    `is_capped`: some cap counts dollars, so nothing may be asked for that costs more than the price says.
    """
    if body.n > limits.n:
        raise Refused("invalid_value", f"n must be at most {limits.n} here", param="n")
    fields = dict(body.fields)
    lowered: list[str] = []
    limit_field = "max_tokens"
    if body.is_set("max_completion_tokens"):
        # One limit goes out, the one that counts; two could be read differently by two providers.
        limit_field = "max_completion_tokens"
        fields.pop("max_tokens", None)
    else:
        # A null under the newer name would take the place of the limit where a dialect renames it.
        fields.pop("max_completion_tokens", None)
    for name, value in defaults.items():
        if name == "max_tokens":
            if body.max_tokens is None:
                fields[name] = value
        elif not body.is_set(name):
            fields[name] = value
    max_tokens = body.max_tokens
    if max_tokens is None:
        max_tokens = msgspec.json.decode(defaults["max_tokens"], type=int)
    if limits.max_tokens is not None and max_tokens > limits.max_tokens:
        # The caller hears of it only where it was the caller's own figure.
        if body.max_tokens is not None:
            lowered.append(limit_field)
        max_tokens = limits.max_tokens
        fields[limit_field] = raw(max_tokens)
    if limits.temperature is not None and "temperature" in fields:
        temperature = msgspec.json.decode(fields["temperature"], type=float | None)
        if temperature is not None and temperature > limits.temperature:
            fields["temperature"] = raw(limits.temperature)
            if body.temperature is not None:
                lowered.append("temperature")
    if is_capped and bytes(fields.get("service_tier", b"null")) not in _TIERS_AT_LIST_PRICE:
        fields["service_tier"] = raw("default")
        lowered.append("service_tier")
    return Filled(fields, max_tokens, tuple(lowered))


def limited(filled: Filled, max_tokens: int) -> Filled:
    """The same with an output limit of at most `max_tokens`: what the budget can still pay."""
    if max_tokens >= filled.max_tokens:
        return filled
    # `fill` sees to it that one of the two is there, and only one where it is the newer.
    name = "max_completion_tokens" if "max_completion_tokens" in filled.fields else "max_tokens"
    return Filled({**filled.fields, name: raw(max_tokens)}, max_tokens, filled.lowered)
