"""What a model costs: the first of four layers that knows it.

Policy override, the agent's own price, patterns in config.toml (which hold the `ft:` defaults), litellm's price map.
Unknown stays unknown (None): a price is never guessed. Within a layer an exact name beats a pattern, and the longer
pattern beats the shorter.
"""

from collections.abc import Mapping
from fnmatch import fnmatchcase

from gateway.domain.money import TOKENS_PER_MTOK, Price, Tier
from gateway.domain.settings import PriceEntry, RatesEntry, TierEntry, split_ref


def price_of(entry: PriceEntry, source: str) -> Price:
    """A written price as integers. `source` says where it stands, unless the entry names its own source."""
    return Price(
        **_rates(entry),
        image_nusd=int(entry.image_usd),
        image_tokens=entry.image_tokens,
        request_nusd=int(entry.request_usd),
        audio_nusd_per_mseconds=-(-int(entry.audio_usd_per_minute) * TOKENS_PER_MTOK // 60),
        tiers=tuple(_tier(tier, entry) for tier in entry.tiers),
        source=f"{source}: {entry.source}" if entry.source else source,
    )


def _tier(tier: TierEntry, entry: PriceEntry) -> Tier:
    # Providers' tiers are of text; audio costs what it costs, unless the tier says otherwise.
    return Tier(above_tokens=tier.above_tokens, **{**_audio(entry), **_rates(tier)})


def _rates(entry: RatesEntry) -> dict[str, int]:
    return {
        name.replace("_usd_", "_nusd_"): int(value)
        for name in RatesEntry.__struct_fields__
        if (value := getattr(entry, name)) is not None
    }


def _audio(entry: PriceEntry) -> dict[str, int]:
    return {name: value for name, value in _rates(entry).items() if name.startswith("audio_")}


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
        # litellm keys Mistral's models with a prefix and OpenAI's without, a fine-tuned one of OpenAI's by its base:
        # `ft:gpt-4o-2024-08-06` for `ft:gpt-4o-2024-08-06:org:name:id`.
        names = (f"{kind}/{model}", model, ":".join(model.split(":")[:2])) if kind == "openai" else (f"{kind}/{model}",)
        return next((self._litellm[name] for name in names if name in self._litellm), None)


def _best(entries: Mapping[str, PriceEntry], ref: str) -> PriceEntry | None:
    if ref in entries:
        return entries[ref]
    matching = [pattern for pattern in entries if fnmatchcase(ref, pattern)]
    return entries[max(matching, key=len)] if matching else None
