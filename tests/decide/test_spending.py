"""What is over counts in the same accounts, and against the same limits, as what the books let through."""

from hypothesis import given
from hypothesis import strategies as st

from gateway.decide.budget import Balance, Books, Hold, Shortfall
from gateway.decide.caps import Rule, rules_of
from gateway.decide.spending import Spending, place_of
from gateway.domain.ledger import Amounts, Dimensions
from gateway.domain.policy import Cap
from gateway.domain.reading import Usd

NOON_MS = 1_795_262_400_000  # 2026-11-21T12:00:00Z
HOUR_MS = 3_600_000
ANN = Dimensions(agent="qa_agent", user="ann", model="sim/a")
BEN = ANN._replace(user="ben")
GLOBAL = Cap(per="hour", usd=Usd(1_000))
PER_USER = Cap(scope="user", per="day", requests=3)
ONLY_LEGAL = Cap(per="total", tokens=500, only={"agent": ["legal_agent"]})


def rules(*caps: Cap) -> tuple[Rule, ...]:
    return rules_of(caps, "test")


def test_each_account_fills_up_to_its_limit_and_not_a_unit_further() -> None:
    spending = Spending(rules(GLOBAL))
    assert spending.take(ANN, Amounts(999, 1, 0), NOON_MS) is None
    assert spending.take(BEN, Amounts(2, 1, 0), NOON_MS) == rules(GLOBAL)[0]
    assert spending.take(BEN, Amounts(1, 1, 0), NOON_MS) is None
    assert spending.left(rules(GLOBAL)[0], ANN, NOON_MS) == 0


def test_a_refused_attempt_counts_in_no_account() -> None:
    user, whole = rules(PER_USER, GLOBAL)
    spending = Spending((user, whole))
    assert spending.take(ANN, Amounts(1_001, 1, 0), NOON_MS) == whole
    assert (spending.left(user, ANN, NOON_MS), spending.left(whole, ANN, NOON_MS)) == (3, 1_000)


def test_windows_users_and_narrowed_caps_are_kept_apart() -> None:
    user, whole, legal = rules(PER_USER, GLOBAL, ONLY_LEGAL)
    spending = Spending((user, whole, legal))
    spending.add(ANN, Amounts(600, 1, 400), NOON_MS)
    spending.add(ANN, Amounts(600, 1, 400), NOON_MS + HOUR_MS)
    assert [spending.left(whole, BEN, NOON_MS + hour * HOUR_MS) for hour in range(3)] == [400, 400, 1_000]
    assert [spending.left(user, who, NOON_MS) for who in (ANN, BEN)] == [1, 3]
    assert spending.used(place_of(legal, ANN, NOON_MS)) == 0


def test_what_was_spent_is_counted_also_above_the_limit() -> None:
    spending = Spending(rules(GLOBAL))
    spending.add(ANN, Amounts(1_500, 1, 0), NOON_MS)
    assert spending.left(rules(GLOBAL)[0], ANN, NOON_MS) == -500
    assert spending.take(ANN, Amounts(1, 1, 0), NOON_MS) is not None
    # What takes nothing is short of nothing.
    assert spending.take(ANN, Amounts(0, 1, 0), NOON_MS) is None


def test_the_tightest_cap_is_the_one_with_the_smallest_share_left() -> None:
    user, whole, legal = rules(PER_USER, GLOBAL, ONLY_LEGAL)
    spending = Spending((user, whole, legal))
    spending.add(ANN, Amounts(500, 2, 0), NOON_MS)
    assert spending.tightest(ANN, NOON_MS) == user
    assert spending.tightest(BEN, NOON_MS) == whole
    assert Spending((legal,)).tightest(ANN, NOON_MS) is None


@given(
    st.lists(
        st.tuples(st.sampled_from([ANN, BEN]), st.integers(1, 400), st.integers(1, 100), st.integers(0, 3 * HOUR_MS)),
        max_size=40,
    )
)
def test_it_lets_through_what_the_books_let_through(calls: list[tuple[Dimensions, int, int, int]]) -> None:
    caps = rules(GLOBAL, PER_USER, Cap(scope="agent", per="total", tokens=800))
    books, spending = Books(caps), Spending(caps)
    for on, nusd, tokens, after_ms in sorted(calls, key=lambda call: call[3]):
        amounts, at_ms = Amounts(nusd, 1, tokens), NOON_MS + after_ms
        found = books.reserve(on, amounts, is_priced=True, now_s=at_ms / 1000)
        while isinstance(found, Shortfall) and not found.account.granted:
            books.heard(found.account, Balance(found.account.rule.limit, 0, 0, 0), seen_s=0.0)
            found = books.reserve(on, amounts, is_priced=True, now_s=at_ms / 1000)
        refused = spending.take(on, amounts, at_ms)
        if isinstance(found, Hold):
            books.settle(found, amounts)
            assert refused is None
        else:
            assert refused == found.account.rule
