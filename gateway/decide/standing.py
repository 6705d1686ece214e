"""How each model stands with us: its breaker, and the retry budget of its upstream. The only memory failover has.

Pure like the two it holds. Survives a reload: what was learnt of a model is not forgotten because a file changed.
"""

from collections.abc import Iterator

from gateway.decide.breaker import Breaker, BreakerLimits, State
from gateway.decide.retry_budget import RetryBudget
from gateway.domain.policy import Breakers, Retries

MAX_BREAKERS = 1_000


class Standing:
    """Breakers by model reference, retry budgets by upstream; both appear when first asked for."""

    def __init__(self, breakers: Breakers, retries: Retries) -> None:
        self._breakers: dict[tuple[str, str], Breaker] = {}
        self._budgets: dict[str, RetryBudget] = {}
        self._retries = retries
        self.take_policy(breakers, retries)

    def take_policy(self, breakers: Breakers, retries: Retries) -> None:
        """Use these limits from now on; open breakers stay open."""
        self._limits = BreakerLimits(
            consecutive=breakers.consecutive,
            share=breakers.share,
            min_calls=breakers.min_calls,
            window_s=breakers.window_s,
            open_s=breakers.open_s,
            max_open_s=breakers.max_open_s,
        )
        for breaker in self._breakers.values():
            breaker.limits = self._limits
        if retries != self._retries:
            self._retries = retries
            self._budgets.clear()

    def breaker(self, upstream: str, ref: str) -> Breaker:
        """The breaker of one model at one upstream."""
        key = (upstream, ref)
        if key not in self._breakers:
            if len(self._breakers) >= MAX_BREAKERS:
                self._forget()
            self._breakers[key] = Breaker(self._limits)
        return self._breakers[key]

    def known(self, upstream: str, ref: str) -> Breaker | None:
        """The same, for those who only look: one that nobody has asked for is not made."""
        return self._breakers.get((upstream, ref))

    def _forget(self) -> None:
        """Make room: callers may name models outright, so their names must not fill our memory.

        What is well is forgotten; where nothing is, the oldest, since a model that is not there gets a breaker too.
        """
        unwell = {one: kept for one, kept in self._breakers.items() if kept.state is not State.CLOSED}
        if len(unwell) >= MAX_BREAKERS:
            del unwell[next(iter(unwell))]
        self._breakers = unwell

    def budget(self, upstream: str) -> RetryBudget:
        """The retry budget of one upstream."""
        if upstream not in self._budgets:
            retries = self._retries
            self._budgets[upstream] = RetryBudget(
                share=retries.budget_percent / 100, floor=retries.budget_floor, window_s=retries.budget_window_s
            )
        return self._budgets[upstream]

    def breakers(self) -> Iterator[tuple[str, str, Breaker]]:
        """Every breaker there is, as (upstream, reference, breaker), for the metrics."""
        return ((upstream, ref, breaker) for (upstream, ref), breaker in self._breakers.items())

    def budgets(self) -> Iterator[tuple[str, RetryBudget]]:
        """Every retry budget there is, for the metrics."""
        return iter(self._budgets.items())
