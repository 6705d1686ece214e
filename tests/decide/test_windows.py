"""Windows follow one another without gap or overlap, in every zone, on the days when its clock is put."""

from datetime import UTC, datetime
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.decide.windows import ALWAYS, Per, Window, window_of

ZONES = (
    "UTC", "Europe/Paris", "Asia/Kolkata", "Australia/Lord_Howe", "America/St_Johns", "Asia/Kathmandu",
    # The clock is put at midnight: a day that begins at one, and one whose last or first hour is lived twice.
    "Asia/Beirut", "America/Havana", "America/Santiago", "Africa/Cairo", "Pacific/Chatham", "Africa/Casablanca",
)  # fmt: skip
PERS: tuple[Per, ...] = ("hour", "day", "month")
FROM, UNTIL = int(datetime(2020, 1, 1, tzinfo=UTC).timestamp()), int(datetime(2037, 1, 1, tzinfo=UTC).timestamp())
INSTANTS = st.floats(FROM, UNTIL)


def at(text: str) -> int:
    return int(datetime.fromisoformat(text).timestamp())


@pytest.mark.parametrize(
    ("per", "zone", "now", "start", "end"),
    [
        ("hour", "UTC", "2026-11-21T10:30:00Z", "2026-11-21T10:00:00Z", "2026-11-21T11:00:00Z"),
        ("hour", "UTC", "2026-11-21T10:00:00Z", "2026-11-21T10:00:00Z", "2026-11-21T11:00:00Z"),
        ("day", "UTC", "2026-11-21T23:59:59Z", "2026-11-21T00:00:00Z", "2026-11-22T00:00:00Z"),
        ("month", "UTC", "2026-12-31T23:59:59Z", "2026-12-01T00:00:00Z", "2027-01-01T00:00:00Z"),
        ("month", "UTC", "2028-02-29T12:00:00Z", "2028-02-01T00:00:00Z", "2028-03-01T00:00:00Z"),
        ("month", "UTC", "2026-01-31T12:00:00Z", "2026-01-01T00:00:00Z", "2026-02-01T00:00:00Z"),
        # In Paris the clock goes from 02:00 to 03:00 on 29 March and from 03:00 to 02:00 on 25 October.
        ("day", "Europe/Paris", "2026-03-29T12:00:00Z", "2026-03-29T00:00:00+01:00", "2026-03-30T00:00:00+02:00"),
        ("day", "Europe/Paris", "2026-10-25T12:00:00Z", "2026-10-25T00:00:00+02:00", "2026-10-26T00:00:00+01:00"),
        ("month", "Europe/Paris", "2026-03-29T12:00:00Z", "2026-03-01T00:00:00+01:00", "2026-04-01T00:00:00+02:00"),
        ("hour", "Europe/Paris", "2026-03-29T00:59:59Z", "2026-03-29T01:00:00+01:00", "2026-03-29T03:00:00+02:00"),
        ("hour", "Europe/Paris", "2026-10-25T00:30:00Z", "2026-10-25T02:00:00+02:00", "2026-10-25T02:00:00+01:00"),
        ("hour", "Europe/Paris", "2026-10-25T01:30:00Z", "2026-10-25T02:00:00+01:00", "2026-10-25T03:00:00+01:00"),
        ("hour", "Asia/Kolkata", "2026-11-21T10:15:00Z", "2026-11-21T15:00:00+05:30", "2026-11-21T16:00:00+05:30"),
        ("day", "Asia/Kolkata", "2026-11-21T18:30:00Z", "2026-11-22T00:00:00+05:30", "2026-11-23T00:00:00+05:30"),
        ("hour", "Asia/Kathmandu", "2026-11-21T10:10:00Z", "2026-11-21T15:00:00+05:45", "2026-11-21T16:00:00+05:45"),
        # On Lord Howe it is put by half an hour: 02:00 to 02:30 on 4 October, 02:00 to 01:30 on 5 April.
        ("hour", "Australia/Lord_Howe", "2026-10-03T15:45:00Z",
         "2026-10-04T02:30:00+11:00", "2026-10-04T03:00:00+11:00"),
        ("hour", "Australia/Lord_Howe", "2026-04-04T14:45:00Z",
         "2026-04-05T01:00:00+11:00", "2026-04-05T01:30:00+10:30"),
        ("hour", "Australia/Lord_Howe", "2026-04-04T15:15:00Z",
         "2026-04-05T01:30:00+10:30", "2026-04-05T02:00:00+10:30"),
        ("day", "America/St_Johns", "2026-11-01T12:00:00Z", "2026-11-01T00:00:00-02:30", "2026-11-02T00:00:00-03:30"),
        # No midnight at all, and the last hour of the day before lived twice.
        ("day", "Asia/Beirut", "2026-03-29T12:00:00Z", "2026-03-29T01:00:00+03:00", "2026-03-30T00:00:00+03:00"),
        ("day", "America/Santiago", "2026-04-05T02:30:00Z", "2026-04-04T00:00:00-03:00", "2026-04-05T00:00:00-04:00"),
    ],
)  # fmt: skip
def test_a_window(per: Per, zone: str, now: str, start: str, end: str) -> None:
    assert window_of(per, zone, at(now)) == Window(at(start), at(end))


def test_total_is_for_ever_in_every_zone() -> None:
    assert window_of("total", "Europe/Paris", 1e12) is ALWAYS
    assert ALWAYS == (0, None)


@pytest.mark.parametrize("per", PERS)
@given(zone=st.sampled_from(ZONES), now_s=INSTANTS)
def test_the_window_of_an_instant_holds_it_and_is_that_of_every_other_in_it(per: Per, zone: str, now_s: float) -> None:
    window = window_of(per, zone, now_s)
    assert window.end_s is not None
    assert window.start_s <= now_s < window.end_s
    assert window_of(per, zone, window.start_s) == window
    assert window_of(per, zone, window.end_s - 1e-6) == window


@pytest.mark.parametrize("per", PERS)
@given(zone=st.sampled_from(ZONES), now_s=INSTANTS)
def test_the_end_of_a_window_is_the_start_of_the_next(per: Per, zone: str, now_s: float) -> None:
    window = window_of(per, zone, now_s)
    assert window.end_s is not None
    assert window_of(per, zone, window.end_s).start_s == window.end_s
    assert window_of(per, zone, window.start_s - 1e-6).end_s == window.start_s


@pytest.mark.parametrize("per", PERS)
@given(zone=st.sampled_from(ZONES), one=INSTANTS, other=INSTANTS)
def test_later_instants_have_no_earlier_windows(per: Per, zone: str, one: float, other: float) -> None:
    one, other = sorted((one, other))
    assert window_of(per, zone, one).start_s <= window_of(per, zone, other).start_s


@pytest.mark.parametrize("zone", ZONES)
@pytest.mark.parametrize("per", ["hour", "day"])
def test_the_windows_of_a_year_tile_it(per: Per, zone: str) -> None:
    """Every change of the clock is in it; and no window is longer than its name allows."""
    end_s = at("2027-01-01T00:00:00Z")
    window = window_of(per, zone, at("2026-01-01T00:00:00Z"))
    longest_s = 3_600 if per == "hour" else 25 * 3_600
    while window.start_s < end_s:
        assert window.end_s is not None
        assert 0 < window.end_s - window.start_s <= longest_s
        after = window_of(per, zone, window.end_s)
        assert after.start_s == window.end_s
        window = after


@given(zone=st.sampled_from(ZONES), now_s=INSTANTS)
def test_all_of_a_window_has_the_same_calendar(zone: str, now_s: float) -> None:
    """Whoever reads a calendar in that zone would put both ends into the same hour, day and month."""
    for per, fields in (("hour", 4), ("day", 3), ("month", 2)):
        window = window_of(per, zone, now_s)  # type: ignore[arg-type]
        assert window.end_s is not None
        first, last = (datetime.fromtimestamp(s, ZoneInfo(zone)) for s in (window.start_s, window.end_s - 1))
        assert first.timetuple()[:fields] == last.timetuple()[:fields]
