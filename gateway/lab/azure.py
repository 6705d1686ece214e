"""An hour of real traffic against a cap that binds: how much of it can be used, and that not a nano-dollar more is.

19,366 conversation requests to production services, with their times and their token counts (Azure LLM inference trace
2023, CC-BY 4.0; Patel et al., "Splitwise", ISCA 2024), replayed in compressed time through real gateway processes that
share one ledger. The provider is in this process, uses exactly the traced tokens, and its own bill is what caps and
ledger are held to. No measurement of speed. The invariant: a run ends well only where the bill is within the cap and
the ledger says what the bill says.

    python -m gateway.lab.azure [--quick] [--speed 60]
"""

import argparse
import asyncio
import csv
import gzip
import io
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, NamedTuple

import aiohttp
import msgspec
from aiohttp import web
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from gateway.domain.call import CallRecord
from gateway.domain.money import NUSD_PER_USD, TOKENS_PER_MTOK, format_usd
from gateway.lab.trial_gateway import TrialFailed, served
from gateway.store.journal_reader import read_calls
from gateway.store.ledger import Ledger

TRACE = Path("tests/data/azure_llm_conv_2023.csv.gz")
ENV = "replay"
# The field asks for these shares of a cap to be usable before anybody is refused.
AIMS = {1: 0.98, 4: 0.95}
# The cap, as a share of what the whole trace costs.
CAP_SHARE = 0.5
SPEED = 60.0
QUICK_ROWS = 400
AT_ONCE = 256
PATIENCE_S = 120.0
# nUSD per million tokens: what a middling model costs.
INPUT, OUTPUT = 400_000_000, 2_000_000_000
# English text. The bound takes every byte for a token, so a prompt is held at four times what it will cost.
BYTES_PER_TOKEN = 4
_TEXT = "The quick brown fox jumps over the lazy dog near the river bank. " * 1_000
# How a real model takes its time; compressed like everything else.
FIRST_TOKEN_S, PER_TOKEN_S = 0.3, 0.02
# A call that began its attempt later than this had waited for headroom.
WAITED_MS = 50
WhenShort = Literal["clamp", "refuse"]


class Row(NamedTuple):
    """One request of the trace."""

    at_s: float
    prompt_tokens: int
    completion_tokens: int

    @property
    def max_tokens(self) -> int:
        """What a client asks for who knows about how long the answer will be: the next power of two."""
        return max(64, 1 << (self.completion_tokens - 1).bit_length())

    @property
    def cost_nusd(self) -> int:
        """What it costs where it is answered in full."""
        return cost_nusd(self.prompt_tokens, self.completion_tokens)


class Order(NamedTuple):
    """One replay: so many processes, and what becomes of a call for which there is not enough."""

    processes: int
    when_short: WhenShort


class Figures(NamedTuple):
    """What came of a replay. Shares are of the cap; None where nobody was refused."""

    order: Order
    calls: int
    cap_nusd: int
    billed_nusd: int
    ledger_nusd: int
    wrong_accounts: int
    at_first_refusal: float | None
    at_first_exceeded: float | None
    outcomes: Counter[str]
    clamped: int
    waited: int
    took_s: float

    @property
    def overshoot_nusd(self) -> int:
        """What was billed above the cap."""
        return max(0, self.billed_nusd - self.cap_nusd)

    @property
    def holds(self) -> bool:
        """Whether cap and ledger held. How much of the cap was usable is shown, and judged by the reader."""
        known = {"passed", "budget_exceeded", "budget_reserved"}
        is_told = self.ledger_nusd == self.billed_nusd and not self.wrong_accounts
        return not self.overshoot_nusd and is_told and set(self.outcomes) <= known


def cost_nusd(prompt_tokens: int, completion_tokens: int) -> int:
    """The provider's own arithmetic, rounded up."""
    return -(-(prompt_tokens * INPUT + completion_tokens * OUTPUT) // TOKENS_PER_MTOK)


def read_trace(path: Path) -> list[Row]:
    """The trace, in order of time."""
    with gzip.open(path, "rb") as packed:
        rows = csv.reader(io.TextIOWrapper(packed, "ascii"))
        next(rows)
        return [Row(int(at_ms) / 1000, int(prompt), int(completion)) for at_ms, prompt, completion in rows]


# --- The provider -----------------------------------------------------------------------------------------------------


class Provider:
    """Answers the row that `seed` names with the tokens of the trace, and writes its bill before it answers."""

    def __init__(self, trace: Sequence[Row], speed: float) -> None:
        self._trace = trace
        self._speed = speed
        self.billed_nusd = 0
        self.base_url = ""

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        """One call. What `max_tokens` cuts off is not used and not billed."""
        asked = msgspec.json.decode(await request.read())
        row = self._trace[asked["seed"]]
        used = min(row.completion_tokens, asked["max_tokens"])
        self.billed_nusd += cost_nusd(row.prompt_tokens, used)
        await asyncio.sleep((FIRST_TOKEN_S + used * PER_TOKEN_S) / self._speed)
        told = {"prompt_tokens": row.prompt_tokens, "completion_tokens": used}
        usage = {**told, "total_tokens": row.prompt_tokens + used}
        reason = "length" if used < row.completion_tokens else "stop"
        same = {"id": "chatcmpl-1", "created": 1, "model": asked["model"]}
        if not asked.get("stream"):
            message = {"role": "assistant", "content": "So it is."}
            choice = {"index": 0, "message": message, "finish_reason": reason}
            whole = {**same, "object": "chat.completion", "choices": [choice], "usage": usage}
            return web.Response(body=msgspec.json.encode(whole), content_type="application/json")
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        same["object"] = "chat.completion.chunk"
        for delta, end in (({"content": "So "}, None), ({"content": "it is."}, None), ({}, reason)):
            choice = {"index": 0, "delta": delta, "finish_reason": end}
            await response.write(_event({**same, "choices": [choice]}))
        await response.write(_event({**same, "choices": [], "usage": usage}) + b"data: [DONE]\n\n")
        return response


def _event(data: object) -> bytes:
    return b"data: %b\n\n" % msgspec.json.encode(data)


@asynccontextmanager
async def providing(trace: Sequence[Row], speed: float) -> AsyncIterator[Provider]:
    """The provider on a loopback port, until the block ends."""
    provider = Provider(trace, speed)
    runner = web.ServerRunner(web.Server(provider.answer))
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        provider.base_url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
        yield provider
    finally:
        await runner.cleanup()


# --- The replay -------------------------------------------------------------------------------------------------------


class _Callers:
    """Everybody who calls, each at the trace's time, and what they saw."""

    def __init__(self, trace: Sequence[Row], urls: Sequence[str], provider: Provider, session: aiohttp.ClientSession):
        self._trace, self._urls, self._provider, self._session = trace, urls, provider, session
        self._places = asyncio.Semaphore(AT_ONCE)
        self.outcomes: Counter[str] = Counter()
        self.clamped = 0
        # The bill at the moment somebody first heard this word.
        self.billed_at: dict[str, int] = {}

    async def replay(self, speed: float, progress: Progress) -> None:
        bar = progress.add_task("", total=len(self._trace))
        since_s = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for index, row in enumerate(self._trace):
                await self._places.acquire()
                early_s = row.at_s / speed - (time.perf_counter() - since_s)
                if early_s > 0:
                    await asyncio.sleep(early_s)
                group.create_task(self._call(index, row))
                progress.advance(bar)
        progress.remove_task(bar)

    async def _call(self, index: int, row: Row) -> None:
        text = _TEXT[: row.prompt_tokens * BYTES_PER_TOKEN]
        body = {
            "model": "replay", "messages": [{"role": "user", "content": text}], "seed": index,
            "max_tokens": row.max_tokens, "stream": index % 2 == 1,
        }  # fmt: skip
        url = self._urls[index % len(self._urls)]
        try:
            async with self._session.post(f"{url}/v1/chat/completions", data=msgspec.json.encode(body)) as reply:
                data = await reply.read()
            word = "passed" if reply.status == 200 else msgspec.json.decode(data)["error"]["code"]
            self.clamped += "x-gateway-max-tokens-clamped" in reply.headers
        except (aiohttp.ClientError, TimeoutError) as error:
            word = type(error).__name__
        finally:
            self._places.release()
        self.outcomes[word] += 1
        self.billed_at.setdefault(word, self._provider.billed_nusd)


async def replay(trace: Sequence[Row], order: Order, *, speed: float, progress: Progress) -> Figures:
    """One replay of the trace, from an empty ledger to a closed one. Raises `TrialFailed`."""
    cap_nusd = round(CAP_SHARE * sum(row.cost_nusd for row in trace))
    with TemporaryDirectory(prefix="gateway-replay-") as name:
        folder = Path(name)
        since_s = time.perf_counter()
        async with providing(trace, speed) as provider:
            _write_configuration(folder, order, provider.base_url, cap_nusd)
            async with AsyncExitStack() as stack:
                urls = []
                for place in range(order.processes):
                    log = folder / f"gateway-{place}.log"
                    urls.append((await stack.enter_async_context(served(folder, ENV, log))).data_url)
                session = await stack.enter_async_context(
                    aiohttp.ClientSession(
                        timeout=aiohttp.ClientTimeout(total=PATIENCE_S),
                        connector=aiohttp.TCPConnector(limit=0),
                        headers={"Content-Type": "application/json"},
                    )
                )
                callers = _Callers(trace, urls, provider, session)
                await callers.replay(speed, progress)
            billed_nusd = provider.billed_nusd
        took_s = time.perf_counter() - since_s
        ledger_nusd, wrong = await asyncio.to_thread(_ledger, folder)
        waited = await asyncio.to_thread(_waited, folder)
    refused = [nusd for word, nusd in callers.billed_at.items() if word.startswith("budget_")]
    exceeded = callers.billed_at.get("budget_exceeded")
    return Figures(
        order, len(trace), cap_nusd, billed_nusd, ledger_nusd, wrong,
        min(refused) / cap_nusd if refused else None,
        exceeded / cap_nusd if exceeded is not None else None,
        callers.outcomes, callers.clamped, waited, took_s,
    )  # fmt: skip


def _write_configuration(folder: Path, order: Order, base_url: str, cap_nusd: int) -> None:
    """A gateway with one model, one price and one cap; all else as it comes."""
    (folder / "policies").mkdir()
    (folder / "config.toml").write_text(
        '[server]\ndata = "127.0.0.1:0"\nadmin = "127.0.0.1:0"\n'
        f'[upstreams.provider]\nkind = "compatible"\nbase_url = "{base_url}"\n'
        '[agents.replay]\nfinetuned = "provider/m"\nbaseline = "provider/m"\ndefaults = { max_tokens = 4096 }\n'
        f'[prices."provider/m"]\ninput_usd_per_mtok = "{format_usd(INPUT)}"\n'
        f'output_usd_per_mtok = "{format_usd(OUTPUT)}"\n'
        # Processes, callers and provider share the machine, so the ledger's answer may be late.
        f'[store]\nurl = "sqlite:///{folder / "gateway.db"}"\ntimeout_ms = 5000\n'
        f'[journal]\ndir = "{folder / "journal"}"\n'
    )
    (folder / "policies" / f"{ENV}.toml").write_text(
        f'[log]\nlevel = "warning"\n[budget]\nwhen_short = "{order.when_short}"\n'
        f'[[caps]]\nper = "total"\nusd = "{format_usd(cap_nusd)}"\n'
    )
    (folder / "policies" / "routing.toml").write_text('default_agent = "replay"\n')


def _ledger(folder: Path) -> tuple[int, int]:
    with Ledger(folder / "gateway.db", clock=time.time, is_new_allowed=False) as ledger:
        return sum(row.amounts.nusd for row in ledger.rows(ENV)), len(ledger.verify(ENV))


def _waited(folder: Path) -> int:
    records = (line for line in read_calls(folder / "journal") if isinstance(line, CallRecord))
    return sum(bool(record.attempts) and record.attempts[0].started_ms >= WAITED_MS for record in records)


# --- The table --------------------------------------------------------------------------------------------------------


def table_of(found: Sequence[Figures]) -> Table:
    """A row per replay."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("processes", justify="right")
    table.add_column("when short")
    for title in ("billed usd", "overshoot nusd", "used at first refusal", "at first exceeded", "at the end"):
        table.add_column(title, justify="right")
    for title in ("passed", "clamped", "waited", "reserved", "exceeded", "s"):
        table.add_column(title, justify="right")
    for one in found:
        table.add_row(
            str(one.order.processes), one.order.when_short, f"{one.billed_nusd / NUSD_PER_USD:.4f}",
            str(one.overshoot_nusd), _share(one.at_first_refusal), _share(one.at_first_exceeded),
            _share(one.billed_nusd / one.cap_nusd), str(one.outcomes["passed"]), str(one.clamped), str(one.waited),
            str(one.outcomes["budget_reserved"]), str(one.outcomes["budget_exceeded"]), f"{one.took_s:.0f}",
        )  # fmt: skip
    return table


def _share(share: float | None) -> str:
    return "-" if share is None else f"{share:.2%}"


async def run(trace: Sequence[Row], orders: Sequence[Order], screen: Console, *, speed: float) -> bool:
    """Replay, show, and say whether caps and ledger held. Raises `TrialFailed`."""
    cost_usd = sum(row.cost_nusd for row in trace) / NUSD_PER_USD
    screen.print(
        f"{len(trace)} requests of {trace[-1].at_s / 60:.0f} minutes, {speed:g} times as fast. They cost "
        f"{cost_usd:.4f} usd; the cap is {CAP_SHARE:.0%} of it, {CAP_SHARE * cost_usd:.4f} usd."
    )
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=screen, transient=True) as progress:
        found = [await replay(trace, order, speed=speed, progress=progress) for order in orders]
    screen.print(table_of(found))
    for one in found:
        if not one.holds:
            screen.print(
                f"FAILED  {one.order}: billed {one.billed_nusd} of {one.cap_nusd} nUSD, the ledger has "
                f"{one.ledger_nusd}, {one.wrong_accounts} accounts are wrong; {dict(one.outcomes)}"
            )
    return all(one.holds for one in found)


def main(arguments: Sequence[str]) -> int:
    """Exit status 0 where caps and ledger held."""
    parser = argparse.ArgumentParser(prog="make caps ARGS=...", description="Replay the Azure trace against a cap.")
    parser.add_argument("--quick", action="store_true", help=f"the first {QUICK_ROWS} requests only")
    parser.add_argument("--speed", type=float, default=SPEED, help="how many times as fast as it was (%(default)s)")
    parser.add_argument("--trace", type=Path, default=TRACE)
    chosen = parser.parse_args(arguments)
    trace = read_trace(chosen.trace)
    orders = [Order(processes, when_short) for when_short in ("clamp", "refuse") for processes in AIMS]
    screen = Console(highlight=False)
    screen = screen if screen.is_terminal else Console(highlight=False, width=140)
    try:
        is_well = asyncio.run(run(trace[:QUICK_ROWS] if chosen.quick else trace, orders, screen, speed=chosen.speed))
    except TrialFailed as error:
        screen.print(str(error), markup=False)
        return 1
    return 0 if is_well else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
