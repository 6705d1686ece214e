"""Breakers: what opens one, how it comes back, and that a probe is one call."""

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gateway.decide.breaker import TRANSITIONS, Admission, Breaker, BreakerLimits, Event, Recent, State

LIMITS = BreakerLimits(consecutive=3, share=0.5, min_calls=10, window_s=30, open_s=5, max_open_s=20)


def fail(breaker: Breaker, times: int, now_s: float) -> None:
    for _ in range(times):
        admission = breaker.admit(now_s)
        assert admission is not None
        breaker.failed(admission, now_s)


def test_it_stays_closed_just_below_the_limit_and_opens_at_it() -> None:
    breaker = Breaker(LIMITS)
    fail(breaker, 2, 0)
    assert breaker.state is State.CLOSED
    fail(breaker, 1, 0)
    assert breaker.state is State.OPEN
    assert not breaker.admit(4.9)


def test_a_success_in_between_starts_the_count_anew() -> None:
    breaker = Breaker(LIMITS)
    fail(breaker, 2, 0)
    breaker.succeeded(Admission.ORDINARY, 0)
    fail(breaker, 2, 0)
    assert breaker.state is State.CLOSED


def test_a_share_of_failures_opens_it_once_there_are_enough_calls() -> None:
    breaker = Breaker(LIMITS)
    for _ in range(4):
        breaker.succeeded(Admission.ORDINARY, 0)
        breaker.failed(Admission.ORDINARY, 0)
    assert breaker.state is State.CLOSED, "eight calls are too few to tell"
    breaker.succeeded(Admission.ORDINARY, 0)
    breaker.failed(Admission.ORDINARY, 0)
    assert breaker.state is State.OPEN


def test_failures_older_than_the_window_do_not_count() -> None:
    breaker = Breaker(LIMITS)
    for _ in range(4):
        breaker.failed(Admission.ORDINARY, 0)
        breaker.succeeded(Admission.ORDINARY, 0)
    for _ in range(9):
        breaker.succeeded(Admission.ORDINARY, 31)
    breaker.failed(Admission.ORDINARY, 31)
    assert breaker.state is State.CLOSED


def test_half_open_admits_one_probe_at_a_time() -> None:
    breaker = Breaker(LIMITS)
    fail(breaker, 3, 0)
    assert breaker.admit(5) is Admission.PROBE
    assert breaker.state is State.HALF_OPEN
    assert not breaker.admit(5)
    breaker.abandoned(Admission.PROBE)
    assert breaker.admit(6), "a probe whose caller left told nothing, so the next call is the probe"


def test_a_probe_that_succeeds_closes_it_and_forgets_the_bad_days() -> None:
    breaker = Breaker(LIMITS)
    fail(breaker, 3, 0)
    assert breaker.admit(5) is Admission.PROBE
    breaker.succeeded(Admission.PROBE, 5)
    assert breaker.state is State.CLOSED
    fail(breaker, 2, 6)
    assert breaker.state is State.CLOSED


def test_each_failed_probe_doubles_the_wait_up_to_its_limit() -> None:
    breaker = Breaker(LIMITS)
    fail(breaker, 3, 0)
    now_s, waits = 0.0, []
    for _ in range(4):
        wait_s = next(wait for wait in (5, 10, 20, 40) if breaker.admit(now_s + wait))
        now_s += wait_s
        waits.append(wait_s)
        breaker.failed(Admission.PROBE, now_s)
    assert waits == [5, 10, 20, 20]


def test_every_state_is_left_and_reached_and_nothing_else_is_in_the_table() -> None:
    assert {state for state, _ in TRANSITIONS} == set(State) == set(TRANSITIONS.values())
    assert {event for _, event in TRANSITIONS} == set(Event)


def test_a_call_from_before_the_opening_neither_closes_it_nor_counts_as_its_probe() -> None:
    breaker = Breaker(LIMITS)
    early = breaker.admit(0)
    assert early is not None
    fail(breaker, 3, 0)
    assert breaker.admit(5) is Admission.PROBE
    breaker.succeeded(early, 5)
    breaker.abandoned(early)
    assert breaker.state is State.HALF_OPEN
    assert not breaker.admit(5)


def test_what_calls_tell_is_of_so_long_a_time_and_the_last_one_is_never_forgotten() -> None:
    breaker = Breaker(LIMITS)
    assert breaker.recent(0, 60) is None
    fail(breaker, 1, 0)
    for now_s in (10, 50, 60):
        breaker.succeeded(Admission.ORDINARY, now_s)
    assert breaker.recent(60, 60) == Recent(4, 1, 60, False, False)
    assert breaker.recent(60.1, 60) == Recent(3, 0, 60, False, False)
    assert breaker.recent(9_999, 60) == Recent(0, 0, 60, False, False)


def test_what_calls_tell_says_whether_any_is_let_through_and_lets_none_through_itself() -> None:
    breaker = Breaker(LIMITS)
    fail(breaker, 3, 0)
    assert breaker.recent(4.9, 60) == Recent(3, 3, 0, True, True)
    assert breaker.recent(5, 60) == Recent(3, 3, 0, True, False)
    assert breaker.state is State.OPEN


class AnyOrder(RuleBasedStateMachine):
    """Calls that overlap in any order, on a clock that only goes forward."""

    def __init__(self) -> None:
        super().__init__()
        self.breaker = Breaker(LIMITS)
        self.now_s = 0.0
        self.under_way: list[Admission] = []

    @rule(seconds=st.floats(0, 30))
    def time_passes(self, seconds: float) -> None:
        self.now_s += seconds

    @rule()
    def a_call_asks(self) -> None:
        admission = self.breaker.admit(self.now_s)
        if admission is not None:
            self.under_way.append(admission)

    @precondition(lambda self: self.under_way)
    @rule(data=st.data(), outcome=st.sampled_from(["succeeded", "failed", "abandoned"]))
    def a_call_ends(self, data: st.DataObject, outcome: str) -> None:
        admission = self.under_way.pop(data.draw(st.integers(0, len(self.under_way) - 1)))
        if outcome == "abandoned":
            self.breaker.abandoned(admission)
        else:
            getattr(self.breaker, outcome)(admission, self.now_s)

    @invariant()
    def one_probe_at_most_and_only_while_half_open(self) -> None:
        probes = self.under_way.count(Admission.PROBE)
        assert probes <= (self.breaker.state is State.HALF_OPEN)


TestAnyOrder = AnyOrder.TestCase


@given(st.lists(st.booleans(), max_size=60))
def test_after_the_longest_wait_a_call_is_always_admitted(outcomes: list[bool]) -> None:
    breaker = Breaker(LIMITS)
    now_s = 0.0
    for is_success in outcomes:
        now_s += LIMITS.max_open_s
        admission = breaker.admit(now_s)
        assert admission is not None
        (breaker.succeeded if is_success else breaker.failed)(admission, now_s)
