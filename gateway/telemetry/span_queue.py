"""Sampled calls that wait to be exported. Knows nothing of OpenTelemetry, and waits for nothing.

The invariants: there is room for so many spans and for so much text, whatever the calls are and however long a
collector is away; and what does not fit is counted.
"""

from collections import deque
from collections.abc import Callable

from gateway.domain.trace import TracedCall

# Beyond this the texts of a call are left out, and its spans are kept.
MAX_TEXT_CHARS = 16 * 2**20


def span_count(traced: TracedCall) -> int:
    """How many spans a call becomes: its own, and one for each attempt."""
    return 1 + len(traced.record.attempts)


class SpanQueue:
    """First in, first out; the newest is dropped where there is no room, as OpenTelemetry's specification has it."""

    def __init__(self, max_spans: int, dropped: Callable[[int], None]) -> None:
        self._max_spans = max_spans
        self._dropped = dropped
        self._calls: deque[TracedCall] = deque()
        self.spans = 0
        self.text_chars = 0

    @property
    def is_half_full(self) -> bool:
        """Whether it is time to make room."""
        return self.spans * 2 >= self._max_spans

    def put(self, traced: TracedCall) -> None:
        """Add a call, or drop it."""
        size = span_count(traced)
        if self.spans + size > self._max_spans:
            self._dropped(size)
            return
        text_chars = len(traced.prompt) + len(traced.answer)
        if self.text_chars + text_chars > MAX_TEXT_CHARS:
            traced, text_chars = traced._replace(prompt="", answer=""), 0
        self._calls.append(traced)
        self.spans += size
        self.text_chars += text_chars

    def take(self, max_spans: int) -> list[TracedCall]:
        """The oldest calls, with no more spans than that in all; one call at least, where there is any."""
        found: list[TracedCall] = []
        spans = 0
        while self._calls:
            size = span_count(self._calls[0])
            if found and spans + size > max_spans:
                break
            traced = self._calls.popleft()
            found.append(traced)
            spans += size
            self.text_chars -= len(traced.prompt) + len(traced.answer)
        self.spans -= spans
        return found
