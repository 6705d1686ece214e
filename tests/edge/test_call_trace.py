"""The trace of one call, through a whole gateway: the same ids in header, record, log, span, and at the provider."""

import logging
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gateway.domain.trace import TracedCall
from gateway.telemetry.logs import IN_CALL
from tests.journey import AT_ONCE, NO_RETRIES, POLICY, WIDE_CAPS, Journey, journey
from tests.running import CHAT, chat
from tests.scripted import DONE, completion, delta, finish, refuses, says, streams, usage_chunk

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
CAME = {"traceparent": f"00-{TRACE}-{SPAN}-01", "tracestate": "vendor=1", "baggage": "tenant=7"}
PROMPTS = POLICY + AT_ONCE + WIDE_CAPS + NO_RETRIES + "[traces]\nprompts = true\n"


def traced(trip: Journey, ratio: float = 1.0) -> list[TracedCall]:
    """What is handed over for export from now on."""
    found: list[TracedCall] = []
    trip.gateway.runtime.tracing.export_to(found.append, ratio=ratio, is_parent_based=True)
    return found


def parent_of(headers: Any) -> tuple[str, str]:
    _, trace_id, span_id, _ = headers["traceparent"].split("-")
    return trace_id, span_id


@pytest.mark.parametrize("stream", [False, True])
async def test_one_call_has_the_same_ids_everywhere(tmp_path: Path, stream: bool) -> None:
    async with journey(tmp_path, says("Paris")) as trip:
        found = traced(trip)
        answer = await trip.ask(headers=CAME, stream=stream)
        ((record, state, _, prompt, shown),) = found
        assert record == trip.record
        assert answer.headers["x-request-id"] == record.id
        assert answer.headers["x-gateway-trace-id"] == record.trace_id == TRACE
        assert record.parent_span_id == SPAN
        assert state == "vendor=1"
        (attempt,) = record.attempts
        seen = trip.first.turns[0].headers
        assert parent_of(seen) == (TRACE, attempt.span_id)
        assert (seen["tracestate"], seen["baggage"]) == ("vendor=1", "tenant=7")
        assert len({SPAN, record.span_id, attempt.span_id}) == 3
        # Nobody asked for the texts.
        assert prompt == shown == ""


async def test_every_attempt_has_a_span_of_its_own_which_its_provider_hears_of(tmp_path: Path) -> None:
    async with journey(tmp_path, refuses(503), second=says("Paris"), policy=POLICY + NO_RETRIES) as trip:
        found = traced(trip)
        await trip.ask()
        (call,) = found
        first, second = call.record.attempts
        assert parent_of(trip.first.turns[0].headers) == (call.record.trace_id, first.span_id)
        assert parent_of(trip.second.turns[0].headers) == (call.record.trace_id, second.span_id)
        assert first.span_id != second.span_id


@pytest.mark.parametrize("odd", ['"seed":"7"', '"seed":1e400', '"top_p":"high"', '"presence_penalty":[]'])
async def test_what_only_the_provider_understands_is_answered_booked_and_traced(tmp_path: Path, odd: str) -> None:
    async with journey(tmp_path, refuses(200, completion())) as trip:
        found = traced(trip)
        body = msgspec.json.encode(chat())[:-1] + b"," + odd.encode() + b"}"
        async with trip.session.post(f"{trip.gateway.data_url}{CHAT}", data=body) as response:
            assert (response.status, response.headers["x-request-id"]) == (200, trip.record.id)
        (row,) = await trip.booked()
        assert row.state == "posted"
        assert [call.record.id for call in found] == [trip.record.id]


async def test_a_call_that_is_not_sampled_leaves_no_trace(tmp_path: Path) -> None:
    async with journey(tmp_path, says("Paris")) as trip:
        found = traced(trip, ratio=0.0)
        answer = await trip.ask()
        record = trip.record
        assert found == []
        assert (record.span_id, record.attempts[0].span_id) == ("", "")
        assert record.trace_id == ""
        assert "traceparent" not in trip.first.turns[0].headers
        assert "x-gateway-trace-id" not in answer.headers


async def test_without_an_exporter_a_callers_context_goes_through_unchanged(tmp_path: Path) -> None:
    async with journey(tmp_path, says("Paris")) as trip:
        await trip.ask(headers=CAME)
        assert {name: trip.first.turns[0].headers[name] for name in CAME} == CAME
        assert trip.record.trace_id == TRACE


@pytest.mark.parametrize(("context", "told"), [("none", set()), ("trace", {"traceparent", "tracestate"})])
async def test_an_upstream_hears_no_more_than_its_configuration_allows(
    tmp_path: Path, context: str, told: set[str]
) -> None:
    table = f'kind = "compatible"\nbase_url = "BASE_URL"\ntrace_context = "{context}"'
    async with journey(tmp_path, says("Paris"), first_table=table) as trip:
        traced(trip)
        await trip.ask(headers=CAME)
        assert set(CAME) & set(trip.first.turns[0].headers) == told


@pytest.mark.parametrize("came", ["", "00", "x" * 5_000, f"00-{'0' * 32}-{SPAN}-01", f"ff-{TRACE}-{SPAN}-01"])
async def test_a_malformed_context_harms_nothing_and_goes_nowhere(tmp_path: Path, came: str) -> None:
    async with journey(tmp_path, says("Paris")) as trip:
        sent = {"traceparent": came, "tracestate": "=" * 600, "baggage": ";;;"}
        assert (await trip.ask(headers=sent)).text == "Paris"
        assert not set(sent) & set(trip.first.turns[0].headers)


async def test_a_call_that_was_refused_is_traced_too(tmp_path: Path) -> None:
    async with journey(tmp_path, says("Paris")) as trip:
        found = traced(trip)
        answer = await trip.ask(model="no_such_agent")
        assert answer.status == 404
        (call,) = found
        assert (call.record.status, call.record.attempts) == (404, [])
        assert answer.headers["x-gateway-trace-id"] == call.record.trace_id


# --- Texts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
async def test_texts_are_shown_scrubbed_where_the_policy_asks_for_them(tmp_path: Path, stream: bool) -> None:
    async with journey(
        tmp_path, says("Write to", " eve@mail.example", "."), policy=PROMPTS, caps="", budget=""
    ) as trip:
        found = traced(trip)
        await trip.ask(text="I am bob@mail.example, call 415-555-2671", stream=stream, temperature=0.2)
        ((_, _, asked, prompt, answer),) = found
        assert asked == {"temperature": 0.2, "max_tokens": 64}
        text = {"type": "text", "content": "I am [email], call [phone]"}
        assert msgspec.json.decode(prompt) == [{"role": "user", "parts": [text]}]
        said = {"type": "text", "content": "Write to [email]."}
        assert msgspec.json.decode(answer) == [{"role": "assistant", "parts": [said], "finish_reason": "stop"}]


async def test_texts_of_other_agents_are_not_shown(tmp_path: Path) -> None:
    policy = PROMPTS + 'agents = ["lone_agent"]\n'
    async with journey(tmp_path, says("Paris"), policy=policy, caps="", budget="") as trip:
        found = traced(trip)
        await trip.ask()
        await trip.ask(model="lone_agent")
        other, lone = found
        assert other.prompt == other.answer == ""
        assert "Paris" in lone.answer


async def test_the_answer_of_a_stream_with_several_choices_is_not_shown_half(tmp_path: Path) -> None:
    twice = [{**delta("a"), "choices": [{"index": 1, "delta": {"content": "b"}}]}, delta("a"), finish(), usage_chunk()]
    async with journey(tmp_path, streams(*twice, DONE), policy=PROMPTS, caps="", budget="") as trip:
        found = traced(trip)
        await trip.ask(stream=True)
        assert found[0].answer == "[]"


async def test_what_is_logged_in_a_call_carries_its_ids_and_what_follows_does_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[tuple[str, str]] = []

    class Listening(logging.Handler):
        def emit(self, line: logging.LogRecord) -> None:
            call = IN_CALL.get()
            seen.append((call.id, call.trace_id) if call is not None else ("", ""))

    listening = Listening()
    logger = logging.getLogger("gateway.call")
    logger.addHandler(listening)
    try:
        async with journey(tmp_path, refuses(503), policy=POLICY + NO_RETRIES) as trip:
            caplog.set_level(logging.DEBUG, "gateway.call")
            await trip.ask(model="lone_agent", headers=CAME)
            assert seen == [(trip.record.id, TRACE)]
    finally:
        logger.removeHandler(listening)
    assert IN_CALL.get() is None
