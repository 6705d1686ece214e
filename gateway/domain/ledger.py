"""What money leaves behind: the events of the journal and the rows of the ledger. Values only.

An attempt's money is HELD before the provider is called and then resolved once: POSTED (it cost this much), VOID (it
cannot have cost anything) or IN_DOUBT (it may have cost the whole hold). Its id is its call's id and its place among
the call's attempts, `req-1f0c.2`, and everything that is told twice is told apart by it.
"""

from typing import Literal, NamedTuple

import msgspec

from gateway.domain.call import Basis, CallRecord

# `released`: was in doubt, and somebody who knows better has freed it.
State = Literal["posted", "void", "in_doubt", "released"]
Source = Literal["gateway", "manual", "import", "lease"]


class Dimensions(NamedTuple):
    """Who and what an attempt is for: all that a cap can be scoped by or narrowed to."""

    agent: str = ""
    key: str = ""
    user: str = ""
    operation: str = "inference"
    model: str = ""
    variant: str = ""


class Amounts(NamedTuple):
    """What an attempt takes, or took, in each unit: nUSD, requests, tokens."""

    nusd: int = 0
    requests: int = 0
    tokens: int = 0


class Event(msgspec.Struct, tag_field="event", frozen=True, omit_defaults=True):
    """Abstract: a line of the journal. Call records are the other kind of line."""

    id: str


class Held(Event, tag="held", frozen=True, omit_defaults=True):
    """The most an attempt can cost is set aside. In the journal before the provider hears of it."""

    at_ms: int
    env: str
    on: Dimensions
    amounts: Amounts


class Posted(Event, tag="posted", frozen=True, omit_defaults=True):
    """It cost this much."""

    amounts: Amounts
    basis: Basis = "exact"
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Void(Event, tag="void", frozen=True, omit_defaults=True):
    """It cannot have cost anything."""


class InDoubt(Event, tag="in_doubt", frozen=True, omit_defaults=True):
    """It may have cost the whole hold, and nobody here can know."""


Line = Held | Posted | Void | InDoubt | CallRecord


class LedgerRow(msgspec.Struct, frozen=True, kw_only=True):
    """One attempt, or one entry by hand, as the ledger keeps it. `at_ms` is when it was reserved, unix milliseconds."""

    id: str
    at_ms: int
    env: str
    on: Dimensions
    amounts: Amounts
    state: State = "posted"
    basis: Basis = "exact"
    prompt_tokens: int = 0
    completion_tokens: int = 0
    source: Source = "gateway"
    note: str = ""


def row_of(held: Held, end: Posted | Void | InDoubt) -> LedgerRow:
    """The row of an attempt that is resolved."""
    match end:
        case Posted():
            return LedgerRow(
                id=held.id, at_ms=held.at_ms, env=held.env, on=held.on, amounts=end.amounts, basis=end.basis,
                prompt_tokens=end.prompt_tokens, completion_tokens=end.completion_tokens,
            )  # fmt: skip
        case Void():
            return LedgerRow(
                id=held.id, at_ms=held.at_ms, env=held.env, on=held.on, amounts=Amounts(), state="void", basis="none"
            )
        case InDoubt():
            return LedgerRow(
                id=held.id, at_ms=held.at_ms, env=held.env, on=held.on, amounts=held.amounts,
                state="in_doubt", basis="bound",
            )  # fmt: skip
