"""The most a call can use before it is made, what fits into what is left, and what it used where nobody says.

Text: a token of a byte-level vocabulary is at least one byte, and decoded text is never longer than its JSON; so the
bytes of the request's fields bound its text, with OVERHEAD_TOKENS for what a template puts around each message and
tool. Images and audio are taken out of the bytes and bounded by their provider's formula (decide/media.py). A part
whose size only the provider can know (a PDF, an id of a file) may fill the model's whole context. The invariant: no
sound usage of a call that was let through with `max_tokens` exceeds `PromptBound.tokens` and `completion_bound`,
provided the upstream adds no long prompt of its own and honours `max_tokens`.
"""

from collections.abc import Mapping
from typing import NamedTuple

import msgspec
from msgspec import Raw

from gateway.decide.media import Media, audio_tokens, image_tokens, media_of
from gateway.decide.targets import Target
from gateway.domain.money import MAX_TOKENS, TOKENS_PER_MTOK, Price, Usage, cost_at_most, dearest

# Role, separators and names around a message take 3 to 7 tokens in the templates we know, a tool's wrapping up to 30,
# the system message that some templates add by themselves up to 70.
OVERHEAD_TOKENS = 64
# Where a part could be of any size and the model's context is not configured: the longest context on sale at OpenAI.
LONGEST_CONTEXT = 1_050_000
# A token of common text is 3 to 5 bytes; fewer per token is counting upwards.
_BYTES_PER_TOKEN = 3
# More than any tokenizer's average over running text, so that dividing by it counts downwards.
_MANY_BYTES_PER_TOKEN = 6
# Events that carry no token of the limit: openings and ends of choices and tool calls, tokens left over in a decoder.
_SPARE_EVENTS = 16


class _Plain(msgspec.Struct, gc=False):
    content: str | None = None
    audio: None = None


class _Message(msgspec.Struct):
    content: Raw = Raw(b"null")
    audio: Raw = Raw(b"null")


# Text is a string; parts, the only place for media, are an array. A spoken answer is referred to by its id.
_plain = msgspec.json.Decoder(list[_Plain])
_messages = msgspec.json.Decoder(list[_Message])
_things = msgspec.json.Decoder(list[Raw] | None)


class Weight(NamedTuple):
    """What a request weighs, whichever model it goes to: made once for each call.

    `text_tokens` bounds all that is not media. `predicted_tokens`: an expected answer the caller sends along, whose
    rejected tokens are billed on top of `max_tokens`. `speaks`: an answer in audio is asked for.
    """

    text_tokens: int
    media: Media | None = None
    predicted_tokens: int = 0
    speaks: bool = False


class PromptBound(NamedTuple):
    """The most that the prompt can be at one model, and what of the request else moves its price."""

    tokens: int
    images: int = 0
    audio_seconds: int = 0
    predicted_tokens: int = 0
    has_audio: bool = False


def weigh(fields: Mapping[str, Raw]) -> Weight:
    """Weigh the filled fields of a chat request. 2 µs for 2 KB of text."""
    size = sum([len(bytes(value)) for value in fields.values()])
    media = None
    try:
        count = len(_plain.decode(fields["messages"]))
    except msgspec.ValidationError:
        messages = _messages.decode(fields["messages"])
        count = len(messages)
        parts = [message.content for message in messages if bytes(message.content)[:1] not in (b'"', b"n")]
        media = media_of(parts, spoken=sum([bytes(message.audio) != b"null" for message in messages]))
        size -= media.payload_bytes
    if "tools" in fields:
        count += _count(fields["tools"])
    if "functions" in fields:
        count += _count(fields["functions"])
    predicted = len(bytes(fields["prediction"])) if "prediction" in fields else 0
    speaks = "modalities" in fields and _names_audio(bytes(fields["modalities"]))
    return Weight(size + OVERHEAD_TOKENS * count, media, predicted, speaks)


def bound_of(weight: Weight, target: Target) -> PromptBound:
    """The bound at one model of the chain."""
    media = weight.media
    if media is None:
        return PromptBound(weight.text_tokens, 0, 0, weight.predicted_tokens, weight.speaks)
    price = target.price
    tokens = weight.text_tokens
    tokens += image_tokens(media, target.kind, target.model, price.image_tokens if price is not None else None)
    tokens += audio_tokens(media, target.kind)
    if media.is_open:
        # More than its context no model reads: it refuses the call, and then nothing is billed.
        tokens = target.context_tokens or LONGEST_CONTEXT
    has_audio = weight.speaks or media.has_audio
    return PromptBound(tokens, len(media.images), media.audio_seconds, weight.predicted_tokens, has_audio)


def completion_bound(prompt: PromptBound, max_tokens: int, n: int) -> int:
    """The most completion tokens that can be billed."""
    return n * (max_tokens + prompt.predicted_tokens)


def most_nusd(price: Price, prompt: PromptBound, completion_tokens: int) -> int:
    """The most that such a call can cost. Also for an estimate: which of its tokens were cached, nobody has said."""
    return cost_at_most(
        price,
        prompt.tokens,
        completion_tokens,
        images=prompt.images,
        audio_seconds=prompt.audio_seconds,
        has_audio=prompt.has_audio,
    )


def affordable_max_tokens(
    price: Price | None, prompt: PromptBound, n: int, *, money_nusd: int | None, tokens_left: int | None
) -> int:
    """The largest `max_tokens` whose bound fits what is left; 0 where not even 1 fits. None: no limit.

    Without a price, money sets no limit here: whether such a call may be made is decided elsewhere.
    """
    each = MAX_TOKENS
    if tokens_left is not None:
        each = min(each, (tokens_left - prompt.tokens) // n - prompt.predicted_tokens)
    if money_nusd is not None and price is not None:
        input_rate, output_rate = dearest(price, prompt.tokens, has_audio=prompt.has_audio)
        # Cost is rounded up over the sum, so it fits as long as the sum itself does.
        spare = (money_nusd - price.request_nusd - prompt.images * price.image_nusd) * TOKENS_PER_MTOK
        spare -= prompt.tokens * input_rate + prompt.audio_seconds * price.audio_nusd_per_mseconds
        if spare < 0:
            return 0
        if output_rate:
            each = min(each, spare // output_rate // n - prompt.predicted_tokens)
    return max(0, each)


def estimate(
    prompt: PromptBound, *, events: int, content_bytes: int, most_tokens: int, ran_over: bool = False
) -> Usage:
    """What an answer without usage took, counted upwards: the whole prompt bound, and what came of the completion.

    `most_tokens` is the completion's bound, which no honest answer exceeds; `ran_over` says that this one did. What a
    model thinks and does not show is in no event: for such a model (`hides_reasoning`) only the bound is sound.
    """
    completion = max(events, -(-content_bytes // _BYTES_PER_TOKEN))
    if not ran_over:
        completion = min(completion, most_tokens)
    return Usage(prompt_tokens=prompt.tokens, completion_tokens=completion, audio_seconds=prompt.audio_seconds)


def hides_reasoning(target: Target) -> bool:
    """Whether the model may bill tokens that it does not send. Unknown models of OpenAI do."""
    model = target.model.removeprefix("ft:")
    return target.kind == "openai" and not model.startswith(("gpt-3.5", "gpt-4", "chatgpt-4o"))


def is_over(*, events: int, content_bytes: int, limit_tokens: int) -> bool:
    """Whether a stream has passed its limit for certain enough to cut it. `limit_tokens` is for all its choices.

    Most servers send an event for each token or for several, so events count downwards. Some smooth their stream into
    single letters; those events are small, three bytes at most on average (a letter of a Latin, Cyrillic, Chinese or
    Japanese text), so where they are no larger, bytes are counted, six to a token. A wrong cut is worse than a late
    one: the overrun is billed in full either way.
    """
    tokens = events if content_bytes > _BYTES_PER_TOKEN * events else content_bytes // _MANY_BYTES_PER_TOKEN
    return tokens > limit_tokens + _SPARE_EVENTS


def _names_audio(modalities: bytes) -> bool:
    # A letter may be written as an escape; then it is taken to be asked for.
    return b"audio" in modalities or b"\\" in modalities


def _count(found: Raw) -> int:
    try:
        return len(_things.decode(found) or ())
    except (msgspec.DecodeError, RecursionError):
        # Not an array: the provider refuses it, and its bytes are counted anyway.
        return 1
