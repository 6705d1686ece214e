"""A whole `gateway serve` in a process of its own, on files of a test's own, in front of a scripted provider."""

import asyncio
import os
import re
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import msgspec

from gateway.domain.call import CallRecord
from gateway.domain.ledger import LedgerRow
from gateway.domain.outcome import Outcome
from gateway.store.experiments import Experiments
from gateway.store.journal_reader import Torn, read_calls
from gateway.store.ledger import Ledger
from tests.running import CHAT, chat
from tests.scripted import Scripted

ROOT = Path(__file__).parent.parent
# So long that only a hang can reach it.
PATIENCE_S = 30.0
ADDRESSES = re.compile(r"agents +(http://\S+)/v1 .*?admin +(http://\S+) ", re.DOTALL)
POLICY = "[models]\nuse_finetuned = false\n"


class Files:
    """The configuration of one test's gateway."""

    def __init__(self, folder: Path, provider: Scripted) -> None:
        self.folder, self._base_url = folder, provider.base_url
        (folder / "policies").mkdir()
        (folder / "policies" / "routing.toml").write_text('default_agent = "qa_agent"\n')
        self.write_config()
        self.write_policy(POLICY)

    def write_config(self, *, model: str = "a", server: str = "", journal: str = "", more: str = "") -> None:
        self._replace(
            "config.toml",
            f"""
            [server]
            data = "127.0.0.1:0"
            admin = "127.0.0.1:0"
            {server}
            [upstreams.first]
            kind = "compatible"
            base_url = "{self._base_url}"
            [agents.qa_agent]
            finetuned = "first/ft:a"
            baseline = "first/{model}"
            [journal]
            dir = "{self.folder / "journal"}"
            {journal}
            [store]
            url = "sqlite:///{self.folder / "gateway.db"}"
            {more}
            """,
        )

    def write_policy(self, text: str) -> None:
        self._replace("policies/dev.toml", text)

    def records(self) -> list[CallRecord]:
        """The journal; a torn line fails the test."""
        found = list(read_calls(self.folder / "journal"))
        assert not [record for record in found if isinstance(record, Torn)]
        return [record for record in found if isinstance(record, CallRecord)]

    def ledger(self) -> list[LedgerRow]:
        """The ledger's rows, oldest first; its accounts hold what the rows say."""
        with Ledger(self.folder / "gateway.db", clock=time.time, is_new_allowed=False) as ledger:
            assert ledger.verify("dev") == []
            return list(ledger.rows("dev"))

    def calls(self) -> list[Outcome]:
        """What became of the calls, as experiments have it, oldest first."""
        with Experiments(self.folder / "gateway.db", clock=time.time, is_new_allowed=False) as experiments:
            return list(experiments.outcomes("dev"))

    def _replace(self, name: str, text: str) -> None:
        # As an editor does it: whoever reads sees the old file or the new one.
        draft = self.folder / "draft"
        draft.write_text(text)
        draft.replace(self.folder / name)


class Process:
    """A gateway of its own, and a client for it."""

    def __init__(self, child: asyncio.subprocess.Process, session: aiohttp.ClientSession) -> None:
        self.child, self.session = child, session
        self.lines: list[str] = []
        self.data_url = self.admin_url = ""

    async def announced(self) -> None:
        """Read what it says of itself, up to its addresses."""
        assert self.child.stdout is not None
        said = ""
        while not (found := ADDRESSES.search(said)):
            line = await asyncio.wait_for(self.child.stdout.readline(), PATIENCE_S)
            assert line, await self.child.stderr.read() if self.child.stderr else said
            said += line.decode()
        self.data_url, self.admin_url = found.groups()

    async def logged(self, words: str) -> dict[str, Any]:
        """Wait for a log line that has these words; the line."""
        assert self.child.stderr is not None
        while True:
            line = await asyncio.wait_for(self.child.stderr.readline(), PATIENCE_S)
            assert line, f"it ended without saying {words!r}: {self.lines}"
            self.lines.append(line.decode())
            if words in self.lines[-1]:
                return msgspec.json.decode(line)  # type: ignore[no-any-return]

    async def ended(self) -> int:
        """Its exit status."""
        return await asyncio.wait_for(self.child.wait(), PATIENCE_S)

    def post(self, **fields: Any) -> Any:
        return self.session.post(f"{self.data_url}{CHAT}", json=chat(**fields))

    async def ask(self, **fields: Any) -> tuple[int, str, Any]:
        """Status, request id, body."""
        async with asyncio.timeout(PATIENCE_S), self.post(**fields) as response:
            return response.status, response.headers["x-request-id"], await response.json()

    async def admin(self, path: str) -> tuple[int, str]:
        async with asyncio.timeout(PATIENCE_S), self.session.get(f"{self.admin_url}{path}") as response:
            return response.status, await response.text()

    async def metric(self, line: str) -> bool:
        """Whether `/metrics` has this line."""
        return line in (await self.admin("/metrics"))[1].split("\n")


async def _begin(files: Files) -> asyncio.subprocess.Process:
    command = ("-m", "gateway", "serve", "--config", "config.toml", "--policies", "policies", "--env", "dev")
    return await asyncio.create_subprocess_exec(
        sys.executable, *command, cwd=files.folder, env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip


async def failed_start(files: Files) -> tuple[int, str]:
    """`gateway serve` on files it cannot serve on: its exit status, and what it said."""
    child = await _begin(files)
    try:
        _, said = await asyncio.wait_for(child.communicate(), PATIENCE_S)
    finally:
        if child.returncode is None:
            child.kill()
            await child.communicate()
    assert child.returncode is not None
    return child.returncode, said.decode()


@asynccontextmanager
async def process(files: Files) -> AsyncIterator[Process]:
    """`gateway serve` on these files; killed at the end where it still runs."""
    child = await _begin(files)
    try:
        async with aiohttp.ClientSession() as session:
            running = Process(child, session)
            await running.announced()
            yield running
    finally:
        if child.returncode is None:
            child.kill()
        await child.communicate()
