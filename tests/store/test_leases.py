"""How large a slice is, and how leases end: spent, given back, or posted as in doubt."""

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.decide.windows import Window
from gateway.domain.ledger import Dimensions
from gateway.store import leases
from gateway.store.leases import slice_of
from gateway.store.schema import open_database
from gateway.store.store import Spot

NOW_MS = 1_800_000_100_000
HOUR = Window(1_800_000_000, 1_800_003_600)


@pytest.mark.parametrize(
    "remaining, needed, wanted, holders, is_wanted, granted",
    [
        (100, 101, 500, 1, False, 0),
        (100, 100, 500, 1, False, 100),
        (100, 1, 0, 1, False, 100),  # Alone: all of it, whatever is wanted.
        (100, 1, 0, 1, True, 100),
        (100, 101, 500, 4, False, 0),
        (1000, 10, 80, 4, False, 80),  # As much as is wanted,
        (1000, 10, 500, 4, False, 120),  # but no more than half an even share, 125, in whole calls.
        (1000, 10, 0, 4, False, 10),  # Never less than the call.
        (1000, 300, 500, 4, False, 300),
        (1000, 10, 500, 4, True, 10),  # Somebody was refused: the call and no more.
        (10, 10, 500, 4, False, 10),
        (9, 10, 500, 4, False, 0),
        (0, 1, 1, 2, False, 0),
        (0, 0, 10, 2, False, 0),
        (-50, 1, 1, 1, False, 0),  # A cap that was lowered below what is posted.
        (-50, 0, 10, 2, False, 0),
    ],
)
def test_a_slice(remaining: int, needed: int, wanted: int, holders: int, is_wanted: bool, granted: int) -> None:
    assert slice_of(remaining, needed, wanted, holders, is_wanted) == granted


AMOUNT = st.integers(0, 2**53)


@given(st.integers(-(2**53), 2**53), AMOUNT, AMOUNT, st.integers(1, 64), st.booleans())
def test_a_slice_pays_for_the_call_or_is_nothing_and_never_exceeds_what_remains(
    remaining: int, needed: int, wanted: int, holders: int, is_wanted: bool
) -> None:
    granted = slice_of(remaining, needed, wanted, holders, is_wanted)
    assert granted == 0 or needed <= granted <= remaining
    assert (granted == 0) == (needed > remaining or remaining == 0)
    if holders > 1 and granted > max(needed, 1):
        assert granted <= wanted
        assert granted <= remaining // (2 * holders)
        assert granted % max(needed, 1) == 0
        assert not is_wanted


@pytest.fixture
def database(tmp_path: Path) -> Iterator[object]:
    database = open_database(tmp_path / "ledger.db")
    yield database
    database.close()


def make(database, account: str, *, unit: str = "usd", window: Window = HOUR, posted: int = 0) -> Spot:
    dims = msgspec.json.encode(Dimensions(agent="qa_agent", operation="")).decode()
    database.execute(
        "INSERT INTO accounts (account, start_s, end_s, rule_id, env, unit, dims, posted, in_doubt) "
        "VALUES (?, ?, ?, 'r', 'dev', ?, ?, ?, 0)",
        (account, *window, unit, dims, posted),
    )
    return Spot(account, window.start_s)


def lease(database, spot: Spot, holder: str, amount: int) -> None:
    database.execute("INSERT INTO leases VALUES (?, ?, ?, ?, 0)", (*spot, holder, amount))


def see(database, holder: str, seen_ms: int) -> None:
    database.execute(
        "INSERT INTO holders (holder, seen_ms) VALUES (?, ?) "
        "ON CONFLICT DO UPDATE SET seen_ms = excluded.seen_ms, is_lost = 0",
        (holder, seen_ms),
    )


def sums(database, spot: Spot) -> tuple[int, int]:
    return database.execute("SELECT posted, in_doubt FROM accounts WHERE account = ? AND start_s = ?", spot).fetchone()


def rows(database) -> list[tuple[object, ...]]:
    return database.execute(
        "SELECT id, at_ms, agent, nusd, requests, tokens, state, source, account, holder FROM ledger ORDER BY id"
    ).fetchall()


def test_a_process_is_lost_at_the_time_to_live_and_not_before(database) -> None:
    spot = make(database, "a")
    for age_ms, holder in ((14_999, "young"), (15_000, "old")):
        see(database, holder, NOW_MS - age_ms)
        lease(database, spot, holder, 10)
    assert leases.count_alive(database, NOW_MS) == 1
    assert leases.post_lost(database, "me", NOW_MS) == {spot}
    assert database.execute("SELECT holder FROM leases").fetchall() == [("young",)]
    assert sums(database, spot) == (10, 10)


def test_nobody_takes_itself_for_dead(database) -> None:
    spot = make(database, "a")
    see(database, "me", NOW_MS - 60_000)
    lease(database, spot, "me", 10)
    assert leases.post_lost(database, "me", NOW_MS) == set()
    assert sums(database, spot) == (0, 0)


def test_a_lost_lease_is_a_row_in_doubt_in_its_own_unit(database) -> None:
    spots = [make(database, unit, unit=unit) for unit in ("usd", "requests", "tokens")]
    see(database, "gone", NOW_MS - 20_000)
    for amount, spot in enumerate(spots, start=5):
        lease(database, spot, "gone", amount)
    leases.post_lost(database, "me", NOW_MS)
    seen_ms = NOW_MS - 20_000
    assert rows(database) == [
        (f"lease:gone:requests:{HOUR.start_s}", seen_ms, "qa_agent", 0, 6, 0, "in_doubt", "lease", "requests", "gone"),
        (f"lease:gone:tokens:{HOUR.start_s}", seen_ms, "qa_agent", 0, 0, 7, "in_doubt", "lease", "tokens", "gone"),
        (f"lease:gone:usd:{HOUR.start_s}", seen_ms, "qa_agent", 5, 0, 0, "in_doubt", "lease", "usd", "gone"),
    ]
    assert leases.post_lost(database, "me", NOW_MS) == set()
    assert leases.lost_in(database, "requests", HOUR) == (6, 6)


@pytest.mark.parametrize(
    "seen_s, at_ms",
    [
        (HOUR.start_s - 5, HOUR.start_s * 1000),
        (HOUR.start_s + 5, (HOUR.start_s + 5) * 1000),
        (HOUR.start_s + 3600, (HOUR.start_s + 3600) * 1000 - 1),
    ],
)
def test_a_lost_lease_counts_in_the_window_it_was_for(database, seen_s: int, at_ms: int) -> None:
    spot = make(database, "a")
    see(database, "gone", seen_s * 1000)
    lease(database, spot, "gone", 3)
    leases.post_lost(database, "me", seen_s * 1000 + 20_000)
    assert [row[1] for row in rows(database)] == [at_ms]
    assert leases.take_back(database, "gone") == {spot}
    assert sums(database, spot) == (0, 0)


def test_what_was_lost_is_taken_back_once_and_for_its_own_holder(database) -> None:
    spot = make(database, "a", window=Window(0, None), posted=100)
    # One name is the beginning of the other, and they share a separator of the rows' ids.
    for holder in ("pod", "pod:a", "pod:a:0"):
        see(database, holder, NOW_MS - 20_000)
        lease(database, spot, holder, 7)
    leases.post_lost(database, "me", NOW_MS)
    assert sums(database, spot) == (121, 21)
    assert leases.take_back(database, "pod") == {spot}
    assert sums(database, spot) == (114, 14)
    leases.take_back(database, "pod")
    assert sums(database, spot) == (114, 14)


def test_one_that_vanishes_twice_leaves_two_rows(database) -> None:
    spot = make(database, "a")
    for amount in (5, 9):
        see(database, "gone", NOW_MS - 20_000)
        lease(database, spot, "gone", amount)
        leases.post_lost(database, "me", NOW_MS)
        assert sums(database, spot) == (amount, amount)
        leases.take_back(database, "gone")
        assert sums(database, spot) == (0, 0)
    assert [(row[0], row[3], row[6]) for row in rows(database)] == [
        (f"lease:gone:a:{HOUR.start_s}", 5, "released"),
        (f"lease:gone:a:{HOUR.start_s}:2", 9, "released"),
    ]


def test_what_an_admin_has_settled_is_not_taken_back(database) -> None:
    spot = make(database, "a")
    see(database, "gone", NOW_MS - 20_000)
    lease(database, spot, "gone", 5)
    leases.post_lost(database, "me", NOW_MS)
    database.execute("UPDATE ledger SET state = 'posted'")
    # The account is named all the same: its holder has to hear that the lease is gone.
    assert leases.take_back(database, "gone") == {spot}
    assert sums(database, spot) == (5, 5)


def test_a_lease_never_shrinks_below_nothing(database) -> None:
    spot = make(database, "a")
    lease(database, spot, "me", 10)
    lease(database, spot, "other", 10)
    leases.shrink_leases(database, "me", [(spot, 4), (spot, -3)])
    leases.shrink_leases(database, "me", [(spot, 400)])
    assert database.execute("SELECT holder, amount FROM leases ORDER BY 1").fetchall() == [("me", 0), ("other", 10)]


def test_calls_in_flight_are_leased_again_exactly(database) -> None:
    spot, other = make(database, "a"), make(database, "b")
    lease(database, spot, "me", 10)
    leases.force_leases(database, "me", [(spot, 4), (other, 0), (Spot("unknown", 0), 9)])
    assert database.execute("SELECT account, amount FROM leases").fetchall() == [("a", 4)]
