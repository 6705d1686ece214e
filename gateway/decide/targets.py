"""Models as they are called: a reference from the registry resolved to all that an attempt needs, once per load."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import NamedTuple

import msgspec

from gateway.decide.prices import PriceBook
from gateway.domain.money import Price
from gateway.domain.policy import Policy, TimeoutOverrides
from gateway.domain.settings import PriceEntry, Settings, Timeouts, TraceContext, split_ref

# Mistral goes on from a last assistant message marked `prefix`; of the others it has to be said.
_CONTINUES_BY_KIND = frozenset({"mistral"})
# A caller's baggage may hold anything, so servers of other people's do not get it unasked.
_TRACE_CONTEXT_BY_KIND: Mapping[str, TraceContext] = {
    "openai": "trace", "mistral": "trace", "compatible": "all", "simulator": "all",
}  # fmt: skip


class Target(NamedTuple):
    """One model at one upstream: what to ask for, where, in which dialect, at which price, and for how long.

    `context_tokens` of None: not known. `continues`: it goes on from an assistant message that has begun.
    `trace_context`: what it is told of the trace that a call belongs to.
    """

    ref: str
    upstream: str
    model: str
    kind: str
    price: Price | None
    timeouts: Timeouts
    context_tokens: int | None
    continues: bool
    trace_context: TraceContext = "trace"


class Targets:
    """Resolves references under one configuration and policy."""

    def __init__(self, settings: Settings, policy: Policy, prices: PriceBook) -> None:
        self._upstreams = settings.upstreams
        self._context_tokens = settings.context_tokens
        self._serving = policy.models.upstream
        self._prices = prices
        self._timeouts = {
            name: _overridden(upstream.timeouts, policy.timeouts.get(name))
            for name, upstream in settings.upstreams.items()
        }

    def find(self, ref: str, own_price: PriceEntry | None = None) -> Target | None:
        """The model behind `upstream/model-id`; None where there is no such upstream, or no model id."""
        upstream, model = split_ref(ref)
        if upstream not in self._upstreams or not model:
            return None
        # The policy may send every model to one upstream; the name and the price stay those of the registry.
        serving = self._serving or upstream
        settings = self._upstreams[serving]
        return Target(
            ref=ref,
            upstream=serving,
            model=model,
            kind=settings.kind,
            price=self._prices.find(ref, self._upstreams[upstream].kind, own_price),
            timeouts=self._timeouts[serving],
            context_tokens=_best(self._context_tokens, ref),
            continues=settings.kind in _CONTINUES_BY_KIND if settings.continues is None else settings.continues,
            trace_context=settings.trace_context or _TRACE_CONTEXT_BY_KIND[settings.kind],
        )


def _overridden(timeouts: Timeouts, overrides: TimeoutOverrides | None) -> Timeouts:
    if overrides is None:
        return timeouts
    given = {name: value for name, value in msgspec.structs.asdict(overrides).items() if value is not None}
    return msgspec.structs.replace(timeouts, **given)


def _best(sizes: Mapping[str, int], ref: str) -> int | None:
    """As with prices: an exact name beats a pattern, a longer pattern a shorter one."""
    if ref in sizes:
        return sizes[ref]
    matching = [pattern for pattern in sizes if fnmatchcase(ref, pattern)]
    return sizes[max(matching, key=len)] if matching else None
