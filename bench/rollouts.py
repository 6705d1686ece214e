"""`python -m bench.rollouts`: how often a whole rollout comes out wrong, and how soon right, over many seeds.

The gateway's own compare and rollout code on weeks that never were: drawn users, simulated time, no HTTP. What is
measured is the decision, with its stages, guardrails and waits; bench/statistics.py measures the comparison alone.
Every week has a seed of its own, so the same options give the same figures. For docs/rollout-proof.md.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from math import inf, isfinite
from typing import NamedTuple

import click
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from scipy.stats import binomtest

from gateway.decide.assign import BUCKETS
from gateway.decide.compare import evidence_of
from gateway.decide.mismatch import chance_of
from gateway.decide.rollout import advance, begin
from gateway.decide.rollout_evidence import Look
from gateway.decide.rollout_plan import RolloutPlan, rollout_plan
from gateway.domain.experiment import GRID_MS, Arrivals, Metric, UserSums
from gateway.domain.policy import Policy
from gateway.domain.reading import Problem, read_struct
from gateway.domain.rollout import Phase, RolloutState

DAYS = 7
DAY_MS = 86_400_000
AGENT = "qa_agent"
# As policies/production.toml ships it, but automatic, and with what a smaller service has in users.
ROLLOUT = {
    "mode": "automatic",
    "stages": [10, 25, 50, 75, 100],
    "holdback_percent": 5,
    "bake_s": 86_400,
    "min_users": 50,
}
# So many of the users are there from the beginning, the others turn up within so many days.
PRESENT, JOINING_DAYS = 0.6, 5.0


class World(NamedTuple):
    """What is true. `success`: the rates of control and treated arm; `slower`, `dearer`: treated over control.

    `likeness`: the correlation of two calls of one user. `dropped`: the part of treated users of whom no call is ever
    recorded. `latency`: the metric of the guardrail on latency.
    """

    success: tuple[float, float] = (0.95, 0.95)
    slower: float = 1.0
    dearer: float = 4.0
    dropped: float = 0.0
    users: int = 2_000
    calls: int = 20_000
    likeness: float = 0.1
    looks_a_day: int = 12
    latency: Metric = "mean_latency"


class Course(NamedTuple):
    """How one week ended. Numbers are those at the first change that decided it, inf where none did.

    `told`: the metrics of which "better" or "worse" was ever said. `share_bps` is the largest there was. `is_mismatch`:
    whether the arms were ever said not to have the users they should.
    """

    phase: Phase
    share_bps: int
    told: frozenset[tuple[Metric, str]]
    is_mismatch: bool
    calls: float
    treated_calls: float
    users: float
    days: float


class Calls(NamedTuple):
    """All calls of a week in order of time. `success`, `ms` and its `cell` have both arms, the control first."""

    at_days: NDArray[np.float64]
    user: NDArray[np.int64]
    success: NDArray[np.bool_]
    ms: NDArray[np.float64]
    cell: NDArray[np.int64]
    nusd: NDArray[np.int64]


def plan_of(world: World) -> RolloutPlan:
    """The plan under test."""
    guardrails = {"success_rate": 0.02, world.latency: 0.20, "cost_per_request": 4.0}
    rollout = {**ROLLOUT, "guardrails": guardrails}
    problems: list[Problem] = []
    table = {"ab_testing": {"enabled": True, "rollout_percentage": 10}, "rollout": rollout}
    policy = read_struct(Policy, table, "", problems)
    if policy is None:
        raise AssertionError(f"BUG: {problems}")
    return rollout_plan(policy, AGENT)


def calls_of(world: World, random: Generator) -> Calls:
    """Draw a week: who calls when, by day more than by night, and how it ends in either arm."""
    joined = np.where(random.random(world.users) < PRESENT, 0, random.uniform(0, JOINING_DAYS, world.users))
    pace = random.lognormal(0, 1, world.users) * (DAYS - joined)
    user = np.repeat(np.arange(world.users), random.poisson(world.calls * pace / pace.sum()))
    at = random.uniform(joined[user], DAYS)
    # A fifth as many at midnight as at noon: the inverse of that density's integral.
    grid = np.linspace(0, 1, 1_000)
    within = np.interp(at % 1, grid - 0.67 * np.sin(2 * np.pi * grid) / (2 * np.pi), grid)
    at = np.floor(at) + within
    order = np.argsort(at, kind="stable")
    at, user = at[order], user[order]
    strength = 1 / world.likeness - 1
    habit = random.beta(world.success[0] * strength, (1 - world.success[0]) * strength, world.users)
    # A drop or a rise is the same part of what can be lost or won for every user, so that the rates are as stated.
    control, treated = world.success
    changed = habit * treated / control if treated < control else 1 - (1 - habit) * (1 - treated) / (1 - control)
    luck = random.random(len(user))
    ms = 800 * np.exp(random.normal(0, 0.25, world.users)[user] + random.normal(0, 0.4, len(user)))
    nusd = (100_000 * np.exp(random.normal(0, 0.5, len(user)))).astype(np.int64)
    success = np.stack([luck < habit[user], luck < changed[user]])
    both = np.stack([ms, ms * world.slower])
    return Calls(at, user, success, both, np.searchsorted(GRID_MS, both, side="right") - 1, nusd)


class _Record:
    """What the store would have: sums by user and stage, and first calls."""

    def __init__(self) -> None:
        self.sums: dict[tuple[int, int], UserSums] = {}
        self._latencies: dict[tuple[int, int], dict[int, int]] = {}
        self._seen: dict[int, list[tuple[int, bool]]] = {}
        self._arrivals: dict[tuple[int, float], list[int]] = {}
        self.calls = self.treated_calls = 0

    def add(self, state: RolloutState, calls: Calls, at: int, *, is_treated: bool, dearer: float) -> None:
        """Count the call at this place."""
        user, arm = int(calls.user[at]), int(is_treated)
        key = (user, state.stage)
        before = self.sums.get(key)
        if before is None:
            self._arrive(user, state, is_treated)
            self._latencies[key] = {}
            before = UserSums(str(user), str(state.stage), is_treated, 0, 0, 0.0, 0, 0, 0.0, self._latencies[key])
        cell = int(calls.cell[arm, at])
        self._latencies[key][cell] = self._latencies[key].get(cell, 0) + 1
        self.sums[key] = before._replace(
            calls=before.calls + 1,
            successes=before.successes + int(calls.success[arm, at]),
            latency_ms=before.latency_ms + float(calls.ms[arm, at]),
            cost_nusd=before.cost_nusd + int(calls.nusd[at] * (dearer if is_treated else 1)),
        )
        self.calls += 1
        self.treated_calls += is_treated

    def _arrive(self, user: int, state: RolloutState, is_treated: bool) -> None:
        earlier = self._seen.setdefault(user, [])
        chance = chance_of(state.share_bps, earlier)
        earlier.append((state.share_bps, is_treated))
        if chance is not None:
            self._arrivals.setdefault((state.stage, chance), [0, 0])[is_treated] += 1

    @property
    def users(self) -> int:
        return len(self._seen)

    def look(self, state: RolloutState, plan: RolloutPlan, now_ms: int) -> Look:
        arrivals = [
            Arrivals(str(stage), chance, treated, control)
            for (stage, chance), (control, treated) in self._arrivals.items()
        ]
        here = [row.is_treated for (_, stage), row in self.sums.items() if stage == state.stage]
        evidence = evidence_of(self.sums.values(), arrivals, plan.terms)
        return Look(evidence, now_ms, state.experiment, state.stage, sum(here), len(here) - sum(here))


def follow(world: World, seed: int) -> Course:
    """One week, looked at every so often by the gateway's own code."""
    random = np.random.default_rng(seed)
    plan = plan_of(world)
    calls = calls_of(world, random)
    buckets = random.integers(0, BUCKETS, world.users)
    is_lost = random.random(world.users) < world.dropped
    state = begin(AGENT, plan=plan, now_ms=0).state
    record = _Record()
    told: set[tuple[Metric, str]] = set()
    share, is_mismatch, made = state.share_bps, False, 0
    for number in range(1, DAYS * world.looks_a_day + 1):
        now_ms = number * DAY_MS // world.looks_a_day
        until = int(np.searchsorted(calls.at_days, number / world.looks_a_day))
        for at in range(made, until):
            is_treated = bool(buckets[calls.user[at]] < state.share_bps)
            if not (is_treated and is_lost[calls.user[at]]):
                record.add(state, calls, at, is_treated=is_treated, dearer=world.dearer)
        made = until
        look = record.look(state, plan, now_ms)
        told |= {(one.metric, one.verdict) for one in look.evidence.findings if one.verdict in ("better", "worse")}
        state = advance(state, look, now_ms=now_ms, plan=plan).state
        share = max(share, state.share_bps)
        is_mismatch |= look.evidence.mismatch.is_found
        if state.phase in (Phase.ROLLED_BACK, Phase.COMPLETED) or (is_mismatch and state.phase is Phase.HOLD):
            days = number / world.looks_a_day
            return Course(
                state.phase, share, frozenset(told), is_mismatch, record.calls, record.treated_calls, record.users, days
            )
    return Course(state.phase, share, frozenset(told), is_mismatch, inf, inf, inf, inf)


def courses(world: World, seeds: int, processes: int = 1) -> list[Course]:
    """So many weeks, each with its own seed."""
    if processes == 1:
        return [follow(world, seed) for seed in range(seeds)]
    with ProcessPoolExecutor(processes) as pool:
        return list(pool.map(follow, [world] * seeds, range(seeds), chunksize=2))


WORLDS = {
    "worse: 95 % → 80 %": World(success=(0.95, 0.80)),
    "worse: 95 % → 90 %": World(success=(0.95, 0.90)),
    "at the margin: 95 % → 93 %": World(success=(0.95, 0.93)),
    "slower: latency × 2": World(slower=2.0),
    "slower: latency + 50 %": World(slower=1.5),
    "dearer: cost × 8": World(dearer=8.0),
    "half of the treated users' calls lost": World(dropped=0.5),
    "a fifth of the treated users' calls lost": World(dropped=0.2),
    "equal: 95 %, same latency": World(),
    "better: 90 % → 95 %, a third less latency": World(success=(0.90, 0.95), slower=0.67),
    "equal, the guardrail is on p95 latency": World(latency="p95_latency"),
    "slower: latency × 2, the guardrail is on p95 latency": World(slower=2.0, latency="p95_latency"),
    "better, the guardrail is on p95 latency": World(success=(0.90, 0.95), slower=0.67, latency="p95_latency"),
}


def _share(count: int, of: int) -> str:
    interval = binomtest(count, of).proportion_ci(method="exact")
    return f"{count} of {of} ({100 * interval.low:.1f} to {100 * interval.high:.1f} %)"


def _row(name: str, world: World, done: Sequence[Course]) -> str:
    count = len(done)

    def how_many(is_so: Callable[[Course], bool]) -> str:
        return _share(sum(map(is_so, done)), count)

    decided = [one for one in done if isfinite(one.calls)]
    middle = [
        f"{np.median([getattr(one, field) for one in decided]):,.{digits}f}" if decided else "–"
        for field, digits in (("calls", 0), ("treated_calls", 0), ("users", 0), ("days", 1))
    ]
    cells = [
        name, how_many(lambda one: one.phase is Phase.ROLLED_BACK), how_many(lambda one: one.share_bps > 1_000),
        how_many(lambda one: one.phase is Phase.COMPLETED), how_many(lambda one: one.is_mismatch),
        how_many(lambda one: not one.told.isdisjoint({("success_rate", "better"), (world.latency, "better")})), *middle,
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--seeds", type=click.IntRange(1, 100_000), default=200, show_default=True)
@click.option("--looks-a-day", type=click.IntRange(1, 1_440), default=12, show_default=True)
@click.option("--processes", type=click.IntRange(1, 64), default=1, show_default=True)
@click.option("--only", help="the worlds whose names contain this")
def main(seeds: int, looks_a_day: int, processes: int, only: str | None) -> None:
    """Simulate weeks of rollouts and print docs/rollout-proof.md's table."""
    click.echo(
        "| the fine-tuned model | rolled back | ever above 10 % | completed | arms said to mismatch "
        "| ever called better | calls until decided: median | treated calls | users | days |"
    )
    click.echo("|---|---|---|---|---|---|---|---|---|---|")
    for name, world in WORLDS.items():
        if only is None or only in name:
            click.echo(_row(name, world, courses(world._replace(looks_a_day=looks_a_day), seeds, processes)))


if __name__ == "__main__":
    main()
