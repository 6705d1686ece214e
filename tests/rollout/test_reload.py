"""Reloads and rollouts: what is new begins before it counts, what has begun stays, and no store stops a reload."""

import asyncio
import logging
from pathlib import Path

import pytest

from tests.journey import PATIENCE_S, Journey, journey
from tests.scripted import says
from tests.steering import ROLLOUT, told

OFF = "[models]\nuse_finetuned = true\n"
NEWCOMER = '[agents.new_agent]\nfinetuned = "first/ft:a"\nbaseline = "first/a"\n'
PRICES = '[prices."*"]\ninput_usd_per_mtok = "1"\noutput_usd_per_mtok = "2"\n'


async def test_what_a_reload_makes_begins_before_its_first_call(tmp_path: Path) -> None:
    async with journey(tmp_path, says("Paris"), policy=OFF, caps="", budget="") as trip:
        assert told(tmp_path / "gateway.db")[0] == {}
        await trip.gateway.reload(policy=ROLLOUT)
        assert set(told(tmp_path / "gateway.db")[0]) == {"qa_agent", "lone_agent"}
        answer = await trip.ask(user="u1")
        record = trip.record_of(answer)
        assert (record.experiment, record.stage, record.share_bps) == (1, 1, 1000)
        # An agent more, beside those that have begun.
        before = told(tmp_path / "gateway.db")[0]
        await trip.gateway.reload(config=PRICES + NEWCOMER)
        record = trip.record_of(await trip.ask(user="u1", model="new_agent"))
        assert (record.experiment, record.stage) == (1, 1)
        states = told(tmp_path / "gateway.db")[0]
        assert {agent: states[agent] for agent in before} == before


async def test_an_agent_that_leaves_keeps_its_rollout_and_the_others_go_on(tmp_path: Path) -> None:
    config = PRICES + NEWCOMER
    async with journey(tmp_path, says("Paris"), policy=ROLLOUT, config=config, caps="", budget="") as trip:
        before = told(tmp_path / "gateway.db")
        await trip.gateway.reload(config=PRICES)
        pilot = trip.gateway.gateway._pilot
        assert pilot is not None
        await pilot.step()
        assert set(pilot.recommended) == {"qa_agent", "lone_agent"}
        assert (await trip.ask(user="u1")).status == 200
        assert told(tmp_path / "gateway.db") == before
        await trip.gateway.reload(config=config)
        record = trip.record_of(await trip.ask(user="u1", model="new_agent"))
        assert (record.experiment, record.stage) == (1, 1)
        assert told(tmp_path / "gateway.db") == before


async def test_a_reload_is_taken_over_while_the_store_is_away_and_the_rollouts_begin_when_it_is_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, away = tmp_path / "gateway.db", tmp_path / "away.db"
    async with journey(tmp_path, says("Paris"), policy=OFF, caps="", budget="") as trip:
        store.rename(away)
        with caplog.at_level(logging.ERROR, "gateway"):
            await trip.gateway.reload(policy=ROLLOUT)
        (line,) = [record.message for record in caplog.records]
        assert "rollouts that are new begin once the store is back" in line
        record = trip.record_of(await trip.ask(user="u1"))
        assert (record.status, record.experiment, record.share_bps) == (200, 0, 1000)
        away.rename(store)
        pilot = trip.gateway.gateway._pilot
        assert pilot is not None
        await pilot.step()
        await trip.until(lambda: trip.gateway.runtime.plan.agents["qa_agent"].experiment == 1)


async def test_reloads_and_news_at_once_leave_the_latest_of_both(tmp_path: Path) -> None:
    async with journey(tmp_path, says("Paris"), policy=ROLLOUT, caps="", budget="") as trip:

        async def order(percent: int) -> None:
            url = f"{trip.gateway.admin_url}/admin/rollout/qa_agent/set"
            async with trip.session.post(url, json={"percent": percent}) as response:
                assert response.status == 200

        async with asyncio.timeout(PATIENCE_S):
            for percent in (11, 12, 13):
                await asyncio.gather(trip.gateway.reload(policy=ROLLOUT + f"# {percent}\n"), order(percent))
                wanted = percent * 100
                await trip.until(lambda wanted=wanted: share_of(trip) == wanted)  # type: ignore[misc]
        await trip.gateway.reload()
        assert share_of(trip) == 1300


def share_of(trip: Journey) -> int:
    return trip.gateway.runtime.plan.agents["qa_agent"].share_bps
