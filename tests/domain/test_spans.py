"""Times as people write them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.domain.spans import Span, format_duration, format_time, read_instant, read_span

NOW_MS = 1_795_262_400_123  # 2026-11-21T12:00:00.123Z
HOUR_MS = 3_600_000


@pytest.mark.parametrize(
    ("text", "at_ms"),
    [
        ("90m", NOW_MS - 90 * 60_000),
        ("24h", NOW_MS - 24 * HOUR_MS),
        ("7d", NOW_MS - 168 * HOUR_MS),
        ("2 w", NOW_MS - 336 * HOUR_MS),
        ("today", 1_795_219_200_000),
        (" 2026-11-21 ", 1_795_219_200_000),
        ("2026-11-21T12:00:00Z", 1_795_262_400_000),
        ("2026-11-21T13:00:00+01:00", 1_795_262_400_000),
        ("2026-11-21 12:00", 1_795_262_400_000),
        ("1970-01-01", 0),
    ],
)
def test_an_instant_is_told_in_many_ways(text: str, at_ms: int) -> None:
    assert read_instant(text, NOW_MS) == at_ms


@pytest.mark.parametrize("text", ["", "yesterday", "24", "h", "-3h", "1.5h", "24H", "2026-13-01", "2026-11-31", "٣h"])
def test_what_is_no_time_is_said_with_what_is_wanted(text: str) -> None:
    with pytest.raises(ValueError, match="wants a time such as 24h, 7d, today, 2026-11-01"):
        read_instant(text, NOW_MS)


@pytest.mark.parametrize("text", ["999999w", "1969-12-31", "0001-01-01"])
def test_nothing_is_before_1970(text: str) -> None:
    with pytest.raises(ValueError, match="is before 1970"):
        read_instant(text, NOW_MS)


def test_a_span_to_now_holds_what_is_booked_this_very_millisecond() -> None:
    assert read_span("1h", "", NOW_MS) == Span(NOW_MS - HOUR_MS, NOW_MS + 1)


@pytest.mark.parametrize(("since", "until"), [("1h", "2h"), ("1h", "1h"), ("2027-01-01", "")])
def test_a_span_that_ends_before_it_begins_is_refused(since: str, until: str) -> None:
    with pytest.raises(ValueError, match="ends before that"):
        read_span(since, until, NOW_MS)


@given(st.integers(0, 2**42))
def test_a_time_is_read_back_as_it_was_written_to_the_second(at_ms: int) -> None:
    assert read_instant(format_time(at_ms), 0) == at_ms - at_ms % 1000


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"), (59, "59 s"), (60, "1 min"), (3_599, "59 min"), (3_600, "1 h"), (12_000, "3 h 20 min"),
        (86_399, "23 h 59 min"), (86_400, "1 d"), (187_200, "2 d 4 h"),
    ],
)  # fmt: skip
def test_a_duration_is_told_in_its_two_largest_units(seconds: int, text: str) -> None:
    assert format_duration(seconds) == text
