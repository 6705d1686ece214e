"""What an agent's own client makes of each fault: the whole answer, or an exception; never the half of an answer.

The client is openai-python, which takes a stream that ends early for a whole one, so honesty is the gateway's to keep.
The provider is the simulator with every fault it knows. It answers the same request alike each time, so the whole
answer is known beforehand.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import openai
import pytest
from openai import AsyncOpenAI, DefaultAsyncHttpxClient

from gateway.simulator.chat import answer, read_request
from gateway.simulator.faults import FAULTS
from gateway.simulator.server import Simulator
from tests.running import AT_ONCE, RunningGateway, chat, running_gateway

SHORT = "{ first_byte_s = 0.3, first_token_s = 0.3, stall_s = 0.3, attempt_s = 0.3 }"
ROUTING = 'default_agent = "qa_agent"\n'
POLICY = "[models]\nuse_finetuned = false\n[retries]\nbase_s = 0.001\nmax_wait_s = 0.01\n"
GOOD_MODEL = "simulator-small"
# With these the answer is there, whatever is odd about it, and on which way.
STILL_WHOLE = {
    "no-done": (False, True),
    "no-usage": (False, True),
    "malformed": (True,),
}
# In these the request is at fault, so no other model is asked.
CALLERS_OWN = {"400-filter"}
# The stream has begun when these befall it; the fallback says something else, so the two cannot be joined.
AFTER_BEGIN = {"cut", "short", "stall", "error-in-stream"}
# These end by a timeout only.
SILENCES = {"silent", "slow-first", "stall"}


def whole_text(model: str) -> str:
    """What the simulator answers as `model`, to the last word."""
    asked = read_request({**chat(), "model": model})
    return answer(asked, AT_ONCE).choices[0].text


@asynccontextmanager
async def served(tmp_path: Path, fault: str) -> AsyncIterator[tuple[RunningGateway, AsyncOpenAI]]:
    """A gateway whose first provider has this fault, and a client that tries once."""
    agents = f"""
[agents.qa_agent]
finetuned = "broken/ft:x"
baseline  = "broken/fault:{fault}"
fallbacks = ["sim/{GOOD_MODEL}"]
[agents.lone_agent]
finetuned = "broken/ft:x"
baseline  = "broken/fault:{fault}"
"""
    simulator = await Simulator.start(AT_ONCE)
    timeouts = f"timeouts = {SHORT}" if fault in SILENCES else ""
    table = f'kind = "compatible"\nbase_url = "{simulator.base_url}"\n{timeouts}'
    try:
        async with (
            running_gateway(
                tmp_path,
                upstreams={"broken": table},
                agents=agents,
                policy=POLICY,
                routing='default_agent = "qa_agent"\n',
            ) as gateway,
            # Reading the machine's certificates would take ten times as long as the test.
            DefaultAsyncHttpxClient(verify=False) as http,
            AsyncOpenAI(base_url=f"{gateway.data_url}/v1", api_key="any", max_retries=0, http_client=http) as client,
        ):
            yield gateway, client
    finally:
        await simulator.stop()


async def ask(client: AsyncOpenAI, agent: str, *, stream: bool) -> tuple[str, str | None]:
    """The text as a program would put it together, and why it ended. Raises what the SDK raises."""
    if not stream:
        plain = await client.chat.completions.create(**chat(model=agent))
        (choice,) = plain.choices
        return choice.message.content or "", choice.finish_reason
    text, reason = "", None
    async for one in await client.chat.completions.create(**chat(model=agent), stream=True):
        for choice in one.choices:
            text += choice.delta.content or ""
            reason = choice.finish_reason or reason
    return text, reason


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
@pytest.mark.parametrize("fault", FAULTS)
async def test_an_agent_sees_a_whole_answer_or_an_exception(tmp_path: Path, fault: str, stream: bool) -> None:
    whole, of_fallback = whole_text(f"fault:{fault}"), whole_text(GOOD_MODEL)
    assert whole != of_fallback
    is_still_whole = stream in STILL_WHOLE.get(fault, ())
    async with served(tmp_path, fault) as (gateway, client):
        if is_still_whole:
            assert await ask(client, "lone_agent", stream=stream) == (whole, "stop")
        else:
            with pytest.raises(openai.APIError) as caught:
                await ask(client, "lone_agent", stream=stream)
            body = caught.value.body
            assert isinstance(body, dict)
            assert body["message"]
            assert body["type"]
        if is_still_whole:
            assert await ask(client, "qa_agent", stream=stream) == (whole, "stop")
        elif fault in CALLERS_OWN or (stream and fault in AFTER_BEGIN):
            with pytest.raises(openai.APIError):
                await ask(client, "qa_agent", stream=stream)
        else:
            assert await ask(client, "qa_agent", stream=stream) == (of_fallback, "stop")
        records = gateway.journal()
        assert len(records) == 2
        assert [bool(record.error) for record in records] == [
            not is_still_whole,
            fault in CALLERS_OWN or (stream and fault in AFTER_BEGIN),
        ]


@pytest.mark.parametrize("fault", sorted(AFTER_BEGIN))
async def test_a_stream_that_is_held_back_is_never_half(tmp_path: Path, fault: str) -> None:
    async with served(tmp_path, fault) as (gateway, client):
        await gateway.reload(policy=f'{POLICY}[stream]\non_cut = "hold"\n')
        assert await ask(client, "qa_agent", stream=True) == (whole_text(GOOD_MODEL), "stop")
