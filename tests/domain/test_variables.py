"""Variables in a table: put in, defaulted, missing, malformed; and the short form for keys."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.domain.variables import Expansion, Missing, is_reference, use_key_variables

ENVIRON = {"SET": "value", "EMPTY": ""}


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("plain", "plain"),
        ("${SET}", "value"),
        ("a ${SET} b ${SET}", "a value b value"),
        ("${SET:-other}", "value"),
        ("${UNSET:-other}", "other"),
        ("${UNSET:-}", ""),
        ("${EMPTY}", ""),
        ("${EMPTY:-other}", "other"),
        ("${UNSET:-http://host:80/v1}", "http://host:80/v1"),
        ("$SET", "$SET"),
    ],
)
def test_a_text_gets_its_variables(text: str, result: str) -> None:
    expansion = Expansion(ENVIRON)
    assert expansion.expand({"key": text}) == {"key": result}
    assert not expansion.missing
    assert not expansion.problems


def test_what_is_missing_is_noted_where_it_stands_and_for_whom() -> None:
    expansion = Expansion(ENVIRON)
    table = {
        "server": {"data": "${A}"},
        "upstreams": {"some.where": {"api_key": "${B}", "timeouts": {"x": "${C}"}}},
        "list": ["${SET}", {"in": "${D}"}],
    }
    found = expansion.expand(table)
    assert expansion.missing == {
        "server.data": Missing("A", ""),
        'upstreams."some.where".api_key': Missing("B", "some.where"),
        'upstreams."some.where".timeouts.x': Missing("C", "some.where"),
        "list[1].in": Missing("D", ""),
    }
    assert found["server"]["data"] == "${A}", "left as it stands"


@pytest.mark.parametrize("text", ["${", "${SET", "${a-b}", "${SET:other}", "${UNSET:-${SET}}", "${}", "${1A}"])
def test_a_beginning_that_begins_no_variable_is_a_problem(text: str) -> None:
    expansion = Expansion(ENVIRON)
    expansion.expand({"key": text})
    assert [problem.key for problem in expansion.problems] == ["key"]


def test_a_value_is_not_expanded_again() -> None:
    expansion = Expansion({"OUTER": "${SET}", **ENVIRON})
    assert expansion.expand({"key": "${OUTER}"}) == {"key": "${SET}"}


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text("ab ${}"), lambda inner: st.lists(inner)))
def test_whatever_stands_there_nothing_but_texts_is_changed(value: Any) -> None:
    expansion = Expansion({})
    found = expansion.expand({"key": value})["key"]
    assert type(found) is type(value)
    if not isinstance(value, str | list):
        assert found == value


def test_a_key_by_the_name_of_its_variable() -> None:
    table: dict[str, Any] = {"upstreams": {"one": {"api_key_env": "KEY"}, "two": {"api_key_env": ""}, "three": "odd"}}
    assert use_key_variables(table) == []
    assert table["upstreams"]["one"]["api_key"] == "${KEY}"
    assert "api_key" not in table["upstreams"]["two"]


def test_a_key_in_the_place_of_a_name_is_refused_and_not_shown() -> None:
    (problem,) = use_key_variables({"upstreams": {"one": {"api_key_env": "sk-live-1234"}}})
    assert problem.key == "upstreams.one.api_key_env"
    assert "sk-live" not in str(problem)


def test_both_ways_at_once_are_a_problem() -> None:
    table = {"upstreams": {"one": {"api_key_env": "KEY", "api_key": "x"}}}
    assert [problem.fix for problem in use_key_variables(table)] == ["give api_key or api_key_env, not both"]


def test_a_reference_is_known_for_one() -> None:
    assert is_reference("${NAME}")
    assert not is_reference("sk-${NAME}")
