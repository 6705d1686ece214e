"""The typed shape of policies/routing.toml, and the checks its types cannot make.

It says what a rule may state, not which rule holds for a request: that is decide/route.py. Nothing is read
from disk here; the loader decodes the file into `Routing` and hands over the names of the configured agents.

Invariant: a `Routing` in which `check_routing` finds nothing can be compiled, and all agents it names exist.
"""

import re
import unicodedata
from collections.abc import Collection, Iterator
from typing import Protocol, cast

import msgspec

from gateway.domain.names import NAME, is_name
from gateway.domain.reading import Problem, nearest, shown

DEFAULT_RULE = "default"
"""The name a decision carries when no rule held; no rule may take it."""

WEEKDAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")

MAX_RULES = 500
MAX_PATTERN_CHARS = 2_000
MAX_WHY_CHARS = 200
MAX_LOOK_BACK = 100
PATTERN_MAX_MEM = 1 << 20
"""Bytes RE2 may spend on one pattern, its program and its state cache together. Over it the search goes on
without the cache, slower but still linear; a pattern whose program alone does not fit is refused."""

_HEADER_NAME = re.compile(r"[a-z0-9!#$%&'*+.^_`|~-]+")
_HOURS = re.compile(r"([01][0-9]|2[0-3]):([0-5][0-9])-(?:([01][0-9]|2[0-3]):([0-5][0-9])|(24):(00))")

_WORD = "a word or phrase on one line, a letter or digit at both ends; for signs (C++, .net) use a pattern"
_NEVER = "so the rule could never hold"


class Rule(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """One line of reasoning: when every condition it states holds, `agent` gets the request.

    A condition left at its default is not stated. `why` is the plain sentence callers are shown.
    """

    name: str
    agent: str
    why: str
    priority: int = 0
    """Higher is asked first; among equals, the one that stands first in the file. Below 0: only when no other
    rule holds for any message."""
    any_word: list[str] = []
    """At least one of these words or phrases stands in the text; whole words, whatever their case."""
    all_words: list[str] = []
    not_word: list[str] = []
    pattern: str = ""
    """RE2 syntax, case-insensitive (`(?-i)` undoes it); `.` also matches a line break."""
    metadata: dict[str, str] = {}
    headers: dict[str, str] = {}
    """Lower-case names; the value "*" asks only that the header be there."""
    tools: bool | None = None
    any_tool: list[str] = []
    min_chars: int | None = None
    max_chars: int | None = None
    """Size of the whole prompt in characters, all messages together; both ends included."""
    hours_utc: str = ""
    """Such as "08:00-18:00": from the first minute up to, not including, the last; may wrap midnight."""
    weekdays: list[str] = []
    """mon..sun in UTC, of the moment of the request (also where hours wrap midnight)."""


class Routing(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """The rules for `model: "auto"`, and who answers when none holds."""

    default_agent: str
    rules: list[Rule] = []
    look_back: int = 4
    """How many user messages before the last one may be asked when the last one says nothing."""
    look_at_system: bool = True
    """Whether the system prompt is asked when no user message said anything."""


class Pattern(Protocol):
    """What is used of a compiled RE2 pattern."""

    def search(self, text: bytes) -> object | None: ...


def compile_pattern(pattern: str) -> Pattern:
    """A pattern that takes time linear in the text. Raises `ValueError` with RE2's own reason.

    RE2 is imported here, at the first rule with a pattern: 8 ms and 3 MB that a policy of words need not pay.
    """
    import re2

    options = re2.Options()
    options.case_sensitive = False
    options.dot_nl = True
    options.never_capture = True
    options.log_errors = False
    options.max_mem = PATTERN_MAX_MEM
    try:
        return cast(Pattern, re2.compile(pattern.encode("utf-8", "replace"), options))
    except re2.error as error:
        reason = error.args[0] if error.args else "not a pattern"
        text = reason.decode("utf-8", "replace") if isinstance(reason, bytes) else str(reason)
        raise ValueError(text) from None


def hours_as_minutes(hours_utc: str) -> tuple[int, int]:
    """("08:00-18:00") -> (480, 1080), minutes of the day. Raises `ValueError` where it is not such a span."""
    found = _HOURS.fullmatch(hours_utc)
    if found is None:
        raise ValueError('write "HH:MM-HH:MM" in UTC, for example "08:00-18:00" or "22:00-06:00"')
    start_h, start_m, *end = [int(part) for part in found.groups() if part is not None]
    start, stop = start_h * 60 + start_m, end[0] * 60 + end[1]
    if start == stop:
        raise ValueError('start and end are the same minute; for the whole day write "00:00-24:00"')
    return start, stop


def check_routing(routing: Routing, agents: Collection[str]) -> list[Problem]:
    """Everything that is wrong with the rules, in file order; empty when they can be compiled."""
    found = [*_check_agent("default_agent", routing.default_agent, agents)]
    if not 0 <= routing.look_back <= MAX_LOOK_BACK:
        found.append(_problem("look_back", routing.look_back, f"a number from 0 to {MAX_LOOK_BACK}"))
    if len(routing.rules) > MAX_RULES:
        found.append(_problem("rules", len(routing.rules), f"at most {MAX_RULES} rules"))
    first_with: dict[str, int] = {}
    for index, rule in enumerate(routing.rules):
        key = f"rules[{index}]"
        found += _check_name(f"{key}.name", rule.name, first_with.setdefault(rule.name, index), index)
        found += _check_agent(f"{key}.agent", rule.agent, agents)
        found += _check_why(f"{key}.why", rule.why)
        if not _states_a_condition(rule):
            fix = "states no condition; who gets everything else is said by default_agent"
            found.append(_problem(key, rule.name, fix))
        found += _check_words(key, rule)
        found += _check_pattern(f"{key}.pattern", rule.pattern)
        found += _check_request(key, rule)
        found += _check_times(key, rule)
    return found


def _states_a_condition(rule: Rule) -> bool:
    stated = (rule.any_word, rule.all_words, rule.not_word, rule.pattern, rule.metadata, rule.headers,
              rule.any_tool, rule.hours_utc, rule.weekdays)  # fmt: skip
    sizes_and_tools = (rule.tools, rule.min_chars, rule.max_chars)
    return any(stated) or any(value is not None for value in sizes_and_tools)


def _check_name(key: str, name: str, first: int, index: int) -> Iterator[Problem]:
    if not is_name(name):
        yield _problem(key, name, f"not a name; allowed: {NAME}")
    elif name == DEFAULT_RULE:
        yield _problem(key, name, "is reserved: it stands for the case that no rule held")
    elif first != index:
        yield _problem(key, name, f"already the name of rules[{first}]; choose another")


def _check_agent(key: str, agent: str, agents: Collection[str]) -> Iterator[Problem]:
    if agent not in agents:
        known = ", ".join(sorted(agents)) or "none is configured"
        yield _problem(key, agent, f"no such agent; known: {known}{nearest(agent, agents)}")


def _check_why(key: str, why: str) -> Iterator[Problem]:
    if not why.strip():
        yield _problem(key, why, "say in a few words why such a request belongs to this agent")
    elif len(why) > MAX_WHY_CHARS:
        yield _problem(key, why, f"{len(why)} characters; at most {MAX_WHY_CHARS}")
    elif not why.isprintable():
        yield _problem(key, why, "one line without control characters: callers are shown it")


def _check_words(key: str, rule: Rule) -> Iterator[Problem]:
    for field in ("any_word", "all_words", "not_word"):
        for index, word in enumerate(getattr(rule, field)):
            here = f"{key}.{field}[{index}]"
            if not _is_word(word):
                yield _problem(here, word, _WORD)
            elif field == "not_word" and word in rule.all_words:
                yield _problem(here, word, f"stands in all_words too, {_NEVER}")


def _is_word(word: str) -> bool:
    if not word or not word.isprintable():
        return False
    return _is_letter(word[0]) and _is_letter(word[-1]) and any(char.isalnum() for char in word)


def _is_letter(char: str) -> bool:
    """Letters and digits, and the marks that scripts like Devanagari write after a letter."""
    return char.isalnum() or unicodedata.category(char).startswith("M")


def _check_pattern(key: str, pattern: str) -> Iterator[Problem]:
    if not pattern:
        return
    if len(pattern) > MAX_PATTERN_CHARS:
        yield _problem(key, pattern, f"{len(pattern)} characters; at most {MAX_PATTERN_CHARS} allowed")
        return
    try:
        compiled = compile_pattern(pattern)
    except ValueError as error:
        yield _problem(key, pattern, f"not RE2 syntax, which has no look-around or back-references: {error}")
        return
    if compiled.search(b"") is not None:
        yield _problem(key, pattern, "matches the empty text, so it would hold for every request")


def _check_request(key: str, rule: Rule) -> Iterator[Problem]:
    for name in rule.headers:
        if not _HEADER_NAME.fullmatch(name):
            yield _problem(f"{key}.headers", name, "not a header's name in lower case")
    if "" in rule.metadata:
        yield _problem(f"{key}.metadata", "", "a metadata key that is not empty")
    for index, tool in enumerate(rule.any_tool):
        if not tool or not tool.isprintable():
            yield _problem(f"{key}.any_tool[{index}]", tool, "not the name of a function")
    if rule.any_tool and rule.tools is False:
        yield _problem(f"{key}.tools", rule.tools, f"any_tool asks for a tool, {_NEVER}")
    least, most = rule.min_chars, rule.max_chars
    for field, value in (("min_chars", least), ("max_chars", most)):
        if value is not None and value < 0:
            yield _problem(f"{key}.{field}", value, "a number of characters, 0 or more")
    if least is not None and most is not None and least > most:
        yield _problem(f"{key}.max_chars", most, f"less than min_chars ({least}), {_NEVER}")


def _check_times(key: str, rule: Rule) -> Iterator[Problem]:
    if rule.hours_utc:
        try:
            hours_as_minutes(rule.hours_utc)
        except ValueError as error:
            yield _problem(f"{key}.hours_utc", rule.hours_utc, str(error))
    for index, day in enumerate(rule.weekdays):
        if day not in WEEKDAYS:
            fix = f"not one of {', '.join(WEEKDAYS)}{nearest(day[:3].lower(), WEEKDAYS)}"
            yield _problem(f"{key}.weekdays[{index}]", day, fix)


def _problem(key: str, found: object, fix: str) -> Problem:
    return Problem(key=key, found=shown(found), fix=fix)
