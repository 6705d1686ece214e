"""Calendar windows: the hour, day or month that holds an instant, in a declared time zone.

A window is told by its start and its end in unix seconds. In a zone with summer time a day may have 23 or 25 hours,
and the hour that is lived twice is two windows. `total` began at 0 and never ends. The invariant: the windows of a
zone follow one another without a gap and without an overlap.
"""

from datetime import datetime, timedelta
from functools import lru_cache
from typing import Literal, NamedTuple
from zoneinfo import ZoneInfo

Per = Literal["hour", "day", "month", "total"]
# Zones differ from UTC by multiples of this, and change at multiples of it, so a window cannot begin within one.
_QUARTER_S = 900


class Window(NamedTuple):
    """From `start_s` to before `end_s`, unix seconds; `end_s` of None: for ever."""

    start_s: int
    end_s: int | None


ALWAYS = Window(0, None)


def window_of(per: Per, zone: str, now_s: float) -> Window:
    """The window that holds `now_s`. `zone` is an IANA name that exists."""
    return ALWAYS if per == "total" else _window_of(per, zone, int(now_s // _QUARTER_S))


@lru_cache(maxsize=256)
def _window_of(per: Per, zone: str, quarter: int) -> Window:
    """The same by quarters of an hour since 1970: calendar arithmetic is done once in one."""
    now = _local(quarter, zone)
    if per == "hour":
        # The quarters around that are of the same hour; where the clock is put by half an hour, there are two of them.
        first, after = quarter, quarter + 1
        while _is_same_hour(_local(first - 1, zone), now):
            first -= 1
        while _is_same_hour(_local(after, zone), now):
            after += 1
        return Window(first * _QUARTER_S, after * _QUARTER_S)
    start = now.replace(hour=0, minute=0, fold=0)
    if per == "day":
        end = start + timedelta(days=1)
    else:
        start = start.replace(day=1)
        end = start.replace(year=start.year + start.month // 12, month=start.month % 12 + 1)
    return Window(int(start.timestamp()), int(end.timestamp()))


def _local(quarter: int, zone: str) -> datetime:
    return datetime.fromtimestamp(quarter * _QUARTER_S, ZoneInfo(zone))


def _is_same_hour(one: datetime, other: datetime) -> bool:
    return one.hour == other.hour and one.utcoffset() == other.utcoffset()
