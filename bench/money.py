"""`python -m bench.money`: what correct money costs a call, in µs, without sockets around it.

On the hot path: reserve and settle in memory under production's three caps, and the journal's two writes. Off it, in
a thread: telling the ledger of the money and of what became of the call. The least of several rounds is told, since
everything that disturbs adds.
"""

import os
import tempfile
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import NamedTuple

import click

from gateway.decide.budget import Books, Hold
from gateway.decide.caps import Rule, rules_of
from gateway.domain.call import Attempt, CallRecord
from gateway.domain.ledger import Amounts, Dimensions, Held, Posted, row_of
from gateway.domain.money import NUSD_PER_USD, Usage
from gateway.domain.outcome import outcome_of
from gateway.domain.policy import Cap
from gateway.domain.reading import Usd
from gateway.store.journal import Journal, claim
from gateway.store.sqlite import SqliteStore
from gateway.store.store import Batch

CAPS = (
    Cap(per="hour", usd=Usd(20 * NUSD_PER_USD)),
    Cap(per="day", usd=Usd(200 * NUSD_PER_USD)),
    Cap(per="total", usd=Usd(30 * NUSD_PER_USD), only={"operation": ["benchmark", "finetune"]}),
)
ON = Dimensions(
    "qa_agent", "", "u" * 32, "inference", "mistral/ft:open-mistral-7b:5010731d:20251031:ecc3829c", "finetuned"
)
BOUND, ACTUAL = Amounts(3_300_000, 1, 4_200), Amounts(240_000, 1, 300)
ROWS_PER_SYNC = 100


class Figure(NamedTuple):
    """What one step costs a call, in µs."""

    step: str
    us: float


def measure(rounds: int, calls: int) -> list[Figure]:
    """Every step's figure."""
    with tempfile.TemporaryDirectory(prefix="bench-money-") as name:
        folder = Path(name)
        return [
            Figure("reserve + settle, three caps", _least(_books(), rounds, calls)),
            Figure("journal: held, then posted + call", _least(_journal(folder), rounds, calls)),
            Figure("off the hot path: telling the ledger", _least(_ledger(folder), rounds, calls, ROWS_PER_SYNC)),
        ]


def _least(step: Callable[[], object], rounds: int, calls: int, calls_per_step: int = 1) -> float:
    times = []
    for _ in range(rounds):
        since_ns = time.perf_counter_ns()
        for _ in range(max(1, calls // calls_per_step)):
            step()
        times.append((time.perf_counter_ns() - since_ns) / max(1, calls // calls_per_step) / calls_per_step / 1000)
    return min(times)


def _rules() -> tuple[Rule, ...]:
    return rules_of(CAPS, "production")


def _books() -> Callable[[], object]:
    books, now_s = Books(_rules()), time.time()
    for account in books.shared_accounts(now_s):
        account.granted = 2**53

    def step() -> None:
        hold = books.reserve(ON, BOUND, is_priced=True, now_s=now_s)
        if not isinstance(hold, Hold):
            raise AssertionError("BUG: there is money for everything here")
        books.settle(hold, ACTUAL)

    return step


def _journal(folder: Path) -> Callable[[], object]:
    claimed = claim(folder / "journal")
    if claimed is None:
        raise AssertionError("BUG: a new journal is locked")
    journal, numbers = Journal(claimed[0], fsync=False), count()

    def step() -> None:
        held, posted, record = call_of(next(numbers))
        journal.append(held)
        journal.append(posted, record)

    return step


def _ledger(folder: Path) -> Callable[[], object]:
    store = SqliteStore(folder / "ledger.db", clock=time.time)
    store.join("bench", _rules())
    numbers = count()

    def batch() -> Batch:
        calls = [call_of(next(numbers)) for _ in range(ROWS_PER_SYNC)]
        outcomes = [outcome for _, _, record in calls if (outcome := outcome_of(record)) is not None]
        return Batch(rows=[row_of(held, posted) for held, posted, _ in calls], outcomes=outcomes)

    return lambda: store.sync(batch())


def call_of(number: int) -> tuple[Held, Posted, CallRecord]:
    call_id, at_ms = f"req-{number:032x}", time.time_ns() // 1_000_000
    held = Held(f"{call_id}.1", at_ms, "production", ON, BOUND)
    attempt = Attempt(ref=ON.model, started_ms=1, duration_ms=812.4, status=200, cost_nusd=ACTUAL.nusd, tokens=300)
    record = CallRecord(
        id=call_id, at_ms=at_ms, env="production", agent=ON.agent, agent_from="model", variant="finetuned",
        variant_from="experiment", bucket=123, share_bps=1000, user=ON.user, model_asked="qa_agent",
        model_sent=ON.model, model_answered=ON.model, attempts=[attempt], status=200, finish_reason="stop",
        usage=Usage(prompt_tokens=100, completion_tokens=200), cost_nusd=ACTUAL.nusd, cost_basis="exact",
        duration_ms=813.1, overhead_ms=0.7,
    )  # fmt: skip
    return held, Posted(held.id, ACTUAL, "exact", 100, 200), record


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--rounds", type=click.IntRange(1, 100), default=7, show_default=True)
@click.option("--calls", type=click.IntRange(ROWS_PER_SYNC, 1_000_000), default=10_000, show_default=True)
def main(rounds: int, calls: int) -> None:
    """Measure what reserving, settling and recording cost a call."""
    figures = measure(rounds, calls)
    for figure in figures:
        click.echo(f"{figure.step:<38} {figure.us:6.1f} µs")
    click.echo(f"{'on the hot path, in all':<38} {sum(figure.us for figure in figures[:2]):6.1f} µs")
    click.echo(f"(the making of the events is in it; {os.cpu_count()} cores, least of {rounds} rounds)")


if __name__ == "__main__":
    main()
