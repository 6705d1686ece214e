"""Money in whole nano-dollars: prices, usage, and what a call cost.

One dollar is 1,000,000,000 nUSD. Prices are integers too (nUSD per million tokens), so a cost is one integer sum and
one division that rounds up, once per call. Dollars appear only where people write or read them. Never a float.
"""

import re

import msgspec

NUSD_PER_USD = 1_000_000_000
_DECIMALS = 9
TOKENS_PER_MTOK = 1_000_000
# Books and SQL drivers hold 64-bit signed ints; JSON readers lose whole numbers above 2^53. Caps stay below it.
MAX_NUSD = 2**53
# A count above this is absurd for one call and is not believed.
MAX_TOKENS = 2**31
# Plain digits only: what else Decimal takes for a number (1e3, 1_000, digits of other scripts) is a slip in a price.
_USD = re.compile(r"([0-9]+)(?:\.([0-9]+))?")


def nusd_from_usd(text: str) -> int:
    """Nano-dollars from decimal dollars such as "0.80". Raises ValueError; refuses signs, more than 9 decimals."""
    found = _USD.fullmatch(text.strip())
    if found is None:
        raise ValueError(f'{_short(text)} is not an amount in dollars of zero or more, such as "0.80"')
    whole, decimals = found[1].lstrip("0"), (found[2] or "").rstrip("0")
    if len(decimals) > _DECIMALS:
        raise ValueError(f"{_short(text)} has more than nine decimals")
    # Digits are counted before they are read: Python refuses to read thousands of them.
    nusd = MAX_NUSD if len(whole) > _DECIMALS else int(f"{whole}{decimals:0<{_DECIMALS}}")
    if nusd >= MAX_NUSD:
        raise ValueError(f"{_short(text)} is above the largest amount, {format_usd(MAX_NUSD)} dollars")
    return nusd


def format_usd(nusd: int) -> str:
    """Decimal dollars without trailing zeros, at least two decimals: 1_500_000_000 -> "1.50"."""
    sign, rest = ("-" if nusd < 0 else ""), abs(nusd)
    whole, fraction = divmod(rest, NUSD_PER_USD)
    decimals = f"{fraction:09d}".rstrip("0").ljust(2, "0")
    return f"{sign}{whole}.{decimals}"


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")


class Price(msgspec.Struct, frozen=True, kw_only=True):
    """What a model costs, in nUSD per million tokens, and where that figure is from.

    `cached_input` and `reasoning` of None mean: the same as input and output.
    """

    input_nusd_per_mtok: int
    output_nusd_per_mtok: int
    cached_input_nusd_per_mtok: int | None = None
    request_nusd: int = 0
    source: str = ""


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens of one call as the provider counted them. `cached` is part of `prompt`, `reasoning` of `completion`."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0

    @property
    def is_sane(self) -> bool:
        """Whether the counts can be believed: none negative, none absurd, no part larger than its whole."""
        return (
            0 <= self.cached_tokens <= self.prompt_tokens <= MAX_TOKENS
            and 0 <= self.reasoning_tokens <= self.completion_tokens <= MAX_TOKENS
        )


def cost_nusd(price: Price, usage: Usage) -> int:
    """Cost of one call in nUSD, rounded up once over the sum of its components. `usage` must be sane."""
    cached_price = price.cached_input_nusd_per_mtok
    if cached_price is None:
        cached_price = price.input_nusd_per_mtok
    total = (
        (usage.prompt_tokens - usage.cached_tokens) * price.input_nusd_per_mtok
        + usage.cached_tokens * cached_price
        + usage.completion_tokens * price.output_nusd_per_mtok
    )
    return -(-total // TOKENS_PER_MTOK) + price.request_nusd
