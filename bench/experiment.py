"""An experiment that never was: users with habits, assigned by bucket, looked at after every batch of calls.

Not the gateway's code but its formulas on arrays, so that 10,000 looks take a second; tests/bench/test_experiment.py
holds the two against each other. Its one invariant: all chance comes from the generator that is passed in.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from gateway.decide.assign import BUCKETS
from gateway.decide.intervals import MIN_FREEDOM, threshold
from gateway.domain.experiment import GRID_MS, UserSums

Floats = NDArray[np.float64]
RAMP = (1000, 2500, 5000, 7500, 9500)


class World(NamedTuple):
    """What is true. Success rates unless `is_latency`; then latencies around 1,000 ms.

    `likeness`: the correlation of two calls of one user. `unevenness`: the spread of the logs of how busy users are.
    `joining`: the part of all looks during which users turn up. `latecomers`: how many times busier those are who turn
    up in the second half. `wave`: how far the rate of all users swings, fifty times over. `effect`: treated - control.
    """

    users: int = 1000
    looks: int = 10_000
    calls: int = 50_000
    shares: tuple[int, ...] = RAMP
    level: float = 0.95
    likeness: float = 0.1
    unevenness: float = 1.0
    joining: float = 0.5
    latecomers: float = 1.0
    wave: float = 0.0
    effect: float = 0.0
    is_latency: bool = False
    is_cautious: bool = False


class Look(NamedTuple):
    """What one look saw: the difference, its standard error, what the threshold needs, and if there were enough."""

    difference: float
    se: float
    freedom: float
    effective: float
    users: tuple[int, int]


class Calls(NamedTuple):
    """All calls in order: whose, and how each would end in the control and in the treated arm. Shape (looks, calls)."""

    user: NDArray[np.int64]
    outcomes: Floats


def calls_of(world: World, random: Generator) -> Calls:
    """Draw who calls when, and how it ends in either arm: outcomes have shape (2, looks, calls)."""
    shape = (world.looks, world.calls // world.looks)
    joined = np.sort(random.uniform(0, world.joining * world.looks, world.users))
    joined[: max(1, world.users // 50)] = 0
    rates = random.lognormal(0, world.unevenness, world.users)
    rates[world.users // 2 :] *= world.latecomers
    heap = np.cumsum(rates)
    present = np.searchsorted(joined, np.arange(world.looks), side="right")
    user = np.searchsorted(heap, random.random(shape) * heap[present - 1][:, None], side="right")
    swing = world.wave * np.sin(np.linspace(0, 100 * np.pi, world.looks))[:, None]
    if world.is_latency:
        habits = np.exp(random.normal(0, 0.6 * np.sqrt(world.likeness), world.users))
        plain = 1000 * habits[user] * np.exp(random.normal(0, 0.6 * np.sqrt(1 - world.likeness), shape)) * (1 + swing)
        return Calls(user, np.stack([plain, plain * (1 + world.effect)]))
    strength = 1 / world.likeness - 1
    habits = random.beta(world.level * strength, (1 - world.level) * strength, world.users)
    luck = random.random(shape)
    plain = habits[user] + swing
    return Calls(user, np.stack([luck < plain, luck < plain + world.effect]).astype(float))


class Experiment:
    """The running sums of one experiment, by stage and user, and what the formulas of decide/ratios.py make of them.

    Where arms have an axis, the control is at 0 and the treated arm at 1.
    """

    def __init__(self, users: int, shares: tuple[int, ...], random: Generator) -> None:
        buckets = random.integers(0, BUCKETS, users)
        stages = len(shares)
        self.treated = np.array([buckets < share for share in shares])
        self.arms = np.stack([~self.treated, self.treated], axis=1).astype(float)
        self.calls, self.totals = np.zeros((stages, users)), np.zeros((stages, users))
        self.influence, self.busyness = np.zeros((stages, 2, users)), np.zeros((stages, 2, users))
        self.ratios, self.sizes = np.zeros((stages, 2)), np.zeros((stages, 2))
        self.weights = np.zeros(stages)

    def add(self, stage: int, user: NDArray[np.int64], outcomes: Floats) -> None:
        """Count a batch of calls; `outcomes` has those of both arms."""
        calls, totals, arms = self.calls[stage], self.totals[stage], self.arms[stage]
        np.add.at(calls, user, 1)
        np.add.at(totals, user, np.where(self.treated[stage, user], outcomes[1], outcomes[0]))
        if (arms @ (calls > 0)).min() < 2:
            return
        sizes = arms @ calls
        ratios = arms @ totals / sizes
        mine = arms * calls
        self.ratios[stage], self.sizes[stage] = ratios, sizes
        self.weights[stage] = sizes[0] * sizes[1] / (sizes[0] + sizes[1])
        self.influence[stage] = arms * (totals - ratios[:, None] * calls) / (sizes[:, None] - mine)
        self.busyness[stage] = mine / sizes[:, None]

    def look(self, scale: float | None = 1.0) -> Look | None:
        """What the calls so far say; None where no stage has two users in both arms."""
        whole = self.weights.sum()
        if not whole:
            return None
        last = int(np.flatnonzero(self.weights)[-1]) + 1
        weights = self.weights[:last] / whole
        values = weights @ self.ratios[:last]
        users = self.arms.shape[2]
        influence = (weights @ self.influence[:last].reshape(last, -1)).reshape(2, users)
        busyness = (weights @ self.busyness[:last].reshape(last, -1)).reshape(2, users)
        squares = influence * influence
        sums, fourths = squares.sum(axis=1), (squares * squares).sum(axis=1)
        seen = np.count_nonzero(busyness, axis=1)
        opened = self.sizes[self.weights > 0].sum(axis=0)
        extras = _one_more(sums, fourths, opened, values, seen, scale)
        square = (influence[1] - influence[0]) ** 2
        variance = float(square.sum()) + sum(extras)
        fourth = float(square @ square) + extras[0] ** 2 + extras[1] ** 2
        freedom = max(MIN_FREEDOM, 2 * variance * variance / fourth) if fourth > 0 else MIN_FREEDOM
        effective = float(1 / (busyness * busyness).sum(axis=1).max())
        return Look(
            float(values[1] - values[0]), float(np.sqrt(variance)), freedom, effective, (int(seen[0]), int(seen[1]))
        )

    def rows(self) -> list[UserSums]:
        """The same as the gateway's store would give it."""
        return [
            UserSums(
                f"u{user}", str(stage), bool(self.treated[stage, user]), int(self.calls[stage, user]),
                round(self.totals[stage, user]), self.totals[stage, user], 0,
            )
            for stage, user in np.argwhere(self.calls > 0)
        ]  # fmt: skip


def rows_at(world: World, looks: tuple[int, ...], random: Generator) -> Iterator[list[UserSums]]:
    """An experiment with all five metrics, as the gateway's store would give it after so many of `world.looks`.

    Users differ in each metric; `world.effect` is on success alone. A tenth of calls have feedback.
    """
    calls = calls_of(world, random)
    user = calls.user.ravel()
    spread = 0.6 * np.sqrt([world.likeness, 1 - world.likeness])
    latency, cost = (
        np.exp(random.normal(mean, spread[0], world.users)[user] + random.normal(0, spread[1], user.size))
        for mean in (7.0, 12.0)
    )
    pleased = random.uniform(0.3, 1, world.users)[user]
    has_score = random.random(user.size) < 0.1
    score = np.where(random.random(user.size) < pleased, 1.0, -1.0) * has_score
    stage = np.repeat(list(stages_of(world)), world.calls // world.looks)
    shares = np.array(world.shares)[stage]
    is_treated = random.integers(0, BUCKETS, world.users)[user] < shares
    success = np.where(is_treated, calls.outcomes[1].ravel(), calls.outcomes[0].ravel())
    cell = np.searchsorted(GRID_MS, latency, side="right") - 1
    columns = np.stack([np.ones(user.size), success, latency, np.round(cost), has_score, score])
    for look in looks:
        some = slice(0, look * (world.calls // world.looks))
        yield _rows(stage[some], user[some], is_treated[some], columns[:, some], cell[some])


def _rows(
    stage: NDArray[np.int64],
    user: NDArray[np.int64],
    is_treated: NDArray[np.bool_],
    columns: Floats,
    cell: NDArray[np.int64],
) -> list[UserSums]:
    _, first, group = np.unique(stage * (user.max() + 1) + user, return_index=True, return_inverse=True)
    sums = [np.bincount(group, column) for column in columns]
    latencies: list[dict[int, int]] = [{} for _ in first]
    pairs, counts = np.unique(group * len(GRID_MS) + cell, return_counts=True)
    for pair, count in zip(pairs.tolist(), counts.tolist(), strict=True):
        latencies[pair // len(GRID_MS)][pair % len(GRID_MS)] = count
    return [
        UserSums(
            f"u{user[at]}", str(stage[at]), bool(is_treated[at]), round(sums[0][row]), round(sums[1][row]),
            float(sums[2][row]), round(sums[3][row]), round(sums[4][row]), float(sums[5][row]), latencies[row],
        )
        for row, at in enumerate(first)
    ]  # fmt: skip


def stages_of(world: World) -> Iterator[int]:
    """The stage at each look: each lasts longer than the one before, as 1, 3, 5, 7 and 9."""
    count = len(world.shares)
    ends = [world.looks * (stage + 1) ** 2 / count**2 for stage in range(count)]
    stage = 0
    for number in range(world.looks):
        while number >= ends[stage]:
            stage += 1
        yield stage


def reach_of(look: Look, tau: float, alpha: float) -> float:
    """Half the interval at this look."""
    return look.se * threshold((tau / look.se) ** 2, alpha, look.freedom)


def _one_more(
    sums: Floats, fourths: Floats, sizes: Floats, values: Floats, users: NDArray[np.int64], scale: float | None
) -> list[float]:
    extras = []
    for arm in (0, 1):
        other = 1 - arm
        if sums[arm] > 0:
            extras.append(float(fourths[arm] / sums[arm]))
        elif sums[other] > 0:
            extras.append(float(fourths[other] / sums[other] * (sizes[other] / sizes[arm]) ** 2))
        else:
            extras.append(float(((abs(values[arm]) if scale is None else scale) / users[arm]) ** 2))
    return extras
