"""The experiments of the study: the same formulas as the gateway's, and worlds that are what they say."""

import numpy as np
import pytest

from bench.experiment import Experiment, World, calls_of
from gateway.decide.compare import KINDS, merge
from gateway.decide.ratios import contrast
from gateway.domain.experiment import Metric

SMALL = World(users=300, looks=60, calls=3000)
WORLDS = {
    "rates": SMALL,
    "rare failures": SMALL._replace(level=0.999),
    "no failure": SMALL._replace(level=1 - 1e-12),
    "latency": SMALL._replace(is_latency=True),
    "latecomers": SMALL._replace(latecomers=20.0, unevenness=1.5),
}


@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)
def test_the_study_computes_what_the_gateway_computes(world: World) -> None:
    random = np.random.default_rng(3)
    calls = calls_of(world, random)
    experiment = Experiment(world.users, world.shares, random)
    metric: Metric = "mean_latency" if world.is_latency else "success_rate"
    kind = KINDS[metric]
    looked = 0
    for number in range(world.looks):
        experiment.add(number * len(world.shares) // world.looks, calls.user[number], calls.outcomes[:, number])
        look = experiment.look(kind.scale)
        if number % 6:
            continue
        assert kind.read is not None
        seen = contrast(merge(experiment.rows()), kind.read, scale=kind.scale)
        assert (look is None) == (seen is None)
        if look is not None and seen is not None:
            looked += 1
            assert look.difference == pytest.approx(seen.difference, rel=1e-9, abs=1e-12)
            assert look.se**2 == pytest.approx(seen.variance(), rel=1e-9)
            assert look.freedom == pytest.approx(seen.freedom, rel=1e-9)
            assert look.effective == pytest.approx(seen.effective, rel=1e-9)
            assert look.users == seen.users
    assert looked > 5


def test_calls_of_one_user_are_as_like_each_other_as_stated() -> None:
    world = World(users=4000, looks=100, calls=80_000, unevenness=0.0, joining=0.0, level=0.7, likeness=0.3)
    calls = calls_of(world, np.random.default_rng(1))
    user, outcome = calls.user.ravel(), calls.outcomes[0].ravel()
    count, total = np.bincount(user, minlength=4000), np.bincount(user, outcome, minlength=4000)
    pairs = (count * (count - 1)).sum()
    mean = outcome.mean()
    products = (total * total - np.bincount(user, outcome**2, minlength=4000)).sum() / pairs - mean**2
    assert mean == pytest.approx(0.7, abs=0.02)
    assert products / outcome.var() == pytest.approx(0.3, abs=0.03)


def test_the_same_seed_is_the_same_world() -> None:
    one, same, other = (calls_of(SMALL, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert (one.outcomes == same.outcomes).all()
    assert (one.outcomes != other.outcomes).any()
