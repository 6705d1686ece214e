"""Circuit breakers: a model that keeps failing is left alone for a while, then tried with one real call.

Pure: `now_s` is passed in, and nothing here waits. What counts as a failure is the fault table's affair; a caller's
own mistake or a slow reader never gets here. The invariant: while a breaker is half-open, one call at most is its
probe, and that call has its fallback armed like any other.
"""

from collections import deque
from enum import StrEnum
from typing import NamedTuple


class State(StrEnum):
    """Closed lets calls through, open does not, half-open lets one through."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class Event(StrEnum):
    """What can happen to a breaker."""

    TRIPPED = "tripped"  # Too many failures, in a row or as a share.
    COOLED = "cooled"  # The time it stays open is over, and a call asks.
    PROBE_SUCCEEDED = "probe_succeeded"
    PROBE_FAILED = "probe_failed"


class Admission(StrEnum):
    """How a call was let through. Calls that were under way before the breaker opened do not decide over it."""

    ORDINARY = "ordinary"
    PROBE = "probe"


# What is not in the table does not happen. docs/failover.md draws it from here.
TRANSITIONS: dict[tuple[State, Event], State] = {
    (State.CLOSED, Event.TRIPPED): State.OPEN,
    (State.OPEN, Event.COOLED): State.HALF_OPEN,
    (State.HALF_OPEN, Event.PROBE_SUCCEEDED): State.CLOSED,
    (State.HALF_OPEN, Event.PROBE_FAILED): State.OPEN,
}


class BreakerLimits(NamedTuple):
    """When a breaker opens, and for how long. The times double with each failed probe, up to `max_open_s`."""

    consecutive: int
    share: float
    min_calls: int
    window_s: float
    open_s: float
    max_open_s: float


class Recent(NamedTuple):
    """What real calls tell of a model: how many lately, how many failed; the last one of all, whenever it was."""

    calls: int
    failures: int
    last_s: float
    has_last_failed: bool
    is_shut: bool


class Breaker:
    """One upstream's one model."""

    __slots__ = ("_consecutive", "_is_probing", "_open_s", "_opened_s", "_outcomes", "limits", "state")

    def __init__(self, limits: BreakerLimits) -> None:
        self.limits = limits
        self.state = State.CLOSED
        self._consecutive = 0
        # (when, whether it failed) of each call within the window; at most MAX_OUTCOMES of them.
        self._outcomes: deque[tuple[float, bool]] = deque(maxlen=MAX_OUTCOMES)
        self._opened_s = 0.0
        self._open_s = limits.open_s
        self._is_probing = False

    def admit(self, now_s: float) -> Admission | None:
        """Let a call through, or not. One that went through must be followed by succeeded, failed or abandoned."""
        if self.state is State.OPEN and now_s >= self._opened_s + self._open_s:
            self._go(Event.COOLED)
        if self.state is State.CLOSED:
            return Admission.ORDINARY
        if self.state is State.HALF_OPEN and not self._is_probing:
            self._is_probing = True
            return Admission.PROBE
        return None

    def succeeded(self, admission: Admission, now_s: float) -> None:
        """A call that went through was answered."""
        if admission is Admission.PROBE:
            self._is_probing = False
            self._go(Event.PROBE_SUCCEEDED)
            self._outcomes.clear()
            self._open_s = self.limits.open_s
        self._consecutive = 0
        self._outcomes.append((now_s, False))

    def failed(self, admission: Admission, now_s: float) -> None:
        """A call that went through failed in a way that is the model's."""
        self._consecutive += 1
        self._outcomes.append((now_s, True))
        if admission is Admission.PROBE:
            self._is_probing = False
            self._open_s = min(self._open_s * 2, self.limits.max_open_s)
            self._open(Event.PROBE_FAILED, now_s)
        elif self.state is State.CLOSED and self._is_too_much(now_s):
            self._open(Event.TRIPPED, now_s)

    def abandoned(self, admission: Admission) -> None:
        """A call that went through ended without telling anything: its caller left, or the request was at fault."""
        if admission is Admission.PROBE:
            self._is_probing = False

    def recent(self, now_s: float, within_s: float) -> Recent | None:
        """What the calls of so long a time tell; None where there never was one. `is_shut`: no call is let through."""
        if not self._outcomes:
            return None
        calls = failures = 0
        for at_s, has_failed in reversed(self._outcomes):
            if at_s < now_s - within_s:
                break
            calls += 1
            failures += has_failed
        is_shut = self.state is State.OPEN and now_s < self._opened_s + self._open_s
        return Recent(calls, failures, *self._outcomes[-1], is_shut)

    def _open(self, event: Event, now_s: float) -> None:
        self._go(event)
        self._opened_s = now_s

    def _go(self, event: Event) -> None:
        self.state = TRANSITIONS[self.state, event]

    def _is_too_much(self, now_s: float) -> bool:
        if self._consecutive >= self.limits.consecutive:
            return True
        while self._outcomes and self._outcomes[0][0] < now_s - self.limits.window_s:
            self._outcomes.popleft()
        failures = sum(failed for _, failed in self._outcomes)
        return len(self._outcomes) >= self.limits.min_calls and failures >= self.limits.share * len(self._outcomes)


# A window of some seconds at a sidecar's rates; beyond it the older half of the window is forgotten, not the newer.
MAX_OUTCOMES = 1_000
