"""The books of one call: held before, settled once, recorded once, whatever the provider claims and however it ends."""

from pathlib import Path
from typing import Any

import pytest

from gateway.decide.bound import Weight
from gateway.domain.errors import FaultKind, Refused, UpstreamFault
from gateway.domain.ledger import Amounts, State
from gateway.domain.money import Usage
from gateway.edge.open_call import OpenCall
from tests.journey import NO_RETRIES, POLICY, Journey, journey
from tests.scripted import completion, delta, error_body, refuses, resets, says, streams, usage_chunk

PROMPT_NUSD, COMPLETION_NUSD = 1_000, 2_000


async def reserved(trip: Journey) -> OpenCall:
    """A call to `first/a` that holds its bound: at most 10 tokens of answer to a prompt of no bytes."""
    runtime = trip.gateway.runtime
    call = OpenCall(runtime, "req-1")
    call.record.agent = "qa_agent"
    call.purse._weight, call.purse.asked_max_tokens = Weight(text_tokens=64), 10
    await call.reserve(runtime.plan.agents["qa_agent"].baseline[0])
    return call


def held(trip: Journey) -> tuple[int, ...]:
    return tuple(account.held for account in trip.gateway.runtime.books.accounts())


async def booked(trip: Journey) -> tuple[State, Amounts]:
    """The one row of the ledger; the accounts say the same, and nothing is held."""
    (row,) = await trip.booked()
    assert held(trip) == (0, 0, 0)
    assert tuple(trip.used()) == row.amounts
    return row.state, row.amounts


BOUND = Amounts(64 * PROMPT_NUSD + 10 * COMPLETION_NUSD, 1, 74)


async def test_what_is_held_is_the_bound(tmp_path: Path) -> None:
    async with journey(tmp_path, says()) as trip:
        call = await reserved(trip)
        assert held(trip) == BOUND
        assert trip.gateway.ledger() == []
        call.finish()


async def test_whatever_breaks_in_the_telling_of_a_call_its_books_are_closed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with journey(tmp_path, says("Paris")) as trip:

        def breaks(_: object) -> None:
            raise ValueError("a bug")

        trip.gateway.runtime.tracing.export_to(breaks, ratio=1.0, is_parent_based=True)
        answer = await trip.ask()
        assert (answer.status, answer.text) == (200, "Paris")
        state, amounts = await booked(trip)
        assert (state, amounts.nusd) == ("posted", trip.record.cost_nusd)
    assert "bug: a call could not be told of" in caplog.text


async def test_the_cost_of_a_call_is_what_was_booked_of_all_its_attempts(tmp_path: Path) -> None:
    scenes = streams(delta("Pa"), usage_chunk(), error_body())
    async with journey(
        tmp_path, scenes, second=says("Paris"), policy=f'{POLICY}{NO_RETRIES}[stream]\non_cut = "hold"\n'
    ) as trip:
        await trip.ask(stream=True)
        rows = await trip.booked()
        assert [row.state for row in rows] == ["posted", "posted"]
        assert trip.record.cost_nusd == sum(row.amounts.nusd for row in rows)
        # And so say the metrics.
        shown = {metric.name: points for metric, points in trip.gateway.runtime.observer.figures()}
        assert sum(usd for _, usd in shown["model_cost_usd"]) == pytest.approx(trip.record.cost_nusd / 10**9)


async def test_finish_settles_and_records_once(tmp_path: Path) -> None:
    async with journey(tmp_path, says()) as trip:
        call = await reserved(trip)
        call.answered("a-1", "stop", Usage(prompt_tokens=3, completion_tokens=2), content_bytes=1)
        call.answered("a-1", "stop", Usage(prompt_tokens=30_000, completion_tokens=2), content_bytes=1)
        for error in (None, None, Refused("internal_error", "late")):
            call.finish(error)
        assert await booked(trip) == ("posted", (3 * PROMPT_NUSD + 2 * COMPLETION_NUSD, 1, 5))
        assert (trip.record.status, trip.record.error, trip.record.cost_basis) == (200, "", "exact")


@pytest.mark.parametrize("client_left", [False, True])
async def test_a_call_that_ends_without_a_word_costs_its_bound(tmp_path: Path, client_left: bool) -> None:
    async with journey(tmp_path, says()) as trip:
        call = await reserved(trip)
        call.record.client_left = client_left
        call.finish()
        # A caller who left is why, and the bound is posted; else something went wrong here, and nobody knows.
        assert await booked(trip) == ("posted" if client_left else "in_doubt", BOUND)
        assert trip.record.cost_basis == "bound"
        assert trip.record.attempts[0].is_in_doubt is not client_left


@pytest.mark.parametrize(
    "kind, expected",
    [
        (FaultKind.SERVER, ("void", Amounts())),
        (FaultKind.CONNECT, ("void", Amounts())),
        (FaultKind.CUT, ("in_doubt", BOUND)),
    ],
)
async def test_a_fault_leaves_the_bound_in_doubt_where_the_provider_may_bill_and_costs_nothing_else(
    tmp_path: Path, kind: FaultKind, expected: tuple[State, Amounts]
) -> None:
    async with journey(tmp_path, says()) as trip:
        call = await reserved(trip)
        call.failed(UpstreamFault(kind, "upstream_error", "It broke."))
        call.finish(UpstreamFault(kind, "upstream_error", "It broke."))
        assert await booked(trip) == expected
        assert trip.record.attempts[0].cost_nusd == expected[1].nusd


ABSURD: dict[str, Any] = {
    "negative": {"prompt_tokens": -5, "completion_tokens": 1},
    "negative answer": {"prompt_tokens": 5, "completion_tokens": -1},
    "beyond belief": {"prompt_tokens": 10**15, "completion_tokens": 1},
    "beyond 64 bits": {"prompt_tokens": 10**30, "completion_tokens": 1},
    "more cached": {"prompt_tokens": 5, "completion_tokens": 1, "prompt_tokens_details": {"cached_tokens": 9}},
}  # fmt: skip
ABSENT: dict[str, Any] = {"words": {"prompt_tokens": "five", "completion_tokens": 1}, "nothing": None, "a list": [1]}


@pytest.mark.parametrize("name", ABSURD | ABSENT)
async def test_usage_that_cannot_be_believed_is_not(tmp_path: Path, name: str) -> None:
    usage = (ABSURD | ABSENT)[name]
    async with journey(tmp_path, refuses(200, completion() | {"usage": usage})) as trip:
        answer = await trip.ask()
        assert answer.status == 200
        record = trip.record
        # Figures nobody can believe cost the whole hold; where there are no figures, what came is counted upwards.
        basis = "bound" if name in ABSURD else "estimate"
        assert (record.usage, record.cost_basis) == (None, basis)
        state, (nusd, requests, tokens) = await booked(trip)
        assert (state, nusd, requests) == ("posted", record.cost_nusd, 1)
        assert tokens > 64
        assert trip.gateway.runtime.observer.usage_disbelieved == (name in ABSURD)


async def test_a_long_name_of_a_provider_is_cut_in_the_record(tmp_path: Path) -> None:
    async with journey(tmp_path, refuses(200, completion(model="m" * 10_000))) as trip:
        assert (await trip.ask()).status == 200
        assert trip.record.model_answered == "m" * 256


async def test_a_reason_beyond_ascii_fits_into_a_header(tmp_path: Path) -> None:
    routing = """
    default_agent = "lone_agent"
    [[rules]]
    name = "geld"
    agent = "qa_agent"
    any_word = ["geld"]
    why = "spricht über Geld — €"
    """
    async with journey(tmp_path, says("Paris"), routing=routing) as trip:
        answer = await trip.ask(model="auto", text="Wo ist mein Geld?")
        assert answer.headers["x-gateway-route"] == 'geld: spricht ?ber Geld ? ? (word "geld")'
        assert (trip.record.agent, trip.record.agent_from, trip.record.rule) == ("qa_agent", "rule", "geld")


async def test_the_tightest_deadline_holds(tmp_path: Path) -> None:
    async with journey(tmp_path, says()) as trip:
        call = OpenCall(trip.gateway.runtime, "req-1")
        assert call.left_s == float("inf")
        call.start_clock(50.0)
        call.start_clock(500.0)
        assert call.deadline_s == call.started_s + 50.0


async def test_a_call_without_an_agent_is_counted_and_not_recorded(tmp_path: Path) -> None:
    async with journey(tmp_path, says()) as trip:
        answer = await trip.ask(model="nobody")
        assert (answer.status, answer.error["code"]) == (404, "model_not_found")
        assert trip.gateway.journal() == []
        async with trip.session.get(f"{trip.gateway.admin_url}/metrics") as response:
            assert 'gateway_refusals_total{code="model_not_found"} 1.0' in await response.text()


async def test_attempts_are_timed_one_after_the_other(tmp_path: Path) -> None:
    async with journey(tmp_path, resets, policy=POLICY + NO_RETRIES) as trip:
        await trip.ask()
        record = trip.record
        first, second = record.attempts
        assert first.started_ms <= second.started_ms
        assert first.duration_ms + second.duration_ms <= record.duration_ms + 2
        assert 0 <= record.overhead_ms <= record.duration_ms
        assert record.cost_nusd == second.cost_nusd


async def test_the_log_has_one_line_for_a_call_that_failed_and_no_secret(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="gateway.call")
    async with journey(tmp_path, says("Paris"), refuses(400, b"{}")) as trip:
        await trip.ask(text="a secret question", user="somebody@example.org")
        assert not caplog.records
        await trip.ask(text="a secret question", user="somebody@example.org")
        (line,) = caplog.records
        fields = line.fields  # type: ignore[attr-defined]
        assert (fields["status"], fields["agent"], fields["model"]) == (400, "qa_agent", "first/a")
        assert "secret" not in str(fields)
        assert "somebody" not in str(fields) + trip.gateway.runtime.journal.path.read_text()
