"""A check passes where everybody agrees, and fails as soon as one figure on one side is another."""

from typing import Any

import msgspec
import pytest

from gateway.decide.assign import bucket_of, is_treated
from gateway.domain.call import Attempt, CallRecord
from gateway.domain.errors import FaultKind
from gateway.domain.money import Usage
from gateway.lab.agreement import Check, check_all, figures_in, figures_of
from gateway.lab.callers import Answer
from gateway.lab.questions import Conversation, Question

SALTS = {"qa_agent": "salt"}
QUESTION = Question(
    question_id=1, category="any", turns=('What is a "hot" dog, and why is it called that way?', "Why?")
)
SHARE_BPS = 5000

METRICS = """
# TYPE model_requests_total counter
model_requests_total{agent="qa_agent",model="m/base",variant="VARIANT"} 2.0
# TYPE model_fallbacks_total counter
model_fallbacks_total{agent="qa_agent",model="m/base",variant="VARIANT"} 1.0
# TYPE model_cost_usd_total counter
model_cost_usd_total{agent="qa_agent",model="m/base",variant="VARIANT"} 3e-09
# TYPE model_tokens_total counter
model_tokens_total{agent="qa_agent",direction="input",model="m/base",variant="VARIANT"} 9.0
model_tokens_total{agent="qa_agent",direction="output",model="m/base",variant="VARIANT"} 4.0
# TYPE model_latency_ms histogram
model_latency_ms_bucket{agent="qa_agent",le="+Inf",model="m/base",variant="VARIANT"} 2.0
model_latency_ms_count{agent="qa_agent",model="m/base",variant="VARIANT"} 2.0
model_latency_ms_sum{agent="qa_agent",model="m/base",variant="VARIANT"} 12.0
# TYPE gateway_upstream_faults_total counter
gateway_upstream_faults_total{kind="server",upstream="m"} 1.0
# TYPE gateway_connections gauge
gateway_connections 1.0
"""
BUCKET = bucket_of("salt", "u001")
VARIANT = "finetuned" if is_treated(BUCKET, SHARE_BPS) else "baseline"


def answer(turn: int, **fields: Any) -> Answer:
    told = {
        "text": "Because of a dachshund, as they say in Frankfurt.",
        "request_id": f"req-{turn}",
        "agent": "qa_agent",
        "variant": VARIANT,
        "model": "m/base",
        "finish_reason": "stop",
        "cost_usd": f"0.00000000{turn}",
        "prompt_tokens": 3 * turn,
        "completion_tokens": 2,
        "is_usage_known": True,
    }
    return Answer(Conversation("u001", QUESTION, stream=False, wants_usage=True), turn, **{**told, **fields})


def record(turn: int, **fields: Any) -> CallRecord:
    kept: dict[str, Any] = {
        "id": f"req-{turn}",
        "agent": "qa_agent",
        "variant": VARIANT,
        "bucket": BUCKET,
        "share_bps": SHARE_BPS,
        "model_sent": "m/base",
        "finish_reason": "stop",
        "usage": Usage(prompt_tokens=3 * turn, completion_tokens=2),
        "cost_nusd": turn,
        "cost_basis": "exact",
    }
    return CallRecord(at_ms=0, env="production", **{**kept, **fields})


FELL_BACK = {
    "is_fallback": True,
    "attempts": [Attempt(ref="m/ft", started_ms=0, fault=FaultKind.SERVER), Attempt(ref="m/base", started_ms=1)],
}


def checked(
    *, answers: list[Answer] | None = None, records: list[CallRecord] | None = None, metrics: str = METRICS,
    journal: bytes | None = None,
) -> list[Check]:  # fmt: skip
    answers = [answer(1), answer(2)] if answers is None else answers
    records = [record(1), record(2, **FELL_BACK)] if records is None else records
    journal = msgspec.json.encode(records) if journal is None else journal
    return check_all(answers, records, metrics.replace("VARIANT", VARIANT), journal, SALTS)


def failed(checks: list[Check]) -> list[int]:
    return [number for number, check in enumerate(checks) if not check.holds]


ANSWERS, IDS, TOLD, TOKENS, COSTS, ARMS, SHOWN, SILENCE = range(8)


def test_where_all_agree_every_check_holds() -> None:
    assert failed(checked()) == []


def test_where_nothing_was_compared_no_check_holds() -> None:
    assert failed(checked(answers=[], records=[], metrics="", journal=b"")) == list(range(8))


@pytest.mark.parametrize(
    "changed, found",
    [
        ({"text": ""}, [ANSWERS]),
        ({"finish_reason": ""}, [ANSWERS, TOLD]),
        ({"error": "upstream_cut"}, [ANSWERS]),
        ({"variant": "other"}, [TOLD]),
        ({"model": "m/ft"}, [TOLD]),
        ({"agent": "legal_agent"}, [TOLD]),
        ({"prompt_tokens": 7}, [TOKENS]),
        ({"completion_tokens": 3}, [TOKENS]),
        ({"cost_usd": "0.000000003"}, [COSTS]),
        ({"request_id": "req-1"}, [IDS, TOKENS, COSTS]),
        ({"request_id": ""}, [IDS, TOLD, TOKENS, COSTS]),
    ],
)
def test_a_caller_who_saw_something_else_is_noticed(changed: dict[str, Any], found: list[int]) -> None:
    assert failed(checked(answers=[answer(1), answer(2, **changed)])) == found


@pytest.mark.parametrize(
    "changed, found",
    [
        ({"id": "req-9"}, [IDS, TOLD, TOKENS, COSTS]),
        ({"usage": None}, [TOKENS, SHOWN]),
        ({"cost_nusd": 3}, [COSTS, SHOWN]),
        ({"cost_basis": "bound"}, [COSTS]),
        ({"bucket": 10_000}, [ARMS]),
        ({"bucket": None}, [ARMS]),
        ({"variant": "baseline" if VARIANT == "finetuned" else "finetuned"}, [TOLD, ARMS, SHOWN]),
        ({"stream": True}, [TOLD]),
        ({"error": "upstream_cut"}, [SHOWN]),
        ({"is_fallback": False}, [SHOWN]),
        ({"attempts": []}, [SHOWN]),
        ({"user": "u001"}, [SILENCE]),
        ({"rule": 'What is a "hot" dog, and why is it called that way?'}, [SILENCE]),
        ({"rule": "Because of a dachshund, as they say in Frankfurt."}, [SILENCE]),
    ],
)
def test_a_record_that_says_something_else_is_noticed(changed: dict[str, Any], found: list[int]) -> None:
    changed_record = record(2, **{**FELL_BACK, **changed})
    assert failed(checked(records=[record(1), changed_record])) == found


@pytest.mark.parametrize(
    "kept", [[record(1)], [record(1), record(2, **FELL_BACK), record(3)], [record(1), record(1), record(2)]],
    ids=["lost", "invented", "twice"],
)  # fmt: skip
def test_a_call_that_is_lost_or_invented_or_twice_is_noticed(kept: list[CallRecord]) -> None:
    assert {IDS, SHOWN} <= set(failed(checked(records=kept)))


def test_a_metric_that_counts_too_much_is_named() -> None:
    check = checked(metrics=METRICS.replace("} 9.0", "} 10.0"))[SHOWN]
    assert not check.holds
    assert "model_tokens_total" in check.what
    assert "10 shown, 9 in the journal" in check.what


def test_metrics_under_a_label_that_no_record_has_are_noticed() -> None:
    extra = 'model_requests_total{agent="other",model="other",variant="other"} 1.0\n# TYPE model_fallbacks_total'
    assert failed(checked(metrics=METRICS.replace("# TYPE model_fallbacks_total", extra, 1))) == [SHOWN]


def test_an_error_is_counted_once_whatever_its_code() -> None:
    text = (
        '# TYPE model_errors_total counter\nmodel_errors_total{agent="a",code="x",model="m",variant="v"} 1.0\n'
        'model_errors_total{agent="a",code="y",model="m",variant="v"} 2.0\n'
    )
    assert figures_in(text) == {("model_errors_total", "a", "m", "v"): 3}


def test_figures_of_nothing_are_none() -> None:
    assert figures_of([]) == figures_in("") == {}
