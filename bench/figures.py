"""From visits to figures: what each column means, and its spread over the rounds. Pure.

Added latency is taken against `direct` of the same round, so that a busy round is compared with itself.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.measure import Visit
from bench.orders import Result
from bench.stats import Spread

DIRECT = "direct"
# Above this share of their core, generator and mock are what limits the throughput, not the subject.
SATURATED = 0.9

# A visit and the visit to `direct` in the same round, if there was one.
Reckon = Callable[[Visit, Visit | None], float | None]


@dataclass(frozen=True)
class Figure:
    key: str
    title: str
    digits: int
    reckon: Reckon


def _result(name: str, of: Callable[[Result], float | None]) -> Reckon:
    def reckon(visit: Visit, _: Visit | None) -> float | None:
        result = visit.results.get(name)
        return of(result) if result is not None else None

    return reckon


def _added(name: str, of: Callable[[Result], float | None]) -> Reckon:
    def reckon(visit: Visit, direct: Visit | None) -> float | None:
        if direct is None or direct is visit:
            return None
        through, without = visit.results.get(name), direct.results.get(name)
        if through is None or without is None:
            return None
        through_ms, without_ms = of(through), of(without)
        return through_ms - without_ms if through_ms is not None and without_ms is not None else None

    return reckon


def _per(us: int, count: int) -> float | None:
    return us / count if count else None


def _memory_mb(visit: Visit, *, after: bool, pss: bool = False) -> float | None:
    memory = visit.memory_after if after else visit.memory_start
    kb = None if memory is None else memory.pss_kb if pss else memory.rss_kb
    return None if kb is None else kb / 1024


FIGURES = (
    Figure("cpu_us_per_request", "CPU-µs/req", 1, _result("plain", lambda r: _per(r.cpu_us, r.completed))),
    Figure("requests_per_s", "req/s", 0, _result("plain", lambda r: r.completed / max(r.seconds, 1e-9))),
    Figure("p50_ms", "p50 ms", 2, _result("plain", lambda r: r.p50_ms)),
    Figure("p99_ms", "p99 ms", 2, _result("plain", lambda r: r.p99_ms)),
    Figure("burst_cpu_us", "64-chunk stream CPU-µs", 0, _result("burst", lambda r: _per(r.cpu_us, r.completed))),
    Figure("paced_cpu_us", "CPU-µs/chunk at 10 ms", 1, _result("paced", lambda r: _per(r.cpu_us, r.chunks))),
    Figure("first_chunk_ms", "+first chunk p50 ms", 2, _added("paced", lambda r: r.first_chunk_p50_ms)),
    Figure("added_p50_50_ms", "+p50 ms at 50/s", 2, _added("open_50", lambda r: r.p50_ms)),
    Figure("added_p99_50_ms", "+p99 ms at 50/s", 2, _added("open_50", lambda r: r.p99_ms)),
    Figure("added_p50_500_ms", "+p50 ms at 500/s", 2, _added("open_500", lambda r: r.p50_ms)),
    Figure("added_p99_500_ms", "+p99 ms at 500/s", 2, _added("open_500", lambda r: r.p99_ms)),
    Figure("rss_start_mb", "RSS start MB", 1, lambda visit, _: _memory_mb(visit, after=False)),
    Figure("rss_after_mb", "RSS after MB", 1, lambda visit, _: _memory_mb(visit, after=True)),
    Figure("pss_after_mb", "PSS after MB", 1, lambda visit, _: _memory_mb(visit, after=True, pss=True)),
    Figure("start_s", "start s", 2, lambda visit, _: visit.start_s),
)


@dataclass(frozen=True)
class Row:
    """One subject's figures. `complaints` are what kept them from being clean; none is the normal case."""

    subject: str
    figures: dict[str, Spread]
    calls: int
    errors: int
    generator_bound: bool
    complaints: list[str]


def rows_of(visits: Sequence[Visit]) -> list[Row]:
    """One row per subject, in the order of their first visit."""
    direct = {visit.round: visit for visit in visits if visit.subject == DIRECT}
    names = list(dict.fromkeys(visit.subject for visit in visits))
    return [_row(name, [visit for visit in visits if visit.subject == name], direct) for name in names]


def _row(subject: str, visits: Sequence[Visit], direct: dict[int, Visit]) -> Row:
    figures: dict[str, Spread] = {}
    for figure in FIGURES:
        values = [figure.reckon(visit, direct.get(visit.round)) for visit in visits]
        spread = Spread.of([value for value in values if value is not None])
        if spread is not None:
            figures[figure.key] = spread
    plain = [visit.results["plain"] for visit in visits if "plain" in visit.results]
    results = [result for visit in visits for result in visit.results.values()]
    return Row(
        subject=subject,
        figures=figures,
        calls=sum(result.completed for result in results),
        errors=sum(result.errors for result in results),
        generator_bound=any(result.generator_busy > SATURATED for result in plain),
        complaints=[text for visit in visits for text in complaints(visit)],
    )


def complaints(visit: Visit) -> list[str]:
    """What went wrong during a visit, as sentences."""
    found = [visit.failure] if visit.failure else []
    for name, result in visit.results.items():
        if result.errors:
            found.append(f"{name}: {result.errors} errors, the first: {result.first_error}")
        if not result.completed:
            found.append(f"{name}: no call completed inside the window")
        if result.queued:
            found.append(f"{name}: {result.queued} calls waited for a free connection")
    asked = sum(result.asked for result in visit.results.values())
    if not visit.failure and asked != visit.upstream_calls:
        found.append(f"{asked} calls asked, {visit.upstream_calls} reached the upstream")
    return [f"round {visit.round + 1}: {text}" for text in found]
