"""One call's way down its chain: what is tried again, what is passed over, how long is waited, who is left alone."""

import asyncio
import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from gateway.decide.breaker import State
from gateway.domain.errors import FaultKind
from gateway.edge import failover
from tests.journey import NO_RETRIES, PATIENCE_S, POLICY, PRICES, QUICK_RETRIES, Answer, Journey, journey
from tests.raw_http import connected, ordinary, request
from tests.scripted import (
    DONE,
    Scene,
    Turn,
    completion,
    delta,
    error_body,
    refuses,
    resets,
    says,
    silent,
)

DOWN = refuses(503, error_body("Come back later."))
QUICK = POLICY + QUICK_RETRIES


def breakers(consecutive: int, *, open_s: float = 300, retries: str = NO_RETRIES) -> str:
    """A policy under which so many failures in a row open a breaker."""
    return f"{POLICY}{retries}[breakers]\nconsecutive = {consecutive}\nopen_s = {open_s}\nmax_open_s = {open_s * 8}\n"


def attempts(answer: Answer) -> int:
    return int(answer.headers["x-gateway-attempts"])


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long was waited between tries; nobody really waits."""
    waited: list[float] = []

    async def wait(seconds: float) -> None:
        waited.append(seconds)

    monkeypatch.setattr(failover, "asyncio", SimpleNamespace(sleep=wait))
    return waited


def throw(trip: Journey, dice: float) -> None:
    """From now on the dice always show this."""
    trip.gateway.runtime.dice = SimpleNamespace(random=lambda: dice)  # type: ignore[assignment]


# --- Again at the same model ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("scene", [refuses(500, error_body()), resets, DOWN], ids=["500", "reset", "503"])
async def test_a_failure_that_may_be_chance_is_tried_once_more_at_the_same_model(
    tmp_path: Path, scene: Scene, stream: bool
) -> None:
    async with journey(tmp_path, scene, says("Paris"), policy=QUICK) as trip:
        answer = await trip.ask(stream=stream)
        assert (answer.streamed_text if stream else answer.text) == "Paris"
        assert attempts(answer) == 2
        assert answer.headers["x-gateway-model"] == "first/a"
        # The model that was wanted answered, so nothing has fallen back.
        assert "x-gateway-fallback" not in answer.headers
        assert not trip.record.is_fallback
        assert not trip.second.turns
        trip.check_at_rest()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_model_that_stays_down_is_passed_over(tmp_path: Path, stream: bool) -> None:
    async with journey(tmp_path, DOWN, policy=QUICK) as trip:
        answer = await trip.ask(stream=stream)
        assert answer.headers["x-gateway-model"] == "second/b"
        assert [(one.ref, one.fault) for one in trip.record.attempts] == [
            ("first/a", FaultKind.SERVER),
            ("first/a", FaultKind.SERVER),
            ("second/b", None),
        ]
        # What failed without an answer is not billed.
        assert [one.cost_nusd for one in trip.record.attempts[:2]] == [0, 0]
        assert trip.record.cost_nusd == trip.record.attempts[2].cost_nusd > 0


async def test_each_model_has_its_own_second_try(tmp_path: Path) -> None:
    async with journey(tmp_path, DOWN, policy=QUICK) as trip:
        trip.second.then(DOWN, says("Paris"))
        answer = await trip.ask()
        assert (answer.text, attempts(answer)) == ("Paris", 4)


@pytest.mark.parametrize("stream", [False, True])
async def test_silence_is_not_asked_twice(tmp_path: Path, stream: bool) -> None:
    async with journey(tmp_path, silent, policy=QUICK, timeouts="first_byte_s = 0.05, first_token_s = 0.05") as trip:
        assert attempts(await trip.ask(stream=stream)) == 2
        assert len(trip.first.turns) == 1


# --- The waits --------------------------------------------------------------------------------------------------------


async def test_waits_grow_and_stay_anywhere_below_their_bound(tmp_path: Path, waits: list[float]) -> None:
    busy = refuses(429, error_body("Slow down."))
    async with journey(tmp_path, busy, policy=f"{POLICY}[retries]\nbase_s = 1.0\nmax_wait_s = 1.5\n") as trip:
        for dice in (0.999, 0.0, 0.5):
            throw(trip, dice)
            # A call's own budget of retries, lest the upstream's runs out.
            trip.gateway.runtime.standing._budgets.clear()
            answer = await trip.ask()
            assert answer.headers["x-gateway-model"] == "second/b"
        # Never more than two retries: it is not hammered.
        assert len(trip.first.turns) == 9
        assert waits == pytest.approx([0.999, 0.999 * 1.5, 0, 0, 0.5, 0.75])


@pytest.mark.parametrize(
    "headers, wait_s", [({"Retry-After": "2"}, 2.0), ({"retry-after-ms": "30"}, 0.03), ({"Retry-After": "0"}, 0.0)]
)
async def test_what_a_provider_asks_for_is_waited(
    tmp_path: Path, waits: list[float], headers: dict[str, str], wait_s: float
) -> None:
    busy = refuses(429, error_body("Slow down."), headers)
    async with journey(tmp_path, busy, says("Paris")) as trip:
        throw(trip, 0.0)
        answer = await trip.ask()
        assert (answer.text, attempts(answer)) == ("Paris", 2)
        assert waits == [wait_s]
        assert not trip.second.turns


async def test_those_told_the_same_do_not_come_back_together(tmp_path: Path, waits: list[float]) -> None:
    busy = refuses(429, error_body(), {"Retry-After": "2"})
    async with journey(tmp_path, busy, says("Paris"), policy=f"{POLICY}[retries]\nbase_s = 0.5\n") as trip:
        throw(trip, 0.5)
        await trip.ask()
        assert waits == [2.25]


async def test_the_time_that_is_waited_is_not_our_overhead(tmp_path: Path, waits: list[float]) -> None:
    busy = refuses(429, error_body(), {"Retry-After": "2"})
    async with journey(tmp_path, busy, says("Paris")) as trip:
        await trip.ask()
        assert len(waits) == 1
        # Two seconds more than passed, since nobody really waited.
        assert trip.record.overhead_ms < -1_900


@pytest.mark.parametrize("after", ["6", "3600", "Fri, 21 Nov 2200 04:40:00 GMT"])
async def test_nobody_waits_for_longer_than_the_policy_says(tmp_path: Path, waits: list[float], after: str) -> None:
    async with journey(tmp_path, refuses(429, error_body(), {"Retry-After": after})) as trip:
        answer = await trip.ask()
        assert (answer.headers["x-gateway-model"], attempts(answer)) == ("second/b", 2)
        lone = await trip.ask(model="lone_agent")
        assert (lone.status, lone.headers["Retry-After"], attempts(lone)) == (429, after, 1)
        assert waits == []


async def test_a_wait_that_does_not_fit_the_deadline_is_not_begun(tmp_path: Path, waits: list[float]) -> None:
    async with journey(tmp_path, refuses(429, error_body("Slow down."), {"Retry-After": "4"})) as trip:
        answer = await trip.ask(model="lone_agent", headers={"x-gateway-timeout-ms": "3900"})
        assert (answer.status, answer.error["message"]) == (429, "Slow down.")
        answer = await trip.ask(headers={"x-gateway-timeout-ms": "3900"})
        assert answer.headers["x-gateway-model"] == "second/b"
        assert waits == []
        await trip.ask(model="lone_agent", headers={"x-gateway-timeout-ms": "9000"})
        assert waits


# --- The retry budget -------------------------------------------------------------------------------------------------


async def test_what_an_upstream_gets_of_retries_is_a_share_of_its_calls(tmp_path: Path) -> None:
    """The budget is spent by all its callers together, and comes back only with calls."""
    policy = f"{breakers(1000, retries=QUICK_RETRIES)}min_calls = 1000\n".replace(
        "base_s", "budget_floor = 0\nbudget_percent = 20\nbudget_window_s = 3600\nbase_s"
    )
    async with journey(tmp_path, says("Paris"), policy=policy) as trip:
        for _ in range(10):
            await trip.ask()
        trip.first.then(DOWN)
        for _ in range(4):
            assert (await trip.ask()).text == "From the second."
        # 20 % of 11 calls is two retries, and of 14 not yet three.
        assert len(trip.first.turns) == 10 + 4 + 2
        assert (await trip.ask()).text == "From the second."
        assert len(trip.first.turns) == 10 + 5 + 3


async def test_the_floor_lets_an_idle_upstream_retry(tmp_path: Path) -> None:
    policy = POLICY + QUICK_RETRIES + "budget_floor = 1\nbudget_percent = 0\nbudget_window_s = 3600\n"
    async with journey(tmp_path, DOWN, policy=policy) as trip:
        assert [attempts(await trip.ask()) for _ in range(3)] == [3, 2, 2]
        rendered = (await (await trip.session.get(f"{trip.gateway.admin_url}/metrics")).text()).splitlines()
        assert 'gateway_retries_total{upstream="first"} 1.0' in rendered
        assert 'gateway_retry_budget_left{upstream="first"} 0.0' in rendered


# --- Breakers ---------------------------------------------------------------------------------------------------------


def cool(trip: Journey, ref: str = "first/a") -> None:
    """Let the time pass for which a breaker stays open."""
    assert trip.breaker(ref).state is State.OPEN
    trip.breaker(ref)._opened_s = -math.inf


@pytest.mark.parametrize("stream", [False, True])
async def test_a_model_that_keeps_failing_is_left_alone(tmp_path: Path, stream: bool) -> None:
    async with journey(tmp_path, DOWN, policy=breakers(3)) as trip:
        assert [attempts(await trip.ask(stream=stream)) for _ in range(2)] == [2, 2]
        assert trip.breaker().state is State.CLOSED
        assert attempts(await trip.ask(stream=stream)) == 2
        assert trip.breaker().state is State.OPEN
        for _ in range(3):
            answer = await trip.ask(stream=stream)
            assert attempts(answer) == 1
            assert answer.headers["x-gateway-model"] == "second/b"
            assert answer.headers["x-gateway-fallback"] == "first/a"
        assert len(trip.first.turns) == 3
        assert trip.gateway.journal()[-1].is_fallback
        rendered = await (await trip.session.get(f"{trip.gateway.admin_url}/metrics")).text()
        assert 'gateway_breaker_state{model="first/a",upstream="first"} 2.0' in rendered
        # Other models there are not concerned.
        trip.first.then(says("fine-tuned"))
        assert trip.breaker("first/ft:a").state is State.CLOSED


async def test_an_answer_between_two_failures_begins_the_count_anew(tmp_path: Path) -> None:
    async with journey(tmp_path, DOWN, says("Paris"), DOWN, DOWN, policy=breakers(3)) as trip:
        for _ in range(4):
            await trip.ask()
        assert trip.breaker().state is State.CLOSED
        await trip.ask()
        assert trip.breaker().state is State.OPEN


async def open_breaker(trip: Journey, ref: str = "first/a") -> None:
    """Fail until the breaker is open, and let its time pass."""
    while trip.breaker(ref).state is not State.OPEN:
        await trip.ask()
    cool(trip, ref)


@pytest.mark.parametrize("stream", [False, True])
async def test_one_call_at_a_time_tries_a_model_that_was_down_and_its_answer_brings_it_back(
    tmp_path: Path, stream: bool
) -> None:
    go_on = asyncio.Event()

    async def recovers(turn: Turn) -> None:
        await go_on.wait()
        await says("Par", "is")(turn)

    async with journey(tmp_path, DOWN, recovers, policy=breakers(1)) as trip:
        await open_breaker(trip)
        probe = asyncio.ensure_future(trip.ask(stream=stream))
        await trip.first.turn(1)
        assert trip.breaker().state is State.HALF_OPEN
        for _ in range(3):
            others = await asyncio.gather(*(trip.ask(stream=stream) for _ in range(5)))
            assert {one.headers["x-gateway-model"] for one in others} == {"second/b"}
        assert len(trip.first.turns) == 2
        go_on.set()
        answer = await probe
        assert (answer.streamed_text if stream else answer.text) == "Paris"
        assert trip.breaker().state is State.CLOSED
        assert (await trip.ask()).headers["x-gateway-model"] == "first/a"
        trip.check_at_rest()


async def test_a_probe_that_fails_costs_its_caller_nothing_and_doubles_the_pause(tmp_path: Path) -> None:
    async with journey(tmp_path, DOWN, policy=breakers(1, open_s=10)) as trip:
        for pause_s in (10, 20, 40, 80, 80):
            await open_breaker(trip)
            assert trip.breaker()._open_s == pause_s
            answer = await trip.ask()
            assert (answer.text, attempts(answer)) == ("From the second.", 2)
            assert trip.breaker().state is State.OPEN
        trip.first.then(says("Paris"))
        cool(trip)
        assert (await trip.ask()).text == "Paris"
        assert (trip.breaker().state, trip.breaker()._open_s) == (State.CLOSED, 10)


async def test_a_probe_is_not_repeated_on_the_spot(tmp_path: Path) -> None:
    async with journey(tmp_path, DOWN, policy=breakers(1, retries=QUICK_RETRIES)) as trip:
        await open_breaker(trip)
        seen = len(trip.first.turns)
        assert attempts(await trip.ask()) == 2
        assert len(trip.first.turns) == seen + 1


NOT_THE_MODELS: dict[str, Scene] = {
    "a request that is wrong": refuses(400, error_body(type="invalid_request_error")),
    "a filter": refuses(400, error_body(code="content_filter")),
    "a prompt that is too long": refuses(400, error_body(code="context_length_exceeded")),
    "a rate limit": refuses(429, error_body()),
}


@pytest.mark.parametrize("name", NOT_THE_MODELS)
async def test_what_is_not_the_models_doing_never_opens_its_breaker(tmp_path: Path, name: str) -> None:
    async with journey(tmp_path, NOT_THE_MODELS[name], policy=f"{breakers(2)}min_calls = 2\n") as trip:
        for _ in range(10):
            await trip.ask(model="lone_agent")
        assert trip.breaker().state is State.CLOSED
        assert len(trip.first.turns) == 10


@pytest.mark.parametrize("name", NOT_THE_MODELS)
async def test_a_probe_that_tells_nothing_lets_the_next_call_try(tmp_path: Path, name: str) -> None:
    async with journey(tmp_path, DOWN, policy=breakers(1)) as trip:
        await open_breaker(trip)
        trip.first.then(NOT_THE_MODELS[name])
        assert (await trip.ask(model="lone_agent")).status in (400, 429)
        assert trip.breaker().state is State.HALF_OPEN
        trip.check_at_rest()
        trip.first.then(says("Paris"))
        assert (await trip.ask()).text == "Paris"
        assert trip.breaker().state is State.CLOSED


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_a_probe_lets_the_next_call_try(tmp_path: Path, stream: bool) -> None:
    async with journey(tmp_path, DOWN, silent, says("Paris"), policy=breakers(1)) as trip:
        await open_breaker(trip)
        async with connected(trip.gateway.data_url) as connection:
            connection.send(request(body=ordinary(stream=stream)))
            turn = await trip.first.turn(1)
            assert trip.breaker().state is State.HALF_OPEN
            connection.close()
            await turn.peer_left.wait()
        trip.check_at_rest()
        assert trip.gateway.journal()[-1].client_left
        assert (await trip.ask()).text == "Paris"
        assert trip.breaker().state is State.CLOSED


async def test_a_probe_that_no_money_is_left_for_lets_the_next_call_try(tmp_path: Path) -> None:
    cap = '[[caps]]\nper = "total"\nrequests = 1\n'
    async with journey(tmp_path, DOWN, policy=breakers(1), caps=cap) as trip:
        await open_breaker(trip)
        assert (await trip.ask()).error["code"] == "budget_exceeded"
        assert trip.breaker().state is State.HALF_OPEN
        await trip.gateway.reload(policy=breakers(1) + cap.replace("1", "2"))
        assert trip.gateway.runtime.reload_error == ""
        trip.first.then(says("Paris"))
        # What was learnt of the model is older than the reload, and still known.
        assert (await trip.ask()).text == "Paris"


async def test_a_fallback_that_is_asked_in_the_place_of_an_open_model_is_the_last_of_the_chain(tmp_path: Path) -> None:
    async with journey(tmp_path, DOWN, policy=breakers(1)) as trip:
        await open_breaker(trip)
        trip.breaker()._opened_s = math.inf
        await trip.gateway.reload(policy=breakers(1000, retries=QUICK_RETRIES))
        seen = len(trip.second.turns)
        trip.second.then(DOWN)
        answer = await trip.ask()
        assert (answer.status, attempts(answer)) == (503, 2)
        assert len(trip.second.turns) == seen + 2


@pytest.mark.parametrize("stream", [False, True])
async def test_when_every_breaker_is_open_the_first_model_is_asked_all_the_same(tmp_path: Path, stream: bool) -> None:
    async with journey(tmp_path, DOWN, second=DOWN, policy=breakers(1)) as trip:
        assert (await trip.ask(stream=stream)).status == 503
        assert (trip.breaker().state, trip.breaker("second/b").state) == (State.OPEN, State.OPEN)
        answer = await trip.ask(stream=stream)
        assert (answer.status, answer.error["message"]) == (503, "Come back later.")
        assert (len(trip.first.turns), len(trip.second.turns)) == (2, 1)
        trip.first.then(says("Paris"))
        answer = await trip.ask(stream=stream)
        assert (answer.streamed_text if stream else answer.text) == "Paris"
        trip.check_at_rest()


async def test_an_open_fallback_is_passed_over_and_the_first_speaks(tmp_path: Path) -> None:
    async with journey(tmp_path, DOWN, second=DOWN, policy=breakers(1)) as trip:
        await trip.ask()
        cool(trip)
        answer = await trip.ask()
        assert (attempts(answer), answer.error["message"]) == (1, "Come back later.")
        assert len(trip.second.turns) == 1


# --- Further down the chain -------------------------------------------------------------------------------------------

LONG_CHAIN = """
[agents.qa_agent]
finetuned = "first/ft:a"
baseline  = "first/a"
fallbacks = ["second/small", "second/unknown", "second/large"]
"""
TOO_LONG = refuses(400, error_body("It is too long.", type="invalid_request_error", code="context_length_exceeded"))


def by_model(scenes: dict[str, Scene]) -> Scene:
    """A provider that plays a scene per model."""

    async def scene(turn: Turn) -> None:
        await scenes[turn.json()["model"]](turn)

    return scene


def sizes(**tokens: int) -> str:
    refs = {"a": "first/a", "small": "second/small", "unknown": "second/unknown", "large": "second/large"}
    return f"{PRICES}[context_tokens]\n" + "".join(f'"{refs[name]}" = {size}\n' for name, size in tokens.items())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "tokens, asked",
    [
        ({"a": 8_000, "small": 4_000, "unknown": 8_000, "large": 32_000}, ["large"]),
        ({"a": 8_000, "small": 4_000, "large": 32_000}, ["unknown", "large"]),
        ({"small": 4_000, "large": 32_000}, ["small", "unknown", "large"]),
        ({"a": 8_000, "small": 8_000, "unknown": 1, "large": 7_999}, []),
    ],
)
async def test_a_prompt_that_is_too_long_goes_to_a_larger_model(
    tmp_path: Path, tokens: dict[str, int], asked: list[str], stream: bool
) -> None:
    scenes = {"small": TOO_LONG, "unknown": TOO_LONG, "large": says("Paris")}
    async with journey(
        tmp_path, TOO_LONG, second=by_model(scenes), agents=LONG_CHAIN, config=sizes(**tokens), policy=QUICK
    ) as trip:
        answer = await trip.ask(stream=stream)
        assert [turn.json()["model"] for turn in trip.second.turns] == asked
        assert len(trip.first.turns) == 1
        if asked:
            assert answer.headers["x-gateway-model"] == "second/large"
        else:
            assert (answer.status, answer.error["code"]) == (400, "context_length_exceeded")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("code", ["content_filter", "content_policy_violation"])
async def test_what_a_filter_stops_is_told_and_not_tried_elsewhere(tmp_path: Path, code: str, stream: bool) -> None:
    body = error_body("It speaks of violence.", type="invalid_request_error", code=code, param="messages")
    async with journey(tmp_path, refuses(400, body), policy=QUICK) as trip:
        answer = await trip.ask(stream=stream)
        assert (answer.status, answer.json()) == (400, body)
        assert (len(trip.first.turns), len(trip.second.turns)) == (1, 0)
        assert trip.record.attempts[0].fault is FaultKind.FILTERED


async def test_the_whole_chain_is_walked_and_every_try_is_named(tmp_path: Path) -> None:
    async with journey(tmp_path, DOWN, second=DOWN, agents=LONG_CHAIN, policy=POLICY + NO_RETRIES) as trip:
        answer = await trip.ask()
        assert answer.status == 503
        assert answer.error["message"] == (
            "Come back later. (tried first/a: server; second/small: server; second/unknown: server; "
            "second/large: server)"
        )
        trip.check_at_rest()


# --- Deadlines --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
async def test_the_deadline_bounds_retries_and_fallbacks_together(tmp_path: Path, stream: bool) -> None:
    async with journey(tmp_path, DOWN, second=silent, policy=QUICK) as trip:
        answer = await trip.ask(stream=stream, headers={"x-gateway-timeout-ms": "150"})
        assert (answer.status, answer.error["code"]) == (504, "upstream_timeout")
        assert [one.fault for one in trip.record.attempts] == [FaultKind.SERVER, FaultKind.SERVER, FaultKind.DEADLINE]
        await trip.second.turns[0].peer_left.wait()
        # That somebody had little time is not the model's fault.
        assert trip.breaker("second/b")._consecutive == 0
        trip.check_at_rest()


async def test_after_the_deadline_nobody_is_asked(tmp_path: Path) -> None:
    async with journey(tmp_path, silent, agents=LONG_CHAIN) as trip:
        answer = await trip.ask(headers={"x-gateway-timeout-ms": "60"})
        assert (answer.status, answer.error["code"], attempts(answer)) == (504, "upstream_timeout", 1)
        assert not trip.second.turns


async def test_the_policy_may_tighten_the_timeouts_of_an_upstream(tmp_path: Path) -> None:
    policy = f"{POLICY}[timeouts.first]\nfirst_token_s = 0.05\n"
    async with journey(tmp_path, silent, policy=policy, timeouts="first_token_s = 600") as trip:
        assert (await trip.ask(stream=True)).streamed_text == "From the second."


# --- The client leaves ------------------------------------------------------------------------------------------------


async def begins(turn: Turn) -> None:
    await turn.begin_stream()
    await turn.event(delta("Pa"))
    await silent(turn)


async def repeats(turn: Turn) -> None:
    await turn.begin_stream()
    await turn.event(delta("Fr"))
    await silent(turn)


async def breaks_off(turn: Turn) -> None:
    await turn.begin_stream()
    await turn.event(delta("From "))
    turn.close()


async def half_a_body(turn: Turn) -> None:
    await turn.raw(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{")
    await silent(turn)


BUSY = refuses(429, error_body(), {"Retry-After": "4"})
HELD = '[stream]\non_cut = "hold"\n'
# Where the call is when its client leaves: which provider's turn it is, of how many, and what it is told until then.
MOMENTS: dict[str, tuple[tuple[Scene, ...], Scene, str, bool]] = {
    "in a retry, plain": ((DOWN, silent), silent, "first", False),
    "in a retry, stream": ((DOWN, silent), silent, "first", True),
    "in a fallback, plain": ((DOWN, DOWN), half_a_body, "second", False),
    "in a fallback, stream": ((DOWN, DOWN), silent, "second", True),
    "held back": ((begins,), silent, "first", True),
    "while another takes up": ((breaks_off,), silent, "second", True),
    "while another repeats": ((breaks_off,), repeats, "second", True),
}


@pytest.mark.parametrize("name", MOMENTS)
async def test_a_client_that_leaves_at_any_moment_leaves_nothing_behind(tmp_path: Path, name: str) -> None:
    scenes, second, where, stream = MOMENTS[name]
    policy = QUICK + (HELD if name == "held back" else "")
    async with journey(tmp_path, *scenes, second=second, policy=policy) as trip:
        async with connected(trip.gateway.data_url) as connection:
            connection.send(request(body=ordinary(stream=stream)))
            turn = await (trip.first.turn(len(scenes) - 1) if where == "first" else trip.second.turn())
            await trip.let_others_act()
            assert trip.gateway.runtime.observer.in_flight == 1
            connection.close()
            await turn.peer_left.wait()
        await check_gone(trip)
        assert trip.record.attempts[-1].fault is None


async def check_gone(trip: Journey) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while trip.gateway.runtime.observer.in_flight:
            await trip.let_others_act()
    trip.check_at_rest()
    record = trip.record
    assert (record.client_left, record.error) == (True, "")
    assert {breaker.state for _, _, breaker in trip.gateway.runtime.standing.breakers()} == {State.CLOSED}


async def test_a_client_that_leaves_while_we_wait_to_try_again_ends_the_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_waiting = asyncio.Event()

    async def wait(seconds: float) -> None:
        is_waiting.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(failover, "asyncio", SimpleNamespace(sleep=wait))
    async with journey(tmp_path, BUSY) as trip:
        async with connected(trip.gateway.data_url) as connection:
            connection.send(request(body=ordinary()))
            await is_waiting.wait()
            connection.close()
            await check_gone(trip)
        assert (len(trip.first.turns), len(trip.second.turns)) == (1, 0)
        assert [one.fault for one in trip.record.attempts] == [FaultKind.RATE_LIMITED]


# Close together where much happens at once, further apart where there is a wait between two tries.
STEPS = [step * step // 4 for step in range(40)]


@pytest.mark.parametrize("on_cut", ["continue", "hold"])
@pytest.mark.parametrize("stream", [False, True])
async def test_clients_that_leave_at_every_step_leave_nothing_behind(tmp_path: Path, stream: bool, on_cut: str) -> None:
    """From the first byte of the request to the last of the answer, through retries, probes, cuts and take-overs."""
    agents = LONG_CHAIN.replace('["second/small",', '["first/c", "second/small",')
    policy = f'{breakers(1, open_s=1e-6, retries=QUICK_RETRIES)}[stream]\non_cut = "{on_cut}"\n'
    scenes = by_model({"a": DOWN, "c": breaks_off if stream else resets})
    async with journey(tmp_path, scenes, agents=agents, policy=policy) as trip:
        for steps in STEPS:
            async with connected(trip.gateway.data_url) as connection:
                connection.send(request(body=ordinary(stream=stream)))
                for _ in range(steps):
                    await asyncio.sleep(0)
        async with asyncio.timeout(PATIENCE_S):
            while trip.gateway.runtime.observer.in_flight:
                await trip.let_others_act()
        trip.check_at_rest()
        records = trip.gateway.journal()
        assert len({record.id for record in records}) == len(records) <= len(STEPS)
        assert any(record.client_left for record in records)
        answer = await trip.ask(stream=stream)
        assert (answer.streamed_text if stream else answer.text) == "From the second."
        trip.check_at_rest()


# --- Many at once -----------------------------------------------------------------------------------------------------


async def test_half_of_the_answers_broken_and_every_call_is_answered(tmp_path: Path) -> None:
    """Whatever the first provider does, with a second that is well everybody gets a whole answer."""
    kinds: list[Scene] = [
        says("From ", "the ", "second."), DOWN, resets, breaks_off, refuses(200, b"<html>"), refuses(429, b""),
        refuses(404, b""), refuses(200, completion() | {"choices": []}),
    ]  # fmt: skip
    count = 0

    async def anything(turn: Turn) -> None:
        nonlocal count
        count += 1
        scene = kinds[count % len(kinds)]
        if scene is breaks_off and not turn.json().get("stream"):
            scene = resets
        await scene(turn)

    async with journey(tmp_path, anything, policy=QUICK) as trip:
        answers = await asyncio.gather(*(trip.ask(stream=index % 2 == 0) for index in range(100)))
        for index, answer in enumerate(answers):
            assert answer.status == 200, answer.body
            if index % 2 == 0:
                assert answer.streamed_text == "From the second."
                assert answer.events[-1] == DONE
            else:
                assert answer.text == "From the second."
        trip.check_at_rest()
