"""Whatever a provider sends, in whatever pieces: what the client gets is well-formed, true, and ends honestly."""

import asyncio
from collections.abc import Iterator
from contextlib import AsyncExitStack

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.faults.stage import QUICK_RETRIES
from tests.journey import Answer, Journey, journey
from tests.scripted import DONE, Scene, Turn, delta, finish, usage_chunk

WORDS = st.text('ab \n"\\ä😀{}[]:', min_size=1, max_size=6)
NOISE = st.sampled_from(
    [b": ping\n\n", b"event: x\n", b"id: 7\n", b"retry: 1\n", b"\n", b"data:\n\n", b"data: {\n\n", b"x\n"]
)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[asyncio.Runner, Journey]]:
    """One gateway for all examples, on a loop that turns only while an example runs."""
    with asyncio.Runner() as runner:
        stack = AsyncExitStack()
        policy = f"{QUICK_RETRIES}[breakers]\nconsecutive = 1000000\nmin_calls = 1000000\n"
        folder = tmp_path_factory.mktemp("property")
        trip = runner.run(stack.enter_async_context(journey(folder, nothing, policy=policy, caps="")))
        yield runner, trip
        runner.run(stack.aclose())


async def nothing(turn: Turn) -> None:
    turn.close()


@st.composite
def streams(draw: st.DrawFn) -> tuple[list[str], bytes, list[int], str]:
    """The words that were said, the bytes that said them, where these are cut, and how the connection ends."""
    words = draw(st.lists(WORDS, max_size=8))
    line_end = draw(st.sampled_from([b"\n", b"\r\n", b"\r"]))
    events = [draw(st.just(b"data: " + msgspec.json.encode(delta(word)) + b"\n\n")) for word in words]
    if draw(st.booleans()):
        events.append(b"data: " + msgspec.json.encode(finish()) + b"\n\n")
    if draw(st.booleans()):
        events.append(b"data: " + msgspec.json.encode(usage_chunk()) + b"\n\n")
    if draw(st.booleans()):
        events.append(b"data: [DONE]\n\n")
    for noise in draw(st.lists(NOISE, max_size=3)):
        events.insert(draw(st.integers(0, len(events))), noise)
    sent = b"".join(events).replace(b"\n", line_end)
    sent = sent[: draw(st.integers(0, len(sent)))] if draw(st.booleans()) else sent
    cuts = sorted(draw(st.lists(st.integers(0, len(sent)), max_size=6)))
    return words, sent, cuts, draw(st.sampled_from(["end", "close", "reset"]))


def plays(sent: bytes, cuts: list[int], ending: str) -> Scene:
    async def scene(turn: Turn) -> None:
        await turn.begin_stream()
        for start, stop in zip([0, *cuts], [*cuts, len(sent)], strict=True):
            if sent[start:stop]:
                await turn.piece(sent[start:stop])
        if ending == "end":
            await turn.end()
        elif ending == "close":
            turn.close()
        else:
            turn.reset()

    return scene


def check_is_honest(answer: Answer, words: list[str], sent: bytes) -> None:
    if answer.status != 200:
        assert answer.error["message"]
        return
    for block in answer.body.decode().split("\n\n")[:-1]:
        assert all(line.startswith((": ", "data: ")) for line in block.split("\n"))
    said = "".join(words)
    text = "".join(
        choice["delta"].get("content") or "" for chunk in answer.chunks for choice in chunk.get("choices", ())
    )
    assert said.startswith(text)
    ends_well = answer.events[-1] == DONE
    assert ends_well or "error" in msgspec.json.decode(answer.events[-1])
    if ends_well:
        assert answer.events.count(DONE) == 1
        assert b'"finish_reason":"stop"' in sent or b"[DONE]" in sent
        assert text == said


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(streams())
def test_what_the_client_gets_is_well_formed_and_true(
    stage: tuple[asyncio.Runner, Journey], example: tuple[list[str], bytes, list[int], str]
) -> None:
    runner, trip = stage
    words, sent, cuts, ending = example
    trip.first.then(plays(sent, cuts, ending))
    answer = runner.run(trip.ask(stream=True, model="lone_agent"))
    check_is_honest(answer, words, sent)
    assert trip.gateway.runtime.observer.in_flight == 0
