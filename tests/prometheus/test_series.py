"""The rules, alerts and runbooks name only what the gateway shows, and every alert is proved and explained.

What promtool cannot know: it takes any name for a series that may come one day.
"""

import re
from pathlib import Path

import pytest

from gateway.domain.errors import CODES
from gateway.domain.settings import Telemetry
from gateway.telemetry.metrics import METRICS, Kind
from tests.prometheus.promql import FOLDER, ROOT, Asked, asked_by, cases, read, recorded, rules_of, shown

THE_EIGHT = {
    "HighModelErrorRate", "HighModelLatency", "VeryHighModelLatency", "HighCostBurn", "CriticalCostOverrun",
    "HighFallbackRate", "ModelUnavailable", "LowSuccessRate",
}  # fmt: skip
OURS = {
    "ErrorBudgetBurnFast", "ErrorBudgetBurn", "ErrorBudgetBurnSlow", "BreakerOpen", "CapNear", "CapReached",
    "BudgetRefusesCalls", "CapOvershoot", "SpendingStopped", "JournalBehind", "StoreDown", "SlackFailing",
    "GatewayDown", "ReloadFailed", "ModelRetiring", "ExportFailing", "ModelInError", "ModelSlow",
    "RolloutRolledBack", "RolloutBreachStands", "RolloutUnwatched",
}  # fmt: skip
RULES, ALERTS = rules_of("rules.yml"), rules_of("alerts.yml")
RUNBOOKS = sorted((ROOT / "docs" / "runbooks").glob("*.md"))
SERIES = shown() | recorded()


def name_of(rule: dict[str, str]) -> str:
    return rule.get("alert") or rule["record"]


def anchors(text: str) -> set[str]:
    """What a link may point at: headings, as GitHub makes anchors of them."""
    titles = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}


def test_names_are_read_out_of_an_expression() -> None:
    expression = 'sum by (le, job) (rate(a_bucket{code!~"x|y{", le="5"}[5m] offset 1d)) / on (job) b:c:d5m > 1e9 or up'
    series, grouped = asked_by(expression)
    assert series == [
        Asked("a_bucket", frozenset({"code", "le"})),
        Asked("b:c:d5m", frozenset()),
        Asked("up", frozenset()),
    ]
    assert grouped == {"le", "job"}


@pytest.mark.parametrize("rule", [*RULES, *ALERTS], ids=name_of)
def test_every_series_and_label_of_a_rule_exists(rule: dict[str, str]) -> None:
    series, grouped = asked_by(rule["expr"])
    assert series
    for name, labels in series:
        assert name in SERIES, name
        assert labels <= SERIES[name], name
    assert grouped <= frozenset().union(*(SERIES[name] for name, _ in series))


@pytest.mark.parametrize("rule", RULES, ids=name_of)
def test_a_recorded_name_says_which_labels_are_kept(rule: dict[str, str]) -> None:
    # Where a rule is made of raw series, its `by` is its level (and `le`, which histogram_quantile uses up).
    raw = [name for name, _ in asked_by(rule["expr"])[0] if ":" not in name]
    grouped = asked_by(rule["expr"])[1] - {"le"}
    assert not raw or grouped == recorded()[rule["record"]]


def test_every_recorded_series_is_used_or_is_for_people() -> None:
    used = {asked.name for rule in [*RULES, *ALERTS] for asked in asked_by(rule["expr"])[0]}
    prose = "".join(path.read_text() for path in RUNBOOKS)
    assert not [name for name in recorded() if name not in used and name not in prose]


def test_codes_in_matchers_are_codes() -> None:
    text = (FOLDER / "rules.yml").read_text() + (FOLDER / "alerts.yml").read_text()
    found = {code for values in re.findall(r'\bcode[!=]~?"([^"]*)"', text) for code in values.split("|")}
    assert found
    assert found <= set(CODES)


def test_the_alerts_are_the_eight_and_ours() -> None:
    names = [rule["alert"] for rule in ALERTS]
    assert len(names) == len(set(names))
    assert set(names) == THE_EIGHT | OURS


@pytest.mark.parametrize(
    "name, wait",
    [
        ("HighModelErrorRate", "5m"), ("HighModelLatency", "5m"), ("VeryHighModelLatency", "2m"),
        ("HighCostBurn", "1h"), ("CriticalCostOverrun", "30m"), ("HighFallbackRate", "5m"), ("LowSuccessRate", "5m"),
    ],
)  # fmt: skip
def test_the_eight_wait_as_long_as_they_are_to(name: str, wait: str) -> None:
    # ModelUnavailable's ten minutes are the window of its expression.
    assert next(rule["for"] for rule in ALERTS if rule["alert"] == name) == wait


@pytest.mark.parametrize("rule", ALERTS, ids=name_of)
def test_every_alert_says_how_bad_what_and_where_to_read_on(rule: dict[str, dict[str, str]]) -> None:
    assert rule["labels"]["severity"] in {"critical", "warning"}
    assert set(rule["annotations"]) == {"summary", "description", "runbook"}
    path, _, anchor = rule["annotations"]["runbook"].partition("#")
    assert anchor == str(rule["alert"]).lower()
    assert anchor in anchors((ROOT / path).read_text())


@pytest.mark.parametrize("rule", ALERTS, ids=name_of)
def test_an_annotation_uses_only_labels_that_the_alert_has(rule: dict[str, dict[str, str]]) -> None:
    used = {label for text in rule["annotations"].values() for label in re.findall(r"\$labels\.(\w+)", text)}
    series, grouped = asked_by(str(rule["expr"]))
    kept = [SERIES[name] for name, _ in series]
    assert used <= frozenset().union(*kept) | grouped
    assert "{{" in rule["annotations"]["summary"]


@pytest.mark.parametrize("rule", ALERTS, ids=name_of)
def test_every_alert_is_proved_silent_and_firing(rule: dict[str, str]) -> None:
    asked = f'ALERTS{{alertname="{rule["alert"]}"}}'
    proofs = [
        test["exp_samples"] for _, case in cases() for test in case.get("promql_expr_test", ()) if test["expr"] == asked
    ]
    assert any(not samples for samples in proofs), "nowhere silent"
    assert any('alertstate="firing"' in sample["labels"] for samples in proofs for sample in samples), "nowhere firing"
    if "for" in rule:
        assert any('alertstate="pending"' in one["labels"] for samples in proofs for one in samples), "nowhere pending"


def test_promtools_cases_feed_only_series_that_exist() -> None:
    for file, case in cases():
        for one in case["input_series"]:
            ((name, labels),) = asked_by(one["series"])[0]
            assert labels == SERIES[name], f"{file}, {case['name']}: {one['series']}"


def test_the_thresholds_of_latency_are_edges_of_the_histogram() -> None:
    # Between two edges histogram_quantile guesses; on one it is exact.
    text = "".join(rule["expr"] for rule in ALERTS)
    thresholds = {int(found) for found in re.findall(r"p95_5m > (\d+)", text)}
    assert thresholds == {5_000, 10_000}
    assert thresholds <= set(Telemetry().latency_buckets_ms)


def test_prometheus_reads_these_rules_and_scrapes_the_admin_listener() -> None:
    config = read("prometheus.yml")
    assert config["rule_files"] == ["rules.yml", "alerts.yml"]
    (job,) = config["scrape_configs"]
    assert job["static_configs"] == [{"targets": ["127.0.0.1:9090"]}]
    # The one rule that asks for a job by name.
    (down,) = [rule for rule in ALERTS if rule["alert"] == "GatewayDown"]
    assert f'job="{job["job_name"]}"' in down["expr"]


@pytest.mark.parametrize("path", RUNBOOKS, ids=lambda path: path.name)
def test_runbooks_name_only_series_and_alerts_that_exist(path: Path) -> None:
    text = path.read_text()
    named = set(re.findall(r"\b(?:model|gateway)_[a-z_]+\b|\b(?:job|job_agent\w*):[\w:]+", text))
    # People may name a histogram as a whole.
    assert named <= SERIES.keys() | CODES.keys() | {metric.name for metric in METRICS if metric.kind is Kind.HISTOGRAM}
    alerts = set(re.findall(r"^#+ ((?:[A-Z][a-z]+){2,})$", text, flags=re.MULTILINE))
    assert alerts <= THE_EIGHT | OURS
