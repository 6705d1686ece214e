"""`gateway prices`: what is known, from where, and what is missing, to a person and to a program."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from gateway.cli.prices import prices
from tests.planning import ROOT

CONFIG = """
[upstreams.m]
kind = "compatible"
base_url = "http://127.0.0.1:1/v1"
[agents.qa]
finetuned = "m/ft:qa"
baseline  = "m/base"
fallbacks = ["m/other[1]"]
prices.finetuned = { input_usd_per_mtok = "0.80", output_usd_per_mtok = "1.60", source = "our contract" }
[agents.law]
finetuned = "m/ft:law"
baseline  = "m/base"
[prices."m/base"]
input_usd_per_mtok = "0.20"
output_usd_per_mtok = "0.30"
cached_input_usd_per_mtok = "0.02"
request_usd = "0.001"
audio_usd_per_minute = "0.004"
image_tokens = 900
tiers = [{ above_tokens = 200000, input_usd_per_mtok = "0.40", output_usd_per_mtok = "0.60", reasoning_usd_per_mtok = "0.7" }]
[prices."m/ft:l*"]
input_usd_per_mtok = "1"
output_usd_per_mtok = "2"
[prices."never/used"]
input_usd_per_mtok = "7"
output_usd_per_mtok = "7"
"""  # noqa: E501
CAP = '[[caps]]\nper = "day"\nusd = "5"\n'


@pytest.fixture
def told(tmp_path: Path) -> Any:
    """`gateway prices` on CONFIG under a policy."""
    (tmp_path / "policies").mkdir()
    (tmp_path / "config.toml").write_text(CONFIG)
    (tmp_path / "policies" / "routing.toml").write_text('default_agent = "qa"\n')

    def tell(policy: str, *arguments: str) -> Result:
        (tmp_path / "policies" / "test.toml").write_text(policy)
        where = ["--config", str(tmp_path / "config.toml"), "--policies", str(tmp_path / "policies"), "--env", "test"]
        return CliRunner().invoke(prices, [*where, *arguments], catch_exceptions=False)

    return tell


def models(result: Result) -> dict[str, Any]:
    return {row["model"]: row for row in json.loads(result.stdout)["models"]}


def test_every_model_in_use_is_told_once_with_its_source(told: Any) -> None:
    result = told("", "--json")
    found = models(result)
    assert result.exit_code == 0
    assert list(found) == ["m/ft:qa", "m/base", "m/other[1]", "m/ft:law"]
    assert found["m/ft:qa"]["price"] == {
        "input_usd_per_mtok": "0.80", "output_usd_per_mtok": "1.60", "source": "agent: our contract",
    }  # fmt: skip
    assert found["m/base"]["agents"] == ["qa", "law"]
    assert found["m/base"]["price"] == {
        "input_usd_per_mtok": "0.20", "output_usd_per_mtok": "0.30", "cached_input_usd_per_mtok": "0.02",
        "request_usd": "0.001", "audio_usd_per_minute": "0.004", "image_tokens": 900, "source": "config.toml",
        "tiers": [{"above_tokens": 200_000, "input_usd_per_mtok": "0.40", "output_usd_per_mtok": "0.60",
                   "reasoning_usd_per_mtok": "0.70"}],
    }  # fmt: skip
    assert found["m/ft:law"]["price"]["source"] == "config.toml"


def test_a_missing_price_is_no_failure_until_a_cap_in_dollars_applies(told: Any) -> None:
    without = told("", "--json")
    assert (without.exit_code, models(without)["m/other[1]"]["price"]) == (0, None)
    under = told(CAP, "--json")
    assert under.exit_code == 1
    row = models(under)["m/other[1]"]
    assert row["is_refused"]
    assert row["fix"].startswith('[prices."m/other[1]"] in config.toml')
    assert "5.00 usd per day" in row["cap"]
    assert "m/other[1]" in under.stderr


@pytest.mark.parametrize(
    ("policy", "status"),
    [
        (CAP.replace('usd = "5"', "tokens = 5"), 0),
        (CAP + 'only = { agent = ["law"] }', 0),
        (CAP + 'only = { agent = ["qa"] }', 1),
        (CAP + 'only = { model = ["m/base"] }', 0),
        (CAP + 'only = { model = ["m/other[1]"] }', 1),
        (CAP + 'scope = "user"', 1),
        (CAP + "[models]\nfallback_enabled = false", 0),
        (CAP + '[prices."m/*"]\ninput_usd_per_mtok = "1"\noutput_usd_per_mtok = "1"', 0),
        (CAP + 'over_pct = 50\nuse = "m/cheap"', 1),
    ],
)
def test_the_status_says_whether_any_call_would_be_refused(told: Any, policy: str, status: int) -> None:
    assert told(policy).exit_code == status


def test_a_policy_without_finetuned_models_leaves_them_out(told: Any) -> None:
    result = told("[models]\nuse_finetuned = false", "--json")
    assert list(models(result)) == ["m/base", "m/other[1]"]


def test_all_adds_what_is_written_and_not_used(told: Any) -> None:
    found = models(told('[prices."x/*"]\ninput_usd_per_mtok = "9"\noutput_usd_per_mtok = "9"', "--json", "--all"))
    assert {"x/*", "m/ft:l*", "never/used"} <= set(found)
    assert found["x/*"]["price"]["source"] == "policy"
    rows = json.loads(told("", "--json", "--all").stdout)["models"]
    assert [row["model"] for row in rows].count("m/base") == 1


def test_the_table_says_it_to_a_person(told: Any) -> None:
    text = " ".join(told(CAP).stdout.split())
    for said in ("m/other[1] MISSING", "calls are refused", "0.20 0.30 0.02", "request 0.001 each",
                 "above 200000 tokens: 0.40 in, 0.60 out, reasoning 0.70", "agent: our contract",
                 "audio 0.004 a minute"):  # fmt: skip
        assert said in text


@pytest.mark.parametrize("env", ["dev", "staging", "production"])
def test_every_shipped_model_has_a_price(env: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    result = CliRunner().invoke(prices, ["--env", env], catch_exceptions=False)
    assert (result.exit_code, "MISSING" in result.output) == (0, False)
