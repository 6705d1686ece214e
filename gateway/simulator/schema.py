"""A value for a JSON schema: what the simulator answers for tools and structured output.

Not a validator. It knows what pydantic, zod and hand-written tool schemas use: types, enum, const, `$ref`,
`anyOf`, `oneOf`, `allOf`, nested objects and arrays, bounds on numbers, lengths and counts, common formats,
patterns. It does not know `not`, `if`, `dependent*`, `contains` and `patternProperties`.
Invariant: it ends; whatever the schema, it returns a value or raises `CannotSatisfy`.
"""

import math
from collections.abc import Sequence
from typing import Any
from urllib.parse import unquote

from gateway.simulator.pattern import text_for
from gateway.simulator.words import Dice

_NODES_MAX = 4_000  # Values in one document.
_DEPTH_MAX = 40
_GENEROUS_DEPTH, _GENEROUS_NODES = 6, 400
_ITEMS_MAX = 1_000
_CHARS_MAX = 10_000

_FORMATS = {
    "date": "2026-03-14",
    "date-time": "2026-03-14T09:26:53Z",
    "time": "09:26:53Z",
    "duration": "P1D",
    "email": "alex@example.com",
    "hostname": "example.com",
    "ipv4": "192.0.2.1",
    "ipv6": "2001:db8::1",
    "uri": "https://example.com/",
    "uuid": "6f9619ff-8b86-4011-b42d-00c04fc964ff",
}
_NAMED = {
    "city": "Paris",
    "country": "France",
    "currency": "EUR",
    "date": "2026-03-14",
    "email": "alex@example.com",
    "language": "English",
    "phone": "+15550100",
    "time": "09:26",
    "url": "https://example.com/",
}


class CannotSatisfy(ValueError):
    """No value was found: the schema is malformed, contradictory, endless or too large."""


def sample(schema: Any, dice: Dice, words: Sequence[str] = ()) -> Any:
    """A JSON value valid against the schema, its strings taken from `words` where they fit."""
    try:
        return _Sampler(schema, dice, list(words) or ["example"]).value(schema, "", 0)
    except CannotSatisfy:
        raise
    except (TypeError, AttributeError, LookupError, ArithmeticError, ValueError) as error:
        # A keyword of the wrong type ("minimum": "three") surfaces where it is used: the caller's mistake.
        raise CannotSatisfy(f"malformed schema: {error}") from error


class _Sampler:
    def __init__(self, root: Any, dice: Dice, words: list[str]) -> None:
        self.root, self.dice, self.words, self.nodes = root, dice, words, 0

    def value(self, schema: Any, name: str, depth: int) -> Any:
        self.nodes += 1
        if self.nodes > _NODES_MAX or depth > _DEPTH_MAX:
            raise CannotSatisfy("the schema has no end or is too large")
        if schema is True:
            schema = {}
        if not isinstance(schema, dict):
            raise CannotSatisfy("a schema must be an object")
        schema = self._flat(schema, 0)
        if "const" in schema:
            return schema["const"]
        if "enum" in schema:
            if not schema["enum"]:
                raise CannotSatisfy("an enum has no values")
            return self.dice.pick(schema["enum"])
        for keyword in ("anyOf", "oneOf"):
            if keyword in schema:
                rest = {key: value for key, value in schema.items() if key != keyword}
                return self._first([_merged(rest, _checked(option)) for option in schema[keyword]], name, depth)
        kind = schema.get("type") or _implied_type(schema)
        if isinstance(kind, list):
            return self._first([{**schema, "type": one} for one in kind], name, depth)
        return self._typed(kind, schema, name, depth)

    def _typed(self, kind: str, schema: dict[str, Any], name: str, depth: int) -> Any:
        match kind:
            case "object":
                return self._object(schema, depth)
            case "array":
                return self._array(schema, name, depth)
            case "string":
                return self._string(schema, name)
            case "integer":
                return self._integer(schema)
            case "number":
                return self._number(schema)
            case "boolean":
                return self.dice.between(0, 1) == 1
            case "null":
                return None
        raise CannotSatisfy(f"unknown type {kind!r}")

    def _flat(self, schema: dict[str, Any], depth: int) -> dict[str, Any]:
        """The schema with `$ref` followed and `allOf` merged into it."""
        while "$ref" in schema or "allOf" in schema:
            self.nodes += 1
            if self.nodes > _NODES_MAX or depth > _DEPTH_MAX:
                raise CannotSatisfy("the references go in a circle")
            if "$ref" in schema:
                rest = {key: value for key, value in schema.items() if key != "$ref"}
                schema = _merged(self._target(schema["$ref"]), rest)
                continue
            parts = schema["allOf"]
            schema = {key: value for key, value in schema.items() if key != "allOf"}
            for part in parts:
                schema = _merged(schema, self._flat(_checked(part), depth + 1))
        return schema

    def _is_generous(self, depth: int) -> bool:
        """Whether there is room for what is optional; without a limit a recursive schema would never end."""
        return depth < _GENEROUS_DEPTH and self.nodes < _GENEROUS_NODES

    def _target(self, reference: Any) -> dict[str, Any]:
        if not isinstance(reference, str) or not reference.startswith("#"):
            raise CannotSatisfy(f"only references inside the schema are followed, not {reference!r}")
        found: Any = self.root
        for step in reference.removeprefix("#").split("/")[1:]:
            key = unquote(step).replace("~1", "/").replace("~0", "~")
            try:
                found = found[int(key)] if isinstance(found, list) else found[key]
            except (LookupError, TypeError, ValueError):
                raise CannotSatisfy(f"nothing at {reference!r}") from None
        return _checked(found)

    def _first(self, options: list[Any], name: str, depth: int) -> Any:
        """The first option that works: something rather than null, but the plainest once it gets deep."""
        if not self._is_generous(depth):
            options = sorted(options, key=_weight)
        else:
            options = sorted(options, key=lambda option: option.get("type") == "null")
        for option in options:
            try:
                return self.value(option, name, depth + 1)
            except CannotSatisfy:
                continue
        raise CannotSatisfy("no alternative can be met")

    def _object(self, schema: dict[str, Any], depth: int) -> dict[str, Any]:
        properties: dict[str, Any] = schema.get("properties") or {}
        required: list[str] = schema.get("required") or []
        extra = schema.get("additionalProperties", True)
        least, most = schema.get("minProperties", 0), schema.get("maxProperties", _ITEMS_MAX)
        out: dict[str, Any] = {}
        for key in dict.fromkeys([*properties, *required]):
            needed = key in required
            if not needed and (not self._is_generous(depth) or self.dice.fraction() < 0.5) and len(properties) > least:
                continue
            if not needed and len(out) >= most - len(required):
                continue
            try:
                out[key] = self.value(properties.get(key, extra), key, depth + 1)
            except CannotSatisfy:
                if needed:
                    raise
        wanted = max(least, 1 if isinstance(extra, dict) and not properties and self._is_generous(depth) else 0)
        for key in [*self.words, *(f"key{number}" for number in range(1, min(wanted, _ITEMS_MAX) + 1))]:
            if len(out) >= wanted or extra is False:
                break
            if key not in properties:
                out[key] = self.value(extra, key, depth + 1)
        if len(out) < least or len(out) > most:
            raise CannotSatisfy("no object has so many properties")
        return out

    def _array(self, schema: dict[str, Any], name: str, depth: int) -> list[Any]:
        least, most = schema.get("minItems", 0), schema.get("maxItems", _ITEMS_MAX)
        leading, items = schema.get("prefixItems") or [], schema.get("items", True)
        if least > min(most, _ITEMS_MAX):
            raise CannotSatisfy(f"an array of at least {least} items")
        if not self._is_generous(depth):
            count = max(least, 0)
        else:
            count = min(most, max(least, len(leading), self.dice.between(1, 3) if items is not False else 0))
        out: list[Any] = []
        for attempt in range(count * 8):  # More tries than items, for `uniqueItems`.
            if len(out) == count:
                break
            try:
                item = self.value(leading[len(out)] if len(out) < len(leading) else items, name, depth + 1)
            except CannotSatisfy:
                if len(out) >= least:
                    break
                raise
            if not schema.get("uniqueItems") or item not in out:
                out.append(item)
            elif isinstance(item, str) and attempt > count * 4 and items in (True, {}, {"type": "string"}):
                out.append(f"{item} {len(out) + 1}")
        if len(out) < least:
            raise CannotSatisfy(f"no {least} different items")
        return out

    def _string(self, schema: dict[str, Any], name: str) -> str:
        least, most = schema.get("minLength", 0), schema.get("maxLength", _CHARS_MAX)
        if least > min(most, _CHARS_MAX):
            raise CannotSatisfy(f"a string of at least {least} characters")
        if schema.get("format") in _FORMATS:
            return _FORMATS[schema["format"]]
        if "pattern" in schema:
            text = text_for(schema["pattern"], least=least, most=most, words=[self.dice.pick(self.words)])
            if text is None:
                raise CannotSatisfy(f"the simulator knows no text that matches {schema['pattern']!r}")
            return text
        named = next((text for word, text in _NAMED.items() if word in name.lower().split("_")), None)
        text = named or self.dice.pick(self.words)
        while len(text) < least:
            text = f"{text} {self.dice.pick(self.words)}"
        return text[: int(most)]

    def _integer(self, schema: dict[str, Any]) -> int:
        step = schema.get("multipleOf", 1)
        step = int(step) if float(step).is_integer() else 1
        low, high = _bounds(schema, whole=True)
        first = math.ceil(low / step)
        last = math.floor(high / step)
        if first > last:
            raise CannotSatisfy("no whole number lies between the bounds")
        return self.dice.between(first, last) * step

    def _number(self, schema: dict[str, Any]) -> float:
        if "multipleOf" in schema and float(schema["multipleOf"]).is_integer():
            return self._integer(schema)
        low, high = _bounds(schema, whole=False)
        if step := schema.get("multipleOf"):
            first, last = math.ceil(low / step), math.floor(high / step)
            if first > last:
                raise CannotSatisfy("no multiple lies between the bounds")
            return round(self.dice.between(first, last) * float(step), 9)
        for value in (round(low + (high - low) * self.dice.fraction(), 2), (low + high) / 2, low):
            if _is_within(value, schema):
                return value
        raise CannotSatisfy("no number lies between the bounds")


def _merged(base: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """Both schemas at once; on a clash of single keywords, the later one counts."""
    both = {**base, **more}
    if "properties" in base and "properties" in more:
        both["properties"] = {**base["properties"], **more["properties"]}
    if "required" in base and "required" in more:
        both["required"] = [*base["required"], *more["required"]]
    return both


def _checked(schema: Any) -> dict[str, Any]:
    if schema is True:
        return {}
    if not isinstance(schema, dict):
        raise CannotSatisfy("a schema must be an object")
    return schema


def _weight(option: dict[str, Any]) -> int:
    """How likely an alternative is to lead deeper: null, plain values, arrays, objects and references."""
    if option.get("type") == "null":
        return 0
    if "$ref" in option or option.get("type") == "object":
        return 3
    return 2 if option.get("type") == "array" else 1


def _implied_type(schema: dict[str, Any]) -> str:
    if schema.keys() & {"properties", "required", "additionalProperties", "minProperties"}:
        return "object"
    if schema.keys() & {"items", "prefixItems", "minItems", "maxItems"}:
        return "array"
    if schema.keys() & {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}:
        return "number"
    return "string"


def _bounds(schema: dict[str, Any], *, whole: bool) -> tuple[float, float]:
    """The range to draw from; an open end lies a hundred (steps) from the other."""
    lows = [schema["minimum"]] if "minimum" in schema else []
    highs = [schema["maximum"]] if "maximum" in schema else []
    if "exclusiveMinimum" in schema:
        lows.append(math.floor(schema["exclusiveMinimum"]) + 1 if whole else schema["exclusiveMinimum"])
    if "exclusiveMaximum" in schema:
        highs.append(math.ceil(schema["exclusiveMaximum"]) - 1 if whole else schema["exclusiveMaximum"])
    span = 100 * max(schema.get("multipleOf", 1), 1)
    if lows:
        return max(lows), min(highs, default=max(lows) + span)
    if highs:
        return min(0, min(highs) - (span if min(highs) <= 0 else 0)), min(highs)
    return 1, span


def _is_within(value: float, schema: dict[str, Any]) -> bool:
    low, high = schema.get("minimum", -math.inf), schema.get("maximum", math.inf)
    above, below = schema.get("exclusiveMinimum", -math.inf), schema.get("exclusiveMaximum", math.inf)
    return bool(low <= value <= high and above < value < below)
