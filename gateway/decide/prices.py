"""What a model costs: the first of four layers that knows it.

Policy override, the agent's own price, patterns in config.toml (which hold the `ft:` defaults), litellm's price map.
Unknown stays unknown (None): a price is never guessed. Within a layer an exact name beats a pattern, and the longer
pattern beats the shorter.
"""

from collections.abc import Mapping
from fnmatch import fnmatchcase

from gateway.domain.money import Price
from gateway.domain.settings import PriceEntry, split_ref


def price_of(entry: PriceEntry, source: str) -> Price:
    """A written price as integers. `source` says where it stands, unless the entry names its own source."""
    return Price(
        input_nusd_per_mtok=int(entry.input_usd_per_mtok),
        output_nusd_per_mtok=int(entry.output_usd_per_mtok),
        cached_input_nusd_per_mtok=(
            None if entry.cached_input_usd_per_mtok is None else int(entry.cached_input_usd_per_mtok)
        ),
        request_nusd=int(entry.request_usd),
        source=f"{source}: {entry.source}" if entry.source else source,
    )


class PriceBook:
    """The layers that do not depend on the agent. `litellm_map` is keyed as litellm keys it."""

    def __init__(
        self,
        policy: Mapping[str, PriceEntry],
        config: Mapping[str, PriceEntry],
        litellm_map: Mapping[str, Price],
    ) -> None:
        self._policy = policy
        self._config = config
        self._litellm = litellm_map

    def find(self, ref: str, kind: str, own: PriceEntry | None = None) -> Price | None:
        """The price of `ref` at an upstream of `kind`; `own` is what the agent itself says of this model."""
        entry = _best(self._policy, ref)
        if entry is not None:
            return price_of(entry, "policy")
        if own is not None:
            return price_of(own, "agent")
        entry = _best(self._config, ref)
        if entry is not None:
            return price_of(entry, "config.toml")
        _, model = split_ref(ref)
        # litellm keys Mistral's models with a prefix and OpenAI's without.
        return self._litellm.get(f"{kind}/{model}") or (self._litellm.get(model) if kind == "openai" else None)


def _best(entries: Mapping[str, PriceEntry], ref: str) -> PriceEntry | None:
    if ref in entries:
        return entries[ref]
    matching = [pattern for pattern in entries if fnmatchcase(ref, pattern)]
    return entries[max(matching, key=len)] if matching else None
