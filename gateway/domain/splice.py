"""Two halves of one answer: what a client already has of a stream that broke off, and how a second stream joins it.

Only text is ever joined, of a single choice: the arguments of a tool call are never spliced, since half a call from
each of two models is a call that nobody made. The invariant: what goes out continues what went out to the letter, or
`Mismatch` is raised and nothing goes out.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import msgspec

# Beyond it a broken stream is not joined: remembering what went out must not cost more than the stream itself.
MAX_DELIVERED_BYTES = 2**20


# So many characters are not repeated by chance.
TELLING_CHARS = 16


class Mismatch(Exception):
    """The second answer says something else, so the two cannot be joined."""


class Delivered(NamedTuple):
    """What the client has: the text so far, and the id its chunks carry."""

    text: str
    id: str


class _Choice(msgspec.Struct):
    index: int | None = None
    delta: dict[str, Any] | None = None


class _Chunk(msgspec.Struct):
    id: str | None = None
    choices: list[_Choice] | None = None


_chunk = msgspec.json.Decoder(_Chunk)
# What the tap skips over is looked into here, so it may fail here for the first time.
_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


def read_delivered(events: Iterable[bytes]) -> Delivered | None:
    """The text behind the events that went out; None where there is more than one choice's text in them."""
    texts: list[str] = []
    first_id = ""
    for data in events:
        try:
            chunk = _chunk.decode(data)
        except _UNREADABLE:
            return None
        first_id = first_id or chunk.id or ""
        for choice in chunk.choices or ():
            delta = choice.delta or {}
            if choice.index or not _is_text(delta):
                return None
            texts.append(delta.get("content") or "")
    return Delivered("".join(texts), first_id)


class Splice:
    """Drops from a second stream the text that the client already has.

    Restarted (`is_continued` False), the second stream must repeat that text to the letter. Asked to continue, a
    provider may begin with it or after it: what comes is held until that is clear. A short text cannot tell the two
    apart ("10" goes on with "100", which looks like its repetition), so there a repetition is insisted on.
    """

    __slots__ = ("_delivered", "_held", "_is_continued", "_is_joined")

    def __init__(self, delivered: str, *, is_continued: bool) -> None:
        self._delivered = delivered
        self._is_continued = is_continued and len(delivered) >= TELLING_CHARS
        self._held = ""
        self._is_joined = not delivered

    def feed(self, text: str) -> str:
        """What of `text` goes out. Raises `Mismatch`."""
        if self._is_joined:
            return text
        self._held += text
        if self._held.startswith(self._delivered):
            return self._join(self._held[len(self._delivered) :])
        if self._delivered.startswith(self._held):
            return ""
        if self._is_continued:
            return self._join(self._held)
        raise Mismatch("the second answer differs from what had gone out")

    def end(self) -> str:
        """What is still held when the second stream ends. Raises `Mismatch` where it ended too early to join."""
        if self._is_joined:
            return ""
        if self._is_continued:
            return self._join(self._held)
        raise Mismatch("the second answer ended before it reached what had gone out")

    def _join(self, text: str) -> str:
        self._is_joined = True
        self._held = ""
        return text


def respliced(data: bytes, splice: Splice, stream_id: str) -> bytes | None:
    """A chunk of the second stream as it goes out, under the first one's id; None where nothing of it is new.

    Raises `Mismatch`, also where the second stream calls a tool.
    """
    try:
        chunk: dict[str, Any] = msgspec.json.decode(data)
    except _UNREADABLE:
        raise Mismatch("the second answer cannot be read") from None
    choices = chunk.get("choices") or []
    for choice in choices:
        delta = choice.get("delta") or {}
        if choice.get("index") or not isinstance(delta, dict) or not _is_text(delta):
            raise Mismatch("the second answer is of another kind")
        text = splice.feed(delta.get("content") or "")
        if choice.get("finish_reason"):
            text += splice.end()
        choice["delta"] = {"content": text} if text else {}
    if choices and not any(choice["delta"] or choice.get("finish_reason") for choice in choices):
        return None
    return msgspec.json.encode({**chunk, "id": stream_id or chunk.get("id", "")})


def _is_text(delta: dict[str, Any]) -> bool:
    """Whether a delta says nothing but text: no call, no refusal, no reasoning."""
    return all(name in ("role", "content") or not value for name, value in delta.items()) and isinstance(
        delta.get("content"), str | None
    )
