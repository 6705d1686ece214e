"""Money is exact: it adds up to the last nano-dollar, and rounding is up, once per call."""

from decimal import ROUND_CEILING, Decimal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.domain.money import (
    MAX_NUSD,
    MAX_TOKENS,
    NUSD_PER_USD,
    Price,
    Tier,
    Usage,
    cost_at_most,
    cost_nusd,
    format_usd,
    nusd_from_usd,
)

AMOUNTS = st.integers(0, MAX_NUSD - 1)
COUNTS = st.integers(0, MAX_TOKENS)
RATES = st.integers(0, 10**13)


@pytest.mark.parametrize(
    ("text", "nusd"),
    [
        ("0", 0),
        ("0.0", 0),
        ("20", 20 * NUSD_PER_USD),
        ("0.80", 800_000_000),
        ("007.5", 7_500_000_000),
        ("0.000000001", 1),
        ("0.1000000000000", 100_000_000),
        (" 5 ", 5 * NUSD_PER_USD),
        ("9007199.254740991", MAX_NUSD - 1),
    ],
)
def test_dollars_are_read_exactly(text: str, nusd: int) -> None:
    assert nusd_from_usd(text) == nusd


@pytest.mark.parametrize(
    "text",
    ["", " ", "-1", "-0", "+5", "nan", "NaN", "inf", "-inf", "Infinity", "sNaN", "1e3", "1E999999", "1e-3", "1_000",
     "1,000", "1,5", "$5", "5 usd", "0x10", ".", ".5", "5.", "1.2.3", "\u0661", "\uff15", "1\n2", "None",
     "${BUDGET}"],
)  # fmt: skip
def test_what_is_no_plain_amount_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not an amount in dollars"):
        nusd_from_usd(text)


@pytest.mark.parametrize("text", ["0.0000000001", "1.1234567891", "1." + "0" * 40 + "1"])
def test_more_than_nine_decimals_are_refused_not_rounded(text: str) -> None:
    with pytest.raises(ValueError, match="more than nine decimals"):
        nusd_from_usd(text)


@pytest.mark.parametrize("text", ["9007199.254740992", "10000000", "9" * 30, "9" * 5_000])
def test_amounts_the_books_cannot_hold_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"above the largest amount, 9007199\.254740992 dollars") as caught:
        nusd_from_usd(text)
    assert len(str(caught.value)) < 120


@pytest.mark.parametrize(
    ("nusd", "text"),
    [(0, "0.00"), (1, "0.000000001"), (1_500_000_000, "1.50"), (10**9, "1.00"), (-250_000_000, "-0.25"),
     (123_456_789, "0.123456789"), (120_000_000_000, "120.00")],
)  # fmt: skip
def test_amounts_are_written_with_two_decimals_or_as_many_as_they_have(nusd: int, text: str) -> None:
    assert format_usd(nusd) == text


@given(AMOUNTS)
def test_what_is_written_reads_back(nusd: int) -> None:
    assert nusd_from_usd(format_usd(nusd)) == nusd


@given(st.decimals(min_value=0, max_value=9_000_000, places=9))
def test_reading_agrees_with_decimal(value: Decimal) -> None:
    assert nusd_from_usd(f"{value:f}") == value * NUSD_PER_USD


@given(AMOUNTS)
def test_writing_agrees_with_decimal(nusd: int) -> None:
    assert Decimal(format_usd(nusd)) * NUSD_PER_USD == nusd


@st.composite
def usages(draw: st.DrawFn) -> Usage:
    prompt, completion = draw(COUNTS), draw(COUNTS)
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        cached_tokens=draw(st.integers(0, prompt)),
        reasoning_tokens=draw(st.integers(0, completion)),
    )


@given(usages(), RATES, RATES, st.none() | RATES, st.integers(0, 10**9))
def test_cost_is_the_exact_sum_rounded_up_once(usage: Usage, into: int, out: int, cached: int | None, fee: int) -> None:
    price = Price(
        input_nusd_per_mtok=into, output_nusd_per_mtok=out, cached_input_nusd_per_mtok=cached, request_nusd=fee
    )
    per_mtok = Decimal(1_000_000)
    exact = (
        (usage.prompt_tokens - usage.cached_tokens) * Decimal(into)
        + usage.cached_tokens * Decimal(into if cached is None else cached)
        + usage.completion_tokens * Decimal(out)
    ) / per_mtok
    assert cost_nusd(price, usage) == exact.to_integral_value(ROUND_CEILING) + fee


def test_components_are_summed_before_they_are_rounded() -> None:
    # Each of the three parts is 0.4 nUSD: rounded one by one they would make three, together they make two.
    price = Price(input_nusd_per_mtok=400_000, output_nusd_per_mtok=400_000, cached_input_nusd_per_mtok=400_000)
    assert cost_nusd(price, Usage(prompt_tokens=2, cached_tokens=1, completion_tokens=1)) == 2


def test_cost_at_the_shipped_prices() -> None:
    # $0.0008 per 1K tokens: 1,500 tokens are $0.0012.
    price = Price(input_nusd_per_mtok=nusd_from_usd("0.80"), output_nusd_per_mtok=nusd_from_usd("0.80"))
    assert format_usd(cost_nusd(price, Usage(prompt_tokens=1_000, completion_tokens=500))) == "0.0012"


def test_one_token_of_the_cheapest_model_is_not_free() -> None:
    assert cost_nusd(Price(input_nusd_per_mtok=1, output_nusd_per_mtok=0), Usage(prompt_tokens=1)) == 1
    assert cost_nusd(Price(input_nusd_per_mtok=1, output_nusd_per_mtok=0), Usage()) == 0


@given(usages(), usages(), RATES, RATES)
def test_a_bound_on_the_tokens_bounds_the_cost(some: Usage, more: Usage, into: int, out: int) -> None:
    price = Price(input_nusd_per_mtok=into, output_nusd_per_mtok=out)
    both = Usage(
        prompt_tokens=some.prompt_tokens + more.prompt_tokens,
        completion_tokens=some.completion_tokens + more.completion_tokens,
    )
    assert cost_nusd(price, some) <= cost_nusd(price, both)


RATE_FIELDS = {
    "input_nusd_per_mtok": RATES,
    "output_nusd_per_mtok": RATES,
    "cached_input_nusd_per_mtok": st.none() | RATES,
    "cache_write_nusd_per_mtok": st.none() | RATES,
    "reasoning_nusd_per_mtok": st.none() | RATES,
    "audio_input_nusd_per_mtok": st.none() | RATES,
    "audio_output_nusd_per_mtok": st.none() | RATES,
}


@st.composite
def prices(draw: st.DrawFn) -> Price:
    edges = draw(st.lists(st.integers(1, 2_000), unique=True, max_size=3))
    return draw(
        st.builds(
            Price,
            **RATE_FIELDS,
            image_nusd=st.integers(0, 10**9),
            request_nusd=st.integers(0, 10**9),
            audio_nusd_per_mseconds=RATES,
            tiers=st.tuples(*(st.builds(Tier, above_tokens=st.just(edge), **RATE_FIELDS) for edge in sorted(edges))),
        )
    )


@st.composite
def usages_within(
    draw: st.DrawFn, prompt_tokens: int, completion_tokens: int, audio_seconds: int = 0, *, has_audio: bool = True
) -> Usage:
    """Any usage that is sane, within these bounds."""
    prompt, completion = draw(st.integers(0, prompt_tokens)), draw(st.integers(0, completion_tokens))
    usage = Usage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        cached_tokens=draw(st.integers(0, prompt)),
        cache_write_tokens=draw(st.integers(0, prompt)),
        reasoning_tokens=draw(st.integers(0, completion)),
        audio_input_tokens=draw(st.integers(0, prompt)) if has_audio else 0,
        audio_output_tokens=draw(st.integers(0, completion)) if has_audio else 0,
        audio_seconds=draw(st.integers(0, audio_seconds)),
    )
    assert usage.is_sane
    return usage


@given(prices(), st.integers(0, 3_000), st.integers(0, 3_000), st.integers(0, 9), st.integers(0, 99), st.data())
def test_the_most_it_can_cost_bounds_every_split(
    price: Price, prompt: int, completion: int, images: int, seconds: int, data: st.DataObject
) -> None:
    for has_audio in (True, False):
        usage = data.draw(usages_within(prompt, completion, seconds, has_audio=has_audio))
        most = cost_at_most(price, prompt, completion, images=images, audio_seconds=seconds, has_audio=has_audio)
        assert cost_nusd(price, usage, images=images) <= most


@given(prices(), st.integers(0, 3_000), st.integers(0, 3_000))
def test_without_tiers_the_bound_is_what_the_dearest_split_costs(price: Price, prompt: int, completion: int) -> None:
    price = msgspec.structs.replace(price, tiers=())
    parts = [
        (into, of) for into in ("", "cached", "cache_write", "audio_input") for of in ("", "reasoning", "audio_output")
    ]
    costs = []
    for into, of in parts:
        split = {f"{into}_tokens": prompt} if into else {}
        split |= {f"{of}_tokens": completion} if of else {}
        costs.append(cost_nusd(price, Usage(prompt_tokens=prompt, completion_tokens=completion, **split)))
    assert cost_at_most(price, prompt, completion) == max(costs)


@given(prices(), usages_within(3_000, 3_000, 99))
def test_parts_without_a_price_of_their_own_cost_what_text_costs(price: Price, usage: Usage) -> None:
    plain = Price(
        input_nusd_per_mtok=price.input_nusd_per_mtok, output_nusd_per_mtok=price.output_nusd_per_mtok,
        request_nusd=price.request_nusd,
    )  # fmt: skip
    text = Usage(prompt_tokens=usage.prompt_tokens, completion_tokens=usage.completion_tokens)
    assert cost_nusd(plain, usage) == cost_nusd(plain, text)


FULL = Price(
    input_nusd_per_mtok=10_000_000,
    output_nusd_per_mtok=20_000_000,
    cached_input_nusd_per_mtok=1_000_000,
    cache_write_nusd_per_mtok=12_000_000,
    reasoning_nusd_per_mtok=30_000_000,
    audio_input_nusd_per_mtok=100_000_000,
    audio_output_nusd_per_mtok=200_000_000,
    image_nusd=5,
    request_nusd=7,
    audio_nusd_per_mseconds=40_000_000,
    tiers=(
        Tier(above_tokens=100, input_nusd_per_mtok=1_000_000, output_nusd_per_mtok=2_000_000),
        Tier(above_tokens=200, input_nusd_per_mtok=3_000_000, output_nusd_per_mtok=4_000_000),
    ),
)


@pytest.mark.parametrize(
    ("usage", "images", "nusd"),
    [
        (Usage(), 0, 7),
        (Usage(), 2, 17),
        (Usage(prompt_tokens=10, completion_tokens=1), 0, 7 + 100 + 20),
        (Usage(prompt_tokens=10, cached_tokens=4), 0, 7 + 60 + 4),
        (Usage(prompt_tokens=10, cached_tokens=4, cache_write_tokens=5), 0, 7 + 10 + 4 + 60),
        (Usage(prompt_tokens=10, audio_input_tokens=3), 0, 7 + 70 + 300),
        # Cached audio is counted once, as the dearer of the two.
        (Usage(prompt_tokens=10, audio_input_tokens=8, cached_tokens=8), 0, 7 + 800 + 2),
        (Usage(completion_tokens=10, reasoning_tokens=4), 0, 7 + 120 + 120),
        (Usage(completion_tokens=10, audio_output_tokens=8, reasoning_tokens=8), 0, 7 + 1_600 + 60),
        (Usage(audio_seconds=3), 0, 7 + 120),
        # At an edge the lower tier still holds; above it the whole call is at the next.
        (Usage(prompt_tokens=100), 0, 7 + 1_000),
        (Usage(prompt_tokens=101, completion_tokens=1), 0, 7 + 101 + 2),
        (Usage(prompt_tokens=200), 0, 7 + 200),
        (Usage(prompt_tokens=201, completion_tokens=1), 0, 7 + 603 + 4),
        # A tier without rates of its own for a part charges it as text.
        (Usage(prompt_tokens=201, cached_tokens=201, completion_tokens=5, reasoning_tokens=5), 0, 7 + 603 + 20),
    ],
)
def test_each_part_at_its_own_rate(usage: Usage, images: int, nusd: int) -> None:
    assert cost_nusd(FULL, usage, images=images) == nusd


@pytest.mark.parametrize(
    ("usage", "is_sane"),
    [
        (Usage(), True),
        (Usage(prompt_tokens=10, cached_tokens=10, completion_tokens=5, reasoning_tokens=5), True),
        (Usage(prompt_tokens=MAX_TOKENS, completion_tokens=MAX_TOKENS), True),
        (Usage(prompt_tokens=MAX_TOKENS + 1), False),
        (Usage(completion_tokens=MAX_TOKENS + 1), False),
        (Usage(prompt_tokens=-1), False),
        (Usage(completion_tokens=-1), False),
        (Usage(prompt_tokens=10, cached_tokens=11), False),
        (Usage(prompt_tokens=10, cached_tokens=-1), False),
        (Usage(completion_tokens=5, reasoning_tokens=6), False),
        (Usage(prompt_tokens=5, audio_input_tokens=6), False),
        (Usage(prompt_tokens=5, cache_write_tokens=6), False),
        (Usage(prompt_tokens=5, cache_write_tokens=-1), False),
        (Usage(completion_tokens=5, audio_output_tokens=6), False),
        (Usage(completion_tokens=5, audio_output_tokens=-1), False),
        (Usage(audio_seconds=-1), False),
        (Usage(prompt_tokens=5, cached_tokens=5, audio_input_tokens=5, cache_write_tokens=5), True),
    ],
)
def test_only_counts_that_can_be_true_are_believed(usage: Usage, is_sane: bool) -> None:
    assert usage.is_sane is is_sane
