"""What every fault is played on: two scripted providers behind a real gateway, and what may never come out of it.

An answer is whole or it is an error that a client can raise, and `check_honest` tells which; there is no third thing.
Waits are tenths of a second by configuration, or none at all, with `Clock` in the place of failover's own.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest

from gateway.edge import failover
from tests.journey import (
    AGENTS,
    AT_ONCE,
    PATIENCE_S,
    POLICY,
    PRICES,
    QUICK_RETRIES,
    ROUTING,
    WIDE_CAPS,
    Answer,
    Journey,
)  # fmt: skip
from tests.running import running_gateway
from tests.scripted import DONE, Scene, says, scripted

# Every provider says this, so a stream that broke off can be joined with another's.
WORDS = tuple(f"{word} " for word in ("Grüße", "aus", "Paris", "世界", "🌍", *(f"w{place}" for place in range(55))))
TEXT = "".join(WORDS)
# For faults that are silence: long enough for a busy machine, short enough for a test.
SHORT = "first_byte_s = 0.3\nfirst_token_s = 0.3\nstall_s = 0.3\nattempt_s = 0.3"


class Clock:
    """Time as failover sees it: moves when told, and by every wait, which it notes instead of waiting."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 1_000.0
        self.waits_s: list[float] = []
        monkeypatch.setattr(failover, "time", SimpleNamespace(monotonic=lambda: self.now_s))
        monkeypatch.setattr(failover, "asyncio", SimpleNamespace(sleep=self._sleep))

    async def _sleep(self, seconds: float) -> None:
        self.waits_s.append(seconds)
        self.now_s += seconds


@asynccontextmanager
async def stage(
    tmp_path: Path,
    *scenes: Scene,
    second: tuple[Scene, ...] = (says(*WORDS),),
    first_table: str = "",
    second_table: str = "",
    policy: str = QUICK_RETRIES,
    agents: str = AGENTS,
    config: str = PRICES,
    server: str = "",
) -> AsyncIterator[Journey]:
    """`scenes` are the first provider's; the tables are further lines of each one's in config.toml."""
    async with AsyncExitStack() as stack:
        one = await stack.enter_async_context(scripted(*scenes))
        two = await stack.enter_async_context(scripted(*second))
        upstreams = {
            name: f'kind = "compatible"\nbase_url = "{provider.base_url}"\n{table}'
            for name, provider, table in (("first", one, first_table), ("second", two, second_table))
        }
        gateway = await stack.enter_async_context(
            running_gateway(
                tmp_path, upstreams=upstreams, agents=agents, routing=ROUTING,
                policy=POLICY + policy + AT_ONCE + WIDE_CAPS, config=config, server=server,
            )
        )  # fmt: skip
        connector = aiohttp.TCPConnector(limit=0)
        session = await stack.enter_async_context(aiohttp.ClientSession(connector=connector))
        yield Journey(gateway, session, one, two)


def timeouts(lines: str) -> str:
    """Lines for an upstream's table."""
    return f"timeouts = {{ {', '.join(lines.splitlines())} }}" if lines else ""


def check_honest(answer: Answer, *, whole: str = TEXT) -> str:
    """See that `answer` is whole, or an error that says so; its error code, "" where it is whole."""
    if answer.status != 200:
        return _checked_error(answer.error)
    if not answer.headers["Content-Type"].startswith("text/event-stream"):
        assert answer.json()["choices"][0]["finish_reason"] == "stop"
        assert answer.text == whole
        return ""
    for line in answer.body.split(b"\n"):
        assert not line or line.startswith((b"data: ", b":")), line
    # Decodes every event, so nothing malformed came out.
    chunks = answer.chunks
    choices = [choice for one in chunks for choice in one.get("choices") or ()]
    if "error" not in chunks[-1]:
        assert answer.events.count(DONE) == 1
        assert answer.events[-1] == DONE
        assert answer.streamed_text == whole
        return ""
    assert DONE not in answer.events
    assert not any(choice.get("finish_reason") for choice in choices), "a finish_reason came before the error"
    assert whole.startswith(answer.streamed_text)
    assert not any("error" in one for one in chunks[:-1])
    return _checked_error(chunks[-1]["error"])


def _checked_error(error: dict[str, Any]) -> str:
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert error["type"]
    assert isinstance(error["code"], str)
    return error["code"] or "?"


async def check_at_rest(trip: Journey) -> None:
    """See that no call stays open, no money held and no bytes counted, once what is due has happened."""
    async with asyncio.timeout(PATIENCE_S):
        while trip.gateway.runtime.observer.in_flight:
            await trip.let_others_act()
    trip.check_at_rest()
    assert trip.gateway.runtime.buffered_bytes == 0


async def check_serves_on(trip: Journey, *, stream: bool = True, model: str = "qa_agent", whole: str = TEXT) -> None:
    """See that, with providers that work again, the next call is answered, and that the books are at rest."""
    trip.first.then(says(whole))
    trip.second.then(says(whole))
    answer = await trip.ask(stream=stream, model=model)
    assert (answer.status, check_honest(answer, whole=whole)) == (200, ""), answer.body
    await check_at_rest(trip)
