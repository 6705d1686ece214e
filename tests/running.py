"""A whole gateway inside a test: real sockets on ports the system chose, files in `tmp_path`, a quick simulator.

    async with running_gateway(tmp_path) as gateway:
        await session.post(f"{gateway.data_url}/v1/chat/completions", json=chat("hello"))

Without arguments it serves two agents, `qa_agent` and `support_agent`, on one simulator that waits for nothing and is
at hand as `gateway.simulator`; everybody gets the baseline. All texts are TOML as a person would write it.
"""

import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from gateway.app import Gateway
from gateway.config import Loaded, Paths, load
from gateway.domain.call import CallRecord
from gateway.domain.ledger import LedgerRow
from gateway.domain.settings import Settings, SimulatorSettings
from gateway.edge.runtime import Runtime
from gateway.simulator.server import Simulator
from gateway.store.journal_reader import Torn, read_calls
from gateway.store.ledger import Ledger

CHAT = "/v1/chat/completions"
AT_ONCE = SimulatorSettings(first_token_ms=0, per_token_ms=0, jitter=0)

AGENTS = """
[agents.qa_agent]
finetuned = "sim/ft:qa"
baseline  = "sim/simulator-small"
defaults  = { temperature = 0.7, max_tokens = 64 }

[agents.support_agent]
finetuned = "sim/ft:support"
baseline  = "sim/simulator-small"
fallbacks = ["sim/simulator-large"]
defaults  = { temperature = 0.3, max_tokens = 32 }
"""

PRICES = """
[prices."sim/*"]
input_usd_per_mtok  = "0.20"
output_usd_per_mtok = "0.80"
"""

POLICY = """
[models]
use_finetuned = false
"""

ROUTING = """
default_agent = "qa_agent"

[[rules]]
name     = "orders"
agent    = "support_agent"
priority = 50
any_word = ["order", "refund"]
why      = "is about an order"
"""


class RunningGateway:
    """A gateway that serves, and what a test wants to look at."""

    def __init__(self, gateway: Gateway, simulator: Simulator, files: "_Files") -> None:
        self.gateway = gateway
        self.simulator = simulator
        self._files = files

    @property
    def data_url(self) -> str:
        """Where agents call, without `/v1`."""
        return self.gateway.data.url

    @property
    def admin_url(self) -> str:
        """Where `/metrics` is."""
        return self.gateway.admin.url

    @property
    def runtime(self) -> Runtime:
        """What the journey works with."""
        return self.gateway.runtime

    def journal(self) -> list[CallRecord]:
        """Every record so far, oldest first. A torn line fails the test."""
        records = list(read_calls(self.runtime.journal.directory.parent))
        assert not [record for record in records if isinstance(record, Torn)]
        return [record for record in records if isinstance(record, CallRecord)]

    def ledger(self) -> list[LedgerRow]:
        """Every row that the ledger has been told, oldest first."""
        with Ledger(self._files.paths.config.parent / "gateway.db", clock=time.time, is_new_allowed=False) as ledger:
            return list(ledger.rows("dev"))

    async def reload(self, *, config: str | None = None, policy: str | None = None, routing: str | None = None) -> None:
        """Write those files anew that are given, and reload as on SIGHUP."""
        self._files.write(config=config, policy=policy, routing=routing)
        await self.gateway.reload()


class _Files:
    """config.toml, policies/dev.toml and policies/routing.toml in a directory of the test's own."""

    def __init__(self, directory: Path, fixed: str) -> None:
        self.paths = Paths(directory / "config.toml", directory / "policies")
        self.paths.policies.mkdir(exist_ok=True)
        self._fixed = fixed

    def write(self, *, config: str | None, policy: str | None, routing: str | None) -> None:
        if config is not None:
            self.paths.config.write_text(f"{self._fixed}\n{config}\n")
        if policy is not None:
            (self.paths.policies / "dev.toml").write_text(policy)
        if routing is not None:
            (self.paths.policies / "routing.toml").write_text(routing)

    def load(self, environ: Mapping[str, str], started: Settings | None = None) -> Loaded:
        return load(self.paths, "dev", litellm_map={}, environ=environ, started=started)


@asynccontextmanager
async def running_gateway(
    tmp_path: Path,
    *,
    upstreams: Mapping[str, str] | None = None,
    agents: str = AGENTS,
    policy: str = POLICY,
    routing: str = ROUTING,
    server: str = "",
    store: str = "timeout_ms = 5000",
    config: str = PRICES,
    environ: Mapping[str, str] | None = None,
    simulated: SimulatorSettings = AT_ONCE,
    data: str = "127.0.0.1:0",
) -> AsyncIterator[RunningGateway]:
    """A gateway from these texts, served until the block ends.

    `upstreams` come beside `sim` (or in its place): a name and a base URL, which makes it `compatible`, or a name and
    the lines of its table. `server` and `store` hold further lines of those tables, `config` holds further tables of
    config.toml.
    """
    simulator = await Simulator.start(simulated)
    tables = {"sim": simulator.base_url, **(upstreams or {})}
    fixed = "\n".join(
        [
            f'[server]\ndata = "{data}"\nadmin = "127.0.0.1:0"\ndrain_s = 0.1\n{server}',
            f'[journal]\ndir = "{tmp_path / "journal"}"',
            f'[store]\nurl = "sqlite:///{tmp_path / "gateway.db"}"\n{store}',
            *(f"[upstreams.{name}]\n{_upstream(lines)}" for name, lines in tables.items()),
            agents,
        ]
    )
    files = _Files(tmp_path, fixed)
    files.write(config=config, policy=policy, routing=routing)
    variables = environ or {}
    try:
        gateway = Gateway(files.load(variables), partial(files.load, variables))
        await gateway.start()
        try:
            yield RunningGateway(gateway, simulator, files)
        finally:
            await gateway.stop()
    finally:
        await simulator.stop()


def _upstream(text: str) -> str:
    return f'kind = "compatible"\nbase_url = "{text}"' if text.startswith("http") else text


def chat(text: str = "What is the capital of France?", *, model: str = "qa_agent", **fields: Any) -> dict[str, Any]:
    """A chat request as an agent would send it."""
    return {"model": model, "messages": [{"role": "user", "content": text}], **fields}
