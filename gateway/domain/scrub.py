"""Masks what may name a person or open a door: e-mail, phone, card, account and network numbers, keys.

Not a guarantee: it knows shapes, not meanings, so names and streets stay. The invariant: linear in the text, whatever
the text is (RE2), and a mask is never masked again.
"""

from ipaddress import ip_address

import re2

_SECRET = re2.compile(
    r"\b(?:sk|pk|rk)[-_][A-Za-z0-9_\-]{16,}"
    r"|\bgh[opsur]_[A-Za-z0-9]{20,}|\bgithub_pat_[A-Za-z0-9_]{20,}|\bglpat-[A-Za-z0-9_\-]{16,}"
    r"|\bxox[abeoprs]-[A-Za-z0-9\-]{10,}|\bAKIA[0-9A-Z]{16}\b|\bAIza[0-9A-Za-z_\-]{30,}|\bhf_[A-Za-z0-9]{20,}"
    r"|\beyJ[A-Za-z0-9_\-]{8,}\.[A-Za-z0-9_\-]{8,}\.[A-Za-z0-9_\-]{8,}"
    r"|\b[Bb]earer\s+[A-Za-z0-9._~+/\-]{16,}=*"
)
_EMAIL = re2.compile(r"[A-Za-z0-9._%+\-]+@[A-Za-z0-9\-]+(?:\.[A-Za-z0-9\-]+)+")
_IBAN = re2.compile(r"\b[A-Z]{2}[0-9]{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b")
_CARD = re2.compile(r"\b[0-9](?:[ \-]?[0-9]){12,18}\b")
_IP = re2.compile(r"\b(?:[0-9]{1,3}\.){3}[0-9]{1,3}\b|(?:\b[0-9A-Fa-f]{1,4}|:)(?::[0-9A-Fa-f]{0,4}){2,7}")
_PHONE = re2.compile(
    r"\+[0-9][0-9 ()./\-]{5,20}[0-9]"  # in the international form
    r"|\(?\b0[0-9]{1,4}\)?[ ./\-][0-9][0-9 ./\-]{4,14}[0-9]\b"  # with a trunk prefix
    r"|\(?\b[2-9][0-9]{2}\)?[ .\-][0-9]{3}[ .\-][0-9]{4}\b"  # as in North America
)
_US_SOCIAL = re2.compile(r"\b[0-9]{3}-[0-9]{2}-[0-9]{4}\b")


def scrub(text: str) -> str:
    """The text with `[secret]`, `[email]`, `[iban]`, `[card]`, `[ip]`, `[id]` and `[phone]` in place of such things."""
    # Longer shapes first: a card's digits would pass for a phone's.
    text = _SECRET.sub("[secret]", text)
    text = _EMAIL.sub("[email]", text)
    text = _IBAN.sub(lambda found: "[iban]" if _is_iban(found[0]) else found[0], text)
    text = _CARD.sub(lambda found: "[card]" if _is_card(found[0]) else found[0], text)
    text = _IP.sub(lambda found: "[ip]" if _is_ip(found[0]) else found[0], text)
    text = _US_SOCIAL.sub("[id]", text)
    return str(_PHONE.sub("[phone]", text))


def _is_ip(found: str) -> bool:
    """Four bytes, or the groups of IPv6; a time of day is neither."""
    try:
        ip_address(found)
    except ValueError:
        return False
    return True


def _is_iban(found: str) -> bool:
    """ISO 13616: moved round and read in base 36, it leaves 1 of 97."""
    plain = found.replace(" ", "")
    moved = plain[4:] + plain[:4]
    return int("".join(str(int(letter, 36)) for letter in moved)) % 97 == 1


def _is_card(found: str) -> bool:
    """ISO 7812: the digits' Luhn sum is a multiple of ten."""
    digits = [int(letter) for letter in reversed(found) if letter.isdigit()]
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[1::2]]
    return (sum(digits[::2]) + sum(doubled)) % 10 == 0
