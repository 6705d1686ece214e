"""One alphabet for names and one for ids; nothing that could break a header, a label or a path gets through."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.domain.names import is_id, is_name


@pytest.mark.parametrize("text", ["qa_agent", "a", "A.b-c_1", "x" * 64])
def test_names(text: str) -> None:
    assert is_name(text)
    assert is_id(text)


@pytest.mark.parametrize("text", ["", "x" * 65, "a b", "a/b", "a:b", "a\n", "\na", "a\r\nx: y", "é", "a\x00", "٣"])
def test_no_names(text: str) -> None:
    assert not is_name(text)


@pytest.mark.parametrize("text", ["alice@example.com", "urn:uuid:7d44", "a/b", "u" * 128, "."])
def test_ids(text: str) -> None:
    assert is_id(text)


@pytest.mark.parametrize("text", ["", "u" * 129, "a b", "a\n", "a\r\n", "\t", "a,b", "a|b", "a;b", 'a"', "é", "\x7f"])
def test_no_ids(text: str) -> None:
    assert not is_id(text)


@given(st.text(max_size=20))
def test_whatever_passes_can_stand_in_a_header(text: str) -> None:
    if is_id(text) or is_name(text):
        assert text.isascii()
        assert text.isprintable()
        assert " " not in text


@given(st.text(max_size=70))
def test_every_name_is_an_id(text: str) -> None:
    assert is_id(text) or not is_name(text)
