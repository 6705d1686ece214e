"""OpenAI chat JSON: read what routing and money need, leave the rest as it came.

A request is decoded once into its top-level fields, whose values stay raw bytes, and is encoded again from exactly
those fields. So a second `"model"` key (also one spelt `mod\\u0065l`) cannot smuggle another model past the policy:
what was decided on is what is sent. Costs about 3 µs for a 2 KB body.
"""

from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec
from msgspec import Raw

from gateway.domain.errors import Refused
from gateway.domain.money import MAX_TOKENS, Usage

T = TypeVar("T")

_fields = msgspec.json.Decoder(dict[str, Raw])
_text = msgspec.json.Decoder(str)
_flag = msgspec.json.Decoder(bool | None)
_whole = msgspec.json.Decoder(int | None)
_number = msgspec.json.Decoder(float | None)
_optional_text = msgspec.json.Decoder(str | None)

Fields = dict[str, Raw]


class _Message(msgspec.Struct):
    role: str
    content: Raw = Raw(b"null")


class _StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class _Function(msgspec.Struct, frozen=True):
    name: str = ""


class _Tool(msgspec.Struct):
    function: _Function = _Function()


class _Part(msgspec.Struct):
    text: str | None = None


_messages = msgspec.json.Decoder(list[_Message])
_stream_options = msgspec.json.Decoder(_StreamOptions | None)
_tools = msgspec.json.Decoder(list[_Tool] | None)
_metadata = msgspec.json.Decoder(dict[str, Any] | None)
_content = msgspec.json.Decoder(str | list[_Part] | None)


class ChatBody:
    """A chat request: its raw top-level fields, and the few that the gateway acts on, decoded and checked."""

    __slots__ = ("fields", "include_usage", "max_tokens", "model", "n", "stream", "temperature")

    def __init__(self, fields: Fields) -> None:
        self.fields = fields
        self.model: str = _take(fields, "model", _text, "a string") or ""
        if not self.model:
            raise Refused("missing_field", "you must provide a model parameter", param="model")
        self.stream: bool = _take(fields, "stream", _flag, "a boolean") or False
        options = _take(fields, "stream_options", _stream_options, "an object")
        self.include_usage: bool = options is not None and options.include_usage is True
        self.n: int = _whole_field(fields, "n") or 1
        limit = _whole_field(fields, "max_tokens")
        completion_limit = _whole_field(fields, "max_completion_tokens")
        # OpenAI's newer field wins where both are given, as it does at OpenAI.
        self.max_tokens: int | None = completion_limit if completion_limit is not None else limit
        self.temperature: float | None = _take(fields, "temperature", _number, "a number")
        _check_messages(fields)

    def is_set(self, name: str) -> bool:
        """Whether the caller set a field. A null counts as left out, as SDKs send it for "not given"."""
        return name in self.fields and bytes(self.fields[name]) != b"null"

    def text(self, name: str) -> str | None:
        """A top-level string field, or None where it is absent or null. Raises `Refused` for another type."""
        return _take(self.fields, name, _optional_text, "a string")

    def metadata(self) -> dict[str, str]:
        """The request's metadata, its string values only. Raises `Refused` where it is not an object."""
        found = _take(self.fields, "metadata", _metadata, "an object")
        return {key: value for key, value in found.items() if isinstance(value, str)} if found else {}

    def tool_names(self) -> tuple[str, ...]:
        """The names of the functions on offer."""
        return tuple(tool.function.name for tool in _take(self.fields, "tools", _tools, "an array of objects") or ())

    def texts(self) -> list[tuple[str, str]]:
        """Each message as (role, its text); images and other parts are left out. Raises `Refused` for odd contents."""
        found = []
        messages = _take(self.fields, "messages", _messages, "an array of objects") or []
        for index, message in enumerate(messages):
            try:
                content = _content.decode(message.content)
            except RecursionError:
                raise Refused("invalid_json", "messages is nested too deeply", param="messages") from None
            except msgspec.ValidationError:
                where = f"messages[{index}].content"
                raise Refused("invalid_type", f"{where} must be a string or an array of parts", param=where) from None
            if isinstance(content, list):
                content = "\n".join(part.text for part in content if part.text)
            found.append((message.role, content or ""))
        return found


def read_chat(body: bytes) -> ChatBody:
    """Decode and check a request. Raises `Refused` with invalid_json, missing_field, invalid_type or invalid_value."""
    try:
        # Raw values are skipped by msgspec without a look at their UTF-8, so it is checked here; ASCII costs nothing.
        if not body.isascii():
            body.decode()
        return ChatBody(_fields.decode(body))
    except UnicodeDecodeError:
        raise Refused("invalid_json", "the body is not valid UTF-8") from None
    except RecursionError:
        raise Refused("invalid_json", "the body is nested too deeply") from None
    except msgspec.ValidationError:
        raise Refused("invalid_json", "the body must be a JSON object") from None
    except msgspec.DecodeError as error:
        # msgspec's text names a position and a kind of fault; it never quotes the body.
        raise Refused("invalid_json", f"the body is not valid JSON: {error}") from None


def encode(fields: Mapping[str, Raw]) -> bytes:
    """The request as it is sent: the fields that were decided on, once each."""
    return msgspec.json.encode(fields)


def raw(value: object) -> Raw:
    """A value as the raw JSON that `Fields` hold."""
    return Raw(msgspec.json.encode(value))


def _take(fields: Fields, name: str, decoder: msgspec.json.Decoder[T], wanted: str) -> T | None:
    found = fields.get(name)
    if found is None:
        return None
    try:
        return decoder.decode(found)
    except RecursionError:
        raise Refused("invalid_json", f"{name} is nested too deeply", param=name) from None
    except msgspec.ValidationError:
        raise Refused("invalid_type", f"{name} must be {wanted}", param=name) from None


def _whole_field(fields: Fields, name: str) -> int | None:
    value = _take(fields, name, _whole, "an integer")
    if value is not None and not 1 <= value <= MAX_TOKENS:
        raise Refused("invalid_value", f"{name} must be between 1 and {MAX_TOKENS}", param=name)
    return value


def _check_messages(fields: Fields) -> None:
    if "messages" not in fields:
        raise Refused("missing_field", "you must provide a messages parameter", param="messages")
    if not _take(fields, "messages", _messages, "an array of objects that have a role"):
        raise Refused("invalid_value", "messages must not be empty", param="messages")


# --- Answers ---------------------------------------------------------------------------------------------------------


class _PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None
    cache_write_tokens: int | None = None
    audio_tokens: int | None = None


class _CompletionDetails(msgspec.Struct):
    # Accepted and rejected prediction tokens are billed as any others, and are in completion_tokens.
    reasoning_tokens: int | None = None
    audio_tokens: int | None = None


_NO_PROMPT_DETAILS, _NO_COMPLETION_DETAILS = _PromptDetails(), _CompletionDetails()


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    total_tokens: int | None = None
    prompt_tokens_details: _PromptDetails | None = None
    completion_tokens_details: _CompletionDetails | None = None
    num_cached_tokens: int | None = None
    prompt_audio_seconds: int | None = None


class Choice(msgspec.Struct):
    """One choice of an answer, as far as the gateway looks."""

    index: int | None = None
    finish_reason: str | None = None
    delta: Raw = Raw(b"{}")


class Answer(msgspec.Struct):
    """A whole answer or one chunk of a stream, as far as the gateway looks."""

    model: str | None = None
    choices: list[Choice] | None = None
    usage: Raw = Raw(b"null")
    error: Raw = Raw(b"null")

    @property
    def has_error(self) -> bool:
        """Whether an error object came in the place of an answer, under whatever status."""
        return bytes(self.error) != b"null"


class _DeltaChoice(msgspec.Struct):
    delta: dict[str, Raw] | None = None
    finish_reason: str | None = None


class _Deltas(msgspec.Struct):
    choices: list[_DeltaChoice] | None = None


_NOTHING = frozenset({b"null", b'""', b"[]", b"{}"})
_deltas = msgspec.json.Decoder(_Deltas)
_answer = msgspec.json.Decoder(Answer)
_usage = msgspec.json.Decoder(_Usage | None)


def read_answer(body: bytes) -> Answer | None:
    """What the gateway needs of an answer or a chunk; None where it is not one."""
    try:
        # What is skipped over would go out unseen, and an SDK fails on it.
        if not body.isascii():
            body.decode()
        return _answer.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def is_json(body: bytes) -> bool:
    """Whether a body is whole JSON of any kind."""
    try:
        msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    return True


def carries_content(data: bytes) -> bool:
    """Whether a chunk holds any of an answer (text, a tool call, a refusal, its end), and not only its preamble."""
    try:
        choices = _deltas.decode(data).choices
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    return any(
        choice.finish_reason
        or any(name != "role" and bytes(value) not in _NOTHING for name, value in (choice.delta or {}).items())
        for choice in choices or ()
    )


def read_usage(found: bytes | Raw) -> Usage | None:
    """The tokens a provider reports, OpenAI's and Mistral's shapes; None where absent, malformed or without counts.

    Negative and absurd counts are returned as they are: `Usage.is_sane` tells, and the books decide.
    """
    try:
        seen = _usage.decode(found)
    except (msgspec.DecodeError, RecursionError):
        return None
    if seen is None or seen.prompt_tokens is None:
        return None
    into = seen.prompt_tokens_details or _NO_PROMPT_DETAILS
    out = seen.completion_tokens_details or _NO_COMPLETION_DETAILS
    prompt, completion = seen.prompt_tokens, seen.completion_tokens or 0
    audio_input = into.audio_tokens or 0
    # What is in the total alone is billed too. xAI and Gemini leave a model's thoughts out of completion_tokens, where
    # OpenAI has them; Mistral leaves audio out of prompt_tokens, and says how many seconds it was.
    apart = seen.total_tokens - prompt - completion if seen.total_tokens is not None else 0
    # A total must not make sense of a count that makes none.
    apart = 0 if min(prompt, completion) < 0 else apart
    if apart > 0 and seen.prompt_audio_seconds:
        prompt += apart
        audio_input += apart
    elif apart > 0:
        completion += apart
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        cached_tokens=(into.cached_tokens if seen.prompt_tokens_details else seen.num_cached_tokens) or 0,
        reasoning_tokens=out.reasoning_tokens or 0,
        cache_write_tokens=into.cache_write_tokens or 0,
        audio_input_tokens=audio_input,
        audio_output_tokens=out.audio_tokens or 0,
        audio_seconds=seen.prompt_audio_seconds or 0,
    )
