"""The mistralai package against a running gateway: its `server_url` is changed, nothing else."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from mistralai.client import Mistral
from mistralai.client.errors import ResponseValidationError, SDKError

from tests.clients.served import KEY, Fixed, Served

QUESTION: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
WEATHER: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather in a city.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]


@pytest.fixture
def client(served: Served) -> Iterator[Mistral]:
    """The SDK adds `/v1/...` to its server's address by itself."""
    with Mistral(api_key=KEY, server_url=served.url) as client:
        yield client


@pytest.mark.parametrize("agent", ["qa_agent", "legal_agent", "auto"])
def test_an_answer_comes_whole_with_its_usage(client: Mistral, agent: str) -> None:
    answer = client.chat.complete(model=agent, messages=QUESTION)
    assert answer.choices[0].message is not None
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == (answer.usage.prompt_tokens or 0) + (answer.usage.completion_tokens or 0) > 0


@pytest.mark.parametrize("agent", ["qa_agent", "legal_agent"])
def test_a_stream_says_what_the_plain_answer_says(client: Mistral, agent: str) -> None:
    plain = client.chat.complete(model=agent, messages=QUESTION)
    assert plain.choices[0].message is not None
    with client.chat.stream(model=agent, messages=QUESTION) as stream:
        chunks = [event.data for event in stream]
    texts = [choice.delta.content for chunk in chunks for choice in chunk.choices]
    assert "".join(text for text in texts if isinstance(text, str)) == plain.choices[0].message.content
    reasons = [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    assert reasons == ["stop"]


async def test_the_async_client_streams(served: Served) -> None:
    async with Mistral(api_key=KEY, server_url=served.url) as client:
        stream = await client.chat.stream_async(model="qa_agent", messages=QUESTION)
        async with stream:
            chunks = [event.data async for event in stream]
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_a_tool_is_called_and_its_result_answered(client: Mistral, served: Served) -> None:
    messages = list(QUESTION)
    asked = client.chat.complete(model="legal_agent", messages=messages, tools=WEATHER, tool_choice="any")
    assert served.sent["tool_choice"] == "any"
    said = asked.choices[0].message
    assert said is not None
    assert said.tool_calls
    call = said.tool_calls[0]
    assert call.function.name == "get_weather"
    arguments = call.function.arguments
    assert set(json.loads(arguments) if isinstance(arguments, str) else arguments) == {"city"}
    messages += [said, {"role": "tool", "tool_call_id": call.id, "name": "get_weather", "content": "18 degrees"}]
    answered = client.chat.complete(model="legal_agent", messages=messages, tools=WEATHER)
    assert answered.choices[0].message is not None
    assert "18 degrees" in str(answered.choices[0].message.content)


def test_its_own_fields_reach_a_provider_of_its_own_kind(client: Mistral, served: Served) -> None:
    client.chat.complete(model="legal_agent", messages=QUESTION, random_seed=7, safe_prompt=True, max_tokens=5)
    sent = served.sent
    assert (sent["random_seed"], sent["safe_prompt"], sent["max_tokens"]) == (7, True, 5)
    assert served.simulator.last_request is not None
    # The provider sees the gateway's key for it, never the caller's.
    assert served.simulator.last_request.headers["authorization"] == "Bearer key-of-the-provider"


@pytest.mark.parametrize(
    "model, status, code",
    [
        ("qa_agnet", 404, "model_not_found"),
        ("sim/fault:400-context", 400, "context_length_exceeded"),
        ("sim/fault:429-bare", 429, "rate_limit_exceeded"),
        ("sim/fault:500", 500, "upstream_error"),
        ("sim/fault:reset", 502, "upstream_unreachable"),
    ],
)
def test_errors_carry_their_status_and_body(client: Mistral, model: str, status: int, code: str) -> None:
    for call in (client.chat.complete, client.chat.stream):
        with pytest.raises(SDKError) as caught:
            call(model=model, messages=QUESTION)
        assert caught.value.status_code == status
        assert json.loads(caught.value.body)["error"]["code"] == code


def test_a_wrong_key_is_refused(served: Served) -> None:
    with Mistral(api_key="wrong", server_url=served.url) as client, pytest.raises(SDKError) as caught:
        client.chat.complete(model="qa_agent", messages=QUESTION)
    assert caught.value.status_code == 401


def test_its_list_of_models_names_the_agents(client: Mistral) -> None:
    listed = client.models.list()
    assert listed.data is not None
    assert {"auto", "qa_agent", "legal_agent"} <= {model.id for model in listed.data}


@pytest.mark.parametrize("fault", ["cut", "short", "error-in-stream"])
def test_a_stream_that_breaks_off_raises_and_never_looks_whole(client: Mistral, fault: str) -> None:
    # This SDK knows no errors inside a stream; it finds that the event is no chunk, and quotes it.
    events: list[Any] = []
    with (
        client.chat.stream(model=f"sim/fault:{fault}", messages=QUESTION) as stream,
        pytest.raises(ResponseValidationError, match=r"'error': \{'message'"),
    ):
        events.extend(stream)
    assert events
    assert not [event for event in events if event.data.choices[0].finish_reason]


def test_a_malformed_event_is_left_out(client: Mistral) -> None:
    with client.chat.stream(model="sim/fault:malformed", messages=QUESTION) as stream:
        events = list(stream)
    assert events[-1].data.choices[0].finish_reason == "stop"


def test_a_stream_that_breaks_off_and_can_be_joined_is_one_whole_answer(client: Mistral) -> None:
    headers = {"x-gateway-variant": "finetuned"}
    with client.chat.stream(model="joined_agent", messages=QUESTION, http_headers=headers) as stream:
        choices = [choice for event in stream for choice in event.data.choices]
    assert "".join(str(choice.delta.content or "") for choice in choices) == "".join(Fixed.WORDS)
    assert [choice.finish_reason for choice in choices if choice.finish_reason] == ["stop"]
