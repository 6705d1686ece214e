"""The users of the demo, against a gateway in this process: what they saw is kept, also where it went wrong."""

import sys
from pathlib import Path

import pytest

from gateway.lab.callers import Answer, SdkMissing, converse_all
from gateway.lab.questions import Conversation, Question
from tests.running import running_gateway

AGENTS = """
[agents.qa_agent]
finetuned = "sim/ft:qa"
baseline  = "sim/simulator-small"
defaults  = { max_tokens = 64 }

[agents.support_agent]
finetuned = "sim/ft:support"
baseline  = "sim/fault:BASELINE"
"""


def conversation(*turns: str, stream: bool = False, wants_usage: bool = False) -> Conversation:
    return Conversation("u001", Question(question_id=1, category="any", turns=turns), stream, wants_usage)


async def ask(base_url: str, *conversations: Conversation) -> list[Answer]:
    heard: list[Answer] = []
    answers = await converse_all(f"{base_url}/v1", conversations, at_once=2, told=heard.append)
    assert heard == answers
    return answers


async def test_each_turn_carries_what_was_said_before(tmp_path: Path) -> None:
    async with running_gateway(tmp_path) as gateway:
        first, second = await ask(gateway.data_url, conversation("What is a quark?", "And a lepton?"))
        last = gateway.simulator.last_request
        assert last is not None
        assert [message["content"] for message in last.body["messages"]] == [
            "What is a quark?", first.text, "And a lepton?",
        ]  # fmt: skip
        assert (first.turn, second.turn) == (1, 2)
        assert [record.id for record in gateway.journal()] == [first.request_id, second.request_id]
        assert all(record.user for record in gateway.journal())


@pytest.mark.parametrize("stream", [False, True])
async def test_headers_text_and_usage_are_kept(tmp_path: Path, stream: bool) -> None:
    async with running_gateway(tmp_path) as gateway:
        (answer,) = await ask(gateway.data_url, conversation("A quark?", stream=stream, wants_usage=True))
        (record,) = gateway.journal()
    assert (answer.agent, answer.variant, answer.model) == ("qa_agent", "baseline", "sim/simulator-small")
    assert answer.error == ""
    assert answer.text
    assert answer.finish_reason in ("stop", "length")
    assert record.usage is not None
    assert (answer.prompt_tokens, answer.completion_tokens) == (
        record.usage.prompt_tokens, record.usage.completion_tokens,
    )  # fmt: skip
    assert (answer.cost_usd is None) is stream
    assert record.stream is stream


async def test_a_stream_tells_its_usage_only_where_asked(tmp_path: Path) -> None:
    async with running_gateway(tmp_path) as gateway:
        (answer,) = await ask(gateway.data_url, conversation("A quark?", stream=True))
        (record,) = gateway.journal()
    assert not answer.is_usage_known
    assert record.usage is not None


# A refusal has a code and an id; what breaks off in the middle has what was in its error event.
@pytest.mark.parametrize(
    "fault, stream, error",
    [
        ("503", False, "upstream_error"),
        ("503", True, "upstream_error"),
        ("401", False, "upstream_auth"),
        ("cut", True, "upstream_cut"),
        ("short", True, "upstream_cut"),
        ("error-in-stream", True, "upstream_error"),
    ],
)
async def test_what_fails_is_an_answer_too_and_ends_the_conversation(
    tmp_path: Path, fault: str, stream: bool, error: str
) -> None:
    async with running_gateway(tmp_path, agents=AGENTS.replace("BASELINE", fault)) as gateway:
        (answer,) = await ask(gateway.data_url, conversation("Where is my order?", "And my refund?", stream=stream))
        (record,) = gateway.journal()
    assert (answer.error, answer.agent, answer.request_id) == (error, "support_agent", record.id)
    assert record.error == error


async def test_a_gateway_that_is_not_there_is_an_error_of_every_first_turn() -> None:
    answers = await ask("http://127.0.0.1:9", conversation("Who?", "Where?"), conversation("Who?", stream=True))
    assert [answer.error for answer in answers] == ["APIConnectionError", "APIConnectionError"]


async def test_without_the_sdk_the_reader_is_told_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(SdkMissing, match="make demo"):
        await ask("http://127.0.0.1:9", conversation("Who?"))
