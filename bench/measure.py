"""The conductor: rounds of every subject in turn, every measure on each, nothing left running afterwards.

It reckons nothing: figures.py turns what it brings home into figures. Subjects are interleaved (A B C, then
B C A, ...) so that a machine that slows down for a while slows down for all of them.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from bench import proc, wire
from bench.orders import Order, Result
from bench.processes import Cores, Load, Mock, Process
from bench.subjects import Running, Subject, running


@dataclass(frozen=True)
class Measure:
    """One shape of load. `connections` 0: as many as the run was told."""

    name: str
    what: str
    agent: str = wire.FAST_AGENT
    stream: bool = False
    connections: int = 0
    rate_per_s: int = 0
    # In units of the run's window: at a low rate a p99 needs a longer look.
    windows: float = 1.0
    spread_s: float = 0.0


MEASURES = (
    Measure("plain", "plain answers, closed loop"),
    Measure("burst", "64-chunk streams back to back, closed loop", stream=True),
    # Spread over a stream's length and one spacing: neither the starts nor the chunks of the streams march in step.
    Measure(
        "paced",
        "64 streams, a chunk every 10 ms",
        wire.PACED_AGENT,
        stream=True,
        connections=64,
        spread_s=(wire.STREAM_CHUNKS + 1) * wire.SPACING_S,
    ),
    Measure("open_50", "plain answers at 50/s", connections=16, rate_per_s=50, windows=1.5),
    Measure("open_500", "plain answers at 500/s", connections=64, rate_per_s=500, windows=1.5),
)


@dataclass(frozen=True)
class Settings:
    rounds: int = 3
    window_s: float = 2.0
    warm_s: float = 0.5
    connections: int = 32
    # 0: no limit but the window's end.
    requests: int = 0


@dataclass
class Visit:
    """One subject in one round. `failure` says why it brought home less than everything."""

    subject: str
    round: int
    start_s: float | None = None
    memory_start: proc.Memory | None = None
    memory_after: proc.Memory | None = None
    results: dict[str, Result] = field(default_factory=dict)
    upstream_calls: int = 0
    failure: str = ""


Tell = Callable[[str], None]


def expected_s(settings: Settings, subjects: int) -> float:
    """How long a run should take; the caller's alarm clock is set by it."""
    each = sum(one.windows * settings.window_s + settings.warm_s + one.spread_s + 0.2 for one in MEASURES) + 1.5
    return settings.rounds * subjects * each


@contextmanager
def stopping(process: Process) -> Iterator[None]:
    try:
        yield
    finally:
        process.stop()


def measure(subjects: list[Subject], settings: Settings, cores: Cores, tell: Tell) -> list[Visit]:
    """All visits, in the order they were paid. `tell` is called before each measure."""
    visits: list[Visit] = []
    with tempfile.TemporaryDirectory(prefix="gateway-bench-") as name:
        directory = Path(name)
        mock = Mock(core=cores.load, log=directory / "mock.log")
        with stopping(mock):
            load = Load(core=cores.load, log=directory / "load.log")
            with stopping(load):
                for round_number in range(settings.rounds):
                    turn = round_number % len(subjects)
                    for subject in subjects[turn:] + subjects[:turn]:
                        visit = Visit(subject.name, round_number)
                        visits.append(visit)
                        own = directory / f"{subject.name}-{round_number}"
                        own.mkdir()
                        pay(visit, subject, settings, own, mock, load, cores, tell)
    return visits


def pay(
    visit: Visit,
    subject: Subject,
    settings: Settings,
    directory: Path,
    mock: Mock,
    load: Load,
    cores: Cores,
    tell: Tell,
) -> None:
    """One visit. A subject that does not start or dies is a finding, not the end of the run."""
    try:
        with running(subject, mock, directory, cores.subject) as at:
            visit.start_s = at.start_s
            visit.memory_start = proc.memory(at.pid)
            before = sum_calls(mock)
            for one in MEASURES:
                tell(f"round {visit.round + 1}: {subject.name}, {one.what}")
                visit.results[one.name] = load.run(order_for(one, settings, at, mock))
            visit.upstream_calls = sum_calls(mock) - before
            visit.memory_after = proc.memory(at.pid)
    except (TimeoutError, RuntimeError, OSError) as error:
        visit.failure = f"{type(error).__name__}: {error}"
        if load.child.poll() is not None or mock.child.poll() is not None:
            raise


def sum_calls(mock: Mock) -> int:
    counts = mock.counts()
    return counts["plain"] + counts["streams"]


def order_for(one: Measure, settings: Settings, at: Running, mock: Mock) -> Order:
    return Order(
        port=at.port,
        path=wire.CHAT_PATH,
        model=one.agent,
        stream=one.stream,
        connections=one.connections or settings.connections,
        warm_s=settings.warm_s,
        window_s=settings.window_s * one.windows,
        requests=0 if one.rate_per_s else settings.requests,
        rate_per_s=one.rate_per_s,
        spread_s=one.spread_s,
        subject_pid=at.pid,
        mock_pid=mock.pid,
    )
