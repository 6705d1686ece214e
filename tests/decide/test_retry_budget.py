"""The retry budget: a floor for quiet times, a share for busy ones, and nothing beyond either."""

from hypothesis import given
from hypothesis import strategies as st

from gateway.decide.retry_budget import RetryBudget


def budget() -> RetryBudget:
    return RetryBudget(share=0.2, floor=3, window_s=10)


def test_the_floor_holds_without_any_traffic() -> None:
    quiet = budget()
    assert [quiet.take(0) for _ in range(4)] == [True, True, True, False]


def test_a_share_of_the_recent_calls_may_be_retried() -> None:
    busy = budget()
    for _ in range(100):
        busy.called(0)
    assert sum(busy.take(0) for _ in range(50)) == 20


def test_what_is_older_than_the_window_is_forgotten() -> None:
    aged = budget()
    for _ in range(3):
        assert aged.take(0)
    assert not aged.take(10)
    assert aged.take(11)


def test_what_is_left_is_never_less_than_nothing() -> None:
    ebbing = budget()
    for _ in range(100):
        ebbing.called(0)
    assert sum(ebbing.take(9) for _ in range(50)) == 20
    # The calls are out of the window, their retries are not.
    assert (ebbing.left(12), ebbing.take(12)) == (0, False)
    assert ebbing.left(21) == 3


def test_retries_are_not_calls_that_allow_further_retries() -> None:
    steady = RetryBudget(share=0.5, floor=0, window_s=10)
    for _ in range(10):
        steady.called(0)
    assert sum(steady.take(0) for _ in range(100)) == 5


@given(st.lists(st.tuples(st.floats(0, 2), st.booleans()), max_size=300))
def test_retries_in_a_window_never_exceed_the_share_and_the_floor(moves: list[tuple[float, bool]]) -> None:
    tried = budget()
    now_s = 0.0
    calls: list[float] = []
    retries: list[float] = []
    for wait_s, is_retry in moves:
        now_s += wait_s
        if not is_retry:
            tried.called(now_s)
            calls.append(now_s)
        elif tried.take(now_s):
            retries.append(now_s)
        # Slices of a second make the window up to a second longer for calls, never shorter for retries.
        recent_retries = sum(when > now_s - 10 for when in retries)
        recent_calls = sum(when > now_s - 22 for when in calls)
        assert recent_retries <= max(3, 0.2 * recent_calls)
