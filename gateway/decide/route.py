"""HALO: which agent answers a request that names none, and why.

Rules are asked by priority; the first whose every stated condition holds decides. The texts of a prompt are
asked one at a time: the last user message first, because it says what is wanted now; only when no rule holds
for it the user messages before it, newest first, and at last the system prompt. So "and the second one?" goes
where the conversation went. A rule of negative priority is a last resort: it is asked, in the same order of
texts, only when no other rule held for any of them. A rule that states nothing about text holds or fails with
the first text, so it goes before whatever an earlier message says.

Words are whole words, compared after Unicode case folding. A hyphen, an apostrophe or a line break between
the words of a phrase is a space; the end of a sentence is not. In scripts that put no space between words,
use a pattern.

This is no classifier and learns nothing: the same prompt, rules and minute give the same route on every
machine. Invariant: a route's agent is named in the routing, and its reason quotes the configuration, never
the prompt.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping

import msgspec

from gateway.domain.rules import DEFAULT_RULE, WEEKDAYS, Routing, Rule, compile_pattern, hours_as_minutes

MAX_TEXT_CHARS = 16 * 1024
"""Most text that is looked at per decision, all messages together. Of a text longer than what is left,
both ends are looked at, half of it each: what is wanted stands before or after what was pasted in."""

_SEAM = " . "
_LEAST_WINDOW_CHARS = 64

_DAY_S = 86_400
_EPOCH_WEEKDAY = 3  # 1 January 1970 was a Thursday, and Monday is 0.

# A table over bytes and split() find the words of 1.5 KB in 8 us where re.findall takes 35. Bytes from 128 up
# belong to characters outside ASCII; of those, what is no letter or digit became a space before.
_TO_WORDS = bytes(c if c >= 128 or chr(c).isalnum() else 0x20 for c in range(256))
_SENTENCE_END = b"."
_TO_SENTENCES = bytes(_SENTENCE_END[0] if chr(c) in ".!?;:" else _TO_WORDS[c] for c in range(256))
_NO_LETTER = re.compile(r"[^\w\x00-\x7f]")


class Prompt(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What the rules may ask about one request."""

    user: tuple[str, ...] = ()
    """The user messages' texts, newest last."""
    system: str = ""
    metadata: Mapping[str, str] = {}
    headers: Mapping[str, str] = {}
    """Lower-case names."""
    tool_names: tuple[str, ...] = ()
    """One name per tool offered, "" for a tool without one."""
    chars: int = 0
    """Size of all messages together."""
    now_s: float = 0.0
    """Unix time."""


class Route(msgspec.Struct, frozen=True, gc=False):
    agent: str
    rule: str
    """The rule's name, or "default"."""
    why: str
    """One line; may hold any character the configuration holds, so encode it before it becomes a header."""


class _Vocabulary:
    """Every word and phrase that some rule mentions, so that one pass over a text finds them all."""

    __slots__ = ("_phrases", "_singles")

    def __init__(self, spelled: set[bytes]) -> None:
        phrases: list[tuple[frozenset[bytes], bytes, bytes]] = []
        singles: set[bytes] = set()
        for key in spelled:
            parts = frozenset(key.split()) - {_SENTENCE_END}
            singles |= parts
            if len(parts) > 1 or key not in parts:
                phrases.append((parts, key, b" %b " % key))
        self._singles = frozenset(singles)
        # Under the word that fewest phrases share: "how" would call up thirty of them, "cancel" two.
        shared_by = Counter(part for parts, _, _ in phrases for part in parts)
        self._phrases: dict[bytes, list[tuple[frozenset[bytes], bytes, bytes]]] = {}
        for phrase in phrases:
            rarest = min(phrase[0], key=lambda part: (shared_by[part], -len(part), part))
            self._phrases.setdefault(rarest, []).append(phrase)

    def found_in(self, folded: bytes) -> set[bytes]:
        """The configured words and phrases of a text; the words phrases are made of are among them."""
        found: set[bytes] = set(self._singles.intersection(folded.translate(_TO_WORDS).split()))
        spaced = b""
        for rarest in found & self._phrases.keys():
            for parts, key, padded in self._phrases[rarest]:
                if parts <= found:
                    spaced = spaced or b" %b " % _spelled(folded)
                    if padded in spaced:
                        found.add(key)
        return found


class _Text:
    """One text of the prompt, read once for all rules."""

    __slots__ = ("_raw", "_utf8", "place", "words")

    def __init__(self, raw: str, place: str, vocabulary: _Vocabulary) -> None:
        self._raw = raw if raw.isascii() else unicodedata.normalize("NFC", raw)
        self._utf8: bytes | None = None
        self.place = place
        self.words = vocabulary.found_in(_fold(self._raw))

    @property
    def utf8(self) -> bytes:
        """For patterns. A lone surrogate has no UTF-8 and becomes a question mark."""
        if self._utf8 is None:
            self._utf8 = self._raw.encode("utf-8", "replace")
        return self._utf8


class _CompiledRule:
    """A rule with everything worked out that does not depend on the prompt."""

    __slots__ = (
        "_all", "_any", "_any_in_order", "_days", "_facts", "_hours", "_none", "_pattern", "_tools",
        "is_for_any_request", "rule", "turn",
    )  # fmt: skip

    def __init__(self, rule: Rule, turn: int) -> None:
        self.rule = rule
        self.turn = turn
        self._any_in_order = [(_key(word), word) for word in rule.any_word]
        self._any = frozenset(key for key, _ in self._any_in_order)
        self._all = frozenset(_key(word) for word in rule.all_words)
        self._none = frozenset(_key(word) for word in rule.not_word)
        self._pattern = compile_pattern(rule.pattern) if rule.pattern else None
        self._tools = frozenset(rule.any_tool)
        self._hours = hours_as_minutes(rule.hours_utc) if rule.hours_utc else None
        self._days = frozenset(WEEKDAYS.index(day) for day in rule.weekdays)
        self._facts = _facts(rule)
        sizes = (rule.min_chars, rule.max_chars, rule.tools)
        stated = (rule.metadata, rule.headers, rule.any_tool, rule.hours_utc, rule.weekdays)
        self.is_for_any_request = not any(stated) and all(size is None for size in sizes)

    @property
    def spelled(self) -> frozenset[bytes]:
        return self._any | self._all | self._none

    def holds_for_request(self, prompt: Prompt) -> bool:
        """The conditions that are the same for each text of the prompt."""
        rule = self.rule
        if rule.min_chars is not None and prompt.chars < rule.min_chars:
            return False
        if rule.max_chars is not None and prompt.chars > rule.max_chars:
            return False
        if rule.tools is not None and rule.tools != bool(prompt.tool_names):
            return False
        if self._tools and self._tools.isdisjoint(prompt.tool_names):
            return False
        if rule.metadata and any(prompt.metadata.get(key) != value for key, value in rule.metadata.items()):
            return False
        if rule.headers and not all(_has_header(prompt.headers, *asked) for asked in rule.headers.items()):
            return False
        return self._holds_at(prompt.now_s) if self._hours or self._days else True

    def _holds_at(self, now_s: float) -> bool:
        day, second = divmod(int(now_s // 1), _DAY_S)
        if self._days and (day + _EPOCH_WEEKDAY) % 7 not in self._days:
            return False
        if self._hours is None:
            return True
        start, stop = self._hours
        minute = second // 60
        return start <= minute < stop if start < stop else minute >= start or minute < stop

    def holds_for_text(self, text: _Text) -> bool:
        words = text.words
        if self._any and self._any.isdisjoint(words):
            return False
        if not self._all <= words or not self._none.isdisjoint(words):
            return False
        return self._pattern is None or self._pattern.search(text.utf8) is not None

    def route(self, text: _Text, offered: tuple[str, ...]) -> Route:
        rule = self.rule
        matched = next((f'word "{word}"' for key, word in self._any_in_order if key in text.words), "")
        tool = next((f'tool "{name}"' for name in rule.any_tool if name in offered), "")
        facts = "; ".join(fact for fact in (matched, self._facts, tool) if fact)
        about_text = rule.any_word or rule.all_words or rule.pattern
        place = text.place if about_text else ""
        return Route(rule.agent, rule.name, f"{rule.why} ({facts}{place})" if facts or place else rule.why)


class Routes:
    """A routing made ready. Made once per load; `decide` keeps no state, so threads may share it."""

    __slots__ = (
        "_default",
        "_for_any_request",
        "_for_some_requests",
        "_last_resorts",
        "_look_at_system",
        "_look_back",
        "_vocabulary",
    )

    def __init__(self, routing: Routing) -> None:
        # A stable sort: ties keep the file's order.
        by_priority = sorted(routing.rules, key=lambda rule: -rule.priority)
        compiled = [_CompiledRule(rule, turn) for turn, rule in enumerate(by_priority)]
        ordinary = [rule for rule in compiled if rule.rule.priority >= 0]
        self._last_resorts = compiled[len(ordinary) :]
        # Most rules ask only about text; those that ask about the request are tried once, before any text.
        self._for_any_request = [rule for rule in ordinary if rule.is_for_any_request]
        self._for_some_requests = [rule for rule in ordinary if not rule.is_for_any_request]
        self._vocabulary = _Vocabulary(set().union(*(rule.spelled for rule in compiled)))
        self._look_back = routing.look_back
        self._look_at_system = routing.look_at_system
        self._default = Route(routing.default_agent, DEFAULT_RULE, "no rule held")

    def decide(self, prompt: Prompt) -> Route:
        return next(self._holding(prompt), self._default)

    def explain(self, prompt: Prompt) -> list[Route]:
        """Every rule that holds, in the order asked, then the default; the first is what `decide` returns."""
        routes: dict[str, Route] = {}
        for route in self._holding(prompt):
            routes.setdefault(route.rule, route)
        return [*routes.values(), self._default]

    def _holding(self, prompt: Prompt) -> Iterator[Route]:
        rules = self._for_any_request
        held = [rule for rule in self._for_some_requests if rule.holds_for_request(prompt)]
        if held:
            rules = sorted([*held, *rules], key=lambda rule: rule.turn)
        texts: list[_Text] = []
        for raw, place in self._windows(prompt):
            text = _Text(raw, place, self._vocabulary)
            texts.append(text)
            for rule in rules:
                if rule.holds_for_text(text):
                    yield rule.route(text, prompt.tool_names)
        for text in texts:
            for rule in self._last_resorts:
                if rule.holds_for_text(text) and rule.holds_for_request(prompt):
                    yield rule.route(text, prompt.tool_names)

    def _windows(self, prompt: Prompt) -> Iterator[tuple[str, str]]:
        """The texts in the order they are asked, with where they stand, cut to `MAX_TEXT_CHARS` in all."""
        left = MAX_TEXT_CHARS
        for raw, place in self._texts(prompt):
            if left < _LEAST_WINDOW_CHARS:
                return
            window = raw if len(raw) <= left else _both_ends(raw, left)
            left -= len(window)
            yield window, place

    def _texts(self, prompt: Prompt) -> Iterator[tuple[str, str]]:
        yield prompt.user[-1] if prompt.user else "", ""
        oldest = max(0, len(prompt.user) - 1 - self._look_back)
        for raw in prompt.user[oldest:-1][::-1]:
            yield raw, ", in an earlier message"
        if self._look_at_system and prompt.system:
            yield prompt.system, ", in the system prompt"


def compile_routes(routing: Routing) -> Routes:
    """Ready to decide. The routing must be one in which `check_routing` finds nothing."""
    return Routes(routing)


def _facts(rule: Rule) -> str:
    """What can be said beforehand about why a rule holds; the word and the tool are known only then."""
    facts = [f'word "{word}"' for word in rule.all_words]
    facts += [f'pattern of rule "{rule.name}"'] if rule.pattern else []
    facts += [f'metadata {key} = "{value}"' for key, value in rule.metadata.items()]
    facts += [f"header {key} present" if value == "*" else f'header {key} = "{value}"'
              for key, value in rule.headers.items()]  # fmt: skip
    if rule.tools is not None and not rule.any_tool:
        facts.append("tools offered" if rule.tools else "no tools")
    facts += [f"at least {rule.min_chars} characters"] if rule.min_chars is not None else []
    facts += [f"at most {rule.max_chars} characters"] if rule.max_chars is not None else []
    facts += [f"{rule.hours_utc} UTC"] if rule.hours_utc else []
    facts += [" ".join(rule.weekdays)] if rule.weekdays else []
    return "; ".join(facts)


def _has_header(headers: Mapping[str, str], name: str, value: str) -> bool:
    found = headers.get(name)
    return found is not None and value in ("*", found)


def _both_ends(raw: str, chars: int) -> str:
    first = chars // 2
    return raw[:first] + _SEAM + raw[len(raw) - (chars - first - len(_SEAM)) :]


def _fold(text: str) -> bytes:
    """Case-folded UTF-8 in which everything outside ASCII that is no letter or digit is a space."""
    if text.isascii():
        return text.casefold().encode()
    # The Turkish capital dotted I folds to an i and a mark that would part the word.
    folded = unicodedata.normalize("NFC", text.casefold().replace("i\u0307", "i"))
    return _NO_LETTER.sub(" ", folded).encode()


def _spelled(folded: bytes) -> bytes:
    """Words one space apart, the ends of sentences standing between them as words of their own."""
    return b" ".join(folded.translate(_TO_SENTENCES).replace(_SENTENCE_END, b" . ").split())


def _key(word: str) -> bytes:
    """A configured word as it is looked up: composed, folded and spelled as a text would be."""
    return _spelled(_fold(unicodedata.normalize("NFC", word)))
