"""A value for a JSON schema: a second validator agrees, recursion ends, and nonsense is refused."""

import enum
from datetime import date
from decimal import Decimal
from typing import Annotated, Any, Literal

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field

from gateway.simulator.schema import CannotSatisfy, sample
from gateway.simulator.words import Dice

WORDS = ["Paris", "refund", "invoice"]


def samples(schema: Any, count: int = 12) -> list[Any]:
    values = [sample(schema, Dice(number), WORDS) for number in range(count)]
    for value in values:
        jsonschema.Draft202012Validator(schema).validate(value)
    return values


NULL: Any = {"type": "null"}
INTEGER: Any = {"type": "integer"}


class Colour(enum.StrEnum):
    RED = "red"
    BLUE = "blue"


class Step(BaseModel):
    model_config = ConfigDict(extra="forbid")
    explanation: str = Field(min_length=3, max_length=40)
    weight: float = Field(ge=0, lt=1)


class Tree(BaseModel):
    name: str
    children: list["Tree"]
    parent: "Tree | None"


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: int = Field(ge=1, le=9)


class Dog(BaseModel):
    kind: Literal["dog"]
    tricks: list[str] = Field(min_length=2, max_length=4)


class Everything(BaseModel):
    model_config = ConfigDict(extra="forbid")
    steps: list[Step] = Field(min_length=1, max_length=3)
    colour: Colour
    note: str | None
    count: int = Field(gt=10, le=12)
    even: int = Field(multiple_of=2, ge=3, le=9)
    price: Decimal
    due: date
    tree: Tree
    pet: Annotated[Cat | Dog, Field(discriminator="kind")]
    pair: tuple[int, str]
    tags: set[Literal["a", "b", "c"]]
    scores: dict[str, int]
    order: str = Field(pattern=r"^ORD-\d{6}$")
    optional: str = "x"


def test_what_pydantic_describes_is_given_as_it_describes_it() -> None:
    for value in samples(Everything.model_json_schema()):
        Everything.model_validate(value)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "integer", "minimum": 5, "maximum": 5},
        {"type": "integer", "exclusiveMinimum": -3, "exclusiveMaximum": 0},
        {"type": "integer", "maximum": -500},
        {"type": "integer", "multipleOf": 7, "minimum": 20},
        {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 0.001},
        {"type": "number", "minimum": 0.25, "multipleOf": 0.25, "maximum": 1},
        {"type": "number"},
        {"type": ["null", "string"]},
        {"enum": [None, 3, {"a": 1}]},
        {"const": [1, 2]},
        {"type": "string", "minLength": 50, "maxLength": 60},
        {"type": "string", "maxLength": 2},
        {"type": "array", "items": {"type": "integer"}, "minItems": 5, "maxItems": 5},
        {"type": "array", "items": {"enum": [1, 2, 3]}, "minItems": 3, "uniqueItems": True},
        {"type": "array", "prefixItems": [INTEGER, NULL], "items": False, "minItems": 2},
        {"type": "array", "maxItems": 0},
        {"type": "array", "items": {"type": "string"}, "minItems": 7, "uniqueItems": True},
        {"type": "number", "multipleOf": 5, "minimum": 3},
        {"type": "number", "minimum": 0.001, "maximum": 0.001},
        {"anyOf": [True, NULL]},
        {
            "allOf": [{"properties": {"a": NULL}, "required": ["a"]}],
            "properties": {"b": INTEGER},
            "required": ["b"],
        },
        {"type": "object", "additionalProperties": {"type": "boolean"}, "minProperties": 5},
        {"type": "object", "properties": {"a": NULL, "b": NULL}, "minProperties": 2},
        {"type": "object", "properties": {"a": {}, "b": {}, "c": {}}, "required": ["c"], "maxProperties": 1},
        {"type": "object", "required": ["undeclared"]},
        {"allOf": [{"$ref": "#/$defs/a"}, {"required": ["x"]}], "$defs": {"a": {"properties": {"x": NULL}}}},
        {"oneOf": [NULL, {"type": "object", "properties": {"a": INTEGER}, "required": ["a"]}]},
        {"$ref": "#/definitions/x~1y", "definitions": {"x/y": NULL}},
        {},
        True,
    ],
)  # fmt: skip
def test_every_keyword_it_knows_is_kept(schema: Any) -> None:
    samples(schema)


def test_something_is_preferred_to_null() -> None:
    assert all(value is not None for value in samples({"anyOf": [{"type": "null"}, {"type": "integer"}]}))


def test_strings_come_from_the_conversation_or_suit_their_name() -> None:
    schema = {
        "properties": {"topic": {"type": "string"}, "email": {"type": "string"}},
        "required": ["topic", "email"],
    }
    for value in samples(schema):
        assert value["topic"] in WORDS
        assert value["email"] == "alex@example.com"


def test_the_same_dice_give_the_same_document() -> None:
    schema = Everything.model_json_schema()
    assert sample(schema, Dice(3), WORDS) == sample(schema, Dice(3), WORDS)


def test_recursion_ends_where_the_schema_lets_it() -> None:
    grows_wide = {
        "type": "object",
        "properties": {f"child{number}": {"type": "array", "items": {"$ref": "#"}} for number in range(6)},
        "required": [f"child{number}" for number in range(6)],
        "additionalProperties": False,
    }
    samples(grows_wide, 3)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {"next": {"$ref": "#"}}, "required": ["next"]},
        {"$ref": "#"},
        {"allOf": [{"$ref": "#"}]},
        {"$ref": "#/nowhere"},
        {"$ref": "https://example.com/schema.json"},
        {"$ref": 3},
        {"enum": []},
        {"type": "integer", "minimum": 3, "maximum": 2},
        {"type": "integer", "minimum": 1, "maximum": 4, "multipleOf": 5},
        {"type": "integer", "multipleOf": 0},
        {"type": "integer", "minimum": "three"},
        {"type": "number", "minimum": 3, "maximum": 2},
        {"type": "number", "minimum": 0.1, "maximum": 0.2, "multipleOf": 0.25},
        {"type": "array", "minItems": 10**9},
        {"type": "array", "items": {"type": "no"}, "minItems": 1},
        {"type": "array", "items": {"enum": [1]}, "minItems": 2, "uniqueItems": True},
        {"type": "string", "minLength": 10**9},
        {"type": "string", "minLength": 3, "maxLength": 2},
        {"type": "string", "pattern": "^(?=a)b"},
        {"type": "object", "minProperties": 3, "additionalProperties": False},
        {"type": "decimal"},
        {"anyOf": [False, {"type": "nothing"}]},
        {"properties": [1], "required": ["a"]},
        False,
        "string",
        None,
    ],
)
def test_what_cannot_be_met_is_refused(schema: Any) -> None:
    with pytest.raises(CannotSatisfy):
        sample(schema, Dice(1), WORDS)


_KEYWORDS = """
    type properties required items enum $ref anyOf allOf minimum maximum minItems maxItems uniqueItems
    multipleOf pattern additionalProperties minLength prefixItems minProperties format
"""
_LEAVES = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False)
    | st.sampled_from(["object", "array", "string", "integer", "number", "#", "a"])
)  # fmt: skip
_JSON = st.recursive(
    _LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(_KEYWORDS.split()), inner, max_size=4),
)


@given(st.dictionaries(st.sampled_from(_KEYWORDS.split()), _JSON, max_size=5))
def test_any_schema_gives_a_value_or_a_refusal(schema: Any) -> None:
    try:
        sample(schema, Dice(1), WORDS)
    except CannotSatisfy:
        return
