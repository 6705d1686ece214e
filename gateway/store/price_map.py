"""litellm's price map, read as package data: litellm itself is never imported (160 MB, 2.7 s, a network fetch).

3 MB of JSON become a table of a few thousand `Price`s in about 15 ms, once per start. Where litellm is not installed
the table is empty, and models that only it would price are unknown.
"""

from decimal import Decimal
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from math import ceil
from pathlib import Path

import msgspec

from gateway.domain.money import NUSD_PER_USD, TOKENS_PER_MTOK, Price

_FILE = "model_prices_and_context_window_backup.json"
_SCALE = NUSD_PER_USD * TOKENS_PER_MTOK


class _Row(msgspec.Struct):
    mode: str = ""
    input_cost_per_token: Decimal | None = None
    output_cost_per_token: Decimal | None = None
    cache_read_input_token_cost: Decimal | None = None


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
    rows = msgspec.json.decode(path.read_bytes(), type=dict[str, msgspec.Raw])
    prices = {}
    for name, found in rows.items():
        try:
            row = msgspec.json.decode(found, type=_Row)
        except msgspec.ValidationError:
            continue  # The map's own specimen row holds text in the place of figures.
        if row.mode in ("chat", "completion") and row.input_cost_per_token is not None:
            prices[name] = Price(
                input_nusd_per_mtok=_nusd_per_mtok(row.input_cost_per_token),
                output_nusd_per_mtok=_nusd_per_mtok(row.output_cost_per_token or Decimal()),
                cached_input_nusd_per_mtok=(
                    None if row.cache_read_input_token_cost is None else _nusd_per_mtok(row.cache_read_input_token_cost)
                ),
                source=source,
            )
    return prices


def _nusd_per_mtok(usd_per_token: Decimal) -> int:
    # As Decimal, not as float: 1.65e-05 times the scale would come out a hair above and be rounded up by one.
    return ceil(usd_per_token * _SCALE)
