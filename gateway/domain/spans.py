"""A span of time as people write its ends: `24h`, `7d`, `2026-11-01`, `today`, or a time in ISO 8601. UTC.

Knows no clock: `now_ms` is passed in. Times are unix milliseconds; a span holds its beginning and not its end.
"""

import re
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

DAY_MS = 86_400_000
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MS = timedelta(milliseconds=1)
_AGO = re.compile(r"([0-9]{1,6})\s*([mhdw])")
_UNIT_MS = {"m": 60_000, "h": 3_600_000, "d": DAY_MS, "w": 7 * DAY_MS}
_WANTED = "wants a time such as 24h, 7d, today, 2026-11-01 or 2026-11-01T12:00:00Z"


class Span(NamedTuple):
    """From `since_ms` to before `until_ms`."""

    since_ms: int
    until_ms: int


def read_instant(text: str, now_ms: int) -> int:
    """The instant that is meant; `24h` is so long ago. Raises ValueError that says what is wanted."""
    text = text.strip()
    if found := _AGO.fullmatch(text):
        at_ms = now_ms - int(found[1]) * _UNIT_MS[found[2]]
    elif text == "today":
        at_ms = now_ms - now_ms % DAY_MS
    else:
        try:
            at = datetime.fromisoformat(text)
        except ValueError:
            raise ValueError(f"{text[:40]!r} {_WANTED}") from None
        at_ms = ((at if at.tzinfo else at.replace(tzinfo=UTC)) - _EPOCH) // _MS
    if at_ms < 0:
        raise ValueError(f"{text[:40]!r} is before 1970")
    return at_ms


def read_span(since: str, until: str, now_ms: int) -> Span:
    """The span between two such ends; an `until` of "" is now. Raises ValueError."""
    # The last row is of this very millisecond, and an end is outside of its span.
    span = Span(read_instant(since, now_ms), read_instant(until, now_ms) if until else now_ms + 1)
    if span.since_ms >= span.until_ms:
        raise ValueError(f"the time begins at {format_time(span.since_ms)}, and ends before that")
    return span


def format_time(at_ms: int) -> str:
    """An instant as people read it, to the second: 2026-11-21T06:40:00Z."""
    return (_EPOCH + at_ms * _MS).isoformat(timespec="seconds").replace("+00:00", "Z")


def format_duration(seconds: int) -> str:
    """A time in its two largest units: 45 s, 12 min, 3 h 20 min, 2 d 4 h."""
    if seconds < 60:
        return f"{seconds} s"
    minutes = seconds // 60
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h" if hours else f"{days} d"
