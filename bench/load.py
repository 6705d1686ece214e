"""The load generator: a process that asks over keep-alive connections, checks every answer and times it.

Not a general client. Its invariant: a call counts as completed only if status, framing and body are right;
anything else is an error that the result names. Orders come as JSON lines on standard input, results leave on
standard output, and the process ends with its standard input.
"""

import asyncio
import gc
import sys
import time
from collections import deque
from typing import cast

import msgspec
import uvloop

from bench import proc, wire
from bench.orders import Order, Result
from bench.stats import quantile

DRAIN_S = 4.0
DRAIN_STEP_S = 0.005
CONNECT_S = 5.0
# A subject that closes after every answer would otherwise be redialled for ever.
MAX_ERRORS = 2_000


class Connection(asyncio.Protocol):
    """One keep-alive connection, one call at a time."""

    def __init__(self, run: "Run") -> None:
        self.run = run
        self.busy = False
        self.since = 0.0
        self.has_begun = False
        self.got = b""
        self.body_start = 0
        self.need: int | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # A cast, because uvloop's transports do not inherit asyncio's.
        self.transport = cast(asyncio.Transport, transport)

    def ask(self, request: bytes, since: float) -> None:
        self.busy, self.has_begun, self.since, self.got, self.need = True, False, since, b"", None
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        if not self.busy:
            self.give_up(f"bytes nobody asked for: {data[:60]!r}")
            return
        if self.run.order.stream:
            self.run.chunks += data.count(b"data: {")
            # The first event and not the first byte: some send the head ahead, some with it.
            if not self.has_begun and b"data:" in data:
                self.has_begun = True
                self.run.began(time.perf_counter() - self.since)
        self.got = self.got + data if self.got else data
        if self.need is None and not self.head_is_read():
            return
        if self.need == wire.CHUNKED_BODY:
            if self.got.endswith(wire.LAST_CHUNK):
                self.finish()
        elif self.need is not None and len(self.got) >= self.need:
            self.finish()

    def head_is_read(self) -> bool:
        head_end = self.got.find(b"\r\n\r\n")
        if head_end < 0:
            return False
        self.body_start = head_end + 4
        length = wire.body_length(self.got, head_end)
        if length == wire.UNFRAMED_BODY:
            self.give_up(f"an answer without length: {self.got[:80]!r}")
            return False
        self.need = length if length == wire.CHUNKED_BODY else self.body_start + length
        return True

    def finish(self) -> None:
        self.busy = False
        now = time.perf_counter()
        if fault := self.fault():
            self.run.failed(fault)
        else:
            self.run.completed(now - self.since)
        self.run.free(self, now)

    def fault(self) -> str:
        """Why the finished answer is not the one the mock gave; empty if it is."""
        if self.got[9:12] != b"200":
            return f"{self.got[:15].decode(errors='replace')}: {self.got[self.body_start :][:160]!r}"
        body = self.got[self.body_start :]
        if self.need == wire.CHUNKED_BODY:
            try:
                body = wire.unchunk(body)
            except ValueError as error:
                return f"broken chunks: {error}"
        whole = wire.is_whole_stream(body) if self.run.order.stream else wire.is_whole_answer(body)
        return "" if whole else f"not the whole answer: ...{body[-160:]!r}"

    def give_up(self, why: str) -> None:
        self.busy = False
        self.run.failed(why)
        self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        if self.busy:
            self.busy = False
            self.run.failed(f"connection lost after {len(self.got)} bytes: {exc or 'closed'}")
        self.run.lost(self)


class Run:
    """One order carried out: connect, warm up, measure a window, drain."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self.loop = asyncio.get_running_loop()
        self.requests = [
            wire.request(wire.question(user, model=order.model, stream=order.stream), port=order.port, path=order.path)
            for user in range(wire.USERS)
        ]
        self.asked = 0
        self.connections: set[Connection] = set()
        self.idle: deque[Connection] = deque()
        self.arrivals: deque[float] = deque()
        self.redials: set[asyncio.Task[Connection]] = set()
        self.asking = True
        self.enough = asyncio.Event()
        self.clear()

    def clear(self) -> None:
        self.latencies: list[float] = []
        self.first_chunks: list[float] = []
        self.chunks = self.errors = self.queued = 0
        self.first_error = ""

    # What connections report.

    def began(self, latency: float) -> None:
        self.first_chunks.append(latency)

    def completed(self, latency: float) -> None:
        self.latencies.append(latency)
        if self.order.requests and len(self.latencies) >= self.order.requests:
            self.enough.set()

    def failed(self, why: str) -> None:
        self.errors += 1
        self.first_error = self.first_error or why
        if self.errors >= MAX_ERRORS:
            self.enough.set()
            self.asking = False

    def free(self, connection: Connection, now: float) -> None:
        """An answer has come: ask again (closed loop), or serve whoever waits longest (open loop)."""
        if self.order.rate_per_s:
            if self.arrivals:
                self.ask(connection, self.arrivals.popleft())
            else:
                self.idle.append(connection)
        elif self.asking:
            self.ask(connection, now)

    def lost(self, connection: Connection) -> None:
        self.connections.discard(connection)
        if connection in self.idle:
            self.idle.remove(connection)
        if self.asking:
            redial = self.loop.create_task(self.connect())
            self.redials.add(redial)
            redial.add_done_callback(self.redialled)

    def redialled(self, redial: "asyncio.Task[Connection]") -> None:
        self.redials.discard(redial)
        if redial.cancelled():
            return
        if error := redial.exception():
            self.failed(f"cannot connect again: {error}")
        else:
            self.free(redial.result(), time.perf_counter())

    def ask(self, connection: Connection, since: float) -> None:
        if connection.transport.is_closing():
            # Its connection_lost is on the way and redials.
            self.failed("connection closed while idle")
            return
        request = self.requests[self.asked % wire.USERS]
        self.asked += 1
        connection.ask(request, since)

    # The run itself.

    async def connect(self) -> Connection:
        _, connection = await asyncio.wait_for(
            self.loop.create_connection(lambda: Connection(self), wire.HOST, self.order.port), CONNECT_S
        )
        self.connections.add(connection)
        return connection

    async def start(self) -> None:
        """All connect first; then the closed loop's first calls are made, spread as the order says."""
        connections = [await self.connect() for _ in range(self.order.connections)]
        began = time.perf_counter()
        for position, connection in enumerate(connections):
            if self.order.rate_per_s:
                self.idle.append(connection)
                continue
            if self.order.spread_s:
                due = began + self.order.spread_s * position / len(connections)
                await asyncio.sleep(due - time.perf_counter())
            self.ask(connection, time.perf_counter())
        if self.order.rate_per_s:
            self.arrive(time.perf_counter(), 0)

    def arrive(self, start: float, count: int) -> None:
        """Open loop: calls arrive at their own pace, whether or not the last one was answered.

        A call's time runs from when this timer fired: the event loop's timers are a millisecond coarse, and
        that is the generator's own lateness, not the subject's. Waiting for a free connection is counted.
        """
        if not self.asking:
            return
        now = time.perf_counter()
        while start + count / self.order.rate_per_s <= now:
            count += 1
            if self.idle:
                self.ask(self.idle.popleft(), now)
            else:
                self.queued += 1
                self.arrivals.append(now)
        due_in_s = start + count / self.order.rate_per_s - time.perf_counter()
        self.loop.call_later(max(due_in_s, 0), self.arrive, start, count)

    async def wait(self, seconds: float) -> None:
        try:
            await asyncio.wait_for(self.enough.wait(), seconds)
        except TimeoutError:
            return

    async def go(self) -> Result:
        order = self.order
        await self.start()
        if order.warm_s:
            await asyncio.sleep(order.warm_s)
        self.clear()
        cpu_before, own_before = proc.cpu_us(order.subject_pid), self.own_cpu_us()
        started = time.perf_counter()
        await self.wait(order.window_s)
        seconds = time.perf_counter() - started
        cpu_us, own_us = proc.cpu_us(order.subject_pid) - cpu_before, self.own_cpu_us() - own_before
        self.asking = False
        latencies, first_chunks, chunks = sorted(self.latencies), sorted(self.first_chunks), self.chunks
        await self.drain()
        return Result(
            completed=len(latencies),
            chunks=chunks,
            errors=self.errors,
            first_error=self.first_error,
            seconds=seconds,
            cpu_us=cpu_us,
            p50_ms=_ms(latencies, 0.50),
            p99_ms=_ms(latencies, 0.99),
            first_chunk_p50_ms=_ms(first_chunks, 0.50),
            generator_busy=own_us / 1e6 / seconds,
            queued=self.queued,
            asked=self.asked,
        )

    def own_cpu_us(self) -> int:
        return int(time.process_time() * 1e6) + proc.cpu_us(self.order.mock_pid)

    async def drain(self) -> None:
        """Calls in flight may end, so that no subject sees them cut; one that does not end is an error."""
        self.arrivals.clear()
        for _ in range(round(DRAIN_S / DRAIN_STEP_S)):
            if not any(connection.busy for connection in self.connections):
                break
            await asyncio.sleep(DRAIN_STEP_S)
        for redial in list(self.redials):
            redial.cancel()
        for connection in list(self.connections):
            if connection.busy:
                connection.give_up(f"no end within {DRAIN_S:g} s after the window")
            connection.transport.abort()


def _ms(rising: list[float], q: float) -> float | None:
    return quantile(rising, q) * 1_000 if rising else None


async def carry_out(order: Order) -> Result:
    run = Run(order)
    try:
        return await run.go()
    except OSError as error:
        run.asking = False
        await run.drain()
        return Result(
            completed=0,
            chunks=0,
            errors=1,
            first_error=f"cannot connect to the subject: {error!r}",
            seconds=0.0,
            cpu_us=0,
            p50_ms=None,
            p99_ms=None,
            first_chunk_p50_ms=None,
            generator_busy=0.0,
            queued=0,
            asked=run.asked,
        )


def main() -> None:
    gc.freeze()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        for line in sys.stdin.buffer:
            result = runner.run(carry_out(msgspec.json.decode(line, type=Order)))
            sys.stdout.buffer.write(msgspec.json.encode(result) + b"\n")
            sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
