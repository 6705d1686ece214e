"""The simulator's voice: seeded dice, keywords, short plain sentences and a token estimate.

Not a language model and not a tokenizer: a word with the space before it is a token, and four characters of
input are. Invariant: the same dice and the same text give the same words, on every machine, for ever.
"""

import hashlib
import re
from collections.abc import Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")

SHORTEST_WORDS, LONGEST_WORDS = 20, 120
"""An answer in prose has at least and at most so many words, before `max_tokens` has its say."""

_KEYWORDS_MAX = 8
_KEYWORD_CHARS = 32
_READ_CHARS = 4_000  # Keywords come from the head of the text, so that a megabyte of prompt costs no more.

_COMMON_WORDS = """
    about above after again also another answer been before being below between both compose could
    describe does doing down each every explain find from give going hello have having here himself
    into itself just know like list make many might more most much must need only other ours over
    please provide same shall should show some such take tell than thank thanks that their them then
    there these they this those through under until used using very want were what when where which
    while whom whose will with without work works would write your yours yourself
"""
_COMMON = frozenset(_COMMON_WORDS.split())

_SENTENCES = (
    "A sensible first step is to write down what {a} has to achieve.",
    "Then look at {b}, because it often decides how much of {a} is needed.",
    "Where {a} and {b} pull in different directions, settle {a} first.",
    "Most people find that {b} takes longer than they expected.",
    "Keep one good example of {a} at hand and compare every change with it.",
    "Two things are worth checking: who depends on {a}, and what happens without it.",
    "In plain words, {a} comes down to a few choices that can be changed later.",
    "I would leave {b} alone until the rest is clear.",
    "A small trial with {a} tells you more than a long discussion.",
    "If {b} is uncertain, say so and note what would settle it.",
    "Set a date on which {a} is looked at again.",
    "A common mistake is to treat {b} as if it were {a}.",
    "Ask somebody who works with {b} every day before you decide.",
    "The figures for {a} matter more than the opinions about it.",
    "When {b} changes, the plan should change with it.",
    "Nothing here is urgent, so there is time to do {a} properly.",
    "It also helps to explain {b} to someone who has never seen it.",
    "Once {a} is in order, {b} tends to follow.",
)

_CLOSINGS = (
    "A real model would go further into {a}.",
    "Ask again with more detail on {b} and I will answer differently.",
    "That is as far as a simulator can go on {a}.",
)


class Dice:
    """Numbers drawn from a key: alike for equal keys, unrelated for others."""

    def __init__(self, *key: object) -> None:
        self._key = hashlib.blake2b("\x1f".join(map(str, key)).encode(), digest_size=32).digest()
        self._drawn = 0

    def hex(self, digits: int) -> str:
        """Up to 64 hexadecimal digits of the key itself; drawing does not change them."""
        return self._key.hex()[:digits]

    def fraction(self) -> float:
        """The next number in [0, 1)."""
        self._drawn += 1
        block = hashlib.blake2b(self._drawn.to_bytes(8, "big"), key=self._key, digest_size=8).digest()
        return (int.from_bytes(block, "big") >> 11) / 2**53  # 53 bits are what a float holds: never 1.0.

    def between(self, low: int, high: int) -> int:
        """The next whole number in low..high, both included."""
        return min(high, low + int(self.fraction() * (high - low + 1)))

    def pick(self, choices: Sequence[T]) -> T:
        return choices[self.between(0, len(choices) - 1)]

    def shuffled(self, items: Iterable[T]) -> list[T]:
        rest, out = list(items), []
        while rest:
            out.append(rest.pop(self.between(0, len(rest) - 1)))
        return out


def keywords(text: str) -> list[str]:
    """The telling words of a text, names in the middle of a sentence first, each once, at most eight."""
    found: dict[str, str] = {}
    names: list[str] = []
    for match in re.finditer(r"[^\W\d_][\w'-]*", text[:_READ_CHARS]):
        word = match.group().rstrip("'-_")[:_KEYWORD_CHARS]
        folded = word.casefold()
        if len(word) < 4 or folded in _COMMON or folded in found:
            continue
        found[folded] = word
        before = text[max(0, match.start() - 8) : match.start()].rstrip(" ")
        if word[0].isupper() and before and before[-1] not in ".!?:\n":
            names.append(word)
    rest = [word for word in found.values() if word not in names]
    return [*names, *rest][:_KEYWORDS_MAX]


def prose(dice: Dice, *, model: str, text: str, turn: int, tool_result: str | None = None) -> str:
    """A few plain sentences about a text's keywords, which say whose stand-in is speaking."""
    about = keywords(text)
    target = dice.between(SHORTEST_WORDS, LONGEST_WORDS)
    said = [f"This is the simulator answering for {model[:64]}; no real model was asked."]
    if tool_result is not None:
        said.append(f"The tool gave back this: {_shortened(tool_result)}")
    elif about:
        turn_named = f"In turn {turn} you asked" if turn > 1 else "You asked"
        said.append(f"{turn_named} about {_listed(about[:3])}.")
    else:
        said.append(f"You wrote: {_shortened(text)}")
    topics = about or ["your message"]
    words = sum(len(sentence.split()) for sentence in said)
    for number, template in enumerate([*dice.shuffled(_SENTENCES), dice.pick(_CLOSINGS)]):
        first = topics[number % len(topics)]
        second = topics[(number + 1) % len(topics)] if len(topics) > 1 else "the detail"
        sentence = template.format(a=first, b=second)
        words += len(sentence.split())
        if words > target and number > 0:
            break
        said.append(sentence[0].upper() + sentence[1:])
    return " ".join(said)


def _shortened(text: str) -> str:
    head = " ".join(text[:160].split()[:12])
    return head if head.endswith((".", "!", "?")) else f"{head or 'nothing'}."


def _listed(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def word_tokens(text: str) -> tuple[str, ...]:
    """Prose cut into what is streamed: each word with the white space before it."""
    return tuple(re.findall(r"\s*\S+|\s+$", text))


def code_tokens(text: str) -> tuple[str, ...]:
    """JSON cut into what is streamed: four characters at a time."""
    return tuple(text[start : start + 4] for start in range(0, len(text), 4))


def token_estimate(text: str) -> int:
    """Input tokens of a text, four characters each, rounded up."""
    return (len(text) + 3) // 4
