"""The bench believes an answer only when it is whole."""

import json

import pytest

from bench import wire


def test_the_question_is_about_2_kb_and_names_its_user() -> None:
    question = wire.question(1025, model="qa_agent", stream=False)
    assert 1_800 < len(question) < 2_200
    assert json.loads(question)["user"] == "user-000001"
    assert "stream" not in json.loads(question)


def test_every_question_of_a_kind_has_the_same_length() -> None:
    assert len({len(wire.question(user, model="qa_agent", stream=True)) for user in range(wire.USERS)}) == 1


def test_the_answer_is_about_1_kb_and_whole() -> None:
    assert 950 < len(wire.answer()) < 1_200
    assert wire.is_whole_answer(wire.answer())


@pytest.mark.parametrize("cut", [1, 20, 500])
def test_a_cut_answer_is_not_whole(cut: int) -> None:
    assert not wire.is_whole_answer(wire.answer()[:-cut])


@pytest.mark.parametrize("with_usage", [False, True])
def test_a_stream_of_64_chunks_is_whole_with_or_without_usage(with_usage: bool) -> None:
    events = wire.events(with_usage=with_usage)
    assert len(events) == wire.STREAM_CHUNKS + 1 + with_usage
    assert wire.is_whole_stream(b"".join(events))
    assert wire.is_whole_stream(b": a comment\n\n" + b"".join(events))


@pytest.mark.parametrize("lost", [0, 1, 40, 63, 64])
def test_a_stream_that_lost_an_event_is_not_whole(lost: int) -> None:
    events = wire.events(with_usage=False)
    assert not wire.is_whole_stream(b"".join(events[:lost] + events[lost + 1 :]))


def test_chunks_come_off_as_they_went_on() -> None:
    parts = [b"a", b"\r\n0\r\n", b"x" * 300]
    assert wire.unchunk(b"".join(map(wire.chunked, parts)) + b"0\r\n\r\n") == b"".join(parts)


@pytest.mark.parametrize("raw", [b"", b"5\r\nabc", b"zz\r\nabc\r\n0\r\n\r\n", b"1\r\nabc\r\n0\r\n\r\n"])
def test_broken_chunks_are_refused(raw: bytes) -> None:
    with pytest.raises(ValueError, match=r"not found|literal|line end"):
        wire.unchunk(raw)


@pytest.mark.parametrize(
    "head, expected",
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 12", 12),
        (b"HTTP/1.1 200 OK\r\ncontent-length:3\r\nx: y", 3),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked", wire.CHUNKED_BODY),
        (b"HTTP/1.1 200 OK\r\nx-content-length: 4", wire.UNFRAMED_BODY),
    ],
)
def test_the_length_of_a_body_is_read_from_its_head(head: bytes, expected: int) -> None:
    assert wire.body_length(head + b"\r\n\r\ncontent-length: 99", len(head)) == expected
