"""What is counted: slots that the hot path fills, and the figures that exporters make of them.

`prometheus_client`'s own counters cost 0.4 to 2 µs each and OpenTelemetry's 8; a call here fills one cell, found by one
look-up, in about a microsecond. Rendering is exposition's and otlp's. Labels come from the plan's names only: whatever
else a caller writes becomes `other`, so strangers cannot grow the memory. What an alert or a rate is made of stands at
0 before it happens: a series that begins at 7 has not grown, for Prometheus, and a first burst would not be seen.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from gateway import __version__
from gateway.decide.breaker import State
from gateway.decide.health import arms_in_use
from gateway.decide.plan import RAW_AGENT, Plan
from gateway.decide.standing import Standing
from gateway.domain.call import CallRecord
from gateway.domain.errors import CODES, FaultKind
from gateway.domain.money import NUSD_PER_USD
from gateway.telemetry.distribution import Distribution, Exemplar, Figures
from gateway.telemetry.metrics import (
    BREAKER,
    BUILD,
    CONNECTIONS,
    COST,
    CROSSED,
    DISBELIEVED,
    DRAINING,
    ERRORS,
    EXPORTS,
    FALLBACKS,
    FAULTS,
    FEEDBACK,
    FIRST_CHUNK,
    IN_FLIGHT,
    LATENCY,
    OTHER,
    OVERHEAD,
    OVERSHOOT,
    REFUSALS,
    RELOAD_OK,
    RELOADS,
    REQUESTS,
    RESUMED,
    RETRIES,
    RETRY_BUDGET,
    SHADOWS,
    SHARE,
    SPANS_DROPPED,
    TOKENS,
)  # fmt: skip

if TYPE_CHECKING:
    from gateway.telemetry.gen_ai import Operations

_LEVELS = {State.CLOSED: 0.0, State.HALF_OPEN: 1.0, State.OPEN: 2.0}
# Our own share of a call is far below a millisecond, so its edges are finer than those of the model's latency.
OVERHEAD_EDGES_MS = (0.1, 0.2, 0.3, 0.5, 0.75, 1, 2, 5, 10, 25, 100)
# The refusals that prometheus/rules.yml counts, and the errors that are a provider's doing.
COUNTED_REFUSALS = (
    "budget_exceeded", "budget_reserved", "budget_unavailable", "model_not_priced", "journal_unavailable",
)  # fmt: skip
PROVIDER_ERRORS = tuple(code for code in CODES if code.startswith("upstream_"))


class Cell:
    """All that is counted for one (agent, model, variant)."""

    __slots__ = (
        "cost_nusd",
        "errors",
        "fallbacks",
        "first_chunk_ms",
        "input_tokens",
        "latency_ms",
        "output_tokens",
        "requests",
    )

    def __init__(self, edges_ms: tuple[float, ...]) -> None:
        self.requests = 0
        self.errors = dict.fromkeys(PROVIDER_ERRORS, 0)
        self.fallbacks = 0
        self.cost_nusd = 0
        self.input_tokens = 0
        self.output_tokens = 0
        self.latency_ms = Distribution(edges_ms)
        self.first_chunk_ms = Distribution(edges_ms)


class Observer:
    """Counts what happens; tells it when asked."""

    def __init__(self, plan: Plan, standing: Standing, edges_ms: tuple[float, ...]) -> None:
        self._standing = standing
        self._retries: dict[str, int] = {}
        self._resumed: dict[str, int] = {}
        self.edges_ms = edges_ms
        self._cells: dict[tuple[str, str, str], Cell] = {}
        self._refusals = dict.fromkeys(COUNTED_REFUSALS, 0)
        self._faults: dict[tuple[str, str], int] = {}
        self._reloads = {"ok": 0, "failed": 0}
        self._exports: dict[tuple[str, str], int] = {}
        self._spans_dropped: dict[str, int] = {}
        self._overhead_ms = Distribution(OVERHEAD_EDGES_MS)
        self._crossed: dict[str, int] = {}
        self._shadows: dict[tuple[str, str, str], int] = {}
        self.usage_disbelieved = 0
        self.overshoot_nusd = 0
        self._money: Callable[[], Iterable[Figures]] = tuple
        self.operations: Operations | None = None
        self._health: Callable[[], Iterable[Figures]] = tuple
        self._rollouts: Callable[[], Iterable[Figures]] = tuple
        # A rate wants a zero to begin with.
        self._feedback = {"kept": 0, "refused": 0}
        self.in_flight = 0
        self.connections = 0
        self.is_current = True
        self.is_draining = False
        self.take_plan(plan)

    def take_plan(self, plan: Plan) -> None:
        """Learn the names that may become labels. Cells of names that are gone stay: counters never go back."""
        self.plan = plan
        targets = [target for agent in plan.agents.values() for target in (*agent.finetuned, *agent.baseline)]
        self._models = frozenset(target.ref for target in targets)
        self._agents = frozenset((*plan.agents, RAW_AGENT))
        for key in _arms(plan):
            if key not in self._cells:
                self._cells[key] = Cell(self.edges_ms)
        for upstream in {target.upstream for target in targets}:
            for kind in FaultKind:
                self._faults.setdefault((upstream, kind), 0)
        for share in {share for rule in plan.rules for share in rule.warn_at}:
            self._crossed.setdefault(f"{share:g}", 0)
        if self.operations is not None:
            self.operations.take_plan(plan)

    def call_ended(self, record: CallRecord) -> None:
        """Count a call that got as far as a model."""
        key = (record.agent, record.model_sent, record.variant or "")
        cell = self._cells.get(key)
        if cell is None:
            cell = self._new_cell(key)
        cell.requests += 1
        if record.error:
            # A provider's own codes are its to choose, so they are one label here; the journal has them in full.
            code = record.error if record.error in CODES else "upstream_error"
            cell.errors[code] = cell.errors.get(code, 0) + 1
        if record.is_fallback:
            cell.fallbacks += 1
        cell.cost_nusd += record.cost_nusd
        if record.usage is not None:
            cell.input_tokens += record.usage.prompt_tokens
            cell.output_tokens += record.usage.completion_tokens
        cell.latency_ms.add(record.duration_ms)
        if record.first_chunk_ms is not None:
            cell.first_chunk_ms.add(record.first_chunk_ms)
        self._overhead_ms.add(record.overhead_ms)
        if self.operations is not None:
            self.operations.call_ended(record)
        if record.span_id:
            _exemplify(cell, record)

    def refused(self, code: str) -> None:
        """Count a request that no model was asked for. `code` is one of domain/errors.py; empty: its caller left."""
        if code:
            self._refusals[code] = self._refusals.get(code, 0) + 1

    def fault(self, upstream: str, kind: str) -> None:
        """Count an attempt that failed."""
        self._faults[upstream, kind] = self._faults.get((upstream, kind), 0) + 1

    def retried(self, upstream: str) -> None:
        """Count a retry at the same model."""
        self._retries[upstream] = self._retries.get(upstream, 0) + 1

    def resumed(self, upstream: str) -> None:
        """Count a stream that was taken up where another had broken off, by who took it up."""
        self._resumed[upstream] = self._resumed.get(upstream, 0) + 1

    def shadowed(self, agent: str, variant: str, result: str) -> None:
        """Count a shadow call by what became of it. `variant` is its own, `agent` one that the plan knows."""
        labels = (agent, variant, result)
        self._shadows[labels] = self._shadows.get(labels, 0) + 1

    def crossed(self, share: float) -> None:
        """Count a cap that came to a share of its limit."""
        label = f"{share:g}"
        self._crossed[label] = self._crossed.get(label, 0) + 1

    def take_money(self, figures: Callable[[], Iterable[Figures]]) -> None:
        """Where the figures of the caps and their store are to be asked for, each time somebody looks."""
        self._money = figures

    def take_health(self, figures: Callable[[], Iterable[Figures]]) -> None:
        """Where the figures of the models' health are to be asked for, likewise."""
        self._health = figures

    def take_rollouts(self, figures: Callable[[], Iterable[Figures]]) -> None:
        """Where the figures of the rollouts are to be asked for, likewise."""
        self._rollouts = figures

    def feedback(self, *, ok: bool) -> None:
        """Count what a caller said of a call."""
        self._feedback["kept" if ok else "refused"] += 1

    def first_chunks(self) -> dict[tuple[str, str, str], tuple[int, tuple[int, ...]]]:
        """By (agent, model, variant): how many answers were fallbacks, and how many streams began within each edge."""
        return {labels: (cell.fallbacks, tuple(cell.first_chunk_ms.counts)) for labels, cell in self._cells.items()}

    def take_operations(self, operations: "Operations") -> None:
        """Let these be counted with each call, for somebody who exports them."""
        self.operations = operations

    def exports(self, signal: str) -> None:
        """Show from now on how exports of `metrics` or `traces` go: a rate wants a zero to begin with."""
        self._exports |= {(signal, "ok"): 0, (signal, "failed"): 0}
        if signal == "traces":
            self._spans_dropped |= {"queue_full": 0, "not_taken": 0}

    def exported(self, signal: str, *, ok: bool) -> None:
        """Count an export over OTLP."""
        labels = (signal, "ok" if ok else "failed")
        self._exports[labels] = self._exports.get(labels, 0) + 1

    def spans_dropped(self, count: int, reason: str) -> None:
        """Count spans that are lost."""
        self._spans_dropped[reason] = self._spans_dropped.get(reason, 0) + count

    def reloaded(self, *, ok: bool) -> None:
        """Count a reload, and whether the files on disk are in force now."""
        self._reloads["ok" if ok else "failed"] += 1
        self.is_current = ok

    def figures(self) -> Iterator[Figures]:
        """Every metric with its present values: what all exporters show."""
        yield from self._of_calls()
        yield from self._money()
        yield from self._own()

    def _new_cell(self, key: tuple[str, str, str]) -> Cell:
        agent, model, variant = key
        known = (agent if agent in self._agents else OTHER, model if model in self._models else OTHER, variant or OTHER)
        return self._cells.setdefault(known, Cell(self.edges_ms))

    def _of_calls(self) -> Iterator[Figures]:
        cells = self._cells.items()
        yield REQUESTS, [(labels, cell.requests) for labels, cell in cells]
        yield ERRORS, [((*labels, code), count) for labels, cell in cells for code, count in cell.errors.items()]
        yield FALLBACKS, [(labels, cell.fallbacks) for labels, cell in cells]
        yield COST, [(labels, cell.cost_nusd / NUSD_PER_USD) for labels, cell in cells]
        tokens = [(labels, (("input", cell.input_tokens), ("output", cell.output_tokens))) for labels, cell in cells]
        yield TOKENS, [((*labels, direction), count) for labels, both in tokens for direction, count in both]
        # Histograms are most of a scrape, and those of models that were never asked would be most of them.
        yield LATENCY, [(labels, cell.latency_ms) for labels, cell in cells if cell.requests]
        yield FIRST_CHUNK, [(labels, cell.first_chunk_ms) for labels, cell in cells if cell.requests]

    def _own(self) -> Iterable[Figures]:
        agents = self.plan.agents.items()
        now_s = time.monotonic()
        breakers = [(upstream, ref, breaker.state) for upstream, ref, breaker in self._standing.breakers()]
        use_finetuned = self.plan.use_finetuned
        return (
            *self._health(),
            *self._rollouts(),
            (FEEDBACK, [((result,), count) for result, count in self._feedback.items()]),
            (CROSSED, [((share,), count) for share, count in self._crossed.items()]),
            (OVERSHOOT, [((), self.overshoot_nusd)]),
            (DISBELIEVED, [((), self.usage_disbelieved)]),
            (FAULTS, [(labels, count) for labels, count in self._faults.items()]),
            (RETRIES, [((upstream,), count) for upstream, count in self._retries.items()]),
            (RESUMED, [((upstream,), count) for upstream, count in self._resumed.items()]),
            (BREAKER, [((upstream, ref), _LEVELS[state]) for upstream, ref, state in breakers if ref in self._models]),
            (RETRY_BUDGET, [((upstream,), budget.left(now_s)) for upstream, budget in self._standing.budgets()]),
            (SHADOWS, [(labels, count) for labels, count in self._shadows.items()]),
            (REFUSALS, [((code,), count) for code, count in self._refusals.items()]),
            (EXPORTS, [(labels, count) for labels, count in self._exports.items()]),
            (SPANS_DROPPED, [((reason,), count) for reason, count in self._spans_dropped.items()]),
            (RELOADS, [((result,), count) for result, count in self._reloads.items()]),
            (IN_FLIGHT, [((), self.in_flight)]),
            (CONNECTIONS, [((), self.connections)]),
            (RELOAD_OK, [((), float(self.is_current))]),
            (DRAINING, [((), float(self.is_draining))]),
            (SHARE, [((name,), agent.share_bps / 10_000 if use_finetuned else 0.0) for name, agent in agents]),
            (BUILD, [((__version__, self.plan.env), 1.0)]),
            (OVERHEAD, [((), self._overhead_ms)]),
        )


def _arms(plan: Plan) -> Iterator[tuple[str, str, str]]:
    """Agent, model and variant of all that callers may get now."""
    for name, agent in plan.agents.items():
        in_use = arms_in_use(plan, agent)
        for variant, chain in (("finetuned", agent.finetuned), ("baseline", agent.baseline)):
            if chain in in_use:
                yield from ((name, target.ref, variant) for target in chain)


def _exemplify(cell: Cell, record: CallRecord) -> None:
    """Leave a sampled call's span where its values were counted."""
    ids = record.trace_id, record.span_id
    cell.latency_ms.exemplify(Exemplar(*ids, record.duration_ms, record.at_ms + record.duration_ms))
    if record.first_chunk_ms is not None:
        cell.first_chunk_ms.exemplify(Exemplar(*ids, record.first_chunk_ms, record.at_ms + record.first_chunk_ms))
