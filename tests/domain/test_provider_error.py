"""Whatever a provider says when it refuses becomes one short line of plain text and OpenAI's three fields."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.domain.provider_error import MAX_MESSAGE_CHARS, ProviderError, read_error

NOTHING_SAID = "the provider answered 500 without an explanation"
SHAPES = ["error", "message", "detail", "msg", "loc", "type", "code", "param", "object"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(SHAPES) | st.text(), inner, max_size=4),
    max_leaves=12,
)


def said(body: Any, status: int = 500) -> ProviderError:
    return read_error(status, json.dumps(body).encode())


def test_openai_s_shape() -> None:
    error = {"message": "no such model", "type": "invalid_request_error", "param": "model", "code": "model_not_found"}
    assert said({"error": error}) == ProviderError("no such model", "invalid_request_error", "model_not_found", "model")


def test_mistral_s_flat_shape_with_a_number_for_a_code() -> None:
    body = {"object": "error", "message": "Invalid model: x", "type": "invalid_model", "param": None, "code": 1500}
    assert said(body) == ProviderError("Invalid model: x", "invalid_model", "1500", None)


def test_mistral_s_detail_with_places() -> None:
    detail = [
        {"type": "extra_forbidden", "loc": ["body", "logit_bias"], "msg": "Extra inputs are not permitted"},
        {"type": "missing", "loc": ["body", "messages", 0, "content"], "msg": "Field required"},
    ]
    wanted = "body.logit_bias: Extra inputs are not permitted; body.messages.0.content: Field required"
    assert said({"object": "error", "message": {"detail": detail}, "code": None}).message == wanted
    assert said({"detail": detail}).message == wanted


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"detail": "Unauthorized"}, "Unauthorized"),
        ({"message": ["a", "b", "", None, 3]}, "a; b"),
        ({"message": [{"message": "a"}, {"msg": "b"}]}, "a; b"),
        ({"error": "overloaded"}, "overloaded"),
        ({"error": ["a", {"detail": "b"}]}, "a; b"),
        ({"error": None, "message": "said beside a null"}, "said beside a null"),
        ("just text", "just text"),
        (["a", "b"], "a; b"),
        ({"error": {"message": None, "detail": "d"}}, "d"),
    ],
)
def test_other_shapes_that_carry_a_text(body: Any, message: str) -> None:
    assert said(body).message == message


@pytest.mark.parametrize(
    "body",
    [b"", b"null", b"17", b"{}", b"[]", b'""', b'{"error": {}}', b'{"error": null}', b'{"message": 7}',
     b"<html>502 Bad Gateway</html>", b'{"message": "\xff"}', b'{"message":', b'{"message": {"a": 1}}',
     b"[" * 100_000, b'{"message": ' + b"[" * 900 + b"]" * 900 + b"}", b'{"message": ' + b'{"detail":' * 300 + b"1"
     + b"}" * 300 + b"}", b'{"message": "", "code": 1' + b"0" * 5_000 + b"}"],
)  # fmt: skip
def test_where_nothing_can_be_read_the_status_speaks(body: bytes) -> None:
    assert read_error(500, body).message == NOTHING_SAID


def test_long_texts_are_cut_and_control_characters_blanked() -> None:
    assert said({"message": "x" * 5_000}).message == "x" * MAX_MESSAGE_CHARS + "..."
    assert said({"message": "x" * MAX_MESSAGE_CHARS}).message == "x" * MAX_MESSAGE_CHARS
    assert said({"message": "a\r\nSet-Cookie: b\x00\u202e"}).message == "a  Set-Cookie: b  "


@pytest.mark.parametrize("code", [True, False, None, 1.5, [], {}])
def test_a_code_that_is_neither_text_nor_whole_is_left_out(code: Any) -> None:
    assert said({"message": "m", "code": code, "type": code, "param": code}) == ProviderError("m")


@given(JSON, st.integers(400, 599))
def test_no_answer_can_trip_it(body: Any, status: int) -> None:
    found = said(body, status)
    assert found.message
    assert found.message.isprintable()
    assert len(found.message) <= MAX_MESSAGE_CHARS + 3
    assert all(part is None or len(part) <= 100 for part in found[1:])


@given(st.binary(max_size=60))
def test_no_bytes_can_trip_it(body: bytes) -> None:
    assert read_error(502, body).message
