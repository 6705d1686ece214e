"""What the clients' tests talk to: the real `gateway serve` in a process of its own, simulators in a thread of ours.

The process is the one a person starts, read from files and found by the addresses it prints. The simulators stay on
this side, so that a test can look at what arrived there and at what is still open.
"""

import asyncio
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

from aiohttp import web

from gateway.domain.call import CallRecord
from gateway.domain.settings import SimulatorSettings
from gateway.simulator.server import Simulator
from gateway.store.journal import read_journal

T = TypeVar("T")

ROOT = Path(__file__).parents[2]
KEY = "gw-for-every-agent"
QA_KEY = "gw-for-qa-agent-only"
PATIENCE_S = 15.0

CONFIG = """
[server]
data  = "127.0.0.1:0"
admin = "127.0.0.1:0"

[upstreams.sim]
kind     = "compatible"
base_url = "{sim}"

[upstreams.slow]
kind     = "compatible"
base_url = "{slow}"

[upstreams.moody]
kind     = "compatible"
base_url = "{moody}"

[upstreams.mistral]
kind     = "mistral"
base_url = "{sim}"
api_key  = "key-of-the-provider"

[agents.qa_agent]
finetuned = "sim/ft:qa"
baseline  = "sim/simulator-small"
defaults  = {{ temperature = 0.7, max_tokens = 512 }}

[agents.support_agent]
finetuned = "sim/fault:503"
baseline  = "sim/fault:429-bare"

[agents.legal_agent]
finetuned = "mistral/ft:legal"
baseline  = "mistral/open-mistral-7b"

[agents.capped_agent]
finetuned = "sim/ft:capped"
baseline  = "sim/capped"

[journal]
dir = "{journal}"
"""

# One agent for each, and one for `cut`: its fine-tuned model fails in that way, its baseline answers.
FAULTS_WITH_FALLBACK = ("401", "429", "500", "503", "empty", "error-in-200", "html", "reset")
FALLBACK_AGENT = """
[agents.after_{fault}]
finetuned = "sim/fault:{fault}"
baseline  = "sim/simulator-large"
"""

POLICY = """
[models]
use_finetuned    = true
allow_raw_models = true

[ab_testing]
enabled            = true
rollout_percentage = 50

[overrides]
variant  = true
fallback = true
timeout  = true

[[caps]]
scope    = "agent"
per      = "total"
requests = 1
only     = {{ agent = ["capped_agent"] }}

[[keys]]
name   = "everything"
sha256 = "{key}"

[[keys]]
name   = "qa"
sha256 = "{qa_key}"
agents = ["qa_agent"]
"""

ROUTING = """
default_agent = "qa_agent"

[[rules]]
name     = "contracts"
agent    = "legal_agent"
any_word = ["contract"]
why      = "is about a contract"
"""


class Moody:
    """An upstream that is overloaded for its first calls, as many as it is told, and then answers."""

    def __init__(self) -> None:
        self.calls = 0
        self.fails_left = 0

    async def chat(self, request: web.Request) -> web.Response:
        await request.read()
        self.calls += 1
        if self.fails_left:
            self.fails_left -= 1
            error = {"error": {"message": "overloaded", "type": "server_error", "param": None, "code": None}}
            return web.json_response(error, status=503, headers={"retry-after-ms": "5"})
        message = {"role": "assistant", "content": "Here I am."}
        return web.json_response(
            {
                "id": "chatcmpl-moody",
                "object": "chat.completion",
                "created": 1,
                "model": "moody",
                "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
                "usage": {"prompt_tokens": 1, "completion_tokens": 3, "total_tokens": 4},
            }
        )


class Served:
    """The running gateway and what stands behind it."""

    def __init__(self, data_url: str, journal: Path, simulator: Simulator, slow: Simulator, moody: Moody) -> None:
        self.url = data_url
        self.base_url = f"{data_url}/v1"
        self.simulator = simulator
        self.slow = slow
        self.moody = moody
        self._journal = journal

    @property
    def sent(self) -> Any:
        """The body of the last request that reached the simulator."""
        assert self.simulator.last_request is not None
        return self.simulator.last_request.body

    def records(self, request_id: str) -> list[CallRecord]:
        """What the journal holds of one call; it should be one record."""
        every = (record for file in self._journal.iterdir() for record in read_journal(file))
        return [record for record in every if isinstance(record, CallRecord) and record.id == request_id]

    def recorded(self, request_id: str) -> CallRecord:
        """The one record of a call. Before an answer's last byte leaves, it is there; after a cancelled one, soon."""
        wait_until(lambda: bool(self.records(request_id)))
        (record,) = self.records(request_id)
        return record


def wait_until(condition: Callable[[], bool]) -> None:
    """Return as soon as it holds; fail where it never does. What happens in another process cannot be awaited."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s, "what was waited for did not come about"
        time.sleep(0.005)


@contextmanager
def loop_in_thread() -> Iterator[Callable[[Coroutine[Any, Any, T]], T]]:
    """An event loop beside the test, and the way to run something on it from here."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield lambda work: asyncio.run_coroutine_threadsafe(work, loop).result(PATIENCE_S)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _start_moody(moody: Moody) -> web.AppRunner:
    app = web.Application()
    app.router.add_post("/v1/chat/completions", moody.chat)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    return runner


@contextmanager
def gateway_process(folder: Path, *arguments: str) -> Iterator[str]:
    """`gateway serve` until the block ends; gives the data listener's address. It must leave in good order."""
    log = folder / "stderr.txt"
    command = [sys.executable, "-m", "gateway", "serve", *arguments]
    with log.open("wb") as errors:
        process = subprocess.Popen(
            command, cwd=folder, stdout=subprocess.PIPE, stderr=errors, env={**os.environ, "PYTHONPATH": str(ROOT)}
        )
    assert process.stdout is not None
    with process.stdout as announced:
        try:
            yield _address(announced, log)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                status = process.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                raise
    said = log.read_text()
    assert status == 0, said
    assert "Traceback" not in said, said


def _address(announced: Any, log: Path) -> str:
    for line in announced:
        found = re.search(rb"(http://\S+)/v1", line)
        if found:
            return found[1].decode()
    raise AssertionError(f"the gateway announced no address: {log.read_text()}")


@contextmanager
def served_for_clients(folder: Path) -> Iterator[Served]:
    """The gateway of this file's configuration, until the block ends."""
    moody = Moody()
    with loop_in_thread() as run:
        quick = SimulatorSettings(first_token_ms=0, per_token_ms=0, jitter=0)
        simulator = run(Simulator.start(quick))
        slow = run(Simulator.start(SimulatorSettings(first_token_ms=20, per_token_ms=20, jitter=0)))
        runner = run(_start_moody(moody))
        moody_url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
        journal = folder / "journal"
        config = CONFIG.format(sim=simulator.base_url, slow=slow.base_url, moody=moody_url, journal=journal)
        agents = "".join(FALLBACK_AGENT.format(fault=fault) for fault in (*FAULTS_WITH_FALLBACK, "cut"))
        (folder / "config.toml").write_text(config + agents)
        (folder / "policies").mkdir()
        hashes = {"key": sha256(KEY.encode()).hexdigest(), "qa_key": sha256(QA_KEY.encode()).hexdigest()}
        (folder / "policies" / "clients.toml").write_text(POLICY.format(**hashes))
        (folder / "policies" / "routing.toml").write_text(ROUTING)
        try:
            with gateway_process(folder, "--env", "clients") as url:
                yield Served(url, journal, simulator, slow, moody)
        finally:
            for stop in (simulator.stop, slow.stop, runner.cleanup):
                run(stop())
