"""What the simulator answers: the same to the same request, within the limits asked for, counted exactly."""

from typing import Any

import jsonschema
import msgspec
import pytest

from gateway.simulator.chat import (
    Answer,
    ChatRequest,
    Choice,
    RequestRefused,
    SimulatorSettings,
    answer,
    decode,
    read_request,
)

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a place.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "unit": {"enum": ["c", "f"]}},
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "get_time"}}


def request(text: str = "How do refunds work?", **fields: Any) -> ChatRequest:
    return read_request({"model": "simulator", "messages": [{"role": "user", "content": text}], **fields})


def answered(text: str = "How do refunds work?", *, settings_seed: int = 0, **fields: Any) -> Answer:
    return answer(request(text, **fields), SimulatorSettings(seed=settings_seed))


def only_choice(text: str = "How do refunds work?", **fields: Any) -> Choice:
    (choice,) = answered(text, **fields).choices
    return choice


# --- what decides the words ---------------------------------------------------


def test_the_same_model_messages_and_seed_give_the_same_answer() -> None:
    assert answered() == answered()
    assert answered(seed=1) == answered(seed=1, temperature=0.3, user="someone else")


def test_another_seed_model_message_or_setting_gives_another() -> None:
    texts = [
        only_choice().text,
        only_choice(seed=1).text,
        only_choice(seed=2).text,
        only_choice(model="other").text,
        only_choice("How do invoices work?").text,
        answered(settings_seed=1).choices[0].text,
    ]
    assert len(set(texts)) == len(texts)


def test_mistrals_name_for_the_seed_counts_too() -> None:
    assert only_choice(random_seed=5).text == only_choice(seed=5).text != only_choice().text


def test_neither_key_order_nor_white_space_in_the_json_matters() -> None:
    one = decode(b'{"model":"m","messages":[{"role":"user","content":[{"type":"text","text":"hi"}]}]}')
    two = decode(b'{"messages": [{"content": [{"text": "hi", "type": "text"}], "role": "user"}], "model": "m"}')
    assert answer(read_request(one), SimulatorSettings()) == answer(read_request(two), SimulatorSettings())


def test_each_of_n_choices_has_its_own_words() -> None:
    choices = answered(n=4).choices
    assert len({choice.text for choice in choices}) == 4


def test_the_text_speaks_of_the_last_user_message() -> None:
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Tell me about whales"},
        {"role": "assistant", "content": "Whales are large."},
        {"role": "user", "content": [{"type": "text", "text": "And penguins?"}]},
    ]
    assert "In turn 2 you asked about penguins." in only_choice(messages=messages).text


# --- limits -------------------------------------------------------------------


def test_the_limit_cuts_just_where_it_should() -> None:
    whole = only_choice()
    below, at = (only_choice(max_tokens=limit) for limit in (whole.tokens - 1, whole.tokens))
    assert (below.tokens, below.finish_reason) == (whole.tokens - 1, "length")
    assert whole.text.startswith(below.text)
    assert at == whole
    assert whole.finish_reason == "stop"


def test_of_two_limits_the_lower_counts() -> None:
    assert only_choice(max_tokens=9, max_completion_tokens=5).tokens == 5
    assert only_choice(max_tokens=5, max_completion_tokens=9).tokens == 5


def test_the_answer_ends_before_the_first_stop_sequence() -> None:
    whole = only_choice()
    cut = only_choice(stop=["no such words", " no real", "no real model"])
    assert cut.text == whole.text.partition(" no real")[0]
    assert cut.finish_reason == "stop"
    assert only_choice(stop="no such words") == whole
    assert only_choice(stop="This").text == ""


# --- counting -----------------------------------------------------------------


def test_usage_counts_the_pieces_of_every_choice() -> None:
    three = answered(n=3)
    assert three.usage["completion_tokens"] == sum(len(choice.pieces) for choice in three.choices)
    assert three.usage["total_tokens"] == three.usage["prompt_tokens"] + three.usage["completion_tokens"]
    assert three.usage["prompt_tokens_details"] == {"cached_tokens": 0}
    called = answered(tools=[WEATHER], tool_choice="required")
    assert called.usage["completion_tokens"] == len(called.choices[0].pieces) + 1, "the function's name is one"


def test_prompt_tokens_are_four_characters_each_and_four_per_message() -> None:
    assert answered("x" * 400).prompt_tokens == 3 + 4 + 100
    two = [{"role": "system", "content": "abcd"}, {"role": "user", "content": "abcde"}]
    assert answered(messages=two).prompt_tokens == 3 + 4 + 1 + 4 + 2
    picture = [{"type": "text", "text": "abcd"}, {"type": "image_url", "image_url": {"url": "data:..."}}]
    assert answered(messages=[{"role": "user", "content": picture}]).prompt_tokens == 3 + 4 + 1 + 85
    assert answered(tools=[WEATHER]).prompt_tokens > answered(tools=[CLOCK]).prompt_tokens > answered().prompt_tokens


# --- tools --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "tool_choice", "called"),
    [
        ("hello", "required", "get_weather"),
        ("hello", "any", "get_weather"),
        ("hello, get_time please", "required", "get_time"),
        ("hello", {"type": "function", "function": {"name": "get_time"}}, "get_time"),
        ("hello", "auto", None),
        ("hello", None, None),
        ("please GET_TIME", "auto", "get_time"),
        ("please get time", None, "get_time"),
        ("use the tool", None, "get_weather"),
        ("use the tool get_time", "none", None),
        (
            "hello",
            {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [CLOCK]}},
            "get_time",
        ),
        ("hello", {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [CLOCK]}}, None),
    ],
)
def test_a_tool_is_called_when_it_must_be_or_is_spoken_of(text: str, tool_choice: Any, called: str | None) -> None:
    choice = only_choice(text, tools=[WEATHER, CLOCK], tool_choice=tool_choice)
    assert choice.tool_name == called
    assert choice.finish_reason == ("stop" if called is None else "tool_calls")


def test_arguments_are_valid_against_the_functions_schema() -> None:
    parameters = WEATHER["function"]["parameters"]  # type: ignore[index]
    for choice in answered(tools=[WEATHER], tool_choice="required", n=20).choices:
        jsonschema.validate(msgspec.json.decode(choice.text), parameters)
    assert only_choice(tools=[CLOCK], tool_choice="required").text == "{}"


def test_a_limit_cuts_arguments_short_and_says_so() -> None:
    cut = only_choice(tools=[WEATHER], tool_choice="required", max_tokens=3)
    assert (cut.tokens, cut.finish_reason) == (3, "length")
    only_name = only_choice(tools=[WEATHER], tool_choice="required", max_tokens=1)
    assert (only_name.text, only_name.finish_reason) == ("", "length")


def test_after_a_tools_result_the_answer_is_text_that_quotes_it() -> None:
    messages = [
        {"role": "user", "content": "get_weather of Oslo"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "c", "type": "function", "function": {}}],
        },
        {"role": "tool", "tool_call_id": "c", "content": "minus four"},
    ]
    choice = only_choice(messages=messages, tools=[WEATHER], tool_choice="required")
    assert choice.tool_name is None
    assert "minus four." in choice.text


# --- structured output --------------------------------------------------------


def test_a_json_schema_is_answered_with_a_valid_document() -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    jsonschema.validate(msgspec.json.decode(only_choice(response_format=form).text), schema)
    cut = only_choice(response_format=form, max_tokens=1)
    assert (cut.tokens, cut.finish_reason) == (1, "length")


def test_json_mode_gives_an_object_and_text_mode_text() -> None:
    document = msgspec.json.decode(only_choice("refunds", response_format={"type": "json_object"}).text)
    assert document["topic"] == "refunds"
    assert only_choice(response_format={"type": "text"}) == only_choice()


# --- refusals -----------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"\xff", b'"\xff"', b'{"a": NaN}', b"[" * 100_000, b'{"model": "\xed\xa0\x80"}', b"{}x"],
)
def test_a_body_that_is_not_json_is_refused(body: bytes) -> None:
    with pytest.raises(RequestRefused) as refused:
        decode(body)
    assert refused.value.status == 400
    assert refused.value.body["error"]["code"] == "invalid_json"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (None, None),
        ([], None),
        ("text", None),
        ({"messages": [{"role": "user"}]}, "model"),
        ({"model": "m"}, "messages"),
        ({"model": "", "messages": [{"role": "user"}]}, "model"),
        ({"model": "m", "messages": []}, "messages"),
        ({"model": "m", "messages": [{"role": "king"}]}, "messages[0].role"),
        ({"model": "m", "messages": [{"role": "user"}], "max_tokens": 0}, "max_tokens"),
        ({"model": "m", "messages": [{"role": "user"}], "n": 129}, "n"),
        ({"model": "m", "messages": [{"role": "user"}], "stream_options": {}}, "stream_options"),
    ],
)
def test_a_wrong_request_is_refused_with_the_field_at_fault(body: Any, param: str | None) -> None:
    with pytest.raises(RequestRefused) as refused:
        read_request(body)
    assert refused.value.status == 400
    error = refused.value.body["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        (
            {"tools": [CLOCK], "tool_choice": {"type": "function", "function": {"name": "other"}}},
            "tool_choice",
        ),
        ({"tools": [CLOCK], "tool_choice": {"type": "function", "function": 3}}, "tool_choice"),
        (
            {"tools": [{"function": {"name": "f", "parameters": {"type": "no"}}}], "tool_choice": "any"},
            "tools",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "#"}}}},
            "response_format",
        ),
    ],
)
def test_what_cannot_be_answered_is_refused(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestRefused) as refused:
        answered(**fields)
    assert refused.value.body["error"]["param"] == param


def test_a_retired_model_is_not_found() -> None:
    with pytest.raises(RequestRefused) as refused:
        request(model="open-mistral-7b-retired")
    assert refused.value.status == 404
    assert refused.value.body["error"]["code"] == "model_not_found"
