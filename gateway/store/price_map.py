"""litellm's price map, read as package data: litellm itself is never imported (160 MB, 2.7 s, a network fetch).

3 MB of JSON become a table of a few thousand `Price`s in about 20 ms, once per start. Where litellm is not installed
the table is empty, and models that only it would price are unknown.
"""

import re
from decimal import Decimal
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from math import ceil
from pathlib import Path

import msgspec
from msgspec.structs import astuple

from gateway.domain.money import NUSD_PER_USD, TOKENS_PER_MTOK, Price, Tier

_FILE = "model_prices_and_context_window_backup.json"
_SCALE = NUSD_PER_USD * TOKENS_PER_MTOK

# What the map calls the rates of a `Price`. A key with another ending is the price of another service, such as batches.
_RATES = {
    "input_cost_per_token": "input_nusd_per_mtok",
    "output_cost_per_token": "output_nusd_per_mtok",
    "cache_read_input_token_cost": "cached_input_nusd_per_mtok",
    "cache_creation_input_token_cost": "cache_write_nusd_per_mtok",
    "output_cost_per_reasoning_token": "reasoning_nusd_per_mtok",
    "input_cost_per_audio_token": "audio_input_nusd_per_mtok",
    "output_cost_per_audio_token": "audio_output_nusd_per_mtok",
}
_TIER = re.compile(rf"({'|'.join(_RATES)})_above_(\d+)k_tokens")
_KEPT_IN_TIERS = (
    "input_nusd_per_mtok", "output_nusd_per_mtok", "audio_input_nusd_per_mtok", "audio_output_nusd_per_mtok",
)  # fmt: skip


class _Rates(msgspec.Struct):
    """In the order of _RATES."""

    input_cost_per_token: Decimal | None = None
    output_cost_per_token: Decimal | None = None
    cache_read_input_token_cost: Decimal | None = None
    cache_creation_input_token_cost: Decimal | None = None
    output_cost_per_reasoning_token: Decimal | None = None
    input_cost_per_audio_token: Decimal | None = None
    output_cost_per_audio_token: Decimal | None = None


class _Row(_Rates):
    mode: str = ""
    input_cost_per_image: Decimal | None = None
    input_cost_per_request: Decimal | None = None


class _Search(msgspec.Struct):
    search_context_cost_per_query: dict[str, Decimal] = {}


def find_price_map() -> Path | None:
    """The map's file, or None where litellm is not installed."""
    # find_spec on a top-level name looks for the package and runs none of it.
    spec = find_spec("litellm")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(place) / _FILE
        if path.is_file():
            return path
    return None


def load_price_map() -> dict[str, Price]:
    """Prices by litellm's own names, such as `gpt-4o` or `mistral/mistral-small-latest`. Chat models only."""
    path = find_price_map()
    if path is None:
        return {}
    try:
        source = f"litellm {version('litellm')}"
    except PackageNotFoundError:
        source = "litellm"
    prices = {}
    for name, found in _rows.decode(path.read_bytes()).items():
        try:
            row = _row.decode(found)
            if row.mode in ("chat", "completion") and row.input_cost_per_token is not None:
                prices[name] = _price(name, row, found, source)
        except msgspec.ValidationError:
            continue  # The map's own specimen row holds text in the place of figures.
    return prices


_rows = msgspec.json.Decoder(dict[str, msgspec.Raw])
_row = msgspec.json.Decoder(_Row)
_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])
_figure = msgspec.json.Decoder(Decimal | None)


def _price(name: str, row: _Row, found: msgspec.Raw, source: str) -> Price:
    figures = zip(_RATES.values(), astuple(row), strict=False)
    rates = {field: _nusd_per_mtok(figure) for field, figure in figures if figure is not None}
    rates.setdefault("output_nusd_per_mtok", 0)
    fees = {}
    if row.input_cost_per_image:
        fees["image_nusd"] = ceil(row.input_cost_per_image * NUSD_PER_USD)
    if row.input_cost_per_request:
        fees["request_nusd"] = ceil(row.input_cost_per_request * NUSD_PER_USD)
    if "-search-" in name:
        # Models that search the web before each answer, and are billed for it by the search.
        searches = msgspec.json.decode(found, type=_Search).search_context_cost_per_query.values()
        fees["request_nusd"] = ceil(max(searches, default=0) * NUSD_PER_USD)
    tiers = _tiers(found, rates) if b"_above_" in bytes(found) else ()
    return Price(**rates, **fees, tiers=tiers, source=source)


def _tiers(found: msgspec.Raw, base: dict[str, int]) -> tuple[Tier, ...]:
    # Audio, and text where a row names only one half, cost what they cost below the tier; the rest is as its text.
    kept = {rate: base[rate] for rate in _KEPT_IN_TIERS if rate in base}
    tiers: dict[int, dict[str, int]] = {}
    for key, raw in _fields.decode(found).items():
        named = _TIER.fullmatch(key) if key.endswith("k_tokens") else None
        figure = _figure.decode(raw) if named is not None else None
        if named is not None and figure is not None:
            tiers.setdefault(int(named[2]) * 1_000, {**kept})[_RATES[named[1]]] = _nusd_per_mtok(figure)
    return tuple(Tier(above_tokens=edge, **tiers[edge]) for edge in sorted(tiers))


def _nusd_per_mtok(usd_per_token: Decimal) -> int:
    # As Decimal, not as float: 1.65e-05 times the scale would come out a hair above and be rounded up by one.
    return ceil(usd_per_token * _SCALE)
