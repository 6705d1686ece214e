"""What the clients' tests talk to: the real `gateway serve` in a process of its own, simulators in a thread of ours.

The process is the one a person starts, read from files and found by the addresses it prints. The simulators stay on
this side, so that a test can look at what arrived there and at what is still open.
"""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

from aiohttp import web

from gateway.domain.call import CallRecord
from gateway.domain.settings import SimulatorSettings
from gateway.simulator.server import Simulator
from gateway.store.journal_reader import read_calls

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

# The same simulator, left after a short silence.
[upstreams.hasty]
kind     = "compatible"
base_url = "{sim}"
timeouts = {{ stall_s = 0.1 }}

[upstreams.moody]
kind     = "compatible"
base_url = "{moody}"

[upstreams.fixed]
kind     = "compatible"
base_url = "{fixed}"

[upstreams.prefixed]
kind     = "mistral"
base_url = "{fixed}"

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

# Three that break off: behind one is a model that says the same, behind the next one that goes on from what was said,
# and behind the third nobody.
[agents.joined_agent]
finetuned = "fixed/cut"
baseline  = "fixed/whole"

[agents.prefixed_agent]
finetuned = "fixed/cut"
baseline  = "prefixed/whole"

[agents.lone_agent]
finetuned = "fixed/cut"
baseline  = "fixed/cut"

[agents.held_agent]
finetuned = "sim/fault:cut"
baseline  = "sim/simulator-large"

[agents.strict_agent]
finetuned = "fixed/cut"
baseline  = "fixed/whole"

[journal]
dir = "{journal}"
[store]
url = "sqlite:///{journal}.db"
"""

# One agent for each, and one for `cut`: its fine-tuned model fails in that way, its baseline answers. The figure is
# how often the failing model is tried; `429` asks for more patience than the policy has.
FAULTS_WITH_FALLBACK = {
    "401": 1, "429": 1, "429-bare": 3, "500": 2, "503": 2, "empty": 1, "error-in-200": 2, "html": 2, "reset": 2,
}  # fmt: skip
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

# All tests share this gateway, so no breaker may open for one that another one meets, and no retry may be the last.
[breakers]
consecutive = 100_000
min_calls   = 100_000

[retries]
base_s       = 0.001
max_wait_s   = 0.5
budget_floor = 1_000

# So that a test sees the provider's work end with the caller's wish for it.
[budget]
when_left = "abort"

[stream]
agents = {{ held_agent = "hold", strict_agent = "error" }}

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
        self.fail(0)

    def fail(self, times: int, *, status: int = 503) -> None:
        """Count anew, and fail so often in this way."""
        self.calls = 0
        self.fails_left = times
        self._status = status

    async def chat(self, request: web.Request) -> web.Response:
        await request.read()
        self.calls += 1
        if self.fails_left:
            self.fails_left -= 1
            error = {"error": {"message": "overloaded", "type": "server_error", "param": None, "code": None}}
            return web.json_response(error, status=self._status, headers={"retry-after-ms": "5"})
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


class Fixed:
    """An upstream that streams the same words whoever asks. The model `cut` breaks off after `KEPT` of them.

    Asked to go on from a prefix it repeats the prefix first, as Mistral does.
    """

    WORDS = ("The ", "capital ", "of ", "France ", "is ", "Paris", ".")
    KEPT = 4
    USAGE = {"prompt_tokens": 7, "completion_tokens": 7, "total_tokens": 14}  # noqa: RUF012 - nobody changes it

    def __init__(self) -> None:
        self.bodies: list[Any] = []

    async def chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        last = body["messages"][-1]
        begun = last["content"] if last["role"] == "assistant" else ""
        assert "".join(self.WORDS).startswith(begun)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        words = [begun, "".join(self.WORDS).removeprefix(begun)] if begun else list(self.WORDS)
        await self._send(response, body, {"role": "assistant", "content": ""})
        kept = words[: self.KEPT] if body["model"] == "cut" else words
        if body.get("tools"):
            call = {"index": 0, "id": "c1", "type": "function", "function": {"name": "f", "arguments": ""}}
            await self._send(response, body, {"tool_calls": [call]})
            kept = []
        for word in kept:
            await self._send(response, body, {"content": word})
        if body["model"] != "cut":
            await self._send(response, body, {}, "stop")
            await self._send(response, body, None)
            await response.write(b"data: [DONE]\n\n")
        return response

    async def _send(
        self, response: web.StreamResponse, body: Any, delta: dict[str, Any] | None, finish: str | None = None
    ) -> None:
        choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": finish}]
        usage = {"usage": self.USAGE} if delta is None else {}
        chunk = {"id": f"chatcmpl-{body['model']}", "object": "chat.completion.chunk", "created": 1, **usage}
        data = json.dumps({**chunk, "model": body["model"], "choices": choices})
        await response.write(f"data: {data}\n\n".encode())


class Served:
    """The running gateway and what stands behind it."""

    def __init__(
        self, data_url: str, journal: Path, simulator: Simulator, slow: Simulator, moody: Moody, fixed: Fixed
    ) -> None:
        self.url = data_url
        self.base_url = f"{data_url}/v1"
        self.simulator = simulator
        self.slow = slow
        self.moody = moody
        self.fixed = fixed
        self._journal = journal

    @property
    def sent(self) -> Any:
        """The body of the last request that reached the simulator."""
        assert self.simulator.last_request is not None
        return self.simulator.last_request.body

    def records(self, request_id: str) -> list[CallRecord]:
        """What the journal holds of one call; it should be one record."""
        every = read_calls(self._journal)
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


async def _start(chat: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> web.AppRunner:
    app = web.Application()
    app.router.add_post("/v1/chat/completions", chat)
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
    moody, fixed = Moody(), Fixed()
    with loop_in_thread() as run:
        quick = SimulatorSettings(first_token_ms=0, per_token_ms=0, jitter=0)
        simulator = run(Simulator.start(quick))
        slow = run(Simulator.start(SimulatorSettings(first_token_ms=20, per_token_ms=20, jitter=0)))
        runners = [run(_start(one.chat)) for one in (moody, fixed)]
        moody_url, fixed_url = (f"http://127.0.0.1:{runner.addresses[0][1]}/v1" for runner in runners)
        journal = folder / "journal"
        config = CONFIG.format(
            sim=simulator.base_url, slow=slow.base_url, moody=moody_url, fixed=fixed_url, journal=journal
        )
        agents = "".join(FALLBACK_AGENT.format(fault=fault) for fault in (*FAULTS_WITH_FALLBACK, "cut"))
        (folder / "config.toml").write_text(config + agents)
        (folder / "policies").mkdir()
        hashes = {"key": sha256(KEY.encode()).hexdigest(), "qa_key": sha256(QA_KEY.encode()).hexdigest()}
        (folder / "policies" / "clients.toml").write_text(POLICY.format(**hashes))
        (folder / "policies" / "routing.toml").write_text(ROUTING)
        try:
            with gateway_process(folder, "--env", "clients") as url:
                yield Served(url, journal, simulator, slow, moody, fixed)
        finally:
            for stop in (simulator.stop, slow.stop, *(runner.cleanup for runner in runners)):
                run(stop())
