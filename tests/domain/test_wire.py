"""What is decided on is what is sent, and no body whatever gets further than a clear refusal."""

import json
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.domain.errors import Refused
from gateway.domain.money import MAX_TOKENS, Usage
from gateway.domain.wire import ChatBody, carries_content, encode, is_json, raw, read_answer, read_chat, read_usage

MESSAGES: list[dict[str, Any]] = [{"role": "user", "content": "hello"}]
HEAD = b'{"model":"m","messages":[{"role":"user","content":"hello"}]'


def body(**fields: Any) -> bytes:
    return json.dumps({"model": "m", "messages": MESSAGES, **fields}).encode()


def with_raw(extra: bytes) -> bytes:
    """A good request with one more piece of JSON, as it stands."""
    return HEAD + b"," + extra + b"}"


def refusal(data: bytes) -> Refused:
    with pytest.raises(Refused) as caught:
        read_chat(data)
    assert caught.value.status == 400
    return caught.value


def sent(chat: ChatBody) -> Any:
    return json.loads(encode(chat.fields))


# --- Not one JSON object ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [b"", b" ", b"null", b"true", b"17", b"[]", b'"a string"', b"[{}]", b"{", b"}", b"not json", b"{'model': 'm'}",
     b"\x00", b"\xff\xfe", HEAD, HEAD + b"} x", HEAD + b"}}", HEAD + b"}" + HEAD + b"}", HEAD + b"}\x00",
     b"\xef\xbb\xbf" + HEAD + b"}", "{\"model\":\"m\"}".encode("utf-16"), b"model=m&stream=true"],
)  # fmt: skip
def test_what_is_not_one_json_object_is_refused(data: bytes) -> None:
    assert refusal(data).code == "invalid_json"


@pytest.mark.parametrize(
    "extra",
    [b'"x":NaN', b'"temperature":NaN', b'"x":Infinity', b'"x":-Infinity', b'"x":[1,]', b'"x":{"a":1,}', b'"x":{1:2}',
     b'"x":01', b'"x":.5', b'"x":1.', b'"x":+1', b'"x":-', b'"x":0x10', b'"x":tru', b'"x":nul', b'"x"', b'"x":', b"x:1",
     b'"x":1 /* c */', b'"x":"a\nb"', b'"x":"a\x01b"', rb'"x":"\q"', rb'"x":"\u12"', rb'"x":"\u12g4"',
     rb'"x":"\ud800"', rb'"x":"\ud800\ud800"', rb'"x":"\udc00"', rb'"x":{"y":["\ud83d"]}', rb'"\ud800":1',
     rb'"user":"\udfff"', rb'"metadata":{"user_id":"\ud800"}', b'"x":"\xff"', b'"x":"\xc0\xaf"', b'"x":"\xed\xa0\x80"',
     b'"\xff":1', b'"x":"\xf0\x9f\x98'],
)  # fmt: skip
def test_json_that_another_reader_might_take_otherwise_is_refused_wherever_it_stands(extra: bytes) -> None:
    assert refusal(with_raw(extra)).code == "invalid_json"


def test_a_refusal_never_quotes_the_body() -> None:
    for data in (b'{"model": sk-secret-key}', b'{"model": "sk-secret-key', b'{"sk-secret-key": "\xff"}'):
        assert "secret" not in refusal(data).message


@pytest.mark.parametrize("opening, closing", [(b"[", b"]"), (b'{"a":', b"}")])
def test_nesting_a_hundred_thousand_deep_is_refused(opening: bytes, closing: bytes) -> None:
    deep = opening * 100_000 + b"1" + closing * 100_000
    assert refusal(deep).code == "invalid_json"
    for name in (b'"x":', b'"metadata":', b'"tools":', b'"user":', b'"temperature":', b'"model":'):
        assert refusal(with_raw(name + deep)).code == "invalid_json"
    for message in (b'{"role":"user","content":%b}', b'{"role":"user","content":[{"type":"text","x":%b}]}'):
        data = b'{"model":"m","messages":[' + message % deep + b"]}"
        assert refusal(data).code == "invalid_json"
    assert refusal(with_raw(b'"x":' + opening * 100_000)).code == "invalid_json"


def test_what_was_read_near_the_limit_of_nesting_is_refused_later_on_and_does_not_raise_anything_else() -> None:
    # The limit shrinks with the depth of the stack, so a body may pass where it is read and not where it is used.
    def deeper(left: int, chat: ChatBody) -> None:
        if left:
            deeper(left - 1, chat)
        else:
            chat.texts()
            chat.metadata()
            chat.tool_names()

    room = sys.getrecursionlimit()
    seen = set()
    for depth in range(room // 2, room, 7):
        deep = b"[" * depth + b"]" * depth
        message = b'{"model":"m","messages":[{"role":"user","content":[{"text":"t","x":%b}]}]' % deep
        try:
            chat = read_chat(message + b',"metadata":{"x":%b},"tools":[{"x":%b}]}' % (deep, deep))
            deeper(60, chat)
            seen.add("read")
        except Refused as refused:
            seen.add(refused.code)
    assert seen == {"read", "invalid_json"}


# --- Wrong types and values ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"model": 5}, "invalid_type", "model"),
        ({"model": ["m"]}, "invalid_type", "model"),
        ({"model": None}, "invalid_type", "model"),
        ({"model": ""}, "missing_field", "model"),
        ({"messages": None}, "invalid_type", "messages"),
        ({"messages": "hello"}, "invalid_type", "messages"),
        ({"messages": {}}, "invalid_type", "messages"),
        ({"messages": []}, "invalid_value", "messages"),
        ({"messages": ["hello"]}, "invalid_type", "messages"),
        ({"messages": [None]}, "invalid_type", "messages"),
        ({"messages": [{}]}, "invalid_type", "messages"),
        ({"messages": [{"role": 1}]}, "invalid_type", "messages"),
        ({"stream": "true"}, "invalid_type", "stream"),
        ({"stream": 1}, "invalid_type", "stream"),
        ({"stream_options": True}, "invalid_type", "stream_options"),
        ({"stream_options": {"include_usage": "yes"}}, "invalid_type", "stream_options"),
        ({"n": 1.5}, "invalid_type", "n"),
        ({"n": "2"}, "invalid_type", "n"),
        ({"n": True}, "invalid_type", "n"),
        ({"n": 0}, "invalid_value", "n"),
        ({"n": -1}, "invalid_value", "n"),
        ({"max_tokens": "100"}, "invalid_type", "max_tokens"),
        ({"max_tokens": 0}, "invalid_value", "max_tokens"),
        ({"max_tokens": -5}, "invalid_value", "max_tokens"),
        ({"max_tokens": MAX_TOKENS + 1}, "invalid_value", "max_tokens"),
        ({"max_tokens": 10**40}, "invalid_value", "max_tokens"),
        ({"max_completion_tokens": {}}, "invalid_type", "max_completion_tokens"),
        ({"max_completion_tokens": 0}, "invalid_value", "max_completion_tokens"),
        ({"temperature": "hot"}, "invalid_type", "temperature"),
        ({"temperature": True}, "invalid_type", "temperature"),
    ],
)
def test_wrong_types_and_values_name_their_field(fields: dict[str, Any], code: str, param: str) -> None:
    refused = refusal(body(**fields))
    assert (refused.code, refused.param) == (code, param)
    assert param in refused.message


@pytest.mark.parametrize("name", ["model", "messages"])
def test_what_is_missing_is_named(name: str) -> None:
    fields = {"model": "m", "messages": MESSAGES}
    del fields[name]
    refused = refusal(json.dumps(fields).encode())
    assert (refused.code, refused.param) == ("missing_field", name)


@pytest.mark.parametrize("extra", [b'"temperature":1e999999', b'"n":1' + b"0" * 5_000, b'"max_tokens":1e999999'])
def test_numbers_beyond_every_type_are_wrong_types_where_they_matter(extra: bytes) -> None:
    assert refusal(with_raw(extra)).code in ("invalid_type", "invalid_value")


@pytest.mark.parametrize("extra", [b'"x":1e999999', b'"x":1' + b"0" * 5_000, b'"seed":9223372036854775808',
                                   b'"x":-1e-999999', b'"x":0.1000000000000000055511151231257827'])  # fmt: skip
def test_numbers_that_nothing_is_decided_on_go_on_as_they_came(extra: bytes) -> None:
    assert encode(read_chat(with_raw(extra)).fields) == HEAD + b"," + extra + b"}"


@pytest.mark.parametrize(
    "ask",
    [lambda chat: chat.text("user"), lambda chat: chat.metadata(), lambda chat: chat.tool_names(),
     lambda chat: chat.texts()],
)  # fmt: skip
def test_fields_that_are_read_only_when_they_are_needed_are_refused_then(ask: Any) -> None:
    bad = {"messages": [{"role": "user", "content": 5}], "user": 5, "metadata": [], "tools": {}}
    with pytest.raises(Refused) as caught:
        ask(read_chat(body(**bad)))
    assert caught.value.code == "invalid_type"
    assert caught.value.param in ("user", "metadata", "tools", "messages[0].content")


# --- What is read ----------------------------------------------------------------------------------------------------


def test_a_whole_request() -> None:
    chat = read_chat(
        body(stream=True, stream_options={"include_usage": True}, n=3, max_tokens=10, temperature=1, user="u",
             metadata={"user_id": "u2", "n": 1}, tools=[{"type": "function", "function": {"name": "f"}}, {"type": "x"}])
    )  # fmt: skip
    assert (chat.model, chat.stream, chat.include_usage, chat.n) == ("m", True, True, 3)
    assert (chat.max_tokens, chat.temperature) == (10, 1.0)
    assert (chat.text("user"), chat.text("safety_identifier")) == ("u", None)
    assert chat.metadata() == {"user_id": "u2"}
    assert chat.tool_names() == ("f", "")


def test_nulls_are_the_same_as_nothing() -> None:
    names = ("stream", "stream_options", "n", "max_tokens", "max_completion_tokens", "temperature", "user", "metadata",
             "tools")  # fmt: skip
    chat = read_chat(body(**dict.fromkeys(names)))
    assert (chat.stream, chat.include_usage, chat.n) == (False, False, 1)
    assert (chat.max_tokens, chat.temperature, chat.text("user")) == (None, None, None)
    assert (chat.metadata(), chat.tool_names()) == ({}, ())
    assert not any(chat.is_set(name) for name in names)
    assert sent(chat) == json.loads(body(**dict.fromkeys(names)))


def test_a_null_is_seen_through_the_white_space_around_it() -> None:
    chat = read_chat(with_raw(b'"user" : \n null \t , "n":\r1 '))
    assert not chat.is_set("user")
    assert chat.is_set("n")
    assert not chat.is_set("seed")


@pytest.mark.parametrize(
    ("fields", "limit"),
    [
        ({}, None),
        ({"max_tokens": 5}, 5),
        ({"max_completion_tokens": 7}, 7),
        ({"max_tokens": 5, "max_completion_tokens": 7}, 7),
        ({"max_tokens": 5, "max_completion_tokens": None}, 5),
        ({"max_tokens": None, "max_completion_tokens": 7}, 7),
        ({"max_tokens": MAX_TOKENS}, MAX_TOKENS),
        ({"max_tokens": 1}, 1),
    ],
)
def test_the_newer_limit_wins_where_both_are_given(fields: dict[str, Any], limit: int | None) -> None:
    assert read_chat(body(**fields)).max_tokens == limit


def test_texts_hold_words_only() -> None:
    messages = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": [{"type": "text", "text": "one"},
                                     {"type": "image_url", "image_url": {"url": "data:..."}},
                                     {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "assistant"},
        {"role": "tool", "content": ""},
    ]  # fmt: skip
    texts = read_chat(body(messages=messages)).texts()
    assert texts == [("system", "be kind"), ("user", "one\ntwo"), ("assistant", ""), ("assistant", ""), ("tool", "")]


# --- What is read is what is sent ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        b'{"model":"cheap","messages":[{"role":"user"}],"model":"dear"}',
        rb'{"model":"cheap","messages":[{"role":"user"}],"mod\u0065l":"dear"}',
        rb'{"\u006dodel":"cheap","messages":[{"role":"user"}],"model":"dear"}',
        rb'{"model":"cheap","messages":[{"role":"user"}],"\u006d\u006f\u0064\u0065\u006c":"dear"}',
    ],
)
def test_a_second_model_cannot_be_smuggled_past(data: bytes) -> None:
    chat = read_chat(data)
    pairs = json.loads(encode(chat.fields), object_pairs_hook=list)
    assert [value for name, value in pairs if name == "model"] == [chat.model] == ["dear"]
    chat.fields["model"] = raw("chosen")
    pairs = json.loads(encode(chat.fields), object_pairs_hook=list)
    assert [value for name, value in pairs if name == "model"] == ["chosen"]


def test_every_field_that_is_sent_twice_goes_out_once_as_it_was_judged() -> None:
    chat = read_chat(with_raw(b'"max_tokens":1,"n":1,"stream":true,"max_tokens":900,"n":4,"stream":false'))
    assert (chat.max_tokens, chat.n, chat.stream) == (900, 4, False)
    out = encode(chat.fields)
    assert all(out.count(b'"%b"' % name) == 1 for name in (b"max_tokens", b"n", b"stream"))
    assert sent(chat)["max_tokens"] == 900


def test_a_model_that_stands_deeper_is_not_touched() -> None:
    chat = read_chat(with_raw(b'"metadata":{"model":"m","messages":[]}'))
    chat.fields["model"] = raw("other")
    assert sent(chat)["metadata"] == {"model": "m", "messages": []}


def test_what_looks_like_a_field_inside_a_text_is_a_text() -> None:
    text = '","model":"dear"}, "stream": true'
    chat = read_chat(body(messages=[{"role": "user", "content": text}]))
    assert (chat.model, chat.stream) == ("m", False)
    assert chat.texts() == [("user", text)]


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=15,
)


@given(
    st.dictionaries(
        TEXTS.filter(lambda name: name not in ("stream", "stream_options", "n", "max_tokens", "temperature")), VALUES
    ),
    TEXTS.filter(bool),
    st.booleans(),
)
def test_reading_and_writing_changes_the_model_and_nothing_else(
    extra: dict[str, Any], model: str, is_ascii: bool
) -> None:
    asked = {**extra, "model": model, "messages": MESSAGES}
    chat = read_chat(json.dumps(asked, ensure_ascii=is_ascii).encode())
    assert chat.model == model
    assert sent(chat) == asked
    chat.fields["model"] = raw("chosen")
    assert sent(chat) == {**asked, "model": "chosen"}


@given(st.binary(max_size=80))
def test_no_bytes_raise_anything_but_a_refusal(data: bytes) -> None:
    assert refusal(data).code in ("invalid_json", "missing_field", "invalid_type")


@given(st.binary(max_size=12), st.integers(0, len(HEAD)))
def test_a_request_with_bytes_put_in_is_refused_or_goes_out_as_valid_json(noise: bytes, at: int) -> None:
    data = (HEAD + b"}")[:at] + noise + (HEAD + b"}")[at:]
    try:
        chat = read_chat(data)
    except Refused:
        return
    # Whatever passed here, the strict reader of the standard library takes as the same.
    assert sent(chat) == json.loads(data)


# --- Answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("usage", "wanted"),
    [
        # OpenAI's whole shape.
        (
            {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15,
             "prompt_tokens_details": {"cached_tokens": 4, "audio_tokens": 0},
             "completion_tokens_details": {"reasoning_tokens": 3, "audio_tokens": 0}},
            Usage(prompt_tokens=10, completion_tokens=5, cached_tokens=4, reasoning_tokens=3),
        ),
        # Mistral's, plain and with a cache.
        ({"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15, "prompt_audio_seconds": None},
         Usage(prompt_tokens=10, completion_tokens=5)),
        ({"prompt_tokens": 10, "completion_tokens": 5, "num_cached_tokens": 8},
         Usage(prompt_tokens=10, completion_tokens=5, cached_tokens=8)),
        ({"prompt_tokens": 10, "completion_tokens": 5, "num_cached_tokens": 8,
          "prompt_tokens_details": {"cached_tokens": 8}},
         Usage(prompt_tokens=10, completion_tokens=5, cached_tokens=8)),
        # Audio in and out, and what is written into a cache.
        (
            {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15,
             "prompt_tokens_details": {"audio_tokens": 7, "cached_tokens": 2, "cache_write_tokens": 6},
             "completion_tokens_details": {"audio_tokens": 4, "accepted_prediction_tokens": 1,
                                           "rejected_prediction_tokens": 2}},
            Usage(prompt_tokens=10, completion_tokens=5, cached_tokens=2, cache_write_tokens=6, audio_input_tokens=7,
                  audio_output_tokens=4),
        ),
        # What only the total knows of: xAI's thoughts (figures of sub2api#5771), Mistral's audio.
        (
            {"prompt_tokens": 10120, "completion_tokens": 1499, "total_tokens": 14428,
             "completion_tokens_details": {"reasoning_tokens": 2809}},
            Usage(prompt_tokens=10120, completion_tokens=1499 + 2809, reasoning_tokens=2809),
        ),
        ({"prompt_tokens": 4, "completion_tokens": 635, "total_tokens": 3945, "prompt_audio_seconds": 203},
         Usage(prompt_tokens=4 + 3306, completion_tokens=635, audio_input_tokens=3306, audio_seconds=203)),
        # A total that is too small takes nothing away.
        ({"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 3},
         Usage(prompt_tokens=10, completion_tokens=5)),
        # Nulls and what is left out.
        ({"prompt_tokens": 10}, Usage(prompt_tokens=10)),
        ({"prompt_tokens": 10, "completion_tokens": None, "prompt_tokens_details": None,
          "completion_tokens_details": None, "num_cached_tokens": None}, Usage(prompt_tokens=10)),
        ({"prompt_tokens": 10, "prompt_tokens_details": {"cached_tokens": None},
          "completion_tokens_details": {}}, Usage(prompt_tokens=10)),
        ({"prompt_tokens": None, "completion_tokens": 5}, None),
        ({"completion_tokens": 5}, None),
        ({}, None),
        (None, None),
        # Not believed, but seen.
        ({"prompt_tokens": -10, "completion_tokens": 5}, Usage(prompt_tokens=-10, completion_tokens=5)),
        ({"prompt_tokens": 10**30, "completion_tokens": 5}, Usage(prompt_tokens=10**30, completion_tokens=5)),
        # Malformed.
        ({"prompt_tokens": "10", "completion_tokens": 5}, None),
        ({"prompt_tokens": 10.5, "completion_tokens": 5}, None),
        ({"prompt_tokens": True, "completion_tokens": 5}, None),
        ({"prompt_tokens": 10, "prompt_tokens_details": []}, None),
        ([10, 5], None),
        ("10", None),
    ],
)  # fmt: skip
def test_usage_in_every_shape(usage: Any, wanted: Usage | None) -> None:
    found = read_usage(json.dumps(usage).encode())
    assert found == wanted
    answer = read_answer(json.dumps({"choices": [], "usage": usage}).encode())
    assert answer is not None
    assert read_usage(answer.usage) == wanted


@pytest.mark.parametrize("data", [b"", b"{", b"[" * 100_000, b'{"prompt_tokens":1' + b"0" * 5_000 + b"}", b"\xff"])
def test_usage_that_cannot_be_read_is_none(data: bytes) -> None:
    assert read_usage(data) is None


def test_an_answer_as_far_as_the_gateway_looks() -> None:
    answer = read_answer(
        b'{"model":"gpt-4o-2024","choices":[{"index":0,"finish_reason":"stop","message":{}},{"finish_reason":null}]}'
    )
    assert answer is not None
    assert answer.model == "gpt-4o-2024"
    assert [choice.finish_reason for choice in answer.choices or ()] == ["stop", None]
    assert not answer.has_error


@pytest.mark.parametrize(
    "data", [b"", b"null", b"[]", b'"x"', b"<html>", b"[" * 100_000, b'{"model":"\xff"}', b'{"choices":{}}',
             b'{"choices":[{"finish_reason":5}]}', b'{"model":7}', rb'{"model":"\ud800"}', b'{"a":1}x',
             b'{"choices":[{"message":{"content":"\xff"}}]}', rb'{"choices":[{"message":{"content":"\ud800"}}]}',
             b'{"choices":[{"message":{"content":"caf\xc3"}}]}']
)  # fmt: skip
def test_what_is_no_answer_is_none(data: bytes) -> None:
    assert read_answer(data) is None


@pytest.mark.parametrize(("data", "has_error"), [(b'{"error":{"message":"x"}}', True), (b'{"error":"x"}', True),
                                                 (b'{"error":null}', False), (b"{}", False)])  # fmt: skip
def test_an_error_in_the_place_of_an_answer_is_seen(data: bytes, has_error: bool) -> None:
    answer = read_answer(data)
    assert answer is not None
    assert answer.has_error is has_error


@given(VALUES)
def test_no_answer_raises(value: Any) -> None:
    data = json.dumps(value).encode()
    read_answer(data)
    read_usage(data)
    carries_content(data)
    carries_content(json.dumps({"choices": [{"delta": value}]}).encode())


# --- Where an answer begins ------------------------------------------------------------------------------------------


def event(delta: Any, finish_reason: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    return json.dumps({"id": "c", "model": "m", "choices": [choice]}).encode()


@pytest.mark.parametrize(
    "delta",
    [{"content": "a"}, {"content": " "}, {"role": "assistant", "content": "a"}, {"refusal": "no"},
     {"tool_calls": [{"index": 0, "id": "c1", "function": {"name": "f", "arguments": ""}}]},
     {"content": "", "tool_calls": [{"index": 0}]}, {"reasoning_content": "hm"}, {"reasoning": "hm"},
     {"function_call": {"name": "f"}}, {"audio": {"id": "x"}}, {"content": [{"type": "text", "text": "a"}]}],
)  # fmt: skip
def test_text_a_call_a_refusal_or_a_thought_is_content(delta: dict[str, Any]) -> None:
    assert carries_content(event(delta))
    # Which choice it belongs to does not matter, nor what the other ones say.
    both = [{"index": 0, "delta": {"role": "assistant"}}, {"index": 1, "delta": delta}]
    assert carries_content(json.dumps({"choices": both}).encode())


@pytest.mark.parametrize("reason", ["stop", "length", "tool_calls", "content_filter", "error"])
def test_an_end_is_content_also_of_an_answer_that_says_nothing(reason: str) -> None:
    assert carries_content(event({}, reason))
    assert carries_content(event(None, reason))


@pytest.mark.parametrize(
    "delta",
    [{}, None, {"role": "assistant"}, {"role": "assistant", "content": ""}, {"role": "assistant", "content": None},
     {"content": "", "tool_calls": []}, {"content": None, "refusal": None, "tool_calls": None, "audio": {}}],
)  # fmt: skip
def test_a_preamble_is_none(delta: dict[str, Any] | None) -> None:
    assert not carries_content(event(delta))


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b"null", b"{}", b'{"choices":null}', b'{"choices":[]}', b'{"choices":[{}]}', b"[" * 100_000,
     b'{"choices":[{"delta":"a"}]}', b'{"choices":[],"usage":{"prompt_tokens":1}}', b'{"error":{"message":"x"}}'],
)  # fmt: skip
def test_what_is_no_chunk_of_an_answer_carries_nothing(data: bytes) -> None:
    assert not carries_content(data)


@pytest.mark.parametrize(
    ("body", "expected"),
    [(b"{}", True), (b'{"error": "no"}', True), (b'"x"', True), (b'{"error', False), (b"", False), (b"<html>", False)],
)
def test_a_body_is_json_only_where_it_is_whole(body: bytes, expected: bool) -> None:
    assert is_json(body) is expected
