"""What an experiment saw and what was concluded from it, as values; and the grid on which latencies are counted.

No arithmetic of statistics (decide/compare.py, decide/mismatch.py), no policy. Its one invariant: every number here is
finite; where there is nothing to say, or no bound, it is None.
"""

from bisect import bisect_right
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple, TypeAlias, get_args

Metric: TypeAlias = Literal["success_rate", "mean_latency", "p95_latency", "cost_per_request", "satisfaction"]
METRICS: tuple[Metric, ...] = get_args(Metric)
Verdict: TypeAlias = Literal["better", "worse", "undecided", "too few"]
GuardVerdict: TypeAlias = Literal["holds", "breached", "undecided", "too few", "none"]

# Latencies are counted in cells of 5 %, from 1 ms to 100 minutes; what is faster or slower is in the first or last.
GRID_RATIO = 1.05
GRID_MS: tuple[float, ...] = tuple(GRID_RATIO**cell for cell in range(320))
_NO_LATENCIES: Mapping[int, int] = MappingProxyType({})


def bucket_of_ms(ms: float) -> int:
    """The cell of the grid that a latency falls into, 0 to 319."""
    return max(0, bisect_right(GRID_MS, ms) - 1)


class UserSums(NamedTuple):
    """All calls of one user in one stage and one arm.

    `stage` names the stratum within which arms are compared: a time with one share, of one agent; "qa_agent/3", say.
    `latency_ms` and `cost_nusd` are sums over the calls; `scores` counts the calls with feedback, `score_sum` adds up
    their scores, each -1 to 1; `latencies` counts calls by `bucket_of_ms`. Several rows of the same user add up.
    """

    user: str
    stage: str
    is_treated: bool
    calls: int
    successes: int
    latency_ms: float
    cost_nusd: int
    scores: int = 0
    score_sum: float = 0.0
    latencies: Mapping[int, int] = _NO_LATENCIES


class Arrivals(NamedTuple):
    """Users at their first call in a stage, among those of whom the share that must be treated is known.

    Of calls that began so long ago that they must have ended, or those of the slower arm would be missing.
    `share` (0 to 1, both excluded) is that of `decide/mismatch.py:chance_of`, given what earlier stages told of the
    user. Users of whom they told everything are in no row. `stratum` is for people to read.
    """

    stratum: str
    share: float
    treated: int
    control: int


class Guardrail(NamedTuple):
    """How much worse than the control the treated arm may be: `margin` >= 0, in the metric's unit or as a ratio."""

    metric: Metric
    margin: float
    is_relative: bool = False


class Terms(NamedTuple):
    """What is asked of a comparison before it starts.

    `alpha` is the probability that anything that is acted upon is ever wrong; it is shared out among the guardrails.
    An arm with fewer users than `min_users`, or whose calls come as if from fewer than `min_effective_users` equally
    busy ones, is too small to say anything.
    """

    guardrails: tuple[Guardrail, ...] = ()
    alpha: float = 0.05
    min_users: int = 30
    min_effective_users: float = 10.0
    mismatch_alpha: float = 0.001


class Finding(NamedTuple):
    """One metric, treated arm against control.

    Units: success rate 0 to 1, latencies in ms, cost in nano-dollars per call, satisfaction -1 to 1. `difference` is
    treated minus control, so its sign says nothing of good or bad: `verdict` does. `relative` is it over the control.
    The intervals hold at all times at once with probability 1 - `alpha`. None: unbounded, or too few to say.
    `users` and `calls` are those which count for this metric: with feedback for satisfaction, say.
    """

    metric: Metric
    verdict: Verdict
    guard: GuardVerdict
    treated: float | None = None
    control: float | None = None
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    relative: float | None = None
    relative_low: float | None = None
    relative_high: float | None = None
    users_treated: int = 0
    users_control: int = 0
    calls_treated: int = 0
    calls_control: int = 0
    alpha: float = 0.05
    guardrail: Guardrail | None = None


class Mismatch(NamedTuple):
    """Whether users arrive in the arms in the shares they were assigned in.

    `e_value`: the evidence against it; by chance it ever reaches x with probability 1/x at most. `users` are those
    who counted, `expected_share` and `seen_share` the part of them that should have been, and was, treated.
    """

    is_found: bool
    e_value: float
    expected_share: float | None
    seen_share: float | None
    users: int


class Evidence(NamedTuple):
    """All that a decision about a rollout may rest on. One finding for each of METRICS, in that order.

    `users_*` are all users seen in an arm; one who was moved from one to the other is counted in both.
    """

    findings: tuple[Finding, ...]
    users_treated: int
    users_control: int
    mismatch: Mismatch
