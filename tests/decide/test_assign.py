"""Assignment is the same everywhere, never takes anyone back while a share rises, and favours nobody."""

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from gateway.decide.assign import BUCKETS, bucket_of, is_treated

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "assignment.json").read_text(encoding="utf-8"))
USERS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
SHARES = st.integers(0, BUCKETS)
# Below it a fair coin would fall so about once in a thousand suites; the ids are fixed, so it either holds or not.
LEAST_P = 0.001


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: f"{vector['salt']}.{vector['user'][:20]}")
def test_golden_vectors(vector: dict[str, str]) -> None:
    assert bucket_of(vector["salt"], vector["user"]) == vector["bucket"]
    assert int(vector["digest_first8_hex"], 16) % BUCKETS == vector["bucket"]


def test_the_vectors_hold_what_another_language_would_get_wrong() -> None:
    users = [vector["user"] for vector in VECTORS]
    assert any(not user.isascii() for user in users)
    assert any(len(user.encode()) > 512 for user in users)
    assert any(vector["salt"] == "" for vector in VECTORS)
    # A digest above 2^63 is negative for a reader that takes it as signed.
    assert any(int(vector["digest_first8_hex"], 16) >= 2**63 for vector in VECTORS)
    assert {0, 999, 1_000, 9_999} <= {vector["bucket"] for vector in VECTORS}


@given(USERS, USERS, SHARES)
def test_the_same_user_is_always_in_the_same_arm(salt: str, user: str, share: int) -> None:
    bucket = bucket_of(salt, user)
    assert 0 <= bucket < BUCKETS
    assert bucket == bucket_of(salt, user)
    assert is_treated(bucket, share) is is_treated(bucket_of(salt, user), share)


@given(USERS, USERS, st.lists(SHARES, min_size=2))
def test_raising_a_share_never_moves_a_user_back(salt: str, user: str, shares: list[int]) -> None:
    bucket = bucket_of(salt, user)
    arms = [is_treated(bucket, share) for share in sorted(shares)]
    assert arms == sorted(arms)


@given(USERS, USERS)
def test_nobody_at_nothing_everybody_at_all(salt: str, user: str) -> None:
    assert not is_treated(bucket_of(salt, user), 0)
    assert is_treated(bucket_of(salt, user), BUCKETS)


@pytest.mark.parametrize(
    ("bucket", "share", "is_in"),
    [(0, 0, False), (0, 1, True), (999, 1_000, True), (1_000, 1_000, False), (1_001, 1_000, False),
     (2_499, 2_500, True), (2_500, 2_500, False), (9_999, 9_999, False), (9_999, 10_000, True)],
)  # fmt: skip
def test_the_bucket_that_equals_the_share_is_not_in(bucket: int, share: int, is_in: bool) -> None:
    assert is_treated(bucket, share) is is_in
    user = next(
        (vector["user"] for vector in VECTORS if vector["bucket"] == bucket and vector["salt"] == "qa_agent"), ""
    )
    if user:
        assert is_treated(bucket_of("qa_agent", user), share) is is_in


def test_lowering_a_share_takes_back_exactly_the_last_ones_added() -> None:
    buckets = [bucket_of("qa_agent", f"user-{number}") for number in range(5_000)]
    at_10 = {n for n, bucket in enumerate(buckets) if is_treated(bucket, 1_000)}
    at_25 = {n for n, bucket in enumerate(buckets) if is_treated(bucket, 2_500)}
    again = {n for n, bucket in enumerate(buckets) if is_treated(bucket, 1_000)}
    assert at_10 == again
    assert at_10 < at_25


@pytest.mark.parametrize("shape", ["user-{}", "{}", "{:032x}", "u{}@example.com"])
def test_a_hundred_thousand_ids_spread_evenly(shape: str) -> None:
    counts = Counter(bucket_of("qa_agent", shape.format(number)) // 100 for number in range(100_000))
    observed = [counts[band] for band in range(100)]
    assert sum(observed) == 100_000
    assert stats.chisquare(observed).pvalue > LEAST_P


@pytest.mark.parametrize("other", ["content_agent", "legal_agent", "support_agent", "analyst_agent", "qa_agent2", ""])
def test_the_arms_of_two_agents_are_independent(other: str) -> None:
    table = Counter(
        (bucket_of("qa_agent", user) // 1_000, bucket_of(other, user) // 1_000)
        for user in map("user-{}".format, range(20_000))
    )
    contingency = [[table[row, column] for column in range(10)] for row in range(10)]
    assert stats.chi2_contingency(contingency).pvalue > LEAST_P
