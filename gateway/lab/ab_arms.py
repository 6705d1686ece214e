"""An experiment's calls folded into arms and days: what was seen, without any inference from it.

One pass over outcomes in order of time; knows no store. The invariant: every call of an agent is counted once, in an
arm or outside of the experiment, so calls and costs add up to those of the journal and the ledger.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from gateway.domain.outcome import Outcome

TREATED = "finetuned"


class Arm(NamedTuple):
    """The calls of one arm. `answered`, `failed` and `left` add up to `calls`; `left`: their callers did not stay.

    `users` are those with a call that was seen to its end. `fallbacks` were answered by another model than the arm's
    first, and count in it all the same. `errors` counts failed calls by kind.
    """

    users: int
    calls: int
    answered: int
    failed: int
    left: int
    fallbacks: int
    cost_nusd: int
    errors: Mapping[str, int]


class Outside(NamedTuple):
    """Calls that are in no comparison: without a user, with a forced arm, of an earlier experiment, or shadows."""

    calls: int
    cost_nusd: int


class Slot(NamedTuple):
    """One arm in one step of time: calls whose end was seen, how many of them succeeded, and their latencies' sum."""

    calls: int = 0
    answered: int = 0
    latency_ms: float = 0.0


class Step(NamedTuple):
    """Both arms in one step of time."""

    start_ms: int
    treated: Slot
    control: Slot


class Arms(NamedTuple):
    """All calls of an agent in a time."""

    treated: Arm
    control: Arm
    outside: Outside
    steps: list[Step]


class _Tally:
    def __init__(self) -> None:
        self.users: set[str] = set()
        self.counts: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.slots: dict[int, Slot] = {}

    def add(self, call: Outcome, start_ms: int) -> None:
        end = {True: "answered", False: "failed", None: "left"}[call.is_success]
        self.counts.update({"calls": 1, end: 1, "fallbacks": int(call.is_fallback), "cost_nusd": call.cost_nusd})
        if call.is_success is False:
            self.errors[call.error or "unknown"] += 1
        if call.is_success is not None:
            self.users.add(call.user)
            calls, answered, latency_ms = self.slots.get(start_ms, Slot())
            self.slots[start_ms] = Slot(calls + 1, answered + call.is_success, latency_ms + call.latency_ms)

    def arm(self) -> Arm:
        counts = {name: self.counts[name] for name in ("calls", "answered", "failed", "left", "fallbacks", "cost_nusd")}
        ranked = sorted(self.errors.items(), key=lambda found: (-found[1], found[0]))
        return Arm(users=len(self.users), **counts, errors=dict(ranked))


def arms_of(calls: Iterable[Outcome], *, experiment: int, step_s: int) -> Arms:
    """Both arms of this experiment, whole and in steps of `step_s`; what is not of it is counted beside them."""
    treated, control = _Tally(), _Tally()
    outside: Counter[str] = Counter()
    step_ms = step_s * 1000
    for call in calls:
        if call.experiment != experiment or not call.user:
            outside.update({"calls": 1, "cost_nusd": call.cost_nusd})
            continue
        arm = treated if call.variant == TREATED else control
        arm.add(call, call.at_ms - call.at_ms % step_ms)
    starts = sorted({*treated.slots, *control.slots})
    steps = [Step(start, treated.slots.get(start, Slot()), control.slots.get(start, Slot())) for start in starts]
    return Arms(treated.arm(), control.arm(), Outside(outside["calls"], outside["cost_nusd"]), steps)
