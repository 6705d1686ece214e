"""Joining two streams: to the letter, or not at all."""

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.domain.splice import Delivered, Mismatch, Splice, read_delivered, respliced

TEXT = st.text("ab ä😀", max_size=12)


def chunk(delta: dict[str, Any] | None = None, finish: str | None = None, **more: Any) -> bytes:
    choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": finish}]
    return msgspec.json.encode({"id": "one", "model": "m", "choices": choices, **more})


def cut_up(text: str, sizes: list[int]) -> list[str]:
    pieces, at = [], 0
    for size in sizes:
        pieces.append(text[at : at + size])
        at += size
    return [*pieces, text[at:]]


def test_what_went_out_is_read_back_as_text() -> None:
    events = [chunk({"role": "assistant", "content": ""}), chunk({"content": "Hel"}), chunk({"content": "lo"})]
    assert read_delivered(events) == Delivered("Hello", "one")
    assert read_delivered([]) == Delivered("", "")


@pytest.mark.parametrize(
    "delta",
    [
        {"tool_calls": [{"index": 0, "function": {"arguments": "{"}}]},
        {"function_call": {"name": "f"}},
        {"refusal": "no"},
    ],
)
def test_what_is_not_text_cannot_be_joined(delta: dict[str, Any]) -> None:
    assert read_delivered([chunk({"content": "a"}), chunk(delta)]) is None
    with pytest.raises(Mismatch):
        respliced(chunk(delta), Splice("a", is_continued=True), "one")


def test_several_choices_cannot_be_joined() -> None:
    second = msgspec.json.encode({"choices": [{"index": 1, "delta": {"content": "b"}}]})
    assert read_delivered([chunk({"content": "a"}), second]) is None


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b"null", b'{"choices":7}', b'{"choices":[{"delta":"x"}]}', b'{"choices":[{"delta":[]}]}',
     b'{"choices":[{"delta":{"content":"\xff"}}]}', b'{"choices":[{"delta":{"content":"\\ud83d"}}]}',
     b'{"choices":[{"delta":{"content":["a"]}}]}', b'{"choices":[{"delta":{"content":7}}]}',
     b'{"choices":[{"delta":{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}}]}"],
)  # fmt: skip
def test_what_cannot_be_read_as_text_is_not_joined_and_does_nothing_worse(data: bytes) -> None:
    assert read_delivered([chunk({"content": "a"}), data]) is None


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b'{"choices":[{"delta":"x"}]}', b'{"choices":[{"delta":{"content":"\xff"}}]}',
     b'{"choices":[{"delta":{"content":"\\ud83d"}}]}', b'{"choices":[{"delta":{"content":["a"]}}]}',
     b'{"choices":[],"x":1e999}', b'{"choices":[{"index":1,"delta":{"content":"a"}}]}',
     b'{"choices":[{"delta":{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}}]}"],
)  # fmt: skip
@pytest.mark.parametrize("is_continued", [False, True])
def test_a_second_stream_that_cannot_be_read_is_a_mismatch(data: bytes, is_continued: bool) -> None:
    for delivered in ("", "a"):
        with pytest.raises(Mismatch):
            respliced(data, Splice(delivered, is_continued=is_continued), "one")


def test_nulls_are_the_same_as_nothing() -> None:
    null = msgspec.json.encode({"id": None, "choices": [{"index": None, "delta": None, "finish_reason": None}]})
    ended = msgspec.json.encode({"id": None, "choices": [{"index": 0, "delta": None, "finish_reason": "stop"}]})
    nothing = msgspec.json.encode({"id": None, "choices": None})
    content = chunk({"content": None, "tool_calls": None, "refusal": None})
    assert read_delivered([null, nothing, content, chunk({"content": "a"}), ended]) == Delivered("a", "one")
    splice = Splice("a", is_continued=False)
    assert respliced(null, splice, "one") is None
    assert respliced(chunk({"content": "a"}), splice, "one") is None
    last = respliced(ended, splice, "one")
    assert last is not None
    assert msgspec.json.decode(last) == {
        "id": "one",
        "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}],
    }


def test_the_first_streams_id_is_kept_and_where_it_had_none_the_seconds() -> None:
    both = [chunk({"content": "a"}, id="first"), chunk({"content": "b"}, id="other")]
    assert read_delivered(both) == Delivered("ab", "first")
    gone_on = respliced(chunk({"content": "c"}, id="two"), Splice("", is_continued=False), "")
    assert gone_on is not None
    assert msgspec.json.decode(gone_on)["id"] == "two"


def test_what_a_caller_reads_after_a_join_is_what_one_stream_would_have_said() -> None:
    words = ["The ", "capital ", "is ", "Paris", "."]
    first = [chunk({"role": "assistant", "content": ""}), *(chunk({"content": word}) for word in words[:4])]
    delivered = read_delivered(first)
    assert delivered is not None
    for splice, second in (
        (Splice(delivered.text, is_continued=False), words),
        (Splice(delivered.text, is_continued=True), words),
        (Splice(delivered.text, is_continued=True), words[4:]),
    ):
        events = [chunk({"content": word}, id="two") for word in second] + [chunk({}, "stop", id="two")]
        joined = [data for data in (respliced(one, splice, delivered.id) for one in events) if data is not None]
        assert read_delivered([*first, *joined]) == Delivered("".join(words), "one")
        assert [msgspec.json.decode(data)["choices"][0]["finish_reason"] for data in joined].count("stop") == 1
        assert splice.end() == ""


@given(TEXT, TEXT, st.lists(st.integers(0, 4), max_size=8))
def test_a_restarted_answer_that_repeats_gives_exactly_the_rest(first: str, rest: str, sizes: list[int]) -> None:
    splice = Splice(first, is_continued=False)
    out = "".join(splice.feed(piece) for piece in cut_up(first + rest, sizes))
    assert out + splice.end() == rest


@given(TEXT, TEXT, st.lists(st.integers(0, 4), max_size=8))
def test_a_restarted_answer_that_differs_never_lets_anything_out(first: str, second: str, sizes: list[int]) -> None:
    splice = Splice(first, is_continued=False)
    out = ""
    try:
        for piece in cut_up(second, sizes):
            out += splice.feed(piece)
        splice.end()
    except Mismatch:
        assert not second.startswith(first)
        assert out == ""
    else:
        assert second.startswith(first)


@given(TEXT, TEXT, st.lists(st.integers(0, 4), max_size=8))
def test_a_continued_answer_may_repeat_what_went_out_or_not(first: str, rest: str, sizes: list[int]) -> None:
    # Long enough to tell a repetition from a beginning.
    first = "once upon a time" + first
    repeating = Splice(first, is_continued=True)
    assert "".join(repeating.feed(piece) for piece in cut_up(first + rest, sizes)) + repeating.end() == rest
    if not rest.startswith(first):
        going_on = Splice(first, is_continued=True)
        assert "".join(going_on.feed(piece) for piece in cut_up(rest, sizes)) + going_on.end() == rest


def test_chunks_go_out_under_the_first_streams_id_and_without_a_second_role() -> None:
    splice = Splice("Hello", is_continued=False)
    second = [
        chunk({"role": "assistant", "content": ""}, id="two"),
        chunk({"content": "Hel"}, id="two"),
        chunk({"content": "lo wor"}, id="two"),
        chunk({"content": "ld"}, id="two"),
        chunk({}, "stop", id="two"),
        chunk(None, id="two", usage={"prompt_tokens": 1}),
    ]
    out = [respliced(data, splice, "one") for data in second]
    assert out[:2] == [None, None]
    kept = [msgspec.json.decode(data) for data in out if data is not None]
    assert [one["id"] for one in kept] == ["one"] * 4
    assert [one["choices"][0]["delta"] for one in kept[:3]] == [{"content": " wor"}, {"content": "ld"}, {}]
    assert kept[2]["choices"][0]["finish_reason"] == "stop"
    assert kept[3]["usage"] == {"prompt_tokens": 1}


def test_a_second_answer_that_ends_too_early_is_a_mismatch() -> None:
    splice = Splice("Hello", is_continued=False)
    assert respliced(chunk({"content": "Hel"}), splice, "one") is None
    with pytest.raises(Mismatch):
        respliced(chunk({}, "stop"), splice, "one")


def test_text_held_back_goes_out_with_the_finish() -> None:
    splice = Splice("ab" * 8, is_continued=True)
    assert respliced(chunk({"content": "a"}), splice, "one") is None
    last = respliced(chunk({}, "stop"), splice, "one")
    assert last is not None
    assert msgspec.json.decode(last)["choices"][0]["delta"] == {"content": "a"}


def test_a_short_text_must_be_repeated_since_a_beginning_could_look_like_it() -> None:
    # "10" goes on with "100": dropping what looks like a repetition would turn 10100 into 100.
    splice = Splice("10", is_continued=True)
    with pytest.raises(Mismatch):
        splice.feed("7")
    assert Splice("10", is_continued=True).feed("100") == "0"
