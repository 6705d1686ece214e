"""Every metric, declared once; slots that the hot path fills, and the collector that shows them to Prometheus.

`prometheus_client`'s own counters cost 0.4 to 2 µs each and OpenTelemetry's 8; a call here fills one cell, found by one
look-up, in about a microsecond. Rendering is off the hot path. Labels come from the plan's names only: whatever else a
caller writes becomes `other`, so strangers cannot grow the memory.
"""

import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from enum import StrEnum
from typing import NamedTuple

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector, CollectorRegistry

from gateway import __version__
from gateway.decide.breaker import State
from gateway.decide.plan import RAW_AGENT, Plan
from gateway.decide.standing import Standing
from gateway.domain.call import CallRecord
from gateway.domain.errors import CODES
from gateway.domain.money import NUSD_PER_USD

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
    """A metric as it is documented and rendered. Counters get their `_total` from Prometheus' conventions."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()


REQUESTS = Declared("model_requests", Kind.COUNTER, "Calls that ended, by the model that answered last.", CALL_LABELS)
ERRORS = Declared("model_errors", Kind.COUNTER, "Calls that ended in an error, by its code.", (*CALL_LABELS, "code"))
FALLBACKS = Declared("model_fallbacks", Kind.COUNTER, "Calls that a further model of the chain answered.", CALL_LABELS)
COST = Declared("model_cost_usd", Kind.COUNTER, "Dollars spent.", CALL_LABELS)
TOKENS = Declared("model_tokens", Kind.COUNTER, "Tokens used, by direction.", (*CALL_LABELS, "direction"))
LATENCY = Declared("model_latency_ms", Kind.HISTOGRAM, "From the request's head to the answer's end.", CALL_LABELS)
FIRST_CHUNK = Declared("model_first_chunk_ms", Kind.HISTOGRAM, "Streams: to the first chunk of content.", CALL_LABELS)
FAULTS = Declared("gateway_upstream_faults", Kind.COUNTER, "Attempts that failed, by kind.", ("upstream", "kind"))
RETRIES = Declared("gateway_retries", Kind.COUNTER, "Tries at a model that had just failed.", ("upstream",))
RESUMED = Declared("gateway_streams_resumed", Kind.COUNTER, "Broken streams joined with another's.", ("upstream",))
BREAKER = Declared("gateway_breaker_state", Kind.GAUGE, "0 closed, 1 half-open, 2 open.", ("upstream", "model"))
RETRY_BUDGET = Declared("gateway_retry_budget_left", Kind.GAUGE, "Retries that could be made now.", ("upstream",))
OVERHEAD = Declared("gateway_overhead_ms", Kind.HISTOGRAM, "The gateway's own share of a call: all but the waiting.")
IN_FLIGHT = Declared("gateway_calls_in_flight", Kind.GAUGE, "Calls being served now.")
REFUSALS = Declared("gateway_refusals", Kind.COUNTER, "Requests refused before any model was asked.", ("code",))
CONNECTIONS = Declared("gateway_connections", Kind.GAUGE, "Open connections of callers.")
RELOADS = Declared("gateway_config_reloads", Kind.COUNTER, "Reloads of the configuration.", ("result",))
RELOAD_OK = Declared("gateway_config_is_current", Kind.GAUGE, "1 while the files on disk are the ones in force.")
SHARE = Declared("gateway_rollout_share", Kind.GAUGE, "Share of users with the fine-tuned model, 0 to 1.", ("agent",))
CAP_LIMIT = Declared("gateway_cap_limit", Kind.GAUGE, "A cap, in its unit; dollars for usd.", ("cap", "unit"))
CAP_POSTED = Declared("gateway_cap_posted", Kind.GAUGE, "Spent in the window, doubt included.", ("cap", "unit"))
CAP_HELD = Declared("gateway_cap_held", Kind.GAUGE, "Held by calls in flight in this process.", ("cap", "unit"))
CAP_IN_DOUBT = Declared("gateway_cap_in_doubt", Kind.GAUGE, "Possibly spent; a part of posted.", ("cap", "unit"))
CROSSED = Declared("gateway_cap_warnings", Kind.COUNTER, "Shares of a cap reached, each once a window.", ("share",))
OVERSHOOT = Declared("gateway_cap_overshoot_nusd", Kind.COUNTER, "nUSD that providers billed above a cap.")
DISBELIEVED = Declared("gateway_usage_disbelieved", Kind.COUNTER, "Usages negative or absurd: the hold was booked.")
STOPS = Declared("gateway_spending_stops", Kind.GAUGE, "Kill switches that are thrown.")
BEHIND = Declared("gateway_journal_behind_bytes", Kind.GAUGE, "Written to the journal, not yet in the ledger.")
STORE_OK = Declared("gateway_store_is_up", Kind.GAUGE, "1 while the ledger's store answers.")
STORE_ERRORS = Declared("gateway_store_errors", Kind.COUNTER, "Transactions that the ledger's store refused.")
UNLEASED = Declared("gateway_unleased_nusd", Kind.COUNTER, "nUSD admitted without the store, by caps that stay open.")
ALERTS = Declared("gateway_alerts", Kind.COUNTER, "Events told to Slack, by what became of them.", ("result",))
HOLDERS = Declared("gateway_processes", Kind.GAUGE, "Gateways that share the ledger, this one included.")
DRAINING = Declared("gateway_draining", Kind.GAUGE, "1 while the gateway shuts down.")
BUILD = Declared(
    "gateway_build_info", Kind.GAUGE, "Always 1; the labels tell version and environment.", ("version", "environment")
)

METRICS: tuple[Declared, ...] = (
    REQUESTS, ERRORS, FALLBACKS, COST, TOKENS, LATENCY, FIRST_CHUNK, FAULTS, RETRIES, RESUMED, BREAKER,
    RETRY_BUDGET, OVERHEAD, IN_FLIGHT, REFUSALS, CONNECTIONS,
    CAP_LIMIT, CAP_POSTED, CAP_HELD, CAP_IN_DOUBT, CROSSED, OVERSHOOT, DISBELIEVED, STOPS,
    BEHIND, STORE_OK, STORE_ERRORS, UNLEASED, HOLDERS, ALERTS,
    RELOADS, RELOAD_OK, SHARE, DRAINING, BUILD,
)  # fmt: skip


# A metric and its values by labels.
Figures = tuple[Declared, list[tuple[tuple[str, ...], float]]]


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

    def buckets(self) -> list[tuple[str, float]]:
        """Cumulative counts by upper edge, as Prometheus wants them."""
        total = 0
        found = []
        for edge, count in zip((*self.edges, float("inf")), self.counts, strict=True):
            total += count
            found.append(("+Inf" if edge == float("inf") else f"{edge:g}", float(total)))
        return found


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
        self._edges_ms = edges_ms
        self._cells: dict[tuple[str, str, str], Cell] = {}
        self._refusals: dict[str, int] = {}
        self._faults: dict[tuple[str, str], int] = {}
        self._reloads = {"ok": 0, "failed": 0}
        self._overhead_ms = Distribution(OVERHEAD_EDGES_MS)
        self._crossed: dict[str, int] = {}
        self.usage_disbelieved = 0
        self.overshoot_nusd = 0
        self._money: Callable[[], Iterable[Figures]] = tuple
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
        """Every metric with its present values."""
        yield from self._collect_calls()
        yield from self._collect_own()

    def _new_cell(self, key: tuple[str, str, str]) -> Cell:
        agent, model, variant = key
        known = (agent if agent in self._agents else OTHER, model if model in self._models else OTHER, variant or OTHER)
        return self._cells.setdefault(known, Cell(self._edges_ms))

    def _collect_calls(self) -> Iterator[Metric]:
        families = {declared: _family(declared) for declared in METRICS if declared.labels[:3] == CALL_LABELS}
        for labels, cell in self._cells.items():
            families[REQUESTS].add_metric(labels, cell.requests)
            for code, count in cell.errors.items():
                families[ERRORS].add_metric((*labels, code), count)
            families[FALLBACKS].add_metric(labels, cell.fallbacks)
            families[COST].add_metric(labels, cell.cost_nusd / NUSD_PER_USD)
            families[TOKENS].add_metric((*labels, "input"), cell.input_tokens)
            families[TOKENS].add_metric((*labels, "output"), cell.output_tokens)
            families[LATENCY].add_metric(labels, buckets=cell.latency_ms.buckets(), sum_value=cell.latency_ms.sum)
            families[FIRST_CHUNK].add_metric(
                labels, buckets=cell.first_chunk_ms.buckets(), sum_value=cell.first_chunk_ms.sum
            )
        yield from families.values()

    def _collect_own(self) -> Iterator[Metric]:
        agents = self._plan.agents.items()
        now_s = time.monotonic()
        breakers = [(upstream, ref, breaker.state) for upstream, ref, breaker in self._standing.breakers()]
        share = 1 / 10_000 if self._plan.use_finetuned else 0.0
        figures: list[Figures] = [
            *self._money(),
            (CROSSED, [((share,), count) for share, count in self._crossed.items()]),
            (OVERSHOOT, [((), self.overshoot_nusd)]),
            (DISBELIEVED, [((), self.usage_disbelieved)]),
            (FAULTS, [(labels, count) for labels, count in self._faults.items()]),
            (RETRIES, [((upstream,), count) for upstream, count in self._retries.items()]),
            (RESUMED, [((upstream,), count) for upstream, count in self._resumed.items()]),
            (BREAKER, [((upstream, ref), _LEVELS[state]) for upstream, ref, state in breakers if ref in self._models]),
            (RETRY_BUDGET, [((upstream,), budget.left(now_s)) for upstream, budget in self._standing.budgets()]),
            (REFUSALS, [((code,), count) for code, count in self._refusals.items()]),
            (RELOADS, [((result,), count) for result, count in self._reloads.items()]),
            (IN_FLIGHT, [((), self.in_flight)]),
            (CONNECTIONS, [((), self.connections)]),
            (RELOAD_OK, [((), float(self.is_current))]),
            (DRAINING, [((), float(self.is_draining))]),
            (SHARE, [((name,), agent.share_bps * share) for name, agent in agents]),
            (BUILD, [((__version__, self._plan.env), 1.0)]),
        ]
        for declared, rows in figures:
            family = _family(declared)
            for labels, value in rows:
                family.add_metric(labels, value)
            yield family
        overhead = _family(OVERHEAD)
        overhead.add_metric((), buckets=self._overhead_ms.buckets(), sum_value=self._overhead_ms.sum)
        yield overhead


def _family(declared: Declared):  # type: ignore[no-untyped-def]
    classes = {Kind.COUNTER: CounterMetricFamily, Kind.GAUGE: GaugeMetricFamily, Kind.HISTOGRAM: HistogramMetricFamily}
    return classes[declared.kind](declared.name, declared.help, labels=declared.labels)
