"""A text for a regular expression: what is returned matches, and what is not known ends in None."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.simulator.pattern import text_for


@pytest.mark.parametrize(
    "pattern",
    [
        "^[A-Z]{3}$",
        r"^ORD-\d{6}$",
        r"^\+?[1-9]\d{1,14}$",
        r"^(?:red|green)-[^@]+@x\.(?P<tld>com|org)$",
        r"^[\w.-]+@[\w-]+\.[a-z]{2,}$",
        r"^#(?:[0-9a-f]{3}){1,2}$",
        r"^[]x]{2}$",
        "^[[:digit:]]+$",
        r"^\d{4}-\d{2}-\d{2}T\d{2}:\d{2}$",
        r"^\S+ \S+$",
        "^a|b$",
        "^$",
        "^.*?z$",
        "plain words",
        "^[^a-zA-Z0-9]+$",
    ],
)
def test_ordinary_patterns_are_met(pattern: str) -> None:
    text = text_for(pattern, least=0, most=100, words=[])
    assert text is not None
    # Python's engine knows no POSIX classes; for every other pattern it is a second opinion.
    assert "[:" in pattern or re.search(pattern, text)


def test_a_word_that_matches_is_preferred() -> None:
    assert text_for("^[a-z]+$", least=1, most=20, words=["Paris", "refund"]) == "refund"


def test_the_length_is_kept_too() -> None:
    assert text_for("^[0-9]+$", least=12, most=20, words=["1"]) == "0" * 12
    assert text_for("id", least=6, most=6, words=[]) == "idkkkk"
    assert text_for("^[0-9]{5}$", least=0, most=4, words=[]) is None


@pytest.mark.parametrize(
    "pattern", ["(?=a)b", r"(a)\1", "(", "[", "a{2", "*", "a{999999999}", "(" * 5_000, "\\", "(?i)a"]
)
def test_what_is_not_known_or_not_a_pattern_gives_none_or_a_match(pattern: str) -> None:
    text = text_for(pattern, least=0, most=100, words=[])
    assert text is None or re.search(pattern, text)


@given(st.text(alphabet="ab1^$.*+?{}[]()|\\dws-,2:P<>", max_size=20))
def test_any_pattern_ends_quietly(pattern: str) -> None:
    text = text_for(pattern, least=0, most=50, words=["word"])
    assert text is None or len(text) <= 50
