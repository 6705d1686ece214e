"""Sums that can be checked by hand."""

from typing import Any

import pytest

from gateway.domain.call import CallRecord
from gateway.domain.money import Usage
from gateway.lab.tally import Exposure, exposures, percentile, tally


def record(agent: str = "qa_agent", variant: Any = "baseline", **fields: Any) -> CallRecord:
    return CallRecord(id="req-1", at_ms=0, env="production", agent=agent, variant=variant, **fields)


@pytest.mark.parametrize(
    "values, share, expected",
    [
        ([], 0.5, 0),
        ([7], 0.5, 7),
        ([7], 0.95, 7),
        ([1, 2], 0.5, 1),
        ([3, 1, 2], 0.5, 2),
        (list(range(1, 101)), 0.5, 50),
        (list(range(1, 101)), 0.95, 95),
        (list(range(1, 21)), 0.95, 19),
        (list(range(1, 22)), 0.95, 20),
        ([1, 2, 3], 0.0, 1),
        ([1, 2, 3], 1.0, 3),
    ],
)
def test_a_percentile_is_one_of_the_values(values: list[float], share: float, expected: float) -> None:
    assert percentile(values, share) == expected


def test_each_agent_and_variant_has_one_row_and_every_call_is_in_one() -> None:
    records = [
        record(duration_ms=10, usage=Usage(prompt_tokens=5, completion_tokens=2), cost_nusd=7),
        record(duration_ms=30, usage=Usage(prompt_tokens=1, completion_tokens=1), cost_nusd=2),
        record(variant="finetuned", duration_ms=20, is_fallback=True, cost_nusd=1),
        record(agent="legal_agent", error="upstream_cut", duration_ms=5),
        record(agent="", variant=None, error="invalid_json"),
    ]
    undecided, legal, baseline, finetuned = tally(records)
    assert (undecided.agent, undecided.variant, undecided.errors) == ("-", "-", 1)
    assert (legal.agent, legal.calls, legal.errors, legal.share) == ("legal_agent", 1, 1, 1.0)
    assert (baseline.calls, baseline.input_tokens, baseline.output_tokens, baseline.cost_nusd) == (2, 6, 3, 9)
    assert (baseline.p50_ms, baseline.p95_ms, baseline.share) == (10, 30, pytest.approx(2 / 3))
    assert (finetuned.variant, finetuned.fallbacks, finetuned.input_tokens) == ("finetuned", 1, 0)
    assert undecided.calls + legal.calls + baseline.calls + finetuned.calls == len(records)


def test_no_calls_give_no_rows() -> None:
    assert tally([]) == []
    assert exposures([]) == []


def test_a_user_counts_once_however_often_they_call_and_only_inside_the_experiment() -> None:
    inside: dict[str, Any] = {"variant_from": "experiment", "share_bps": 1000}
    records = [
        record(user="a", variant="finetuned", **inside),
        record(user="a", variant="finetuned", **inside),
        record(user="b", **inside),
        record(user="c", variant="finetuned", variant_from="override", share_bps=1000),
        record(user="", variant_from="no user", share_bps=1000),
        record(agent="legal_agent", user="a", variant="finetuned", variant_from="policy"),
    ]
    assert exposures(records) == [Exposure("qa_agent", users=2, treated=1, share_bps=1000)]
