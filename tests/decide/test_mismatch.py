"""The sample-ratio test: which arrivals are a fair draw, how much they weigh, and how seldom it cries wolf."""

from fractions import Fraction
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import betaln
from scipy.stats import binom

from gateway.decide.mismatch import chance_of, mismatch_of
from gateway.domain.experiment import Arrivals

SHARES = (1000, 2500, 5000, 7500, 9500)


@pytest.mark.parametrize(
    "share, earlier, chance",
    [
        (1000, [], 0.1),
        (2500, [(1000, False)], 1500 / 9000),
        (2500, [(1000, True)], None),
        (5000, [(1000, False), (2500, False)], 2500 / 7500),
        (5000, [(2500, True)], None),
        (1000, [(2500, True)], 0.4),
        (1000, [(2500, False)], None),
        (2500, [(5000, True), (1000, False)], 1500 / 4000),
        (10_000, [], None),
        (0, [], None),
        (2500, [(1000, True), (5000, False)], None),
    ],
    ids=[
        "new", "was control", "was treated and stays", "was control twice", "was treated before the last step",
        "was treated, share lowered", "was control and stays", "in between", "all treated", "none treated",
        "contradicts itself",
    ],
)  # fmt: skip
def test_the_chance_to_be_treated_follows_from_earlier_stages(
    share: int, earlier: list[tuple[int, bool]], chance: float | None
) -> None:
    assert chance_of(share, earlier) == (None if chance is None else pytest.approx(chance))


@settings(max_examples=30)
@given(st.lists(st.integers(0, 10_000), max_size=4), st.integers(0, 10_000))
def test_the_chance_is_the_part_of_the_buckets_that_are_still_possible(shares: list[int], share: int) -> None:
    bucket = 1234
    earlier = [(before, bucket < before) for before in shares]
    possible = [b for b in range(10_000) if all((b < before) == is_treated for before, is_treated in earlier)]
    part = Fraction(sum(b < share for b in possible), len(possible))
    assert chance_of(share, earlier) == (pytest.approx(float(part)) if 0 < part < 1 else None)


@given(st.floats(0.01, 0.99), st.integers(0, 5000), st.integers(0, 5000))
def test_the_e_value_is_the_beta_mixture(share: float, treated: int, control: int) -> None:
    log_e = betaln(100 * share + treated, 100 * (1 - share) + control) - betaln(100 * share, 100 * (1 - share))
    log_e -= treated * np.log(share) + control * np.log(1 - share)
    seen = mismatch_of([Arrivals("a", share, treated, control)])
    assert np.log(seen.e_value) == pytest.approx(np.clip(log_e, -690, 690), rel=1e-6, abs=1e-6)


def test_the_e_values_of_all_outcomes_average_to_one() -> None:
    """What makes it an e-value: under the stated shares, betting on it gains nothing."""
    chances = binom.pmf(range(51), 50, 0.1)
    values = [mismatch_of([Arrivals("a", 0.1, treated, 50 - treated)]).e_value for treated in range(51)]
    assert chances @ values == pytest.approx(1.0)


def test_strata_multiply_and_rows_of_one_stratum_add_up() -> None:
    one, other = Arrivals("a", 0.1, 30, 100), Arrivals("b", 0.5, 40, 90)
    both = mismatch_of([one, other])
    assert both.e_value == pytest.approx(mismatch_of([one]).e_value * mismatch_of([other]).e_value)
    halves = [Arrivals("a", 0.1, 10, 60), other, Arrivals("a", 0.1, 20, 40)]
    assert mismatch_of(halves) == both
    assert both.users == 260
    assert both.expected_share == pytest.approx((13 + 65) / 260)
    assert both.seen_share == pytest.approx(70 / 260)


@pytest.mark.parametrize(
    "arrivals", [[], [Arrivals("a", 0.5, 0, 0)], [Arrivals("a", 1.0, 9, 0), Arrivals("b", 0.0, 0, 9)]]
)
def test_without_a_draw_there_is_nothing_to_find(arrivals: list[Arrivals]) -> None:
    found = mismatch_of(arrivals)
    assert (found.is_found, found.e_value, found.users) == (False, 1.0, 0)
    assert found.expected_share is found.seen_share is None


def test_it_is_found_at_the_limit_and_not_below() -> None:
    arrivals = [Arrivals("a", 0.5, 300, 200)]
    e_value = mismatch_of(arrivals).e_value
    assert e_value > 1
    assert mismatch_of(arrivals, alpha=1.000001 / e_value).is_found
    assert not mismatch_of(arrivals, alpha=0.999999 / e_value).is_found


def test_overwhelming_evidence_is_still_a_number() -> None:
    assert np.isfinite(mismatch_of([Arrivals("a", 0.5, 10**7, 0)]).e_value)
    assert mismatch_of([Arrivals("a", 0.5, 10**7, 10**7)]).e_value > 0


def ramp(random: Random, *, users: int, lost: float) -> float:
    """The greatest e-value of one ramp in which a part of the treated users is never seen, looked at now and then."""
    buckets = {user: random.randrange(10_000) for user in range(users)}
    seen: dict[int, list[tuple[int, bool]]] = {}
    counts: dict[float, list[int]] = {}
    greatest = 1.0
    for share in SHARES:
        for number, (user, bucket) in enumerate(buckets.items()):
            is_treated = bucket < share
            if random.random() < 0.5 or (is_treated and random.random() < lost):
                continue
            chance = chance_of(share, seen.setdefault(user, []))
            seen[user].append((share, is_treated))
            if chance is not None:
                counts.setdefault(chance, [0, 0])[is_treated] += 1
            if number % 50 == 0 and counts:
                arrivals = [Arrivals(str(at), at, two[1], two[0]) for at, two in counts.items()]
                greatest = max(greatest, mismatch_of(arrivals).e_value)
    return greatest


def test_a_sound_ramp_raises_no_alarm_and_a_lossy_one_does() -> None:
    sound = [ramp(Random(seed), users=600, lost=0.0) for seed in range(60)]
    # By chance an e-value ever reaches 20 in one ramp of 20 at most: more than 8 of 60 have a chance below 0.01.
    assert sum(value >= 20 for value in sound) <= 8
    assert max(sound) < 1000
    assert min(ramp(Random(seed), users=2500, lost=0.5) for seed in range(3)) > 1000
