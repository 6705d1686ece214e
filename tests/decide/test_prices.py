"""The first layer that knows a price gives it, and what nobody knows stays unknown."""

import pytest

from gateway.decide.prices import PriceBook, price_of
from gateway.domain.money import Price, Tier
from gateway.domain.reading import Usd
from gateway.domain.settings import PriceEntry, TierEntry


def entry(usd: int, source: str = "") -> PriceEntry:
    return PriceEntry(input_usd_per_mtok=Usd(usd), output_usd_per_mtok=Usd(usd + 1), source=source)


def of_litellm(nusd: int) -> Price:
    return Price(input_nusd_per_mtok=nusd, output_nusd_per_mtok=nusd, source="litellm 1")


REF = "mistral/ft:x"
LAYERS = ({REF: entry(10)}, {REF: entry(30)}, {"mistral/ft:x": of_litellm(40)})


@pytest.mark.parametrize(
    ("policy", "own", "config", "litellm_map", "nusd", "source"),
    [
        (LAYERS[0], entry(20), LAYERS[1], LAYERS[2], 10, "policy"),
        ({}, entry(20), LAYERS[1], LAYERS[2], 20, "agent"),
        ({}, None, LAYERS[1], LAYERS[2], 30, "config.toml"),
        ({}, None, {}, LAYERS[2], 40, "litellm 1"),
        ({"mistral/*": entry(11)}, entry(20), LAYERS[1], LAYERS[2], 11, "policy"),
        ({"openai/*": entry(11)}, None, LAYERS[1], LAYERS[2], 30, "config.toml"),
    ],
)  # fmt: skip
def test_the_layers_are_asked_in_order(policy, own, config, litellm_map, nusd: int, source: str) -> None:  # type: ignore[no-untyped-def]
    found = PriceBook(policy, config, litellm_map).find(REF, "mistral", own)
    assert found is not None
    assert (found.input_nusd_per_mtok, found.source) == (nusd, source)


def test_what_nobody_knows_is_unknown_and_not_free() -> None:
    assert PriceBook({}, {"mistral/*": entry(1)}, {"gpt-4o": of_litellm(1)}).find("openai/gpt-9", "openai") is None


def test_an_exact_name_beats_a_pattern_and_the_longer_pattern_the_shorter() -> None:
    patterns = {"*": entry(1), "mistral/*": entry(2), "mistral/ft:*": entry(3), "mistral/ft:x": entry(4)}
    book = PriceBook({}, patterns, {})
    for ref, nusd in {REF: 4, "mistral/ft:y": 3, "mistral/small": 2, "openai/gpt": 1}.items():
        found = book.find(ref, "openai")
        assert found is not None
        assert found.input_nusd_per_mtok == nusd


def test_patterns_tell_capitals_apart_and_match_whole_names() -> None:
    book = PriceBook({}, {"mistral/ft:*": entry(1)}, {})
    assert book.find("Mistral/ft:x", "mistral") is None
    assert book.find("x-mistral/ft:x", "mistral") is None


@pytest.mark.parametrize(
    ("ref", "kind", "is_known"),
    [
        ("openai/gpt-4o", "openai", True),
        ("azure/gpt-4o", "openai", True),
        ("mistral/small", "mistral", True),
        ("eu/small", "mistral", True),
        # A server of one's own may call its model whatever it likes: that name says nothing about its price.
        ("vllm/gpt-4o", "compatible", False),
        ("sim/gpt-4o", "simulator", False),
        ("mistral/gpt-4o", "mistral", False),
    ],
)
def test_litellm_s_names_hold_for_the_provider_s_own_kind_only(ref: str, kind: str, is_known: bool) -> None:
    book = PriceBook({}, {}, {"gpt-4o": of_litellm(5), "mistral/small": of_litellm(6)})
    assert (book.find(ref, kind) is not None) is is_known


def test_a_written_price_as_integers() -> None:
    written = PriceEntry(
        input_usd_per_mtok=Usd(800), output_usd_per_mtok=Usd(900), cached_input_usd_per_mtok=Usd(80),
        request_usd=Usd(7), source="the page",
    )  # fmt: skip
    assert price_of(written, "policy") == Price(
        input_nusd_per_mtok=800, output_nusd_per_mtok=900, cached_input_nusd_per_mtok=80, request_nusd=7,
        source="policy: the page",
    )  # fmt: skip
    assert price_of(entry(1), "policy").cached_input_nusd_per_mtok is None


def test_every_written_figure_reaches_the_price() -> None:
    tiers = [
        TierEntry(above_tokens=100, input_usd_per_mtok=Usd(10), output_usd_per_mtok=Usd(20)),
        TierEntry(
            above_tokens=200, input_usd_per_mtok=Usd(30), output_usd_per_mtok=Usd(40), cached_input_usd_per_mtok=Usd(3),
            audio_input_usd_per_mtok=Usd(50),
        ),
    ]  # fmt: skip
    written = PriceEntry(
        input_usd_per_mtok=Usd(1), output_usd_per_mtok=Usd(2), cached_input_usd_per_mtok=Usd(0),
        cache_write_usd_per_mtok=Usd(3), reasoning_usd_per_mtok=Usd(4), audio_input_usd_per_mtok=Usd(5),
        audio_output_usd_per_mtok=Usd(6), image_usd=Usd(7), image_tokens=0, request_usd=Usd(8),
        audio_usd_per_minute=Usd(4_000_000), tiers=tiers,
    )  # fmt: skip
    assert price_of(written, "policy") == Price(
        input_nusd_per_mtok=1, output_nusd_per_mtok=2, cached_input_nusd_per_mtok=0, cache_write_nusd_per_mtok=3,
        reasoning_nusd_per_mtok=4, audio_input_nusd_per_mtok=5, audio_output_nusd_per_mtok=6, image_nusd=7,
        image_tokens=0, request_nusd=8, audio_nusd_per_mseconds=66_666_666_667, source="policy",
        tiers=(
            # What a tier leaves out is as its own text; audio is as below it.
            Tier(above_tokens=100, input_nusd_per_mtok=10, output_nusd_per_mtok=20, audio_input_nusd_per_mtok=5,
                 audio_output_nusd_per_mtok=6),
            Tier(above_tokens=200, input_nusd_per_mtok=30, output_nusd_per_mtok=40, cached_input_nusd_per_mtok=3,
                 audio_input_nusd_per_mtok=50, audio_output_nusd_per_mtok=6),
        ),
    )  # fmt: skip


def test_a_finetuned_model_of_openai_is_priced_by_its_base() -> None:
    book = PriceBook({}, {}, {"ft:gpt-4o": of_litellm(9), "ft:gpt": of_litellm(1)})
    found = book.find("openai/ft:gpt-4o:acme:support:a1", "openai")
    assert found is not None
    assert found.input_nusd_per_mtok == 9
    assert book.find("openai/ft:gpt-5:acme::a1", "openai") is None
    assert book.find("mistral/ft:gpt-4o:acme::a1", "mistral") is None
