"""A call's spans, read back through the exporter's own encoding: each says what the record says."""

from typing import Any

import pytest
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans

from gateway.domain.call import Attempt, CallRecord
from gateway.domain.errors import FaultKind
from gateway.domain.money import Usage
from gateway.domain.trace import TracedCall
from gateway.telemetry.gen_ai import providers_of
from gateway.telemetry.otlp_metrics import resource_of
from gateway.telemetry.otlp_traces import spans_of
from tests.collector import CLIENT, SERVER, Span, spans_in
from tests.planning import plan_of

TRACE, CALLER, OWN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7", "b7ad6b7169203331"
FIRST, SECOND = "00000000000000f1", "00000000000000f2"
AT_MS = 1_763_700_000_123
IS_REMOTE = 0x200


def attempt(ref: str = "mistral/ft:qa", *, span_id: str = FIRST, at: int = 0, ms: float = 10.0, **more: Any) -> Attempt:
    return Attempt(ref=ref, started_ms=at, duration_ms=ms, span_id=span_id, **more)


def record(*attempts: Attempt, **fields: Any) -> CallRecord:
    given = {"status": 200, "duration_ms": 30.5, **fields}
    return CallRecord(id="req-1", at_ms=AT_MS, env="dev", attempts=list(attempts), trace_id=TRACE, span_id=OWN, **given)


def spans(traced: CallRecord | TracedCall) -> list[Span]:
    found = traced if isinstance(traced, TracedCall) else TracedCall(traced)
    built = spans_of(found, resource_of("dev"), providers_of(plan_of()))
    return spans_in(encode_spans(built).SerializeToString())


def test_a_call_is_a_server_span_with_a_client_span_for_each_attempt() -> None:
    failed = attempt(at=1, ms=9.25, fault=FaultKind.SERVER, status=503)
    answered = attempt("openai/gpt-4o", span_id=SECOND, at=12, ms=18.0, status=200, cost_nusd=1_500_000)
    call, first, second = spans(
        record(
            failed,
            answered,
            parent_span_id=CALLER,
            agent="qa_agent",
            variant="finetuned",
            bucket=17,
            share_bps=2_500,
            operation="inference",
            rule="orders",
            model_answered="gpt-4o-2024-08-06",
            finish_reason="stop",
            usage=Usage(prompt_tokens=11, completion_tokens=7),
            is_fallback=True,
            cost_nusd=1_500_000,
            overhead_ms=0.75,
        )
    )
    assert {span.trace_id for span in (call, first, second)} == {TRACE}
    assert (call.id, call.parent_id, call.kind) == (OWN, CALLER, SERVER)
    assert [(span.id, span.parent_id, span.kind) for span in (first, second)] == [
        (FIRST, OWN, CLIENT),
        (SECOND, OWN, CLIENT),
    ]
    assert [span.name for span in (call, first, second)] == [
        "POST /v1/chat/completions",
        "chat ft:qa",
        "chat gpt-4o",
    ]
    # The caller's span is another process', ours is not.
    assert [bool(span.flags & IS_REMOTE) for span in (call, first, second)] == [True, False, False]
    began_ns = AT_MS * 1_000_000
    assert [(span.start_ns - began_ns, span.end_ns - began_ns) for span in (call, first, second)] == [
        (0, 30_500_000),
        (1_000_000, 10_250_000),
        (12_000_000, 30_000_000),
    ]
    assert [span.is_error for span in (call, first, second)] == [False, True, False]
    assert call.attributes == {
        "http.request.method": "POST",
        "http.route": "/v1/chat/completions",
        "url.path": "/v1/chat/completions",
        "url.scheme": "http",
        "http.response.status_code": 200,
        "gateway.call.id": "req-1",
        "gateway.agent": "qa_agent",
        "gateway.variant": "finetuned",
        "gateway.bucket": 17,
        "gateway.share": 0.25,
        "gateway.operation": "inference",
        "gateway.route.rule": "orders",
        "gateway.attempts": 2,
        "gateway.fallback": True,
        "gateway.client_left": False,
        "gateway.cost_usd": 0.0015,
        "gateway.overhead_ms": 0.75,
    }
    assert first.attributes == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "mistral_ai",
        "gen_ai.request.model": "ft:qa",
        "error.type": "server",
        "http.response.status_code": 503,
        "gateway.cost_usd": 0.0,
    }
    assert second.attributes == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "openai",
        "gen_ai.request.model": "gpt-4o",
        "gen_ai.response.model": "gpt-4o-2024-08-06",
        "gen_ai.response.finish_reasons": ["stop"],
        "gen_ai.usage.input_tokens": 11,
        "gen_ai.usage.output_tokens": 7,
        "http.response.status_code": 200,
        "gateway.cost_usd": 0.0015,
    }


def test_a_call_without_a_caller_begins_its_trace() -> None:
    (call,) = spans(record())
    assert (call.parent_id, call.flags & IS_REMOTE) == ("", 0)


def test_the_callers_state_goes_with_every_span_as_it_came() -> None:
    state = "rojo=00f067aa0ba902b7,congo=t61rcWkgMzE,1a@vendor=x"
    assert [span.state for span in spans(TracedCall(record(attempt()), state=state))] == [state] * 2
    assert [span.state for span in spans(record(attempt()))] == [""] * 2


@pytest.mark.parametrize(
    ("status", "error", "is_error", "error_type"),
    [
        (200, "", False, None),
        # A caller's mistake is no error of the server's, say the conventions.
        (404, "model_not_found", False, None),
        (429, "budget_exceeded", False, None),
        (500, "internal_error", True, "internal_error"),
        (502, "their_own_code", True, "upstream_error"),
        (0, "", False, None),
    ],
)
def test_only_what_the_server_did_wrong_is_an_error_of_its_span(
    status: int, error: str, is_error: bool, error_type: str | None
) -> None:
    (call,) = spans(record(status=status, error=error))
    assert (call.is_error, call.attributes.get("error.type")) == (is_error, error_type)
    assert call.attributes.get("http.response.status_code") == (status or None)
    assert call.attributes.get("gateway.error") == (error or None)


def test_a_stream_that_broke_off_has_failed_although_it_began_well() -> None:
    broken = attempt(fault=FaultKind.CUT, status=200)
    call, client = spans(record(broken, stream=True, first_chunk_ms=4.0, status=502, error="upstream_cut"))
    # Its head had left with a 200.
    assert (call.is_error, call.attributes["http.response.status_code"]) == (True, 200)
    assert (client.is_error, client.attributes["error.type"]) == (True, "cut")


@pytest.mark.parametrize(
    ("first_chunk_ms", "place", "waited_s", "at_ns"),
    [
        (20.0, 1, 0.02, 20_000_000),  # Joined: the second only went on.
        (130.5, 2, 0.0305, 130_500_000),
        (100.0, 2, 0.0, 100_000_000),
    ],
)
def test_the_first_chunk_is_an_event_of_the_attempt_that_brought_it(
    first_chunk_ms: float, place: int, waited_s: float, at_ns: int
) -> None:
    both = attempt(ms=90.0, fault=FaultKind.CUT), attempt("mistral/base", span_id=SECOND, at=100, ms=50.0)
    found = spans(record(*both, stream=True, first_chunk_ms=first_chunk_ms))
    assert [(name, at - AT_MS * 1_000_000) for name, at in found[place].events] == [("first_chunk", at_ns)]
    assert found[place].attributes["gen_ai.response.time_to_first_chunk"] == pytest.approx(waited_s)
    assert all(span.attributes["gen_ai.request.stream"] is True for span in found[1:])
    assert not any(span.events for number, span in enumerate(found) if number != place)


def test_a_start_that_was_rounded_up_is_not_a_wait_below_zero() -> None:
    _, client = spans(record(attempt(at=1), stream=True, first_chunk_ms=0.6))
    assert client.attributes["gen_ai.response.time_to_first_chunk"] == 0
    assert client.events == [("first_chunk", client.start_ns)]


def test_what_was_asked_is_told_of_every_attempt_and_texts_of_the_last_only() -> None:
    both = attempt(fault=FaultKind.RESET), attempt("mistral/base", span_id=SECOND, at=10)
    asked = {"max_tokens": 64, "temperature": 0.7, "seed": 5}
    call, first, second = spans(TracedCall(record(*both), asked=asked, prompt='[{"role":"user"}]', answer="[]"))
    for span in (first, second):
        assert {name: span.attributes[f"gen_ai.request.{name}"] for name in asked} == asked
    assert second.attributes["gen_ai.input.messages"] == '[{"role":"user"}]'
    assert second.attributes["gen_ai.output.messages"] == "[]"
    assert not any("messages" in name for span in (call, first) for name in span.attributes)


def test_without_texts_handed_in_there_are_none() -> None:
    for span in spans(record(attempt())):
        assert not any("messages" in name for name in span.attributes)


def test_money_in_doubt_is_marked() -> None:
    _, client = spans(record(attempt(fault=FaultKind.RESET, cost_nusd=2_000, is_in_doubt=True)))
    assert (client.attributes["gateway.cost_usd"], client.attributes["gateway.cost_in_doubt"]) == (2e-6, True)


@pytest.mark.parametrize(
    ("ref", "provider", "model"),
    [
        ("openai/never-heard-of", "openai", "never-heard-of"),
        ("unknown/a/b", "unknown", "a/b"),
    ],
)
def test_a_model_that_only_its_caller_named_is_told_as_it_was_named(ref: str, provider: str, model: str) -> None:
    _, client = spans(record(attempt(ref)))
    assert (client.attributes["gen_ai.provider.name"], client.attributes["gen_ai.request.model"]) == (provider, model)
    assert client.name == f"chat {model}"
