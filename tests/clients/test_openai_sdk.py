"""The openai package against a running gateway: whatever an agent does with it works, and fails as it should."""

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types.chat import ChatCompletionChunk, ChatCompletionMessageParam, ChatCompletionToolParam
from pydantic import BaseModel

from gateway.decide.assign import bucket_of
from tests.clients.served import FAULTS_WITH_FALLBACK, KEY, QA_KEY, Fixed, Served, wait_until

QUESTION: list[ChatCompletionMessageParam] = [{"role": "user", "content": "What is the capital of France?"}]
WEATHER: list[ChatCompletionToolParam] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather in a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer", "minimum": 1}},
                "required": ["city", "days"],
                "additionalProperties": False,
            },
        },
    }
]


class Verdict(BaseModel):
    """What a structured answer is parsed into."""

    is_valid: bool
    clauses: list[str]
    risk: float


@pytest.fixture
def client(served: Served) -> Iterator[OpenAI]:
    """A client that tries once, so that what a test sees is what the gateway said first."""
    with OpenAI(base_url=served.base_url, api_key=KEY, max_retries=0) as client:
        yield client


@pytest.fixture
async def async_client(served: Served) -> AsyncIterator[AsyncOpenAI]:
    """The same, for coroutines."""
    async with AsyncOpenAI(base_url=served.base_url, api_key=KEY, max_retries=0) as client:
        yield client


# --- Answers ---------------------------------------------------------------------------------------------------------


def test_an_answer_comes_whole_with_its_usage(client: OpenAI, served: Served) -> None:
    answer = client.chat.completions.create(model="qa_agent", messages=QUESTION)
    assert answer.object == "chat.completion"
    assert answer.model == "simulator-small"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens > 0
    # The agent's defaults went along, and the SDK's own name for the request is the journal's.
    assert (served.sent["temperature"], served.sent["max_tokens"]) == (0.7, 512)
    assert answer._request_id is not None
    record = served.recorded(answer._request_id)
    assert (record.status, record.agent, record.key) == (200, "qa_agent", "everything")
    assert record.usage is not None
    assert record.usage.completion_tokens == answer.usage.completion_tokens


async def test_the_async_client_gets_the_same_answer(client: OpenAI, async_client: AsyncOpenAI) -> None:
    plain = client.chat.completions.create(model="qa_agent", messages=QUESTION)
    awaited = await async_client.chat.completions.create(model="qa_agent", messages=QUESTION)
    assert awaited.choices == plain.choices


async def test_many_calls_at_once_are_all_answered(async_client: AsyncOpenAI) -> None:
    calls = (
        async_client.chat.completions.create(model="auto", messages=[{"role": "user", "content": f"question {number}"}])
        for number in range(40)
    )
    answers = await asyncio.gather(*calls)
    assert len({answer._request_id for answer in answers}) == 40
    assert all(answer.choices[0].message.content for answer in answers)


def test_a_stream_says_what_the_plain_answer_says(client: OpenAI, served: Served) -> None:
    plain = client.chat.completions.create(model="qa_agent", messages=QUESTION)
    chunks = list(client.chat.completions.create(model="qa_agent", messages=QUESTION, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == plain.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == ["stop"]
    # The gateway asked the provider for usage, and kept what the caller had not asked for.
    assert served.sent["stream_options"] == {"include_usage": True}
    assert all(chunk.usage is None for chunk in chunks)


async def test_a_stream_ends_with_usage_where_it_was_asked_for(async_client: AsyncOpenAI) -> None:
    stream = await async_client.chat.completions.create(
        model="qa_agent", messages=QUESTION, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    plain = await async_client.chat.completions.create(model="qa_agent", messages=QUESTION)
    assert chunks[-1].choices == []
    assert chunks[-1].usage == plain.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_a_stream_without_done_is_whole_once_it_has_finished(client: OpenAI) -> None:
    chunks = list(client.chat.completions.create(model="sim/fault:no-done", messages=QUESTION, stream=True))
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_several_choices_come_side_by_side(client: OpenAI) -> None:
    plain = client.chat.completions.create(model="qa_agent", messages=QUESTION, n=2)
    assert [choice.index for choice in plain.choices] == [0, 1]
    texts = ["", ""]
    reasons = []
    for chunk in client.chat.completions.create(model="qa_agent", messages=QUESTION, n=2, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons += [choice.finish_reason] if choice.finish_reason else []
    assert texts == [choice.message.content for choice in plain.choices]
    assert reasons == ["stop", "stop"]


# --- Tools and structured answers ------------------------------------------------------------------------------------


def test_a_tool_is_called_and_its_result_answered(client: OpenAI, served: Served) -> None:
    messages = list(QUESTION)
    asked = client.chat.completions.create(
        model="qa_agent", messages=messages, tools=WEATHER, tool_choice="required", parallel_tool_calls=False
    )
    assert served.sent["tools"] == WEATHER
    assert served.sent["parallel_tool_calls"] is False
    choice = asked.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.tool_calls is not None
    (call,) = choice.message.tool_calls
    assert call.type == "function"
    assert call.function.name == "get_weather"
    assert set(json.loads(call.function.arguments)) == {"city", "days"}

    messages.append(choice.message.model_dump())  # type: ignore[arg-type]
    messages.append({"role": "tool", "tool_call_id": call.id, "content": "18 degrees and rain"})
    answered = client.chat.completions.create(model="qa_agent", messages=messages, tools=WEATHER)
    assert served.sent["messages"][1]["tool_calls"][0]["id"] == call.id
    assert answered.choices[0].finish_reason == "stop"
    assert "18 degrees and rain" in (answered.choices[0].message.content or "")


async def test_a_streamed_tool_call_adds_up_to_the_plain_one(async_client: AsyncOpenAI) -> None:
    create = async_client.chat.completions.create
    plain = await create(model="qa_agent", messages=QUESTION, tools=WEATHER, tool_choice="required")
    name = arguments = ""
    stream = await create(model="qa_agent", messages=QUESTION, tools=WEATHER, tool_choice="required", stream=True)
    async for chunk in stream:
        for call in chunk.choices[0].delta.tool_calls or ():
            assert call.function is not None
            name += call.function.name or ""
            arguments += call.function.arguments or ""
    assert plain.choices[0].message.tool_calls is not None
    expected = plain.choices[0].message.tool_calls[0]
    assert expected.type == "function"
    assert (name, arguments) == (expected.function.name, expected.function.arguments)


def test_parse_gives_an_object_of_the_callers_class(client: OpenAI) -> None:
    answer = client.chat.completions.parse(model="qa_agent", messages=QUESTION, response_format=Verdict)
    assert isinstance(answer.choices[0].message.parsed, Verdict)


async def test_the_stream_helper_parses_too(async_client: AsyncOpenAI) -> None:
    async with async_client.chat.completions.stream(
        model="qa_agent", messages=QUESTION, response_format=Verdict
    ) as stream:
        kinds = {event.type async for event in stream}
        final = await stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert isinstance(final.choices[0].message.parsed, Verdict)


# --- What goes out and what comes back -------------------------------------------------------------------------------


def test_every_field_the_caller_sets_reaches_the_provider(client: OpenAI, served: Served) -> None:
    client.chat.completions.create(
        model="qa_agent",
        messages=QUESTION,
        temperature=0,
        seed=7,
        user="u-1",
        metadata={"team": "red"},
        logit_bias={"50256": -100},
        stop=["\n\n"],
        extra_body={"guided_choice": ["yes", "no"], "chat_template_kwargs": {"enable_thinking": False}},
    )
    sent = served.sent
    assert (sent["model"], sent["temperature"], sent["seed"], sent["user"]) in [
        ("ft:qa", 0, 7, "u-1"),
        ("simulator-small", 0, 7, "u-1"),
    ]
    assert (sent["metadata"], sent["logit_bias"], sent["stop"]) == ({"team": "red"}, {"50256": -100}, ["\n\n"])
    assert sent["guided_choice"] == ["yes", "no"]
    assert sent["chat_template_kwargs"] == {"enable_thinking": False}


def test_neither_the_callers_key_nor_its_headers_reach_the_provider(client: OpenAI, served: Served) -> None:
    client.chat.completions.create(model="qa_agent", messages=QUESTION, extra_headers={"x-private": "yes"})
    assert served.simulator.last_request is not None
    seen = served.simulator.last_request.headers
    assert KEY not in str(seen)
    assert not [name for name in seen if name.startswith(("x-", "authorization", "cookie"))]


def test_the_same_seed_says_the_same_and_another_does_not(client: OpenAI) -> None:
    def said(seed: int) -> str | None:
        answer = client.chat.completions.create(model="sim/simulator", messages=QUESTION, seed=seed)
        return answer.choices[0].message.content

    assert said(1) == said(1) != said(2)


def test_the_raw_response_tells_how_it_was_answered(client: OpenAI) -> None:
    reply = client.chat.completions.with_raw_response.create(model="qa_agent", messages=QUESTION)
    headers = reply.headers
    assert headers["x-request-id"].startswith("req-")
    assert headers["x-gateway-agent"] == "qa_agent"
    assert headers["x-gateway-variant"] == "baseline"  # Nobody in particular asked, so no experiment.
    assert headers["x-gateway-model"] == "sim/simulator-small"
    assert headers["x-gateway-attempts"] == "1"
    assert float(headers["x-gateway-overhead-ms"]) >= 0
    assert "x-gateway-bucket" not in headers
    assert headers["x-ratelimit-limit-requests"] == "10000"  # The provider's, for SDKs that pace themselves.
    assert reply.parse()._request_id == headers["x-request-id"]


def test_headers_name_the_agent_and_the_user(client: OpenAI) -> None:
    create = client.chat.completions.with_raw_response.create
    for user in ("ann", "ben", "cleo", "dirk"):
        reply = create(
            model="auto", messages=QUESTION, extra_headers={"x-gateway-agent": "legal_agent", "x-gateway-user": user}
        )
        bucket = bucket_of("legal_agent", user)
        assert reply.headers["x-gateway-agent"] == "legal_agent"
        assert reply.headers["x-gateway-bucket"] == str(bucket)
        assert reply.headers["x-gateway-variant"] == ("finetuned" if bucket < 5000 else "baseline")


def test_auto_lets_the_rules_choose_and_says_which(client: OpenAI) -> None:
    reply = client.chat.completions.with_raw_response.create(
        model="auto", messages=[{"role": "user", "content": "Is this contract valid?"}]
    )
    assert reply.headers["x-gateway-agent"] == "legal_agent"
    assert reply.headers["x-gateway-route"] == 'contracts: is about a contract (word "contract")'


def test_a_closed_dialect_gets_only_its_own_fields_and_the_caller_hears_of_it(client: OpenAI, served: Served) -> None:
    reply = client.chat.completions.with_raw_response.create(
        model="legal_agent", messages=QUESTION, seed=3, user="u-1", max_completion_tokens=9
    )
    sent = served.sent
    assert (sent["random_seed"], sent["max_tokens"]) == (3, 9)
    assert not {"seed", "user", "max_completion_tokens"} & set(sent)
    assert reply.headers["x-gateway-fields-dropped"] == "user"


def test_models_lists_what_may_be_asked_for(client: OpenAI, served: Served) -> None:
    names = [model.id for model in client.models.list()]
    assert names[0] == "auto"
    assert {"qa_agent", "support_agent", "legal_agent", "sim/simulator-small"} <= set(names)
    assert client.models.retrieve("sim/simulator-small").id == "sim/simulator-small"
    with OpenAI(base_url=served.base_url, api_key=QA_KEY) as narrow:
        assert [model.id for model in narrow.models.list()] == ["auto", "qa_agent"]


# --- Fallback and retries --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", FAULTS_WITH_FALLBACK)
@pytest.mark.parametrize("stream", [False, True])
def test_where_a_model_fails_the_next_one_answers(client: OpenAI, served: Served, fault: str, stream: bool) -> None:
    reply = client.chat.completions.with_raw_response.create(
        model=f"after_{fault}",
        messages=QUESTION,
        stream=stream,
        extra_headers={"x-gateway-variant": "finetuned"},
    )
    answer = reply.parse()
    if isinstance(answer, openai.Stream):
        assert [chunk.choices[0].finish_reason for chunk in answer][-1] == "stop"
    else:
        assert answer.choices[0].message.content
    assert reply.headers["x-gateway-model"] == "sim/simulator-large"
    assert reply.headers["x-gateway-fallback"] == f"sim/fault:{fault}"
    tries = FAULTS_WITH_FALLBACK[fault]
    assert reply.headers["x-gateway-attempts"] == str(tries + 1)
    record = served.recorded(reply.headers["x-request-id"])
    assert record.is_fallback
    assert [attempt.fault is None for attempt in record.attempts] == [False] * tries + [True]
    assert record.cost_basis == "exact"


def test_a_plain_answer_that_breaks_off_falls_back_too(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="after_cut", messages=QUESTION, extra_headers={"x-gateway-variant": "finetuned"}
    )
    assert answer.model == "simulator-large"


def test_where_all_models_fail_the_last_one_is_heard_and_all_are_named(client: OpenAI, served: Served) -> None:
    with pytest.raises(openai.RateLimitError) as caught:
        client.chat.completions.create(
            model="support_agent", messages=QUESTION, extra_headers={"x-gateway-variant": "finetuned"}
        )
    assert "sim/fault:503: server; sim/fault:429-bare: rate_limited" in caught.value.message
    assert caught.value.request_id is not None
    assert served.recorded(caught.value.request_id).status == 429


def test_the_client_may_refuse_the_fallback(client: OpenAI) -> None:
    headers = {"x-gateway-variant": "finetuned", "x-gateway-fallback": "off"}
    with pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(model="support_agent", messages=QUESTION, extra_headers=headers)
    assert caught.value.status_code == 503


@pytest.mark.parametrize(("status", "fails"), [(503, 1), (429, 1), (429, 2)])
def test_what_a_provider_says_in_passing_the_caller_never_hears(
    client: OpenAI, served: Served, status: int, fails: int
) -> None:
    served.moody.fail(fails, status=status)
    reply = client.chat.completions.with_raw_response.create(model="moody/m", messages=QUESTION)
    assert reply.parse().choices[0].message.content == "Here I am."
    assert served.moody.calls == fails + 1
    assert reply.headers["x-gateway-attempts"] == str(fails + 1)
    assert "x-gateway-fallback" not in reply.headers
    record = served.recorded(reply.headers["x-request-id"])
    assert not record.is_fallback
    assert [attempt.status for attempt in record.attempts] == [status] * fails + [200]
    # Each retry was as late as the provider had asked.
    gaps = [later.started_ms - one.started_ms for one, later in itertools.pairwise(record.attempts)]
    assert all(gap >= 5 for gap in gaps)


def test_a_provider_that_wants_less_for_longer_is_heard_with_its_own_advice(client: OpenAI, served: Served) -> None:
    served.moody.fail(99, status=429)
    with pytest.raises(openai.RateLimitError, match="overloaded") as caught:
        client.chat.completions.create(model="moody/m", messages=QUESTION)
    assert served.moody.calls == 3
    assert caught.value.response.headers["retry-after-ms"] == "5"
    assert caught.value.response.headers["x-gateway-attempts"] == "3"


def test_the_sdk_retries_an_overloaded_provider_until_it_answers(served: Served) -> None:
    # The gateway asks twice for each time that the SDK does.
    served.moody.fail(4)
    with OpenAI(base_url=served.base_url, api_key=KEY, max_retries=2) as client:
        answer = client.chat.completions.create(model="moody/m", messages=QUESTION)
    assert answer.choices[0].message.content == "Here I am."
    assert served.moody.calls == 5


def test_the_sdk_gives_up_after_its_retries_with_the_providers_words(served: Served) -> None:
    served.moody.fail(99)
    with (
        OpenAI(base_url=served.base_url, api_key=KEY, max_retries=1) as client,
        pytest.raises(openai.InternalServerError, match="overloaded") as caught,
    ):
        client.chat.completions.create(model="moody/m", messages=QUESTION)
    assert served.moody.calls == 2 * 2
    assert caught.value.request_id is not None


# --- Errors ----------------------------------------------------------------------------------------------------------


def test_a_wrong_key_is_an_authentication_error(served: Served) -> None:
    with (
        OpenAI(base_url=served.base_url, api_key="wrong") as client,
        pytest.raises(openai.AuthenticationError) as caught,
    ):
        client.chat.completions.create(model="qa_agent", messages=QUESTION)
    assert (caught.value.status_code, caught.value.code) == (401, "invalid_api_key")
    assert "wrong" not in caught.value.message


def test_an_agent_the_key_may_not_use_is_a_permission_error(served: Served) -> None:
    with (
        OpenAI(base_url=served.base_url, api_key=QA_KEY) as client,
        pytest.raises(openai.PermissionDeniedError) as caught,
    ):
        client.chat.completions.create(model="legal_agent", messages=QUESTION)
    assert caught.value.code == "agent_not_allowed"


def test_an_unknown_agent_is_not_found_and_the_known_ones_are_named(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="qa_agent, support_agent") as caught:
        client.chat.completions.create(model="qa_agnet", messages=QUESTION)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("qa_agnet")


def test_an_endpoint_that_is_not_served_is_not_found(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.embeddings.create(model="qa_agent", input="text")
    assert caught.value.code == "not_found"


@pytest.mark.parametrize(
    "fields, code, param",
    [
        ({"n": 1000}, "invalid_value", "n"),
        ({"temperature": "hot"}, "invalid_type", "temperature"),
        ({"messages": []}, "invalid_value", "messages"),
        ({"max_tokens": 0}, "invalid_value", "max_tokens"),
        ({"extra_headers": {"x-gateway-user": "a b"}}, "invalid_header", "x-gateway-user"),
        ({"extra_headers": {"x-gateway-variant": "best"}}, "invalid_header", "x-gateway-variant"),
        ({"model": "sim/fault:400-context"}, "context_length_exceeded", "messages"),
        ({"model": "sim/fault:400-filter"}, "content_filter", "prompt"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_wrong_with_a_request_is_a_bad_request(
    client: OpenAI, fields: dict[str, object], code: str, param: str, stream: bool
) -> None:
    asked: dict[str, object] = {"model": "qa_agent", "messages": QUESTION, "stream": stream, **fields}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**asked)  # type: ignore[call-overload]
    assert (caught.value.code, caught.value.param) == (code, param)


def test_a_used_up_cap_is_a_rate_limit_error_that_is_not_retried(served: Served) -> None:
    with OpenAI(base_url=served.base_url, api_key=KEY, max_retries=5) as client:
        before = served.simulator.calls["capped"]
        assert client.chat.completions.create(model="capped_agent", messages=QUESTION).choices
        with pytest.raises(openai.RateLimitError) as caught:
            client.chat.completions.create(model="capped_agent", messages=QUESTION)
    assert (caught.value.type, caught.value.code) == ("insufficient_quota", "budget_exceeded")
    assert caught.value.response.headers["x-should-retry"] == "false"
    assert "x-stainless-retry-count" not in caught.value.response.headers
    assert served.simulator.calls["capped"] == before + 1


@pytest.mark.parametrize(
    "fault, status, code",
    [
        ("401", 502, "upstream_auth"),
        ("500", 500, "upstream_error"),
        ("html", 502, "upstream_error"),
        ("reset", 502, "upstream_unreachable"),
        ("empty", 502, "upstream_invalid"),
        ("error-in-200", 502, "upstream_error"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_failing_provider_is_an_internal_server_error(
    client: OpenAI, fault: str, status: int, code: str, stream: bool
) -> None:
    with pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(model=f"sim/fault:{fault}", messages=QUESTION, stream=stream)
    assert (caught.value.status_code, caught.value.code) == (status, code)


def test_the_providers_rate_limit_keeps_its_class_and_its_advice(client: OpenAI) -> None:
    with pytest.raises(openai.RateLimitError) as caught:
        client.chat.completions.create(model="sim/fault:429", messages=QUESTION)
    assert caught.value.code == "rate_limit_exceeded"
    assert caught.value.response.headers["retry-after"] == "2"
    # Longer than the policy waits, so it was the caller who was told to, at once.
    assert caught.value.response.headers["x-gateway-attempts"] == "1"


@pytest.mark.parametrize("fault", ["cut", "short", "malformed"])
def test_half_a_plain_answer_is_no_answer(client: OpenAI, fault: str) -> None:
    with pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(model=f"sim/fault:{fault}", messages=QUESTION)
    assert caught.value.status_code == 502


def read_until_it_breaks(
    stream: openai.Stream[ChatCompletionChunk],
) -> tuple[list[ChatCompletionChunk], openai.APIError]:
    """What came, and the error that the SDK raised in the end."""
    chunks: list[ChatCompletionChunk] = []
    with pytest.raises(openai.APIError) as caught:
        chunks.extend(stream)
    return chunks, caught.value


def joined(chunks: Iterable[ChatCompletionChunk]) -> str:
    """The text of a stream of one choice."""
    return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)


# What an agent asks for, and the code and status of the error its stream ends in.
BROKEN_STREAMS: dict[str, tuple[dict[str, Any], str, int]] = {
    "cut, and nobody behind": ({"model": "sim/fault:cut"}, "upstream_cut", 502),
    "ended early, and nobody behind": ({"model": "sim/fault:short"}, "upstream_cut", 502),
    "an error event": ({"model": "sim/fault:error-in-stream"}, "upstream_error", 502),
    "silence": ({"model": "hasty/fault:stall"}, "upstream_timeout", 504),
    "cut, and the next model says something else": ({"model": "after_cut"}, "upstream_cut", 502),
    "cut in a tool call": ({"model": "joined_agent", "tools": WEATHER}, "upstream_cut", 502),
    "cut with two choices": ({"model": "joined_agent", "n": 2}, "upstream_cut", 502),
    "cut, and the policy wants an error": ({"model": "strict_agent"}, "upstream_cut", 502),
    "cut, and only itself behind": ({"model": "lone_agent"}, "upstream_cut", 502),
    "cut, and the fallback refused by the caller": (
        {"model": "joined_agent", "extra_headers": {"x-gateway-fallback": "off"}}, "upstream_cut", 502,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN_STREAMS)
def test_a_stream_that_breaks_off_and_cannot_be_joined_raises_and_never_looks_whole(
    client: OpenAI, served: Served, case: str
) -> None:
    fields, code, status = BROKEN_STREAMS[case]
    headers = {"x-gateway-variant": "finetuned", **fields.get("extra_headers", {})}
    asked: dict[str, Any] = {"messages": QUESTION, "stream": True, **fields, "extra_headers": headers}
    stream = client.chat.completions.create(**asked)
    chunks, error = read_until_it_breaks(stream)
    # The SDK raises its base class for what comes inside a stream; code, type and message are the gateway's.
    assert (error.code, error.type) == (code, "server_error")
    assert error.message
    deltas = [choice.delta for chunk in chunks for choice in chunk.choices]
    assert any(delta.content or delta.tool_calls for delta in deltas)
    assert not [choice for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    record = served.recorded(stream.response.headers["x-request-id"])
    assert (record.error, record.status, record.finish_reason) == (code, status, "")


def test_the_simulators_models_say_different_things_so_half_an_answer_of_one_is_never_ended_by_another(
    client: OpenAI, served: Served
) -> None:
    def said(model: str) -> str:
        answer = client.chat.completions.create(model=model, messages=QUESTION)
        return answer.choices[0].message.content or ""

    stream = client.chat.completions.create(
        model="after_cut", messages=QUESTION, stream=True, extra_headers={"x-gateway-variant": "finetuned"}
    )
    chunks, error = read_until_it_breaks(stream)
    assert "differs from what had gone out" in error.message
    text = joined(chunks)
    assert text
    assert not said("sim/simulator-large").startswith(text)
    # All of it was one model's: every word is what the cut one had said by itself.
    alone = client.chat.completions.create(model="sim/fault:cut", messages=QUESTION, stream=True)
    assert joined(read_until_it_breaks(alone)[0]) == text
    record = served.recorded(stream.response.headers["x-request-id"])
    assert [attempt.ref for attempt in record.attempts] == ["sim/fault:cut", "sim/simulator-large"]
    assert [attempt.fault for attempt in record.attempts] == ["cut", "cut"]


@pytest.mark.parametrize("agent", ["joined_agent", "prefixed_agent"])
def test_a_stream_that_breaks_off_and_can_be_joined_is_one_whole_answer(
    client: OpenAI, served: Served, agent: str
) -> None:
    stream = client.chat.completions.create(
        model=agent,
        messages=QUESTION,
        stream=True,
        stream_options={"include_usage": True},
        extra_headers={"x-gateway-variant": "finetuned"},
    )
    chunks = list(stream)
    assert joined(chunks) == "".join(Fixed.WORDS)
    assert {chunk.id for chunk in chunks} == {"chatcmpl-cut"}
    reasons = [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    assert reasons == ["stop"]
    assert [chunk.usage.model_dump(exclude_none=True) for chunk in chunks if chunk.usage] == [Fixed.USAGE]
    assert sum(choice.delta.role is not None for chunk in chunks for choice in chunk.choices) == 1
    record = served.recorded(stream.response.headers["x-request-id"])
    assert (record.status, record.error, record.finish_reason, record.is_fallback) == (200, "", "stop", True)
    assert record.model_answered == "whole"
    assert [attempt.fault for attempt in record.attempts] == ["cut", None]
    # One was run anew from the start, the other was shown what had been said.
    last = served.fixed.bodies[-1]["messages"][-1]
    if agent == "prefixed_agent":
        assert last == {"role": "assistant", "content": "".join(Fixed.WORDS[: Fixed.KEPT]), "prefix": True}
    else:
        assert last["role"] == "user"


def test_a_stream_that_is_held_back_falls_back_whole_whatever_the_next_model_says(
    client: OpenAI, served: Served
) -> None:
    headers = {"x-gateway-variant": "finetuned"}
    stream = client.chat.completions.create(model="held_agent", messages=QUESTION, stream=True, extra_headers=headers)
    text = joined(stream)
    plain = client.chat.completions.create(model="sim/simulator-large", messages=QUESTION)
    assert text == plain.choices[0].message.content
    assert stream.response.headers["x-gateway-fallback"] == "sim/fault:cut"
    record = served.recorded(stream.response.headers["x-request-id"])
    assert (record.model_answered, record.finish_reason) == ("simulator-large", "stop")


def test_a_malformed_event_is_left_out_and_the_answer_ends_as_it_should(client: OpenAI, served: Served) -> None:
    stream = client.chat.completions.create(model="sim/fault:malformed", messages=QUESTION, stream=True)
    chunks = list(stream)
    assert chunks[-1].choices[0].finish_reason == "stop"
    record = served.recorded(stream.response.headers["x-request-id"])
    assert (record.status, record.error, len(record.attempts)) == (200, "", 1)
    # The simulator put it beside the answer's own events, so nothing of the answer is missing.
    assert record.usage is not None
    assert sum(bool(chunk.choices[0].delta.content) for chunk in chunks) == record.usage.completion_tokens


# --- Deadlines and leaving -------------------------------------------------------------------------------------------


def test_the_clients_own_timeout_ends_the_work_at_the_provider(client: OpenAI, served: Served) -> None:
    # Without the SDK's hint the gateway cannot know how long it would wait.
    with pytest.raises(openai.APITimeoutError):
        client.chat.completions.create(
            model="sim/fault:silent",
            messages=QUESTION,
            timeout=0.2,
            extra_headers={"x-stainless-read-timeout": openai.Omit()},
        )
    wait_until(lambda: served.simulator.open_calls == 0)


def test_the_gateway_answers_before_a_patient_client_gives_up(client: OpenAI, served: Served) -> None:
    with pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(
            model="sim/fault:silent", messages=QUESTION, timeout=30, extra_headers={"x-gateway-timeout-ms": "100"}
        )
    assert (caught.value.status_code, caught.value.code) == (504, "upstream_timeout")
    wait_until(lambda: served.simulator.open_calls == 0)


def test_a_stalled_stream_raises_at_the_callers_deadline(client: OpenAI) -> None:
    stream = client.chat.completions.create(
        model="sim/fault:stall",
        messages=QUESTION,
        stream=True,
        timeout=30,
        extra_headers={"x-gateway-timeout-ms": "150"},
    )
    with pytest.raises(openai.APIError, match="stalled"):
        list(stream)


def test_a_read_timeout_is_for_the_next_bytes_and_cuts_no_stream_that_flows(client: OpenAI) -> None:
    stream = client.chat.completions.create(
        model="slow/simulator", messages=QUESTION, stream=True, timeout=httpx.Timeout(0.5)
    )
    chunks = list(stream)
    # Some twenty milliseconds apart, so that together they take longer than the client waits for any one of them.
    assert len(chunks) > 30
    assert chunks[-1].choices[0].finish_reason == "stop"


async def test_a_cancelled_stream_ends_the_providers_stream_and_is_recorded(
    async_client: AsyncOpenAI, served: Served
) -> None:
    request_id = ""
    flowing = asyncio.Event()

    async def read() -> None:
        nonlocal request_id
        stream = await async_client.chat.completions.create(model="sim/fault:stall", messages=QUESTION, stream=True)
        request_id = stream.response.headers["x-request-id"]
        async for _ in stream:
            flowing.set()

    reading = asyncio.create_task(read())
    await asyncio.wait_for(flowing.wait(), 10)
    assert served.simulator.open_streams == 1
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    await asyncio.to_thread(wait_until, lambda: served.simulator.open_streams == 0)
    record = await asyncio.to_thread(served.recorded, request_id)
    assert record.client_left
    assert record.finish_reason == ""


def test_a_stream_closed_early_ends_the_providers_stream(client: OpenAI, served: Served) -> None:
    with client.chat.completions.create(model="sim/fault:stall", messages=QUESTION, stream=True) as stream:
        next(iter(stream))
        request_id = stream.response.headers["x-request-id"]
    wait_until(lambda: served.simulator.open_streams == 0)
    assert served.recorded(request_id).client_left


async def test_a_cancelled_plain_call_ends_the_providers_work(async_client: AsyncOpenAI, served: Served) -> None:
    asking = asyncio.create_task(async_client.chat.completions.create(model="sim/fault:silent", messages=QUESTION))
    await asyncio.to_thread(wait_until, lambda: served.simulator.open_calls == 1)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    await asyncio.to_thread(wait_until, lambda: served.simulator.open_calls == 0)
