"""W3C trace context and baggage: read from a caller, written to a provider. Only formats; ids are made at the edge.

The invariant: what is not in order is as if it had not come, and is never sent on.
Sources: W3C Trace Context (level 1, and level 2's random flag), W3C Baggage.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from gateway.domain.call import CallRecord

SAMPLED, RANDOM = 0x01, 0x02
MAX_STATE_CHARS, MAX_STATE_ENTRIES = 512, 32
MAX_BAGGAGE_CHARS, MAX_BAGGAGE_ENTRIES = 8192, 64
# Entries longer than this go first where the state is too long, says the recommendation.
_LONG_ENTRY_CHARS = 128
_LOWER_64 = 2**64 - 1

_PARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_STATE_ENTRY = re.compile(
    r"(?:[a-z][a-z0-9_\-*/]{0,255}|[a-z0-9][a-z0-9_\-*/]{0,240}@[a-z][a-z0-9_\-*/]{0,13})"
    r"=[\x20-\x2b\x2d-\x3c\x3e-\x7e]{0,255}[\x21-\x2b\x2d-\x3c\x3e-\x7e]"
)
# One piece of an entry, between its semicolons and without the blanks around it. No two of its parts may match the same
# character: strangers write what is matched here, and where two may, a header of 100 bytes takes hours.
_TOKEN = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_BAGGAGE_VALUE = r"[ \t]*=[ \t]*[\x21\x23-\x2b\x2d-\x3a\x3c-\x5b\x5d-\x7e]*"
_BAGGAGE_MEMBER = re.compile(rf"{_TOKEN}{_BAGGAGE_VALUE}")
_BAGGAGE_PROPERTY = re.compile(rf"{_TOKEN}(?:{_BAGGAGE_VALUE})?")


class Parent(NamedTuple):
    """The span that a caller is in, as its `traceparent` says."""

    trace_id: str
    span_id: str
    flags: int

    @property
    def is_sampled(self) -> bool:
        """Whether the caller records it."""
        return bool(self.flags & SAMPLED)


class TracedCall(NamedTuple):
    """All that becomes the spans of one sampled call.

    `state` is the caller's tracestate. `asked` has what the request set, by the names of OpenTelemetry's conventions
    without their `gen_ai.request.`. `prompt` and `answer` are scrubbed messages as those conventions write them, and
    empty where the policy does not ask for them.
    """

    record: CallRecord
    state: str = ""
    asked: Mapping[str, Any] = {}
    prompt: str = ""
    answer: str = ""


def read_parent(headers: Sequence[str]) -> Parent | None:
    """The caller's span; None where there is none, or more than one, or one that is malformed."""
    found = _PARENT.fullmatch(headers[0].strip()) if len(headers) == 1 else None
    if found is None:
        return None
    version, trace_id, span_id, flags, more = found.groups()
    # A later version may say more than we know of; the first one may not, and ff is none.
    if version == "ff" or (version == "00" and more is not None):
        return None
    if not trace_id.strip("0") or not span_id.strip("0"):
        return None
    return Parent(trace_id, span_id, int(flags, 16) & (SAMPLED | RANDOM))


def write_parent(trace_id: str, span_id: str, flags: int) -> str:
    """A `traceparent`."""
    return f"00-{trace_id}-{span_id}-{flags:02x}"


def read_state(headers: Sequence[str]) -> str:
    """The caller's tracestate, at most MAX_STATE_CHARS of it; empty where it is malformed."""
    if not headers:
        return ""
    entries = _entries(headers)
    keys = {entry.partition("=")[0] for entry in entries}
    if len(entries) > MAX_STATE_ENTRIES or len(keys) < len(entries):
        return ""
    if not all(map(_STATE_ENTRY.fullmatch, entries)):
        return ""
    if _length(entries) > MAX_STATE_CHARS:
        entries = [entry for entry in entries if len(entry) <= _LONG_ENTRY_CHARS]
    # The newest stand in front.
    while _length(entries) > MAX_STATE_CHARS:
        entries.pop()
    return ",".join(entries)


def read_baggage(headers: Sequence[str]) -> str:
    """The caller's baggage; empty where it is malformed or longer than anybody must take."""
    entries = _entries(headers)
    if len(entries) > MAX_BAGGAGE_ENTRIES or _length(entries) > MAX_BAGGAGE_CHARS:
        return ""
    return ",".join(entries) if all(map(_is_baggage, entries)) else ""


def bound_of(ratio: float) -> int:
    """The bound by which `is_below` chooses a share of `ratio` of all traces."""
    return round(ratio * 2**64)


def is_below(bound: int, trace_id: int) -> bool:
    """Whether this trace is among the share of that bound, as OpenTelemetry's ratio sampler has it.

    So all who sample by the same ratio choose the same traces. (TraceIdRatioBased: the lower 64 bits below the share.)
    """
    return trace_id & _LOWER_64 < bound


def _is_baggage(entry: str) -> bool:
    """Whether it is a member with its properties, if it has any."""
    member, *properties = [piece.strip(" \t") for piece in entry.split(";")]
    return bool(_BAGGAGE_MEMBER.fullmatch(member)) and all(map(_BAGGAGE_PROPERTY.fullmatch, properties))


def _entries(headers: Sequence[str]) -> list[str]:
    """The entries of a list that may be spread over several headers. Empty ones are allowed, and nothing."""
    return [entry for header in headers for piece in header.split(",") if (entry := piece.strip(" \t"))]


def _length(entries: Sequence[str]) -> int:
    return sum(map(len, entries)) + len(entries) - 1
