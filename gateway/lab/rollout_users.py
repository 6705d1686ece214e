"""A week of calls: users with habits, by day more than by night, in the rhythm and with the lengths of real traffic.

Draws and sends nothing. The hour of the Azure trace (azure.py) is stretched over a day, for its bursts, and thinned by
night, which an hour cannot tell of. The invariant: all chance comes from the generator that is passed in, so a seed is
a week.
"""

from collections.abc import Sequence
from itertools import accumulate
from math import cos, pi
from random import Random
from typing import NamedTuple

from gateway.lab.azure import Row

DAYS = 7
# The calls of a user in a week are spread like this; the standard deviation of a log.
UNEVENNESS = 0.8
# Of all users so many are there from the beginning; the others turn up in the course of these days.
PRESENT, JOINING_DAYS = 0.8, 5.0
# At midnight there is this part of what there is at noon.
NIGHT = 0.2
# Answers are a tenth as long as they were, as all is quicker here.
SHORTER, LEAST_TOKENS, MOST_TOKENS = 10, 3, 60


class Visit(NamedTuple):
    """One call that a user makes. `number` counts the user's own from 1."""

    at_days: float
    agent: str
    user: str
    number: int
    max_tokens: int


class Day(NamedTuple):
    """When calls come in a day, from 0 to 1; the running sum of how likely each of these is; lengths of answers."""

    times: list[float]
    heap: list[float]
    lengths: list[int]


def day_of(trace: Sequence[Row]) -> Day:
    """A day in the rhythm of the trace. Raises ValueError for one without a request."""
    if not trace:
        raise ValueError("a trace without requests has no rhythm")
    whole_s = trace[-1].at_s or 1.0
    times = [row.at_s / whole_s for row in trace]
    light = [NIGHT + (1 - NIGHT) * (1 - cos(2 * pi * at)) / 2 for at in times]
    lengths = [min(MOST_TOKENS, max(LEAST_TOKENS, row.completion_tokens // SHORTER)) for row in trace]
    return Day(times, list(accumulate(light)), lengths)


def week_of(agent: str, day: Day, *, users: int, calls: int, random: Random) -> list[Visit]:
    """About so many calls, in order of time: most users call a few times and on most days, a few call very often."""
    joined = [0.0 if random.random() < PRESENT else random.uniform(0, JOINING_DAYS) for _ in range(users)]
    pace = [random.lognormvariate(0, UNEVENNESS) for _ in range(users)]
    whole = sum(rate * (DAYS - since) for rate, since in zip(pace, joined, strict=True))
    found: list[Visit] = []
    for user, (since, rate) in enumerate(zip(joined, pace, strict=True)):
        times = _times(day, since, calls * rate / whole, random)
        found += [
            Visit(at, agent, f"user-{user:05}", number, random.choices(day.lengths)[0])
            for number, at in enumerate(times, start=1)
        ]
    return sorted(found)


def _times(day: Day, since: float, per_day: float, random: Random) -> list[float]:
    """When one user calls: on each day about `per_day` times, from the moment the user turns up."""
    times = []
    for number in range(int(since), DAYS):
        left = random.expovariate(1)
        while left < per_day:
            at = number + random.choices(day.times, cum_weights=day.heap)[0]
            if at >= since:
                times.append(at)
            left += random.expovariate(1)
    return sorted(times)
