"""A text for a regular expression: what the simulator puts where a JSON schema has a `pattern`.

Not a matcher: the result is checked by RE2, which takes linear time whatever a caller sends. Literals,
classes, groups, the first of several alternatives and counts are written out; look-around and
back-references are not.
Invariant: a text that is returned matches.
"""

from collections.abc import Callable
from typing import Any

CHARS_MAX = 4_000

_SHORTHANDS = {"d": "4", "w": "k", "s": " ", "D": "x", "W": "-", "S": "k", "t": "\t", "n": "\n", "r": "\r"}
_ORDINARY = "k4KA-_ .x0Z/"
"""What stands for `.` comes first; the rest is tried in turn for a class such as `[^a-z]`."""


def text_for(pattern: str, *, least: int, most: int, words: list[str]) -> str | None:
    """A text of `least` to `most` characters in which the pattern is found, if possible one of `words`."""
    found = _search(pattern)
    if found is None:
        return None
    for word in words:
        if least <= len(word) <= most and found(word):
            return word
    # Where the pattern leaves a count open: as few as it allows, then more, then what the length asks for.
    for repeats in (0, 1, 3, 8, min(least, CHARS_MAX)):
        try:
            text = _Writer(pattern, repeats).alternatives()
        except (IndexError, ValueError, RecursionError):
            return None
        for candidate in (text, text.ljust(least, "k")):
            if least <= len(candidate) <= most and found(candidate):
                return candidate
    return None


def _search(pattern: str) -> Callable[[str], Any] | None:
    import re2

    options = re2.Options()
    options.log_errors = False
    options.max_mem = 1 << 20
    try:
        compiled = re2.compile(pattern, options)
    except re2.error:
        return None
    search: Callable[[str], Any] = compiled.search
    return search


class _Writer:
    """Reads a pattern from left to right and writes one text for it."""

    def __init__(self, pattern: str, repeats: int) -> None:
        self.pattern, self.repeats, self.at = pattern, repeats, 0

    def alternatives(self) -> str:
        first = self._sequence()
        while self._takes("|"):
            self._sequence()
        return first

    def _sequence(self) -> str:
        out = ""
        while self.at < len(self.pattern) and self.pattern[self.at] not in "|)":
            out += self._counted(self._atom())
            if len(out) > CHARS_MAX:
                raise ValueError("too long")
        return out

    def _atom(self) -> str:
        sign = self._next()
        match sign:
            case "^" | "$":
                return ""
            case ".":
                return _ORDINARY[0]
            case "\\":
                return self._escape()
            case "[":
                return self._class()
            case "(":
                if self._takes("?"):
                    self._group_kind()
                inside = self.alternatives()
                if not self._takes(")"):
                    raise ValueError("a group is not closed")
                return inside
        return sign

    def _group_kind(self) -> None:
        if self._takes(":"):
            return
        self._takes("P")
        if not self._takes("<") or self.pattern[self.at] in "=!":
            raise ValueError("look-around or flags")
        while self._next() != ">":
            pass

    def _escape(self) -> str:
        sign = self._next()
        if sign in "bBAzZ":
            return ""
        if sign not in _SHORTHANDS and sign.isalnum():
            raise ValueError(f"\\{sign} is not known")
        return _SHORTHANDS.get(sign, sign)

    def _class(self) -> str:
        start = self.at
        self._takes("^")
        self._takes("]")
        while (sign := self._next()) != "]":
            if sign == "\\":
                self._next()
            elif sign == "[" and self._takes(":"):
                self.at = self.pattern.index(":]", self.at) + 2
        inside = self.pattern[start : self.at - 1]
        is_one = _search(f"^[{inside}]$")
        # Its own first character comes first: `[A-Z]` gives an A, `[^@]` something ordinary.
        candidates: list[str] = [inside[:1], *_ORDINARY, inside[-1:], *map(chr, range(33, 127))]
        for tried in candidates:
            if tried and is_one is not None and is_one(tried):
                return tried
        raise ValueError("an empty class")

    def _counted(self, atom: str) -> str:
        low, high = 1, 1
        if self._takes("*"):
            low, high = 0, CHARS_MAX
        elif self._takes("+"):
            low, high = 1, CHARS_MAX
        elif self._takes("?"):
            low, high = 0, 1
        elif self._takes("{"):
            end = self.pattern.index("}", self.at)
            first, comma, last = self.pattern[self.at : end].partition(",")
            self.at = end + 1
            low = int(first)
            high = int(last) if last else CHARS_MAX if comma else low
        else:
            return atom
        self._takes("?")
        return atom * min(max(low, self.repeats), high, CHARS_MAX)

    def _next(self) -> str:
        self.at += 1
        return self.pattern[self.at - 1]

    def _takes(self, sign: str) -> bool:
        if self.pattern[self.at : self.at + 1] != sign:
            return False
        self.at += 1
        return True
