"""The figures of caps and ledger as Prometheus sees them: true at each scrape, and no more series than caps."""

import asyncio
import sqlite3
import time
from pathlib import Path
from typing import cast

import pytest
from prometheus_client.parser import text_string_to_metric_families

from gateway.decide.budget import IDLE_S
from gateway.edge.money_metrics import money_figures
from gateway.store.store import StoreError
from gateway.telemetry.metrics import (
    CAP_HELD,
    CAP_IN_DOUBT,
    CAP_LIMIT,
    CAP_POSTED,
    STORE_ERRORS,
    STORE_OK,
    Declared,
)
from tests.journey import Journey, journey
from tests.office import office, usd
from tests.scripted import Turn, completion, resets, says

CAPS = """
[[caps]]
per = "total"
usd = "1"
[[caps]]
scope = "agent"
per = "total"
requests = 10
[[caps]]
scope = "user"
per = "total"
requests = 10
"""
GLOBAL = ("dev: global usd total", "usd")
AGENT = ("dev: agent requests total qa_agent", "requests")


async def figures(trip: Journey) -> dict[tuple[str, ...], float]:
    """Every sample by name and label values."""
    async with trip.session.get(f"{trip.gateway.admin_url}/metrics") as response:
        families = text_string_to_metric_families(await response.text())
        return {
            (sample.name, *(sample.labels[name] for name in ("cap", "unit") if name in sample.labels)): sample.value
            for family in families
            for sample in family.samples
        }


def shown_at(trip: Journey, now_s: float) -> dict[Declared, dict[tuple[str, ...], float]]:
    """The figures at this time, whatever the clock says."""
    runtime = trip.gateway.runtime
    found = money_figures(runtime.books, runtime.bookkeeper, runtime.journal, runtime.alerts, clock=lambda: now_s)
    return {declared: {labels: cast("float", value) for labels, value in rows} for declared, rows in found}


async def test_a_hold_becomes_posted(tmp_path: Path) -> None:
    may_answer = asyncio.Event()

    async def waits(turn: Turn) -> None:
        await may_answer.wait()
        await turn.reply(completion())

    async with journey(tmp_path, waits, caps=CAPS) as trip:
        asked = asyncio.create_task(trip.ask())
        await trip.first.turn()
        found = await figures(trip)
        (hold,) = trip.holds().values()
        assert found["gateway_cap_limit", *GLOBAL] == 1.0
        assert found["gateway_cap_held", *GLOBAL] == hold.amounts.nusd / 1e9
        assert found["gateway_cap_posted", *GLOBAL] == 0
        assert found["gateway_cap_limit", *AGENT] == 10
        assert found["gateway_cap_held", *AGENT] == 1
        assert found["gateway_journal_behind_bytes",] > 0
        may_answer.set()
        await asked
        found = await figures(trip)
        # Spent is spent, also before the ledger has been told.
        assert (found["gateway_cap_held", *GLOBAL], found["gateway_cap_posted", *GLOBAL]) == (0, 25_000 / 1e9)
        assert found["gateway_cap_posted", *AGENT] == 1
        await trip.booked()
        found = await figures(trip)
        assert found["gateway_cap_posted", *GLOBAL] == 25_000 / 1e9
        assert found["gateway_store_is_up",] == 1
        assert found["gateway_processes",] == 1
        assert found["gateway_spending_stops",] == 0


async def test_what_is_in_doubt_is_shown_as_a_part_of_what_is_posted(tmp_path: Path) -> None:
    async with journey(tmp_path, resets, caps=CAPS, policy="[models]\nuse_finetuned = false\n") as trip:
        await trip.ask(model="lone_agent")
        rows = await trip.booked()
        doubt = sum(row.amounts.nusd for row in rows if row.state == "in_doubt")
        found = await figures(trip)
        assert found["gateway_cap_in_doubt", *GLOBAL] == doubt / 1e9 > 0
        assert found["gateway_cap_posted", *GLOBAL] == doubt / 1e9


@pytest.mark.parametrize("per", ["hour", "day", "month"])
async def test_a_window_that_is_over_has_nothing_used_though_no_call_came_since(tmp_path: Path, per: str) -> None:
    caps = f'[[caps]]\nper = "{per}"\nrequests = 1\n[[caps]]\nscope = "agent"\nper = "{per}"\nrequests = 1\n'
    async with journey(tmp_path, says("Paris"), caps=caps) as trip:
        assert (await trip.ask()).status == 200
        assert (await trip.ask()).status == 429
        for account in trip.gateway.runtime.books.accounts():
            assert account.end_s is not None
            before, after = shown_at(trip, account.end_s - 0.001), shown_at(trip, account.end_s)
            labels = (account.name, "requests")
            assert (before[CAP_POSTED][labels], before[CAP_LIMIT][labels]) == (1, 1)
            assert after[CAP_LIMIT][labels] == 1
            assert {after[figure][labels] for figure in (CAP_POSTED, CAP_HELD, CAP_IN_DOUBT)} == {0}


async def test_a_cap_of_an_agent_is_shown_while_it_refuses_though_nobody_calls(tmp_path: Path) -> None:
    caps = '[[caps]]\nscope = "agent"\nper = "month"\nrequests = 1\n'
    async with journey(tmp_path, says("Paris"), caps=caps) as trip:
        await trip.ask()
        await trip.booked()
        runtime = trip.gateway.runtime
        (account,) = runtime.books.accounts()
        for _ in range(9):
            runtime.books.returns(time.time() + IDLE_S + 1, holders=1)
        assert shown_at(trip, time.time())[CAP_POSTED] == {(account.name, "requests"): 1}
        assert (await trip.ask()).status == 429


async def test_how_an_idle_agents_account_stands_is_asked_of_the_store(tmp_path: Path) -> None:
    async with office(tmp_path, usd(100, scope="agent")) as here:
        hold = await here.wait_for(40)
        assert hold is not None
        here.post(hold, 40)
        await here.told()
        (account,) = here.books.accounts()
        account.used_s -= IDLE_S + 1
        await here.until(lambda: not account.granted)
        await here.quiet()
        assert account.used == 40
        # Others have spent of it.
        with sqlite3.connect(tmp_path / "gateway.db") as database:
            database.execute("UPDATE accounts SET posted = 70")
        database.close()
        account.used_s -= IDLE_S + 1
        await here.until(lambda: account.posted == 70)


async def test_a_cap_that_is_taken_out_of_the_policy_is_not_shown(tmp_path: Path) -> None:
    async with journey(tmp_path, says("Paris"), caps=CAPS) as trip:
        await trip.ask()
        books = trip.gateway.runtime.books
        assert shown_at(trip, time.time())[CAP_POSTED].keys() == {GLOBAL, AGENT}
        books.change_rules([rule for rule in books.rules if rule.unit == "usd"])
        assert shown_at(trip, time.time())[CAP_POSTED].keys() == {GLOBAL}


async def test_users_do_not_become_series(tmp_path: Path) -> None:
    async with journey(tmp_path, says("Paris"), caps=CAPS) as trip:
        await trip.ask(user="user-0")
        before = {labels for labels in await figures(trip) if len(labels) > 1}
        for number in range(1, 20):
            await trip.ask(user=f"user-{number}")
        assert {labels for labels in await figures(trip) if len(labels) > 1} == before
        assert not [labels for labels in before if "user" in labels[1]]


async def test_a_store_that_fails_is_seen(tmp_path: Path) -> None:
    async with journey(tmp_path, says("Paris"), caps=CAPS) as trip:
        runtime = trip.gateway.runtime

        def shown() -> tuple[float, float]:
            # Without a turn of the loop in between, in which the store could answer again.
            found = dict(money_figures(runtime.books, runtime.bookkeeper, runtime.journal, runtime.alerts))
            return found[STORE_OK][0][1], found[STORE_ERRORS][0][1]

        assert shown() == (1, 0)
        runtime.bookkeeper._failed(StoreError("gone"))
        assert shown() == (0, 1)
        await trip.until(lambda: not runtime.bookkeeper.store_error)
        assert shown() == (1, 1)


async def test_without_caps_there_is_nothing_to_show_of_them(tmp_path: Path) -> None:
    async with journey(tmp_path, says("Paris"), caps="") as trip:
        assert (await trip.ask()).status == 200
        assert not [name for name, *_ in await figures(trip) if name.startswith("gateway_cap_limit")]
