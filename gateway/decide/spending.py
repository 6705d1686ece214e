"""What calls that are over took of each cap, and what it leaves for one more. Plain sums, in no order of time.

No books: nothing is held, leased or waited for, and an account may come to stand over its limit. The invariant: a call
counts in the accounts that the gateway would count it in, by the same rules.
"""

from collections.abc import Sequence

from gateway.decide.caps import Rule
from gateway.domain.ledger import Amounts, Dimensions

Place = tuple[str, int]


class Spending:
    """Every account of these rules, in all windows."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        self.rules = tuple(rules)
        self._used: dict[Place, int] = {}

    def add(self, on: Dimensions, amounts: Amounts, at_ms: int) -> None:
        """Count what an attempt took at that time, unix milliseconds."""
        for rule in self.rules:
            if rule.applies(on):
                place = place_of(rule, on, at_ms)
                self._used[place] = self._used.get(place, 0) + rule.amount(amounts)

    def used(self, place: Place) -> int:
        """What is spent in an account."""
        return self._used.get(place, 0)

    def left(self, rule: Rule, on: Dimensions, at_ms: int) -> int:
        """What is left of a cap for such an attempt; below zero where it is overspent."""
        return rule.limit - self.used(place_of(rule, on, at_ms))

    def take(self, on: Dimensions, amounts: Amounts, at_ms: int) -> Rule | None:
        """Count what an attempt would take, if every cap has so much left; else nothing, and the first that has not."""
        taken: list[tuple[Place, int]] = []
        for rule in self.rules:
            if rule.applies(on):
                place = place_of(rule, on, at_ms)
                amount = rule.amount(amounts)
                used = self._used.get(place, 0) + amount
                if amount and used > rule.limit:
                    return rule
                taken.append((place, used))
        self._used.update(taken)
        return None

    def tightest(self, on: Dimensions, at_ms: int) -> Rule | None:
        """The cap that would refuse such an attempt first, as far as one can tell; None: it falls under none."""
        found = [rule for rule in self.rules if rule.applies(on)]
        return min(found, key=lambda rule: self.left(rule, on, at_ms) / rule.limit, default=None)


def place_of(rule: Rule, on: Dimensions, at_ms: int) -> Place:
    """The account that an attempt counts in under a rule: its name, and its window's start."""
    return rule.account(on), rule.window(at_ms / 1000).start_s
