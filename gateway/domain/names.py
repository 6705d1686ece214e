"""What may be called a name: agents, upstreams, ids that come in from outside. One alphabet, kept in one place."""

import re

# Agents and upstreams become metric labels, URL parts and keys in files, so they are short and plain.
NAME = "letters, digits, _ - . (at most 64)"
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
# Ids of users and operations come from callers; this is wide enough for e-mail addresses and URNs.
ID = "A-Z a-z 0-9 . _ : @ / - (1 to 128)"
_ID = re.compile(r"[A-Za-z0-9._:@/-]{1,128}")


def is_name(text: str) -> bool:
    """Whether `text` may name an agent or an upstream."""
    return _NAME.fullmatch(text) is not None


def is_id(text: str) -> bool:
    """Whether `text` may identify a user or an operation."""
    return _ID.fullmatch(text) is not None
