"""A traced call as OpenTelemetry's spans: a SERVER span for the call, and in it a CLIENT span for each attempt.

It is made of the SDK's public data class, without its tracer: all is known when a call has ended, and nothing is paid
for before. Names are those of the HTTP conventions, of those for generative AI (see gen_ai.py), and our own under
`gateway.`. The invariant: a span says what the journal's record says, and no text but that which it was handed.
"""

from collections.abc import Mapping
from typing import Any

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags, TraceState

from gateway.domain.call import Attempt, CallRecord
from gateway.domain.errors import CODES
from gateway.domain.money import NUSD_PER_USD
from gateway.domain.settings import split_ref
from gateway.domain.trace import TracedCall
from gateway.telemetry.otlp_metrics import SCOPE

PATH = "/v1/chat/completions"
FIRST_CHUNK = "first_chunk"
_BPS = 10_000
_NS_PER_MS = 1_000_000


def spans_of(traced: TracedCall, resource: Resource, providers: Mapping[str, str]) -> list[ReadableSpan]:
    """The spans of one call, the call's own first. `providers` are named as in `gen_ai.providers_of`."""
    record = traced.record
    trace_id, began_ns = int(record.trace_id, 16), record.at_ms * _NS_PER_MS
    state = TraceState.from_header([traced.state]) if traced.state else TraceState()

    def context(span_id: str, *, is_remote: bool = False) -> SpanContext:
        return SpanContext(trace_id, int(span_id, 16), is_remote, TraceFlags(TraceFlags.SAMPLED), state)

    own = context(record.span_id)
    is_failed = record.status >= 500
    call = ReadableSpan(
        name=f"POST {PATH}",
        context=own,
        parent=context(record.parent_span_id, is_remote=True) if record.parent_span_id else None,
        resource=resource,
        attributes=_of_call(record),
        kind=SpanKind.SERVER,
        # What the caller did wrong is no error of ours, say the conventions.
        status=Status(StatusCode.ERROR if is_failed else StatusCode.UNSET),
        start_time=began_ns,
        end_time=began_ns + _ns(record.duration_ms),
        instrumentation_scope=SCOPE,
    )
    first = _first(record)
    spans = [call]
    for attempt in record.attempts:
        start_ns = began_ns + _ns(attempt.started_ms)
        first_ns = began_ns + _ns(record.first_chunk_ms or 0.0)
        spans.append(
            ReadableSpan(
                name=f"chat {split_ref(attempt.ref)[1]}",
                context=context(attempt.span_id),
                parent=own,
                resource=resource,
                attributes=_of_attempt(attempt, traced, providers, is_first=attempt is first),
                events=[Event(FIRST_CHUNK, timestamp=max(first_ns, start_ns))] if attempt is first else [],
                kind=SpanKind.CLIENT,
                status=Status(StatusCode.UNSET if attempt.fault is None else StatusCode.ERROR),
                start_time=start_ns,
                end_time=start_ns + _ns(attempt.duration_ms),
                instrumentation_scope=SCOPE,
            )
        )
    return spans


def _of_call(record: CallRecord) -> dict[str, Any]:
    # A stream's head has left by the time that its end is known.
    status = 200 if record.stream and record.first_chunk_ms is not None else record.status
    found = {
        "http.request.method": "POST",
        "http.route": PATH,
        "url.path": PATH,
        "url.scheme": "http",
        "http.response.status_code": status or None,
        "error.type": _error_type(record) if record.status >= 500 else None,
        "gateway.call.id": record.id,
        "gateway.agent": record.agent or None,
        "gateway.variant": record.variant,
        "gateway.bucket": record.bucket,
        "gateway.share": None if record.share_bps is None else record.share_bps / _BPS,
        "gateway.operation": record.operation,
        "gateway.route.rule": record.rule or None,
        "gateway.attempts": len(record.attempts),
        "gateway.fallback": record.is_fallback,
        "gateway.error": record.error or None,
        "gateway.client_left": record.client_left,
        "gateway.cost_usd": record.cost_nusd / NUSD_PER_USD,
        "gateway.overhead_ms": record.overhead_ms,
    }
    return {name: value for name, value in found.items() if value is not None}


def _of_attempt(
    attempt: Attempt, traced: TracedCall, providers: Mapping[str, str], *, is_first: bool
) -> dict[str, Any]:
    record = traced.record
    upstream, model = split_ref(attempt.ref)
    provider = providers.get(attempt.ref) or providers.get(upstream) or upstream
    is_last = attempt is record.attempts[-1]
    usage = record.usage if is_last and attempt.fault is None else None
    is_answer = is_last and attempt.fault is None
    waited_ms = max(0.0, (record.first_chunk_ms or 0.0) - attempt.started_ms)
    found = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": provider,
        "gen_ai.request.model": model,
        "gen_ai.request.stream": record.stream or None,
        **{f"gen_ai.request.{name}": value for name, value in traced.asked.items()},
        "gen_ai.response.model": (record.model_answered or None) if is_answer else None,
        "gen_ai.response.finish_reasons": [record.finish_reason] if is_answer and record.finish_reason else None,
        "gen_ai.response.time_to_first_chunk": waited_ms / 1000 if is_first else None,
        "gen_ai.usage.input_tokens": usage.prompt_tokens if usage is not None else None,
        "gen_ai.usage.output_tokens": usage.completion_tokens if usage is not None else None,
        "gen_ai.input.messages": (traced.prompt or None) if is_last else None,
        "gen_ai.output.messages": (traced.answer or None) if is_last else None,
        "error.type": str(attempt.fault) if attempt.fault is not None else None,
        "http.response.status_code": attempt.status or None,
        "gateway.cost_usd": attempt.cost_nusd / NUSD_PER_USD,
        "gateway.cost_in_doubt": attempt.is_in_doubt or None,
    }
    return {name: value for name, value in found.items() if value is not None}


def _first(record: CallRecord) -> Attempt | None:
    """The attempt that brought a stream's first chunk: the last of those that had begun by then."""
    first_ms = record.first_chunk_ms
    if first_ms is None or not record.attempts:
        return None
    # `started_ms` is rounded, so that it may be half a millisecond late.
    begun = [attempt for attempt in record.attempts if attempt.started_ms <= first_ms]
    return begun[-1] if begun else record.attempts[0]


def _error_type(record: CallRecord) -> str:
    """A provider's own codes are its to choose, so they are one here, as in the metrics; `gateway.error` has them."""
    return record.error if record.error in CODES else "upstream_error"


def _ns(duration_ms: float) -> int:
    return round(max(0.0, duration_ms) * _NS_PER_MS)
