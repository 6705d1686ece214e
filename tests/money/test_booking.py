"""What each attempt costs, however it ends: in the ledger, in the accounts and in the call's record alike.

A call goes through a whole gateway to a scripted provider; then the ledger's own file is read.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import openai
import pytest

from gateway.domain.call import Basis
from gateway.domain.ledger import Amounts, LedgerRow, State
from gateway.store.ledger import Ledger
from gateway.store.store import Stop
from tests.journey import AT_ONCE, NO_RETRIES, POLICY, PRICES, Answer, Journey, journey
from tests.raw_http import connected, ordinary, request
from tests.scripted import (
    DONE,
    Scene,
    Turn,
    completion,
    delta,
    error_body,
    finish,
    refuses,
    refusing_port,
    resets,
    says,
    silent,
    streams,
    usage_chunk,
)

INPUT_NUSD, OUTPUT_NUSD = 1_000, 2_000
MAX_TOKENS = 16
# What the provider's usage of 11 and 7 tokens costs.
EXACT = Amounts(11 * INPUT_NUSD + 7 * OUTPUT_NUSD, 1, 18)
NOTHING = Amounts()
ONCE = POLICY + NO_RETRIES


def cap(lines: str, *, scope: str = "global", per: str = "total") -> str:
    return f'[[caps]]\nscope = "{scope}"\nper = "{per}"\n{lines}\n'


def budget(**values: Any) -> str:
    """The table; what is not given: refuse, at once, and end with the caller."""
    settings = {"when_short": "refuse", "wait_ms": 0, "when_left": "abort"} | values
    return "[budget]\n" + "".join(
        f"{name} = {msgspec.json.encode(value).decode()}\n" for name, value in settings.items()
    )


async def booked(trip: Journey, count: int = 1) -> list[LedgerRow]:
    """The ledger's rows. Sees that the accounts are their sum, that what is in doubt is known, and nothing is held."""
    rows = await trip.booked()
    assert len(rows) == count
    trip.check_at_rest()
    counted = [row.amounts for row in rows if row.state in ("posted", "in_doubt")]
    assert trip.used() == [sum(one[unit] for one in counted) for unit in range(3)]
    doubted = [row.amounts for row in rows if row.state == "in_doubt"]
    accounts = trip.gateway.runtime.books.accounts()
    assert [account.in_doubt for account in accounts] == [sum(one[unit] for one in doubted) for unit in range(3)]
    with ledger(trip) as file:
        assert file.verify("dev") == []
    return rows


def ledger(trip: Journey) -> Ledger:
    return Ledger(trip.gateway.runtime.journal.directory.parent.parent / "gateway.db", clock=lambda: 0.0)


# --- Each way an attempt can end --------------------------------------------------------------------------------------


def used(**counts: Any) -> Scene:
    """Answers, plain or streamed, with this usage; none without counts."""

    async def scene(turn: Turn) -> None:
        if not turn.json().get("stream"):
            await turn.reply(completion() | {"usage": counts or None})
            return
        told = {**usage_chunk(), "usage": counts or None}
        await streams(delta("Pa"), delta("ris"), finish(), told, DONE)(turn)

    return scene


def begins(*events: Any) -> Scene:
    """Begins an answer and closes the connection in the middle of it."""

    async def scene(turn: Turn) -> None:
        await turn.begin_stream()
        for data in events:
            await turn.event(data)
        turn.close()

    return scene


async def stalls(turn: Turn) -> None:
    await turn.begin_stream()
    await turn.event(delta("Pa"))
    await silent(turn)


async def has_no_token(turn: Turn) -> None:
    await turn.begin_stream()
    await silent(turn)


class Ending(NamedTuple):
    """A scene, and what is booked. `amounts` of None: the whole hold."""

    scene: Scene
    state: State
    basis: Basis
    amounts: Amounts | None
    ways: tuple[bool, ...] = (False, True)
    timeouts: str = ""


def void(status: int, **more: Any) -> Ending:
    return Ending(refuses(status, error_body(**more)), "void", "none", NOTHING)


HUGE = Amounts(11 * INPUT_NUSD + 10_000 * OUTPUT_NUSD, 1, 10_011)
ENDINGS = {
    "usage": Ending(says("Pa", "ris"), "posted", "exact", EXACT),
    "usage of zero": Ending(used(prompt_tokens=0, completion_tokens=0), "posted", "exact", Amounts(0, 1, 0)),
    "usage negative": Ending(used(prompt_tokens=-11, completion_tokens=7), "posted", "bound", None),
    "usage negative, with a total": Ending(
        used(prompt_tokens=11, completion_tokens=-7, total_tokens=18), "posted", "bound", None
    ),
    "usage absurd": Ending(used(prompt_tokens=2**31 + 1, completion_tokens=7), "posted", "bound", None),
    "usage above the hold": Ending(used(prompt_tokens=11, completion_tokens=10_000), "posted", "exact", HUGE),
    "400": void(400),
    "401": void(401),
    "404": void(404),
    "429": void(429),
    "500": void(500),
    "503": void(503),
    "reset": Ending(resets, "in_doubt", "bound", None),
    "no first byte": Ending(silent, "in_doubt", "bound", None, (False,), "first_byte_s = 0.05"),
    "no first token": Ending(has_no_token, "in_doubt", "bound", None, (True,), "first_token_s = 0.05"),
    "stall": Ending(stalls, "in_doubt", "bound", None, (True,), "stall_s = 0.05"),
    "cut": Ending(begins(delta("Pa")), "in_doubt", "bound", None, (True,)),
    "an error in the place of an answer": Ending(streams(error_body()), "void", "none", NOTHING, (True,)),
    "an error after the first token": Ending(streams(delta("Pa"), error_body()), "in_doubt", "bound", None, (True,)),
    "filtered after the first token": Ending(
        streams(delta("Pa"), error_body(code="content_filter")), "in_doubt", "bound", None, (True,)
    ),
    "finish_reason error": Ending(streams(delta("Pa"), finish("error")), "in_doubt", "bound", None, (True,)),
    "cut, after the usage": Ending(begins(delta("Pa"), usage_chunk()), "posted", "exact", EXACT, (True,)),
}
CASES = [
    pytest.param(ending, stream, id=f"{name}, {'stream' if stream else 'plain'}")
    for name, ending in ENDINGS.items()
    for stream in ending.ways
]


@pytest.mark.parametrize(("ending", "stream"), CASES)
async def test_an_attempt_is_booked_by_how_it_ended(tmp_path: Path, ending: Ending, stream: bool) -> None:
    async with journey(tmp_path, ending.scene, policy=ONCE, timeouts=ending.timeouts) as trip:
        await trip.ask(model="lone_agent", stream=stream, max_tokens=MAX_TOKENS)
        (row,) = await booked(trip)
        record, hold = trip.record, trip.holds()[f"{trip.record.id}.1"]
        amounts = hold.amounts if ending.amounts is None else ending.amounts
        assert (row.id, row.state, row.basis, row.amounts) == (hold.id, ending.state, ending.basis, amounts)
        assert (row.at_ms, row.on) == (hold.at_ms, hold.on)
        assert (row.on.agent, row.on.model, row.on.operation) == ("lone_agent", "first/a", "inference")
        # The record says the same.
        (attempt,) = record.attempts
        assert (attempt.cost_nusd, attempt.tokens) == (amounts.nusd, amounts.tokens)
        assert attempt.is_in_doubt is (ending.state == "in_doubt")
        assert record.cost_basis == ending.basis
        assert record.cost_nusd == (amounts.nusd if ending.state == "posted" else 0)


HELD_BACK: dict[str, tuple[Any, ...]] = {
    "nothing": (),
    "an error": (error_body(),),
    "usage, and then an error": (usage_chunk(), error_body()),
    "usage, and then nothing": (usage_chunk(),),
}


@pytest.mark.parametrize("then", HELD_BACK)
async def test_a_stream_that_is_held_back_and_breaks_off_is_booked_like_any_other(tmp_path: Path, then: str) -> None:
    policy = ONCE + '[stream]\non_cut = "hold"\n'
    async with journey(tmp_path, begins(delta("Pa"), *HELD_BACK[then]), policy=policy) as trip:
        assert (await trip.ask(stream=True)).status == 200
        first, second = await booked(trip, 2)
        if "usage" in then:
            assert (first.state, first.basis, first.amounts) == ("posted", "exact", EXACT)
        else:
            assert (first.state, first.basis, first.amounts) == ("in_doubt", "bound", trip.holds()[first.id].amounts)
        assert (second.state, second.on.model) == ("posted", "second/b")


@pytest.mark.parametrize("stream", [False, True])
async def test_a_connection_that_is_refused_costs_nothing(tmp_path: Path, stream: bool) -> None:
    with refusing_port() as held:
        table = f'kind = "compatible"\nbase_url = "http://127.0.0.1:{held.getsockname()[1]}/v1"'
        async with journey(tmp_path, silent, first_table=table, policy=ONCE) as trip:
            await trip.ask(model="lone_agent", stream=stream)
            (row,) = await booked(trip)
            assert (row.state, row.basis, row.amounts) == ("void", "none", NOTHING)


@pytest.mark.parametrize("stream", [False, True])
async def test_without_usage_what_came_is_counted_upwards_and_flagged(tmp_path: Path, stream: bool) -> None:
    async with journey(tmp_path, used()) as trip:
        await trip.ask(stream=stream)
        (row,) = await booked(trip)
        hold = trip.holds()[row.id].amounts
        assert (row.state, row.basis, trip.record.cost_basis) == ("posted", "estimate", "estimate")
        # The whole of the prompt's bound, and no less of the answer than "Paris" can be.
        assert row.prompt_tokens == hold.tokens - 64
        assert 2 <= row.completion_tokens <= 64
        assert EXACT.nusd < row.amounts.nusd <= hold.nusd
        assert row.amounts.tokens == row.prompt_tokens + row.completion_tokens


async def test_the_hold_is_no_less_than_any_honest_answer_costs(tmp_path: Path) -> None:
    text = "Grüße 🌍 " * 40
    async with journey(tmp_path, says("Paris")) as trip:
        await trip.ask(text=text, max_tokens=100, n=3)
        (hold,) = trip.holds().values()
        assert hold.amounts.requests == 1
        assert hold.amounts.tokens >= len(text.encode()) + 3 * 100
        assert hold.amounts.nusd >= len(text.encode()) * INPUT_NUSD + 3 * 100 * OUTPUT_NUSD
        assert trip.first.turns[0].json()["n"] == 3


@pytest.mark.parametrize("model, asked", [("qa_agent", 64), ("lone_agent", None)])
async def test_without_max_tokens_the_limit_that_is_held_for_is_in_the_request(
    tmp_path: Path, model: str, asked: int | None
) -> None:
    async with journey(tmp_path, says("Paris")) as trip:
        await trip.ask(model=model)
        sent = trip.first.turns[0].json()["max_tokens"]
        assert asked in (None, sent)
        (hold,) = trip.holds().values()
        assert hold.amounts.nusd >= sent * OUTPUT_NUSD


async def test_what_is_billed_above_the_hold_is_booked_in_full_and_counted_as_overshoot(tmp_path: Path) -> None:
    overrun = used(prompt_tokens=11, completion_tokens=1_000)
    async with journey(tmp_path, overrun, caps=cap('usd = "0.001"')) as trip:
        assert (await trip.ask()).status == 200
        (row,) = await trip.booked()
        assert row.amounts.nusd == 11 * INPUT_NUSD + 1_000 * OUTPUT_NUSD == 2_011_000
        assert trip.gateway.runtime.observer.overshoot_nusd == 1_011_000
        refused = await trip.ask()
        assert (refused.status, refused.error["code"]) == (429, "budget_exceeded")
        assert len(trip.first.turns) == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_a_fallback_has_a_hold_and_a_row_of_its_own(tmp_path: Path, stream: bool) -> None:
    async with journey(tmp_path, resets, policy=ONCE) as trip:
        assert (await trip.ask(stream=stream)).status == 200
        first, second = await booked(trip, 2)
        id, holds = trip.record.id, trip.holds()
        assert (first.id, first.on.model, first.state) == (f"{id}.1", "first/a", "in_doubt")
        assert first.amounts == holds[first.id].amounts
        assert (second.id, second.on.model, second.state) == (f"{id}.2", "second/b", "posted")
        # One call is one request.
        assert second.amounts == EXACT._replace(requests=0)
        assert [one.is_in_doubt for one in trip.record.attempts] == [True, False]


# --- Callers who leave ------------------------------------------------------------------------------------------------


class Slowly:
    """A provider that answers in steps; it goes on with the rest when it may."""

    def __init__(self, before: str) -> None:
        self.before = before
        self.may_go_on = asyncio.Event()
        self.is_read = asyncio.Event()

    async def __call__(self, turn: Turn) -> None:
        if not turn.json().get("stream"):
            await self.may_go_on.wait()
            await turn.reply(completion())
        else:
            events = [delta("Pa"), delta("ris"), finish(), usage_chunk(), DONE]
            steps = {"the head": -1, "the first token": 0, "the second token": 1}
            for place, data in enumerate([None, *events], start=-1):
                if place == steps[self.before]:
                    await self.may_go_on.wait()
                await (turn.begin_stream() if data is None else turn.event(data))
            await turn.end()
        self.is_read.set()


LEAVING = [("the head", False), ("the head", True), ("the first token", True), ("the second token", True)]


@asynccontextmanager
async def left(tmp_path: Path, scene: Slowly, *, stream: bool, **settings: Any) -> AsyncIterator[Journey]:
    """A call whose caller goes away before the provider goes on."""
    async with journey(tmp_path, scene, budget=budget(**settings)) as trip:
        async with connected(trip.gateway.data_url) as connection:
            connection.send(request(body=ordinary(stream=stream)))
            await trip.first.turn()
            if scene.before == "the second token":
                await connection.line()
        yield trip


@pytest.mark.parametrize("before, stream", LEAVING)
async def test_an_answer_nobody_waits_for_is_read_to_its_usage(tmp_path: Path, before: str, stream: bool) -> None:
    scene = Slowly(before)
    async with left(tmp_path, scene, stream=stream, when_left="drain") as trip:
        await trip.until(lambda: trip.gateway.runtime.lingering)
        scene.may_go_on.set()
        await trip.until(lambda: not trip.gateway.runtime.lingering)
        assert scene.is_read.is_set()
        (row,) = await booked(trip)
        assert (row.state, row.basis, row.amounts) == ("posted", "exact", EXACT)
        assert (trip.record.client_left, trip.record.error) == (True, "")
        assert not trip.second.turns


@pytest.mark.parametrize("before, stream", LEAVING)
async def test_an_answer_that_is_not_read_on_costs_its_bound(tmp_path: Path, before: str, stream: bool) -> None:
    scene = Slowly(before)
    async with left(tmp_path, scene, stream=stream, when_left="abort") as trip:
        await trip.first.turns[0].peer_left.wait()
        (row,) = await booked(trip)
        assert (row.state, row.basis, row.amounts) == ("posted", "bound", trip.holds()[row.id].amounts)
        assert (trip.record.client_left, trip.record.cost_nusd) == (True, row.amounts.nusd)


@pytest.mark.parametrize("before, stream", LEAVING)
async def test_reading_on_has_an_end(tmp_path: Path, before: str, stream: bool) -> None:
    scene = Slowly(before)
    async with left(tmp_path, scene, stream=stream, when_left="drain", left_s=0.05) as trip:
        await trip.first.turns[0].peer_left.wait()
        (row,) = await booked(trip)
        assert (row.state, row.basis, row.amounts) == ("posted", "bound", trip.holds()[row.id].amounts)
        assert not trip.gateway.runtime.lingering


async def test_for_a_caller_who_left_nobody_else_is_asked(tmp_path: Path) -> None:
    may_fail = asyncio.Event()

    async def fails(turn: Turn) -> None:
        await may_fail.wait()
        await turn.reply(error_body(), 503)

    async with journey(tmp_path, fails, budget=budget(when_left="drain")) as trip:
        async with connected(trip.gateway.data_url) as connection:
            connection.send(request(body=ordinary()))
            await trip.first.turn()
        await trip.until(lambda: trip.gateway.runtime.lingering)
        may_fail.set()
        await trip.until(lambda: not trip.gateway.runtime.lingering)
        (row,) = await booked(trip)
        assert (row.state, len(trip.first.turns), len(trip.second.turns)) == ("void", 1, 0)


# --- Cut in mid-stream ------------------------------------------------------------------------------------------------


class Talks:
    """A provider that says a word whenever it may, and does not care for any limit."""

    def __init__(self, words: int = 0) -> None:
        self.words = words
        self.go_on = asyncio.Event()

    async def __call__(self, turn: Turn) -> None:
        await turn.begin_stream()
        await turn.event(delta("one "))
        if not self.words:
            await self.go_on.wait()
        for _ in range(self.words or 3):
            await turn.event(delta("and another "))
        await silent(turn)


def check_cut(answer: Answer, code: str) -> None:
    """See that every choice ends for its length, that an error says why, and that nothing claims to be whole."""
    assert answer.status == 200
    assert DONE not in answer.events
    *_, last, error = answer.chunks
    assert [choice["finish_reason"] for choice in last["choices"]] == ["length"]
    assert error["error"]["code"] == code


async def test_a_provider_that_ignores_max_tokens_is_cut_and_booked_in_full(tmp_path: Path) -> None:
    async with journey(tmp_path, Talks(200)) as trip:
        answer = await trip.ask(stream=True, max_tokens=MAX_TOKENS)
        check_cut(answer, "budget_exceeded")
        await trip.first.turns[0].peer_left.wait()
        (row,) = await booked(trip)
        assert (row.state, row.basis) == ("posted", "estimate")
        # All that came, and not only what was allowed.
        came = sum(bool(choice["delta"]) for chunk in answer.chunks for choice in chunk.get("choices", ()))
        assert row.completion_tokens >= came > MAX_TOKENS
        assert row.amounts.nusd >= row.prompt_tokens * INPUT_NUSD + came * OUTPUT_NUSD
        assert trip.record.error == "budget_exceeded"
        assert trip.breaker().state.name == "CLOSED"


async def test_the_openai_sdk_raises_where_a_stream_is_cut(tmp_path: Path) -> None:
    async with (
        journey(tmp_path, Talks(200)) as trip,
        openai.AsyncOpenAI(base_url=f"{trip.gateway.data_url}/v1", api_key="none", max_retries=0) as client,
    ):
        stream = await client.chat.completions.create(
            model="qa_agent", messages=[{"role": "user", "content": "?"}], stream=True, max_tokens=MAX_TOKENS
        )
        reasons = []

        async def read() -> None:
            async for chunk in stream:
                reasons.extend(choice.finish_reason for choice in chunk.choices)

        with pytest.raises(openai.APIError, match="went on beyond max_tokens"):
            await read()
        assert reasons[-1] == "length"


async def test_a_kill_switch_ends_a_stream_and_what_would_follow(tmp_path: Path) -> None:
    talks = Talks()
    async with journey(tmp_path, talks) as trip:
        asked = asyncio.create_task(trip.ask(stream=True))
        turn = await trip.first.turn()
        with ledger(trip) as file:
            file.stop(Stop("dev", "agent", "qa_agent", "somebody", "too dear", 1))
        await trip.until(lambda: trip.gateway.runtime.bookkeeper.stops)
        talks.go_on.set()
        answer = await asked
        check_cut(answer, "spending_stopped")
        assert "too dear" in answer.chunks[-1]["error"]["message"]
        await turn.peer_left.wait()
        (row,) = await booked(trip)
        assert (row.state, row.basis) == ("posted", "estimate")
        refused = await trip.ask()
        assert (refused.status, refused.error["code"]) == (403, "spending_stopped")
        assert refused.headers["x-should-retry"] == "false"
        assert len(trip.first.turns) == 1
        trip.first.then(says("Paris"))
        # Others go on, and so does this one when it is allowed to.
        assert (await trip.ask(model="lone_agent")).status == 200
        with ledger(trip) as file:
            file.resume("dev", "agent", "qa_agent", who="somebody", why="done")
        await trip.until(lambda: not trip.gateway.runtime.bookkeeper.stops)
        assert (await trip.ask()).status == 200


async def test_a_kill_switch_also_ends_the_waiting_for_headroom(tmp_path: Path) -> None:
    holds = Holds()
    async with journey(tmp_path, holds, budget=budget(wait_ms=15_000), caps=ROOM_FOR_ONE) as trip:
        first = asyncio.create_task(trip.ask(text="a"))
        await trip.first.turn()
        waits = asyncio.create_task(trip.ask(text="b"))
        await trip.until(lambda: trip.gateway.runtime.bookkeeper.headroom._waiting)
        with ledger(trip) as file:
            file.stop(Stop("dev", "", "", "somebody", "too dear", 1))
        # Its headroom has not come, and it is told nevertheless.
        assert (await waits).error["code"] == "spending_stopped"
        holds.may_answer["a"].set()
        assert (await first).status == 200


async def test_a_cap_that_is_lowered_below_what_is_spent_ends_a_stream(tmp_path: Path) -> None:
    talks = Talks()
    async with journey(tmp_path, says("Paris"), caps=cap('usd = "1"')) as trip:
        await trip.ask()
        await trip.booked()
        trip.first.then(talks)
        asked = asyncio.create_task(trip.ask(stream=True))
        await trip.first.turn(1)
        await trip.gateway.reload(policy=POLICY + budget() + cap('usd = "0.00001"'))
        talks.go_on.set()
        check_cut(await asked, "spending_stopped")
        assert [row.state for row in await trip.booked()] == ["posted", "posted"]
        trip.first.then(says("Paris"))
        refused = await trip.ask()
        assert (refused.status, refused.error["code"]) == (429, "budget_exceeded")


async def test_a_cap_that_is_lowered_holds_from_the_next_call_on(tmp_path: Path) -> None:
    async with journey(tmp_path, says("Paris"), caps=cap("requests = 5")) as trip:
        for _ in range(2):
            assert (await trip.ask()).status == 200
        await trip.gateway.reload(policy=POLICY + budget() + cap("requests = 2"))
        # What was leased under the former limit is not spent.
        refused = await trip.ask()
        assert (refused.status, refused.error["code"]) == (429, "budget_exceeded")
        await trip.gateway.reload(policy=POLICY + budget() + cap("requests = 3"))
        assert [(await trip.ask()).status for _ in range(2)] == [200, 429]
        assert trip.used() == [3]


# --- Short of money ---------------------------------------------------------------------------------------------------

MISTRAL = 'kind = "mistral"\nbase_url = "BASE_URL"'


@pytest.mark.parametrize(
    "asked, sent, table",
    [
        ("max_tokens", "max_tokens", ""),
        ("max_completion_tokens", "max_completion_tokens", ""),
        ("max_tokens", "max_tokens", MISTRAL),
        ("max_completion_tokens", "max_tokens", MISTRAL),
        ("", "max_tokens", ""),
    ],
)
async def test_a_call_is_cut_down_to_what_can_be_paid_and_says_so(
    tmp_path: Path, asked: str, sent: str, table: str
) -> None:
    short = budget(when_short="clamp", min_tokens=5)
    fields: dict[str, Any] = {asked: 5_000} if asked else {}
    limit = '"0.00025"' if not asked else '"0.0009"'
    async with journey(tmp_path, says("Paris"), budget=short, caps=cap(f"usd = {limit}"), first_table=table) as trip:
        answer = await trip.ask(**fields)
        assert answer.status == 200, answer.body
        lowered = int(answer.headers["x-gateway-max-tokens-clamped"])
        request_sent = trip.first.turns[0].json()
        assert request_sent[sent] == lowered < (5_000 if asked else 64)
        assert not ({"max_tokens", "max_completion_tokens"} - {sent}) & set(request_sent)
        (hold,) = trip.holds().values()
        most = 250_000 if not asked else 900_000
        # Not a token more would fit.
        assert most - OUTPUT_NUSD < hold.amounts.nusd <= most


async def test_a_call_that_would_be_cut_down_too_far_is_refused(tmp_path: Path) -> None:
    short = budget(when_short="clamp", min_tokens=60)
    async with journey(tmp_path, says("Paris"), budget=short, caps=cap('usd = "0.00025"')) as trip:
        refused = await trip.ask()
        assert (refused.status, refused.error["code"]) == (429, "budget_exceeded")
        assert (trip.first.turns, trip.holds()) == ([], {})


async def test_where_the_cap_is_in_tokens_a_call_is_cut_down_to_those(tmp_path: Path) -> None:
    short = budget(when_short="clamp", min_tokens=5)
    async with journey(tmp_path, says("Paris"), budget=short, caps=cap("tokens = 1000")) as trip:
        assert (await trip.ask(max_tokens=5_000)).status == 200
        (hold,) = trip.holds().values()
        assert hold.amounts.tokens == 1_000


class Holds:
    """A provider that answers each call when it may, and keeps the order in which they came."""

    def __init__(self) -> None:
        self.may_answer: dict[str, asyncio.Event] = {}

    async def __call__(self, turn: Turn) -> None:
        text = turn.json()["messages"][0]["content"]
        await self.may_answer.setdefault(text, asyncio.Event()).wait()
        await turn.reply(completion())

    def order(self, trip: Journey) -> list[str]:
        return [turn.json()["messages"][0]["content"] for turn in trip.first.turns]


# The hold of one call, and a little: 64 tokens of answer, and what the prompt can be at most.
ROOM_FOR_ONE = cap('usd = "0.0004"')


async def test_calls_wait_for_headroom_in_the_order_in_which_they_came(tmp_path: Path) -> None:
    holds = Holds()
    async with journey(tmp_path, holds, budget=budget(wait_ms=15_000), caps=ROOM_FOR_ONE) as trip:
        asked = []
        waiting = trip.gateway.runtime.bookkeeper.headroom._waiting
        for text in "abcd":
            asked.append(asyncio.create_task(trip.ask(text=text)))
            await trip.until(lambda: trip.first.turns)
            await trip.until(lambda: sum(map(len, waiting.values())) == len(asked) - 1)
        for place, text in enumerate("abcd"):
            await trip.first.turn(place)
            assert holds.order(trip) == list("abcd")[: place + 1]
            holds.may_answer[text].set()
        assert [(await one).status for one in asked] == [200] * 4
        assert not trip.gateway.runtime.bookkeeper.headroom._waiting
        assert [row.state for row in await trip.booked()] == ["posted"] * 4


async def test_headroom_that_does_not_come_in_time_is_reserved_for_others(tmp_path: Path) -> None:
    holds = Holds()
    async with journey(tmp_path, holds, budget=budget(wait_ms=30), caps=ROOM_FOR_ONE) as trip:
        first = asyncio.create_task(trip.ask(text="a"))
        await trip.first.turn()
        refused = await trip.ask(text="b")
        assert (refused.status, refused.error["code"]) == (429, "budget_reserved")
        assert refused.error["type"] == "rate_limit_error"
        assert int(refused.headers["retry-after-ms"]) > 0
        assert refused.headers["x-should-retry"] == "true"
        holds.may_answer["a"].set()
        assert (await first).status == 200
        assert holds.order(trip) == ["a"]
        assert not trip.gateway.runtime.bookkeeper.headroom._waiting


async def test_a_caller_who_leaves_the_queue_does_not_hold_it_up(tmp_path: Path) -> None:
    holds = Holds()
    async with journey(tmp_path, holds, budget=budget(wait_ms=15_000), caps=ROOM_FOR_ONE) as trip:
        waiting = trip.gateway.runtime.bookkeeper.headroom._waiting
        first = asyncio.create_task(trip.ask(text="a"))
        await trip.first.turn()
        async with connected(trip.gateway.data_url) as connection:
            connection.send(request(body=ordinary("b")))
            await trip.until(lambda: waiting)
            third = asyncio.create_task(trip.ask(text="c"))
            await trip.until(lambda: sum(map(len, waiting.values())) == 2)
        await trip.until(lambda: sum(map(len, waiting.values())) == 1)
        holds.may_answer["a"].set()
        await trip.first.turn(1)
        holds.may_answer["c"].set()
        assert [(await one).status for one in (first, third)] == [200, 200]
        assert holds.order(trip) == ["a", "c"]


async def test_a_cap_that_is_used_up_says_until_when(tmp_path: Path) -> None:
    async with journey(tmp_path, says("Paris"), caps=cap("requests = 1", per="month")) as trip:
        assert (await trip.ask()).status == 200
        refused = await trip.ask()
        assert (refused.status, refused.error["code"]) == (429, "budget_exceeded")
        assert refused.error["type"] == "insufficient_quota"
        assert "global 1 requests per month" in refused.error["message"]
        assert refused.headers["x-should-retry"] == "false"
        (account,) = trip.gateway.runtime.books.accounts()
        assert account.end_s is not None
        left_s = account.end_s - trip.record_of(refused).at_ms / 1000
        assert abs(int(refused.headers["Retry-After"]) - left_s) <= 2
        # It was recorded, though nobody was asked and nothing was held.
        assert trip.record_of(refused).error == "budget_exceeded"
        assert len(trip.holds()) == len(trip.first.turns) == 1


async def test_the_status_of_a_cap_that_is_used_up_may_be_402(tmp_path: Path) -> None:
    budget = AT_ONCE + "exceeded_status = 402\n"
    async with journey(tmp_path, says("Paris"), caps=cap("requests = 1"), budget=budget) as trip:
        assert (await trip.ask()).status == 200
        refused = await trip.ask()
        assert (refused.status, refused.error["code"]) == (402, "budget_exceeded")


async def test_a_total_has_no_reset(tmp_path: Path) -> None:
    async with journey(tmp_path, says("Paris"), caps=cap("requests = 1")) as trip:
        await trip.ask()
        assert "Retry-After" not in (await trip.ask()).headers


async def test_without_a_price_nobody_is_asked_where_dollars_are_capped(tmp_path: Path) -> None:
    async with journey(tmp_path, says("Paris"), caps=cap('usd = "1"'), config="") as trip:
        refused = await trip.ask()
        assert (refused.status, refused.error["code"]) == (402, "model_not_priced")
        assert refused.headers["x-should-retry"] == "false"
        assert "first/a" in refused.error["message"]
        assert trip.first.turns == []
    other = tmp_path / "other"
    other.mkdir()
    async with journey(other, says("Paris"), caps=cap("requests = 1"), config="") as trip:
        assert (await trip.ask()).status == 200


async def test_from_a_share_on_the_cheaper_model_answers(tmp_path: Path) -> None:
    switch = cap('requests = 4\nover_pct = 50\nuse = "second/b"')
    async with journey(tmp_path, says("Paris"), caps=switch) as trip:
        answers = [await trip.ask() for _ in range(5)]
        assert [answer.status for answer in answers] == [200] * 4 + [429]
        models = [answer.headers["x-gateway-model"] for answer in answers[:4]]
        assert models == ["first/a", "first/a", "second/b", "second/b"]
        assert ["x-gateway-budget-switch" in answer.headers for answer in answers[:4]] == [False, False, True, True]
        assert answers[2].headers["x-gateway-budget-switch"] == "global 4 requests in total"
        # The arm is the one that was drawn, and a model that was chosen is not a fallback.
        assert {answer.headers["x-gateway-variant"] for answer in answers[:4]} == {"baseline"}
        assert "x-gateway-fallback" not in answers[2].headers
        assert [row.on.model for row in await trip.booked()] == models


# --- Which account a call counts in -----------------------------------------------------------------------------------


async def statuses(trip: Journey, *calls: dict[str, Any]) -> list[int]:
    return [(await trip.ask(**call)).status for call in calls]


@pytest.mark.parametrize("unit", ["requests = 2", "tokens = 400"])
async def test_requests_and_tokens_are_capped_as_dollars_are(tmp_path: Path, unit: str) -> None:
    async with journey(tmp_path, used(prompt_tokens=100, completion_tokens=60), caps=cap(unit)) as trip:
        assert await statuses(trip, *[{}] * 3) == [200, 200, 429]


async def test_each_user_has_an_account(tmp_path: Path) -> None:
    async with journey(tmp_path, says("Paris"), caps=cap("requests = 1", scope="user")) as trip:
        calls = [{"user": name} for name in ("ann", "ann", "bob", "ann", "bob")]
        assert await statuses(trip, *calls) == [200, 429, 200, 429, 429]


async def test_each_key_has_an_account(tmp_path: Path) -> None:
    keys = "".join(
        f'[[keys]]\nname = "{name}"\nsha256 = "{sha256(name.encode()).hexdigest()}"\n' for name in ("one", "two")
    )
    caps = cap("requests = 1", scope="key") + keys
    async with journey(tmp_path, says("Paris"), caps=caps) as trip:
        calls = [{"headers": {"Authorization": f"Bearer {name}"}} for name in ("one", "one", "two")]
        assert await statuses(trip, *calls) == [200, 429, 200]


async def test_a_pair_has_an_account_for_each_pair(tmp_path: Path) -> None:
    async with journey(tmp_path, says("Paris"), caps=cap("requests = 1", scope="agent+user")) as trip:
        pairs = [("qa_agent", "ann"), ("lone_agent", "ann"), ("qa_agent", "bob"), ("qa_agent", "ann")]
        calls = [{"model": agent, "user": user} for agent, user in pairs]
        assert await statuses(trip, *calls) == [200, 200, 200, 429]


async def test_a_call_counts_where_its_operation_is_named(tmp_path: Path) -> None:
    caps = cap('requests = 1\nonly = { operation = ["benchmark", "finetune"] }')
    async with journey(tmp_path, says("Paris"), caps=caps) as trip:
        benchmark = {"headers": {"x-gateway-operation": "benchmark"}}
        finetune = {"headers": {"x-gateway-operation": "finetune"}}
        assert await statuses(trip, {}, benchmark, {}, finetune, benchmark, {}) == [200, 200, 200, 429, 429, 200]
        rows = await trip.booked()
        assert [row.on.operation for row in rows] == ["inference", "benchmark", "inference", "inference"]


async def test_all_accounts_hold_or_none_does(tmp_path: Path) -> None:
    caps = cap("requests = 3") + cap("requests = 1", scope="user")
    async with journey(tmp_path, says("Paris"), caps=caps, config=PRICES) as trip:
        assert await statuses(trip, {"user": "ann"}, {"user": "ann"}, {"user": "ann"}) == [200, 429, 429]
        # What ann was refused left nothing behind in the account of all.
        assert await statuses(trip, {"user": "bob"}, {"user": "cid"}, {"user": "dan"}) == [200, 200, 429]
        trip.check_at_rest()
