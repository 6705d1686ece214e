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


class Rates(msgspec.Struct, frozen=True, kw_only=True):
    """What tokens cost, in nUSD per million. None: as the text they stand in for, input or output.

    `cache_write` is for prompt tokens that the provider puts into its cache; not every provider asks for it.
    """

    input_nusd_per_mtok: int
    output_nusd_per_mtok: int
    cached_input_nusd_per_mtok: int | None = None
    cache_write_nusd_per_mtok: int | None = None
    reasoning_nusd_per_mtok: int | None = None
    audio_input_nusd_per_mtok: int | None = None
    audio_output_nusd_per_mtok: int | None = None


class Tier(Rates, frozen=True, kw_only=True):
    """Rates of the whole call where its prompt has more than `above_tokens`."""

    above_tokens: int


class Price(Rates, frozen=True, kw_only=True):
    """What a model costs, and where that figure is from. Tiers rise.

    `image_tokens` is the most that one image counts as, where that is known better than by its provider's formula.
    Audio that is billed by its length and not by tokens costs `audio_nusd_per_mseconds` per million seconds.
    """

    image_nusd: int = 0
    image_tokens: int | None = None
    request_nusd: int = 0
    audio_nusd_per_mseconds: int = 0
    tiers: tuple[Tier, ...] = ()
    source: str = ""


class Usage(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Tokens of one call as the provider counted them.

    `cached`, `cache_write` and `audio_input` are parts of `prompt`, `reasoning` and `audio_output` of `completion`.
    Audio that is billed by its length is in no count of tokens.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    cache_write_tokens: int = 0
    audio_input_tokens: int = 0
    audio_output_tokens: int = 0
    audio_seconds: int = 0

    @property
    def is_sane(self) -> bool:
        """Whether the counts can be believed: none negative, none absurd, no part larger than its whole."""
        prompt, completion = self.prompt_tokens, self.completion_tokens
        return (
            0 <= self.cached_tokens <= prompt <= MAX_TOKENS
            and 0 <= self.reasoning_tokens <= completion <= MAX_TOKENS
            and 0 <= self.cache_write_tokens <= prompt
            and 0 <= self.audio_input_tokens <= prompt
            and 0 <= self.audio_output_tokens <= completion
            and 0 <= self.audio_seconds <= MAX_TOKENS
        )


def cost_nusd(price: Price, usage: Usage, *, images: int = 0) -> int:
    """Cost of one call in nUSD, rounded up once over the sum of its components. `usage` must be sane.

    Images are the caller's to count: no provider reports them. Half a microsecond where tokens are plain text.
    """
    rates = _rates(price, usage.prompt_tokens) if price.tiers else price
    total = usage.prompt_tokens * rates.input_nusd_per_mtok + usage.completion_tokens * rates.output_nusd_per_mtok
    if (
        usage.cached_tokens
        or usage.reasoning_tokens
        or usage.cache_write_tokens
        or usage.audio_input_tokens
        or usage.audio_output_tokens
    ):
        total += _extra(rates, usage)
    if usage.audio_seconds:
        total += usage.audio_seconds * price.audio_nusd_per_mseconds
    return -(-total // TOKENS_PER_MTOK) + price.request_nusd + images * price.image_nusd


def cost_at_most(
    price: Price,
    prompt_tokens: int,
    completion_tokens: int,
    *,
    images: int = 0,
    audio_seconds: int = 0,
    has_audio: bool = True,
) -> int:
    """The most that any call within these bounds can cost, however its tokens split and whatever tier they reach.

    `has_audio` of False: neither prompt nor answer can hold audio, so its prices do not count.
    """
    input_rate, output_rate = dearest(price, prompt_tokens, has_audio=has_audio)
    total = prompt_tokens * input_rate + completion_tokens * output_rate
    total += audio_seconds * price.audio_nusd_per_mseconds
    return -(-total // TOKENS_PER_MTOK) + price.request_nusd + images * price.image_nusd


def dearest(price: Price, prompt_tokens: int, *, has_audio: bool = True) -> tuple[int, int]:
    """The dearest a prompt token and a completion token can be in a call with at most so many prompt tokens."""
    input_rate, output_rate = _dearest(price, has_audio)
    if not price.tiers:
        return input_rate, output_rate
    for tier in price.tiers:
        if prompt_tokens <= tier.above_tokens:
            break
        # A tier may be cheaper than what is below it, and a prompt may be shorter than its bound.
        tier_input, tier_output = _dearest(tier, has_audio)
        input_rate, output_rate = max(input_rate, tier_input), max(output_rate, tier_output)
    return input_rate, output_rate


def _dearest(rates: Rates, has_audio: bool) -> tuple[int, int]:
    into, out = rates.input_nusd_per_mtok, rates.output_nusd_per_mtok
    if (cached := rates.cached_input_nusd_per_mtok) is not None and cached > into:
        into = cached
    if (written := rates.cache_write_nusd_per_mtok) is not None and written > into:
        into = written
    if (reasoned := rates.reasoning_nusd_per_mtok) is not None and reasoned > out:
        out = reasoned
    if has_audio:
        into = max(into, rates.audio_input_nusd_per_mtok or 0)
        out = max(out, rates.audio_output_nusd_per_mtok or 0)
    return into, out


def _rates(price: Price, prompt_tokens: int) -> Rates:
    found: Rates = price
    for tier in price.tiers:
        if prompt_tokens <= tier.above_tokens:
            break
        found = tier
    return found


def _extra(rates: Rates, usage: Usage) -> int:
    """What the parts that have a price of their own cost more, or less, than plain text.

    No provider says how its parts overlap (cached audio is both), so each token counts once, as the part that is
    listed first here, which is the one that is the dearest wherever these prices exist.
    """
    extra = 0
    left = usage.prompt_tokens
    for tokens, rate in (
        (usage.audio_input_tokens, rates.audio_input_nusd_per_mtok),
        (usage.cache_write_tokens, rates.cache_write_nusd_per_mtok),
        (usage.cached_tokens, rates.cached_input_nusd_per_mtok),
    ):
        if tokens and rate is not None:
            taken = min(tokens, left)
            left -= taken
            extra += taken * (rate - rates.input_nusd_per_mtok)
    left = usage.completion_tokens
    for tokens, rate in (
        (usage.audio_output_tokens, rates.audio_output_nusd_per_mtok),
        (usage.reasoning_tokens, rates.reasoning_nusd_per_mtok),
    ):
        if tokens and rate is not None:
            taken = min(tokens, left)
            left -= taken
            extra += taken * (rate - rates.output_nusd_per_mtok)
    return extra
