"""Tells people what happens to the budget: a line in the log always, a message in Slack where the policy has a webhook.

What is told is decided elsewhere, and told here once. The invariants: telling never waits, whatever becomes of the
receiver; every event told while Slack is on ends as one of `sent`, `failed` or `dropped`; and the webhook's address,
which is all that one needs to write into the channel, is in no log line, no message and no exception that leaves here.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal, NamedTuple

import aiohttp

from gateway import __version__
from gateway.decide.windows import Window
from gateway.domain.money import NUSD_PER_USD, format_usd
from gateway.domain.policy import Alerting
from gateway.store.store import Crossing, Stop

if TYPE_CHECKING:
    from tenacity import RetryCallState
    from tenacity.asyncio import AsyncRetrying

log = logging.getLogger("gateway.budget")
delivery_log = logging.getLogger("gateway.alerts")

# Events that wait for Slack. What is more pushes the oldest out: the latest ones say how things stand.
MAX_WAITING = 100
# Slack takes one message per second and webhook; what has come up meanwhile shares the next one.
PACE_S = 1.0
# Of one message. Slack recommends at most 4,000 characters, and cuts at 40,000.
MAX_MESSAGE = 3_900
# Of one event: names and reasons may be as long as their authors liked.
MAX_EVENT = 400
ANSWER_S = 10.0
# 2, 5, 12, 28, 66 s ... between tries, 41 minutes in all.
MAX_TRIES = 10
FIRST_WAIT_S, WAIT_BASE, MAX_WAIT_S = 2.0, 2.4, 900.0
# Fifty sidecars that saw the same outage do not come back in the same second.
JITTER_S = 5.0
GIVE_UP_S = 3_600.0
# What still waits when the process ends gets one more try, and so long for it.
CLOSING_S = 2.0

CENT_NUSD = NUSD_PER_USD // 100
HOUR_S = 3_600


class _Answer(NamedTuple):
    """What became of one try. Plain values: an exception of the HTTP client would carry the address along."""

    then: Literal["sent", "again", "refused", "off"]
    why: str = ""
    retry_after_s: float = 0.0


class Alerts:
    """The only one who writes to Slack."""

    def __init__(
        self,
        policy: Alerting,
        *,
        env: str,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._env = env
        self._clock = clock
        self._sleep = sleep
        self._waiting: deque[str] = deque()
        self._on_its_way: list[str] = []
        # Pushed out since the last message that said so.
        self._untold = 0
        self._task: asyncio.Task[None] | None = None
        # Ends a wait early: there is another policy, or the process ends.
        self._wake = asyncio.Event()
        self._is_closing = False
        self._began_s = 0.0
        self._free_s = float("-inf")
        # Events by what became of them in Slack.
        self.sent = self.failed = self.dropped = 0
        self._take(policy)

    # --- What is told ------------------------------------------------------------------------------------------------

    def tell(self, crossing: Crossing) -> None:
        """An account has come to a share of its cap."""
        level = logging.ERROR if crossing.share >= 1 else logging.WARNING
        who = crossing.account.removeprefix(crossing.rule_id).strip()
        is_usd = crossing.unit == "usd"
        fields = {
            "cap": crossing.label,
            "account": _one_line(who),
            "share": crossing.share,
            "unit": crossing.unit,
            "posted": format_usd(crossing.posted) if is_usd else crossing.posted,
            "limit": format_usd(crossing.limit) if is_usd else crossing.limit,
            "until": _utc(crossing.window.end_s),
        }
        self.tell_text(_crossing_text(crossing, who), fields, level=level)

    def told_stop(self, stop: Stop, *, is_lifted: bool = False) -> None:
        """A kill switch was thrown, or lifted; by the process that did it, as all others see it too."""
        calls = f"calls of {stop.dimension} {_quoted(stop.value)}" if stop.dimension else "all calls"
        text = f"{calls} are {'let through again' if is_lifted else 'refused'}"
        text += (f", by {_quoted(stop.by)}" if stop.by else "") + (f": {stop.why}" if stop.why else "")
        text = text[0].upper() + text[1:]
        scope = f"{stop.dimension} {_one_line(stop.value)}".strip()
        fields: dict[str, object] = {
            "scope": scope,
            "by": _one_line(stop.by),
            "why": _one_line(stop.why),
        }
        self.tell_text(text, fields)

    def tell_text(self, text: str, fields: Mapping[str, object] | None = None, *, level: int = logging.WARNING) -> None:
        """Anything that people should hear of, as one line of plain words. `fields` are for the log."""
        text = _one_line(text)
        log.log(level, "%s", text.replace("`", ""), extra={"fields": {"env": self._env, **(fields or {})}})
        if self._retrying is None or self._is_closing:
            return
        if self._is_refused:
            self.failed += 1
            return
        if len(self._waiting) >= MAX_WAITING:
            self._waiting.popleft()
            self.dropped += 1
            self._untold += 1
        self._waiting.append(f"{text} ({self._env})")
        if self._task is None:
            self._start()

    # --- The policy, and the end -------------------------------------------------------------------------------------

    def take_policy(self, policy: Alerting) -> None:
        """Go on under this policy. A changed one makes a fresh start, also with a webhook that had refused."""
        if policy != self._policy:
            self._take(policy)
            self._wake.set()

    def _take(self, policy: Alerting) -> None:
        self._policy = policy
        self._is_refused = False
        self._retrying = self._new_retrying() if policy.enabled and policy.slack_webhook else None
        if self._retrying is None:
            self._drop_all()

    async def close(self) -> None:
        """Try once more to deliver what waits, within CLOSING_S, and end."""
        self._is_closing = True
        self._wake.set()
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSING_S):
                while self._task is not None:
                    await asyncio.wait({self._task})
        if (task := self._task) is not None:
            task.cancel()
            await asyncio.wait({task})
        left = len(self._on_its_way) + len(self._waiting)
        self._on_its_way.clear()
        self._waiting.clear()
        if left:
            self.failed += left
            delivery_log.error("%s not told to Slack before the end; this log has them", _events(left))

    # --- Delivery ----------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        # The task ends when there is nothing to say, and its session with it: months may pass between two events.
        self._task = asyncio.get_running_loop().create_task(self._run())
        self._task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._task = None
        if task.cancelled():
            return
        if (error := task.exception()) is not None:
            # A bug. Its text is not trusted to be free of the address; the next event starts the task anew.
            self.failed += len(self._on_its_way)
            self._on_its_way.clear()
            delivery_log.error("bug in the alerts: %s", type(error).__name__)
        elif self._waiting:
            # Told while the session was being closed.
            self._start()

    async def _run(self) -> None:
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=1, force_close=True),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=ANSWER_S),
            headers={"User-Agent": f"genesis-gateway/{__version__}"},
        ) as session:
            while self._waiting:
                if (pause_s := self._free_s - self._clock()) > 0:
                    await self._pause(pause_s)
                retrying = self._retrying
                if retrying is not None and self._waiting:
                    await self._deliver(session, retrying)

    async def _deliver(self, session: aiohttp.ClientSession, retrying: "AsyncRetrying") -> None:
        """One message, with as many of the events that wait as fit into it, until it is sent or given up."""
        message = self._next_message()
        self._began_s = self._clock()
        answer: _Answer = await retrying(self._post, session, message)
        events, self._on_its_way = len(self._on_its_way), []
        if answer.then == "sent":
            self.sent += events
        elif answer.then == "off":
            self.dropped += events
        elif answer.then == "again":
            self.failed += events
            delivery_log.error("%s not told to Slack, given up: %s; this log has them", _events(events), answer.why)
        else:
            self.failed += events + len(self._waiting)
            self._waiting.clear()
            self._is_refused = True
            delivery_log.error(
                "Slack's webhook %s, so nothing more is told there until [alerting] changes; this log has it all",
                answer.why,
            )

    def _next_message(self) -> str:
        lines: list[str] = []
        if self._untold:
            lines.append(f"{_events(self._untold)} left out here; the gateway's log has them ({self._env})")
            self._untold = 0
        size = sum(map(len, lines))
        while self._waiting:
            line = _escaped(self._waiting[0])
            size += len(line) + 1
            if size > MAX_MESSAGE and self._on_its_way:
                break
            lines.append(line)
            self._on_its_way.append(self._waiting.popleft())
        return "\n".join(lines)

    async def _post(self, session: aiohttp.ClientSession, message: str) -> _Answer:
        """One try, at the webhook as it is now. Raises nothing, lest the address be in it."""
        policy = self._policy
        if not policy.enabled or not policy.slack_webhook:
            return _Answer("off")
        try:
            async with session.post(
                policy.slack_webhook.reveal(), json={"text": message}, allow_redirects=False
            ) as response:
                status, retry_after = response.status, response.headers.get("Retry-After", "")
        except (aiohttp.InvalidURL, aiohttp.NonHttpUrlClientError):
            return self._refusal("is not an address", policy)
        except TimeoutError:
            return _Answer("again", f"no answer within {ANSWER_S:g} s")
        except (aiohttp.ClientError, OSError) as error:
            return _Answer("again", f"no connection ({type(error).__name__})")
        except ValueError:  # A host that cannot be looked up; after certificates, whose errors are of this type too.
            return self._refusal("is not an address", policy)
        finally:
            self._free_s = self._clock() + PACE_S
        if 200 <= status < 300:
            return _Answer("sent")
        if status in (408, 429) or status >= 500:
            # Slack says seconds; a date, which the standard allows too, is waited for as for any other failure.
            wait_s = float(retry_after) if retry_after.isascii() and retry_after.isdigit() else 0.0
            return _Answer("again", f"answered {status}", wait_s)
        return self._refusal(f"answered {status}", policy)

    def _refusal(self, why: str, policy: Alerting) -> _Answer:
        """For good, unless the policy has changed meanwhile: then it was the old webhook that refused."""
        return _Answer("refused" if policy == self._policy else "again", why)

    def _new_retrying(self) -> "AsyncRetrying":
        # Imported where Slack is wanted, and then before there are calls to be held up by it: 7 ms.
        from tenacity import retry_if_result, wait_exponential, wait_random
        from tenacity.asyncio import AsyncRetrying

        backoff = wait_exponential(FIRST_WAIT_S, max=MAX_WAIT_S, exp_base=WAIT_BASE) + wait_random(0, JITTER_S)

        def answer_of(state: "RetryCallState") -> _Answer:
            assert state.outcome is not None
            answer: _Answer = state.outcome.result()
            return answer

        def wait_s(state: "RetryCallState") -> float:
            return max(backoff(state), answer_of(state).retry_after_s)

        def is_enough(state: "RetryCallState") -> bool:
            would_be_s = self._clock() - self._began_s + state.upcoming_sleep
            return self._is_closing or state.attempt_number >= MAX_TRIES or would_be_s > GIVE_UP_S

        # Tries end in values: tenacity keeps what a try ended in, and would hand on an exception with all it knows.
        return AsyncRetrying(
            sleep=self._pause,
            wait=wait_s,
            stop=is_enough,
            retry=retry_if_result(lambda answer: answer.then == "again"),
            retry_error_callback=answer_of,
        )

    async def _pause(self, seconds: float) -> None:
        """Sleep, or until there is another policy or the end."""
        sleeping = asyncio.ensure_future(self._sleep(seconds))
        waking = asyncio.ensure_future(self._wake.wait())
        try:
            await asyncio.wait({sleeping, waking}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            sleeping.cancel()
            waking.cancel()
        if not self._is_closing:
            self._wake.clear()

    def _drop_all(self) -> None:
        self.dropped += len(self._waiting)
        self._waiting.clear()
        self._untold = 0


# --- Words -----------------------------------------------------------------------------------------------------------


def _crossing_text(crossing: Crossing, who: str) -> str:
    """Such as "83 % of global 20.00 usd per hour is spent: 16.60 of 20.00 usd, until 15:00 UTC"."""
    by = f" by {_quoted(who)}" if who else ""
    if crossing.unit == "usd":
        # Whole cents read better, but not of a cap that is a few cents itself. Downwards: the rest is not spent yet.
        step = CENT_NUSD if crossing.limit >= NUSD_PER_USD else 1
        amounts = f"{format_usd(crossing.posted - crossing.posted % step)} of {format_usd(crossing.limit)} usd"
    else:
        amounts = f"{crossing.posted} of {crossing.limit} {crossing.unit}"
    return f"{crossing.share * 100:g} % of {crossing.label[:200]} is spent{by}: {amounts}{_until(crossing.window)}"


def _until(window: Window) -> str:
    if window.end_s is None:
        return ""
    end = datetime.fromtimestamp(window.end_s, UTC)
    is_soon = window.end_s - window.start_s <= HOUR_S
    return f", until {end:%H:%M} UTC" if is_soon else f", until {end:%Y-%m-%d %H:%M} UTC"


def _utc(at_s: int | None) -> str:
    return "" if at_s is None else datetime.fromtimestamp(at_s, UTC).isoformat()


def _events(count: int) -> str:
    return f"{count} event{' was' if count == 1 else 's were'}"


def _quoted(name: str) -> str:
    """A name that somebody else chose. As code, Slack makes no link, mention or format of it."""
    return "`" + _one_line(name).replace("`", "'")[:100] + "`"


def _one_line(text: str) -> str:
    """Without line ends and control characters, which could pass for lines of our own, and not too long."""
    text = "".join(letter if letter.isprintable() else " " for letter in text[:MAX_EVENT])
    return " ".join(text.split())


def _escaped(text: str) -> str:
    """Slack's three characters of control, as it wants them written: `<!channel>` is but text then."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
