"""Figures as MetricsData, read back through the exporter's own encoding; and that no stranger makes them grow."""

import random
from pathlib import Path

import pytest
from opentelemetry.exporter.otlp.proto.common.metrics_encoder import encode_metrics
from opentelemetry.proto.metrics.v1.metrics_pb2 import AggregationTemporality
from prometheus_client import generate_latest

from gateway import __version__
from gateway.decide.standing import Standing
from gateway.domain.call import Attempt, CallRecord
from gateway.domain.errors import CODES, FaultKind
from gateway.domain.money import Usage
from gateway.domain.policy import Breakers, Retries
from gateway.telemetry.distribution import Distribution, Figures
from gateway.telemetry.exposition import Snapshot
from gateway.telemetry.gen_ai import Operations
from gateway.telemetry.metrics import METRICS, Declared, Kind
from gateway.telemetry.observe import PROVIDER_ERRORS, Observer
from gateway.telemetry.otlp_metrics import metrics_data, resource_of
from tests.collector import Export
from tests.planning import plan_of

DOCS = Path(__file__).parents[2] / "docs" / "metrics.md"
COUNTED = Declared("gateway_things", Kind.COUNTER, "Things.", ("kind",), "{thing}")
MEASURED = Declared("gateway_level_now", Kind.GAUGE, "A level.")
TIMED = Declared("model_wait_ms", Kind.HISTOGRAM, "A wait.", ("model", "error.type"), "ms")


def encoded(*figures: Figures, env: str = "dev") -> Export:
    data = metrics_data(resource_of(env), figures, began_ns=1_000, now_ns=2_000)
    return Export(encode_metrics(data).SerializeToString())


def test_a_counter_is_a_cumulative_sum_since_the_start() -> None:
    export = encoded((COUNTED, [(("a",), 3), (("b",), 0.5)]))
    metric = export.metrics["gateway.things"]
    assert (metric.description, metric.unit) == ("Things.", "{thing}")
    assert metric.sum.is_monotonic
    assert metric.sum.aggregation_temporality == AggregationTemporality.AGGREGATION_TEMPORALITY_CUMULATIVE
    point = export.points("gateway.things")[(("kind", "a"),)]
    assert (point.start_time_unix_nano, point.time_unix_nano, point.as_int) == (1_000, 2_000, 3)
    assert export.total("gateway.things") == 3.5


def test_a_gauge_is_a_gauge() -> None:
    export = encoded((MEASURED, [((), 0.25)]))
    assert export.metrics["gateway.level_now"].WhichOneof("data") == "gauge"
    assert export.total("gateway.level_now") == 0.25


def test_a_histogram_keeps_its_own_edges_and_claims_no_extremes() -> None:
    waits = Distribution((1, 10))
    for value in (1, 2, 10, 11, 500):
        waits.add(value)
    point = encoded((TIMED, [(("m", ""), waits)])).points("model.wait_ms")[(("model", "m"),)]
    assert list(point.explicit_bounds) == [1, 10]
    assert list(point.bucket_counts) == [1, 2, 2]
    assert (point.count, point.sum) == (5, 524)
    assert not point.HasField("min")
    assert not point.HasField("max")


def test_an_empty_label_is_no_attribute_and_a_metric_without_values_is_not_sent() -> None:
    export = encoded((TIMED, [(("m", ""), Distribution((1,)))]), (COUNTED, []))
    assert export.series == {("model.wait_ms", (("model", "m"),))}


def test_what_is_made_does_not_change_when_more_is_counted() -> None:
    waits = Distribution((1, 10))
    data = metrics_data(resource_of("dev"), [(TIMED, [(("m", ""), waits)])], began_ns=1, now_ns=2)
    waits.add(5)
    assert Export(encode_metrics(data).SerializeToString()).total("model.wait_ms") == 0


def test_we_say_who_we_are() -> None:
    first, second = encoded(env="staging"), encoded(env="staging")
    assert first.resource.pop("service.instance.id") != second.resource.pop("service.instance.id")
    assert first.resource.items() >= {
        ("service.name", "genesis-gateway"),
        ("service.version", __version__),
        ("deployment.environment.name", "staging"),
        ("telemetry.sdk.name", "opentelemetry"),
    }
    assert first.scope == ("gateway", __version__)


def test_the_standard_variables_have_the_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "service.name=x,deployment.environment.name=eu,team=legal%20one")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "my-gateway")
    resource = encoded().resource
    assert resource["service.name"] == "my-gateway"
    assert resource["deployment.environment.name"] == "eu"
    assert resource["team"] == "legal one"


def test_ten_thousand_strangers_make_no_series_in_either_exporter() -> None:
    plan = plan_of()
    observer = Observer(plan, Standing(Breakers(), Retries()), (10, 100))
    operations = Operations(plan)
    observer.take_operations(operations)
    dice = random.Random(7)
    kinds, codes = [None, *FaultKind], list(CODES)[:6]

    def flood(calls: int) -> tuple[set[object], set[object]]:
        for _ in range(calls):
            word = f"{dice.getrandbits(64):x}"
            ref = dice.choice((f"openai/{word}", f"{word}/x", word, "mistral/base", "openai/gpt-4o"))
            observer.call_ended(
                CallRecord(
                    id=word,
                    at_ms=1,
                    env=word,
                    agent=dice.choice((word, "qa_agent", "raw")),
                    variant=dice.choice(("finetuned", "baseline", None)),
                    user=word,
                    key=word,
                    operation=word,
                    model_asked=word,
                    model_sent=ref,
                    model_answered=word,
                    attempts=[Attempt(ref=ref, started_ms=0, duration_ms=5.0, fault=dice.choice(kinds))],
                    error=dice.choice((word, "", *codes)),
                    usage=Usage(prompt_tokens=dice.getrandbits(30), completion_tokens=1),
                    duration_ms=5.0,
                    first_chunk_ms=dice.choice((None, 1.0)),
                )
            )
        text = generate_latest(Snapshot(observer.figures())).decode()
        prometheus = {line.rpartition(" ")[0] for line in text.splitlines() if not line.startswith("#")}
        return prometheus, encoded(*observer.figures(), *operations.figures()).series

    before = flood(10_000)
    assert flood(10_000) == before
    # The other agent's arms are there from the beginning, as are two models of qa_agent that nobody got.
    known = {"qa_agent", "raw", "other", "legal_agent"}
    assert {dict(has)["agent"] for name, has in before[1] if name == "model.requests"} == known
    # Agents x models x variants, and each with the codes there are and those of providers: whoever calls.
    asked = [cell for cell in observer._cells.values() if cell.requests]
    assert len(asked) == sum(name == "model.latency_ms" for name, _ in before[1]) == 3 * 3 * 3
    assert {len(cell.errors) for cell in asked} == {len({*codes, *PROVIDER_ERRORS})}
    assert len(observer._cells) == sum(name == "model.requests" for name, _ in before[1]) < 3 * 3 * 3 + 6


def test_every_metric_has_a_name_over_otlp_and_a_unit_and_is_documented_with_both() -> None:
    text = DOCS.read_text()
    assert len({one.dotted for one in METRICS}) == len(METRICS)
    for one in METRICS:
        assert one.dotted.count(".") == 1
        assert one.unit
        name = f"{one.name}_total" if one.kind is Kind.COUNTER else one.name
        labels = ", ".join(one.labels) or "–"
        assert f"| `{name}` | {one.kind} | {one.unit} | {labels} | {one.help} |" in text
    for mission in ("model.latency_ms", "model.cost_usd", "model.errors", "model.fallbacks", "model.requests"):
        assert mission in {one.dotted for one in METRICS}
