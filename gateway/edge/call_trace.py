"""One call's trace while the call is open: its place, and what its spans are to show beside its record.

The invariant: a call that is not sampled keeps nothing here, and texts are kept only where the policy asks for them.
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from msgspec import Raw

from gateway.domain.call import CallRecord
from gateway.domain.content import asked, input_messages, output_messages, read_choices
from gateway.domain.settings import TraceContext
from gateway.domain.splice import read_delivered
from gateway.domain.trace import TracedCall
from gateway.telemetry.tracing import Trace, Tracing

if TYPE_CHECKING:
    from multidict import CIMultiDictProxy

# More of an answer is not shown, however long the texts of a span may be.
MAX_ANSWER_BYTES = 2**20
_NO_MESSAGES = Raw(b"[]")


class CallTrace:
    """What is told of one call, to its providers and to whoever exports traces."""

    __slots__ = ("_answer", "_answer_bytes", "_fields", "_max_chars", "_place", "_tracing")

    def __init__(self, tracing: Tracing) -> None:
        self._tracing = tracing
        self._place = Trace()
        self._fields: Mapping[str, Raw] = {}
        self._max_chars = 0
        # The pieces of an answer that is to be shown; None: it is not.
        self._answer: list[bytes] | None = None
        self._answer_bytes = 0

    def begin(self, headers: "CIMultiDictProxy[str]", record: CallRecord, *, is_trusted: bool) -> None:
        """Find the call's place, and note it in its record."""
        place = self._tracing.begin(headers, is_trusted=is_trusted)
        self._place = place
        if place.trace_id:
            record.trace_id, record.span_id = place.trace_id, place.span_id
            record.parent_span_id = place.parent_id if place.span_id else ""

    def asks(self, fields: Mapping[str, Raw], *, max_chars: int) -> None:
        """Note what is asked of the models. `max_chars`: of each text that is shown; 0: none is."""
        if self._place.span_id:
            self._fields = fields
            self._max_chars = max_chars
            self._answer = [] if max_chars else None

    def span_id(self) -> str:
        """An id for the span of an attempt; empty where there will be none."""
        return self._tracing.new_span_id() if self._place.span_id else ""

    def sent(self, attempt_span_id: str, to: TraceContext) -> dict[str, str]:
        """The headers by which an upstream is told of it."""
        return self._place.sent(attempt_span_id, to)

    def answers(self, pieces: Iterable[bytes]) -> None:
        """Note what went out: a plain answer's body, or events of a stream."""
        if self._answer is not None and self._answer_bytes <= MAX_ANSWER_BYTES:
            for piece in pieces:
                self._answer.append(piece)
                self._answer_bytes += len(piece)

    def end(self, record: CallRecord) -> None:
        """The call is over: hand it to whoever exports it, where it was sampled."""
        take = self._tracing.take
        if not record.span_id or take is None:
            return
        prompt = answer = ""
        if self._answer is not None:
            messages = self._fields.get("messages", _NO_MESSAGES)
            prompt = input_messages(messages, max_chars=self._max_chars)
            answer = output_messages(self._choices(record), max_chars=self._max_chars)
        take(TracedCall(record, self._place.state, asked(self._fields), prompt, answer))

    def _choices(self, record: CallRecord) -> object:
        if not record.stream:
            return read_choices(b"".join(self._answer or ()))
        delivered = read_delivered(self._answer or ())
        text = delivered.text if delivered is not None else ""
        message = {"role": "assistant", "content": text}
        return [{"message": message, "finish_reason": record.finish_reason}] if text else []
