"""A week of traffic against rollouts that must come out in a known way: through real gateways, a day in seconds.

Five agents, each with a fine-tuned model that is known to be better, worse, slower, equal, or to have its calls dropped
by a client; two gateway processes on one store, of which the one that leads is killed on the way. A day is as short as
`bake_s` says, and nothing else is told another time: clocks, statistics and decisions are those of production. What is
asked of the week afterwards is rollout_checks.py. The invariant: a run ends well only where each rollout came out as
it had to, and journal, store and audit log tell the same of it.

    python -m gateway.lab.rollout_week [--quick] [--day-s 24] [--calls 26000]
"""

import argparse
import asyncio
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import aiohttp
import msgspec
import toml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from gateway.decide.assign import BUCKETS, bucket_of
from gateway.decide.rollout_words import percent
from gateway.domain.rollout import Phase
from gateway.lab.azure import TRACE, read_trace
from gateway.lab.rollout_checks import Seen, Verdict, judge_week, leader_of, show
from gateway.lab.rollout_users import DAYS, MOST_TOKENS, Day, Visit, day_of, week_of
from gateway.lab.trial_gateway import Served, TrialFailed, served
from gateway.store.experiments import Experiments
from gateway.store.store import StoreError

ENV = "week"
AT_ONCE = 1_000
PATIENCE_S = 30.0
# Of all answers to talkative users so many are spoken of, and so much better the fine-tuned model is liked.
SPOKEN_OF, LIKED, BETTER_LIKED = 0.3, 0.1, 0.3


class Scenario(NamedTuple):
    """An agent, what is true of its fine-tuned model, and what must become of its rollout.

    `simulator`: the settings of its provider. `weight`: its part of all calls. `drops`: the part of its users whose
    client leaves wherever it is told that the fine-tuned model answers.
    """

    agent: str
    what: str
    simulator: dict[str, float]
    weight: float
    wanted: tuple[Phase, ...]
    drops: float = 0.0
    is_talkative: bool = False


# Long enough that what the machine adds to them hardly counts.
_PACE = {"first_token_ms": 1_000.0, "per_token_ms": 20.0}
_ALIKE = {**_PACE, "finetuned_error_rate": 0.05, "baseline_error_rate": 0.05}
BETTER = Scenario(
    "qa_agent", "better: 95 % against 90 %, two thirds of the latency",
    {**_PACE, "finetuned_error_rate": 0.05, "baseline_error_rate": 0.10, "finetuned_speedup": 1.5},
    0.50, (Phase.COMPLETED,), is_talkative=True,
)  # fmt: skip
WORSE = Scenario(
    "content_agent", "worse: 80 % against 95 %", {**_ALIKE, "finetuned_error_rate": 0.20}, 0.20, (Phase.ROLLED_BACK,)
)
SLOWER = Scenario(
    "legal_agent", "slower: twice the latency", {**_ALIKE, "finetuned_speedup": 0.5}, 0.11, (Phase.ROLLED_BACK,)
)
EQUAL = Scenario("support_agent", "equal: 95 % each", _ALIKE, 0.07, (Phase.RAMPING, Phase.COMPLETED))
DROPPED = Scenario(
    "analyst_agent", "equal, and half of the clients drop it", _ALIKE, 0.12, (Phase.HOLD,), drops=0.5
)  # fmt: skip
SCENARIOS = (BETTER, WORSE, SLOWER, EQUAL, DROPPED)


class Order(NamedTuple):
    """One run: which agents, how many users each has, calls in all, how long a day is, when the leader is killed.

    `kill_days`: how long after the beginning that is; 0: not at all.
    """

    scenarios: tuple[Scenario, ...] = SCENARIOS
    users: int = 2_000
    calls: int = 26_000
    day_s: float = 24.0
    kill_days: float = 1.3
    stages: tuple[float, ...] = (10, 25, 50, 75, 100)
    min_users: int = 50
    seed: int = 1

    @property
    def check_every_s(self) -> float:
        """Ten looks in a day; the policy allows one in a second at most."""
        return max(1.0, self.day_s / 10)


_LONGEST_S = 5.0
QUICK = Order(users=1_200, calls=12_000, day_s=12)


def visits_of(order: Order, day: Day) -> list[Visit]:
    """All calls of the week, in order of time."""
    random = Random(order.seed)  # noqa: S311 - a week that can be repeated, no secret
    whole = sum(scenario.weight for scenario in order.scenarios)
    weeks = (
        week_of(one.agent, day, users=order.users, calls=round(order.calls * one.weight / whole), random=random)
        for one in order.scenarios
    )
    return sorted(visit for week in weeks for visit in week)


# --- The configuration ------------------------------------------------------------------------------------------------


def policy_of(order: Order) -> dict[str, Any]:
    """Automatic, a quarter of a day at each stage, and nothing that answers for a model which fails.

    The guardrails are production's.
    """
    return {
        "models": {"fallback_enabled": False},
        "ab_testing": {"enabled": True, "rollout_percentage": order.stages[0]},
        "rollout": {
            "mode": "automatic", "stages": list(order.stages), "holdback_percent": 5, "bake_s": order.day_s / 4,
            "min_users": order.min_users, "check_every_s": order.check_every_s,
            "guardrails": {"success_rate": 0.02, "mean_latency": 0.20, "cost_per_request": 4.0},
        },
        # A request that fails once fails always here, so another try would only take time.
        "retries": {"budget_percent": 0, "budget_floor": 0},
        "breakers": {"consecutive": 1_000, "share": 1.0},
        "log": {"level": "warning"},
    }  # fmt: skip


def write_configuration(folder: Path, order: Order) -> None:
    """config.toml and policies/ into `folder`: an agent and a provider of its own for each scenario."""
    provider: dict[str, Any] = {}
    agents: dict[str, Any] = {}
    for one in order.scenarios:
        upstream = f"of-{one.agent.replace('_', '-')}"
        # Users count as arrived once no call that began with theirs can be under way, so none may last for long.
        provider[upstream] = {
            "kind": "simulator",
            "simulator": {"seed": order.seed, **one.simulator},
            "timeouts": {"total_s": _LONGEST_S},
        }
        agents[one.agent] = {"finetuned": f"{upstream}/ft:m", "baseline": f"{upstream}/m", "fallbacks": []}
    usd = {"*/ft:*": "0.40", "*/m": "0.20"}
    prices = {
        f"{upstream}{name[1:]}": {"input_usd_per_mtok": price, "output_usd_per_mtok": price}
        for upstream in provider
        for name, price in usd.items()
    }
    config = {
        "server": {"data": "127.0.0.1:0", "admin": "127.0.0.1:0", "drain_s": 2}, "upstreams": provider,
        "agents": agents, "prices": prices, "journal": {"dir": str(folder / "journal")},
        # Processes and callers share the machine, so the ledger's answer may be late.
        "store": {"url": f"sqlite:///{folder / 'gateway.db'}", "timeout_ms": 5_000},
    }  # fmt: skip
    policies = folder / "policies"
    policies.mkdir()
    (folder / "config.toml").write_text(toml.dumps(config))
    (policies / f"{ENV}.toml").write_text(toml.dumps(policy_of(order)))
    (policies / "routing.toml").write_text(f'default_agent = "{order.scenarios[0].agent}"\n')


# --- The callers ------------------------------------------------------------------------------------------------------


class Callers:
    """Everybody who calls, each when it is time, and what they saw and said."""

    def __init__(self, order: Order, urls: list[str], session: aiohttp.ClientSession) -> None:
        """`urls` are the gateways that serve; the list changes when one of them is killed."""
        self._scenarios = {one.agent: one for one in order.scenarios}
        self._day_s, self._urls, self._session = order.day_s, urls, session
        self._random = Random(order.seed + 1)  # noqa: S311
        self._places = asyncio.Semaphore(AT_ONCE)
        self.seen = Seen(Counter(), {}, Counter())

    async def live(self, visits: Sequence[Visit], progress: Progress, bar: Any) -> None:
        """The whole week."""
        since_s = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for number, visit in enumerate(visits):
                await self._places.acquire()
                early_s = visit.at_days * self._day_s - (time.perf_counter() - since_s)
                if early_s > 0:
                    await asyncio.sleep(early_s)
                group.create_task(self._visit(number, visit))
                progress.advance(bar)

    async def _visit(self, number: int, visit: Visit) -> None:
        try:
            for turn in range(3):
                # Whoever loses a connection asks again, elsewhere; as SDKs do.
                url = self._urls[(number + turn) % len(self._urls)]
                with suppress(aiohttp.ClientError, TimeoutError):
                    await self._call(url, visit)
                    return
                self.seen.words["connection lost"] += 1
            self.seen.words["given up"] += 1
        finally:
            self._places.release()

    async def _call(self, url: str, visit: Visit) -> None:
        scenario = self._scenarios[visit.agent]
        is_dropping = bucket_of("client", visit.user) < scenario.drops * BUCKETS
        text = f"{visit.user} asks {visit.agent} for the {visit.number}th time: what about the delivery?"
        body = {
            "model": visit.agent, "user": visit.user, "messages": [{"role": "user", "content": text}],
            "max_tokens": MOST_TOKENS if is_dropping else visit.max_tokens, "stream": is_dropping,
        }  # fmt: skip
        async with self._session.post(f"{url}/v1/chat/completions", data=msgspec.json.encode(body)) as reply:
            variant = reply.headers.get("x-gateway-variant", "")
            if is_dropping and variant == "finetuned" and reply.status == 200:
                reply.close()
                self.seen.words["dropped"] += 1
                return
            await reply.read()
        self.seen.words["answered" if reply.status == 200 else f"status {reply.status}"] += 1
        self.seen.told[visit.agent, visit.user, variant] += 1
        if scenario.is_talkative and reply.status == 200 and self._random.random() < SPOKEN_OF:
            await self._speak(url, reply.headers["x-request-id"], variant)

    async def _speak(self, url: str, call_id: str, variant: str) -> None:
        mood = LIKED + (BETTER_LIKED if variant == "finetuned" else 0.0)
        score = round(max(-1.0, min(1.0, self._random.gauss(mood, 0.5))), 3)
        body = msgspec.json.encode({"call_id": call_id, "score": score})
        # Whoever hears nothing says it again: what is said last counts, so nothing counts twice.
        for place in (url, *self._urls):
            with suppress(aiohttp.ClientError, TimeoutError):
                async with self._session.post(f"{place}/v1/feedback", data=body) as reply:
                    await reply.read()
                if reply.status == 200:
                    self.seen.scores[call_id] = score
                else:
                    self.seen.words[f"feedback: status {reply.status}"] += 1
                return


# --- The week ---------------------------------------------------------------------------------------------------------


class Fleet:
    """The gateway processes, and who of them leads."""

    def __init__(self, folder: Path, order: Order, stack: AsyncExitStack) -> None:
        self._folder, self._order, self._stack = folder, order, stack
        self._by_holder: dict[str, Served] = {}
        self._started = 0
        self.urls: list[str] = []
        self.killed_at_ms = 0
        self.leaders: tuple[str, ...] = ()

    async def add(self) -> None:
        """Start one more. Raises `TrialFailed`."""
        log = self._folder / f"gateway-{self._started}.log"
        self._started += 1
        before = self._holders()
        gateway = await self._stack.enter_async_context(served(self._folder, ENV, log))
        # A journal has its process's name, so a new one tells whose it is.
        self._by_holder.update(dict.fromkeys(self._holders() - before, gateway))
        self.urls.append(gateway.data_url)

    async def lose_leader(self) -> None:
        """In the middle of the week, kill -9 whoever leads; once another does, start one more."""
        await asyncio.sleep(self._order.kill_days * self._order.day_s)
        before = await self._leader()
        dead = self._by_holder[before]
        self.urls.remove(dead.data_url)
        self.killed_at_ms = time.time_ns() // 1_000_000
        dead.process.kill()
        await dead.process.wait()
        until_s = time.monotonic() + PATIENCE_S
        while (now := await self._leader()) == before:
            if time.monotonic() > until_s:
                raise TrialFailed(f"nobody has taken the lead within {PATIENCE_S:g} s")
            await asyncio.sleep(0.1)
        self.leaders = (before, now)
        await self.add()

    async def _leader(self) -> str:
        return await asyncio.to_thread(leader_of, self._store, ENV)

    def shares(self) -> str:
        """Where all rollouts stand, in a line."""
        with suppress(StoreError), Experiments(self._store, clock=time.time) as experiments:
            states = experiments.states(ENV).values()
            return "  ".join(f"{one.agent.split('_')[0]} {one.phase} {percent(one.share_bps)}" for one in states)
        return ""

    @property
    def _store(self) -> Path:
        return self._folder / "gateway.db"

    def _holders(self) -> set[str]:
        root = self._folder / "journal"
        return {path.name for path in root.iterdir()} if root.is_dir() else set()


async def live(order: Order, screen: Console, *, trace: Path = TRACE) -> Verdict:
    """The week, and what it comes to. Raises `TrialFailed`."""
    visits = await asyncio.to_thread(lambda: visits_of(order, day_of(read_trace(trace))))
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with TemporaryDirectory(prefix="gateway-week-") as name, Progress(*columns, console=screen, transient=True) as bars:
        folder = Path(name)
        write_configuration(folder, order)
        bar = bars.add_task("", total=len(visits))
        async with AsyncExitStack() as stack:
            fleet = Fleet(folder, order, stack)
            for _ in range(2 if order.kill_days else 1):
                await fleet.add()
            session = await stack.enter_async_context(
                aiohttp.ClientSession(
                    timeout=aiohttp.ClientTimeout(total=PATIENCE_S),
                    connector=aiohttp.TCPConnector(limit=0),
                    headers={"Content-Type": "application/json"},
                )
            )
            callers = Callers(order, fleet.urls, session)
            teller = asyncio.create_task(_tell(fleet, bars, bar))
            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(callers.live(visits, bars, bar))
                    if order.kill_days:
                        group.create_task(fleet.lose_leader())
            finally:
                teller.cancel()
                await asyncio.wait({teller})
        wanted = {one.agent: (one.what, one.wanted) for one in order.scenarios}
        return await asyncio.to_thread(
            judge_week, folder, ENV, wanted, callers.seen,
            policy=policy_of(order), day_s=order.day_s, killed_at_ms=fleet.killed_at_ms, leaders=fleet.leaders,
        )  # fmt: skip


async def _tell(fleet: Fleet, bars: Progress, bar: Any) -> None:
    while True:
        bars.update(bar, description=await asyncio.to_thread(fleet.shares))
        await asyncio.sleep(1)


def main(arguments: Sequence[str]) -> int:
    """Exit status 0 where every rollout came out as it had to, and all who tell of it agree."""
    parser = argparse.ArgumentParser(prog="make rollout ARGS=...", description="A week of rollouts in minutes.")
    parser.add_argument("--quick", action="store_true", help="fewer users and calls, shorter days")
    parser.add_argument("--day-s", type=float, help="how many seconds a day lasts")
    parser.add_argument("--calls", type=int, help="calls in the whole week")
    parser.add_argument("--users", type=int, help="users of each agent")
    parser.add_argument("--seed", type=int, help="another seed, another week")
    parser.add_argument("--trace", type=Path, default=TRACE)
    chosen = parser.parse_args(arguments)
    said = {name: getattr(chosen, name) for name in ("day_s", "calls", "users", "seed") if getattr(chosen, name)}
    order = (QUICK if chosen.quick else Order())._replace(**said)
    screen = Console(highlight=False)
    screen = screen if screen.is_terminal else Console(highlight=False, width=160)
    screen.print(
        f"{order.calls} calls by {order.users} users of each of {len(order.scenarios)} agents in {DAYS} days of "
        f"{order.day_s:g} s; a look every {order.check_every_s:g} s, alpha 0.05 for each rollout."
    )
    verdict = None
    try:
        verdict = asyncio.run(live(order, screen, trace=chosen.trace))
    except* TrialFailed as failed:
        screen.print("\n".join(map(str, failed.exceptions)), markup=False)
    if verdict is None:
        return 1
    show(verdict, screen)
    return 0 if verdict.holds else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
