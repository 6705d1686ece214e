"""Feedback: kept before it is acknowledged, joined to its call however late, and told apart from what is not ours."""

import asyncio
import sqlite3
import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from hashlib import sha256
from itertools import count
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest

from gateway.domain.outcome import Feedback
from gateway.edge import feedback as room
from gateway.edge.feedback import MAX_BYTES, PATH
from gateway.store.experiments import Experiments
from tests.journey import PATIENCE_S, POLICY, Answer, Journey, journey
from tests.raw_http import check_refusal, connected, request
from tests.running import running_gateway
from tests.scripted import refuses, says

KEYS = "".join(
    f'[[keys]]\nname = "{name}"\nsha256 = "{sha256(name.encode()).hexdigest()}"\n' for name in ("one", "two")
)


def by(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {name}"}


async def give(trip: Journey, headers: Mapping[str, str] | None = None, **said: Any) -> Answer:
    async with trip.session.post(f"{trip.gateway.data_url}/v1/feedback", json=said, headers=headers) as response:
        return Answer(response.status, response.headers, await response.read())


def is_later(answer: Answer, code: str) -> bool:
    """Whether the caller is asked to say it again."""
    return (answer.status, answer.error["code"], answer.headers["Retry-After"]) == (503, code, "1")


@contextmanager
def locked(tmp_path: Path) -> Iterator[None]:
    """In this block another process writes to the store, so that it can be read and not written to."""
    other = sqlite3.connect(tmp_path / "gateway.db", isolation_level=None, timeout=PATIENCE_S)
    other.execute("BEGIN IMMEDIATE")
    try:
        yield
    finally:
        other.close()


class Door:
    """Before the store: while it is shut, whoever brings feedback stands there, as before a store that is locked."""

    def __init__(self) -> None:
        self.is_open = threading.Event()
        self.came: list[Feedback] = []
        self._give = room._give

    def give(self, store: Path, feedback: Feedback) -> bool:
        self.came.append(feedback)
        assert self.is_open.wait(PATIENCE_S)
        return self._give(store, feedback)


@pytest.fixture
def door(monkeypatch: pytest.MonkeyPatch) -> Iterator[Door]:
    door = Door()
    monkeypatch.setattr(room, "_give", door.give)
    yield door
    door.is_open.set()


def kept(tmp_path: Path, call_id: str) -> list[Feedback]:
    with Experiments(tmp_path / "gateway.db", clock=time.time) as experiments:
        return experiments.feedback(call_id)


@pytest.mark.parametrize(
    ("said", "score"), [({"thumbs": "up"}, 1.0), ({"thumbs": "down"}, -1.0), ({"score": 0.25, "label": "so so"}, 0.25)]
)
async def test_it_is_joined_to_its_call_at_once(tmp_path: Path, said: dict[str, Any], score: float) -> None:
    async with journey(tmp_path, says("Paris")) as trip:
        # Nobody waits for the store to have heard of the call.
        call_id = (await trip.ask()).headers["x-request-id"]
        answer = await give(trip, call_id=call_id, **said)
        assert answer.status == 200
        label = said.get("label", "")
        assert answer.json() == {"object": "feedback", "call_id": call_id, "score": score, "label": label}
        ((one),) = kept(tmp_path, call_id)
        assert (one.score, one.label) == (score, label)


async def test_what_is_said_last_counts(tmp_path: Path) -> None:
    async with journey(tmp_path, says("Paris")) as trip:
        call_id = (await trip.ask()).headers["x-request-id"]
        for score in (1.0, -0.5, 0.5):
            await give(trip, call_id=call_id, score=score)
        assert [one.score for one in kept(tmp_path, call_id)] == [0.5]


@pytest.mark.parametrize("clock_ms", [(5, 6), (5, 5), (5, 4)], ids=["goes on", "stands still", "is set back"])
async def test_what_is_said_last_counts_also_where_what_was_said_first_had_to_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock_ms: tuple[int, int]
) -> None:
    clock, give, tries, is_second_kept = iter(clock_ms), room._give, list[str](), threading.Event()

    def give_once_known(store: Path, feedback: Feedback) -> bool:
        tries.append(feedback.label)
        # To the first the call is not known before the second has been kept.
        return (feedback.label == "second" or is_second_kept.is_set()) and give(store, feedback)

    monkeypatch.setattr(room, "_give", give_once_known)
    monkeypatch.setattr(room, "_now_ms", lambda: next(clock))
    monkeypatch.setattr(room, "_WAITS_S", (0.01,) * 2_000)
    monkeypatch.setattr(room, "_PATIENCE_S", PATIENCE_S)
    async with journey(tmp_path, says("Paris")) as trip:
        call_id = (await trip.ask()).headers["x-request-id"]
        first = asyncio.create_task(give_label(trip, call_id, "first"))
        await trip.until(lambda: "first" in tries)
        assert (await give_label(trip, call_id, "second")).status == 200
        is_second_kept.set()
        # It was overtaken, and is as good as kept.
        assert (await first).status == 200
        assert [one.label for one in kept(tmp_path, call_id)] == ["second"]


async def give_label(trip: Journey, call_id: str, label: str) -> Answer:
    return await give(trip, call_id=call_id, score=1, label=label)


async def test_of_a_call_that_failed_one_may_say_something_too(tmp_path: Path) -> None:
    async with journey(tmp_path, refuses(400)) as trip:
        answer = await trip.ask(model="lone_agent")
        assert (await give(trip, call_id=answer.headers["x-request-id"], thumbs="down")).status == 200


async def test_a_call_that_is_not_known_or_was_refused_is_not_found(tmp_path: Path) -> None:
    async with journey(tmp_path, says("Paris")) as trip:
        refused = await trip.ask(model="no_such_agent")
        for call_id in ("req-nobody", refused.headers["x-request-id"], "'; DROP TABLE feedback; --"):
            answer = await give(trip, call_id=call_id, thumbs="up")
            assert (answer.status, answer.error["code"]) == (404, "call_not_found")
            assert kept(tmp_path, call_id) == []


async def test_a_call_that_the_store_has_not_heard_of_yet_is_to_be_asked_for_again(tmp_path: Path) -> None:
    async with journey(tmp_path, says("Paris"), says("Rome")) as trip:
        await trip.ask()
        await trip.booked()
        with locked(tmp_path):
            answer = await trip.ask()
            call_id = answer.headers["x-request-id"]
            assert answer.status == 200
            # It can be read all the while, and says nothing of this call; nor does it know yet that it is locked.
            assert is_later(await give(trip, call_id=call_id, thumbs="up"), "budget_unavailable")
        await trip.booked()
        assert (await give(trip, call_id=call_id, thumbs="up")).status == 200


async def test_no_call_is_said_to_be_unknown_while_the_store_is_out_of_order(tmp_path: Path) -> None:
    async with journey(tmp_path, says("Paris")) as trip:
        bookkeeper = trip.gateway.runtime.bookkeeper
        with locked(tmp_path):
            await trip.until(lambda: bookkeeper.store_error)
            # Another process may have served it, and have no way to tell of it either.
            assert is_later(await give(trip, call_id="req-of-another", thumbs="up"), "budget_unavailable")
        await trip.until(lambda: not bookkeeper.store_error)
        assert (await give(trip, call_id="req-of-another", thumbs="up")).status == 404


async def test_a_key_hears_of_no_calls_but_its_own(tmp_path: Path) -> None:
    async with journey(tmp_path, says("Paris"), policy=POLICY + KEYS) as trip:
        call_id = (await trip.ask(headers=by("one"))).headers["x-request-id"]
        assert (await give(trip, call_id=call_id, thumbs="up")).status == 401
        assert (await give(trip, by("two"), call_id=call_id, thumbs="up")).status == 404
        assert (await give(trip, by("one"), call_id=call_id, thumbs="up")).status == 200
        assert [one.caller for one in kept(tmp_path, call_id)] == ["one"]


@pytest.mark.parametrize(
    ("said", "code", "param"),
    [
        ({"thumbs": "up"}, "missing_field", "call_id"),
        ({"call_id": "req-1"}, "invalid_value", "score"),
        ({"call_id": "req-1", "score": 1, "thumbs": "up"}, "invalid_value", "score"),
        ({"call_id": "req-1", "score": 1.01}, "invalid_value", "score"),
        ({"call_id": "req-1", "score": -2}, "invalid_value", "score"),
        ({"call_id": "req-1", "score": "good"}, "invalid_type", "score"),
        ({"call_id": "req-1", "thumbs": 1}, "invalid_type", "thumbs"),
        ({"call_id": "req-1", "thumbs": "sideways"}, "invalid_value", "thumbs"),
        ({"call_id": "", "thumbs": "up"}, "invalid_value", "call_id"),
        ({"call_id": "req-1", "thumbs": "up", "label": "x" * 101}, "invalid_value", "label"),
        ({"call_id": "req-1", "thumbs": "up", "stars": 5}, "invalid_value", "stars"),
    ],
)
async def test_what_makes_no_sense_is_refused_and_nothing_is_kept(
    tmp_path: Path, said: dict[str, Any], code: str, param: str
) -> None:
    async with journey(tmp_path, says("Paris")) as trip:
        answer = await give(trip, **said)
        assert (answer.status, answer.error["code"], answer.error["param"]) == (400, code, param)
        assert kept(tmp_path, "req-1") == []


async def test_callers_who_say_something_at_once_are_all_heard(tmp_path: Path) -> None:
    async with journey(tmp_path, says("Paris")) as trip:
        answers = await asyncio.gather(*(trip.ask() for _ in range(20)))
        ids = [answer.headers["x-request-id"] for answer in answers]
        said = await asyncio.gather(*(give(trip, call_id=call_id, score=0.5) for call_id in ids))
        assert {one.status for one in said} == {200}
        assert all(kept(tmp_path, call_id) for call_id in ids)


async def test_what_was_kept_and_what_was_refused_is_counted(tmp_path: Path) -> None:
    async with journey(tmp_path, says("Paris")) as trip:
        call_id = (await trip.ask()).headers["x-request-id"]
        await give(trip, call_id=call_id, score=1)
        await give(trip, call_id=call_id, score=3)
        async with trip.session.get(f"{trip.gateway.admin_url}/metrics") as response:
            lines = (await response.text()).split("\n")
        assert 'gateway_feedback_total{result="kept"} 1.0' in lines
        assert 'gateway_feedback_total{result="refused"} 1.0' in lines


# --- What it may cost the rest ---------------------------------------------------------------------------------------


async def test_a_body_is_taken_up_to_its_limit_and_not_beyond(tmp_path: Path) -> None:
    async with journey(tmp_path, says("Paris")) as trip:
        call_id = (await trip.ask()).headers["x-request-id"]
        said = msgspec.json.encode({"call_id": call_id, "thumbs": "up"})
        for size, status in ((MAX_BYTES, 200), (MAX_BYTES + 1, 413)):
            async with trip.session.post(f"{trip.gateway.data_url}{PATH}", data=said.ljust(size)) as response:
                assert response.status == status


@pytest.mark.parametrize(
    "sent",
    [
        # By what it announces, before a byte of it is there; or as soon as too much of it is, and no end.
        b"Content-Length: %d\r\n\r\n" % (MAX_BYTES + 1),
        b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % (MAX_BYTES + 100) + b"x" * (MAX_BYTES + 1),
    ],
    ids=["announced", "chunked"],
)
async def test_a_body_that_is_too_long_is_refused_before_it_is_there(tmp_path: Path, sent: bytes) -> None:
    # Far below what a call's body may be.
    async with running_gateway(tmp_path) as gateway, connected(gateway.data_url) as connection:
        connection.send(request(target=PATH).removesuffix(b"\r\n") + sent)
        reply = await connection.reply()
        assert str(MAX_BYTES) in check_refusal(reply, 413, "body_too_large")
        assert reply.headers["connection"] == "close"


async def test_where_calls_may_be_shorter_still_so_is_feedback(tmp_path: Path) -> None:
    async with (
        running_gateway(tmp_path, server="max_body_bytes = 1000") as gateway,
        connected(gateway.data_url) as connection,
    ):
        connection.send(request(target=PATH, body=b"x" * 1_001))
        assert "1000" in check_refusal(await connection.reply(), 413, "body_too_large")


async def test_a_body_that_is_wrong_otherwise_is_refused_as_a_calls_is(tmp_path: Path) -> None:
    async with running_gateway(tmp_path) as gateway, connected(gateway.data_url) as connection:
        connection.send(request(target=PATH, headers=b"Content-Encoding: gzip\r\n", body=b"{}"))
        check_refusal(await connection.reply(), 415, "unsupported_encoding")


async def test_calls_and_scrapes_do_not_wait_behind_feedback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, door: Door
) -> None:
    monkeypatch.setattr(room, "_PATIENCE_S", PATIENCE_S)
    async with fsyncing(tmp_path) as trip:
        call_id = (await trip.ask()).headers["x-request-id"]
        # More than asyncio has threads.
        waiting = [asyncio.create_task(give(trip, call_id=call_id, score=1)) for _ in range(50)]
        await trip.until(lambda: door.came)
        async with asyncio.timeout(PATIENCE_S / 2):
            assert (await trip.ask()).status == 200
            async with trip.session.get(f"{trip.gateway.admin_url}/metrics") as response:
                assert "gateway_feedback_total" in await response.text()
        assert not any(task.done() for task in waiting)
        assert len(door.came) == 1
        door.is_open.set()
        assert {answer.status for answer in await asyncio.gather(*waiting)} == {200}


@asynccontextmanager
async def fsyncing(tmp_path: Path) -> AsyncIterator[Journey]:
    """A gateway whose calls wait for the disk."""
    async with journey(tmp_path, says("Paris")) as trip:
        trip.gateway.runtime.journal._fsync = True
        trip.session._connector._limit = 0  # type: ignore[union-attr]
        yield trip


async def test_no_more_than_so_much_feedback_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, door: Door) -> None:
    monkeypatch.setattr(room, "_PATIENCE_S", PATIENCE_S)
    monkeypatch.setattr(room, "_MAX_WAITING", 3)
    async with journey(tmp_path, says("Paris")) as trip:
        call_id = (await trip.ask()).headers["x-request-id"]
        sent = [asyncio.create_task(give(trip, call_id=call_id, score=1)) for _ in range(4)]
        await trip.until(lambda: any(task.done() for task in sent))
        (refused,) = [task.result() for task in sent if task.done()]
        assert is_later(refused, "overloaded")
        door.is_open.set()
        assert sorted(answer.status for answer in await asyncio.gather(*sent)) == [200, 200, 200, 503]


async def test_nobody_waits_for_ever_for_a_store_that_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, door: Door
) -> None:
    monkeypatch.setattr(room, "_PATIENCE_S", 0.01)
    async with journey(tmp_path, says("Paris")) as trip:
        call_id = (await trip.ask()).headers["x-request-id"]
        answers = await asyncio.gather(*(give(trip, call_id=call_id, score=1) for _ in range(3)))
        assert all(is_later(answer, "budget_unavailable") for answer in answers)
        door.is_open.set()
        monkeypatch.setattr(room, "_PATIENCE_S", PATIENCE_S)
        assert (await give(trip, call_id=call_id, score=0.5)).status == 200
        # Of those who had left only the one who stood at the door was ever let in, and was not the last to speak.
        assert [one.score for one in door.came].count(1) == 1
        assert [one.score for one in kept(tmp_path, call_id)] == [0.5]


async def test_a_gateway_that_shuts_down_takes_no_more(tmp_path: Path) -> None:
    async with running_gateway(tmp_path) as gateway, connected(gateway.data_url) as connection:
        gateway.runtime.is_draining = True
        connection.send(request(target=PATH, body=b'{"call_id": "req-1", "thumbs": "up"}'))
        reply = await connection.reply()
        check_refusal(reply, 503, "draining")
        assert (reply.headers["retry-after"], reply.headers["connection"]) == ("1", "close")


async def test_a_stop_answers_what_waits_and_leaves_no_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, door: Door
) -> None:
    clock = count()
    monkeypatch.setattr(room, "_now_ms", lambda: next(clock))
    async with aiohttp.ClientSession() as session:
        async with running_gateway(tmp_path) as gateway:
            loaded = gateway.gateway._loaded
            server = msgspec.structs.replace(loaded.settings.server, drain_s=PATIENCE_S)
            gateway.gateway._loaded = loaded._replace(settings=msgspec.structs.replace(loaded.settings, server=server))
            trip = Journey(gateway, session, None, None)  # type: ignore[arg-type]
            waiting = [asyncio.create_task(give(trip, call_id="req-1", score=1)) for _ in range(5)]
            # Each is given the time at which it arrived.
            await trip.until(lambda: repr(clock) == "count(5)" and door.came)
        # The store has never answered.
        assert all(is_later(answer, "budget_unavailable") for answer in await asyncio.gather(*waiting))
    door.is_open.set()
    for thread in [thread for thread in threading.enumerate() if thread.name.startswith("feedback")]:
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
    assert len(door.came) == 1
