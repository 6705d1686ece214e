"""Which calls are traced, and what a provider is told of it. Building spans and sending them is otlp's.

The invariants: a caller's own decision to sample holds where the configuration says so; a call that is not sampled
costs a look at its headers; and what came malformed goes nowhere.
"""

from collections.abc import Callable
from random import Random
from typing import TYPE_CHECKING, NamedTuple

from gateway.domain.settings import TraceContext
from gateway.domain.trace import (
    RANDOM,
    SAMPLED,
    TracedCall,
    bound_of,
    is_below,
    read_baggage,
    read_parent,
    read_state,
    write_parent,
)

if TYPE_CHECKING:
    from multidict import CIMultiDictProxy


class Trace(NamedTuple):
    """One call's place in a trace; all empty where it is in none.

    `parent_id` is the caller's span. `span_id` is ours, and empty where the call is not sampled: then a provider hears
    what we heard.
    """

    trace_id: str = ""
    parent_id: str = ""
    span_id: str = ""
    flags: int = 0
    state: str = ""
    baggage: str = ""

    def sent(self, attempt_span_id: str, to: TraceContext) -> dict[str, str]:
        """The headers of one attempt at an upstream that may be told this much."""
        found: dict[str, str] = {}
        if to == "none":
            return found
        if self.trace_id:
            found["traceparent"] = write_parent(self.trace_id, attempt_span_id or self.parent_id, self.flags)
            if self.state:
                found["tracestate"] = self.state
        if self.baggage and to == "all":
            found["baggage"] = self.baggage
        return found


_NONE = Trace()


class Tracing:
    """Decides about each call, and hands on those that were sampled."""

    def __init__(self, dice: Random) -> None:
        self._dice = dice
        self._bound = 0
        self._is_parent_based = True
        # Takes each sampled call at its end; None: nobody exports, and nothing is sampled.
        self.take: Callable[[TracedCall], None] | None = None

    def export_to(self, take: Callable[[TracedCall], None], *, ratio: float, is_parent_based: bool) -> None:
        """Sample from now on: this share of the traces that begin here, and of the others what their callers say."""
        self.take, self._bound, self._is_parent_based = take, bound_of(ratio), is_parent_based

    def begin(self, headers: "CIMultiDictProxy[str]", *, is_trusted: bool) -> Trace:
        """A call's place, by what its caller sent. Whether it is sampled is not for strangers to say."""
        came = headers.getall("traceparent", ())
        bags = headers.getall("baggage", ())
        if not came and not bags and self.take is None:
            return _NONE
        baggage = read_baggage(bags) if bags else ""
        parent = read_parent(came) if came else None
        if parent is None:
            return self._root(baggage)
        state = read_state(headers.getall("tracestate", ()))
        follows = self._is_parent_based and is_trusted
        is_sampled = parent.is_sampled if follows else is_below(self._bound, int(parent.trace_id, 16))
        if self.take is None or not is_sampled:
            return Trace(parent.trace_id, parent.span_id, "", parent.flags, state, baggage)
        flags = SAMPLED | parent.flags & RANDOM
        return Trace(parent.trace_id, parent.span_id, self.new_span_id(), flags, state, baggage)

    def new_span_id(self) -> str:
        """64 random bits in hex. All zeros would be no id."""
        return f"{self._dice.getrandbits(64) or 1:016x}"

    def _root(self, baggage: str) -> Trace:
        if self.take is None:
            return Trace(baggage=baggage)
        trace_id = self._dice.getrandbits(128) or 1
        if is_below(self._bound, trace_id):
            return Trace(f"{trace_id:032x}", "", self.new_span_id(), SAMPLED, "", baggage)
        # Nobody has begun a trace, so none is told of: ids that lead nowhere would cost a microsecond a call.
        return Trace(baggage=baggage) if baggage else _NONE
