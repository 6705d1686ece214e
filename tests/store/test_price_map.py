"""litellm's figures are read as data, exactly, and litellm stays unimported."""

import importlib.util
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import msgspec
import pytest

from gateway.domain.money import Price, Tier, Usage, cost_nusd, format_usd
from gateway.store import price_map
from gateway.store.price_map import find_price_map, load_price_map

ROOT = Path(__file__).parents[2]
needs_litellm = pytest.mark.skipif(importlib.util.find_spec("litellm") is None, reason="litellm is not installed")


@pytest.fixture(scope="module")
def prices() -> dict[str, Price]:
    return load_price_map()


@needs_litellm
@pytest.mark.parametrize(
    ("model", "low_usd", "high_usd"),
    [("gpt-4o", 1, 10), ("gpt-4o-mini", 0.05, 1), ("mistral/mistral-small-latest", 0.03, 1),
     ("mistral/mistral-large-latest", 0.3, 10)],
)  # fmt: skip
def test_known_models_cost_what_one_would_expect(
    prices: dict[str, Price], model: str, low_usd: float, high_usd: float
) -> None:
    price = prices[model]
    assert low_usd <= price.input_nusd_per_mtok / 1e9 <= high_usd
    assert price.input_nusd_per_mtok <= price.output_nusd_per_mtok <= 10 * price.input_nusd_per_mtok
    assert price.source.startswith("litellm")


@needs_litellm
def test_there_are_many_and_all_of_them_are_possible(prices: dict[str, Price]) -> None:
    assert len(prices) > 1_000
    for name, price in prices.items():
        cached = price.cached_input_nusd_per_mtok
        figures = (price.input_nusd_per_mtok, price.output_nusd_per_mtok, cached if cached is not None else 0)
        # The dearest row (a slip of the map, most likely) says 9,710 dollars per million tokens.
        assert all(0 <= figure <= 10_000 * 10**9 for figure in figures), name


@needs_litellm
def test_every_figure_is_the_map_s_decimal_and_not_its_binary_neighbour(prices: dict[str, Price]) -> None:
    path = find_price_map()
    assert path is not None
    rows = msgspec.json.decode(path.read_bytes(), type=dict[str, dict[str, msgspec.Raw]])
    checked = 0
    for name, price in prices.items():
        exact = Decimal(bytes(rows[name]["input_cost_per_token"]).decode()) * 10**15
        assert 0 <= price.input_nusd_per_mtok - exact < 1, name
        checked += 1
    assert checked == len(prices)


@needs_litellm
def test_no_finetuned_mistral_model_is_priced_so_the_config_must(prices: dict[str, Price]) -> None:
    assert not [name for name in prices if name.startswith("mistral/ft:")]


@needs_litellm
def test_a_call_at_the_map_s_price(prices: dict[str, Price]) -> None:
    price = msgspec.structs.replace(prices["gpt-4o"], input_nusd_per_mtok=2_500_000_000)
    assert format_usd(cost_nusd(price, Usage(prompt_tokens=1_000))) == "0.0025"


def test_litellm_is_not_imported() -> None:
    program = "import sys; from gateway.store.price_map import load_price_map as load; load(); "
    program += "print([name for name in sys.modules if name.partition('.')[0] == 'litellm'])"
    said = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=30, check=True
    )
    assert said.stdout == "[]\n"


def test_without_litellm_nothing_is_priced_and_nothing_fails() -> None:
    program = "import importlib.util; importlib.util.find_spec = lambda name: None\n"
    program += "from gateway.store.price_map import find_price_map, load_price_map\n"
    program += "print(find_price_map(), load_price_map())"
    said = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=30, check=True
    )
    assert said.stdout == "None {}\n"


def test_rows_that_are_no_chat_model_or_no_row_are_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {
        "sample_spec": {"mode": "one of: chat, embedding, ...", "input_cost_per_token": "a float"},
        "chat": {"mode": "chat", "input_cost_per_token": 2.5e-06, "output_cost_per_token": 1e-05},
        "cached": {"mode": "chat", "input_cost_per_token": 1.1e-07, "cache_read_input_token_cost": 0.0},
        "embedding": {"mode": "embedding", "input_cost_per_token": 1e-08},
        "priceless": {"mode": "chat"},
        "odd": {"mode": "chat", "input_cost_per_token": 3.3333333333e-10, "output_cost_per_token": 0},
        "not a row": 5,
    }
    path = tmp_path / "map.json"
    path.write_bytes(msgspec.json.encode(rows))
    monkeypatch.setattr(price_map, "find_price_map", lambda: path)
    found = load_price_map()
    assert set(found) == {"chat", "cached", "odd"}
    assert (found["chat"].input_nusd_per_mtok, found["chat"].output_nusd_per_mtok) == (2_500_000_000, 10_000_000_000)
    assert found["chat"].cached_input_nusd_per_mtok is None
    assert (found["cached"].input_nusd_per_mtok, found["cached"].cached_input_nusd_per_mtok) == (110_000_000, 0)
    # What does not come out whole is rounded up, as money that is owed is.
    assert found["odd"].input_nusd_per_mtok == 333_334


def test_everything_a_row_says_of_money_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {
        "whole": {
            "mode": "chat", "input_cost_per_token": 2e-06, "output_cost_per_token": 1e-05,
            "cache_read_input_token_cost": 2e-07, "cache_creation_input_token_cost": 2.5e-06,
            "output_cost_per_reasoning_token": 1.2e-05, "input_cost_per_audio_token": 3.2e-05,
            "output_cost_per_audio_token": 6.4e-05, "input_cost_per_image": 0.0011, "input_cost_per_request": 0.005,
            # Other services, which are not ours.
            "input_cost_per_token_priority": 4e-06, "input_cost_per_token_above_200k_tokens_priority": 9e-06,
            "cache_creation_input_token_cost_above_1hr_above_200k_tokens": 8e-06,
            "input_cost_per_token_above_400k_tokens": 8e-06, "output_cost_per_token_above_400k_tokens": 3e-05,
            "input_cost_per_token_above_200k_tokens": 4e-06, "output_cost_per_token_above_200k_tokens": 1.5e-05,
            "cache_read_input_token_cost_above_200k_tokens": 4e-07,
        },
        "half a tier": {"mode": "chat", "input_cost_per_token": 1e-06, "output_cost_per_token": 2e-06,
                        "input_cost_per_token_above_128k_tokens": 3e-06},
        "odd tier": {"mode": "chat", "input_cost_per_token": 1e-06, "input_cost_per_token_above_128k_tokens": "dear"},
        "x-search-preview": {"mode": "chat", "input_cost_per_token": 1e-06,
                             "search_context_cost_per_query": {"low": 0.025, "high": 0.05}},
        "searches if asked": {"mode": "chat", "input_cost_per_token": 1e-06,
                              "search_context_cost_per_query": {"low": 0.025}},
        "by range": {"mode": "chat", "tiered_pricing": [{"input_cost_per_token": 1e-06, "range": [0, 32000]}]},
    }  # fmt: skip
    path = tmp_path / "map.json"
    path.write_bytes(msgspec.json.encode(rows))
    monkeypatch.setattr(price_map, "find_price_map", lambda: path)
    found = load_price_map()
    nano = 10**6
    assert msgspec.structs.replace(found["whole"], source="") == Price(
        input_nusd_per_mtok=2_000 * nano, output_nusd_per_mtok=10_000 * nano, cached_input_nusd_per_mtok=200 * nano,
        cache_write_nusd_per_mtok=2_500 * nano, reasoning_nusd_per_mtok=12_000 * nano,
        audio_input_nusd_per_mtok=32_000 * nano, audio_output_nusd_per_mtok=64_000 * nano, image_nusd=1_100_000,
        request_nusd=5_000_000,
        tiers=(
            Tier(above_tokens=200_000, input_nusd_per_mtok=4_000 * nano, output_nusd_per_mtok=15_000 * nano,
                 cached_input_nusd_per_mtok=400 * nano, audio_input_nusd_per_mtok=32_000 * nano,
                 audio_output_nusd_per_mtok=64_000 * nano),
            Tier(above_tokens=400_000, input_nusd_per_mtok=8_000 * nano, output_nusd_per_mtok=30_000 * nano,
                 audio_input_nusd_per_mtok=32_000 * nano, audio_output_nusd_per_mtok=64_000 * nano),
        ),
    )  # fmt: skip
    half = found["half a tier"].tiers[0]
    assert (half.input_nusd_per_mtok, half.output_nusd_per_mtok) == (3_000 * nano, 2_000 * nano)
    assert found["x-search-preview"].request_nusd == 50_000_000
    assert found["searches if asked"].request_nusd == 0
    # What cannot be read whole is unknown, and never cheap.
    assert not {"odd tier", "by range"} & set(found)


@needs_litellm
def test_the_tiers_of_the_map_rise_and_are_many(prices: dict[str, Price]) -> None:
    tiered = [price for price in prices.values() if price.tiers]
    assert len(tiered) > 50
    for price in tiered:
        edges = [tier.above_tokens for tier in price.tiers]
        assert edges == sorted(set(edges))
        assert 32_000 <= edges[0] <= 2_000_000
