"""The simulator's voice: the same dice say the same, and what is said mentions what was asked."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.simulator.words import (
    LONGEST_WORDS,
    SHORTEST_WORDS,
    Dice,
    code_tokens,
    keywords,
    prose,
    token_estimate,
    word_tokens,
)


def test_equal_keys_throw_equal_dice_and_other_keys_do_not() -> None:
    def thrown(*key: object) -> list[int]:
        dice = Dice(*key)
        return [dice.between(0, 999) for _ in range(20)]

    assert thrown("a", 1) == thrown("a", 1)
    assert thrown("a", 1) != thrown("a", 2)


def test_the_dice_are_the_same_on_every_machine() -> None:
    dice = Dice("golden", 7)
    assert dice.hex(8) == "5fd9d4f8"
    assert [dice.between(0, 9_999) for _ in range(4)] == [3918, 5729, 5276, 4142]


def test_a_throw_stays_between_its_ends_even_where_floats_are_coarse() -> None:
    dice = Dice("ends")
    assert {dice.between(1, 3) for _ in range(200)} == {1, 2, 3}
    assert all(2**60 <= dice.between(2**60, 2**60 + 3) <= 2**60 + 3 for _ in range(100))


def test_shuffling_keeps_every_item() -> None:
    assert sorted(Dice("s").shuffled(range(30))) == list(range(30))


def test_keywords_are_the_telling_words_with_names_first() -> None:
    assert keywords("Could you review the liability clause of our contract with Acme?") == [
        "Acme", "review", "liability", "clause", "contract",
    ]  # fmt: skip
    assert keywords("Compose a post. Hawaii was great") == ["post", "Hawaii", "great"]


@pytest.mark.parametrize("text", ["", "   ", "12 + 30 = ?", "what is that", "\u2028", "a b c"])
def test_a_text_may_have_no_keywords(text: str) -> None:
    assert keywords(text) == []


def test_keywords_of_a_huge_text_are_few_and_short() -> None:
    assert all(len(word) <= 32 for word in keywords("x" * 10_000 + " " + "word " * 100_000))
    assert len(keywords(" ".join(f"word{letter}" for letter in "abcdefghijklmnop"))) == 8


@given(st.text(max_size=300), st.integers())
def test_prose_keeps_its_length_and_says_who_speaks(text: str, seed: int) -> None:
    said = prose(Dice(seed), model="m", text=text, turn=1)
    assert SHORTEST_WORDS <= len(said.split()) <= LONGEST_WORDS
    assert said.startswith("This is the simulator answering for m;")
    assert said == prose(Dice(seed), model="m", text=text, turn=1)


def test_prose_mentions_the_question_the_turn_and_the_tools_result() -> None:
    assert "You asked about refund and invoice." in prose(Dice(1), model="m", text="refund my invoice", turn=1)
    assert "In turn 2 you asked about refund." in prose(Dice(1), model="m", text="refund?", turn=2)
    assert "You wrote: hi." in prose(Dice(1), model="m", text="hi", turn=1)
    told = prose(Dice(1), model="m", text="weather", turn=1, tool_result='{"celsius": 21}')
    assert 'The tool gave back this: {"celsius": 21}.' in told


@given(st.text(max_size=200))
def test_tokens_put_together_are_the_text(text: str) -> None:
    assert "".join(word_tokens(text)) == text
    assert "".join(code_tokens(text)) == text
    assert all(1 <= len(piece) <= 4 for piece in code_tokens(text))


def test_input_tokens_are_four_characters_each_rounded_up() -> None:
    assert [token_estimate(text) for text in ("", "abc", "abcd", "abcde")] == [0, 1, 1, 2]
