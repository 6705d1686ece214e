"""No way of printing a secret prints it."""

import traceback

import msgspec
import pytest

from gateway.domain.secret import Secret

VALUE = "sk-live-0123456789"


@pytest.mark.parametrize(
    "show",
    [str, repr, format, ascii, lambda secret: f"{secret}", lambda secret: f"{secret!r:>10}",
     lambda secret: repr([secret]), lambda secret: repr({"key": secret}), lambda secret: str((secret,)),
     lambda secret: msgspec.json.encode({"key": secret}, enc_hook=str).decode()],
)  # fmt: skip
def test_no_way_of_printing_shows_the_value(show: object) -> None:
    assert callable(show)
    assert VALUE not in show(Secret(VALUE))
    assert "***" in show(Secret(VALUE))


def test_a_failed_comparison_does_not_show_it() -> None:
    held, other = Secret(VALUE), Secret("another")
    with pytest.raises(AssertionError) as caught:
        assert held == other
    assert VALUE not in "".join(traceback.format_exception(caught.value))


def test_a_struct_that_holds_one_does_not_show_it() -> None:
    class Holder(msgspec.Struct):
        key: Secret

    assert VALUE not in repr(Holder(key=Secret(VALUE)))


def test_only_reveal_gives_it() -> None:
    assert Secret(VALUE).reveal() == VALUE


def test_an_empty_one_says_that_it_is_empty() -> None:
    assert (bool(Secret("")), repr(Secret(""))) == (False, "(empty)")
    assert bool(Secret("x"))


def test_equality_is_of_values_and_never_with_plain_text() -> None:
    assert Secret("a") == Secret("a")
    assert len({Secret("a"), Secret("a"), Secret("b")}) == 2
    assert Secret("a") != "a"
