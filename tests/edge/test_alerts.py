"""Telling people about the budget: the words, and a Slack that is slow, refuses, is away, or is not wanted any more.

The receiver is a real server on loopback; time is handed in, so an hour of retries takes none.
"""

import asyncio
import gc
import io
import logging
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Literal

import pytest
from aiohttp import web
from aiohttp.test_utils import unused_port

from gateway.decide.windows import Window
from gateway.domain.policy import Alerting, Policy, check_policy
from gateway.domain.secret import Secret
from gateway.domain.settings import Settings
from gateway.edge import alerts as room
from gateway.edge.alerts import Alerts
from gateway.store.store import Crossing, Stop
from gateway.telemetry.logs import JsonLines

ROOT = Path(__file__).resolve().parents[2]
# So long that only a hang can reach it.
PATIENCE_S = 20.0
TOKEN = "T0-hush-B0"
OFF = Alerting()
HOUR = Window(1_700_000_000 - 1_700_000_000 % 3600, 1_700_000_000 - 1_700_000_000 % 3600 + 3600)  # Ends 23:00 UTC.
RULE = "production: global usd hour"


def crossing(
    share: float = 0.83,
    *,
    who: str = "",
    label: str = "global 20.00 usd per hour",
    unit: str = "usd",
    posted: int = 16_600_000_000,
    limit: int = 20_000_000_000,
    window: Window = HOUR,
) -> Crossing:
    return Crossing(RULE, label, f"{RULE} {who}".strip(), window, share, unit, posted, limit)


SUMMARY = "83 % of global 20.00 usd per hour is spent: 16.60 of 20.00 usd, until 23:00 UTC"


class Clock:
    """A time that passes only where somebody sleeps, and not even there while it is `frozen`."""

    def __init__(self) -> None:
        self.now_s = 1_000.0
        self.slept: list[float] = []
        self.frozen = False

    def __call__(self) -> float:
        return self.now_s

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        if self.frozen:
            await asyncio.Event().wait()
        self.now_s += seconds


class Receiver:
    """Slack, for all the gateway knows. `replies` are given in turn, then 200; "hang": none."""

    def __init__(self) -> None:
        self.port = unused_port()
        self.replies: list[int | Literal["hang"] | web.Response] = []
        self.posts: list[str] = []
        self.paths: list[str] = []
        self._runner: web.AppRunner | None = None
        self._released = asyncio.Event()
        self._late_status = 200

    @property
    def policy(self) -> Alerting:
        return Alerting(enabled=True, slack_webhook=Secret(f"http://127.0.0.1:{self.port}/services/{TOKEN}"))

    @property
    def lines(self) -> list[str]:
        return [line for post in self.posts for line in post.splitlines()]

    async def start(self) -> None:
        app = web.Application()
        app.router.add_route("*", "/{tail:.*}", self._take)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port).start()

    async def stop(self) -> None:
        self._released.set()
        if self._runner is not None:
            await self._runner.cleanup()

    def release(self, status: int) -> None:
        """Let those that hang have this answer."""
        self._late_status = status
        self._released.set()

    async def _take(self, request: web.Request) -> web.StreamResponse:
        self.paths.append(request.path)
        assert request.content_type == "application/json"
        body = await request.json()
        assert list(body) == ["text"]
        self.posts.append(body["text"])
        reply = self.replies.pop(0) if self.replies else 200
        if reply == "hang":
            await self._released.wait()
            reply = self._late_status
        return web.Response(status=reply) if isinstance(reply, int) else reply


@pytest.fixture
async def slack() -> AsyncIterator[Receiver]:
    receiver = Receiver()
    await receiver.start()
    yield receiver
    await receiver.stop()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(autouse=True)
def hushed(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Whatever happens in a test of this file: no line of any logger, at any level, holds the webhook."""
    caplog.set_level(logging.DEBUG)
    yield
    gc.collect()
    for record in caplog.get_records("call"):
        line = JsonLines().format(record)
        assert TOKEN not in line
        assert TOKEN not in repr(record.__dict__)


def telling(policy: Alerting, clock: Clock) -> Alerts:
    return Alerts(policy, env="production", clock=clock, sleep=clock.sleep)


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not holds():  # noqa: ASYNC110 - what is waited for may be any figure
            await asyncio.sleep(0)


def outcomes(alerts: Alerts) -> tuple[int, int, int]:
    return alerts.sent, alerts.failed, alerts.dropped


def failures(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "gateway.alerts"]


# --- The log ---------------------------------------------------------------------------------------------------------


def test_a_crossing_is_one_warning_with_its_figures(caplog: pytest.LogCaptureFixture, clock: Clock) -> None:
    telling(OFF, clock).tell(crossing(who="qa_agent", label="agent 20.00 usd per hour"))
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("gateway.budget", "WARNING")
    assert record.getMessage() == (
        "83 % of agent 20.00 usd per hour is spent by qa_agent: 16.60 of 20.00 usd, until 23:00 UTC"
    )
    assert record.__dict__["fields"] == {
        "env": "production",
        "cap": "agent 20.00 usd per hour",
        "account": "qa_agent",
        "share": 0.83,
        "unit": "usd",
        "posted": "16.60",
        "limit": "20.00",
        "until": "2023-11-14T23:00:00+00:00",
    }


def test_only_the_whole_cap_is_an_error(caplog: pytest.LogCaptureFixture, clock: Clock) -> None:
    alerts = telling(OFF, clock)
    for share in (0.25, 0.999, 1.0):
        alerts.tell(crossing(share))
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING", "ERROR"]


DAY = Window(1_699_920_000, 1_700_006_400)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (crossing(), SUMMARY),
        (crossing(posted=19_999_999_999), "19.99 of 20.00 usd"),
        (crossing(posted=31_234_567_891), "31.23 of 20.00 usd"),
        (crossing(posted=8_300_001, limit=10_000_000), "0.008300001 of 0.01 usd"),
        (crossing(unit="requests", posted=83, limit=100), "83 of 100 requests, until"),
        (crossing(0.29), "29 % of"),
        (crossing(0.125), "12.5 % of"),
        (crossing(window=DAY), "usd, until 2023-11-15 00:00 UTC"),
    ],
)
def test_amounts_read_well_and_are_never_rounded_up(
    caplog: pytest.LogCaptureFixture, clock: Clock, given: Crossing, said: str
) -> None:
    telling(OFF, clock).tell(given)
    assert said in caplog.text


def test_a_total_has_no_end(caplog: pytest.LogCaptureFixture, clock: Clock) -> None:
    telling(OFF, clock).tell(crossing(window=Window(0, None), label="global 20.00 usd in total"))
    assert caplog.records[0].getMessage().endswith("16.60 of 20.00 usd")
    assert caplog.records[0].__dict__["fields"]["until"] == ""


def test_a_kill_switch_and_other_events_are_told(caplog: pytest.LogCaptureFixture, clock: Clock) -> None:
    alerts = telling(OFF, clock)
    alerts.told_stop(Stop("production", "agent", "qa_agent", "anna", "it loops", 0))
    alerts.told_stop(Stop("production", "", "", "anna", "", 0), is_lifted=True)
    alerts.tell_text("qa_agent: the share rises to 25 %", level=logging.INFO)
    assert [record.getMessage() for record in caplog.records] == [
        "Calls of agent qa_agent are refused, by anna: it loops",
        "All calls are let through again, by anna",
        "qa_agent: the share rises to 25 %",
    ]


def test_a_name_cannot_forge_a_line_of_the_log(caplog: pytest.LogCaptureFixture, clock: Clock) -> None:
    telling(OFF, clock).tell(crossing(who="eve\n12:00:00 error gateway: all is lost\x1b[2J\u202e\u2028"))
    record = caplog.records[0]
    for text in (record.getMessage(), record.__dict__["fields"]["account"]):
        assert text.isprintable()


def test_without_slack_nothing_is_counted_and_no_loop_is_needed(clock: Clock) -> None:
    for policy in (OFF, Alerting(enabled=True), Alerting(slack_webhook=Secret(f"http://127.0.0.1:1/{TOKEN}"))):
        alerts = telling(policy, clock)
        alerts.tell(crossing())
        assert outcomes(alerts) == (0, 0, 0)


def test_retrying_is_paid_for_only_by_those_who_use_slack() -> None:
    script = (
        "import sys; from gateway.edge.alerts import Alerts, Alerting; from gateway.domain.secret import Secret;"
        "is_there = lambda: print('tenacity' in sys.modules);"
        "Alerts(Alerting(enabled=True), env='dev'); is_there();"
        "Alerts(Alerting(enabled=True, slack_webhook=Secret('https://a/b')), env='dev'); is_there()"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout.split() == ["False", "True"]


# --- A Slack that works ----------------------------------------------------------------------------------------------


async def test_an_event_is_delivered_as_one_line(slack: Receiver, clock: Clock) -> None:
    alerts = telling(slack.policy, clock)
    alerts.tell(crossing())
    await until(lambda: alerts.sent == 1)
    assert slack.posts == [f"{SUMMARY} (production)"]
    assert slack.paths == [f"/services/{TOKEN}"]
    assert clock.slept == []
    await alerts.close()


async def test_names_cannot_mention_link_or_format(slack: Receiver, clock: Clock) -> None:
    alerts = telling(slack.policy, clock)
    alerts.tell(crossing(who="<!channel> & <https://evil.example|pay here> `*hi*` \n https://evil.example"))
    alerts.told_stop(Stop("production", "user", "<@U1>", "<!here>", "<!everyone>", 0))
    alerts.tell_text("<!channel>")
    await alerts.close()
    assert slack.lines == [
        "83 % of global 20.00 usd per hour is spent by `&lt;!channel&gt; &amp; &lt;https://evil.example|pay here&gt; "
        "'*hi*' https://evil.example`: 16.60 of 20.00 usd, until 23:00 UTC (production)",
        "Calls of user `&lt;@U1&gt;` are refused, by `&lt;!here&gt;`: &lt;!everyone&gt; (production)",
        "&lt;!channel&gt; (production)",
    ]


async def test_a_burst_becomes_few_messages_and_loses_nothing(slack: Receiver, clock: Clock) -> None:
    alerts = telling(slack.policy, clock)
    for number in range(50):
        alerts.tell(crossing(who=f"agent-{number}"))
    await until(lambda: alerts.sent == 50)
    assert [f"`agent-{number}`" in line for number, line in enumerate(slack.lines)] == [True] * 50
    assert len(slack.posts) <= 3
    assert all(len(post) <= room.MAX_MESSAGE for post in slack.posts)
    assert clock.slept == [room.PACE_S] * (len(slack.posts) - 1)
    await alerts.close()
    assert outcomes(alerts) == (50, 0, 0)


async def test_at_most_one_message_a_second_and_what_waits_shares_it(slack: Receiver, clock: Clock) -> None:
    alerts = telling(slack.policy, clock)
    alerts.tell_text("first")
    await until(lambda: alerts.sent == 1)
    clock.frozen = True
    alerts.tell_text("second")
    await until(lambda: clock.slept == [room.PACE_S])
    alerts.tell_text("third")
    assert len(slack.posts) == 1
    await alerts.close()
    assert slack.posts[1:] == ["second (production)\nthird (production)"]


async def test_too_many_at_once_push_the_oldest_out_and_slack_hears_of_it(slack: Receiver, clock: Clock) -> None:
    alerts = telling(slack.policy, clock)
    for number in range(room.MAX_WAITING + 3):
        alerts.tell_text(f"event {number}")
    await until(lambda: alerts.sent == room.MAX_WAITING)
    assert outcomes(alerts) == (room.MAX_WAITING, 0, 3)
    assert slack.lines[:2] == [
        "3 events were left out here; the gateway's log has them (production)",
        "event 3 (production)",
    ]
    alerts.tell_text("later")
    await alerts.close()
    assert slack.lines[-1] == "later (production)"
    assert sum("left out" in line for line in slack.lines) == 1


async def test_the_longest_event_still_goes_out(slack: Receiver, clock: Clock) -> None:
    alerts = telling(slack.policy, clock)
    for _ in range(5):
        alerts.tell_text("&" * 100_000)
    await until(lambda: alerts.sent == 5)
    assert all(len(post) <= room.MAX_MESSAGE for post in slack.posts)
    await alerts.close()


async def test_what_is_told_while_the_session_closes_is_delivered_too(slack: Receiver, clock: Clock) -> None:
    """At every turn of the loop after the first delivery, another event: none may fall between two tasks."""
    alerts = telling(slack.policy, clock)
    for turns in range(30):
        alerts.tell_text("one")
        await until(lambda before=turns * 2: alerts.sent == before + 1)
        for _ in range(turns):
            await asyncio.sleep(0)
        alerts.tell_text("two")
        await until(lambda before=turns * 2: alerts.sent == before + 2)
    await alerts.close()


# --- A Slack that does not -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [500, 503, 408, 429])
async def test_a_failure_that_may_pass_is_tried_again(slack: Receiver, clock: Clock, status: int) -> None:
    slack.replies = [status, status]
    alerts = telling(slack.policy, clock)
    alerts.tell(crossing())
    await until(lambda: alerts.sent == 1)
    assert slack.posts == [f"{SUMMARY} (production)"] * 3
    first_s, second_s = clock.slept
    assert room.FIRST_WAIT_S <= first_s <= room.FIRST_WAIT_S + room.JITTER_S
    assert second_s >= room.FIRST_WAIT_S * room.WAIT_BASE
    await alerts.close()
    assert outcomes(alerts) == (1, 0, 0)


@pytest.mark.parametrize(
    ("header", "least_s"), [("120", 120.0), ("0", 2.0), ("-5", 2.0), ("nan", 2.0), ("١٢٠", 2.0), ("soon", 2.0)]
)
async def test_retry_after_is_honoured_where_it_is_seconds(
    slack: Receiver, clock: Clock, header: str, least_s: float
) -> None:
    slack.replies = [web.Response(status=429, headers={"Retry-After": header})]
    alerts = telling(slack.policy, clock)
    alerts.tell(crossing())
    await until(lambda: alerts.sent == 1)
    assert least_s <= clock.slept[0] <= least_s + room.JITTER_S
    await alerts.close()


async def test_a_receiver_that_stays_broken_is_given_up_with_one_error(
    slack: Receiver, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    slack.replies = [500] * room.MAX_TRIES
    alerts = telling(slack.policy, clock)
    alerts.tell_text("one")
    alerts.tell_text("two")
    await until(lambda: alerts.failed == 2)
    assert len(slack.posts) == room.MAX_TRIES
    assert 2_000 < sum(clock.slept) <= room.GIVE_UP_S
    assert failures(caplog) == ["2 events were not told to Slack, given up: answered 500; this log has them"]
    alerts.tell_text("three")
    await until(lambda: alerts.sent == 1)
    await alerts.close()


async def test_what_would_take_longer_than_an_hour_is_given_up_at_once(slack: Receiver, clock: Clock) -> None:
    slack.replies = [web.Response(status=429, headers={"Retry-After": "9" * 400})]
    alerts = telling(slack.policy, clock)
    alerts.tell(crossing())
    await until(lambda: alerts.failed == 1)
    assert clock.slept == []
    await alerts.close()


@pytest.mark.parametrize("status", [400, 403, 404, 410])
async def test_a_revoked_webhook_is_one_error_and_then_silence(
    slack: Receiver, clock: Clock, caplog: pytest.LogCaptureFixture, status: int
) -> None:
    slack.replies = ["hang"]
    alerts = telling(slack.policy, clock)
    alerts.tell_text("one")
    await until(lambda: len(slack.posts) == 1)
    alerts.tell_text("two")
    slack.release(status)
    await until(lambda: alerts.failed == 2)
    alerts.take_policy(slack.policy)
    alerts.tell_text("three")
    await alerts.close()
    assert len(slack.posts) == 1
    assert outcomes(alerts) == (0, 3, 0)
    assert failures(caplog) == [
        f"Slack's webhook answered {status}, so nothing more is told there until [alerting] changes; "
        "this log has it all"
    ]
    assert [record.getMessage() for record in caplog.records if record.name == "gateway.budget"] == [
        "one",
        "two",
        "three",
    ]


async def test_a_redirect_is_not_followed(slack: Receiver, clock: Clock) -> None:
    slack.replies = [web.Response(status=307, headers={"Location": f"http://127.0.0.1:{slack.port}/elsewhere"})]
    alerts = telling(slack.policy, clock)
    alerts.tell(crossing())
    await until(lambda: alerts.failed == 1)
    await alerts.close()
    assert len(slack.paths) == 1


async def test_a_receiver_that_hangs_costs_nobody_anything(
    slack: Receiver, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "ANSWER_S", 0.05)
    slack.replies = ["hang"]
    alerts = telling(slack.policy, clock)
    alerts.tell(crossing())
    await until(lambda: len(slack.posts) == 1)
    for _ in range(20):
        alerts.tell(crossing())
    await until(lambda: alerts.sent == 21)
    await alerts.close()


async def test_a_receiver_that_is_away_gets_it_when_it_is_back(clock: Clock) -> None:
    slack = Receiver()
    clock.frozen = True
    alerts = telling(slack.policy, clock)
    alerts.tell(crossing())
    await until(lambda: len(clock.slept) == 1)
    await slack.start()
    assert outcomes(alerts) == (0, 0, 0)
    await alerts.close()
    assert outcomes(alerts) == (1, 0, 0)
    assert slack.posts == [f"{SUMMARY} (production)"]
    await slack.stop()


async def test_a_receiver_that_never_comes_is_named_without_its_address(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    alerts = telling(Receiver().policy, clock)
    alerts.tell(crossing())
    await until(lambda: alerts.failed == 1)
    assert failures(caplog) == [
        "1 event was not told to Slack, given up: no connection (ClientConnectorError); this log has them"
    ]
    await alerts.close()


@pytest.mark.parametrize(
    "address",
    [f"{TOKEN}", f"ftp://a/{TOKEN}", f"http://[::1/{TOKEN}", f"http:///{TOKEN}", f"http://{'a' * 80}/{TOKEN}"],
)
async def test_an_address_that_is_none_is_refused_without_being_shown(
    clock: Clock, caplog: pytest.LogCaptureFixture, address: str
) -> None:
    alerts = telling(Alerting(enabled=True, slack_webhook=Secret(address)), clock)
    alerts.tell(crossing())
    await until(lambda: alerts.failed == 1)
    await alerts.close()
    assert len(failures(caplog)) == 1


@pytest.mark.parametrize("failing", [500, 404, "hang", 307])
async def test_no_exception_that_is_alive_knows_the_webhook(
    slack: Receiver, clock: Clock, monkeypatch: pytest.MonkeyPatch, failing: int | Literal["hang"]
) -> None:
    monkeypatch.setattr(room, "ANSWER_S", 0.05)
    slack.replies = [failing] * room.MAX_TRIES
    alerts = telling(slack.policy, clock)
    raised: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: raised.append(context))
    alerts.tell(crossing())
    await until(lambda: alerts.failed == 1)
    await alerts.close()
    gc.collect()
    assert raised == []
    for error in [thing for thing in gc.get_objects() if issubclass(type(thing), BaseException)]:
        assert TOKEN not in f"{error!r} {error.__cause__!r} {error.__context__!r}"


async def test_a_bug_is_told_by_its_name_alone_and_the_next_event_starts_anew(
    slack: Receiver, clock: Clock, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    alerts = telling(slack.policy, clock)

    async def breaks(*_: object) -> None:
        raise RuntimeError(f"at {TOKEN}")

    monkeypatch.setattr(alerts, "_post", breaks)
    alerts.tell(crossing())
    await until(lambda: alerts.failed == 1)
    assert failures(caplog) == ["bug in the alerts: RuntimeError"]
    monkeypatch.undo()
    alerts.tell(crossing())
    await until(lambda: alerts.sent == 1)
    await alerts.close()


# --- Another policy, and the end -------------------------------------------------------------------------------------


async def test_a_reload_switches_slack_off_and_on(slack: Receiver, clock: Clock) -> None:
    alerts = telling(OFF, clock)
    alerts.tell_text("before")
    alerts.take_policy(slack.policy)
    alerts.tell_text("on")
    await until(lambda: alerts.sent == 1)
    alerts.take_policy(OFF)
    alerts.tell_text("off")
    alerts.take_policy(slack.policy)
    alerts.tell_text("on again")
    await until(lambda: alerts.sent == 2)
    await alerts.close()
    assert slack.lines == ["on (production)", "on again (production)"]


async def test_switched_off_nothing_that_waits_is_sent_any_more(slack: Receiver, clock: Clock) -> None:
    slack.replies = [500]
    clock.frozen = True
    alerts = telling(slack.policy, clock)
    alerts.tell_text("on its way")
    await until(lambda: len(clock.slept) == 1)
    alerts.tell_text("behind it")
    alerts.take_policy(OFF)
    await until(lambda: alerts.dropped == 2)
    await alerts.close()
    assert slack.posts == ["on its way (production)"]
    assert outcomes(alerts) == (0, 0, 2)


async def test_a_new_webhook_takes_over_what_the_old_one_failed(slack: Receiver, clock: Clock) -> None:
    clock.frozen = True
    alerts = telling(Receiver().policy, clock)
    alerts.tell(crossing())
    await until(lambda: len(clock.slept) == 1)
    alerts.take_policy(slack.policy)
    await until(lambda: alerts.sent == 1)
    await alerts.close()
    assert len(slack.posts) == 1


async def test_a_refusal_by_the_old_webhook_does_not_silence_the_new_one(slack: Receiver, clock: Clock) -> None:
    slack.replies = ["hang"]
    alerts = telling(slack.policy, clock)
    alerts.tell(crossing())
    await until(lambda: len(slack.posts) == 1)
    new = Receiver()
    await new.start()
    alerts.take_policy(new.policy)
    slack.release(404)
    await until(lambda: alerts.sent == 1)
    await alerts.close()
    await new.stop()
    assert len(new.posts) == 1


async def test_a_changed_policy_ends_the_silence(slack: Receiver, clock: Clock) -> None:
    slack.replies = [404]
    alerts = telling(slack.policy, clock)
    alerts.tell_text("one")
    await until(lambda: alerts.failed == 1)
    alerts.take_policy(OFF)
    alerts.take_policy(slack.policy)
    alerts.tell_text("two")
    await until(lambda: alerts.sent == 1)
    await alerts.close()


async def test_the_end_delivers_what_waits_without_waiting(slack: Receiver, clock: Clock) -> None:
    clock.frozen = True
    alerts = telling(slack.policy, clock)
    for number in range(room.MAX_WAITING):
        alerts.tell_text(f"event {number} {'.' * 100}")
    await alerts.close()
    assert outcomes(alerts) == (room.MAX_WAITING, 0, 0)
    assert len(slack.posts) > 1


async def test_the_end_is_bounded_and_says_what_was_not_told(
    slack: Receiver, clock: Clock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(room, "CLOSING_S", 0.05)
    slack.replies = ["hang"]
    alerts = telling(slack.policy, clock)
    alerts.tell_text("one")
    await until(lambda: len(slack.posts) == 1)
    alerts.tell_text("two")
    await asyncio.wait_for(alerts.close(), PATIENCE_S)
    assert outcomes(alerts) == (0, 2, 0)
    assert failures(caplog) == ["2 events were not told to Slack before the end; this log has them"]
    alerts.tell_text("after the end: the log only")
    assert outcomes(alerts) == (0, 2, 0)
    await alerts.close()


async def test_the_end_tries_a_broken_receiver_once_more_and_no_more(slack: Receiver, clock: Clock) -> None:
    clock.frozen = True
    slack.replies = [500] * 5
    alerts = telling(slack.policy, clock)
    alerts.tell(crossing())
    await until(lambda: len(clock.slept) == 1)
    await alerts.close()
    assert len(slack.posts) == 2
    assert outcomes(alerts) == (0, 1, 0)


async def test_the_end_of_one_that_never_spoke(clock: Clock) -> None:
    await telling(OFF, clock).close()
    await telling(Receiver().policy, clock).close()


# --- The policy's check ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "address", [TOKEN, f"ftp://a/{TOKEN}", f"http:///{TOKEN}", f"http://[::1/{TOKEN}", "https://a:0/"]
)
def test_a_webhook_that_is_no_address_is_refused_at_load_without_being_shown(address: str) -> None:
    policy = Policy(alerting=Alerting(enabled=True, slack_webhook=Secret(address)))
    (problem,) = check_policy(policy, Settings(upstreams={}, agents={}))
    assert problem.key == "alerting.slack_webhook"
    assert TOKEN not in repr(problem)


@pytest.mark.parametrize(
    "alerting",
    [
        Alerting(enabled=True),
        Alerting(enabled=True, slack_webhook=Secret("https://hooks.example/services/T0/B0/x")),
        Alerting(slack_webhook=Secret("not in use")),
    ],
)
def test_a_webhook_may_be_left_out_and_is_not_looked_at_while_off(alerting: Alerting) -> None:
    assert check_policy(Policy(alerting=alerting), Settings(upstreams={}, agents={})) == []


def test_lines_of_both_kinds_can_be_written(clock: Clock) -> None:
    """What goes into the fields is what the log can write as JSON."""
    logger, stream = logging.getLogger("gateway.budget"), io.StringIO()
    sink = logging.StreamHandler(stream)
    sink.setFormatter(JsonLines())
    logger.addHandler(sink)
    try:
        telling(OFF, clock).tell(crossing(who="\ud800"))
    finally:
        logger.removeHandler(sink)
    assert '"posted":"16.60"' in stream.getvalue()
