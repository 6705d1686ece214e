"""langchain-openai's ChatOpenAI against a running gateway: chains and agents built on it notice nothing."""

from typing import Any

import openai
import pytest
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

from tests.clients.served import KEY, Fixed, Served

QUESTION = "What is the capital of France?"


class Verdict(BaseModel):
    """What a structured answer is parsed into."""

    is_valid: bool
    clauses: list[str]


@tool
def get_weather(city: str) -> str:
    """The weather in a city."""
    return f"18 degrees in {city}"


def model_of(served: Served, agent: str = "qa_agent", **settings: Any) -> ChatOpenAI:
    """A model as an agent would make it."""
    return ChatOpenAI(base_url=served.base_url, api_key=KEY, model=agent, max_retries=0, **settings)


def test_invoke_answers_with_usage_and_the_names_of_things(served: Served) -> None:
    answer = model_of(served).invoke(QUESTION)
    assert isinstance(answer, AIMessage)
    assert answer.text
    assert answer.response_metadata["finish_reason"] == "stop"
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["output_tokens"] > 0


def test_a_stream_says_what_invoke_says(served: Served) -> None:
    model = model_of(served)
    chunks = list(model.stream(QUESTION))
    assert len(chunks) > 2
    assert "".join(chunk.text for chunk in chunks) == model.invoke(QUESTION).text


async def test_astream_ends_with_usage_where_it_was_asked_for(served: Served) -> None:
    whole: AIMessageChunk | None = None
    async for chunk in model_of(served, stream_usage=True).astream(QUESTION):
        whole = chunk if whole is None else whole + chunk
    assert whole is not None
    assert whole.usage_metadata is not None
    assert whole.usage_metadata["output_tokens"] > 0
    assert whole.response_metadata["finish_reason"] == "stop"


def test_a_bound_tool_is_called_and_its_result_answered(served: Served) -> None:
    model = model_of(served)
    asked = model.bind_tools([get_weather], tool_choice="required").invoke(QUESTION)
    (call,) = asked.tool_calls
    assert call["name"] == "get_weather"
    assert set(call["args"]) == {"city"}
    result = get_weather.invoke(call)
    assert isinstance(result, ToolMessage)
    answered = model.bind_tools([get_weather]).invoke([HumanMessage(QUESTION), asked, result])
    assert not answered.tool_calls
    assert "18 degrees" in answered.text


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output_is_an_object_of_the_callers_class(served: Served, method: Any) -> None:
    found = model_of(served).with_structured_output(Verdict, method=method).invoke(QUESTION)
    assert isinstance(found, Verdict)


def test_several_prompts_in_one_batch_are_all_answered(served: Served) -> None:
    answers = model_of(served, agent="auto").batch([f"question {number}" for number in range(8)])
    assert len({answer.id for answer in answers}) == 8
    assert all(answer.text for answer in answers)


def test_headers_and_fields_of_its_own_reach_the_gateway(served: Served) -> None:
    model = model_of(
        served,
        agent="auto",
        default_headers={"x-gateway-agent": "legal_agent"},
        seed=7,
        include_response_headers=True,
    )
    answer = model.invoke(QUESTION)
    assert answer.response_metadata["headers"]["x-gateway-agent"] == "legal_agent"
    assert served.sent["random_seed"] == 7


def test_errors_keep_the_classes_of_the_openai_package(served: Served) -> None:
    with pytest.raises(openai.NotFoundError, match="qa_agent"):
        model_of(served, agent="qa_agnet").invoke(QUESTION)
    with pytest.raises(openai.RateLimitError):
        model_of(served, agent="sim/fault:429-bare").invoke(QUESTION)


async def test_a_stream_that_breaks_off_raises(served: Served) -> None:
    said: list[str] = []

    async def read() -> None:
        async for chunk in model_of(served, agent="sim/fault:cut").astream(QUESTION):
            said.append(chunk.text)

    with pytest.raises(openai.APIError):
        await read()
    assert "".join(said)


async def test_a_stream_that_breaks_off_and_can_be_joined_is_one_whole_answer(served: Served) -> None:
    model = model_of(served, agent="joined_agent", default_headers={"x-gateway-variant": "finetuned"})
    chunks = [chunk async for chunk in model.astream(QUESTION)]
    assert "".join(chunk.text for chunk in chunks) == "".join(Fixed.WORDS)
    reasons = [chunk.response_metadata.get("finish_reason") for chunk in chunks]
    assert [reason for reason in reasons if reason] == ["stop"]
