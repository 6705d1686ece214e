"""Two hundred callers at once for a cap that holds ten: the provider's bill never exceeds it, and the ledger agrees.

One process and four that share a state directory. Every call that is refused is refused for good (`budget_exceeded`):
none is left waiting for what nobody holds.
"""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from gateway.decide.assign import hash_user
from tests.money.race import (
    DEFAULT_MAX_TOKENS,
    INPUT,
    OUTPUT,
    Answer,
    Biller,
    Call,
    Fleet,
    biller,
    cap,
    fleet,
    outcomes,
)

CALLERS = 200
FIT = 10
MAX_TOKENS = 100
# What a call of `full` or `part` holds.
UNIT = MAX_TOKENS * OUTPUT["full"]
# One token or more per character, one byte or more per token.
DENSE = "8😀漢字7👩‍👩‍👧é∑0" * 20


class Round(NamedTuple):
    """A cap and those who race for it. `leaves` is the most that may be left over at the end; 0: it fits exactly."""

    cap_nusd: int
    calls: list[Call]
    leaves: int = 0


def calls(operation: str, model: str = "full", count: int = CALLERS, *, first: int = 0, **more: Any) -> list[Call]:
    text = DENSE if model == "dense" else "Count to ten."
    body = {"max_tokens": MAX_TOKENS, **more}
    body = {name: value for name, value in body.items() if value is not None}
    return [Call(f"{operation}/{first + index}", operation, model, body, text) for index in range(count)]


def dense_hold(call: Call) -> int:
    """More than such a call can hold: every byte of its body a token."""
    return (len(str(call.body()).encode()) + 500) * INPUT["dense"] + UNIT


def rounds() -> dict[str, Round]:
    mixed = [call._replace(model="dear") if index % 10 == 3 else call for index, call in enumerate(calls("mixed"))]
    first_dear = [call._replace(operation="dear-first", user=f"dear-first/{call.user[6:]}") for call in mixed[3:]]
    dense = calls("dense", "dense")
    return {
        "plain": Round(FIT * UNIT, calls("plain")),
        "stream": Round(FIT * UNIT, calls("stream", stream=True)),
        "stream-usage": Round(FIT * UNIT, calls("stream-usage", stream=True, stream_options={"include_usage": True})),
        # One call is worth nine tenths of the cap, the others a tenth each.
        "mixed": Round(FIT * UNIT, mixed),
        "dear-first": Round(FIT * UNIT, first_dear),
        "choices": Round(FIT * 3 * UNIT, calls("choices", n=3)),
        "unlimited": Round(FIT * DEFAULT_MAX_TOKENS * OUTPUT["full"], calls("unlimited", max_tokens=None)),
        "dense": Round(FIT * dense_hold(dense[0]), dense, leaves=dense_hold(dense[0])),
        # The provider bills a third of what was held, so that thirty fit, and not all of them at once.
        "part": Round(FIT * UNIT, calls("part", "part"), leaves=UNIT),
        "part-stream": Round(FIT * UNIT, calls("part-stream", "part", stream=True), leaves=UNIT),
    }


def caps_of(races: dict[str, Round]) -> str:
    return "".join(cap(operation, race.cap_nusd) for operation, race in races.items())


def check_round(provider: Biller, operation: str, race: Round, answers: Sequence[Answer]) -> None:
    """Nothing above the cap, nothing left that could have been had, and a clear word for everybody."""
    found = outcomes(answers)
    assert set(found) == {"200", "budget_exceeded"}, (operation, found)
    billed = provider.billed(operation)
    assert race.cap_nusd - race.leaves <= billed <= race.cap_nusd, (operation, found, billed)
    assert found["200"] == len([user for user in provider.bill if user.startswith(f"{operation}/")])


def check_ledger(gateways: Fleet, provider: Biller, doubted: Sequence[str] = ()) -> None:
    """The ledger is the bill, call by call; what is in doubt is named, and holds at least what was billed."""
    found = gateways.rows()
    rows = {row.on.user: row for row in found}
    assert len(rows) == len(found)
    assert set(rows) == {hash_user(user, "") for user in provider.bill}
    in_doubt = {hash_user(user, "") for user in doubted}
    assert {user for user, row in rows.items() if row.state == "in_doubt"} == in_doubt
    for user, nusd in provider.bill.items():
        row = rows[hash_user(user, "")]
        booked = row.amounts.nusd
        assert booked >= nusd if row.state == "in_doubt" else booked == nusd, user


async def in_flight(provider: Biller, operation: str, count: int) -> list[str]:
    """The users of these calls, once so many are with the provider at once."""

    def mine(users: set[str]) -> list[str]:
        return sorted(user for user in users if user.startswith(f"{operation}/"))

    async with asyncio.timeout(20):
        await provider.arrived(lambda users: len(mine(users)) >= count)
    return mine(provider.in_flight)


@pytest.mark.parametrize("processes", [1, 4])
async def test_in_every_round_the_bill_is_what_fits_under_the_cap(tmp_path: Path, processes: int) -> None:
    races = rounds()
    async with biller() as provider, fleet(tmp_path, provider, caps_of(races), processes=processes) as gateways:
        for operation, race in races.items():
            check_round(provider, operation, race, await gateways.race(race.calls))
        await gateways.stop()
        check_ledger(gateways, provider)


@pytest.mark.parametrize("processes", [1, 4])
async def test_all_rounds_at_once_do_not_touch_each_other(tmp_path: Path, processes: int) -> None:
    races = {name: race for name, race in rounds().items() if name in ("plain", "stream", "mixed", "dense", "part")}
    shared = [race.calls[index] for index in range(CALLERS // 4) for race in races.values()]
    async with biller() as provider, fleet(tmp_path, provider, caps_of(races), processes=processes) as gateways:
        answers = await gateways.race(shared)
        for operation, race in races.items():
            check_round(provider, operation, race, [one for one in answers if one.call.operation == operation])
        await gateways.stop()
        check_ledger(gateways, provider)


@pytest.mark.parametrize("processes", [1, 4])
async def test_a_call_is_clamped_to_what_is_left(tmp_path: Path, processes: int) -> None:
    half = UNIT // 2
    # A call is cut down to what is there at that moment. Beside others a part of it may be on its way from one process
    # to another, and then the call gets a little less than what is left.
    leaves = 0 if processes == 1 else half
    races = {
        "plain": Round(FIT * UNIT + half, calls("plain"), leaves),
        "stream": Round(FIT * UNIT + half, calls("stream", stream=True), leaves),
        "dense": rounds()["dense"],
        "part": rounds()["part"],
    }
    async with (
        biller() as provider,
        fleet(tmp_path, provider, caps_of(races), processes=processes, when_short="clamp") as gateways,
    ):
        for operation, race in races.items():
            answers = await gateways.race(race.calls)
            check_round(provider, operation, race, answers)
            if operation in ("plain", "stream"):
                limits = [one.max_tokens for one in answers if one.status == 200]
                clamped = [limit for limit in limits if limit is not None]
                assert len(limits) - len(clamped) == FIT
                assert sum(clamped) <= half // OUTPUT["full"]
                if processes == 1:
                    assert clamped == [half // OUTPUT["full"]]
        await gateways.stop()
        check_ledger(gateways, provider)


@pytest.mark.parametrize("model", ["full", "part"])
@pytest.mark.parametrize("processes", [1, 4])
async def test_a_process_that_is_killed_leaves_doubts_with_names_and_no_way_over_the_cap(
    tmp_path: Path, processes: int, model: str
) -> None:
    async with (
        biller() as provider,
        fleet(tmp_path, provider, cap("kill", FIT * UNIT), processes=processes) as gateways,
    ):
        early = await gateways.race(calls("kill", "full", 4))
        assert outcomes(early) == {"200": 4}
        provider.gate.clear()
        first = 4
        racing = asyncio.create_task(gateways.race(calls("kill", model, CALLERS, first=first)))
        users = await in_flight(provider, "kill", FIT - 4)
        assert len(users) == FIT - 4
        place = (int(users[0].removeprefix("kill/")) - first) % processes
        doubted = [user for user in users if (int(user.removeprefix("kill/")) - first) % processes == place]
        await gateways.kill(gateways.gateways[place])
        provider.gate.set()
        await gateways.start()
        answers = await racing
        broken = {(int(one.call.user.removeprefix("kill/")) - first) % processes for one in answers if one.status == 0}
        assert broken == {place}
        late = await gateways.race(calls("kill", model, 40, first=first + CALLERS))
        assert set(outcomes([*answers, *late])) <= {"200", "0", "budget_exceeded"}
        assert "budget_exceeded" in outcomes(late)
        assert provider.billed("kill") <= FIT * UNIT
        if model == "full":
            assert provider.billed("kill") == FIT * UNIT
        await gateways.stop()
        check_ledger(gateways, provider, doubted)


async def test_a_second_process_gets_its_share_though_the_first_had_leased_everything(tmp_path: Path) -> None:
    async with (
        biller() as provider,
        fleet(tmp_path, provider, cap("share", FIT * UNIT), processes=1, wait_ms=5_000) as gateways,
    ):
        # Alone, it leases all there is.
        assert outcomes(await gateways.race(calls("share", count=2))) == {"200": 2}
        second = await gateways.start()
        answers = await asyncio.gather(*(gateways.ask(call, second) for call in calls("share", count=20, first=2)))
        # The first is idle now, and what it does not use is the other's.
        assert outcomes(answers) == {"200": FIT - 2, "budget_exceeded": 20 - FIT + 2}
        await gateways.stop()
        check_ledger(gateways, provider)
