"""`python -m bench.statistics`: how often the comparison is wrong, and how soon it is right, by simulation.

Not a test of code, which tests/decide is: a measurement of the method, for docs/statistics.md. Every experiment has a
seed of its own, so the same options give the same figures.
"""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from math import inf
from typing import NamedTuple

import click
import numpy as np
from scipy.special import betaln

from bench.experiment import Calls, Experiment, World, calls_of, reach_of, rows_at, stages_of
from gateway.decide.compare import KINDS, evidence_of
from gateway.domain.experiment import METRICS, Metric, Terms

TERMS = Terms()
# The price of being looked at all the time is the difference to these: what a look with 1.96 would say.
NAIVE = 1.96
MARGIN = 0.02

EQUAL = {
    "most calls are of new users, share fixed at 50 %": World(
        users=3000, unevenness=0.0, joining=1.0, shares=(5000,), calls=10_000
    ),
    "users return, share fixed at 10 %": World(shares=(1000,)),
    "users return, shares rise": World(),
    "... and users are very unlike each other": World(likeness=0.5, joining=0.1),
    "... and are of very unequal busyness": World(unevenness=1.5),
    "... and the busiest come late": World(latecomers=20.0, likeness=0.3),
    "... and success comes in waves of ±4 points": World(level=0.9, wave=0.04),
    "... and a call in 500 fails": World(level=0.998),
    "each step is taken once the guardrail holds": World(is_cautious=True),
    "mean latency, users return, shares rise": World(is_latency=True, likeness=0.3),
}
UNEQUAL = {
    "95 % → 90 %, at a share of 10 %": World(users=2000, shares=(1000,), effect=-0.05),
    "95 % → 90 %, at a share of 50 %": World(users=2000, shares=(5000,), effect=-0.05),
    "95 % → 93 %, at a share of 10 %": World(users=2000, shares=(1000,), effect=-0.02),
    "95 % → 60 %, at a share of 10 %": World(users=2000, shares=(1000,), effect=-0.35),
    "90 % → 95 %, at a share of 10 %": World(users=2000, shares=(1000,), level=0.9, effect=0.05),
    "latency + 30 %, at a share of 10 %": World(users=2000, shares=(1000,), is_latency=True, likeness=0.3, effect=0.3),
}


class Course(NamedTuple):
    """How one experiment went. Calls are those of both arms before the truth was first excluded, or inf.

    `missed`: the interval did not hold the true difference at some look. `naive`: nor did estimate ± 1.96 se.
    `excluded_calls`: until zero was excluded on the right side. `enough_calls`: until the arms were large enough.
    """

    missed: bool
    naive: bool
    excluded_calls: float
    enough_calls: float


def follow(world: World, seed: int) -> Course:
    """One experiment, looked at after every batch."""
    random = np.random.default_rng(seed)
    calls = calls_of(world, random)
    experiment = Experiment(world.users, world.shares, random)
    true = _true_difference(world, calls)
    missed = naive = False
    excluded = enough = inf
    kind = KINDS["mean_latency" if world.is_latency else "success_rate"]
    tau = kind.tau * 1000 if world.is_latency else kind.tau
    stages = stages_of(world)
    stage, since = 0, 0
    for number in range(world.looks):
        if not world.is_cautious:
            stage = next(stages)
        experiment.add(stage, calls.user[number], calls.outcomes[:, number])
        look = experiment.look(kind.scale)
        if look is None or min(look.users) < TERMS.min_users or look.effective < TERMS.min_effective_users:
            continue
        made = (number + 1) * (world.calls // world.looks)
        enough = min(enough, made)
        half = reach_of(look, tau, TERMS.alpha)
        missed |= abs(look.difference - true) > half
        naive |= abs(look.difference - true) > NAIVE * look.se
        if world.effect and look.difference * np.sign(world.effect) > half:
            excluded = min(excluded, made)
        if world.is_cautious and look.difference - half > -MARGIN and number - since >= world.looks // 20:
            stage, since = min(stage + 1, len(world.shares) - 1), number
    return Course(missed, naive, excluded, enough)


def _true_difference(world: World, calls: Calls) -> float:
    """For rates the effect, less what it is cut by at 0 and 1; for latencies as a part of what was drawn."""
    return float((calls.outcomes[1] - calls.outcomes[0]).mean()) if world.effect else 0.0


def courses(world: World, seeds: int, processes: int = 1) -> list[Course]:
    """So many experiments, each with its own seed."""
    if processes == 1:
        return [follow(world, seed) for seed in range(seeds)]
    with ProcessPoolExecutor(processes) as pool:
        return list(pool.map(follow, [world] * seeds, range(seeds), chunksize=4))


def wrongs(world: World, seed: int) -> dict[Metric, bool]:
    """Of one experiment with equal arms, which metrics the gateway's own code ever told apart, in fifteen looks."""
    looks = tuple(sorted({round(world.looks * part) for part in np.geomspace(0.02, 1, 15)}))
    wrong = dict.fromkeys(METRICS, False)
    for rows in rows_at(world, looks, np.random.default_rng(seed)):
        for finding in evidence_of(rows, [], TERMS).findings:
            wrong[finding.metric] |= finding.verdict in ("better", "worse")
    return wrong


class Alarms(NamedTuple):
    """What the test for a sample-ratio mismatch does: how often it is found, and after how many users (median)."""

    found: float
    users: float


def mismatches(share: float, lost: float, users: int, seeds: int) -> Alarms:
    """Users arrive, a part `lost` of the treated is never seen; the test looks after each."""
    random = np.random.default_rng(1)
    true = share * (1 - lost) / (share * (1 - lost) + 1 - share)
    first = []
    number = np.arange(1, users + 1)
    prior = 100.0
    for _ in range(seeds):
        treated = np.cumsum(random.random(users) < true)
        log_e = betaln(prior * share + treated, prior * (1 - share) + number - treated)
        log_e -= betaln(prior * share, prior * (1 - share))
        log_e -= treated * np.log(share) + (number - treated) * np.log(1 - share)
        over = np.flatnonzero(log_e >= -np.log(TERMS.mismatch_alpha))
        first.append(over[0] + 1 if len(over) else inf)
    return Alarms(float(np.mean(np.isfinite(first))), float(np.median(first)))


def _percent(part: float, of: int) -> str:
    if part == 0:
        return f"none of {of}"
    error = (part * (1 - part) / of) ** 0.5
    return f"{100 * part:.1f} ± {100 * error:.1f} %"


def _calls(number: float) -> str:
    return f"{number:,.0f}" if number < inf else "–"


def _equal(seeds: int, looks: int, processes: int) -> None:
    click.echo("| two equal arms | ever excluded zero | a test at 1.96, ever |\n|---|---|---|")
    for name, world in EQUAL.items():
        done = courses(world._replace(looks=looks), seeds, processes)
        missed, naive = (np.mean([getattr(each, field) for each in done]) for field in ("missed", "naive"))
        click.echo(f"| {name} | {_percent(missed, seeds)} | {100 * naive:.0f} % |")


def _unequal(seeds: int, looks: int, processes: int) -> None:
    click.echo(
        "\n| effect | found | calls until half are found | nine in ten | arms large enough | truth ever missed |"
    )
    click.echo("|---|---|---|---|---|---|")
    for name, world in UNEQUAL.items():
        done = courses(world._replace(looks=looks), seeds, processes)
        calls = [each.excluded_calls for each in done]
        found = float(np.mean(np.isfinite(calls)))
        median, most = (np.quantile(calls, part, method="higher") for part in (0.5, 0.9))
        enough = np.median([each.enough_calls for each in done])
        missed = float(np.mean([each.missed for each in done]))
        click.echo(
            f"| {name} | {100 * found:.0f} % | {median:,.0f} | {most:,.0f} | {enough:,.0f} | {100 * missed:.1f} % |"
        )


def _metrics(seeds: int) -> None:
    click.echo("\n| metric | two equal arms ever told apart, by the gateway's own code |\n|---|---|")
    done = [wrongs(World(looks=1000, calls=20_000), seed) for seed in range(seeds)]
    for metric in METRICS:
        click.echo(f"| {metric} | {_percent(float(np.mean([each[metric] for each in done])), seeds)} |")


def _mismatch(seeds: int) -> None:
    click.echo(
        "\n| share | treated users lost | found within 20,000 users | median number of users |\n|---|---|---|---|"
    )
    for share, lost in ((0.1, 0.0), (0.5, 0.0), (0.1, 0.1), (0.1, 0.3), (0.5, 0.05), (0.5, 0.1)):
        alarms = mismatches(share, lost, 20_000, seeds)
        click.echo(
            f"| {100 * share:.0f} % | {100 * lost:.0f} % | {100 * alarms.found:.2f} % | {_calls(alarms.users)} |"
        )


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--seeds", type=click.IntRange(1, 100_000), default=400, show_default=True)
@click.option("--looks", type=click.IntRange(100, 1_000_000), default=10_000, show_default=True)
@click.option("--processes", type=click.IntRange(1, 64), default=1, show_default=True)
@click.option("--only", type=click.Choice(["equal", "unequal", "metrics", "mismatch"]), multiple=True)
def main(seeds: int, looks: int, processes: int, only: tuple[str, ...]) -> None:
    """Simulate experiments and print docs/statistics.md's tables."""
    parts: dict[str, Callable[[], None]] = {
        "equal": lambda: _equal(seeds, looks, processes),
        "unequal": lambda: _unequal(seeds, looks, processes),
        "metrics": lambda: _metrics(seeds),
        "mismatch": lambda: _mismatch(seeds),
    }
    for name, part in parts.items():
        if not only or name in only:
            part()


if __name__ == "__main__":
    main()
