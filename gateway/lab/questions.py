"""Conversations to be held: questions read from a file, dealt out to users. No model is asked here.

Its one invariant: the same questions, users and number each always give the same conversations, in the same order.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec
from msgspec import Meta


class Question(msgspec.Struct, frozen=True):
    """One line of an MT-bench file: what is asked first, and what is asked about the answer to that."""

    question_id: int
    category: str
    turns: Annotated[tuple[str, ...], Meta(min_length=1)]


class Conversation(NamedTuple):
    """One user and the question they are going to ask, all its turns in the same way."""

    user: str
    question: Question
    stream: bool
    wants_usage: bool
    """Whether a stream is asked to tell its usage; a plain answer always does."""


def read_questions(path: Path) -> list[Question]:
    """Every question of a JSONL file. Raises OSError, and ValueError with the line that is wrong."""
    decoder = msgspec.json.Decoder(Question)
    found = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            found.append(decoder.decode(line))
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}:{number}: not a question: {error}") from None
    if not found:
        raise ValueError(f"{path}: holds no question")
    return found


def deal(questions: Sequence[Question], *, users: int, each: int) -> list[Conversation]:
    """`each` conversations for every user, first everybody's first. A user gets no question twice while there are more.

    A user's questions lie far apart in the file, so that they meet several agents. Half of all conversations are
    streamed, and half of those ask for usage.
    """
    stride = max(1, len(questions) // each)
    return [
        Conversation(
            user=f"u{number + 1:03d}",
            question=questions[(number + turn * stride) % len(questions)],
            stream=(number + turn) % 2 == 1,
            wants_usage=number // 2 % 2 == 0,
        )
        for turn in range(each)
        for number in range(users)
    ]
