"""Many calls at once against a provider that half works, and more calls at once than the gateway takes."""

import asyncio
from pathlib import Path
from random import Random

import pytest

from tests.faults.stage import TEXT, WORDS, Clock, check_at_rest, check_honest, check_serves_on, stage
from tests.journey import PATIENCE_S
from tests.scripted import Scene, Turn, delta, error_body, refuses, resets, says, silent

CALLS = 200
GOOD = says(*WORDS)
# Breakers that never open, so that only the retry budget stands between the callers and the provider.
NO_BREAKERS = "[breakers]\nconsecutive = 1000000\nmin_calls = 1000000\n"
BUDGET_PERCENT, BUDGET_FLOOR = 20, 3
RETRIES = f"[retries]\nbase_s = 0.001\nbudget_percent = {BUDGET_PERCENT}\nbudget_floor = {BUDGET_FLOOR}\n"


def half_broken(*faults: Scene) -> Scene:
    """Every second request or so fails, in one of these ways."""
    dice = Random(7)

    async def scene(turn: Turn) -> None:
        await (GOOD if dice.random() < 0.5 else dice.choice(faults))(turn)

    return scene


async def cut(turn: Turn) -> None:
    """Two thirds of a stream, and then the connection is gone."""
    await turn.begin_stream()
    for word in WORDS[:40]:
        await turn.event(delta(word))
    turn.close()


@pytest.mark.parametrize("stream", [False, True])
async def test_retries_do_not_amplify_a_brown_out(tmp_path: Path, stream: bool) -> None:
    failing = half_broken(refuses(503, error_body("Overloaded.")))
    async with stage(tmp_path, failing, policy=RETRIES + NO_BREAKERS) as trip:
        answers = await asyncio.gather(*(trip.ask(stream=stream, model="lone_agent") for _ in range(CALLS)))
        codes = [check_honest(answer) for answer in answers]
        # Half of the first tries were answered, and half of the retries that the budget allowed.
        assert codes.count("") >= CALLS * 0.4
        assert set(codes) == {"", "upstream_error"}
        retries = len(trip.first.turns) - CALLS
        assert 0 < retries <= max(BUDGET_FLOOR, CALLS * BUDGET_PERCENT / 100)
        await check_at_rest(trip)


@pytest.mark.parametrize("stream", [False, True])
async def test_everybody_is_answered_where_a_fallback_is_well(tmp_path: Path, stream: bool) -> None:
    failing = half_broken(refuses(503, error_body()), refuses(500, b"<html>"), refuses(200, b""), resets)
    async with stage(tmp_path, failing, policy=RETRIES) as trip:
        answers = await asyncio.gather(*(trip.ask(stream=stream) for _ in range(CALLS)))
        assert {(answer.status, check_honest(answer)) for answer in answers} == {(200, "")}
        # First tries, and retries within the budget; the fallback got no more than was asked of it.
        assert len(trip.first.turns) <= CALLS + max(BUDGET_FLOOR, CALLS * BUDGET_PERCENT / 100)
        assert len(trip.second.turns) <= CALLS
        assert len(trip.gateway.journal()) == CALLS
        await check_at_rest(trip)


@pytest.mark.parametrize("stream", [False, True])
async def test_half_of_the_streams_cut_in_the_middle_are_still_whole(tmp_path: Path, stream: bool) -> None:
    async with stage(tmp_path, half_broken(cut), policy=RETRIES) as trip:
        answers = await asyncio.gather(*(trip.ask(stream=stream) for _ in range(CALLS)))
        assert {(answer.status, check_honest(answer)) for answer in answers} == {(200, "")}
        await check_at_rest(trip)


async def test_a_model_whose_streams_are_always_cut_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Clock(monkeypatch)
    async with stage(tmp_path, cut, policy=RETRIES) as trip:
        for _ in range(40):
            answer = await trip.ask(stream=True)
            assert (answer.status, check_honest(answer)) == (200, "")
        assert len(trip.first.turns) <= 10
        await check_at_rest(trip)


async def test_a_client_that_leaves_is_nobodys_failure(tmp_path: Path) -> None:
    async with stage(tmp_path, silent, policy=RETRIES + "[breakers]\nconsecutive = 2\n") as trip:
        for place in range(10):
            call = asyncio.create_task(trip.ask(stream=place % 2 == 0))
            turn = await trip.first.turn(place)
            call.cancel()
            await turn.peer_left.wait()
        await check_at_rest(trip)
        assert {(record.client_left, record.error) for record in trip.gateway.journal()} == {(True, "")}
        assert trip.second.turns == []
        await check_serves_on(trip, model="lone_agent")


@pytest.mark.parametrize("stream", [False, True])
async def test_what_is_too_much_is_turned_away_at_once_and_the_rest_is_whole(tmp_path: Path, stream: bool) -> None:
    may_answer = asyncio.Event()

    async def waits(turn: Turn) -> None:
        await may_answer.wait()
        await GOOD(turn)

    async with stage(tmp_path, waits, server="max_calls = 50") as trip:
        calls = [asyncio.create_task(trip.ask(stream=stream)) for _ in range(500)]
        # Nobody is answered yet, and yet these return: they were turned away, and not made to wait.
        async with asyncio.timeout(PATIENCE_S):
            while sum(call.done() for call in calls) < 450:
                await asyncio.wait([call for call in calls if not call.done()], return_when=asyncio.FIRST_COMPLETED)
        refused = [call.result() for call in calls if call.done()]
        assert {(answer.status, answer.error["code"]) for answer in refused} == {(503, "overloaded")}
        assert {answer.headers["Retry-After"] for answer in refused} == {"1"}
        assert trip.gateway.runtime.observer.in_flight == 50
        for path in ("/livez", "/readyz", "/metrics"):
            async with trip.session.get(f"{trip.gateway.admin_url}{path}") as response:
                assert response.status == 200, path
        may_answer.set()
        served = [answer for answer in await asyncio.gather(*calls) if answer.status == 200]
        assert len(served) == 50 == len(trip.first.turns)
        assert {check_honest(answer) for answer in served} == {""}
        after = await trip.ask(stream=stream)
        assert (after.status, check_honest(after, whole=TEXT)) == (200, "")
        await check_at_rest(trip)
