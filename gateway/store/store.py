"""The shared truth of money and rollouts, as every process sees it: one interface, whichever database is behind it.

A process tells the store what it spent and what became of its calls, asks it for leases, which are slices of an account
that it may spend from memory, and hears where the rollouts stand. All of that goes through one transaction, `sync`. The
invariant, for every account at every moment: `posted + the sum of its leases <= limit`, but for what a provider billed
above a hold, which is posted in full.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from gateway.decide.budget import Balance
from gateway.decide.caps import Rule
from gateway.decide.windows import Window
from gateway.domain.ledger import Amounts, Dimensions, LedgerRow
from gateway.domain.outcome import Outcome
from gateway.domain.rollout import RolloutState


class StoreError(Exception):
    """The store cannot be used now: locked, full, gone, or not a store. The message says which and what to do."""


class Spot(NamedTuple):
    """One account in one window."""

    account: str
    start_s: int


class Ask(NamedTuple):
    """A process needs `needed` more of an account, and would like up to `wanted`. Values tell which account it is."""

    rule: Rule
    on: Dimensions
    spot: Spot
    end_s: int | None
    needed: int
    wanted: int


class Batch(NamedTuple):
    """What a process brings: rows and calls it has not told yet, what it needs, gives back, and holds at the moment."""

    rows: Sequence[LedgerRow] = ()
    asks: Sequence[Ask] = ()
    returns: Sequence[tuple[Spot, int]] = ()
    held: Sequence[tuple[Spot, int]] = ()
    # How far the journal has been told with this batch: segment number and offset in it; None: no further than before.
    told: tuple[int, int] | None = None
    outcomes: Sequence[Outcome] = ()


class Crossing(NamedTuple):
    """An account has come to a share of its limit, for the first time in its window. Told to one process only."""

    rule_id: str
    label: str
    account: str
    window: Window
    share: float
    unit: str
    posted: int
    limit: int


class Stop(NamedTuple):
    """A kill switch that is thrown. `dimension` of "": everything; else calls whose dimension has that value."""

    env: str
    dimension: str
    value: str
    by: str
    why: str
    at_ms: int

    def covers(self, env: str, on: Dimensions) -> bool:
        """Whether a call is stopped by it."""
        return self.env == env and (not self.dimension or getattr(on, self.dimension) == self.value)


class Synced(NamedTuple):
    """What the store says back. `accounts` has every account that was touched, asked for, or is leased to us."""

    accounts: dict[Spot, Balance]
    crossings: list[Crossing]
    stops: list[Stop]
    # Processes that are alive, this one included.
    holders: int
    # We were taken for dead: what was leased to us had been posted as in doubt, and is put right by this sync.
    was_lost: bool
    # Of every environment, with its name.
    rollouts: Sequence[tuple[str, RolloutState]] = ()


class Store(Protocol):
    """What a process needs of it while it serves. Blocking: called in a thread, one call at a time.

    Every method raises `StoreError`.
    """

    def join(self, holder: str, rules: Sequence[Rule]) -> tuple[int, int]:
        """Begin to take part under this name, or go on after a crash; the leases of its last life end.

        Returns how far this holder's journal has been told. To be called again when the rules change.
        """
        ...

    def sync(self, batch: Batch) -> Synced:
        """One transaction: rows and calls in (each id once, for ever), what is given back, what is asked for."""
        ...

    def leave(self) -> None:
        """End for good: every lease goes back. What was brought by `sync` stays."""
        ...

    def close(self) -> None:
        """Let go of the database."""
        ...


class Total(NamedTuple):
    """Spend of one group of rows. `in_doubt` is part of `amounts`."""

    group: str
    amounts: Amounts
    in_doubt_nusd: int
    rows: int
