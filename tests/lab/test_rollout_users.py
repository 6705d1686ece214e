"""The week that users make: as many calls as asked for, unevenly by user, by day and by night."""

from collections import Counter
from pathlib import Path
from random import Random

import pytest

from gateway.lab.azure import Row, read_trace
from gateway.lab.rollout_users import DAYS, LEAST_TOKENS, MOST_TOKENS, Visit, day_of, week_of

TRACE = Path(__file__).parents[1] / "data" / "azure_llm_conv_2023.csv.gz"
DAY = day_of(read_trace(TRACE))


def week(seed: int = 1, *, users: int = 400, calls: int = 6_000) -> list[Visit]:
    return week_of("qa_agent", DAY, users=users, calls=calls, random=Random(seed))


def test_a_seed_is_a_week() -> None:
    assert week(1) == week(1)
    assert week(1) != week(2)


def test_calls_are_as_many_as_asked_for_in_order_and_within_the_week() -> None:
    found = week()
    assert abs(len(found) - 6_000) < 600
    assert found == sorted(found)
    assert 0 <= found[0].at_days < found[-1].at_days <= DAYS
    assert {LEAST_TOKENS, MOST_TOKENS} <= {visit.max_tokens for visit in found}


def test_each_users_calls_are_numbered_from_one_in_order_of_time() -> None:
    seen: Counter[str] = Counter()
    for visit in week():
        seen[visit.user] += 1
        assert visit.number == seen[visit.user]


def test_a_tenth_of_the_users_make_more_than_a_quarter_of_the_calls_and_most_users_return() -> None:
    counts = sorted(Counter(visit.user for visit in week()).values(), reverse=True)
    assert sum(counts[: len(counts) // 10]) > sum(counts) / 4
    days = Counter(user for user, _ in {(visit.user, int(visit.at_days)) for visit in week()})
    assert sum(count > 1 for count in days.values()) > len(days) / 2


def test_noon_is_busier_than_midnight() -> None:
    hours = Counter(int(visit.at_days % 1 * 24) for visit in week())
    assert hours[11] + hours[12] > 2 * (hours[0] + hours[23])


def test_users_turn_up_in_the_course_of_the_week() -> None:
    first: dict[str, float] = {}
    for visit in week():
        first.setdefault(visit.user, visit.at_days)
    assert sum(at > 1 for at in first.values()) > len(first) / 8
    assert sum(at < 1 for at in first.values()) > len(first) / 4


def test_a_trace_of_one_request_is_a_day_and_an_empty_one_is_none() -> None:
    assert day_of([Row(0, 10, 200)]).times == [0]
    with pytest.raises(ValueError, match="no rhythm"):
        day_of([])
