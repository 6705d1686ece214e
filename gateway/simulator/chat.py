"""What the simulator answers: a chat request in, words, tool calls and token counts in OpenAI's terms out.

Not a server and not a model: no socket, no clock; pacing and misbehaviour are in `reply` and
`faults`. Invariants: `usage` counts exactly the pieces that are streamed; the same settings, model,
messages and seed always give the same pieces.
"""

import re
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from gateway.domain.settings import SimulatorSettings
from gateway.simulator import words
from gateway.simulator.schema import CannotSatisfy, sample

CREATED_S = 1_760_000_000  # One date for every model: when a model was made says nothing here.
DEPRECATION = "2026-12-31T00:00:00Z"
MODELS = ("simulator", "simulator-small", "simulator-large", "simulator-deprecated")

_IMAGE_TOKENS = 85
_MESSAGE_TOKENS, _PRIMING_TOKENS = 4, 3


class RequestRefused(Exception):
    """An error answer in OpenAI's shape."""

    def __init__(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None,
        type_: str = "invalid_request_error", retry_after_s: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.retry_after_s = status, retry_after_s
        self.body = {"error": {"message": message, "type": type_, "param": param, "code": code}}


class Function(Struct, omit_defaults=True):
    name: str
    description: str | None = None  # Read only because it costs tokens.
    parameters: dict[str, Any] | None = None


class Tool(Struct):
    function: Function | None = None
    type: str = "function"


class Message(Struct, omit_defaults=True):
    role: Literal["developer", "system", "user", "assistant", "tool", "function"]
    content: str | list[dict[str, Any]] | None = None
    tool_calls: list[dict[str, Any]] | None = None

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "\n".join(part["text"] for part in self.content if isinstance(part.get("text"), str))
        return self.content or ""


class StreamOptions(Struct):
    include_usage: bool | None = None


class JsonSchema(Struct):
    schema: dict[str, Any] | None = None


class ResponseFormat(Struct):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatRequest(Struct, kw_only=True):
    """The fields the simulator heeds; every other one is accepted and ignored."""

    model: Annotated[str, Meta(min_length=1)]
    messages: Annotated[list[Message], Meta(min_length=1)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Meta(ge=1, le=128)] | None = None
    max_tokens: Annotated[int, Meta(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Meta(ge=1)] | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    random_seed: int | None = None  # Mistral's name for it.
    tools: list[Tool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    response_format: ResponseFormat | None = None

    @property
    def output_limit(self) -> int | None:
        limits = [limit for limit in (self.max_tokens, self.max_completion_tokens) if limit is not None]
        return min(limits, default=None)

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage is True


class Choice(Struct, frozen=True):
    """One of the `n` answers, cut into the pieces that are streamed."""

    pieces: tuple[str, ...]
    finish_reason: Literal["stop", "length", "tool_calls"]
    tool_name: str | None = None
    call_id: str | None = None

    @property
    def tokens(self) -> int:
        return len(self.pieces) + (self.tool_name is not None)

    @property
    def text(self) -> str:
        return "".join(self.pieces)


class Answer(Struct, frozen=True):
    """Everything that is said in answer to one request."""

    id: str
    model: str
    choices: tuple[Choice, ...]
    prompt_tokens: int

    @property
    def usage(self) -> dict[str, Any]:
        completion_tokens = sum(choice.tokens for choice in self.choices)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": self.prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": 0},
        }


def decode(body: bytes) -> Any:
    """The JSON of a request body. Raises `RequestRefused`."""
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestRefused(400, f"The body is not valid JSON: {error}", code="invalid_json") from None


def read_request(decoded: Any) -> ChatRequest:
    """The typed request. Raises `RequestRefused` with the field at fault in `param`."""
    try:
        request = msgspec.convert(decoded, ChatRequest)
    except msgspec.ValidationError as error:
        at = re.search(r"at `\$\.?(.+)`$", str(error)) or re.search(r"required field `(.+)`$", str(error))
        raise RequestRefused(400, str(error), code="invalid_type", param=at and at.group(1)) from None
    if request.stream_options is not None and not request.stream:
        # OpenAI refuses this too; a gateway that adds the field to a plain call should learn it here.
        raise RequestRefused(400, "'stream_options' needs 'stream': true.", param="stream_options")
    if "retired" in request.model:
        raise model_not_found(request.model)
    return request


def model_not_found(model: str) -> RequestRefused:
    message = f"The model `{model}` does not exist or you do not have access to it."
    return RequestRefused(404, message, code="model_not_found", param="model")


def request_dice(request: ChatRequest, settings: SimulatorSettings, purpose: str) -> words.Dice:
    """Dice that fall alike for the same settings, model, messages and seed; each purpose has its own."""
    seed = request.seed if request.seed is not None else request.random_seed
    messages = msgspec.json.encode(request.messages, order="deterministic").decode()
    return words.Dice(purpose, settings.seed, request.model, seed, messages)


def answer(request: ChatRequest, settings: SimulatorSettings) -> Answer:
    """The whole answer. Raises `RequestRefused` for a tool choice or a schema that cannot be met."""
    identity = request_dice(request, settings, "id").hex(24)
    function = _chosen_function(request)
    choices = []
    for index in range(request.n or 1):
        dice = request_dice(request, settings, f"choice {index}")
        if function is not None:
            choices.append(_tool_call(request, function, dice))
        else:
            choices.append(_content(request, dice))
    return Answer(
        id=f"chatcmpl-sim-{identity}",
        model=request.model,
        choices=tuple(choices),
        prompt_tokens=_prompt_tokens(request),
    )


def _content(request: ChatRequest, dice: words.Dice) -> Choice:
    """A JSON document if one was asked for, else prose; cut at the first stop sequence, then at the limit."""
    form = request.response_format
    asked = _last_user_text(request)
    if form is None or form.type == "text":
        last = request.messages[-1]
        turn = sum(message.role == "user" for message in request.messages)
        result = last.text if last.role == "tool" else None
        text = words.prose(dice, model=request.model, text=asked, turn=turn, tool_result=result)
    else:
        text = _json(_document(form, dice, words.keywords(asked)))
    stops = [request.stop] if isinstance(request.stop, str) else request.stop or []
    ends = [text.find(stop) for stop in stops if stop and stop in text]
    text = text[: min(ends, default=len(text))]
    pieces = words.word_tokens(text) if form is None or form.type == "text" else words.code_tokens(text)
    limit = request.output_limit
    if limit is not None and len(pieces) > limit:
        return Choice(pieces=pieces[:limit], finish_reason="length")
    return Choice(pieces=pieces, finish_reason="stop")


def _document(form: ResponseFormat, dice: words.Dice, about: list[str]) -> Any:
    if form.type == "json_object" or form.json_schema is None or form.json_schema.schema is None:
        topic = about[0] if about else "your message"
        return {"topic": topic, "answer": f"The simulator has no opinion on {topic}.", "simulated": True}
    try:
        return sample(form.json_schema.schema, dice, about)
    except CannotSatisfy as error:
        raise RequestRefused(400, f"Invalid schema: {error}.", param="response_format") from None


def _tool_call(request: ChatRequest, function: Function, dice: words.Dice) -> Choice:
    call_id = f"call_{dice.hex(24)}"
    try:
        # An object even where the schema forgot to say so: arguments are always one.
        schema = {"type": "object", **(function.parameters or {})}
        arguments = sample(schema, dice, words.keywords(_last_user_text(request)))
    except CannotSatisfy as error:
        raise RequestRefused(400, f"Invalid schema for '{function.name}': {error}.", param="tools") from None
    pieces = words.code_tokens(_json(arguments))
    limit = request.output_limit
    if limit is not None and len(pieces) + 1 > limit:
        return Choice(pieces[: limit - 1], "length", tool_name=function.name, call_id=call_id)
    return Choice(pieces, "tool_calls", tool_name=function.name, call_id=call_id)


def _chosen_function(request: ChatRequest) -> Function | None:
    """The function to call. None of them after a tool's result, so that an agent's loop ends."""
    functions = [tool.function for tool in request.tools or [] if tool.function is not None]
    choice = request.tool_choice or "auto"
    if isinstance(choice, dict) and isinstance(allowed := choice.get("allowed_tools"), dict):
        names = [_name(tool) for tool in allowed.get("tools") or []]
        functions = [function for function in functions if function.name in names]
        choice = allowed.get("mode") or "auto"
    if choice == "none" or request.messages[-1].role in ("tool", "function"):
        return None
    text = _last_user_text(request).casefold()
    named = [one for one in functions if _is_named(one, text)]
    if choice == "auto":
        return named[0] if named else functions[0] if functions and "use the tool" in text else None
    if choice in ("required", "any"):
        if not functions:
            raise RequestRefused(400, f"'tool_choice' is '{choice}' but there are no tools.", param="tool_choice")
        return named[0] if named else functions[0]
    wanted = _name(choice)
    for function in functions:
        if function.name == wanted:
            return function
    raise RequestRefused(400, f"'tool_choice' names no function in 'tools': {wanted!r}.", param="tool_choice")


def _name(tool: Any) -> Any:
    function = tool.get("function") if isinstance(tool, dict) else None
    return function.get("name") if isinstance(function, dict) else tool


def _is_named(function: Function, text: str) -> bool:
    name = function.name.casefold()
    return name in text or name.replace("_", " ") in text


def _last_user_text(request: ChatRequest) -> str:
    return next((message.text for message in reversed(request.messages) if message.role == "user"), "")


def _prompt_tokens(request: ChatRequest) -> int:
    count = _PRIMING_TOKENS
    for message in request.messages:
        count += _MESSAGE_TOKENS + words.token_estimate(message.text)
        if isinstance(message.content, list):
            count += _IMAGE_TOKENS * sum(not isinstance(part.get("text"), str) for part in message.content)
        if message.tool_calls:
            count += words.token_estimate(_json(message.tool_calls))
    for described in (request.tools, request.response_format):
        count += words.token_estimate(_json(described)) if described else 0
    return count


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()
