"""Questions are read line by line, and dealt out evenly."""

from collections import Counter
from pathlib import Path

import pytest

from gateway.lab.questions import Question, deal, read_questions

ROOT = Path(__file__).parents[2]
MT_BENCH = ROOT / "tests" / "data" / "mt_bench_questions.jsonl"


def some(count: int) -> list[Question]:
    return [Question(question_id=number, category="any", turns=(f"q{number}",)) for number in range(count)]


def test_mt_bench_is_eighty_questions_of_two_turns_in_eight_categories() -> None:
    questions = read_questions(MT_BENCH)
    assert [question.question_id for question in questions] == list(range(81, 161))
    assert {len(question.turns) for question in questions} == {2}
    assert set(Counter(question.category for question in questions).values()) == {10}


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("", "holds no question"),
        ("\n \n", "holds no question"),
        ('{"question_id": 1, "category": "a", "turns": ["x"]}\n\n{"question_id": 2', ":3: not a question"),
        ('{"question_id": 1, "category": "a", "turns": []}', ":1: not a question"),
        ('{"question_id": 1, "category": "a", "turns": "x"}', ":1: not a question"),
        ("[]", ":1: not a question"),
        ('{"question_id": 1, "category": "\udc80", "turns": ["x"]}', ":1: not a question"),
    ],
)
def test_a_file_that_is_not_questions_is_refused_with_its_line(tmp_path: Path, text: str, complaint: str) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=complaint):
        read_questions(file)


def test_a_file_that_is_not_there_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_questions(tmp_path / "nowhere.jsonl")


def test_the_demo_asks_every_question_equally_often_and_in_both_ways() -> None:
    questions = read_questions(MT_BENCH)
    dealt = deal(questions, users=200, each=4)
    assert len(dealt) == 800
    assert set(Counter(one.question for one in dealt).values()) == {10}
    assert set(Counter(one.user for one in dealt).values()) == {4}
    assert Counter(one.stream for one in dealt) == {True: 400, False: 400}
    assert Counter(one.wants_usage for one in dealt if one.stream) == {True: 200, False: 200}
    for question in questions:
        assert {one.stream for one in dealt if one.question == question} == {True, False}


@pytest.mark.parametrize("users, count, each", [(1, 1, 1), (3, 1, 4), (10, 8, 4), (7, 5, 5), (200, 80, 4), (5, 81, 4)])
def test_nobody_gets_a_question_twice_while_there_are_others(users: int, count: int, each: int) -> None:
    dealt = deal(some(count), users=users, each=each)
    assert len(dealt) == users * each
    for user in {one.user for one in dealt}:
        asked = {one.question for one in dealt if one.user == user}
        assert len(asked) == min(each, count)


def test_dealing_again_gives_the_same() -> None:
    assert deal(some(9), users=5, each=3) == deal(some(9), users=5, each=3)
