"""held + spent never passes what is granted, in whatever order, at whatever time and under whatever rules."""

from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.decide.budget import IDLE_S, KEEP_S, SWEEP, Account, Balance, Books, Hold, Shortfall
from gateway.decide.caps import Rule, rules_of
from gateway.domain.ledger import Amounts, Dimensions
from gateway.domain.policy import Cap
from gateway.domain.reading import Usd

NOW_S = datetime(2026, 11, 21, 10, 30, tzinfo=UTC).timestamp()
HOUR_S, DAY_S = 3_600, 86_400
ON = Dimensions(agent="qa_agent", user="u1", model="m1")
HOURLY = Cap(per="hour", usd=Usd(1_000))
REQUESTS = Cap(per="day", requests=3)
TOKENS = Cap(per="total", tokens=500)
PER_USER = Cap(scope="user", per="hour", usd=Usd(100))
PER_AGENT = Cap(scope="agent", per="hour", usd=Usd(200))


def rules(*caps: Cap) -> tuple[Rule, ...]:
    return rules_of(caps, "test")


def changed(cap: Cap, **fields: Any) -> Cap:
    return Cap(**{name: getattr(cap, name) for name in cap.__struct_fields__} | fields)


def hear(books: Books, account: Account, granted: int | None = None, posted: int = 0, **more: Any) -> None:
    """The store has granted so much in all, or all there is."""
    given = account.rule.limit - posted if granted is None else granted
    books.heard(account, Balance(given, posted, more.pop("in_doubt", 0), more.pop("elsewhere", 0), **more), seen_s=0.0)


def granted(*caps: Cap, now_s: float = NOW_S, on: Dimensions = ON) -> Books:
    """Books with a lease of all that the caps allow."""
    books = Books(rules(*caps))
    touch(books, on, now_s)
    return books


def touch(books: Books, on: Dimensions, now_s: float = NOW_S) -> None:
    """Grant every account that such a call touches all that is left of it."""
    while isinstance(found := books.reserve(on, Amounts(1, 1, 1), is_priced=True, now_s=now_s), Shortfall):
        hear(books, found.account)
    books.void(found)


def held(
    books: Books, nusd: int = 0, requests: int = 1, tokens: int = 0, *, now_s: float = NOW_S, on: Any = ON
) -> Hold:
    found = books.reserve(on, Amounts(nusd, requests, tokens), is_priced=True, now_s=now_s)
    assert isinstance(found, Hold), found
    return found


def short(
    books: Books, nusd: int = 0, requests: int = 1, tokens: int = 0, *, now_s: float = NOW_S, on: Any = ON
) -> Shortfall:
    found = books.reserve(on, Amounts(nusd, requests, tokens), is_priced=True, now_s=now_s)
    assert isinstance(found, Shortfall), found
    return found


def only(books: Books) -> Account:
    (account,) = books.accounts()
    return account


# --- Reserve, settle, void, doubt ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("nusd", "fits"), [(0, True), (999, True), (1_000, True), (1_001, False), (2**53, False)])
def test_a_reservation_fits_up_to_the_lease_and_not_a_unit_further(nusd: int, fits: bool) -> None:
    books = granted(HOURLY)
    assert isinstance(books.reserve(ON, Amounts(nusd, 1, 0), is_priced=True, now_s=NOW_S), Hold) is fits


@pytest.mark.parametrize(
    ("cap", "bound", "times"),
    [(HOURLY, Amounts(300, 99, 99), 3), (REQUESTS, Amounts(10**9, 1, 10**9), 3), (TOKENS, Amounts(10**9, 9, 200), 2)],
)
def test_each_unit_counts_its_own(cap: Cap, bound: Amounts, times: int) -> None:
    books = granted(cap)
    for _ in range(times):
        assert isinstance(books.reserve(ON, bound, is_priced=True, now_s=NOW_S), Hold)
    assert isinstance(books.reserve(ON, bound, is_priced=True, now_s=NOW_S), Shortfall)


def test_without_a_lease_nothing_is_held_and_it_is_said_what_is_missing() -> None:
    books = Books(rules(HOURLY))
    refused = short(books, 10)
    assert (refused.amount, refused.missing, refused.account.name) == (10, 10, "test: global usd hour")
    assert refused.is_only_held
    hear(books, refused.account, 4)
    assert short(books, 10).missing == 6
    hear(books, refused.account, 10)
    held(books, 10)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_all_accounts_or_none(which: int) -> None:
    caps = (HOURLY, REQUESTS, TOKENS)
    books = granted(*caps)
    hear(books, list(books.accounts())[which], 0)
    assert short(books, 10, 1, 10).account.rule.id == rules(*caps)[which].id
    assert [account.held for account in books.accounts()] == [0, 0, 0]
    assert books.outstanding() == {}


@pytest.mark.parametrize(("actual", "left"), [(0, 1_000), (399, 601), (400, 600), (401, 599), (1_400, -400)])
def test_settling_is_exact_below_at_and_above_the_hold(actual: int, left: int) -> None:
    books = granted(HOURLY)
    hold = held(books, 400)
    assert only(books).available == 600
    books.settle(hold, Amounts(actual, 1, 0))
    assert only(books).available == left
    assert only(books).remaining == max(0, left)


def test_what_is_void_was_never_taken_and_what_is_in_doubt_is() -> None:
    books = granted(HOURLY, REQUESTS)
    books.void(held(books, 1_000))
    books.doubt(held(books, 999))
    assert [(account.held, account.spent) for account in books.accounts()] == [(0, 999), (0, 1)]
    assert short(books, 2).missing == 1


@pytest.mark.parametrize(
    ("posted", "actual", "over"),
    [(0, 1_000, 0), (0, 1_001, 1), (300, 800, 100), (900, 101, 1), (0, 100, 0), (0, 5_000, 4_000)],
)
def test_the_overshoot_is_what_stands_above_the_limit(posted: int, actual: int, over: int) -> None:
    books = granted(HOURLY)
    hear(books, only(books), 1_000 - posted, posted)
    hold = held(books, 100)
    assert books.settle(hold, Amounts(actual, 1, 0)) == over
    assert books.is_revoked(Hold(((only(books), 0),), 0)) is (over > 0)


def test_an_overshoot_is_no_more_than_what_was_taken_above_the_hold() -> None:
    """Where a cap was lowered meanwhile, most of what stands above it is nobody's fault."""
    books = granted(HOURLY)
    hold = held(books, 500)
    books.change_rules(rules(changed(HOURLY, usd=Usd(10))))
    assert books.settle(hold, Amounts(503, 1, 0)) == 3


def test_tokens_and_requests_above_their_holds_are_no_dollars() -> None:
    books = granted(TOKENS, REQUESTS)
    assert books.settle(held(books, 0, 1, 10), Amounts(0, 7, 10_000)) == 0


def test_after_an_overshoot_not_even_a_free_call_passes() -> None:
    books = granted(HOURLY)
    books.settle(held(books, 900), Amounts(1_200, 1, 0))
    assert short(books, 0).missing == 200
    assert not short(books, 1).is_only_held


@pytest.mark.parametrize(("nusd", "may_come_back"), [(500, True), (600, True), (601, False), (2_000, False)])
def test_only_what_fits_beside_the_posted_is_worth_another_try(nusd: int, may_come_back: bool) -> None:
    books = granted(HOURLY)
    hear(books, only(books), 700, 300)
    books.settle(held(books, 100), Amounts(100, 1, 0))
    held(books, 600)
    assert short(books, nusd).is_only_held is may_come_back


def test_a_call_without_a_price_is_refused_only_where_dollars_are_capped() -> None:
    def reserve(cap: Cap) -> Hold | Shortfall:
        return granted(cap).reserve(ON, Amounts(0, 1, 0), is_priced=False, now_s=NOW_S)

    refused = reserve(HOURLY)
    assert isinstance(refused, Shortfall)
    assert refused.needs_price
    assert isinstance(reserve(REQUESTS), Hold)
    assert isinstance(reserve(changed(HOURLY, only={"agent": ["legal_agent"]})), Hold)
    assert isinstance(Books(()).reserve(ON, Amounts(), is_priced=False, now_s=NOW_S), Hold)


def test_a_limit_of_2_to_the_53_is_counted_to_the_last_unit() -> None:
    books = granted(Cap(per="total", usd=Usd(2**53 - 1)))
    books.settle(held(books, 2**53 - 2), Amounts(2**53 - 2, 1, 0))
    held(books, 1)
    assert short(books, 1).missing == 1


# --- Which accounts --------------------------------------------------------------------------------------------------


def test_each_value_of_a_scope_has_an_account_of_its_own_and_no_value_has_one_too() -> None:
    books = Books(rules(PER_USER))
    for user in ("u1", "u2", ""):
        touch(books, ON._replace(user=user))
        held(books, 100, on=ON._replace(user=user))
        assert short(books, 1, on=ON._replace(user=user)).account.on.user == user
    assert {account.name for account in books.accounts()} == {
        f"test: user usd hour {user}" for user in ("u1", "u2", "-")
    }


def test_a_pair_counts_each_pair() -> None:
    books = Books(rules(Cap(scope="agent+user", per="hour", requests=1)))
    for agent, user in (("a", "u"), ("a", "v"), ("b", "u")):
        on = Dimensions(agent=agent, user=user)
        touch(books, on)
        held(books, on=on)
        short(books, on=on)


# --- Windows ---------------------------------------------------------------------------------------------------------


def test_a_call_settles_in_the_window_it_was_reserved_in() -> None:
    books = granted(HOURLY)
    hold = held(books, 400)
    later_s = NOW_S + HOUR_S
    assert short(books, 1, now_s=later_s).account.start_s == NOW_S - 1_800 + HOUR_S
    touch(books, ON, later_s)
    held(books, 1_000, now_s=later_s)
    books.settle(hold, Amounts(300, 1, 0))
    old, new = sorted(books.accounts(), key=lambda account: account.start_s)
    assert (old.held, old.spent, new.held, new.spent) == (0, 300, 1_000, 0)
    assert books.find(old.name, old.start_s) is old
    assert books.find(new.name, new.start_s) is new
    assert books.find(new.name, 0) is None


@pytest.mark.parametrize("back_s", [0.001, 1, 1_801, 2 * DAY_S, 400 * DAY_S])
def test_no_window_is_left_for_an_earlier_one(back_s: float) -> None:
    books = granted(HOURLY, REQUESTS)
    held(books, 900)
    before = list(books.accounts())
    assert short(books, 101, now_s=NOW_S - back_s).account is before[0]
    # Nor does a caller that comes only now find one that is over for the others.
    books.change_rules(rules(HOURLY, REQUESTS, PER_USER))
    assert short(books, 1, now_s=NOW_S - back_s).account.start_s == NOW_S - 1_800


def test_a_clock_that_swings_over_an_edge_gives_nothing_twice() -> None:
    books = granted(HOURLY)
    edge_s = NOW_S + 1_800
    held(books, 1_000, now_s=edge_s - 0.001)
    touch(books, ON, edge_s)
    held(books, 1_000, now_s=edge_s)
    for swing_s in (-0.001, 0, -HOUR_S, 0.5, -DAY_S, 1):
        assert short(books, 1, now_s=edge_s + swing_s).account.start_s == edge_s


@given(st.lists(st.floats(NOW_S - 3 * DAY_S, NOW_S + 3 * DAY_S), min_size=1, max_size=20))
def test_the_time_of_a_hold_lies_in_the_windows_of_all_its_accounts(times: list[float]) -> None:
    """So its row counts where it was reserved, whatever the clock did: an hour, a day and a month far away."""
    caps = (changed(HOURLY, timezone="Asia/Kolkata"), REQUESTS, changed(PER_USER, per="month"), TOKENS)
    books = Books(rules(*caps))
    last_ms = 0
    for number, now_s in enumerate(times):
        on = ON._replace(user=f"u{number % 3}")
        while isinstance(found := books.reserve(on, Amounts(0, 0, 0), is_priced=True, now_s=now_s), Shortfall):
            hear(books, found.account)
        for account, _ in found.entries:
            assert account.start_s <= found.at_ms / 1000
            assert account.end_s is None or found.at_ms / 1000 < account.end_s
        assert found.at_ms >= last_ms
        last_ms = found.at_ms


# --- Rules that change -----------------------------------------------------------------------------------------------


def test_a_raised_limit_is_granted_by_the_store_and_not_before() -> None:
    books = granted(HOURLY)
    hold = held(books, 1_000)
    version = books.version
    books.change_rules(rules(changed(HOURLY, usd=Usd(2_000))))
    assert books.version > version
    refused = short(books, 500)
    assert (refused.missing, refused.account.at_store, refused.account.rule.limit) == (500, 1_000, 2_000)
    assert not books.is_revoked(hold)
    hear(books, refused.account, 2_000)
    held(books, 1_000)


def test_a_limit_lowered_below_what_is_posted_revokes_what_is_under_way() -> None:
    books = granted(HOURLY)
    books.settle(held(books, 300), Amounts(300, 1, 0))
    hold = held(books, 100)
    books.change_rules(rules(changed(HOURLY, usd=Usd(300))))
    assert not books.is_revoked(hold)
    books.change_rules(rules(changed(HOURLY, usd=Usd(299))))
    assert books.is_revoked(hold)
    assert not short(books, 700).is_only_held
    assert books.remaining_nusd(ON, now_s=NOW_S) == 0
    books.settle(hold, Amounts(100, 1, 0))
    assert only(books).spent == 400


def test_a_rule_that_goes_is_settled_and_given_back_and_one_that_comes_is_asked_for() -> None:
    books = granted(HOURLY)
    hold = held(books, 400)
    books.change_rules(rules(REQUESTS))
    assert books.rules == rules(REQUESTS)
    assert short(books, 10**9).account.rule.unit == "requests"
    books.settle(hold, Amounts(100, 1, 0))
    removed = next(account for account in books.accounts() if account.rule.unit == "usd")
    assert (removed.held, removed.spent) == (0, 100)


def test_a_rule_that_comes_back_goes_on_with_what_is_held_under_it() -> None:
    books = granted(HOURLY)
    hold = held(books, 400)
    account = only(books)
    books.change_rules(())
    held(books, 10**9)
    books.change_rules(rules(changed(HOURLY, usd=Usd(500))))
    assert short(books, 601).account is account
    assert list(books.accounts()) == [account]
    assert account.rule.limit == 500
    books.settle(hold, Amounts(400, 1, 0))
    assert account.spent == 400


def test_a_rule_that_comes_back_in_another_window_begins_anew() -> None:
    books = granted(HOURLY)
    hold = held(books, 400)
    books.change_rules(())
    books.change_rules(rules(HOURLY))
    refused = short(books, 1, now_s=NOW_S + HOUR_S)
    assert refused.account.granted == 0
    books.settle(hold, Amounts(400, 1, 0))
    assert refused.account.spent == 0


# --- What callers ask ------------------------------------------------------------------------------------------------


def test_what_can_be_paid_is_what_is_here_and_what_the_store_could_add() -> None:
    books = Books(rules(HOURLY, PER_USER, TOKENS))
    assert books.affordable(ON, now_s=NOW_S) == (100, 500)
    touch(books, ON)
    hold = held(books, 30, tokens=100)
    assert books.affordable(ON, now_s=NOW_S) == (70, 400)
    assert books.affordable(ON._replace(user="u2"), now_s=NOW_S) == (100, 400)
    books.settle(hold, Amounts(150, 1, 600))
    assert books.affordable(ON, now_s=NOW_S) == (0, 0)
    hourly = next(iter(books.accounts()))
    hear(books, hourly, 150, 150, elsewhere=640)
    assert books.affordable(ON._replace(user="u3"), now_s=NOW_S) == (60, 0)
    assert Books(rules(REQUESTS)).affordable(ON, now_s=NOW_S) == (None, None)


def test_what_remains_is_that_of_the_tightest_cap_in_dollars() -> None:
    books = granted(HOURLY, PER_USER, REQUESTS)
    assert books.remaining_nusd(ON, now_s=NOW_S) == 100
    held(books, 40)
    assert books.remaining_nusd(ON, now_s=NOW_S) == 60
    assert Books(rules(REQUESTS)).remaining_nusd(ON, now_s=NOW_S) is None


@pytest.mark.parametrize(("used", "is_switched"), [(0, False), (499, False), (500, True), (1_000, True)])
@pytest.mark.parametrize("how", ["held", "spent", "posted"])
def test_from_its_share_on_the_cheaper_model_is_used(used: int, is_switched: bool, how: str) -> None:
    books = granted(REQUESTS, changed(HOURLY, over_pct=50.0, use="sim/small"))
    if how == "posted":
        hear(books, list(books.accounts())[1], 1_000 - used, used)
    else:
        hold = held(books, used)
        if how == "spent":
            books.settle(hold, Amounts(used, 1, 0))
    found = books.cheaper(ON, now_s=NOW_S)
    assert (found is not None and found.use == "sim/small") is is_switched


# --- What the bookkeeper tells and asks ------------------------------------------------------------------------------


def swept(books: Books, now_s: float, *, holders: int = 1, is_leaving: bool = False) -> dict[str, int]:
    """What is given back in two whole rounds: what is given back in the first is forgotten in the second."""
    found: dict[str, int] = {}
    for _ in range(5):
        for account, amount in books.returns(now_s, holders=holders, is_leaving=is_leaving):
            found[account.name] = found.get(account.name, 0) + amount
    return found


def test_alone_a_lease_is_kept_and_who_leaves_gives_back_all_that_is_not_held() -> None:
    books = granted(HOURLY)
    held(books, 300)
    assert swept(books, NOW_S + 2) == {}
    assert books.returns(NOW_S, holders=1, is_leaving=True) == [(only(books), 700)]
    assert only(books).available == 0
    assert books.returns(NOW_S, holders=1, is_leaving=True) == []


def test_among_others_what_is_taken_in_a_while_is_kept_until_they_want_it() -> None:
    books = granted(HOURLY)
    books.void(held(books, 200))
    # The call that asked for the lease took 1, too.
    assert swept(books, NOW_S, holders=2) == {"test: global usd hour": 799}
    assert swept(books, NOW_S + KEEP_S, holders=2) == {"test: global usd hour": 101}
    hear(books, only(books), 100, is_wanted=True)
    assert [amount for _, amount in books.returns(NOW_S + KEEP_S, holders=2)] == [100]


def test_what_is_over_goes_back_and_is_forgotten_once_it_is_settled() -> None:
    books = granted(HOURLY)
    hold = held(books, 400)
    later_s = NOW_S + HOUR_S
    touch(books, ON, later_s)
    assert swept(books, later_s) == {"test: global usd hour": 600}
    assert len(list(books.accounts())) == 2
    books.settle(hold, Amounts(400, 1, 0))
    assert swept(books, later_s) == {}
    old = min(books.accounts(), key=lambda account: account.start_s)
    books.told([(old, 400)])
    assert swept(books, later_s) == {}
    assert [account.start_s for account in books.accounts()] == [NOW_S + 1_800]


def test_what_leases_must_cover_is_held_or_spent_and_not_told() -> None:
    books = granted(HOURLY)
    hold, other = held(books, 400), held(books, 50)
    assert books.outstanding() == {only(books): 450}
    books.settle(hold, Amounts(100, 1, 0))
    assert books.outstanding() == {only(books): 150}
    books.void(other)
    assert books.outstanding() == {only(books): 100}
    books.told([(only(books), 100)])
    assert books.outstanding() == {}


def test_the_accounts_of_all_are_there_before_the_first_call() -> None:
    books = Books(rules(HOURLY, PER_USER, TOKENS))
    assert [account.name for account in books.shared_accounts(NOW_S)] == [
        "test: global usd hour",
        "test: global tokens total",
    ]
    assert books.shared_accounts(NOW_S) == list(books.accounts())


def test_what_is_used_of_an_agents_account_is_known_until_its_window_ends() -> None:
    books = granted(PER_AGENT, PER_USER)
    agents, _ = books.accounts()
    books.settle(held(books, 80), Amounts(80, 1, 0))
    books.told([(account, 80) for account in books.accounts()])
    hear(books, agents, agents.granted, posted=80)
    later_s = NOW_S + IDLE_S + 1
    # The lease goes back, as whose it is nobody calls; the user's account is forgotten, the agent's is not.
    assert swept(books, later_s)["test: agent usd hour qa_agent"] == 120
    assert list(books.accounts()) == [agents]
    assert (agents.used, agents.granted) == (80, 0)
    # Every minute it is asked for: nothing is given back of it, and the store answers with how it stands.
    for minutes in (1, 2, 3):
        now_s = later_s + minutes * (IDLE_S + 1)
        asked = [pair for _ in range(9) for pair in books.returns(now_s, holders=1)]
        assert asked == [(agents, 0)]
    hear(books, agents, 0, posted=150)
    assert agents.used == 150
    end_s = agents.end_s
    assert end_s is not None
    swept(books, end_s - 0.001)
    assert list(books.accounts()) == [agents]
    swept(books, end_s)
    assert list(books.accounts()) == []


def test_an_agents_account_of_which_nothing_is_used_is_forgotten_when_nobody_calls() -> None:
    books = granted(PER_AGENT)
    swept(books, NOW_S + IDLE_S + 1)
    assert list(books.accounts()) == []


def test_a_cap_that_is_taken_out_is_forgotten_whatever_was_used_of_it() -> None:
    books = granted(changed(PER_AGENT, per="total"))
    books.settle(held(books, 80), Amounts(80, 1, 0))
    books.told([(only(books), 80)])
    hear(books, only(books), only(books).granted, posted=80)
    books.change_rules(())
    swept(books, NOW_S + IDLE_S + 1)
    assert list(books.accounts()) == []


def test_twenty_thousand_users_come_and_go_and_leave_nothing_behind() -> None:
    books = Books(rules(PER_USER))
    for number in range(20_000):
        on = Dimensions(user=f"user-{number}")
        now_s = NOW_S + number / 100
        while isinstance(found := books.reserve(on, Amounts(5, 1, 0), is_priced=True, now_s=now_s), Shortfall):
            hear(books, found.account)
        books.settle(found, Amounts(3, 1, 0))
        books.told([(found.entries[0][0], 3)])
        if number % 20 == 0:
            books.returns(now_s, holders=1)
            # Five seconds of sweeping cover all there are, so not many more than the idle time's worth are there.
            assert len(list(books.accounts())) <= IDLE_S * 100 * 1.2 + 2 * SWEEP
    later_s = now_s + IDLE_S + 1
    given_back = 0
    for _ in range(3 * 20_000 // SWEEP):
        given_back += len(books.returns(later_s, holders=1))
    assert given_back > 0
    assert list(books.accounts()) == []
    assert books.outstanding() == {}


# --- Whatever happens ------------------------------------------------------------------------------------------------

STEPS = st.lists(
    st.tuples(
        st.sampled_from(("reserve", "reserve", "settle", "void", "doubt", "grant", "return", "tell")),
        st.integers(0, 700),
        st.integers(0, 5),
        st.floats(-2 * HOUR_S, 2 * HOUR_S),
    ),
    max_size=60,
)


@given(STEPS)
def test_whatever_happens_holds_and_spending_stay_within_what_is_granted(steps: list[Any]) -> None:
    books = Books(rules(HOURLY, PER_USER, TOKENS))
    open_: list[tuple[Hold, Amounts]] = []
    for step, amount, which, shift_s in steps:
        now_s, on = NOW_S + shift_s, ON._replace(user=f"u{which % 2}")
        before = {account: (account.held, account.spent) for account in books.accounts()}
        if step == "reserve":
            bound = Amounts(amount, 1, amount // 2)
            found = books.reserve(on, bound, is_priced=True, now_s=now_s)
            if isinstance(found, Hold):
                open_.append((found, bound))
            else:
                assert found.missing > 0
                after = {account: (account.held, account.spent) for account in books.accounts()}
                assert after == {**dict.fromkeys(after, (0, 0)), **before}
        elif step in ("settle", "void", "doubt") and open_:
            hold, bound = open_.pop(which % len(open_))
            if step == "settle":
                assert books.settle(hold, Amounts(bound.nusd // 2, 1, bound.tokens)) == 0
            elif step == "void":
                books.void(hold)
            else:
                books.doubt(hold)
        elif step == "grant":
            for account in books.accounts():
                # A store grants what is there, and never takes back what it has granted.
                hear(books, account, max(account.granted, min(amount, account.rule.limit)))
        elif step == "return":
            for account, given in books.returns(now_s, holders=1 + which % 2, is_leaving=which == 5):
                assert given > 0
                assert account.available >= 0
        else:
            for account in list(books.accounts()):
                available = account.available
                books.told([(account, account.spent)])
                assert account.available == available
        for account in books.accounts():
            assert 0 <= account.held + account.spent <= account.granted
            assert account.granted <= account.rule.limit
        covered = {account: account.held + account.spent for account in books.accounts()}
        assert {**dict.fromkeys(covered, 0), **books.outstanding()} == covered
    for hold, _ in open_:
        books.void(hold)
    assert all(account.held == 0 for account in books.accounts())
