"""Feedback: kept before it is acknowledged, joined to its call however late, and told apart from what is not ours."""

import asyncio
import time
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from gateway.domain.outcome import Feedback
from gateway.store.experiments import Experiments
from tests.journey import POLICY, Answer, Journey, journey
from tests.scripted import refuses, says

KEYS = "".join(
    f'[[keys]]\nname = "{name}"\nsha256 = "{sha256(name.encode()).hexdigest()}"\n' for name in ("one", "two")
)


def by(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {name}"}


async def give(trip: Journey, headers: Mapping[str, str] | None = None, **said: Any) -> Answer:
    async with trip.session.post(f"{trip.gateway.data_url}/v1/feedback", json=said, headers=headers) as response:
        return Answer(response.status, response.headers, await response.read())


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
        ({"call_id": "req-1", "score": 1.01}, "invalid_type", "score"),
        ({"call_id": "req-1", "score": -2}, "invalid_type", "score"),
        ({"call_id": "req-1", "score": "good"}, "invalid_type", "score"),
        ({"call_id": "req-1", "thumbs": "sideways"}, "invalid_type", "thumbs"),
        ({"call_id": "", "thumbs": "up"}, "invalid_type", "call_id"),
        ({"call_id": "req-1", "thumbs": "up", "label": "x" * 101}, "invalid_type", "label"),
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
