"""The embedded upstream over real HTTP: the openai SDK is content, raw sockets see every fault's bytes."""

import asyncio
import contextlib
import io
import logging
from collections.abc import AsyncIterator
from typing import Any, Literal

import aiohttp
import msgspec
import openai
import pytest
from mistralai.client import Mistral
from pydantic import BaseModel, Field

from gateway.domain.settings import SimulatorSettings
from gateway.simulator.server import FAULTS, Simulator

INSTANT = SimulatorSettings(first_token_ms=0, per_token_ms=0)
QUESTION: Any = [{"role": "user", "content": "How do refunds work at Acme?"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "days": {"type": "integer", "minimum": 1, "maximum": 7},
            },
            "required": ["city", "days"],
        },
    },
}


@pytest.fixture
async def simulator() -> AsyncIterator[Simulator]:
    started = await Simulator.start(INSTANT)
    yield started
    await started.stop()


@pytest.fixture
async def client(simulator: Simulator) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=simulator.base_url, api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(autouse=True)
def no_errors_logged(caplog: pytest.LogCaptureFixture) -> Any:
    """Whatever a client does, the server has nothing to complain of."""
    yield
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []


async def until(condition: Any) -> None:
    """Lets the loop turn until the condition holds; the test's own time limit ends it if it never does."""
    while not condition():  # noqa: ASYNC110 - what is waited for happens in the server, which sends no event.
        await asyncio.sleep(0)


# --- the openai SDK -----------------------------------------------------------


async def test_a_plain_answer_is_parsed_and_repeated(client: openai.AsyncOpenAI) -> None:
    first = await client.chat.completions.create(model="simulator", messages=QUESTION)
    again = await client.chat.completions.create(model="simulator", messages=QUESTION)
    text = first.choices[0].message.content
    assert text is not None
    assert text == again.choices[0].message.content
    assert "simulator" in text
    assert "You asked about Acme and refunds." in text
    assert first.choices[0].finish_reason == "stop"
    assert first.usage is not None
    assert first.usage.completion_tokens == len(text.split())
    assert first.model == "simulator"
    assert first._request_id is not None
    assert first._request_id.startswith("req-sim-")


async def test_a_stream_says_the_same_word_by_word(client: openai.AsyncOpenAI) -> None:
    plain = await client.chat.completions.create(model="m", messages=QUESTION)
    stream = await client.chat.completions.create(
        model="m", messages=QUESTION, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    words = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
    assert "".join(words) == plain.choices[0].message.content
    assert plain.usage is not None
    assert len(words) == plain.usage.completion_tokens
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage == plain.usage
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)


async def test_the_sdks_stream_helper_puts_a_tool_call_together(client: openai.AsyncOpenAI) -> None:
    asked: Any = {"model": "m", "messages": QUESTION, "tools": [WEATHER], "tool_choice": "required"}
    plain = await client.chat.completions.create(**asked)
    async with client.chat.completions.stream(**asked) as stream:
        streamed = await stream.get_final_completion()
    for answer in (plain, streamed):
        choice = answer.choices[0]
        assert choice.finish_reason == "tool_calls"
        assert choice.message.tool_calls is not None
        call: Any = choice.message.tool_calls[0]
        assert call.function.name == "get_weather"
        arguments = msgspec.json.decode(call.function.arguments)
        assert 1 <= arguments["days"] <= 7
    messages = [
        *QUESTION,
        plain.choices[0].message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": "c", "content": "sunny and warm"},
    ]
    after = await client.chat.completions.create(model="m", messages=messages, tools=[WEATHER])
    assert "sunny and warm." in str(after.choices[0].message.content)


class Step(BaseModel):
    explanation: str
    weight: float = Field(ge=0, le=1)


class Plan(BaseModel):
    title: str
    steps: list[Step] = Field(min_length=2)
    risk: Literal["low", "high"]
    parent: "Plan | None"


async def test_parse_gives_back_the_pydantic_model(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.parse(model="m", messages=QUESTION, response_format=Plan)
    plan = answer.choices[0].message.parsed
    assert isinstance(plan, Plan)
    assert len(plan.steps) >= 2
    async with client.chat.completions.stream(model="m", messages=QUESTION, response_format=Plan) as stream:
        assert (await stream.get_final_completion()).choices[0].message.parsed == plan
    with pytest.raises(openai.LengthFinishReasonError):
        await client.chat.completions.parse(model="m", messages=QUESTION, response_format=Plan, max_tokens=3)


async def test_n_answers_and_a_limit(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model="m", messages=QUESTION, n=3, max_tokens=7)
    assert [(choice.index, choice.finish_reason) for choice in answer.choices] == [
        (0, "length"), (1, "length"), (2, "length"),
    ]  # fmt: skip
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 21


async def test_the_models_are_listed_and_any_is_found_but_the_retired(client: openai.AsyncOpenAI) -> None:
    listed = [model.id async for model in client.models.list()]
    assert "simulator" in listed
    assert {f"fault:{name}" for name in FAULTS} < set(listed)
    # The SDK escapes the slash and the colons; the simulator sees them as they were.
    assert (await client.models.retrieve("org/ft:some:model")).id == "org/ft:some:model"
    assert (await client.models.retrieve("old-deprecated")).to_dict()["deprecation"] == "2026-12-31T00:00:00Z"
    for ask in (
        client.models.retrieve("retired"),
        client.chat.completions.create(model="retired", messages=QUESTION),
    ):
        with pytest.raises(openai.NotFoundError) as refused:
            await ask
        assert refused.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ("400-context", openai.BadRequestError),
        ("400-filter", openai.BadRequestError),
        ("401", openai.AuthenticationError),
        ("429", openai.RateLimitError),
        ("429-bare", openai.RateLimitError),
        ("429-quota", openai.RateLimitError),
        ("500", openai.InternalServerError),
        ("503", openai.InternalServerError),
        ("html", openai.InternalServerError),
        ("reset", openai.APIConnectionError),
        ("nonsense", openai.BadRequestError),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_the_sdk_raises_what_the_fault_is(
    client: openai.AsyncOpenAI, fault: str, error: type[Exception], stream: bool
) -> None:
    with pytest.raises(error):
        await client.chat.completions.create(model=f"fault:{fault}", messages=QUESTION, stream=stream)


async def test_the_sdk_raises_an_error_in_the_stream(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(model="fault:error-in-stream", messages=QUESTION, stream=True)
    with pytest.raises(openai.APIError, match="overloaded"):
        [chunk async for chunk in stream]


async def test_the_mistral_sdk_is_content_too(simulator: Simulator) -> None:
    async with Mistral(api_key="none", server_url=simulator.base_url.removesuffix("/v1")) as client:
        answer = await client.chat.complete_async(model="m", messages=QUESTION, random_seed=1)
        card: Any = await client.models.retrieve_async(model_id="m-deprecated")
        assert answer.usage.total_tokens is not None
        assert simulator.last_request is not None
        assert simulator.last_request.body["random_seed"] == 1
        assert card.deprecation.isoformat() == "2026-12-31T00:00:00+00:00"
        assert len((await client.models.list_async()).data or []) > len(FAULTS)


# --- byte for byte ------------------------------------------------------------


async def raw_request(simulator: Simulator, body: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Sends one chat request on a connection of its own."""
    data = body if isinstance(body, bytes) else msgspec.json.encode(body)
    reader, writer = await asyncio.open_connection(simulator.host, simulator.port)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: sim\r\nContent-Length: {len(data)}\r\n\r\n"
    writer.write(head.encode() + data)
    return reader, writer


async def whole_answer(reader: asyncio.StreamReader) -> tuple[str, bytes]:
    """Head and body as they came, up to the end of the body or of the connection."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    if "content-length: " in head:
        try:
            return head, await reader.readexactly(declared_length(head))
        except asyncio.IncompleteReadError as cut:
            return head, cut.partial
    body = b""
    while not body.endswith(b"0\r\n\r\n") and (chunk := await reader.read(65_536)):
        body += chunk
    return head, body


def declared_length(head: str) -> int:
    return int(head.partition("content-length: ")[2].partition("\r\n")[0])


async def raw_answer(simulator: Simulator, model: str, *, stream: bool) -> tuple[str, bytes]:
    reader, writer = await raw_request(simulator, {"model": model, "messages": QUESTION, "stream": stream})
    with contextlib.closing(writer):
        return await whole_answer(reader)


async def test_a_whole_stream_ends_with_done_and_the_last_chunk(simulator: Simulator) -> None:
    head, body = await raw_answer(simulator, "m", stream=True)
    assert head.startswith("http/1.1 200")
    assert "content-type: text/event-stream" in head
    assert "transfer-encoding: chunked" in head
    assert body.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


async def test_a_cut_ends_the_connection_in_the_middle_of_the_body(simulator: Simulator) -> None:
    _, streamed = await raw_answer(simulator, "fault:cut", stream=True)
    assert b'"content":"This"' in streamed
    assert b"[DONE]" not in streamed
    assert b'"finish_reason":"stop"' not in streamed
    assert not streamed.endswith(b"0\r\n\r\n")
    head, plain = await raw_answer(simulator, "fault:cut", stream=False)
    assert 0 < len(plain) < declared_length(head)


async def test_a_short_stream_ends_as_if_it_were_whole(simulator: Simulator) -> None:
    _, body = await raw_answer(simulator, "fault:short", stream=True)
    assert body.endswith(b"0\r\n\r\n")
    assert b"[DONE]" not in body
    assert b'"finish_reason":"stop"' not in body


async def test_no_done_and_malformed_are_whole_in_http(simulator: Simulator) -> None:
    _, without = await raw_answer(simulator, "fault:no-done", stream=True)
    assert b'"finish_reason":"stop"' in without
    assert b"[DONE]" not in without
    _, malformed = await raw_answer(simulator, "fault:malformed", stream=True)
    assert malformed.count(b'{"delta": {"con\n\n') == 1
    assert malformed.endswith(b"[DONE]\n\n\r\n0\r\n\r\n")


@pytest.mark.parametrize("stream", [False, True])
async def test_bodies_that_are_not_chat(simulator: Simulator, stream: bool) -> None:
    head, body = await raw_answer(simulator, "fault:html", stream=stream)
    assert head.startswith("http/1.1 502")
    assert "content-type: text/html" in head
    assert body.startswith(b"<html>")
    head, body = await raw_answer(simulator, "fault:empty", stream=stream)
    assert head.startswith("http/1.1 200")
    assert body == b""
    head, body = await raw_answer(simulator, "fault:error-in-200", stream=stream)
    assert head.startswith("http/1.1 200")
    assert "content-type: application/json" in head
    assert "error" in msgspec.json.decode(body)


async def test_a_429_says_when_to_come_back_unless_it_is_bare(simulator: Simulator) -> None:
    head, _ = await raw_answer(simulator, "fault:429", stream=False)
    assert "retry-after: 2\r\n" in head
    head, _ = await raw_answer(simulator, "fault:429-bare", stream=False)
    assert "retry-after" not in head


async def test_a_reset_is_a_reset(simulator: Simulator) -> None:
    reader, writer = await raw_request(simulator, {"model": "fault:reset", "messages": QUESTION})
    with contextlib.closing(writer), pytest.raises(ConnectionResetError):
        await reader.read()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fault", "heard"), [("silent", None), ("slow-first", b"\r\n\r\n"), ("stall", b'"role":"assistant"')]
)
async def test_what_hangs_says_so_much_and_ends_when_the_client_leaves(
    simulator: Simulator, fault: str, heard: bytes | None, stream: bool
) -> None:
    reader, writer = await raw_request(simulator, {"model": f"fault:{fault}", "messages": QUESTION, "stream": stream})
    with contextlib.closing(writer):
        if heard is not None:
            assert heard in await reader.readuntil(heard)
        await until(lambda: simulator.open_calls == 1)
        assert simulator.open_streams == stream
    await until(lambda: simulator.open_calls == 0)
    assert simulator.open_streams == 0


@pytest.mark.parametrize("fault", ["silent", "stall", "slow-first"])
async def test_stopping_ends_what_hangs(fault: str) -> None:
    simulator = await Simulator.start(INSTANT)
    reader, writer = await raw_request(simulator, {"model": f"fault:{fault}", "messages": QUESTION, "stream": True})
    with contextlib.closing(writer):
        await until(lambda: simulator.open_streams == 1)
        await simulator.stop()
        assert simulator.open_streams == 0
        assert b"[DONE]" not in await reader.read()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_in_the_middle_ends_the_work(stream: bool) -> None:
    # At an hour per token only a cancelled call can end.
    simulator = await Simulator.start(SimulatorSettings(first_token_ms=0, per_token_ms=3_600_000))
    _, writer = await raw_request(simulator, {"model": "m", "messages": QUESTION, "stream": stream})
    await until(lambda: simulator.open_calls == 1)
    writer.close()
    await until(lambda: simulator.open_calls == 0)
    await simulator.stop()


# --- bad input ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"{", "invalid_json"),
        (b"\xff\xfe", "invalid_json"),
        (b"[" * 100_000, "invalid_json"),
        (b"[]", "invalid_type"),
    ],
)
async def test_a_bad_body_is_a_400_in_openais_shape(simulator: Simulator, body: bytes, code: str) -> None:
    reader, writer = await raw_request(simulator, body)
    with contextlib.closing(writer):
        head, sent = await whole_answer(reader)
    error = msgspec.json.decode(sent)["error"]
    assert head.startswith("http/1.1 400")
    assert error["code"] == code
    assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/chat/completions"), ("POST", "/embeddings"), ("PUT", "/models")]
)
async def test_any_other_address_is_a_404_in_openais_shape(simulator: Simulator, method: str, path: str) -> None:
    async with aiohttp.request(method, simulator.base_url + path) as answer:
        error = (await answer.json())["error"]
    assert answer.status == 404
    assert error["message"] == f"Invalid URL ({method} /v1{path})."


async def test_a_picture_of_twenty_megabytes_is_accepted_and_seventy_are_not(simulator: Simulator) -> None:
    def body(megabytes: int) -> io.BytesIO:
        picture = b'{"type":"image_url","image_url":{"url":"data:,' + b"A" * (megabytes << 20) + b'"}}'
        return io.BytesIO(b'{"model":"m","messages":[{"role":"user","content":[' + picture + b"]}]}")

    async with aiohttp.ClientSession() as session:
        async with session.post(f"{simulator.base_url}/chat/completions", data=body(20)) as answer:
            assert answer.status == 200
            assert (await answer.json())["usage"]["prompt_tokens"] == 3 + 4 + 85
        async with session.post(f"{simulator.base_url}/chat/completions", data=body(65)) as answer:
            assert answer.status == 413
            assert (await answer.json())["error"]["code"] == "body_too_large"


# --- what tests may look at ---------------------------------------------------


async def test_the_last_request_and_the_calls_are_remembered(simulator: Simulator, client: openai.AsyncOpenAI) -> None:
    assert simulator.last_request is None
    for model in ("a", "b", "a"):
        await client.chat.completions.create(
            model=model,
            messages=QUESTION,
            temperature=0.5,
            extra_headers={"X-Trace": "t1"},
            extra_body={"odd": [1]},
        )
    assert simulator.calls == {"a": 2, "b": 1}
    seen = simulator.last_request
    assert seen is not None
    assert seen.path == "/v1/chat/completions"
    assert seen.body == {"model": "a", "messages": QUESTION, "temperature": 0.5, "odd": [1]}
    assert (seen.headers["x-trace"], seen.headers["authorization"]) == ("t1", "Bearer none")
    assert (simulator.open_calls, simulator.open_streams) == (0, 0)


async def test_the_calls_of_a_thousand_models_are_told_apart_and_no_more(simulator: Simulator) -> None:
    async with aiohttp.ClientSession() as session:
        for number in range(1_002):
            body = {"model": f"fault:503-{number}", "messages": QUESTION}
            async with session.post(f"{simulator.base_url}/chat/completions", json=body) as answer:
                await answer.read()
    assert len(simulator.calls) == 1_001
    assert simulator.calls["other"] == 2


async def test_two_simulators_have_ports_of_their_own_and_a_taken_one_is_refused(
    simulator: Simulator,
) -> None:
    other = await Simulator.start(INSTANT)
    assert other.port != simulator.port
    assert other.base_url == f"http://127.0.0.1:{other.port}/v1"
    with pytest.raises(OSError, match="address already in use"):
        await Simulator.start(INSTANT, port=other.port)
    await other.stop()


async def test_what_is_due_leaves_before_what_is_not() -> None:
    # The first word is an hour away: only a server that does not save it all up sends anything now.
    simulator = await Simulator.start(SimulatorSettings(first_token_ms=0, per_token_ms=3_600_000))
    reader, writer = await raw_request(simulator, {"model": "m", "messages": QUESTION, "stream": True})
    with contextlib.closing(writer):
        first = await reader.readuntil(b"}\n\n")
    assert b'"role":"assistant"' in first
    await simulator.stop()


async def test_short_waits_are_saved_up_and_the_stream_is_whole() -> None:
    simulator = await Simulator.start(SimulatorSettings(first_token_ms=2, per_token_ms=0.2))
    _, body = await raw_answer(simulator, "m", stream=True)
    assert body.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    await simulator.stop()
