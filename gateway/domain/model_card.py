"""What a provider's `GET /models/{id}` and `GET /models` say of a model: that it is there, and when it is withdrawn.

Pure, and lenient: OpenAI's card tells next to nothing, Mistral's tells of an end (`deprecation`, and of fine-tuned
models `archived`), and other servers send what they like. What has no id is no card.
"""

from datetime import UTC, datetime
from typing import Any, NamedTuple

import msgspec

_REPLACEMENT_CHARS = 100
# What lies outside of these is no date that anybody meant, and near the ends of the calendar no time could be written.
_FIRST_YEAR, _LAST_YEAR = 1970, 9000


class ModelCard(NamedTuple):
    """The part of a card that matters here. `retires_s`: unix seconds; None: no end is in sight."""

    id: str
    is_archived: bool = False
    retires_s: float | None = None
    replacement: str = ""


def read_card(body: bytes) -> ModelCard | None:
    """The card in an answer; None where it is none."""
    return _card(_decoded(body))


def read_cards(body: bytes) -> dict[str, ModelCard] | None:
    """The cards of a list by id; None where it is no list of models."""
    found = _decoded(body)
    listed = found.get("data") if isinstance(found, dict) else found
    if not isinstance(listed, list):
        return None
    return {card.id: card for card in map(_card, listed) if card is not None}


def _decoded(body: bytes) -> Any:
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError):
        return None


def _card(found: Any) -> ModelCard | None:
    if not isinstance(found, dict) or not isinstance(found.get("id"), str) or not found["id"]:
        return None
    replacement = found.get("deprecation_replacement_model")
    return ModelCard(
        id=found["id"],
        is_archived=found.get("archived") is True,
        retires_s=_instant(found.get("deprecation")),
        replacement=replacement[:_REPLACEMENT_CHARS] if isinstance(replacement, str) else "",
    )


def _instant(text: Any) -> float | None:
    try:
        at = datetime.fromisoformat(text)
    except (TypeError, ValueError):
        return None
    if not _FIRST_YEAR <= at.year <= _LAST_YEAR:
        return None
    return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()
