"""Every metric that Prometheus is shown, declared once: name, kind, help, labels, unit. Holds no values.

docs/metrics.md is checked against this list, and so are the alerts and dashboards that name a series.
"""

from enum import StrEnum
from typing import NamedTuple

# The label of what the configuration does not name.
OTHER = "other"
CALL_LABELS = ("agent", "model", "variant")


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
SHADOWS = Declared(
    "gateway_shadow_calls",
    Kind.COUNTER,
    "Shadow calls, by what became of them.",
    ("agent", "variant", "result"),
    "{call}",
)
WAITING = Declared("gateway_calls_waiting", Kind.GAUGE, "Calls that wait for money which others hold.", unit="{call}")
IN_FLIGHT = Declared("gateway_calls_in_flight", Kind.GAUGE, "Calls being served now.", unit="{call}")
REFUSALS = Declared(
    "gateway_refusals", Kind.COUNTER, "Requests refused before any model was asked.", ("code",), "{request}"
)
CONNECTIONS = Declared("gateway_connections", Kind.GAUGE, "Open connections of callers.", unit="{connection}")
EXPORTS = Declared("gateway_otlp_exports", Kind.COUNTER, "Exports over OTLP.", ("signal", "result"), "{export}")
SPANS_DROPPED = Declared(
    "gateway_spans_dropped", Kind.COUNTER, "Spans that no collector will get, by why.", ("reason",), "{span}"
)
RELOADS = Declared("gateway_config_reloads", Kind.COUNTER, "Reloads of the configuration.", ("result",), "{reload}")
RELOAD_OK = Declared(
    "gateway_config_is_current",
    Kind.GAUGE,
    "0 while a reload was refused and the files of before are in force, else 1.",
)
SHARE = Declared("gateway_rollout_share", Kind.GAUGE, "Share of users with the fine-tuned model, 0 to 1.", ("agent",))
PHASE = Declared(
    "gateway_rollout_phase", Kind.GAUGE, "1 for the phase that a rollout is in, 0 for the others.", ("agent", "phase")
)
STAGE = Declared(
    "gateway_rollout_stage", Kind.GAUGE, "Shares that a rollout has had so far, the present one included.", ("agent",)
)
RECOMMENDED = Declared(
    "gateway_rollout_recommendation",
    Kind.GAUGE,
    "1 proceed, 0 hold, -1 roll back: what the evidence says. Shown by the leader only.",
    ("agent",),
)
LEADING = Declared("gateway_pilot_is_leading", Kind.GAUGE, "1 where the rollouts of all processes are looked at.")
FEEDBACK = Declared(
    "gateway_feedback", Kind.COUNTER, "What callers said of calls, by what became of it.", ("result",), "{feedback}"
)
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
    RETRY_BUDGET, OVERHEAD, IN_FLIGHT, REFUSALS, CONNECTIONS, SHADOWS,
    CAP_LIMIT, CAP_POSTED, CAP_HELD, CAP_IN_DOUBT, CROSSED, OVERSHOOT, DISBELIEVED, STOPS,
    BEHIND, STORE_OK, STORE_ERRORS, UNLEASED, WAITING, HOLDERS, ALERTS, EXPORTS, SPANS_DROPPED,
    RELOADS, RELOAD_OK, SHARE, PHASE, STAGE, RECOMMENDED, LEADING, FEEDBACK, HEALTH, RETIRES, DRAINING, BUILD,
)  # fmt: skip
