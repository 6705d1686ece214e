"""The declarations: names, labels and words that Prometheus and its users expect."""

from gateway.telemetry.metrics import CALL_LABELS, METRICS, Declared, Kind


def test_names_and_labels_follow_prometheus_conventions() -> None:
    assert len({declared.name for declared in METRICS}) == len(METRICS)
    for declared in METRICS:
        assert declared.name.startswith(("model_", "gateway_"))
        # These ends are Prometheus' to give.
        assert not declared.name.endswith(("_total", "_count", "_sum", "_bucket", "_created", "_info_total"))
        assert declared.help.endswith(".")
        assert declared.kind in Kind
        assert "le" not in declared.labels


def test_what_is_counted_by_call_is_told_by_agent_model_and_variant() -> None:
    for declared in METRICS:
        if declared.name in ("model_requests", "model_errors", "model_fallbacks", "model_cost_usd", "model_latency_ms"):
            assert declared.labels[:3] == CALL_LABELS


def test_a_name_is_dotted_once_and_a_dotted_one_stays() -> None:
    assert Declared("model_latency_ms", Kind.HISTOGRAM, "").dotted == "model.latency_ms"
    assert Declared("gen_ai.client.token.usage", Kind.HISTOGRAM, "").dotted == "gen_ai.client.token.usage"
