"""The study of whole rollouts: small here, with fixed seeds; the full one fills docs/rollout-proof.md."""

from math import inf
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from bench.rollouts import AGENT, World, calls_of, courses, follow, main, plan_of
from gateway.config import Paths, load
from gateway.domain.rollout import Phase

# Three looks a day at a quarter of the calls, so that a week takes a fifth of a second.
QUICK = World(users=700, calls=5_000, looks_a_day=3)


def test_equal_models_are_not_taken_back() -> None:
    done = courses(QUICK._replace(users=1_200), 8)
    # Each with probability 0.05 at most.
    assert sum(one.phase is Phase.ROLLED_BACK for one in done) <= 2
    assert sum(("success_rate", "worse") in one.told or ("success_rate", "better") in one.told for one in done) <= 2
    assert not any(one.is_mismatch for one in done)


@pytest.mark.parametrize("world", [World(success=(0.95, 0.60)), World(slower=3.0)])
def test_a_worse_model_is_taken_back_at_the_first_stage(world: World) -> None:
    done = courses(world._replace(looks_a_day=3), 5)
    assert all(one.phase is Phase.ROLLED_BACK and one.share_bps == 1_000 for one in done)
    assert max(one.calls for one in done) < world.calls / 2
    assert all(30 <= one.treated_calls < one.calls / 5 for one in done)


def test_a_better_model_climbs_and_a_stage_lasts_a_day_at_least() -> None:
    done = courses(
        QUICK._replace(success=(0.80, 0.97), slower=0.4, dearer=1.0, users=1_500, calls=12_000),
        3,
    )
    assert all(one.share_bps >= 7_500 for one in done)
    # Five stages of a day each.
    assert all(one.days >= 5 for one in done)
    assert not any(one.phase is Phase.ROLLED_BACK for one in done)


def test_lost_users_are_found_and_stop_the_rollout() -> None:
    done = courses(World(dropped=0.7, looks_a_day=3), 5)
    assert all(one.is_mismatch and one.phase is Phase.HOLD and one.share_bps == 1_000 for one in done)
    assert all(one.users < inf for one in done)


def test_a_seed_is_a_week() -> None:
    world = QUICK._replace(success=(0.95, 0.6))
    assert follow(world, 3) == follow(world, 3)
    assert courses(world, 2, processes=2) == courses(world, 2)


@pytest.mark.parametrize("rates", [(0.95, 0.95), (0.95, 0.80), (0.90, 0.95)])
def test_the_worlds_are_what_they_say(rates: tuple[float, float]) -> None:
    world = World(success=rates, slower=1.5, users=20_000, calls=200_000)
    calls = calls_of(world, np.random.default_rng(1))
    assert calls.success.mean(axis=1) == pytest.approx(rates, abs=0.005)
    assert calls.ms[1] == pytest.approx(1.5 * calls.ms[0])
    assert (np.diff(calls.at_days) >= 0).all()
    assert len(calls.user) == pytest.approx(200_000, rel=0.02)
    hours = np.bincount((calls.at_days % 1 * 24).astype(int))
    assert hours[12] > 2 * hours[0]


def test_the_plan_is_productions_but_for_its_mode_and_numbers() -> None:
    files = Paths(Path("config.toml"), Path("policies"))
    shipped = load(files, "production", litellm_map={}, want_secrets=False).plan.rollouts[AGENT]
    assert plan_of(World()) == shipped._replace(
        is_automatic=True, stages=tuple(stage._replace(min_users=50) for stage in shipped.stages), longest_ms=0
    )


def test_the_study_prints_its_table() -> None:
    told = CliRunner().invoke(main, ["--seeds", "2", "--looks-a-day", "2", "--only", "80 %"])
    assert told.exit_code == 0, told.output
    assert "| worse: 95 % → 80 % | " in told.output
    assert "2 (" in told.output
