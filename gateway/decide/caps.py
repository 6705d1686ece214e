"""What a cap of the policy counts, and which of its accounts a call touches.

A cap is a rule; each value of its scope in each window is an account. The rule's `id` leaves out the limit, so a cap
that is raised or lowered keeps what was spent under it. The same rules are used before a call (decide/budget.py) and
by the ledger (store/), so both count alike. Shadow calls count only where a cap names their operation: nothing that
callers are held to knows of them.
"""

from collections.abc import Iterable
from typing import Literal, NamedTuple

from gateway.decide.windows import Per, Window, window_of
from gateway.domain.ledger import Amounts, Dimensions
from gateway.domain.money import format_usd
from gateway.domain.policy import Cap, scope_names
from gateway.domain.shadow_policy import SHADOW

Unit = Literal["usd", "requests", "tokens"]


class Rule(NamedTuple):
    """A cap, ready to be asked. `only` holds for each named dimension the values that count."""

    id: str
    env: str
    scope: tuple[str, ...]
    per: Per
    zone: str
    unit: Unit
    only: tuple[tuple[str, frozenset[str]], ...]
    limit: int
    label: str
    warn_at: tuple[float, ...]
    is_closed: bool
    over_share: float | None
    use: str

    def applies(self, on: Dimensions) -> bool:
        """Whether a call on these dimensions counts here."""
        if on.operation == SHADOW and not self.counts_shadows:
            return False
        return not self.only or all(getattr(on, name) in values for name, values in self.only)

    @property
    def counts_shadows(self) -> bool:
        """Whether shadow calls count here: its `only` names their operation."""
        return any(name == "operation" and SHADOW in values for name, values in self.only)

    @property
    def counts_calls(self) -> bool:
        """Whether anything but shadow calls may count here."""
        return not any(name == "operation" and values == {SHADOW} for name, values in self.only)

    def account(self, on: Dimensions) -> str:
        """The name of the account such a call counts in, the same in every process."""
        if not self.scope:
            return self.id
        return f"{self.id} {' '.join([getattr(on, name) or '-' for name in self.scope])}"

    def window(self, now_s: float) -> Window:
        """The window that holds `now_s`."""
        return window_of(self.per, self.zone, now_s)

    def amount(self, amounts: Amounts) -> int:
        """The figure that this cap counts."""
        unit = self.unit
        return amounts.nusd if unit == "usd" else amounts.requests if unit == "requests" else amounts.tokens


def rules_of(caps: Iterable[Cap], env: str) -> tuple[Rule, ...]:
    """The rules behind the caps of a policy."""
    return tuple(_rule(cap, env) for cap in caps)


def rules_that_apply(rules: Iterable[Rule], on: Dimensions) -> list[Rule]:
    """The rules a call on these dimensions is held to."""
    return [rule for rule in rules if rule.applies(on)]


def format_amount(unit: Unit, amount: int) -> str:
    """An amount as people read it."""
    return f"{format_usd(amount)} usd" if unit == "usd" else f"{amount} {unit}"


def _rule(cap: Cap, env: str) -> Rule:
    unit: Unit = "usd" if cap.usd is not None else "requests" if cap.requests is not None else "tokens"
    limit = int(cap.usd if cap.usd is not None else cap.requests if cap.requests is not None else cap.tokens or 0)
    only = tuple(sorted((str(name), frozenset(values)) for name, values in cap.only.items()))
    narrowed = "; ".join(f"{name} {', '.join(sorted(values))}" for name, values in only)
    zone = "" if cap.timezone == "UTC" or cap.per == "total" else f" {cap.timezone}"
    id = f"{env}: {cap.scope} {unit} {cap.per}{zone}" + (f" ({narrowed})" if narrowed else "")
    window = "in total" if cap.per == "total" else f"per {cap.per}{zone}"
    return Rule(
        id=id,
        env=env,
        scope=scope_names(cap.scope),
        per=cap.per,
        zone=cap.timezone,
        unit=unit,
        only=only,
        limit=limit,
        label=f"{cap.scope} {format_amount(unit, limit)} {window}" + (f" ({narrowed})" if narrowed else ""),
        warn_at=tuple(sorted({*cap.warn_at, 1.0})),
        is_closed=cap.on_store_failure == "closed",
        over_share=None if cap.over_pct is None else cap.over_pct / 100,
        use=cap.use,
    )
