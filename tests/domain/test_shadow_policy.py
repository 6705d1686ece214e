"""[shadow]: what would send calls without a cap of their own, or to nobody, is found before it is relied on."""

import tomllib
from pathlib import Path

import pytest

from gateway.domain.policy import Policy, check_policy, shadow_caps
from gateway.domain.reading import Problem, read_struct
from gateway.domain.settings import Settings
from gateway.domain.shadow_policy import Shadow, check_shadow
from tests.planning import CONFIG, read

AGENTS = ("qa_agent", "legal_agent")
POOLS = {"mistral": 1_000, "sim": 40}


def checked(text: str) -> dict[str, str]:
    problems = check_shadow(read(Shadow, text), AGENTS, POOLS)
    return {problem.key: f"{problem.found} {problem.fix}" for problem in problems}


def test_nothing_is_shadowed_unless_somebody_asks_for_it() -> None:
    assert not Shadow().is_on
    assert checked("") == {}
    assert shadow_caps(Shadow()) == shadow_caps(read(Shadow, 'usd = "1.00"')) == []


def test_production_shows_how_it_is_asked_for_and_does_not() -> None:
    text = (Path(__file__).parents[2] / "policies" / "production.toml").read_text(encoding="utf-8")
    assert "shadow" not in tomllib.loads(text)
    _, _, rest = text.partition("# [shadow]\n")
    lines = rest.partition("\n\n")[0].split("\n")
    shown = read(Shadow, "\n".join(line.removeprefix("# ") for line in lines))
    assert shown.is_on
    assert check_shadow(shown, AGENTS, {"mistral": 1_000}) == []


@pytest.mark.parametrize(
    ("text", "key", "said"),
    [
        ("percent = 5", "shadow.usd", 'usd = "1.00"'),
        ('percent = 5\nusd = "0"', "shadow.usd", "percent = 0 says so"),
        ('agents = ["qa_agnet"]', "shadow.agents", '"qa_agnet" no such agent; known: legal_agent, qa_agent'),
        (
            'percent = 5\nusd = "1"\nmax_in_flight = 11',
            "shadow.max_in_flight",
            "11 calls use the 40 connections of upstreams.sim, too; at most 10",
        ),
    ],
)
def test_what_is_wrong_is_said_with_its_place_and_its_remedy(text: str, key: str, said: str) -> None:
    found = checked(text)
    assert list(found) == [key]
    assert said in found[key]


def test_the_largest_number_in_flight_that_leaves_calls_their_connections_is_allowed() -> None:
    assert checked('percent = 5\nusd = "1"\nmax_in_flight = 10') == {}


@pytest.mark.parametrize(
    "text",
    [
        "percent = -1", "percent = 100.5", "percent = nan", 'usd = "-1"', "usd = 1.0", 'per = "week"',
        "max_in_flight = 0", "max_in_flight = 1001", "percentage = 5",
    ],
)  # fmt: skip
def test_what_is_out_of_range_is_refused(text: str) -> None:
    problems: list[Problem] = []
    assert read_struct(Shadow, tomllib.loads(text), "shadow", problems) is None
    assert len(problems) == 1
    assert problems[0].key.startswith("shadow.")


def test_a_cap_that_counts_the_same_as_the_shadows_own_is_found() -> None:
    same = '[[caps]]\nper = "day"\nusd = "5"\nonly = { operation = ["shadow"] }\n'
    on = '[shadow]\npercent = 5\nusd = "1"\n'
    settings = read(Settings, CONFIG)
    (problem,) = check_policy(read(Policy, on + same), settings)
    assert (problem.key, problem.fix) == ("caps[0]", "limits the same as shadow.usd; keep the lower one")
    for other in (same.replace("day", "hour"), same.replace("[[caps]]", '[[caps]]\nscope = "agent"')):
        assert check_policy(read(Policy, on + other), settings) == []
    assert check_policy(read(Policy, same), settings) == []
