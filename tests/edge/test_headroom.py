"""When calls wait for headroom and in which order they go on; never how long, but where the store hangs."""

import asyncio
from pathlib import Path

import pytest

from gateway.decide.budget import Hold
from gateway.domain.errors import Refused
from gateway.edge import bookkeeper, headroom
from gateway.store.store import StoreError
from tests.office import ON, PATIENCE_S, Office, office, usd

# --- Asking -----------------------------------------------------------------------------------------------------------


async def test_a_thousand_calls_that_need_a_lease_cost_one_transaction(tmp_path: Path) -> None:
    async with office(tmp_path, usd(10_000, scope="user")) as here:
        before = len(here.store.batches)
        found = await asyncio.gather(*[here.wait_for(10) for _ in range(1_000)])
        assert all(found)
        asked = [batch for batch in here.store.batches[before:] if batch.asks]
        assert len(asked) <= 3
        # Not one more, and nothing was held for the one that did not fit.
        assert await here.wait_for(1, wait_s=0) is None
        (account,) = here.books.accounts()
        assert (account.held, account.granted) == (10_000, 10_000)


async def test_a_store_that_hangs_is_waited_for_so_long_and_no_longer(tmp_path: Path) -> None:
    async with office(tmp_path, usd(100, scope="user"), answer_s=0.05) as here:
        here.store.may_answer.clear()
        with pytest.raises(Refused) as refused:
            await here.wait_for(10)
        assert (refused.value.code, refused.value.status) == ("budget_unavailable", 503)
        assert refused.value.headers["Retry-After"] == "1"
        here.store.may_answer.set()
        await here.until(lambda: not here.keeper.headroom._asks)
        assert await here.wait_for(10) is not None


async def test_a_cap_that_stays_open_goes_on_without_its_store_and_is_one_again_with_it(tmp_path: Path) -> None:
    async with office(tmp_path, usd(100, scope="user", on_store_failure="open"), answer_s=0.05) as here:
        here.store.error = StoreError("gone")
        for _ in range(10):
            hold = await here.wait_for(10)
            assert hold is not None
            here.post(hold, 10)
        assert here.keeper.headroom.unleased_nusd == 100
        # What is spent as far as is known here stays spent, and is said at once.
        assert await here.wait_for(10) is None
        here.store.error = None
        await here.told()
        await here.until(lambda: not here.keeper.store_error)
        (account,) = here.books.accounts()
        assert (account.posted, account.spent, account.granted) == (100, 0, 0)
        assert await here.wait_for(1, wait_s=0) is None


async def test_a_store_that_is_out_of_order_is_not_waited_for_and_one_that_is_back_is_asked(tmp_path: Path) -> None:
    async with office(tmp_path, usd(100, scope="user", on_store_failure="open")) as here:
        here.store.error = StoreError("gone")
        here.keeper._asked_s = float("-inf")
        await here.until(lambda: here.keeper.store_error)
        here.store.may_answer.clear()
        async with asyncio.timeout(PATIENCE_S / 2):
            assert await here.wait_for(10) is not None
        assert here.keeper.headroom.unleased_nusd == 10
        here.store.error = None
        here.store.may_answer.set()
        await here.until(lambda: not here.keeper.store_error)
        assert await here.wait_for(10, on=ON._replace(user="bob")) is not None
        assert here.keeper.headroom.unleased_nusd == 10


# --- Waiting ----------------------------------------------------------------------------------------------------------


async def queue_up(here: Office, *amounts: int) -> list[asyncio.Task[Hold | None]]:
    """Calls that wait for so much each, in this order."""
    tasks = []
    for amount in amounts:
        tasks.append(asyncio.create_task(here.wait_for(amount)))
        await here.until(lambda: sum(map(len, here.keeper.headroom._waiting.values())) == len(tasks))
    return tasks


async def test_who_came_first_is_served_first_however_often_they_look(tmp_path: Path) -> None:
    async with office(tmp_path) as here:
        first = here.take(90)
        waiting = await queue_up(here, 60, 50, 40)
        # Each transaction has them look again, in vain.
        (account,) = here.books.accounts()
        seen_s = account.seen_s
        here.keeper._asked_s = float("-inf")
        await here.until(lambda: account.seen_s > seen_s)
        await here.until(lambda: sum(map(len, here.keeper.headroom._waiting.values())) == 3)
        here.post(first, 10)
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        assert [one.done() for one in waiting] == [True, False, False]
        for place in range(2):
            hold = waiting[place].result()
            assert hold is not None
            here.post(hold, 1)
            await asyncio.wait(waiting[place + 1 :], return_when=asyncio.FIRST_COMPLETED)
            assert waiting[place + 1].done()
        assert not here.keeper.headroom._waiting


async def test_what_one_gives_back_serves_as_many_as_it_can(tmp_path: Path) -> None:
    async with office(tmp_path) as here:
        first = here.take(100)
        waiting = await queue_up(here, 30, 30, 30, 30)
        assert here.keeper.headroom.waiting_calls == 4
        here.post(first, 0)
        await asyncio.wait(waiting[:3])
        assert [one.done() for one in waiting] == [True, True, True, False]
        hold = waiting[0].result()
        assert hold is not None
        here.post(hold, 0)
        assert await waiting[3] is not None
        assert here.keeper.headroom.waiting_calls == 0


@pytest.fixture
def unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody asks the store again by themselves, which would have everybody look."""
    monkeypatch.setattr(bookkeeper, "TICK_S", 600.0)
    monkeypatch.setattr(headroom, "FRESH_S", 600.0)


async def first_asks(here: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the first who waits ask the store, which does not answer yet."""
    await here.quiet()
    here.store.may_answer.clear()
    monkeypatch.setattr(headroom, "FRESH_S", -1.0)
    (account,) = here.books.accounts()
    here.keeper.headroom.freed([account])
    await here.until(lambda: here.keeper.headroom._asking)
    monkeypatch.setattr(headroom, "FRESH_S", 600.0)


@pytest.mark.usefixtures("unasked")
async def test_who_is_asking_the_store_when_their_turn_comes_does_not_lose_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with office(tmp_path) as here:
        first = here.take(100)
        one, other = await queue_up(here, 60, 60)
        await first_asks(here, monkeypatch)
        here.post(first, 0)
        here.store.may_answer.set()
        hold = await one
        assert hold is not None
        assert here.keeper.headroom.waiting_calls == 1
        here.post(hold, 0)
        assert await other is not None
        assert not here.keeper.headroom._asking


@pytest.mark.usefixtures("unasked")
async def test_who_leaves_while_asking_makes_room_for_those_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with office(tmp_path) as here:
        first = here.take(100)
        one, other = await queue_up(here, 60, 60)
        await first_asks(here, monkeypatch)
        here.post(first, 0)
        one.cancel()
        assert await other is not None
        assert not here.keeper.headroom._asking
        here.store.may_answer.set()


@pytest.mark.usefixtures("unasked")
async def test_who_leaves_when_it_is_their_turn_does_not_take_it_along(tmp_path: Path) -> None:
    async with office(tmp_path) as here:
        first = here.take(100)
        one, other = await queue_up(here, 60, 60)
        await here.quiet()
        # In one turn of the loop: woken, and gone.
        here.post(first, 0)
        one.cancel()
        assert await other is not None
        assert one.cancelled()
        assert not here.keeper.headroom._waiting


@pytest.mark.usefixtures("unasked")
async def test_who_finds_that_it_is_spent_tells_those_behind(tmp_path: Path) -> None:
    async with office(tmp_path) as here:
        first = here.take(100)
        waiting = await queue_up(here, 60, 60, 60)
        here.post(first, 100)
        async with asyncio.timeout(PATIENCE_S / 2):
            assert await asyncio.gather(*waiting) == [None, None, None]


async def test_what_will_not_come_is_not_waited_for(tmp_path: Path) -> None:
    async with office(tmp_path) as here:
        here.post(here.take(60), 60)
        # It is posted, not held: waiting for it would be in vain.
        assert await here.wait_for(50) is None
        hold = here.take(40)
        assert await here.wait_for(30, wait_s=0) is None
        assert await here.wait_for(30, wait_s=0.01) is None
        here.post(hold, 0)
        assert await here.wait_for(30) is not None
