"""Every metric, declared once; slots that the hot path fills, and the collector that shows them to Prometheus.

`prometheus_client`'s own counters cost 0.4 to 2 µs each and OpenTelemetry's 8; a call here fills one cell, found by one
look-up, in about a microsecond. Rendering is off the hot path. Labels come from the plan's names only: whatever else a
caller writes becomes `other`, so strangers cannot grow the memory.
"""

import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector, CollectorRegistry

from gateway import __version__
from gateway.decide.breaker import State
from gateway.decide.plan import RAW_AGENT, Plan
from gateway.decide.standing import Standing
from gateway.domain.call import CallRecord
from gateway.domain.errors import CODES
from gateway.domain.money import NUSD_PER_USD

if TYPE_CHECKING:
    from gateway.edge.gen_ai import Operations

OTHER = "other"
_LEVELS = {State.CLOSED: 0.0, State.HALF_OPEN: 1.0, State.OPEN: 2.0}
CALL_LABELS = ("agent", "model", "variant")
# Our own share of a call is far below a millisecond, so its edges are finer than those of the model's latency.
OVERHEAD_EDGES_MS = (0.1, 0.2, 0.3, 0.5, 0.75, 1, 2, 5, 10, 25, 100)


class Kind(StrEnum):
    """Prometheus' kinds of metric."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


class Declared(NamedTuple):
    """A metric as it is documented and rendered. Counters get their `_total` from Prometheus' conventions.

    `unit` is UCUM's: what stands in braces is a note on a plain number, and 1 is a number without any.
    """

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    unit: str = "1"

    @property
    def dotted(self) -> str:
        """Its name over OTLP: `model.latency_ms` for Prometheus' `model_latency_ms`."""
        return self.name if "." in self.name else self.name.replace("_", ".", 1)


REQUESTS = Declared(
    "model_requests", Kind.COUNTER, "Calls that ended, by the model that answered last.", CALL_LABELS, "{call}"
)
ERRORS = Declared(
    "model_errors", Kind.COUNTER, "Calls that ended in an error, by its code.", (*CALL_LABELS, "code"), "{call}"
)
FALLBACKS = Declared(
    "model_fallbacks", Kind.COUNTER, "Calls that a further model of the chain answered.", CALL_LABELS, "{call}"
)
COST = Declared("model_cost_usd", Kind.COUNTER, "Dollars spent.", CALL_LABELS, "{USD}")
TOKENS = Declared(
    "model_tokens", Kind.COUNTER, "Tokens used, by direction.", (*CALL_LABELS, "direction"), unit="{token}"
)
LATENCY = Declared(
    "model_latency_ms", Kind.HISTOGRAM, "From the request's head to the answer's end.", CALL_LABELS, "ms"
)
FIRST_CHUNK = Declared(
    "model_first_chunk_ms", Kind.HISTOGRAM, "Streams: to the first chunk of content.", CALL_LABELS, "ms"
)
FAULTS = Declared(
    "gateway_upstream_faults", Kind.COUNTER, "Attempts that failed, by kind.", ("upstream", "kind"), "{attempt}"
)
RETRIES = Declared(
    "gateway_retries", Kind.COUNTER, "Tries at a model that had just failed.", ("upstream",), "{attempt}"
)
RESUMED = Declared(
    "gateway_streams_resumed", Kind.COUNTER, "Broken streams joined with another's.", ("upstream",), "{stream}"
)
BREAKER = Declared("gateway_breaker_state", Kind.GAUGE, "0 closed, 1 half-open, 2 open.", ("upstream", "model"))
RETRY_BUDGET = Declared(
    "gateway_retry_budget_left", Kind.GAUGE, "Retries that could be made now.", ("upstream",), "{retry}"
)
OVERHEAD = Declared(
    "gateway_overhead_ms", Kind.HISTOGRAM, "The gateway's own share of a call: all but the waiting.", unit="ms"
)
IN_FLIGHT = Declared("gateway_calls_in_flight", Kind.GAUGE, "Calls being served now.", unit="{call}")
REFUSALS = Declared(
    "gateway_refusals", Kind.COUNTER, "Requests refused before any model was asked.", ("code",), "{request}"
)
CONNECTIONS = Declared("gateway_connections", Kind.GAUGE, "Open connections of callers.", unit="{connection}")
EXPORTS = Declared("gateway_otlp_exports", Kind.COUNTER, "Exports over OTLP.", ("result",), "{export}")
RELOADS = Declared("gateway_config_reloads", Kind.COUNTER, "Reloads of the configuration.", ("result",), "{reload}")
RELOAD_OK = Declared("gateway_config_is_current", Kind.GAUGE, "1 while the files on disk are the ones in force.")
SHARE = Declared("gateway_rollout_share", Kind.GAUGE, "Share of users with the fine-tuned model, 0 to 1.", ("agent",))
CAP_LIMIT = Declared("gateway_cap_limit", Kind.GAUGE, "A cap, in its unit; dollars for usd.", ("cap", "unit"))
CAP_POSTED = Declared("gateway_cap_posted", Kind.GAUGE, "Spent in the window, doubt included.", ("cap", "unit"))
CAP_HELD = Declared("gateway_cap_held", Kind.GAUGE, "Held by calls in flight in this process.", ("cap", "unit"))
CAP_IN_DOUBT = Declared("gateway_cap_in_doubt", Kind.GAUGE, "Possibly spent; a part of posted.", ("cap", "unit"))
CROSSED = Declared(
    "gateway_cap_warnings", Kind.COUNTER, "Shares of a cap reached, each once a window.", ("share",), "{warning}"
)
OVERSHOOT = Declared(
    "gateway_cap_overshoot_nusd", Kind.COUNTER, "nUSD that providers billed above a cap.", unit="{nUSD}"
)
DISBELIEVED = Declared(
    "gateway_usage_disbelieved", Kind.COUNTER, "Usages negative or absurd: the hold was booked.", unit="{call}"
)
STOPS = Declared("gateway_spending_stops", Kind.GAUGE, "Kill switches that are thrown.", unit="{switch}")
BEHIND = Declared(
    "gateway_journal_behind_bytes", Kind.GAUGE, "Written to the journal, not yet in the ledger.", unit="By"
)
STORE_OK = Declared("gateway_store_is_up", Kind.GAUGE, "1 while the ledger's store answers.")
STORE_ERRORS = Declared(
    "gateway_store_errors", Kind.COUNTER, "Transactions that the ledger's store refused.", unit="{transaction}"
)
UNLEASED = Declared(
    "gateway_unleased_nusd", Kind.COUNTER, "nUSD admitted without the store, by caps that stay open.", unit="{nUSD}"
)
ALERTS = Declared(
    "gateway_alerts", Kind.COUNTER, "Events told to Slack, by what became of them.", ("result",), "{event}"
)
HOLDERS = Declared(
    "gateway_processes", Kind.GAUGE, "Gateways that share the ledger, this one included.", unit="{process}"
)
HEALTH = Declared("gateway_model_health", Kind.GAUGE, "0 OK, 1 SLOW, 2 ERROR, when last looked at.", ("model",))
RETIRES = Declared("gateway_model_retires_in_days", Kind.GAUGE, "Days until a model is withdrawn.", ("model",), "d")
DRAINING = Declared("gateway_draining", Kind.GAUGE, "1 while the gateway shuts down.")
BUILD = Declared(
    "gateway_build_info", Kind.GAUGE, "Always 1; the labels tell version and environment.", ("version", "environment")
)

METRICS: tuple[Declared, ...] = (
    REQUESTS, ERRORS, FALLBACKS, COST, TOKENS, LATENCY, FIRST_CHUNK, FAULTS, RETRIES, RESUMED, BREAKER,
    RETRY_BUDGET, OVERHEAD, IN_FLIGHT, REFUSALS, CONNECTIONS,
    CAP_LIMIT, CAP_POSTED, CAP_HELD, CAP_IN_DOUBT, CROSSED, OVERSHOOT, DISBELIEVED, STOPS,
    BEHIND, STORE_OK, STORE_ERRORS, UNLEASED, HOLDERS, ALERTS, EXPORTS,
    RELOADS, RELOAD_OK, SHARE, HEALTH, RETIRES, DRAINING, BUILD,
)  # fmt: skip


class Distribution:
    """A histogram: how many fell below each edge, and their sum."""

    __slots__ = ("counts", "edges", "sum")

    def __init__(self, edges: tuple[float, ...]) -> None:
        self.edges = edges
        self.counts = [0] * (len(edges) + 1)
        self.sum = 0.0

    def add(self, value: float) -> None:
        """Count one value, in the unit of the edges. An edge belongs to its own bucket, as in Prometheus."""
        self.counts[bisect_left(self.edges, value)] += 1
        self.sum += value

    @property
    def count(self) -> int:
        """How many values there were."""
        return sum(self.counts)

    def buckets(self) -> list[tuple[str, float]]:
        """Cumulative counts by upper edge, as Prometheus wants them."""
        total = 0
        found = []
        for edge, count in zip((*self.edges, float("inf")), self.counts, strict=True):
            total += count
            found.append(("+Inf" if edge == float("inf") else f"{edge:g}", float(total)))
        return found


# A metric and its values by labels.
Figures = tuple[Declared, Sequence[tuple[tuple[str, ...], float | Distribution]]]


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
        self.errors: dict[str, int] = {}
        self.fallbacks = 0
        self.cost_nusd = 0
        self.input_tokens = 0
        self.output_tokens = 0
        self.latency_ms = Distribution(edges_ms)
        self.first_chunk_ms = Distribution(edges_ms)


class Observer(Collector):
    """Counts what happens; shows it when asked."""

    def __init__(self, plan: Plan, standing: Standing, edges_ms: tuple[float, ...]) -> None:
        self._standing = standing
        self._retries: dict[str, int] = {}
        self._resumed: dict[str, int] = {}
        self.edges_ms = edges_ms
        self._cells: dict[tuple[str, str, str], Cell] = {}
        self._refusals: dict[str, int] = {}
        self._faults: dict[tuple[str, str], int] = {}
        self._reloads = {"ok": 0, "failed": 0}
        self._exports = {"ok": 0, "failed": 0}
        self._overhead_ms = Distribution(OVERHEAD_EDGES_MS)
        self._crossed: dict[str, int] = {}
        self.usage_disbelieved = 0
        self.overshoot_nusd = 0
        self._money: Callable[[], Iterable[Figures]] = tuple
        self._operations: Operations | None = None
        self._health: Callable[[], Iterable[Figures]] = tuple
        self.in_flight = 0
        self.connections = 0
        self.is_current = True
        self.is_draining = False
        self.take_plan(plan)

    def take_plan(self, plan: Plan) -> None:
        """Learn the names that may become labels. Cells of names that are gone stay: counters never go back."""
        self._plan = plan
        targets = [target for agent in plan.agents.values() for target in (*agent.finetuned, *agent.baseline)]
        self._models = frozenset(target.ref for target in targets)
        self._agents = frozenset((*plan.agents, RAW_AGENT))
        if self._operations is not None:
            self._operations.take_plan(plan)

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
        if self._operations is not None:
            self._operations.call_ended(record)

    def refused(self, code: str) -> None:
        """Count a request that no model was asked for. `code` is one of domain/errors.py."""
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

    def first_chunks(self) -> dict[tuple[str, str, str], tuple[int, tuple[int, ...]]]:
        """By (agent, model, variant): how many answers were fallbacks, and how many streams began within each edge."""
        return {labels: (cell.fallbacks, tuple(cell.first_chunk_ms.counts)) for labels, cell in self._cells.items()}

    def take_operations(self, operations: "Operations") -> None:
        """Let these be counted with each call, for somebody who exports them."""
        self._operations = operations

    def exported(self, *, ok: bool) -> None:
        """Count an export over OTLP."""
        self._exports["ok" if ok else "failed"] += 1

    def reloaded(self, *, ok: bool) -> None:
        """Count a reload, and whether the files on disk are in force now."""
        self._reloads["ok" if ok else "failed"] += 1
        self.is_current = ok

    def registry(self) -> CollectorRegistry:
        """A registry that holds this collector and nothing else."""
        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        return registry

    def describe(self) -> Iterable[Metric]:
        """The names, for the registry."""
        return [_family(declared) for declared in METRICS]

    def collect(self) -> Iterator[Metric]:
        """Every metric with its present values, for Prometheus."""
        for declared, rows in self.figures():
            family = _family(declared)
            for labels, value in rows:
                if isinstance(value, Distribution):
                    family.add_metric(labels, buckets=value.buckets(), sum_value=value.sum)
                else:
                    family.add_metric(labels, value)
            yield family

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
        yield LATENCY, [(labels, cell.latency_ms) for labels, cell in cells]
        yield FIRST_CHUNK, [(labels, cell.first_chunk_ms) for labels, cell in cells]

    def _own(self) -> Iterable[Figures]:
        agents = self._plan.agents.items()
        now_s = time.monotonic()
        breakers = [(upstream, ref, breaker.state) for upstream, ref, breaker in self._standing.breakers()]
        share = 1 / 10_000 if self._plan.use_finetuned else 0.0
        return (
            *self._health(),
            (CROSSED, [((share,), count) for share, count in self._crossed.items()]),
            (OVERSHOOT, [((), self.overshoot_nusd)]),
            (DISBELIEVED, [((), self.usage_disbelieved)]),
            (FAULTS, [(labels, count) for labels, count in self._faults.items()]),
            (RETRIES, [((upstream,), count) for upstream, count in self._retries.items()]),
            (RESUMED, [((upstream,), count) for upstream, count in self._resumed.items()]),
            (BREAKER, [((upstream, ref), _LEVELS[state]) for upstream, ref, state in breakers if ref in self._models]),
            (RETRY_BUDGET, [((upstream,), budget.left(now_s)) for upstream, budget in self._standing.budgets()]),
            (REFUSALS, [((code,), count) for code, count in self._refusals.items()]),
            (EXPORTS, [((result,), count) for result, count in self._exports.items()]),
            (RELOADS, [((result,), count) for result, count in self._reloads.items()]),
            (IN_FLIGHT, [((), self.in_flight)]),
            (CONNECTIONS, [((), self.connections)]),
            (RELOAD_OK, [((), float(self.is_current))]),
            (DRAINING, [((), float(self.is_draining))]),
            (SHARE, [((name,), agent.share_bps * share) for name, agent in agents]),
            (BUILD, [((__version__, self._plan.env), 1.0)]),
            (OVERHEAD, [((), self._overhead_ms)]),
        )


def _family(declared: Declared):  # type: ignore[no-untyped-def]
    classes = {Kind.COUNTER: CounterMetricFamily, Kind.GAUGE: GaugeMetricFamily, Kind.HISTOGRAM: HistogramMetricFamily}
    return classes[declared.kind](declared.name, declared.help, labels=declared.labels)
