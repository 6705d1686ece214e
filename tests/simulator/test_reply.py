"""How an answer goes out: the stream carries exactly what the plain answer says, at the pace configured."""

from typing import Any

import msgspec
import pytest

from gateway.domain.settings import SimulatorSettings
from gateway.simulator.chat import ChatRequest, RequestRefused, read_request
from gateway.simulator.reply import (
    DONE,
    Reply,
    good_reply,
    json_reply,
    model_card,
    pace,
    refused_reply,
)

WEATHER = {"type": "function", "function": {"name": "get_weather"}}


def request(**fields: Any) -> ChatRequest:
    return read_request({"model": "m", "messages": [{"role": "user", "content": "refunds"}], **fields})


def reply(*, settings: SimulatorSettings | None = None, **fields: Any) -> Reply:
    return good_reply(request(**fields), settings or SimulatorSettings(), now_s=1_700_000_000)


def plain(**fields: Any) -> Any:
    return msgspec.json.decode(reply(**fields).parts[0].data)


def chunks(**fields: Any) -> list[Any]:
    parts = reply(stream=True, **fields).parts
    assert parts[-1].data == DONE
    assert all(part.data.startswith(b"data: ") and part.data.endswith(b"\n\n") for part in parts)
    return [msgspec.json.decode(part.data[6:]) for part in parts[:-1]]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"n": 3},
        {"max_tokens": 4},
        {"stop": "This"},
        {"tools": [WEATHER], "tool_choice": "required", "n": 2},
        {"response_format": {"type": "json_object"}},
    ],
)
def test_the_chunks_add_up_to_the_plain_answer(fields: dict[str, Any]) -> None:
    whole = plain(**fields)
    streamed = chunks(**fields, stream_options={"include_usage": True})
    for choice in whole["choices"]:
        own = [
            chunk["choices"][0]
            for chunk in streamed
            if chunk["choices"] and chunk["choices"][0]["index"] == choice["index"]
        ]
        assert own[0]["delta"]["role"] == "assistant"
        assert [one["finish_reason"] for one in own] == [None] * (len(own) - 1) + [choice["finish_reason"]]
        message = choice["message"]
        if message["content"] is not None:
            assert "".join(one["delta"].get("content", "") for one in own) == message["content"]
        else:
            calls = [one["delta"]["tool_calls"][0] for one in own if "tool_calls" in one["delta"]]
            called = message["tool_calls"][0]
            assert (calls[0]["id"], calls[0]["function"]["name"]) == (
                called["id"],
                called["function"]["name"],
            )
            assert "".join(call["function"]["arguments"] for call in calls) == called["function"]["arguments"]
    assert streamed[-1]["choices"] == []
    assert streamed[-1]["usage"] == whole["usage"]
    assert {chunk["id"] for chunk in streamed} == {whole["id"]}
    deltas = sum(part.kind == "token" for part in reply(stream=True, **fields).parts)
    assert deltas == whole["usage"]["completion_tokens"]


def test_the_usage_chunk_comes_only_when_asked_for() -> None:
    assert all("usage" not in chunk for chunk in chunks())
    assert all("usage" not in chunk for chunk in chunks(stream_options={"include_usage": False}))
    asked = chunks(stream_options={"include_usage": True})
    assert [chunk["usage"] is None for chunk in asked] == [True] * (len(asked) - 1) + [False]


def test_a_plain_answer_takes_as_long_as_its_longest_choice_streamed() -> None:
    settings = SimulatorSettings(first_token_ms=10, per_token_ms=1, jitter=0)
    body = reply(settings=settings, n=3).parts[0]
    streamed = reply(settings=settings, n=3, stream=True).parts
    assert body.wait_ms == pytest.approx(sum(part.wait_ms for part in streamed))
    assert streamed[0].wait_ms == 10
    assert next(part for part in streamed if part.kind == "token").wait_ms == 1


def test_the_pace_strays_by_at_most_the_jitter_and_always_alike() -> None:
    settings = SimulatorSettings(first_token_ms=100, per_token_ms=10, jitter=0.3)
    paces = [pace(request(seed=seed), settings) for seed in range(200)]
    assert paces[0] == pace(request(seed=0), settings)
    assert all(70 <= one.first_ms <= 130 and 7 <= one.token_ms <= 13 for one in paces)
    assert min(one.first_ms for one in paces) < 80 < 120 < max(one.first_ms for one in paces)


def test_finetuned_models_may_be_faster() -> None:
    settings = SimulatorSettings(first_token_ms=100, per_token_ms=10, jitter=0, finetuned_speedup=2)
    assert pace(request(model="ft:small"), settings).first_ms == 50
    assert pace(request(model="small"), settings).first_ms == 100


def test_without_latency_nothing_waits() -> None:
    settings = SimulatorSettings(first_token_ms=0, per_token_ms=0)
    for stream in (False, True):
        assert all(part.wait_ms == 0 for part in reply(settings=settings, stream=stream).parts)


def test_the_length_of_a_body_is_declared_and_that_of_a_stream_is_not() -> None:
    assert reply().declared_bytes == len(reply().parts[0].data)
    assert reply(stream=True).declared_bytes is None


def test_a_refusal_is_json_with_its_retry_after() -> None:
    refused = refused_reply(RequestRefused(429, "Later.", retry_after_s=2))
    assert (refused.status, refused.headers["retry-after"]) == (429, "2")
    assert refused.parts[0].data == json_reply(429, refused_body("Later.")).parts[0].data
    assert "retry-after" not in refused_reply(RequestRefused(429, "Later.")).headers


def refused_body(message: str) -> Any:
    return {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}}


def test_any_model_has_a_card_but_a_retired_one() -> None:
    assert model_card("ft:x/y")["id"] == "ft:x/y"
    assert model_card("any")["deprecation"] is None
    assert model_card("any-deprecated")["deprecation"] == "2026-12-31T00:00:00Z"
    with pytest.raises(RequestRefused) as refused:
        model_card("any-retired")
    assert refused.value.status == 404
