"""What failover remembers: of each model by itself, across reloads, and never more than so much of it."""

import pytest

from gateway.decide import standing
from gateway.decide.breaker import Admission, Breaker, State
from gateway.decide.standing import Standing
from gateway.domain.policy import Breakers, Retries

QUICK = Breakers(consecutive=2, open_s=5, max_open_s=20)


def known(**retries: float) -> Standing:
    return Standing(QUICK, Retries(**retries))  # type: ignore[arg-type]


def opened(breaker: Breaker, now_s: float = 0.0) -> Breaker:
    while breaker.state is not State.OPEN:
        admission = breaker.admit(now_s)
        assert admission is not None
        breaker.failed(admission, now_s)
    return breaker


def test_each_model_at_each_upstream_has_a_breaker_of_its_own() -> None:
    found = known()
    opened(found.breaker("a", "a/one"))
    assert found.breaker("a", "a/one").state is State.OPEN
    assert found.breaker("a", "a/two").state is State.CLOSED
    # Under a redirect the same reference is served elsewhere, which is another thing to know about.
    assert found.breaker("b", "a/one").state is State.CLOSED
    assert {(upstream, ref): breaker.state for upstream, ref, breaker in found.breakers()} == {
        ("a", "a/one"): State.OPEN,
        ("a", "a/two"): State.CLOSED,
        ("b", "a/one"): State.CLOSED,
    }


def test_who_only_looks_makes_no_breaker() -> None:
    found = known()
    assert found.known("a", "a/one") is None
    assert list(found.breakers()) == []
    assert found.known("a", "a/one") is None
    made = found.breaker("a", "a/one")
    assert found.known("a", "a/one") is made
    assert found.known("b", "a/one") is None


def test_all_models_of_an_upstream_share_its_retry_budget() -> None:
    found = known(budget_floor=1, budget_percent=0.0)
    assert found.budget("a").take(0)
    assert not found.budget("a").take(0)
    assert found.budget("b").take(0)
    assert sorted(name for name, _ in found.budgets()) == ["a", "b"]


def test_the_percentage_of_the_policy_is_a_share_of_the_calls() -> None:
    found = known(budget_floor=0, budget_percent=10.0, budget_window_s=10.0)
    for _ in range(30):
        found.budget("a").called(0)
    assert found.budget("a").left(0) == pytest.approx(3)
    assert found.budget("a").left(11) == 0


def test_no_retry_is_left_where_the_policy_wants_none() -> None:
    found = known(budget_floor=0, budget_percent=0.0)
    for _ in range(1_000):
        found.budget("a").called(0)
    assert not found.budget("a").take(0)


def test_a_reload_keeps_open_breakers_open_and_judges_by_the_new_limits() -> None:
    found = known()
    breaker = opened(found.breaker("a", "a/one"))
    found.take_policy(Breakers(consecutive=4, open_s=1, max_open_s=1), Retries())
    assert found.breaker("a", "a/one") is breaker
    assert breaker.state is State.OPEN
    assert breaker.admit(4.9) is None, "it opened for as long as the policy of then said"
    assert breaker.admit(5) is Admission.PROBE
    breaker.succeeded(Admission.PROBE, 5)
    for _ in range(3):
        breaker.failed(Admission.ORDINARY, 6)
    assert breaker.state is State.CLOSED
    breaker.failed(Admission.ORDINARY, 6)
    assert breaker.state is State.OPEN
    assert breaker.admit(7) is Admission.PROBE


def test_breakers_that_appear_after_a_reload_have_the_new_limits() -> None:
    found = known()
    found.take_policy(Breakers(consecutive=1), Retries())
    found.breaker("a", "a/new").failed(Admission.ORDINARY, 0)
    assert found.breaker("a", "a/new").state is State.OPEN


def test_a_reload_changes_what_a_retry_budget_allows() -> None:
    found = known(budget_floor=1, budget_percent=0.0)
    assert found.budget("a").take(0)
    found.take_policy(QUICK, Retries(budget_floor=0, budget_percent=0.0))
    assert not found.budget("a").take(0)


def test_a_reload_that_leaves_the_retries_alone_gives_nobody_a_second_budget() -> None:
    found = known(budget_floor=1, budget_percent=0.0)
    assert found.budget("a").take(0)
    found.take_policy(Breakers(), Retries(budget_floor=1, budget_percent=0.0))
    assert not found.budget("a").take(0)


@pytest.fixture
def _three_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standing, "MAX_BREAKERS", 3)


@pytest.mark.usefixtures("_three_at_most")
def test_where_there_are_too_many_the_well_ones_are_forgotten() -> None:
    found = known()
    opened(found.breaker("a", "a/ill"))
    for name in ("b", "c", "d"):
        found.breaker("a", f"a/{name}")
    assert [ref for _, ref, _ in found.breakers()] == ["a/ill", "a/d"]
    assert found.breaker("a", "a/ill").state is State.OPEN


@pytest.mark.usefixtures("_three_at_most")
def test_names_that_do_not_exist_cannot_fill_the_memory_though_each_opens_a_breaker() -> None:
    found = known()
    for number in range(50):
        opened(found.breaker("a", f"a/nothing-{number}"))
        assert len(list(found.breakers())) <= 3
    assert [ref for _, ref, _ in found.breakers()] == ["a/nothing-47", "a/nothing-48", "a/nothing-49"]
