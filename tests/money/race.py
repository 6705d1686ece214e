"""A race for a cap that holds ten calls: real gateway processes, two hundred callers at once, a provider with a bill.

    async with biller() as provider, fleet(tmp_path, provider, "cap = ...", processes=4) as gateways:
        answers = await race(gateways, calls)

The provider is this process, and what it says it used is what it bills: the bill is the truth that caps and ledger are
held to. Each call has a user of its own, `round/17`, by which the bill's lines and the ledger's rows find each other.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import msgspec

from gateway.domain.ledger import LedgerRow
from gateway.lab.trial_gateway import Served, served
from gateway.store.ledger import Ledger
from tests.scripted import DONE, Scripted, Turn, chunk, completion, scripted

ENV = "race"
# All a call can take: no call hangs.
PATIENCE_S = 30.0
MTOK = 1_000_000
# nUSD per token, by model. `full`, `part` and `dear` bill no input, so that a hold is known to the token.
INPUT = {"full": 0, "part": 0, "dear": 0, "dense": 1_000}
OUTPUT = {"full": 1_000, "part": 1_000, "dear": 9_000, "dense": 1_000}
# What `part` uses of the tokens it may.
PART = 3
DEFAULT_MAX_TOKENS = 500
# Long enough for calls to overlap, and a provider is never faster.
ANSWER_S = 0.02


class Call(NamedTuple):
    """One call of a round. `more` goes into its body."""

    user: str
    operation: str
    model: str
    more: dict[str, Any]
    text: str = "Count to ten."

    def body(self) -> dict[str, Any]:
        message = {"role": "user", "content": self.text}
        return {"model": self.model, "messages": [message], "user": self.user, **self.more}


class Answer(NamedTuple):
    """What a caller got. A `status` of 0: the connection broke."""

    call: Call
    status: int
    code: str
    max_tokens: int | None


class Biller:
    """The provider's books: nUSD by user, written down before the answer, as no caller can take it back."""

    def __init__(self) -> None:
        self.bill: dict[str, int] = {}
        self.in_flight: set[str] = set()
        # While it is closed, nobody is answered.
        self.gate = asyncio.Event()
        self.gate.set()
        self._arrived = asyncio.Condition()
        self.base_url = ""

    def billed(self, operation: str) -> int:
        """The bill of a round."""
        return sum(nusd for user, nusd in self.bill.items() if user.startswith(f"{operation}/"))

    async def arrived(self, is_enough: Callable[[set[str]], bool]) -> None:
        """Wait until those who wait for an answer are enough."""
        async with self._arrived:
            await self._arrived.wait_for(lambda: is_enough(self.in_flight))

    async def scene(self, turn: Turn) -> None:
        asked = turn.json()
        user, model, n = asked["user"], asked["model"], asked.get("n", 1)
        prompt = len("".join(message["content"] for message in asked["messages"]).encode())
        used = n * asked["max_tokens"] // (PART if model == "part" else 1)
        assert user not in self.bill, "asked twice"
        self.bill[user] = prompt * INPUT[model] + used * OUTPUT[model]
        usage = {"prompt_tokens": prompt, "completion_tokens": used, "total_tokens": prompt + used}
        async with self._arrived:
            self.in_flight.add(user)
            self._arrived.notify_all()
        try:
            await asyncio.sleep(ANSWER_S)
            await self.gate.wait()
            await _answer(turn, asked, n, usage)
        finally:
            self.in_flight.discard(user)


async def _answer(turn: Turn, asked: dict[str, Any], n: int, usage: dict[str, int]) -> None:
    if not asked.get("stream"):
        choice = {"message": {"role": "assistant", "content": "Ten."}, "finish_reason": "length"}
        await turn.reply(completion(usage=usage, choices=[{"index": index, **choice} for index in range(n)]))
        return
    await turn.begin_stream()
    for index in range(n):
        for word in ("One, ", "two."):
            await turn.event({**chunk({}), "choices": [{"index": index, "delta": {"content": word}}]})
        await turn.event({**chunk({}), "choices": [{"index": index, "delta": {}, "finish_reason": "length"}]})
    await turn.event({**chunk({}), "choices": [], "usage": usage})
    await turn.event(DONE)
    await turn.end()


@asynccontextmanager
async def biller() -> AsyncIterator[Biller]:
    """The provider, until the block ends."""
    books = Biller()
    provider: Scripted
    async with scripted(books.scene) as provider:
        books.base_url = provider.base_url
        yield books


def cap(operation: str, nusd: int) -> str:
    """A cap of the policy that holds for one round only."""
    return f'[[caps]]\nper = "total"\nusd = "{nusd / 10**9:.9f}"\nonly = {{ operation = ["{operation}"] }}\n'


class Fleet:
    """Gateway processes that share one state directory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.gateways: list[Served] = []
        self._stack = AsyncExitStack()
        self._session: aiohttp.ClientSession
        self._started = 0

    async def start(self) -> Served:
        """One more process."""
        self._started += 1
        log = self.folder / f"gateway-{self._started}.log"
        gateway = await self._stack.enter_async_context(served(self.folder, ENV, log))
        self.gateways.append(gateway)
        return gateway

    async def kill(self, gateway: Served) -> None:
        """As `kill -9` does."""
        gateway.process.kill()
        await gateway.process.wait()
        self.gateways.remove(gateway)

    async def stop(self) -> None:
        """End every process, so that the ledger has all they know."""
        await self._stack.aclose()
        self.gateways.clear()

    async def ask(self, call: Call, gateway: Served) -> Answer:
        """One call, from its first to its last byte."""
        headers = {"x-gateway-operation": call.operation}
        try:
            async with (
                asyncio.timeout(PATIENCE_S),
                self._session.post(
                    f"{gateway.data_url}/v1/chat/completions", json=call.body(), headers=headers
                ) as reply,
            ):
                data = await reply.read()
                clamped = reply.headers.get("x-gateway-max-tokens-clamped")
        except aiohttp.ClientError:
            return Answer(call, 0, "", None)
        code = "" if reply.status == 200 else msgspec.json.decode(data)["error"]["code"]
        return Answer(call, reply.status, code, None if clamped is None else int(clamped))

    async def race(self, calls: Sequence[Call]) -> list[Answer]:
        """All at once, dealt out to the processes in turn."""
        gateways = list(self.gateways)
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(self.ask(call, gateways[index % len(gateways)])) for index, call in enumerate(calls)
            ]
        return [task.result() for task in tasks]

    def rows(self) -> list[LedgerRow]:
        """The ledger; every account in it must be the sum of its rows."""
        with Ledger(self.folder / "gateway.db", clock=lambda: 0.0, is_new_allowed=False) as ledger:
            assert ledger.verify(ENV) == []
            return [row for row in ledger.rows(ENV) if row.state != "void"]

    async def __aenter__(self) -> "Fleet":
        connector = aiohttp.TCPConnector(limit=0)
        self._session = await self._stack.enter_async_context(aiohttp.ClientSession(connector=connector))
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()


@asynccontextmanager
async def fleet(
    folder: Path, provider: Biller, caps: str, *, processes: int, when_short: str = "refuse", wait_ms: int = 20_000
) -> AsyncIterator[Fleet]:
    """So many gateways on one configuration, until the block ends."""
    (folder / "policies").mkdir()
    agents = [
        f'[agents.{model}]\nfinetuned = "biller/{model}"\nbaseline = "biller/{model}"\n'
        f"defaults = {{ max_tokens = {DEFAULT_MAX_TOKENS} }}\n"
        f'[prices."biller/{model}"]\n'
        f'input_usd_per_mtok = "{INPUT[model] / 1000}"\noutput_usd_per_mtok = "{OUTPUT[model] / 1000}"\n'
        for model in OUTPUT
    ]
    (folder / "config.toml").write_text(
        '[server]\ndata = "127.0.0.1:0"\nadmin = "127.0.0.1:0"\ndrain_s = 1\n'
        f'[upstreams.biller]\nkind = "compatible"\nbase_url = "{provider.base_url}"\n{"".join(agents)}'
        f'[journal]\ndir = "{folder / "journal"}"\n'
        f'[store]\nurl = "sqlite:///{folder / "gateway.db"}"\ntimeout_ms = 5000\n'
    )
    (folder / "policies" / f"{ENV}.toml").write_text(
        f'[log]\nlevel = "warning"\n[limits]\nn = 8\n'
        f'[budget]\nwhen_short = "{when_short}"\nmin_tokens = 8\nwait_ms = {wait_ms}\n{caps}'
    )
    (folder / "policies" / "routing.toml").write_text('default_agent = "full"\n')
    async with Fleet(folder) as started:
        for _ in range(processes):
            await started.start()
        yield started


def outcomes(answers: Sequence[Answer]) -> Counter[str]:
    """How many calls ended how."""
    return Counter(answer.code or str(answer.status) for answer in answers)
