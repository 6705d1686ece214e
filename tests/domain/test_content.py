"""A call's texts as spans show them: every text scrubbed and bounded, and whatever comes, some list of messages."""

from json import dumps
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.domain.content import MAX_MESSAGES, asked, input_messages, output_messages, read_choices
from gateway.domain.wire import raw


def shown(messages: Any, max_chars: int = 100) -> Any:
    return msgspec.json.decode(input_messages(raw(messages), max_chars=max_chars))


def test_messages_are_written_as_the_conventions_write_them() -> None:
    weather = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
    assert shown(
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "What is it?"}, {"type": "image_url"}]},
            {"role": "assistant", "content": None, "tool_calls": [weather]},
            {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
        ]
    ) == [
        {"role": "system", "parts": [{"type": "text", "content": "Be brief."}]},
        {"role": "user", "parts": [{"type": "text", "content": "What is it?"}, {"type": "image_url"}]},
        {"role": "assistant", "parts": [{"type": "tool_call", "name": "weather", "arguments": '{"city": "Paris"}'}]},
        {"role": "tool", "parts": [{"type": "tool_call_response", "response": "sunny"}]},
    ]  # fmt: skip


def test_every_text_is_scrubbed_before_it_is_cut() -> None:
    said = {"role": "user", "content": "x" * 90 + " ann.example@mail.example and more"}
    ((message),) = shown([said])
    assert message["parts"][0]["content"] == "x" * 90 + " [email] a…"
    secret = {"function": {"name": "f", "arguments": '{"to": "bob@mail.example"}'}}
    ((message),) = shown([{"role": "assistant", "tool_calls": [secret]}])
    assert message["parts"][0]["arguments"] == '{"to": "[email]"}'


def test_of_very_many_messages_the_last_are_shown() -> None:
    found = shown([{"role": "user", "content": str(number)} for number in range(MAX_MESSAGES + 5)])
    assert len(found) == MAX_MESSAGES
    assert found[-1]["parts"][0]["content"] == str(MAX_MESSAGES + 4)


def test_an_answer_is_shown_with_its_reason() -> None:
    message = {"role": "assistant", "content": "Paris, says eve@x.example"}
    body = msgspec.json.encode({"choices": [{"message": message, "finish_reason": "stop"}]})
    assert msgspec.json.decode(output_messages(read_choices(body), max_chars=50)) == [
        {"role": "assistant", "parts": [{"type": "text", "content": "Paris, says [email]"}], "finish_reason": "stop"}
    ]


json = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["role", "content", "type", "text", "tool_calls", "function", "name", "arguments", "message"]
            ),
            inner,
            max_size=4,
        )
    ),
)


@given(json)
def test_whatever_comes_becomes_a_list_of_messages(value: Any) -> None:
    assert isinstance(shown(value), list)
    assert isinstance(msgspec.json.decode(output_messages(value, max_chars=5)), list)


@pytest.mark.parametrize("body", [b"", b"[1]", b"\xff", b'"x"', b"[" * 100_000, b'{"choices": 1}'])
def test_an_answer_that_is_none_shows_nothing(body: bytes) -> None:
    assert output_messages(read_choices(body), max_chars=5) == "[]"


SETTINGS = [
    "max_tokens", "max_completion_tokens", "temperature", "top_p", "seed", "frequency_penalty", "presence_penalty", "n",
]  # fmt: skip


@pytest.mark.parametrize(
    "written",
    [b'"7"', b"true", b"1e400", b"-1e400", b"9" * 5_000, b"9223372036854775808", b"[7]", b"{}", b"[" * 100_000, b"\xff",
     b"", b"7 7", b"null", b"NaN"],
)  # fmt: skip
def test_what_is_no_number_that_a_span_can_hold_is_not_told(written: bytes) -> None:
    assert asked({"seed": msgspec.Raw(written), "n": msgspec.Raw(b"2")}) == {"choice.count": 2}


@given(
    st.dictionaries(st.sampled_from(SETTINGS), json | st.floats(allow_nan=False, allow_infinity=False) | st.integers())
)
def test_whatever_a_request_sets_only_numbers_are_told(fields: dict[str, Any]) -> None:
    # json writes what msgspec will not, such as whole numbers of any length.
    found = asked({name: msgspec.Raw(dumps(value).encode()) for name, value in fields.items()})
    assert all(type(value) in (int, float) for value in found.values())
    assert all(abs(value) < 2**63 for value in found.values() if isinstance(value, int))


@given(st.binary(max_size=20))
def test_no_bytes_upset_it(written: bytes) -> None:
    asked(dict.fromkeys(SETTINGS, msgspec.Raw(written)))


def test_the_numbers_of_a_request_go_by_the_names_of_the_conventions() -> None:
    fields = {"temperature": 0.7, "max_completion_tokens": 64, "n": 2, "seed": None, "stop": ["x"], "user": "ann"}
    assert asked({name: raw(value) for name, value in fields.items()}) == {
        "temperature": 0.7, "max_tokens": 64, "choice.count": 2,
    }  # fmt: skip
