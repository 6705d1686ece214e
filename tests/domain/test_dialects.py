"""The tables held against what they describe: Mistral's request model, and the answers OpenAI's client can read."""

import json
import sys
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mistralai.client.models import ChatCompletionRequest, ChatCompletionStreamRequest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from gateway.domain.dialects import DIALECTS, continued, translate
from gateway.domain.errors import Refused
from gateway.domain.sse import Tap
from gateway.domain.wire import encode, raw, read_answer, read_chat, read_usage

MISTRAL = DIALECTS["mistral"]
HELLO = {"role": "user", "content": "hello"}
# What OpenAI documents for a chat request and Mistral's schema does not have.
UNKNOWN_TO_MISTRAL = {
    "user": "u1",
    "safety_identifier": "u1",
    "logit_bias": {"50256": -100},
    "store": True,
    "verbosity": "low",
    "modalities": ["text"],
    "audio": {"voice": "alloy", "format": "wav"},
    "web_search_options": {},
    "prompt_cache_retention": "24h",
    "functions": [{"name": "f"}],
    "function_call": "auto",
}


def translated(fields: Mapping[str, Any], kind: str = "mistral") -> tuple[dict[str, Any], list[str]]:
    chat = read_chat(json.dumps({"model": "m", "messages": [HELLO], **fields}).encode())
    sent, dropped = translate(DIALECTS[kind], chat.fields)
    found = json.loads(encode(sent))
    assert isinstance(found, dict)
    return found, dropped


def without_head(sent: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in sent.items() if name not in ("model", "messages")}


NO_PARAMETERS = {"type": "object", "properties": {}}

# --- Requests: the rows of the table ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "sent", "dropped"),
    [
        ({"max_completion_tokens": 5}, {"max_tokens": 5}, []),
        ({"max_tokens": 5}, {"max_tokens": 5}, []),
        ({"max_tokens": 5, "max_completion_tokens": None}, {"max_tokens": 5}, []),
        ({"max_completion_tokens": 5, "max_tokens": None}, {"max_tokens": 5}, []),
        ({"seed": 7}, {"random_seed": 7}, []),
        ({"seed": 7, "random_seed": None}, {"random_seed": 7}, []),
        ({"seed": 7, "random_seed": 8}, {"random_seed": 8}, []),
        ({"seed": None}, {}, []),
        ({"stream": True, "stream_options": {"include_usage": True}}, {"stream": True}, []),
        ({"temperature": 0}, {"temperature": 0}, []),
        ({"temperature": 1.5}, {"temperature": 1.5}, []),
        ({"temperature": 1.50001}, {"temperature": 1.5}, []),
        ({"temperature": 2}, {"temperature": 1.5}, []),
        ({"temperature": -1}, {"temperature": 0}, []),
        ({"temperature": None}, {}, []),
        ({"tool_choice": "required"}, {"tool_choice": "required"}, []),
        ({"tool_choice": "any"}, {"tool_choice": "any"}, []),
        ({"service_tier": "auto"}, {"service_tier": "auto"}, []),
        ({"service_tier": "flex"}, {}, ["service_tier"]),
        ({"service_tier": ["auto"]}, {}, ["service_tier"]),
        ({"service_tier": {"auto": 1}}, {}, ["service_tier"]),
        ({"service_tier": None}, {}, []),
        ({"logprobs": True, "top_logprobs": 2}, {"logprobs": True, "top_logprobs": 2}, []),
        ({"safe_prompt": True}, {"safe_prompt": True}, []),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "strict": None, "description": None}}]},
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": NO_PARAMETERS}}]},
            [],
        ),
        ({"tools": ["odd", {"type": "x"}]}, {"tools": ["odd", {"type": "x"}]}, []),
        (UNKNOWN_TO_MISTRAL, {}, list(UNKNOWN_TO_MISTRAL)),
        (dict.fromkeys(UNKNOWN_TO_MISTRAL), {}, []),
    ],
)  # fmt: skip
def test_each_field_becomes_what_mistral_takes(asked: Any, sent: Any, dropped: list[str]) -> None:
    found, lost = translated(asked)
    assert without_head(found) == sent
    assert lost == dropped


@pytest.mark.parametrize(
    ("message", "sent", "dropped"),
    [
        ({"role": "developer", "content": "c"}, {"role": "system", "content": "c"}, []),
        ({"role": "user", "content": "c", "name": "Ann"}, {"role": "user", "content": "c"}, ["messages[].name"]),
        ({"role": "user", "content": "c", "name": None}, {"role": "user", "content": "c"}, []),
        ({"role": "assistant", "content": "c", "refusal": None, "audio": None, "annotations": []},
         {"role": "assistant", "content": "c"}, ["messages[].annotations"]),
        ({"role": "assistant", "content": "c", "prefix": True},
         {"role": "assistant", "content": "c", "prefix": True}, []),
        ({"role": "tool", "content": "c", "tool_call_id": "t", "name": "f"},
         {"role": "tool", "content": "c", "tool_call_id": "t", "name": "f"}, []),
    ],
)  # fmt: skip
def test_each_message_keeps_the_keys_mistral_knows(message: Any, sent: Any, dropped: list[str]) -> None:
    found, lost = translated({"messages": [message]})
    assert found["messages"] == [sent]
    assert lost == dropped


def test_a_key_lost_from_many_messages_is_named_once() -> None:
    _, dropped = translated({"messages": [{**HELLO, "name": "a"}, {**HELLO, "name": "b"}], "user": "u"})
    assert dropped == ["user", "messages[].name"]


@pytest.mark.parametrize("role", ["function", "bot", "", "User"])
def test_a_role_that_mistral_does_not_know_is_refused_by_its_place(role: str) -> None:
    with pytest.raises(Refused) as caught:
        translated({"messages": [HELLO, {"role": role, "content": "x"}]})
    assert (caught.value.code, caught.value.param) == ("invalid_value", "messages[1].role")


def test_the_caller_s_own_request_is_not_changed() -> None:
    chat = read_chat(json.dumps({"model": "m", "messages": [{**HELLO, "name": "a"}], "seed": 1}).encode())
    before = encode(chat.fields)
    translate(MISTRAL, chat.fields)
    assert encode(chat.fields) == before


def test_what_was_read_near_the_limit_of_nesting_is_refused_and_does_not_raise_anything_else() -> None:
    def deeper(left: int, data: bytes) -> None:
        if left:
            deeper(left - 1, data)
        else:
            translate(MISTRAL, chat.fields)

    room = sys.getrecursionlimit()
    for depth in range(room // 2, room, 7):
        deep = b"[" * depth + b"]" * depth
        try:
            chat = read_chat(b'{"model":"m","messages":[{"role":"user","content":%b}],"temperature":1}' % deep)
            deeper(60, deep)
        except Refused as refused:
            assert refused.code == "invalid_json"  # noqa: PT017


# --- Requests: every one that OpenAI's schema allows fits Mistral's --------------------------------------------------

WORDS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
TEXT_PART = st.fixed_dictionaries({"type": st.just("text"), "text": WORDS})
IMAGE_PART = st.fixed_dictionaries(
    {
        "type": st.just("image_url"),
        "image_url": st.fixed_dictionaries(
            {"url": st.just("data:image/png;base64,AA==")},
            optional={"detail": st.sampled_from(["auto", "low", "high"])},
        ),
    }
)
NAME = st.from_regex(r"[a-z_]{1,12}", fullmatch=True)
TOOL_CALL = st.fixed_dictionaries(
    {
        "id": NAME,
        "type": st.just("function"),
        "function": st.fixed_dictionaries({"name": NAME, "arguments": st.sampled_from(["{}", '{"city": "Oslo"}'])}),
    }
)
TEXTS = WORDS | st.lists(TEXT_PART, min_size=1, max_size=2)
MESSAGE = st.one_of(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "developer"]), "content": TEXTS}, optional={"name": NAME}
    ),
    st.fixed_dictionaries(
        {"role": st.just("user"), "content": WORDS | st.lists(TEXT_PART | IMAGE_PART, min_size=1, max_size=3)},
        optional={"name": NAME},
    ),
    st.fixed_dictionaries(
        {"role": st.just("assistant"), "content": st.none() | TEXTS},
        optional={
            "name": NAME,
            "refusal": st.none() | WORDS,
            "audio": st.none(),
            "function_call": st.none(),
            "tool_calls": st.none() | st.lists(TOOL_CALL, min_size=1, max_size=2),
        },
    ),
    st.fixed_dictionaries({"role": st.just("tool"), "content": TEXTS, "tool_call_id": NAME}),
)
SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}, "additionalProperties": False}
TOOL = st.fixed_dictionaries(
    {
        "type": st.just("function"),
        "function": st.fixed_dictionaries(
            {"name": NAME, "parameters": st.just(SCHEMA)}, optional={"description": WORDS, "strict": st.booleans()}
        ),
    }
)
FORMAT = st.one_of(
    st.sampled_from([{"type": "text"}, {"type": "json_object"}]),
    st.fixed_dictionaries(
        {
            "type": st.just("json_schema"),
            "json_schema": st.fixed_dictionaries(
                {"name": NAME, "schema": st.just(SCHEMA)}, optional={"strict": st.booleans(), "description": WORDS}
            ),
        }
    ),
)
OPTIONAL: dict[str, st.SearchStrategy[Any]] = {
    "temperature": st.floats(0, 2),
    "top_p": st.floats(0, 1),
    "max_tokens": st.integers(1, 4_096),
    "max_completion_tokens": st.integers(1, 4_096),
    "n": st.integers(1, 8),
    "stream": st.booleans(),
    "stream_options": st.fixed_dictionaries({"include_usage": st.booleans()}),
    "stop": WORDS | st.lists(WORDS, min_size=1, max_size=4),
    "seed": st.integers(0, 2**31),
    "presence_penalty": st.floats(-2, 2),
    "frequency_penalty": st.floats(-2, 2),
    "logprobs": st.booleans(),
    "top_logprobs": st.integers(0, 20),
    "response_format": FORMAT,
    "tools": st.lists(TOOL, min_size=1, max_size=2),
    "tool_choice": st.sampled_from(["none", "auto", "required", {"type": "function", "function": {"name": "f"}}]),
    "parallel_tool_calls": st.booleans(),
    "metadata": st.dictionaries(NAME, WORDS, max_size=2),
    "prediction": st.fixed_dictionaries({"type": st.just("content"), "content": WORDS}),
    "reasoning_effort": st.sampled_from(["none", "minimal", "low", "medium", "high", "xhigh"]),
    "service_tier": st.sampled_from(["auto", "default", "flex", "scale", "priority"]),
    "prompt_cache_key": WORDS,
    **{name: st.just(value) for name, value in UNKNOWN_TO_MISTRAL.items()},
}
REQUEST = st.fixed_dictionaries(
    {"model": WORDS, "messages": st.lists(MESSAGE, min_size=1, max_size=4)},
    optional={name: st.none() | strategy for name, strategy in OPTIONAL.items()},
)


@given(REQUEST)
def test_whatever_openai_allows_comes_out_as_mistral_s_own_client_would_send_it(asked: dict[str, Any]) -> None:
    sent, dropped = translated(asked)
    model = ChatCompletionStreamRequest if sent.get("stream") else ChatCompletionRequest
    # Reading drops what the schema does not know, on every level: what comes back whole held nothing else.
    assert model.model_validate(sent).model_dump(mode="json", by_alias=True, exclude_unset=True) == sent
    assert set(sent) <= set(model.model_fields)
    # Nothing is lost in silence, and nothing is named that was not lost.
    for name in dropped:
        assert name.startswith("messages[].") or asked[name] is not None
    told = {"stream_options", "max_completion_tokens", "seed", *dropped}
    assert {name for name, value in asked.items() if value is not None} - set(sent) <= told


def test_the_comparison_above_would_see_a_stray_key_on_any_level() -> None:
    for stray in (
        {"model": "m", "messages": [HELLO], "user": "u"},
        {"model": "m", "messages": [{**HELLO, "name": "n"}]},
        {"model": "m", "messages": [{"role": "user", "content": [{"type": "text", "text": "t", "cache": 1}]}]},
    ):
        model = ChatCompletionRequest.model_validate(stray)
        assert model.model_dump(mode="json", by_alias=True, exclude_unset=True) != stray


@given(REQUEST)
def test_a_request_is_never_widened(asked: dict[str, Any]) -> None:
    sent, _ = translated(asked)
    renamed = {"max_tokens": "max_completion_tokens", "random_seed": "seed"}
    assert all(name in asked or renamed.get(name) in asked for name in sent)
    assert len(sent["messages"]) == len(asked["messages"])
    assert all(set(ours) <= set(theirs) for ours, theirs in zip(sent["messages"], asked["messages"], strict=True))


def test_the_table_names_no_field_that_mistral_s_schema_lacks() -> None:
    known = set(ChatCompletionRequest.model_fields)
    for name, op in MISTRAL.fields.items():
        assert getattr(op, "to", name) in known, name


# --- Requests: the open dialects -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["openai", "compatible", "simulator"])
@given(asked=REQUEST)
def test_open_dialects_pass_everything_also_what_nobody_knows(kind: str, asked: dict[str, Any]) -> None:
    asked = {**asked, "guided_json": {"x": [1, None]}, "max_tokens": None, "max_completion_tokens": 4}
    sent, dropped = translated(asked, kind)
    assert dropped == []
    assert {name: value for name, value in sent.items() if name != "max_tokens"} == {
        name: value for name, value in asked.items() if name != "max_tokens"
    }


@pytest.mark.parametrize(
    ("asked", "limit"),
    [
        ({"max_tokens": 5}, 5),
        ({"max_completion_tokens": 6}, 6),
        ({"max_tokens": 5, "max_completion_tokens": 6}, 6),
        ({"max_completion_tokens": 6, "max_tokens": 5}, 6),
        ({"max_tokens": 5, "max_completion_tokens": None}, 5),
        ({"max_completion_tokens": None, "max_tokens": 5}, 5),
    ],
)
def test_openai_gets_one_limit_under_its_newer_name_and_a_null_never_undoes_it(asked: Any, limit: int) -> None:
    sent, _ = translated(asked, "openai")
    assert without_head(sent) == {"max_completion_tokens": limit}


# --- Requests: an answer that has begun -------------------------------------------------------------------------------

BEGUN = st.text(min_size=1, max_size=30)


def gone_on(fields: Mapping[str, Any], text: str, kind: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A request as it is first sent, and as it is sent to go on from `text`."""
    chat = read_chat(json.dumps({"model": "m", "messages": [HELLO], **fields}).encode())
    dialect = DIALECTS[kind]
    sent, _ = translate(dialect, chat.fields)
    return json.loads(encode(sent)), json.loads(encode(continued(dialect, sent, text)))


def test_mistral_is_told_by_a_prefix() -> None:
    _, sent = gone_on({}, "The capital", "mistral")
    assert sent == {"model": "m", "messages": [HELLO, {"role": "assistant", "content": "The capital", "prefix": True}]}


def test_vllm_is_told_by_its_two_flags() -> None:
    _, sent = gone_on({}, "The capital", "compatible")
    assert sent == {
        "model": "m",
        "messages": [HELLO, {"role": "assistant", "content": "The capital"}],
        "add_generation_prompt": False,
        "continue_final_message": True,
    }


@pytest.mark.parametrize("kind", ["openai", "simulator"])
def test_of_the_others_the_last_message_says_it_all(kind: str) -> None:
    _, sent = gone_on({"x_unknown": 1}, "The capital", kind)
    assert sent["messages"] == [HELLO, {"role": "assistant", "content": "The capital"}]
    assert set(sent) == {"model", "messages", "x_unknown"}


@pytest.mark.parametrize("kind", DIALECTS)
@given(asked=REQUEST, text=BEGUN)
def test_going_on_adds_a_message_and_changes_nothing_else(kind: str, asked: dict[str, Any], text: str) -> None:
    before, after = gone_on(asked, text, kind)
    *messages, begun = after["messages"]
    assert messages == before["messages"]
    assert (begun["role"], begun["content"]) == ("assistant", text)
    flags = {"add_generation_prompt", "continue_final_message"}
    assert {name: value for name, value in after.items() if name not in (flags | {"messages"})} == {
        name: value for name, value in before.items() if name not in (flags | {"messages"})
    }


@given(REQUEST, BEGUN)
def test_mistral_s_own_client_would_send_a_begun_answer_so_too(asked: dict[str, Any], text: str) -> None:
    _, sent = gone_on(asked, text, "mistral")
    model = ChatCompletionStreamRequest if sent.get("stream") else ChatCompletionRequest
    assert model.model_validate(sent).model_dump(mode="json", by_alias=True, exclude_unset=True) == sent


def test_to_go_on_leaves_the_request_it_came_from_as_it_was() -> None:
    fields = read_chat(json.dumps({"model": "m", "messages": [HELLO]}).encode()).fields
    before = encode(fields)
    continued(MISTRAL, fields, "x")
    assert encode(fields) == before


# --- Answers: Mistral's recorded shapes, read by OpenAI's own client -------------------------------------------------


def answer(message: dict[str, Any] | None = None, finish: str = "stop", **fields: Any) -> bytes:
    """A plain answer in the shape Mistral's API documents."""
    whole = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": "Hi", "tool_calls": None}}
    whole["message"] = {"role": "assistant", "tool_calls": None, **(message or {"content": "Hi"})}
    usage = {"prompt_tokens": 16, "completion_tokens": 34, "total_tokens": 50, "prompt_audio_seconds": None}
    body = {"id": "cmpl-e5cc70bb", "object": "chat.completion", "created": 1702256327, "model": "mistral-small-latest"}
    return json.dumps({**body, "choices": [whole], "usage": usage, **fields}).encode()


def event(delta: dict[str, Any], finish: str | None = None, **fields: Any) -> bytes:
    """A chunk in the shape Mistral's API documents."""
    head = {"id": "cmpl-8cd9019d", "object": "chat.completion.chunk", "created": 1711569598, "model": "mistral-small"}
    return json.dumps({**head, "choices": [{"index": 0, "delta": delta, "finish_reason": finish}], **fields}).encode()


def rewritten(body: bytes) -> ChatCompletion:
    assert MISTRAL.rewrite_answer is not None
    return ChatCompletion.model_validate_json(MISTRAL.rewrite_answer(body))


def chunks(*events: bytes) -> list[ChatCompletionChunk]:
    assert MISTRAL.rewrite_chunk is not None
    return [ChatCompletionChunk.model_validate_json(piece) for each in events for piece in MISTRAL.rewrite_chunk(each)]


TOOL_CALL_AS_OBJECT = {"id": "D681PevKs", "function": {"name": "get_weather", "arguments": {"city": "Oslo", "n": [1]}}}


def test_a_plain_answer() -> None:
    found = rewritten(answer())
    assert (found.choices[0].message.content, found.choices[0].finish_reason) == ("Hi", "stop")
    assert found.usage is not None
    assert found.usage.total_tokens == 50


def test_parts_are_flattened_to_their_text() -> None:
    parts = [
        {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]},
        {"type": "text", "text": "It is "},
        {"type": "reference", "reference_ids": [1]},
        {"type": "text", "text": "so."},
        "odd",
        {"type": "text", "text": None},
    ]
    assert rewritten(answer({"content": parts})).choices[0].message.content == "It is so."
    (found,) = chunks(event({"content": parts}))
    assert found.choices[0].delta.content == "It is so."


def test_arguments_that_are_an_object_become_a_string() -> None:
    for type_ in ({}, {"type": None}, {"type": "function"}):
        found = rewritten(answer({"content": "", "tool_calls": [{**TOOL_CALL_AS_OBJECT, **type_}]}, "tool_calls"))
        (call,) = found.choices[0].message.tool_calls or ()
        assert call.type == "function"
        assert json.loads(call.function.arguments) == {"city": "Oslo", "n": [1]}
        assert found.choices[0].finish_reason == "tool_calls"


def test_a_whole_tool_call_in_one_chunk_gets_its_place() -> None:
    calls = [TOOL_CALL_AS_OBJECT, {"id": "b", "function": {"name": "g", "arguments": "{}"}, "index": 1}]
    (found,) = chunks(event({"content": "", "tool_calls": calls}, "tool_calls"))
    first, second = found.choices[0].delta.tool_calls or ()
    assert (first.index, second.index, first.type) == (0, 1, "function")
    assert first.function is not None
    assert json.loads(first.function.arguments or "") == {"city": "Oslo", "n": [1]}


@pytest.mark.parametrize(("said", "heard"), [("model_length", "length"), ("length", "length"), ("stop", "stop")])
def test_finish_reasons_are_ones_that_openai_knows(said: str, heard: str) -> None:
    assert rewritten(answer(finish=said)).choices[0].finish_reason == heard
    assert chunks(event({"content": ""}, said))[0].choices[0].finish_reason == heard


def test_an_end_in_error_stays_visible_so_that_it_becomes_a_fault() -> None:
    assert MISTRAL.rewrite_answer is not None
    found = read_answer(MISTRAL.rewrite_answer(answer(finish="error")))
    assert found is not None
    assert found.choices is not None
    assert found.choices[0].finish_reason == "error"
    assert MISTRAL.rewrite_chunk is not None
    tap = Tap()
    for piece in MISTRAL.rewrite_chunk(event({"content": ""}, "error")):
        tap.look(piece)
    assert tap.finish_reason == "error"


@pytest.mark.parametrize("details", [{}, {"prompt_tokens_details": None}, {"prompt_tokens_details": {}},
                                     {"prompt_tokens_details": {"cached_tokens": 8}}])  # fmt: skip
def test_cached_tokens_are_where_openai_has_them(details: dict[str, Any]) -> None:
    usage = {"prompt_tokens": 16, "completion_tokens": 4, "total_tokens": 20, "num_cached_tokens": 8, **details}
    found = rewritten(answer(usage=usage)).usage
    assert found is not None
    assert found.prompt_tokens_details is not None
    assert found.prompt_tokens_details.cached_tokens == 8
    ours = read_usage(raw(found.model_dump()))
    assert ours is not None
    assert ours.cached_tokens == 8


def test_a_stream_as_mistral_sends_it() -> None:
    usage = {"prompt_tokens": 16, "total_tokens": 20, "completion_tokens": 4, "num_cached_tokens": 8}
    first, second, last, counted = chunks(
        event({"role": "assistant", "content": ""}),
        event({"content": "Hi"}),
        event({"content": "."}, "stop", usage=usage),
    )
    assert [each.choices[0].delta.content for each in (first, second, last)] == ["", "Hi", "."]
    assert (last.choices[0].finish_reason, last.usage) == ("stop", None)
    # Usage in a chunk of its own, after the end, as OpenAI sends it and as the relay can leave it out.
    assert counted.choices == []
    assert counted.usage is not None
    assert counted.usage.prompt_tokens_details is not None
    assert (counted.usage.total_tokens, counted.usage.prompt_tokens_details.cached_tokens) == (20, 8)
    assert counted.id == last.id


@pytest.mark.parametrize(
    "body",
    [b"", b"null", b"[]", b"7", b"not json", b'{"choices": 5}', b'{"choices": [7]}', b'{"choices": [{"delta": 7}]}',
     b'{"choices": [{"finish_reason": [1]}]}', b'{"choices": [{"message": {"tool_calls": 5}}]}',
     b'{"choices": [{"message": {"tool_calls": [5]}}]}', b'{"choices": [{"message": {"content": "\xff"}}]}',
     b'{"choices": [{"delta": {"tool_calls": [{"function": 7}]}}]}', b"[" * 100_000, b'{"x": 1e999999}'],
)  # fmt: skip
def test_what_is_not_mistral_s_shape_is_left_for_the_reader_of_answers(body: bytes) -> None:
    assert MISTRAL.rewrite_answer is not None
    assert MISTRAL.rewrite_chunk is not None
    assert MISTRAL.rewrite_answer(body) == body
    assert MISTRAL.rewrite_chunk(body) == [body]


def test_errors_pass_through_for_the_reader_of_errors() -> None:
    assert MISTRAL.rewrite_chunk is not None
    error = {"object": "error", "message": {"detail": [{"msg": "no"}]}, "type": "invalid_request_error", "code": 1500}
    (piece,) = MISTRAL.rewrite_chunk(json.dumps(error).encode())
    assert json.loads(piece) == error


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | WORDS,
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(["choices", "delta", "message", "content", "tool_calls", "function", "arguments", "usage",
                         "type", "num_cached_tokens", "finish_reason", "text"]), inner, max_size=4),
    max_leaves=20,
)  # fmt: skip


@given(st.fixed_dictionaries({}, optional={"choices": st.lists(JSON, max_size=2) | JSON, "usage": JSON}) | JSON)
def test_no_answer_raises(body: Any) -> None:
    data = json.dumps(body).encode()
    assert MISTRAL.rewrite_answer is not None
    assert MISTRAL.rewrite_chunk is not None
    json.loads(MISTRAL.rewrite_answer(data))
    for piece in MISTRAL.rewrite_chunk(data):
        json.loads(piece)
