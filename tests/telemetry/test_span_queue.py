"""Calls that wait to be exported: none is lost unless there is no room, and there is only so much room."""

from hypothesis import given
from hypothesis import strategies as st

from gateway.domain.call import Attempt, CallRecord
from gateway.domain.trace import TracedCall
from gateway.telemetry.span_queue import MAX_TEXT_CHARS, SpanQueue, span_count


def call(number: int, attempts: int = 1, *, text_chars: int = 0) -> TracedCall:
    record = CallRecord(id=str(number), at_ms=1, env="dev")
    record.attempts = [Attempt(ref="a/b", started_ms=0) for _ in range(attempts)]
    return TracedCall(record, prompt="p" * text_chars)


def queue(max_spans: int) -> tuple[SpanQueue, list[int]]:
    dropped: list[int] = []
    return SpanQueue(max_spans, dropped.append), dropped


@given(
    st.integers(1, 40),
    st.lists(st.one_of(st.integers(0, 5).map(lambda n: ("put", n)), st.integers(1, 20).map(lambda n: ("take", n)))),
)
def test_every_call_comes_out_once_in_order_or_is_counted_as_dropped(max_spans: int, steps: list) -> None:
    waiting, dropped = queue(max_spans)
    put, came = [], []
    for number, (step, size) in enumerate(steps):
        if step == "put":
            before = len(dropped)
            waiting.put(call(number, size))
            put.append((number, 1 + size, len(dropped) > before))
        else:
            batch = waiting.take(size)
            assert sum(map(span_count, batch)) <= size or len(batch) == 1
            came += batch
        assert 0 <= waiting.spans <= max_spans
        assert waiting.is_half_full == (waiting.spans * 2 >= max_spans)
    while batch := waiting.take(3):
        came += batch
    assert [int(traced.record.id) for traced in came] == [number for number, _, was_dropped in put if not was_dropped]
    assert dropped == [spans for _, spans, was_dropped in put if was_dropped]
    assert (waiting.spans, waiting.text_chars) == (0, 0)


def test_a_queue_that_nobody_empties_keeps_the_oldest_and_counts_the_rest() -> None:
    waiting, dropped = queue(100)
    for number in range(10_000):
        waiting.put(call(number))
    assert waiting.spans == 100
    assert sum(dropped) == 2 * (10_000 - 50)
    assert [traced.record.id for traced in waiting.take(4)] == ["0", "1"]


def test_texts_that_are_too_much_are_left_out_and_their_spans_are_kept() -> None:
    waiting, dropped = queue(2_048)
    half = MAX_TEXT_CHARS // 2
    for number, size in enumerate((half, half, 1, 0)):
        waiting.put(call(number, text_chars=size))
    assert waiting.text_chars == MAX_TEXT_CHARS
    assert [len(traced.prompt) for traced in waiting.take(2_048)] == [half, half, 0, 0]
    assert dropped == []
    waiting.put(call(9, text_chars=1))
    assert len(waiting.take(1)[0].prompt) == 1
