"""What people may do to the ledger by hand, checked before it is done: entries, and what a kill switch is thrown for.

Entries take any agent, since money may be spent on one that is gone; switches take only what exists, since one that is
misspelt would stop nothing. Decides and changes nothing. Raises `Refused`, whose `param` names what is wrong.
"""

from collections.abc import Collection
from typing import NamedTuple, get_args

import msgspec

from gateway.decide.plan import RAW_AGENT, Plan
from gateway.domain.call import Variant
from gateway.domain.errors import Refused
from gateway.domain.ledger import Amounts, Dimensions, LedgerRow
from gateway.domain.money import format_usd, nusd_from_usd
from gateway.domain.names import ID, NAME, is_id, is_name
from gateway.domain.reading import nearest

# `user` is the id that callers send; `user-hash` the one that reports show.
SWITCHES = ("agent", "key", "user", "user-hash", "model", "operation")
_MAX_NOTE = 1_000


class Switch(NamedTuple):
    """What a kill switch is thrown for: everything of the environment, with an empty dimension, or one value."""

    dimension: str = ""
    value: str = ""

    def __str__(self) -> str:
        return f"{self.dimension}={self.value}" if self.dimension else "everything"


class Entry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Money that somebody writes down as spent. `at` is left to the caller: it is told in several ways."""

    agent: str
    usd: str
    operation: str = "inference"
    model: str = ""
    variant: str = ""
    key: str = ""
    user: str = ""
    note: str = ""
    at: str = ""
    id: str = ""


def row_of_entry(plan: Plan, entry: Entry, *, id: str, at_ms: int) -> LedgerRow:
    """The row of an entry by hand. A user is kept as a hash, like everywhere."""
    for param, text, is_right, wanted in (
        ("agent", entry.agent, is_name, NAME),
        ("operation", entry.operation, is_id, ID),
        ("key", entry.key or "-", is_name, NAME),
        ("model", entry.model or "-", _is_text, "at most 512 printable characters"),
        ("user", entry.user or "-", _is_text, "at most 512 printable characters"),
        ("id", id, is_id, ID),
    ):
        if not is_right(text):
            raise Refused("invalid_value", f"{param} {_shown(text)} may hold {wanted}", param=param)
    if entry.variant not in ("", *get_args(Variant)):
        raise Refused("invalid_value", f"variant is one of {', '.join(get_args(Variant))}", param="variant")
    if len(entry.note) > _MAX_NOTE:
        raise Refused("invalid_value", f"note is longer than {_MAX_NOTE} characters", param="note")
    on = Dimensions(
        entry.agent, entry.key, plan.kept_user(entry.user), entry.operation, entry.model, entry.variant
    )  # fmt: skip
    return LedgerRow(
        id=id, at_ms=at_ms, env=plan.env, on=on, amounts=Amounts(nusd=read_usd(entry.usd)),
        basis="manual", source="manual", note=entry.note,
    )  # fmt: skip


def read_usd(text: str) -> int:
    """nUSD of an amount that somebody wrote."""
    if text.strip().startswith("-"):
        raise Refused("invalid_value", "usd is negative; what was booked stays booked", param="usd")
    try:
        return nusd_from_usd(text)
    except ValueError as error:
        raise Refused("invalid_value", f"usd: {error}", param="usd") from None


def read_switch(plan: Plan, text: str, *, is_known_only: bool = True) -> Switch:
    """What is meant by `agent=qa_agent`, `user=ann`, ...; "" is everything.

    With `is_known_only` of False also what the configuration does not know (any more).
    """
    if not text:
        return Switch()
    dimension, _, value = text.partition("=")
    if dimension not in SWITCHES or not value:
        known = ", ".join(f"{name}=..." for name in SWITCHES)
        close = nearest(dimension, SWITCHES)
        raise Refused("invalid_value", f"{_shown(text)} is none of {known}, or nothing{close}", param="scope")
    if dimension == "user":
        return Switch("user", plan.kept_user(value))
    if dimension == "user-hash":
        return Switch("user", value)
    if not is_known_only:
        return Switch(dimension, value)
    if dimension == "model":
        if plan.targets.find(value) is None:
            raise Refused("invalid_value", f"{_shown(value)} is no upstream/model-id of an upstream", param="scope")
    elif dimension == "operation":
        if not is_id(value):
            raise Refused("invalid_value", f"operation {_shown(value)} may hold {ID}", param="scope")
    else:
        known_names = (*plan.agents, RAW_AGENT) if dimension == "agent" else [key.name for key in plan.keys]
        _check_known(dimension, value, known_names)
    return Switch(dimension, value)


def doubts_about(plan: Plan, row: LedgerRow) -> list[str]:
    """What a person should be told of an entry that is valid, and may be a slip all the same."""
    agent = row.on.agent
    if agent in plan.agents or agent == RAW_AGENT:
        return []
    return [f"the configuration has no agent {agent!r}{nearest(agent, plan.agents)}"]


def actual_of(row: LedgerRow, usd: str) -> Amounts:
    """What a row in doubt did cost: the amount is told, its requests and tokens stay."""
    return row.amounts._replace(nusd=read_usd(usd))


def summary(row: LedgerRow) -> str:
    """A row in a few words."""
    model = f", {row.on.model}" if row.on.model else ""
    return f"{format_usd(row.amounts.nusd)} usd for {row.on.agent or '-'} ({row.on.operation}{model})"


def _check_known(dimension: str, value: str, known: Collection[str]) -> None:
    if value not in known:
        listed = ", ".join(sorted(known)) or "none"
        message = f"there is no {dimension} {_shown(value)}; known: {listed}{nearest(value, known)}"
        raise Refused("invalid_value", message, param="scope")


def _is_text(text: str) -> bool:
    return len(text) <= 512 and text.isprintable()


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
