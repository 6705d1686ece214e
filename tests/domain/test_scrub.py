"""Masks cover the shapes of personal data and of keys, and leave ordinary figures alone."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.domain.scrub import scrub


@pytest.mark.parametrize(
    ("text", "scrubbed"),
    [
        ("write to john.doe+x@mail.example.co.uk, please", "write to [email], please"),
        ("call +49 (0)30 1234-5678", "call [phone]"),
        ("or 030 12345678", "or [phone]"),
        ("or (415) 555-2671.", "or [phone]."),
        ("or 415-555-2671", "or [phone]"),
        ("card 4111 1111 1111 1111", "card [card]"),
        ("card 4111-1111-1111-1111!", "card [card]!"),
        ("IBAN DE89 3704 0044 0532 0130 00.", "IBAN [iban]."),
        ("from GB82WEST12345698765432", "from [iban]"),
        ("at 10.0.0.1:80", "at [ip]:80"),
        ("at 2001:0db8:85a3:0000:0000:8a2e:0370:7334", "at [ip]"),
        ("at 2001:db8::1", "at [ip]"),
        ("number 123-45-6789", "number [id]"),
        ("sk-proj-abcdefghijklmnop1234", "[secret]"),
        ("Authorization: Bearer abcdefghijklmnopqrstuvwx", "Authorization: [secret]"),
        ("AKIAIOSFODNN7EXAMPLE and ghp_abcdefghijklmnopqrstuvwxyz0123", "[secret] and [secret]"),
        ("a@b.example and c@d.example", "[email] and [email]"),
    ],
)
def test_what_names_a_person_or_opens_a_door_is_masked(text: str, scrubbed: str) -> None:
    assert scrub(text) == scrubbed


@pytest.mark.parametrize(
    "text",
    [
        "",
        "2026-11-21 12:30:45, 3.14159 and 1,000,000",
        "card 4111 1111 1111 1112",  # Its last digit is wrong.
        "XX00 3704 1044 1532 1130 11",  # So are its check digits.
        "order 12345678 of 2026",
        "12:34:56:78 and 1:2:3",
        "version 300.1.2.3000",
        "ask @mistral about a@b",
        "sk-short",
        "[email] [phone] [card]",
        "Grüße, 世界 🌍",
    ],
)
def test_ordinary_text_stays(text: str) -> None:
    assert scrub(text) == text


@given(st.text(max_size=200))
def test_a_mask_is_never_masked_again(text: str) -> None:
    once = scrub(text)
    assert scrub(once) == once


@given(st.from_regex(r"[a-z]{1,12}\.[a-z]{1,12}@[a-z]{1,12}\.(com|org|example)", fullmatch=True), st.text(max_size=30))
def test_no_address_gets_through(address: str, around: str) -> None:
    assert address not in scrub(f"{around} {address} {around}")
