"""The bytes both ends of the bench agree on: question, answer, stream, and how to tell that they came whole.

Not an HTTP library: it reads what a well-behaved HTTP/1.1 peer on loopback sends; the rest is an error.
Every answer carries the same text, so a cut, swapped or invented one is noticed.
"""

import json
import re

import msgspec

HOST = "127.0.0.1"
CHAT_PATH = "/v1/chat/completions"
STREAM_CHUNKS = 64
SPACING_S = 0.010
USERS = 1024

# A model whose name starts with PACED is streamed with SPACING_S between chunks. The name travels through
# every subject, also through the gateway, which replaces the agent's name by a model's.
PACED = "paced"
FAST_AGENT = "qa_agent"
PACED_AGENT = "paced_agent"

LAST_CHUNK = b"\r\n0\r\n\r\n"

_SENTENCE = (
    "The return window is thirty days from delivery, and the refund goes to the card that paid, "
    "less the outbound postage unless the item came damaged. "
)
_SYSTEM = "You answer questions about orders, politely, in at most six sentences, and cite the rule you used. "
ANSWER_TEXT = (_SENTENCE * 5).strip()
_CREATED = 1_763_700_000
_USAGE = {"prompt_tokens": 412, "completion_tokens": 137, "total_tokens": 549}


def compact(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def question(user: int, *, model: str, stream: bool) -> bytes:
    """A chat request of about 2 KB, as a support tool would send it; only the user differs between calls."""
    body: dict[str, object] = {
        "model": model,
        "messages": [
            {"role": "system", "content": _SYSTEM * 6},
            {"role": "user", "content": f"Here is our policy. {_SENTENCE * 8}\nMay I send back order 4711?"},
        ],
        "temperature": 0.2,
        "user": f"user-{user % USERS:06d}",
    }
    if stream:
        body["stream"] = True
    return compact(body)


def request(body: bytes, *, port: int, path: str = CHAT_PATH) -> bytes:
    """The whole HTTP request, with the headers an OpenAI SDK would send."""
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {HOST}:{port}\r\nAccept: application/json\r\n"
        "Content-Type: application/json\r\nUser-Agent: OpenAI/Python 2.54.0\r\n"
        "Authorization: Bearer bench-key\r\nX-Stainless-Retry-Count: 0\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def answer() -> bytes:
    """The body of the plain answer: about 1.1 KB, with usage."""
    return compact(
        {
            "id": "chatcmpl-bench-000000000000000000000001",
            "object": "chat.completion",
            "created": _CREATED,
            "model": "bench-model",
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": ANSWER_TEXT},
                    "logprobs": None,
                    "finish_reason": "stop",
                }
            ],
            "usage": _USAGE,
        }
    )


def events(*, with_usage: bool) -> list[bytes]:
    """The stream as server-sent events: role, 62 words, finish reason (64 chunks), usage if asked, [DONE]."""
    words = [f" word{position:02d}" for position in range(1, STREAM_CHUNKS - 1)]
    deltas: list[dict[str, str]] = [{"role": "assistant", "content": ""}]
    deltas += [{"content": word} for word in words]
    chunks = [_chunk([{"index": 0, "delta": delta, "finish_reason": None}]) for delta in deltas]
    chunks.append(_chunk([{"index": 0, "delta": {}, "finish_reason": "stop"}]))
    if with_usage:
        chunks.append(_chunk([], usage=_USAGE))
    return [b"data: " + chunk + b"\n\n" for chunk in chunks] + [b"data: [DONE]\n\n"]


def _chunk(choices: list[dict[str, object]], usage: dict[str, int] | None = None) -> bytes:
    chunk: dict[str, object] = {
        "id": "chatcmpl-bench-000000000000000000000001",
        "object": "chat.completion.chunk",
        "created": _CREATED,
        "model": "bench-model",
        "system_fingerprint": "fp_bench",
        "choices": choices,
    }
    if usage is not None:
        chunk["usage"] = usage
    return compact(chunk)


def chunked(data: bytes) -> bytes:
    """One HTTP chunk."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def unchunk(raw: bytes) -> bytes:
    """The body inside a finished chunked encoding. Raises ValueError where the framing is broken."""
    parts: list[bytes] = []
    position = 0
    while True:
        line_end = raw.index(b"\r\n", position)
        size = int(raw[position:line_end].partition(b";")[0], 16)
        start = line_end + 2
        if size == 0:
            return b"".join(parts)
        if raw[start + size : start + size + 2] != b"\r\n":
            raise ValueError(f"chunk of {size} bytes is not followed by a line end")
        parts.append(raw[start : start + size])
        position = start + size + 2


_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d+)", re.IGNORECASE)
_CHUNKED = re.compile(rb"\r\ntransfer-encoding:[ \t]*chunked", re.IGNORECASE)
CHUNKED_BODY = -1
UNFRAMED_BODY = -2


def body_length(message: bytes, head_end: int) -> int:
    """Length of the body of a message whose head ends at `head_end`, or CHUNKED_BODY, or UNFRAMED_BODY."""
    # The search may read the first line break of the blank line: a last header has it as its own end.
    found = _LENGTH.search(message, 0, head_end + 2)
    if found:
        return int(found[1])
    return CHUNKED_BODY if _CHUNKED.search(message, 0, head_end + 2) else UNFRAMED_BODY


class _Message(msgspec.Struct):
    content: str


class _Choice(msgspec.Struct):
    message: _Message


class _Usage(msgspec.Struct):
    total_tokens: int


class _Answer(msgspec.Struct):
    choices: list[_Choice]
    usage: _Usage


_ANSWER = msgspec.json.Decoder(_Answer)


def is_whole_answer(body: bytes) -> bool:
    """A subject may rewrite model or id; it must be JSON, with the whole text and the right usage."""
    try:
        read = _ANSWER.decode(body)
    except msgspec.DecodeError:
        return False
    texts = [choice.message.content for choice in read.choices]
    return texts == [ANSWER_TEXT] and read.usage.total_tokens == _USAGE["total_tokens"]


def is_whole_stream(body: bytes) -> bool:
    """All 64 chunks and [DONE], perhaps a usage chunk that a gateway asked for; comments are free."""
    events_seen = body.count(b"data:")
    return (
        STREAM_CHUNKS + 1 <= events_seen <= STREAM_CHUNKS + 2
        and b"[DONE]" in body
        and body.count(b" word") == STREAM_CHUNKS - 2
    )
