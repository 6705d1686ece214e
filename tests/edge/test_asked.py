"""What is asked in JSON is decoded, or refused with the field that is wrong and in no word of a library."""

from typing import Annotated, Literal

import msgspec
import pytest
from msgspec import Meta

from gateway.domain.errors import Refused
from gateway.edge.asked import decoded, unavailable
from gateway.store.store import StoreError


class Wanted(msgspec.Struct, forbid_unknown_fields=True):
    who: str
    share: float = 0.0
    score: Annotated[float, Meta(ge=-1, le=1)] | None = None
    count: Annotated[int, Meta(ge=1)] = 1
    half: Annotated[float, Meta(gt=0, le=0.5)] = 0.5
    thumbs: Literal["up", "down"] | None = None
    name: Annotated[str, Meta(min_length=1, max_length=8)] = "-"
    note: Annotated[str, Meta(max_length=3)] = ""
    ids: list[Annotated[int, Meta(ge=0)]] = []


def test_what_is_in_order_is_decoded() -> None:
    assert decoded(b'{"who": "ann", "share": 1}', Wanted) == Wanted("ann", 1.0)


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        (b'{"share": 1}', "missing_field", "who"),
        (b'{"who": "ann", "size": 1}', "invalid_value", "size"),
        (b'{"who": 7}', "invalid_type", "who"),
        (b'{"who": "ann", "score": "1"}', "invalid_type", "score"),
        (b'{"who": "ann", "thumbs": 1}', "invalid_type", "thumbs"),
        (b'{"who": "ann", "ids": ["1"]}', "invalid_type", "ids"),
        (b'{"who": "ann", "count": 1.5}', "invalid_type", "count"),
        (b"[]", "invalid_type", None),
        (b"", "invalid_json", None),
        (b"{", "invalid_json", None),
        (b'{"who": "\xff"}', "invalid_json", None),
        (b'{"who": "ann"} {}', "invalid_json", None),
    ],
)
def test_what_is_not_says_which_field(body: bytes, code: str, param: str | None) -> None:
    with pytest.raises(Refused) as refused:
        decoded(body, Wanted)
    assert (refused.value.code, refused.value.param) == (code, param)
    assert "msgspec" not in refused.value.message


@pytest.mark.parametrize(
    ("field", "wanted"),
    [
        ('"score": 1.01', "score is -1 to 1"),
        ('"score": -2', "score is -1 to 1"),
        ('"score": 1e999', "score is -1 to 1"),
        ('"count": 0', "count is at least 1"),
        ('"thumbs": "sideways"', "thumbs is one of down, up"),
        ('"name": ""', "name has 1 to 8 characters"),
        ('"name": "nine more"', "name has 1 to 8 characters"),
        ('"note": "four"', "note has at most 3 characters"),
        # Bounds of other kinds are told in the decoder's words, which are true of them.
        ('"half": 0', "expected float > 0.0"),
        ('"half": 0.6', "expected float <= 0.5"),
        ('"ids": [-1]', "expected int >= 0"),
        ('"share": 1e999', "number out of range"),
    ],
)
def test_what_is_outside_its_range_is_told_the_range(field: str, wanted: str) -> None:
    with pytest.raises(Refused) as refused:
        decoded(f'{{"who": "ann", {field}}}'.encode(), Wanted)
    name = field.partition(":")[0].strip('"')
    assert (refused.value.code, refused.value.param, refused.value.message) == ("invalid_value", name, wanted)


@pytest.mark.parametrize("value", [0, 1, -1, 0.5])
def test_what_is_at_the_end_of_its_range_is_within(value: float) -> None:
    assert decoded(f'{{"who": "ann", "score": {value}}}'.encode(), Wanted).score == value


def test_a_value_that_sounds_like_another_complaint_is_not_taken_for_it() -> None:
    text = "Object missing required field `who`, got `null` - at `$.who`"
    with pytest.raises(Refused) as refused:
        decoded(msgspec.json.encode({"who": "ann", "thumbs": text}), Wanted)
    assert (refused.value.code, refused.value.param) == ("invalid_value", "thumbs")
    assert text not in refused.value.message


def test_a_store_out_of_order_is_a_refusal_that_says_so_and_may_be_tried_again() -> None:
    refused = unavailable(StoreError("the ledger at x cannot be used: it is locked"))
    assert (refused.code, refused.status, refused.headers) == ("budget_unavailable", 503, {"Retry-After": "1"})
    assert refused.message == "the ledger at x cannot be used: it is locked"
