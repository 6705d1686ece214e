"""The study itself: small here, with fixed seeds; the full one fills docs/statistics.md."""

from math import inf, isfinite

import pytest
from click.testing import CliRunner

from bench.experiment import World
from bench.statistics import EQUAL, courses, follow, main, mismatches, wrongs

# 300 looks and some hundreds of users, so that fifty experiments take seconds.
QUICK = World(users=600, looks=300, calls=9000, joining=0.3, shares=(2500, 5000, 7500))


def test_equal_arms_are_seldom_told_apart_in_hundreds_of_looks_while_a_plain_test_often_errs() -> None:
    done = courses(QUICK, 40)
    assert all(isfinite(each.enough_calls) for each in done)
    # At a true 0.05, more than 5 of 40 have a chance of 0.02.
    assert sum(each.missed for each in done) <= 5
    assert sum(each.naive for each in done) >= 3


@pytest.mark.parametrize("effect", [-0.3, -0.15])
def test_a_worse_arm_is_found_and_the_interval_keeps_the_truth(effect: float) -> None:
    done = courses(QUICK._replace(effect=effect), 15)
    assert all(each.enough_calls <= each.excluded_calls < inf for each in done)
    assert sum(each.missed for each in done) <= 3


def test_a_larger_effect_is_found_sooner() -> None:
    large, small = (
        sorted(each.excluded_calls for each in courses(QUICK._replace(effect=effect), 9))[4] for effect in (-0.2, -0.06)
    )
    assert large < small


def test_the_mismatch_test_is_silent_on_sound_arrivals_and_finds_lost_ones() -> None:
    sound = mismatches(0.1, 0.0, 5000, 200)
    assert sound.found <= 0.01
    assert mismatches(0.1, 0.4, 5000, 50).found > 0.95
    assert mismatches(0.5, 0.3, 5000, 50).users < mismatches(0.5, 0.15, 5000, 50).users


def test_one_seed_is_one_experiment() -> None:
    world = EQUAL["each step is taken once the guardrail holds"]._replace(looks=200, calls=2000)
    assert follow(world, 1) == follow(world, 1)
    assert courses(world, 2, processes=2) == courses(world, 2)


def test_all_metrics_go_through_the_gateways_own_code() -> None:
    wrong = [wrongs(QUICK._replace(looks=200, calls=4000), seed) for seed in range(4)]
    assert sum(any(each.values()) for each in wrong) <= 2


def test_the_study_prints_its_tables() -> None:
    told = CliRunner().invoke(main, ["--seeds", "2", "--looks", "100", "--only", "mismatch", "--only", "unequal"])
    assert told.exit_code == 0, told.output
    assert "| 95 % → 90 %, at a share of 50 % |" in told.output
    assert "| 50 % | 10 % |" in told.output
