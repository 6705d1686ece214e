"""Model cards as providers send them, and as they should not."""

from datetime import datetime
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.domain.model_card import ModelCard, read_card, read_cards
from gateway.domain.spans import format_time

OPENAI: dict[str, Any] = {"id": "gpt-4o", "object": "model", "created": 1, "owned_by": "system"}
MISTRAL = {**OPENAI, "id": "open-mistral-7b", "type": "base", "capabilities": {}, "deprecation": "2026-12-31T00:00:00Z"}
DEC_31_S = 1_798_675_200.0


def card(**fields: Any) -> ModelCard | None:
    return read_card(msgspec.json.encode({**OPENAI, **fields}))


def test_a_card_without_an_end_is_a_model_that_is_there() -> None:
    assert card() == ModelCard("gpt-4o")
    assert card(deprecation=None, archived=False, deprecation_replacement_model=None) == ModelCard("gpt-4o")


@pytest.mark.parametrize(
    "written", ["2026-12-31T00:00:00Z", "2026-12-31T00:00:00", "2026-12-31", "2026-12-31T02:00:00+02:00"]
)
def test_a_date_of_deprecation_is_an_instant_however_it_is_written(written: str) -> None:
    assert card(deprecation=written) == ModelCard("gpt-4o", retires_s=DEC_31_S)


@pytest.mark.parametrize("nonsense", ["soon", "", 20261231, True, [], {}, "2026-13-01"])
def test_a_date_that_is_none_is_no_end(nonsense: Any) -> None:
    assert card(deprecation=nonsense) == ModelCard("gpt-4o")


@pytest.mark.parametrize(
    "far",
    ["9999-12-31T23:59:59-08:00", "9999-12-31", "9001-01-01", "0001-01-01T00:00:00+14:00", "0001-01-01", "1969-12-31"],
)
def test_a_date_that_nobody_can_have_meant_is_no_end(far: str) -> None:
    assert card(deprecation=far) == ModelCard("gpt-4o")


@given(st.datetimes(timezones=st.none() | st.timezones()))
def test_every_end_that_is_told_can_be_written(at: datetime) -> None:
    found = card(deprecation=at.isoformat())
    assert found is not None
    if found.retires_s is not None:
        assert format_time(round(found.retires_s * 1000)).endswith("Z")


def test_only_true_is_archived() -> None:
    assert card(archived=True) == ModelCard("gpt-4o", is_archived=True)
    assert card(archived="false") == ModelCard("gpt-4o")


def test_a_replacement_is_no_longer_than_a_name() -> None:
    found = card(deprecation_replacement_model="x" * 10_000)
    assert found is not None
    assert len(found.replacement) == 100


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b"{}", b'{"id": 7}', b'{"id": ""}', b"[" * 100_000, b"\xff"])
def test_what_has_no_id_is_no_card(body: bytes) -> None:
    assert read_card(body) is None


def test_a_list_is_read_by_id_with_or_without_its_wrapping() -> None:
    for listed in ({"object": "list", "data": [OPENAI, MISTRAL, "?"]}, [OPENAI, MISTRAL]):
        assert read_cards(msgspec.json.encode(listed)) == {
            "gpt-4o": ModelCard("gpt-4o"),
            "open-mistral-7b": ModelCard("open-mistral-7b", retires_s=DEC_31_S),
        }


@pytest.mark.parametrize("body", [b"<html>", b"{}", b'{"data": {}}', b'{"error": {}}', b"7"])
def test_what_lists_nothing_is_no_list(body: bytes) -> None:
    assert read_cards(body) is None


_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["id", "deprecation", "archived", "data"]), inner),
)


@given(_JSON)
def test_no_answer_upsets_the_reader(answer: Any) -> None:
    body = msgspec.json.encode(answer)
    read_card(body)
    read_cards(body)
