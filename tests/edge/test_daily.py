"""The daily reports: once a day, by one process of those that share a folder, and by nobody's hand."""

import fcntl
import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from gateway.domain.policy import REPORT_FILES, Reports
from gateway.edge.daily import LOCK, Daily, due_before
from tests.ledgers import DAY_MS, NOON_MS, House, row

POLICY = "[ab_testing]\nenabled = true\n"
HOUR_S = 3_600
MIDNIGHT_S = (NOON_MS - NOON_MS % DAY_MS) // 1000


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> House:
    made = House(tmp_path, monkeypatch, policy=POLICY)
    made.serve(row("a"))
    # The commands run in this folder, and find the package where the tests do.
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    return made


class Clock:
    """Stands where it is put."""

    def __init__(self, hour: float) -> None:
        self.hour = hour

    def __call__(self) -> float:
        return MIDNIGHT_S + self.hour * HOUR_S


def daily(clock: Callable[[], float], *, env: str = "production", daily_at: str = "06:00") -> Daily:
    return Daily(Reports(daily_at=daily_at), ["--env", env], niceness=0, clock=clock)


def written(house: House) -> dict[str, int]:
    """Each report there is, by the time it was written."""
    found = (house.path / "reports" / name for name in REPORT_FILES.values())
    return {path.name: path.stat().st_mtime_ns for path in found if path.exists()}


@pytest.mark.parametrize(
    ("daily_at", "hour", "due_hour"),
    [
        ("", 12, None),
        ("06:00", 6, 6),
        ("06:00", 5.99, -18),
        ("06:30", 23, 6.5),
        ("00:00", 0, 0),
        ("23:59", 0, 23.983333 - 24),
    ],
)
def test_what_is_due_is_the_last_time_of_day_that_has_come(daily_at: str, hour: float, due_hour: float | None) -> None:
    found = due_before(daily_at, round((MIDNIGHT_S + hour * HOUR_S) * 1000))
    if due_hour is None:
        assert found is None
    else:
        assert found == pytest.approx((MIDNIGHT_S + due_hour * HOUR_S) * 1000, abs=5_000)


async def test_at_its_hour_both_reports_are_written_and_not_again_that_day(house: House) -> None:
    clock = Clock(5)
    writer, neighbour = daily(clock, daily_at=""), daily(clock)
    clock.hour = 5.99
    await neighbour.step()
    clock.hour = 6.01
    await writer.step()
    assert written(house) == {}  # It was told never to.
    writer.take_policy(Reports(daily_at="06:00"))
    await writer.step()
    first = written(house)
    assert sorted(first) == ["ab_testing_results.md", "cost_dashboard.md"]
    clock.hour = 20
    # Nor by a neighbour, or by one that is started anew.
    for one in (writer, neighbour, daily(clock)):
        await one.step()
    assert written(house) == first


async def test_what_was_missed_is_caught_up_with_once_nobody_else_writes(house: House) -> None:
    clock = Clock(12)
    await daily(clock).step()
    assert written(house) == {}  # Nobody has ever written here, so nothing was missed.
    lock = house.path / "reports" / LOCK
    lock.write_text(f"{(MIDNIGHT_S - 18 * HOUR_S) * 1000:020}")
    writer = daily(clock)
    other = os.open(lock, os.O_RDWR)
    fcntl.flock(other, fcntl.LOCK_EX)
    await writer.step()
    assert written(house) == {}
    # It ended without having written: then it is for us.
    os.close(other)
    await writer.step()
    assert len(written(house)) == 2
    assert int(lock.read_text()) == (MIDNIGHT_S + 6 * HOUR_S) * 1000


@pytest.mark.parametrize("is_started_anew", [False, True])
@pytest.mark.parametrize("has_written", [False, True])
async def test_a_clock_that_was_ahead_for_a_moment_keeps_no_report_back(
    house: House, is_started_anew: bool, has_written: bool
) -> None:
    clock = Clock(5 + 30 * 24)
    writer = daily(clock)
    if has_written:
        clock.hour = 7 + 30 * 24
        await writer.step()
        assert len(written(house)) == 2
    clock.hour = 5
    writer = daily(clock) if is_started_anew else writer
    await writer.step()
    before = written(house)
    clock.hour = 7
    await writer.step()
    after = written(house)
    assert len(after) == 2
    assert all(before.get(name) != at_ns for name, at_ns in after.items())
    assert int((house.path / "reports" / LOCK).read_text()) == (MIDNIGHT_S + 6 * HOUR_S) * 1000
    # And once, also for those who are started later.
    await daily(clock).step()
    assert written(house) == after


async def test_a_report_that_fails_is_logged_once_a_day_and_another_process_may_try(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock(5)
    writer, neighbour = daily(clock, env="nowhere"), daily(clock)
    clock.hour = 7
    with caplog.at_level(logging.INFO, logger="gateway.reports"):
        await writer.step()
        await writer.step()
        said = [record.getMessage() for record in caplog.records]
        assert len(said) == 2
        assert said[0].startswith("the daily report reports/ab_testing_results.md could not be written: ")
        assert "unknown environment" in said[0]
        await neighbour.step()
        assert caplog.records[-1].getMessage() == "the daily reports are written to reports"
    assert len(written(house)) == 2


async def test_a_folder_that_cannot_be_had_is_logged_and_ends_nothing(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock(5)
    writer = daily(clock)
    clock.hour = 7
    (house.path / "reports").write_text("a file in its way")
    await writer.step()
    assert [record.getMessage() for record in caplog.records] == [
        "the daily reports cannot be written to reports: File exists"
    ]


async def test_it_begins_and_ends_with_the_gateway(house: House) -> None:
    writer = daily(Clock(12))
    await writer.stop()
    writer.start()
    await writer.stop()
    assert writer._task is not None
    assert writer._task.cancelled()
