"""posted + held never passes the limit, in whatever order and at whatever time calls come and go."""

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from gateway.decide.budget import (
    Amounts,
    Books,
    Hold,
    Shortfall,
    bound_tokens,
    caps_that_apply,
    label,
    limit_of,
    unit_of,
    window_end_s,
    window_start_s,
)
from gateway.domain.money import NUSD_PER_USD
from gateway.domain.policy import Cap
from gateway.domain.reading import Usd

NOW_S = datetime(2026, 11, 21, 10, 30, tzinfo=UTC).timestamp()
HOUR_S, DAY_S = 3_600, 86_400


def usd(dollars: float, **fields: Any) -> Cap:
    return Cap(**{"per": "hour", **fields}, usd=Usd(round(dollars * NUSD_PER_USD)))


def call(dollars: float, requests: int = 1, tokens: int = 0) -> Amounts:
    return Amounts(round(dollars * NUSD_PER_USD), requests, tokens)


def reserve(books: Books, amounts: Amounts, *, now_s: float = NOW_S, is_priced: bool = True, **dims: str) -> Any:
    return books.reserve(dims, amounts, is_priced=is_priced, now_s=now_s)


def held(books: Books, amounts: Amounts, *, now_s: float = NOW_S, **dims: str) -> Hold:
    found = reserve(books, amounts, now_s=now_s, **dims)
    assert isinstance(found, Hold), found
    return found


def left(books: Books, *, now_s: float = NOW_S, **dims: str) -> float | None:
    found = books.remaining_nusd(dims, now_s=now_s)
    return None if found is None else found / NUSD_PER_USD


# --- Reserve, settle, void -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dollars", "fits"), [(0, True), (9.99, True), (10, True), (10.000000001, False), (11, False)])
def test_a_reservation_fits_up_to_the_limit_and_not_a_nano_dollar_further(dollars: float, fits: bool) -> None:
    assert isinstance(reserve(Books([usd(10)]), call(dollars)), Hold) is fits


def test_what_is_held_is_not_there_for_others_until_it_is_settled() -> None:
    books = Books([usd(10)])
    hold = held(books, call(7))
    refused = reserve(books, call(4))
    assert isinstance(refused, Shortfall)
    assert refused.is_only_held
    assert left(books) == 3
    books.settle(hold, call(2))
    assert left(books) == 8
    held(books, call(8))


@pytest.mark.parametrize(("dollars", "may_come_back"), [(5, True), (6, True), (6.000000001, False), (20, False)])
def test_only_what_fits_beside_the_posted_is_worth_another_try(dollars: float, may_come_back: bool) -> None:
    books = Books([usd(10)])
    books.settle(held(books, call(4)), call(4))
    held(books, call(6))
    refused = reserve(books, call(dollars))
    assert isinstance(refused, Shortfall)
    assert refused.is_only_held is may_come_back


def test_what_is_posted_is_gone_until_the_window_ends() -> None:
    books = Books([usd(10)])
    books.settle(held(books, call(7)), call(7))
    refused = reserve(books, call(4))
    assert isinstance(refused, Shortfall)
    assert not refused.is_only_held
    assert refused.reset_s == datetime(2026, 11, 21, 11, tzinfo=UTC).timestamp()
    assert refused.cap == "global 10.00 usd per hour"


def test_what_is_void_was_never_taken() -> None:
    books = Books([usd(10), Cap(per="day", requests=1)])
    books.void(held(books, call(10)))
    assert left(books) == 10
    held(books, call(10))


def test_all_accounts_or_none() -> None:
    books = Books([usd(10), Cap(per="hour", tokens=100), Cap(per="day", requests=1)])
    assert isinstance(reserve(books, call(5, tokens=101)), Shortfall)
    assert left(books) == 10
    held(books, call(5, tokens=100))
    refused = reserve(books, call(5, tokens=0))
    assert isinstance(refused, Shortfall)
    assert refused.cap == "global 1 requests per day"
    assert left(books) == 5


def test_a_provider_that_bills_above_the_bound_leaves_nothing_for_the_next() -> None:
    books = Books([usd(10)])
    books.settle(held(books, call(9)), call(12))
    assert left(books) == -2
    assert isinstance(reserve(books, call(0.01)), Shortfall)
    assert isinstance(reserve(books, call(0)), Shortfall)


def test_a_limit_of_nothing_lets_nothing_through() -> None:
    books = Books([usd(0)])
    assert isinstance(reserve(books, call(0.000000001)), Shortfall)


def test_a_call_without_a_price_is_refused_only_where_dollars_are_capped() -> None:
    refused = reserve(Books([usd(10)]), call(0), is_priced=False)
    assert isinstance(refused, Shortfall)
    assert refused.needs_price
    assert isinstance(reserve(Books([Cap(per="hour", requests=5)]), call(0), is_priced=False), Hold)
    assert isinstance(reserve(Books([]), call(0), is_priced=False), Hold)
    narrow = Books([usd(10, only={"agent": ["legal_agent"]})])
    assert isinstance(reserve(narrow, call(0), is_priced=False, agent="qa_agent"), Hold)


@pytest.mark.parametrize(
    ("cap", "takes", "fits_times"),
    [(Cap(per="hour", requests=3), call(99, 1, 99), 3), (Cap(per="hour", tokens=100), call(99, 9, 30), 3),
     (usd(1), call(0.3, 99, 99), 3)],
)  # fmt: skip
def test_each_unit_counts_its_own(cap: Cap, takes: Amounts, fits_times: int) -> None:
    books = Books([cap])
    for _ in range(fits_times):
        books.settle(held(books, takes), takes)
    assert isinstance(reserve(books, takes), Shortfall)


# --- Which caps a call touches ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["agent", "key", "user", "model", "operation"])
def test_a_scope_has_an_account_for_each_of_its_values(scope: str) -> None:
    books = Books([usd(1, scope=scope)])
    held(books, call(1), **{scope: "a"})
    assert isinstance(reserve(books, call(1), **{scope: "a"}), Shortfall)
    held(books, call(1), **{scope: "b"})
    # Those without a value share one, so leaving a header out does not open a cap.
    held(books, call(1))
    assert isinstance(reserve(books, call(1)), Shortfall)


def test_a_global_cap_is_one_account_for_all() -> None:
    books = Books([usd(1)])
    held(books, call(1), agent="a", user="u")
    assert isinstance(reserve(books, call(1), agent="b", user="v"), Shortfall)


def test_only_narrows_a_cap() -> None:
    cap = usd(1, scope="user", only={"agent": ["a", "b"], "operation": ["benchmark"]})
    books = Books([cap])
    held(books, call(1), agent="a", operation="benchmark", user="u")
    assert isinstance(reserve(books, call(1), agent="b", operation="benchmark", user="u"), Shortfall)
    for dims in ({"agent": "a", "operation": "inference"}, {"agent": "c", "operation": "benchmark"}, {"agent": "a"}):
        held(books, call(100), **dims, user="u")
    assert caps_that_apply([cap], {"agent": "a", "operation": "benchmark"}) == [label(cap)]
    assert caps_that_apply([cap], {"agent": "a"}) == []


def test_caps_in_words() -> None:
    assert label(usd(20)) == "global 20.00 usd per hour"
    assert label(Cap(per="total", tokens=5, scope="user")) == "user 5 tokens in total"
    only = {"operation": ["benchmark"], "agent": ["a", "b"]}
    assert label(Cap(per="day", requests=5, only=only)) == "global 5 requests per day (operation benchmark; agent a, b)"  # type: ignore[arg-type]


def test_what_is_left_is_what_the_tightest_cap_leaves() -> None:
    books = Books([usd(10), usd(3, per="day"), usd(1, only={"agent": ["b"]}), Cap(per="hour", requests=1)])
    assert (left(books, agent="a"), left(books, agent="b")) == (3, 1)
    held(books, call(2), agent="a")
    assert left(books, agent="a") == 1
    assert left(Books([Cap(per="hour", requests=1)])) is None


# --- Windows ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("per", "now", "start", "end"),
    [
        ("hour", (2026, 11, 21, 10, 59, 59), (2026, 11, 21, 10), (2026, 11, 21, 11)),
        ("hour", (2026, 11, 21, 23), (2026, 11, 21, 23), (2026, 11, 22)),
        ("day", (2026, 2, 28, 23, 59, 59), (2026, 2, 28), (2026, 3, 1)),
        ("day", (2028, 2, 28, 12), (2028, 2, 28), (2028, 2, 29)),
        ("month", (2026, 2, 14), (2026, 2, 1), (2026, 3, 1)),
        ("month", (2028, 2, 29), (2028, 2, 1), (2028, 3, 1)),
        ("month", (2026, 12, 31, 23, 59, 59), (2026, 12, 1), (2027, 1, 1)),
        ("total", (2026, 11, 21), (1970, 1, 1), None),
    ],
)
def test_windows_are_those_of_the_calendar_in_utc(per: str, now: Any, start: Any, end: Any) -> None:
    def at(parts: Any) -> int:
        filled = [*parts, *(1, 1)[len(parts) - 1 :]] if len(parts) < 3 else parts
        return int(datetime(*filled, tzinfo=UTC).timestamp())

    assert window_start_s(per, at(now)) == at(start)
    assert window_end_s(per, at(start)) == (None if end is None else at(end))


@given(st.sampled_from(["hour", "day", "month"]), st.floats(0, 4e9))
def test_every_moment_lies_in_its_window_and_windows_join(per: str, now_s: float) -> None:
    start_s = window_start_s(per, now_s)
    end_s = window_end_s(per, start_s)
    assert end_s is not None
    assert start_s <= now_s < end_s
    assert window_start_s(per, end_s) == end_s
    assert window_start_s(per, end_s - 1) == start_s


@pytest.mark.parametrize(("per", "later_s"), [("hour", HOUR_S), ("day", DAY_S), ("month", 31 * DAY_S)])
def test_a_new_window_begins_empty_and_the_last_second_of_the_old_one_does_not(per: str, later_s: int) -> None:
    books = Books([usd(1, per=per)])
    books.settle(held(books, call(1)), call(1))
    end_s = window_end_s(per, window_start_s(per, NOW_S))
    assert end_s is not None
    assert isinstance(reserve(books, call(1), now_s=end_s - 0.001), Shortfall)
    held(books, call(1), now_s=end_s)
    held(books, call(1), now_s=end_s + later_s)


def test_a_total_never_resets() -> None:
    books = Books([usd(1, per="total")])
    books.settle(held(books, call(1)), call(1))
    refused = reserve(books, call(1), now_s=NOW_S + 40 * 365 * DAY_S)
    assert isinstance(refused, Shortfall)
    assert refused.reset_s is None
    assert refused.cap == "global 1.00 usd in total"


def test_a_call_that_ends_after_its_window_settles_in_the_window_it_began_in() -> None:
    books = Books([usd(10)])
    hold = held(books, call(8))
    assert left(books, now_s=NOW_S + HOUR_S) == 10
    books.settle(hold, call(8))
    assert left(books, now_s=NOW_S + HOUR_S) == 10


def test_a_clock_that_goes_back_opens_no_window_twice() -> None:
    books = Books([usd(1)])
    books.settle(held(books, call(1), now_s=NOW_S + HOUR_S), call(1))
    assert isinstance(reserve(books, call(1), now_s=NOW_S), Shortfall)
    assert isinstance(reserve(books, call(1), now_s=NOW_S + HOUR_S), Shortfall)
    held(books, call(1), now_s=NOW_S + 2 * HOUR_S)


# --- Reload and restart ----------------------------------------------------------------------------------------------


def test_caps_changed_on_reload_keep_what_was_posted_and_held() -> None:
    books = Books([usd(10)])
    books.settle(held(books, call(4)), call(4))
    hold = held(books, call(2))
    books.change_caps([usd(5)])
    assert left(books) == -1
    assert isinstance(reserve(books, call(0.5)), Shortfall)
    books.change_caps([usd(20)])
    assert left(books) == 14
    books.settle(hold, call(1))
    assert left(books) == 15


def test_a_cap_taken_out_and_put_back_has_forgotten_nothing() -> None:
    books = Books([usd(10)])
    books.settle(held(books, call(4)), call(4))
    books.change_caps([])
    assert isinstance(reserve(books, call(1_000)), Hold)
    books.change_caps([usd(10)])
    assert left(books) == 6


def test_the_order_in_which_a_cap_is_written_does_not_matter() -> None:
    books = Books([usd(10, only={"agent": ["a", "b"], "user": ["u"]})])
    books.settle(held(books, call(4), agent="a", user="u"), call(4))
    books.change_caps([usd(10, only={"user": ["u"], "agent": ["b", "a"]})])
    assert left(books, agent="a", user="u") == 6


def test_a_hold_survives_a_reload_that_drops_its_cap() -> None:
    books = Books([usd(10)])
    hold = held(books, call(4))
    books.change_caps([])
    books.settle(hold, call(3))
    books.change_caps([usd(10)])
    assert left(books) == 7


def test_the_journal_is_read_back_as_far_as_its_windows_still_run() -> None:
    books = Books([usd(10), usd(100, per="day"), usd(1_000, per="total", only={"agent": ["a"]})])
    books.post({"agent": "a"}, call(1), now_s=NOW_S, at_s=NOW_S - 60)
    books.post({"agent": "a"}, call(2), now_s=NOW_S, at_s=NOW_S - 2 * HOUR_S)
    books.post({"agent": "b"}, call(4), now_s=NOW_S, at_s=NOW_S - 40 * DAY_S)
    for limit, posted in ((10, 1), (100, 3)):
        books.change_caps([usd(limit, per="hour" if limit == 10 else "day")])
        assert left(books) == limit - posted
    books.change_caps([usd(1_000, per="total", only={"agent": ["a"]})])
    assert left(books, agent="a") == 997


def test_the_bound_on_tokens() -> None:
    assert bound_tokens(request_bytes=1_000, messages=2, max_tokens=100, n=3) == (1_128, 300)
    assert bound_tokens(request_bytes=0, messages=0, max_tokens=1, n=1) == (0, 1)


# --- Any order at all ------------------------------------------------------------------------------------------------

CAPS = [
    usd(20),
    usd(50, per="day"),
    usd(8, scope="agent"),
    usd(30, per="total", scope="user"),
    usd(5, only={"agent": ["b"]}),
    Cap(per="hour", requests=6, scope="user"),
    Cap(per="day", tokens=500, only={"agent": ["a", "c"]}),
]
AMOUNTS = st.builds(Amounts, st.integers(0, 9 * NUSD_PER_USD), st.just(1), st.integers(0, 200))


class AnyOrder(RuleBasedStateMachine):
    """Reserve, settle, void, reload and wait in any order, beside a ledger that simply lists what happened."""

    def __init__(self) -> None:
        super().__init__()
        self.order = list(range(len(CAPS)))
        self.books = Books(CAPS)
        self.now_s = NOW_S
        self.open: list[tuple[Hold, Amounts, list[tuple[Any, ...]]]] = []
        # The latest window of each account, and what was held and posted in it.
        self.windows: dict[tuple[Any, ...], int] = {}
        self.taken: dict[tuple[Any, ...], int] = {}

    def accounts(self, dims: dict[str, str]) -> Iterator[tuple[Cap, tuple[Any, ...]]]:
        for index in self.order:
            cap = CAPS[index]
            if all(dims.get(name, "") in values for name, values in cap.only.items()):
                name = (index, dims.get(cap.scope, ""))
                start = max(self.windows.get(name, 0), window_start_s(cap.per, self.now_s))
                self.windows[name] = start
                yield cap, (*name, start)

    @staticmethod
    def amount(cap: Cap, amounts: Amounts) -> int:
        return {"usd": amounts.nusd, "requests": amounts.requests, "tokens": amounts.tokens}[unit_of(cap)]

    @rule(amounts=AMOUNTS, agent=st.sampled_from("abc"), user=st.sampled_from(["", "u", "v"]))
    def reserve(self, amounts: Amounts, agent: str, user: str) -> None:
        dims = {"agent": agent, "user": user}
        accounts = []
        fits = True
        for cap, key in self.accounts(dims):
            # The first cap that is short ends it; the windows of those behind it have not been looked at.
            fits = self.taken.get(key, 0) + self.amount(cap, amounts) <= limit_of(cap)
            if not fits:
                break
            accounts.append((cap, key))
        found = self.books.reserve(dims, amounts, is_priced=True, now_s=self.now_s)
        assert isinstance(found, Hold) is fits
        if isinstance(found, Hold):
            for cap, key in accounts:
                self.taken[key] = self.taken.get(key, 0) + self.amount(cap, amounts)
            for account, _, _ in found.entries:
                assert account.posted + account.held <= account.limit
            self.open.append((found, amounts, accounts))

    @rule(data=st.data(), share=st.floats(0, 1))
    def settle(self, data: st.DataObject, share: float) -> None:
        if not self.open:
            return
        hold, amounts, accounts = self.open.pop(data.draw(st.integers(0, len(self.open) - 1)))
        actual = Amounts(int(amounts.nusd * share), 1, int(amounts.tokens * share))
        before = [account.held for account, _, _ in hold.entries]
        self.books.settle(hold, actual)
        for (account, amount, _), was in zip(hold.entries, before, strict=True):
            assert account.held == was - amount
        for cap, key in accounts:
            self.taken[key] += self.amount(cap, actual) - self.amount(cap, amounts)

    @rule(data=st.data())
    def void(self, data: st.DataObject) -> None:
        if self.open:
            hold, amounts, accounts = self.open.pop(data.draw(st.integers(0, len(self.open) - 1)))
            self.books.void(hold)
            for cap, key in accounts:
                self.taken[key] -= self.amount(cap, amounts)

    @rule(seconds=st.sampled_from([1, 1_800, HOUR_S, 7 * HOUR_S, 10 * DAY_S, -60, -2 * HOUR_S]))
    def wait(self, seconds: int) -> None:
        self.now_s += seconds

    @rule(order=st.permutations(range(len(CAPS))))
    def reload(self, order: list[int]) -> None:
        self.order = order
        self.books.change_caps([CAPS[index] for index in order])

    @rule(dims=st.fixed_dictionaries({"agent": st.sampled_from("abc"), "user": st.sampled_from(["", "u"])}))
    def ask_what_is_left(self, dims: dict[str, str]) -> None:
        wanted = [limit_of(cap) - self.taken.get(key, 0) for cap, key in self.accounts(dims) if unit_of(cap) == "usd"]
        assert self.books.remaining_nusd(dims, now_s=self.now_s) == min(wanted)

    @invariant()
    def nothing_is_negative_or_over_its_limit(self) -> None:
        for hold, _, _ in self.open:
            for account, amount, _ in hold.entries:
                assert account.held >= amount >= 0
                assert account.posted >= 0
                assert account.posted + account.held <= account.limit

    def teardown(self) -> None:
        accounts = [account for hold, _, _ in self.open for account, _, _ in hold.entries]
        for hold, _, _ in self.open:
            self.books.void(hold)
        assert all(account.held == 0 for account in accounts)


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=150, stateful_step_count=30)
