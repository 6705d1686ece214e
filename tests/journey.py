"""A gateway between a client and two scripted providers, for tests of one call's way through it.

`qa_agent` asks `first/a` and falls back to `second/b`; `lone_agent` asks `first/a` and has nobody behind it.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import msgspec

from gateway.decide.breaker import Breaker
from gateway.domain.call import CallRecord
from gateway.domain.ledger import Held, LedgerRow
from gateway.store.journal import Journal, journal_files
from gateway.store.journal_reader import read_segment
from tests.running import CHAT, RunningGateway, chat, running_gateway
from tests.scripted import Scene, Scripted, says, scripted

KEY = "sk-first-0123456789abcdef"
# So long that only a hang can reach it.
PATIENCE_S = 20.0

AGENTS = """
[agents.qa_agent]
finetuned = "first/ft:a"
baseline  = "first/a"
fallbacks = ["second/b"]
defaults  = { temperature = 0.7, max_tokens = 64 }

[agents.lone_agent]
finetuned = "first/ft:a"
baseline  = "first/a"
"""
ROUTING = 'default_agent = "qa_agent"\n'
POLICY = """
[models]
use_finetuned = false
[overrides]
fallback = true
timeout = true
"""
# For tests that count attempts: none is repeated at the same model.
NO_RETRIES = "[retries]\nbudget_floor = 0\nbudget_percent = 0\n"
# For tests of retries: with hardly a wait between them.
QUICK_RETRIES = "[retries]\nbase_s = 0.001\n"
# Caps that nothing here reaches, so that every call holds money, requests and tokens.
WIDE_CAPS = "".join(f'[[caps]]\nscope = "global"\nper = "total"\n{unit}\n' for unit in
                    ('usd = "1000"', "requests = 100000", "tokens = 1000000000"))  # fmt: skip
# Nobody waits for money here, and a caller who leaves ends the attempt; what else can be has tests of its own.
AT_ONCE = '[budget]\nwhen_short = "refuse"\nwait_ms = 0\nwhen_left = "abort"\n'
PRICES = '[prices."*"]\ninput_usd_per_mtok = "1"\noutput_usd_per_mtok = "2"\n'


class Answer:
    """A plain reply, read whole."""

    def __init__(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        self.status, self.headers, self.body = status, headers, body

    def json(self) -> Any:
        return msgspec.json.decode(self.body)

    @property
    def error(self) -> dict[str, Any]:
        return self.json()["error"]  # type: ignore[no-any-return]

    @property
    def text(self) -> str:
        return self.json()["choices"][0]["message"]["content"]  # type: ignore[no-any-return]

    @property
    def events(self) -> list[bytes]:
        """The data of a stream's events, and nothing that is none."""
        return [line[6:] for line in self.body.split(b"\n") if line.startswith(b"data: ")]

    @property
    def chunks(self) -> list[Any]:
        """A stream's events, decoded, without its `[DONE]`."""
        return [msgspec.json.decode(data) for data in self.events if data != b"[DONE]"]

    @property
    def streamed_text(self) -> str:
        """What a client would put together from the chunks."""
        deltas = (choice["delta"] for chunk in self.chunks for choice in chunk.get("choices", ()))
        return "".join(delta.get("content") or "" for delta in deltas)


class Journey:
    """A client, a gateway and two providers."""

    def __init__(
        self, gateway: RunningGateway, session: aiohttp.ClientSession, first: Scripted, second: Scripted
    ) -> None:
        self.gateway, self.session, self.first, self.second = gateway, session, first, second

    def post(self, *, headers: Mapping[str, str] | None = None, **fields: Any) -> Any:
        """A chat request, to be entered or awaited as aiohttp's are; no patience of its own."""
        return self.session.post(f"{self.gateway.data_url}{CHAT}", json=chat(**fields), headers=headers)

    async def ask(self, *, headers: Mapping[str, str] | None = None, **fields: Any) -> Answer:
        """A chat request and its reply, plain or streamed, read to its end."""
        async with asyncio.timeout(PATIENCE_S), self.post(headers=headers, **fields) as response:
            return Answer(response.status, response.headers, await response.read())

    @property
    def record(self) -> CallRecord:
        """The record of the one call that was made."""
        (record,) = self.gateway.journal()
        return record

    def record_of(self, answer: Answer) -> CallRecord:
        """The record of the call that was answered so."""
        (record,) = [one for one in self.gateway.journal() if one.id == answer.headers["x-request-id"]]
        return record

    async def let_others_act(self) -> None:
        """Let everything that is due in this process happen: requests that need the loop to turn, and turn again."""
        for _ in range(20):
            async with self.session.get(f"{self.gateway.admin_url}/livez") as response:
                await response.read()

    async def booked(self) -> list[LedgerRow]:
        """The ledger's rows in the order of their holds, once it has been told all that the journal holds."""
        bookkeeper = self.gateway.runtime.bookkeeper

        def is_told() -> bool:
            bookkeeper._wake.set()
            return not (bookkeeper._rows or bookkeeper._outcomes or bookkeeper._owed)

        await self.until(is_told)
        # Within a millisecond, the ledger does not know the order.
        order = list(self.holds())
        return sorted(self.gateway.ledger(), key=lambda row: order.index(row.id))

    def holds(self) -> dict[str, Held]:
        """What each attempt set aside, by the attempt's id."""
        found = [
            line for path in journal_files(self.gateway.runtime.journal.directory.parent) for line in read_segment(path)
        ]
        return {line.id: line for line in found if isinstance(line, Held)}

    async def until(self, is_so: Callable[[], object]) -> None:
        """Wait for what comes of itself."""
        async with asyncio.timeout(PATIENCE_S):
            while not is_so():
                await self.let_others_act()

    def used(self) -> list[int]:
        """What is posted or in doubt in each account, in the order of the caps."""
        return [account.used for account in self.gateway.runtime.books.accounts()]

    def check_at_rest(self) -> None:
        """See that no call is open, no money held, no body counted, and no breaker waiting for its probe."""
        runtime = self.gateway.runtime
        assert runtime.observer.in_flight == 0
        assert runtime.buffered_bytes == 0
        assert not [account for account in runtime.books._accounts.values() if account.held]
        assert not [ref for _, ref, breaker in runtime.standing.breakers() if breaker._is_probing]

    def breaker(self, ref: str = "first/a") -> Breaker:
        """What the gateway thinks of a model."""
        return self.gateway.runtime.standing.breaker(ref.partition("/")[0], ref)


@contextmanager
def full_disk(journal: Journal) -> Iterator[None]:
    """In this block the journal's disk has no room; after it, it is as before."""
    kept = os.dup(journal._fd)
    full = os.open("/dev/full", os.O_RDWR)
    os.dup2(full, journal._fd)
    os.close(full)
    try:
        yield
    finally:
        os.dup2(kept, journal._fd)
        os.close(kept)


@asynccontextmanager
async def journey(
    tmp_path: Path,
    *scenes: Scene,
    second: Scene | None = None,
    first_table: str = "",
    second_table: str = "",
    timeouts: str = "",
    policy: str = POLICY,
    caps: str = WIDE_CAPS,
    budget: str = AT_ONCE,
    config: str = PRICES,
    **more: Any,
) -> AsyncIterator[Journey]:
    """`scenes` are the first provider's, `second` the other's for ever; `timeouts`, as in a table, the first one's."""
    more = {"agents": AGENTS, "routing": ROUTING, "policy": policy + budget + caps, "config": config, **more}
    async with AsyncExitStack() as stack:
        one = await stack.enter_async_context(scripted(*scenes))
        two = await stack.enter_async_context(scripted(second or says("From ", "the ", "second.")))
        upstreams = {
            "first": first_table.replace("BASE_URL", one.base_url)
            or f'kind = "compatible"\nbase_url = "{one.base_url}"\napi_key = "{KEY}"\ntimeouts = {{ {timeouts} }}',
            "second": second_table.replace("BASE_URL", two.base_url) or two.base_url,
        }
        gateway = await stack.enter_async_context(running_gateway(tmp_path, upstreams=upstreams, **more))
        session = await stack.enter_async_context(aiohttp.ClientSession())
        yield Journey(gateway, session, one, two)
