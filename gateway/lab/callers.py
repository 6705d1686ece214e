"""Users with the real openai SDK: they hold conversations with a gateway and remember what they were told.

Nothing is asked twice here (the SDK's retries are off), so one question is one call. The invariant: every question
asked gives one `Answer`, also where it failed.
"""

import asyncio
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

import msgspec

from gateway.lab.questions import Conversation

if TYPE_CHECKING:
    import openai
    from openai.types import CompletionUsage
    from openai.types.chat import ChatCompletionMessageParam

MODEL = "auto"
# A key must be given to the SDK; a gateway on loopback without keys ignores it.
PLACEHOLDER_KEY = "none-needed"
TIMEOUT_S = 60.0


class SdkMissing(Exception):
    """The openai package is not installed: it belongs to development, not to the gateway."""


class Answer(msgspec.Struct):
    """What a user saw of one call: the text, and what the headers and the last chunk said. Filled in as it comes."""

    conversation: Conversation
    turn: int
    text: str = ""
    request_id: str = ""
    agent: str = ""
    variant: str = ""
    model: str = ""
    route: str = ""
    cost_usd: str | None = None
    """None on streams, whose headers leave before the cost is known."""
    finish_reason: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    is_usage_known: bool = False
    error: str = ""

    def take_headers(self, headers: Mapping[str, str]) -> None:
        """Remember what the gateway says of the call in its headers."""
        self.request_id = headers.get("x-request-id", "")
        self.agent = headers.get("x-gateway-agent", "")
        self.variant = headers.get("x-gateway-variant", "")
        self.model = headers.get("x-gateway-model", "")
        self.route = headers.get("x-gateway-route", "")
        self.cost_usd = headers.get("x-gateway-cost-usd")

    def take_usage(self, usage: "CompletionUsage | None") -> None:
        """Remember the tokens, where they are told."""
        if usage is not None:
            self.prompt_tokens, self.completion_tokens = usage.prompt_tokens, usage.completion_tokens
            self.is_usage_known = True


async def converse_all(
    base_url: str, conversations: Iterable[Conversation], *, at_once: int, told: Callable[[Answer], None]
) -> list[Answer]:
    """Hold all conversations, `at_once` of them side by side; `told` hears each answer as it ends."""
    try:
        import openai
    except ImportError:
        raise SdkMissing("the openai package is not installed; `make demo` installs what the demo needs") from None
    # A proxy that the environment names is for the outside world; these calls stay on this machine.
    http = openai.DefaultAsyncHttpxClient(trust_env=False)
    places = asyncio.Semaphore(at_once)
    answers: list[Answer] = []

    def heard(answer: Answer) -> None:
        answers.append(answer)
        told(answer)

    async def hold(conversation: Conversation) -> None:
        async with places:
            await converse(client, conversation, heard)

    client = openai.AsyncOpenAI(
        base_url=base_url, api_key=PLACEHOLDER_KEY, max_retries=0, timeout=TIMEOUT_S, http_client=http
    )
    async with client, asyncio.TaskGroup() as group:
        for conversation in conversations:
            group.create_task(hold(conversation))
    return answers


async def converse(client: "openai.AsyncOpenAI", conversation: Conversation, told: Callable[[Answer], None]) -> None:
    """Ask turn after turn, each with what was said before. A turn that failed is the last one."""
    # The SDK lets the errors of its transport through where they come in the middle of a stream.
    from httpx import HTTPError  # noqa: TID251
    from openai import APIError, APIStatusError

    said: list[ChatCompletionMessageParam] = []
    for turn, question in enumerate(conversation.question.turns, start=1):
        said.append({"role": "user", "content": question})
        answer = Answer(conversation, turn)
        try:
            await (_stream if conversation.stream else _ask)(client, said, answer)
        except APIStatusError as error:
            answer.take_headers(error.response.headers)
            answer.error = error.code or type(error).__name__
        except APIError as error:
            answer.error = error.code or type(error).__name__
        except (HTTPError, ValueError) as error:  # ValueError: an event that is not JSON, or not a chunk.
            answer.error = type(error).__name__
        told(answer)
        if answer.error:
            return
        said.append({"role": "assistant", "content": answer.text})


async def _ask(client: "openai.AsyncOpenAI", said: "list[ChatCompletionMessageParam]", answer: Answer) -> None:
    raw = await client.chat.completions.with_raw_response.create(
        model=MODEL, messages=said, user=answer.conversation.user
    )
    answer.take_headers(raw.headers)
    completion = raw.parse()
    answer.take_usage(completion.usage)
    choice = completion.choices[0]
    answer.text, answer.finish_reason = choice.message.content or "", choice.finish_reason


async def _stream(client: "openai.AsyncOpenAI", said: "list[ChatCompletionMessageParam]", answer: Answer) -> None:
    raw = await client.chat.completions.with_raw_response.create(
        model=MODEL,
        messages=said,
        user=answer.conversation.user,
        stream=True,
        stream_options={"include_usage": answer.conversation.wants_usage},
    )
    answer.take_headers(raw.headers)
    pieces = []
    async for chunk in raw.parse():
        answer.take_usage(chunk.usage)
        for choice in chunk.choices:
            pieces.append(choice.delta.content or "")
            answer.finish_reason = choice.finish_reason or answer.finish_reason
    answer.text = "".join(pieces)
