"""What a routing file may say, and how each mistake in it is put into words."""

import tomllib
from pathlib import Path

import msgspec
import pytest

from gateway.domain.reading import Problem
from gateway.domain.rules import (
    MAX_LOOK_BACK,
    MAX_PATTERN_CHARS,
    MAX_RULES,
    MAX_WHY_CHARS,
    Routing,
    Rule,
    check_routing,
    compile_pattern,
    hours_as_minutes,
)

AGENTS = ["qa_agent", "content_agent", "legal_agent", "support_agent", "analyst_agent"]
SHIPPED = Path(__file__).parents[2] / "policies" / "routing.toml"


def rule(**stated: object) -> Rule:
    given = {"name": "contracts", "agent": "legal_agent", "why": "speaks of law", "any_word": ["nda"], **stated}
    return msgspec.convert(given, Rule)


def problems(*rules: Rule, **stated: object) -> list[Problem]:
    routing = msgspec.convert({"default_agent": "qa_agent", **stated}, Routing)
    return check_routing(msgspec.structs.replace(routing, rules=list(rules)), AGENTS)


def the_problem(*rules: Rule, **stated: object) -> Problem:
    found = problems(*rules, **stated)
    assert len(found) == 1, found
    return found[0]


def test_the_shipped_rules_have_nothing_wrong_with_them() -> None:
    routing = msgspec.convert(tomllib.loads(SHIPPED.read_text()), Routing)
    assert check_routing(routing, AGENTS) == []
    assert {rule.agent for rule in routing.rules} == set(AGENTS)


def test_a_misspelt_key_is_refused_rather_than_ignored() -> None:
    table = {"default_agent": "qa_agent", "rules": [{"name": "a", "agent": "b", "why": "c", "any_words": ["x"]}]}
    with pytest.raises(msgspec.ValidationError, match="any_words"):
        msgspec.convert(table, Routing)


@pytest.mark.parametrize(
    "stated",
    [
        {"any_word": ["log in", "node.js", "droit d'auteur", "Kündigung", "अनुबंध", "5G"]},
        {"any_word": [], "all_words": ["a"]},
        {"any_word": [], "not_word": ["a"]},
        {"any_word": [], "pattern": r"\bc\+\+"},
        {"any_word": [], "metadata": {"team": ""}},
        {"any_word": [], "headers": {"x-team": "*"}},
        {"any_word": [], "tools": False},
        {"any_word": [], "any_tool": ["run_sql"], "tools": True},
        {"any_word": [], "min_chars": 0},
        {"any_word": [], "min_chars": 10, "max_chars": 10},
        {"any_word": [], "hours_utc": "22:00-06:00"},
        {"any_word": [], "hours_utc": "00:00-24:00"},
        {"any_word": [], "weekdays": ["mon", "sun"]},
        {"why": "w" * MAX_WHY_CHARS},
        {"pattern": "x" * MAX_PATTERN_CHARS},
    ],
)
def test_a_rule_that_states_any_one_condition_is_accepted(stated: dict[str, object]) -> None:
    assert problems(rule(**stated)) == []


@pytest.mark.parametrize(
    "stated, key, found, fix",
    [
        ({"name": ""}, ".name", '""', "not a name"),
        ({"name": "a b"}, ".name", '"a b"', "not a name"),
        ({"name": "default"}, ".name", '"default"', "reserved"),
        ({"agent": "legal_agnet"}, ".agent", '"legal_agnet"', 'did you mean "legal_agent"?'),
        ({"agent": "zzz"}, ".agent", '"zzz"', "known: analyst_agent, content_agent"),
        ({"why": " "}, ".why", '" "', "say in a few words"),
        ({"why": "w" * (MAX_WHY_CHARS + 1)}, ".why", "www", f"at most {MAX_WHY_CHARS}"),
        ({"why": "a\nb"}, ".why", '"a\\nb"', "one line"),
        ({"any_word": []}, "", '"contracts"', "states no condition"),
        ({"any_word": ["nda", "!!"]}, ".any_word[1]", '"!!"', "a word or phrase"),
        ({"any_word": ["c++"]}, ".any_word[0]", '"c++"', "use a pattern"),
        ({"any_word": [""]}, ".any_word[0]", '""', "a word or phrase"),
        ({"all_words": ["a\tb"]}, ".all_words[0]", '"a\\tb"', "on one line"),
        ({"all_words": ["a"], "not_word": ["b", "a"]}, ".not_word[1]", '"a"', "never hold"),
        ({"pattern": "("}, ".pattern", '"("', "missing )"),
        ({"pattern": "(?<=a)b"}, ".pattern", '"(?<=a)b"', "no look-around"),
        ({"pattern": r"(a)\1"}, ".pattern", r'"(a)\\1"', "invalid escape sequence"),
        ({"pattern": "a*"}, ".pattern", '"a*"', "empty text"),
        ({"pattern": "x" * (MAX_PATTERN_CHARS + 1)}, ".pattern", "xxx", f"at most {MAX_PATTERN_CHARS}"),
        ({"pattern": "((a{100}){100}){100}"}, ".pattern", "{100}", "RE2"),
        ({"headers": {"X-Team": "*"}}, ".headers", '"X-Team"', "lower case"),
        ({"metadata": {"": "a"}}, ".metadata", '""', "not empty"),
        ({"any_tool": [""]}, ".any_tool[0]", '""', "name of a function"),
        ({"any_tool": ["a"], "tools": False}, ".tools", "false", "never hold"),
        ({"min_chars": -1}, ".min_chars", "-1", "0 or more"),
        ({"min_chars": 11, "max_chars": 10}, ".max_chars", "10", "min_chars (11)"),
        ({"hours_utc": "8-18"}, ".hours_utc", '"8-18"', "HH:MM-HH:MM"),
        ({"hours_utc": "08:00-24:01"}, ".hours_utc", '"08:00-24:01"', "HH:MM-HH:MM"),
        ({"hours_utc": "08:00-08:00"}, ".hours_utc", '"08:00-08:00"', "same minute"),
        ({"weekdays": ["mon", "Tuesday"]}, ".weekdays[1]", '"Tuesday"', 'did you mean "tue"?'),
    ],
)
def test_a_mistake_is_named_with_its_place_and_its_remedy(
    stated: dict[str, object], key: str, found: str, fix: str
) -> None:
    problem = the_problem(rule(name="fine"), rule(**stated))
    assert problem.key == f"rules[1]{key}"
    assert found in problem.found
    assert fix in problem.fix


def test_an_unknown_default_agent_is_told_the_nearest_known_name() -> None:
    problem = the_problem(default_agent="suport_agent")
    assert (problem.key, problem.found) == ("default_agent", '"suport_agent"')
    assert 'did you mean "support_agent"?' in problem.fix


def test_the_second_rule_of_a_name_is_the_one_complained_about() -> None:
    problem = the_problem(rule(), rule(name="other"), rule())
    assert (problem.key, problem.found) == ("rules[2].name", '"contracts"')
    assert "rules[0]" in problem.fix


def test_every_mistake_is_reported_at_once_in_file_order() -> None:
    found = problems(rule(agent="nobody", hours_utc="noon"), rule(name="b", pattern="["), default_agent="x")
    assert [problem.key for problem in found] == [
        "default_agent",
        "rules[0].agent",
        "rules[0].hours_utc",
        "rules[1].pattern",
    ]


@pytest.mark.parametrize("look_back, is_wrong", [(-1, True), (0, False), (MAX_LOOK_BACK, False), (101, True)])
def test_look_back_has_bounds(look_back: int, is_wrong: bool) -> None:
    assert [problem.key for problem in problems(look_back=look_back)] == ["look_back"] * is_wrong


@pytest.mark.parametrize("more, is_wrong", [(0, False), (1, True)])
def test_the_number_of_rules_has_a_bound(more: int, is_wrong: bool) -> None:
    rules = [rule(name=f"r{index}") for index in range(MAX_RULES + more)]
    assert [problem.key for problem in problems(*rules)] == ["rules"] * is_wrong


@pytest.mark.parametrize(
    "hours, minutes",
    [("08:00-18:00", (480, 1080)), ("22:30-06:00", (1350, 360)), ("00:00-24:00", (0, 1440))],
)
def test_hours_are_read_as_minutes_of_the_day(hours: str, minutes: tuple[int, int]) -> None:
    assert hours_as_minutes(hours) == minutes


@pytest.mark.parametrize(
    "hours", ["", "8:00-9:00", "08:00", "08:00-18:60", "24:00-08:00", "08:00 - 18:00", "٠٨:00-18:00"]
)
def test_what_is_no_span_of_hours_is_refused(hours: str) -> None:
    with pytest.raises(ValueError, match="HH:MM"):
        hours_as_minutes(hours)


def test_patterns_ignore_case_unless_told_and_a_dot_crosses_lines() -> None:
    assert compile_pattern("über").search("ÜBER".encode())
    assert not compile_pattern("(?-i)NDA").search(b"nda")
    assert compile_pattern("a.b").search(b"a\nb")


def test_a_bad_pattern_raises_with_the_engine_s_own_reason() -> None:
    with pytest.raises(ValueError, match="missing"):
        compile_pattern("[a")
