"""The dashboard asks only for what the gateway shows, and each panel says what it is. Its answers: test_panels.py."""

import re
import shutil
import subprocess
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml

from gateway.domain.errors import CODES
from tests.deploy.dashboard import BOARD, EVERYTHING, PANELS, ROWS, VARIABLES, Asked, filled_in, queries
from tests.prometheus.promql import ROOT, asked_by, recorded, rules_of, shown

SERIES = shown() | recorded()
PROVISIONED = ROOT / "deploy" / "grafana" / "provisioning" / "datasources" / "datasources.yml"
PROMTOOL = shutil.which("promtool")
LINK = re.compile(r"\$\{runbooks:raw\}/([A-Za-z-]+\.md)(?:#([a-z]+))?")


def title_of(panel: dict[str, Any]) -> str:
    return str(panel["title"])


def datasources() -> dict[str, str]:
    """Kinds of what is provisioned, by uid."""
    return {one["uid"]: one["type"] for one in yaml.safe_load(PROVISIONED.read_text())["datasources"]}


@pytest.mark.parametrize("query", queries(), ids=lambda query: f"{query.title} {query.ref}")
def test_every_series_and_label_of_a_query_exists(query: Asked) -> None:
    series, grouped = asked_by(query.expression)
    assert series
    for name, labels in series:
        assert name in SERIES, name
        assert labels <= SERIES[name], name
    assert grouped <= frozenset().union(*(SERIES[name] for name, _ in series))


def test_every_series_and_label_of_a_variable_exists() -> None:
    asked = [variable["query"]["query"] for variable in VARIABLES if variable["type"] == "query"]
    assert len(asked) == 4
    for query in asked:
        found = re.fullmatch(r"label_values\((\w+)(\{.*\})?, (\w+)\)", query)
        assert found, query
        series, matchers, label = found.groups()
        ((name, labels),) = asked_by(series + (matchers or ""))[0]
        assert labels | {label} <= SERIES[name]


def test_only_variables_that_there_are_are_used() -> None:
    names = {variable["name"] for variable in VARIABLES}
    text = PANELS + [variable["query"] for variable in VARIABLES]
    used = set(re.findall(r"\$\{?([a-z_]\w*)", str(text))) - {"__rate_interval"}
    assert used == names
    # What is hidden from everybody is the runbooks' address alone.
    assert EVERYTHING.keys() == names - {"runbooks"}


def test_every_query_follows_the_choice_of_gateways() -> None:
    # Alerts know of no gateway: rules sum over them.
    free = [query.title for query in queries() if "$instance" not in query.expression]
    assert set(free) == {"Alerts that fire", "annotation Alerts"}


def test_every_series_is_on_the_dashboard() -> None:
    on_it = {name for query in queries() for name, _ in asked_by(query.expression)[0]}
    missing = {name for name in shown() if not name.endswith(("_sum", "_count"))} - on_it
    assert missing == set()


def test_codes_in_matchers_are_codes() -> None:
    matchers = [found for query in queries() for found in re.findall(r'\bcode[!=]~?"([^"]*)"', query.expression)]
    assert {code for values in matchers for code in values.split("|")} <= set(CODES)
    # What is no model's fault is left out by the same words as in the rules.
    (left_out,) = {values for values in matchers if "draining" in values}
    assert any(f'"{left_out}"' in rule["expr"] for rule in rules_of("rules.yml"))


@pytest.mark.skipif(not PROMTOOL, reason="promtool is not on PATH; Debian's package: prometheus")
def test_promtool_can_parse_every_query(tmp_path: Path) -> None:
    rules = [
        {"record": f"query:{number}", "expr": filled_in(query.expression, rate_interval="1m")}
        for number, query in enumerate(queries())
    ]
    path = tmp_path / "queries.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}))
    found = subprocess.run([str(PROMTOOL), "check", "rules", str(path)], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
    assert f"{len(rules)} rules found" in found.stdout


@pytest.mark.parametrize("panel", PANELS, ids=title_of)
def test_every_panel_says_what_it_shows(panel: dict[str, Any]) -> None:
    assert panel["title"]
    assert panel["description"].endswith(".")
    assert panel["fieldConfig"]["defaults"]["unit"]
    assert datasources()[panel["datasource"]["uid"]] == panel["datasource"]["type"]
    refs = [target["refId"] for target in panel["targets"]]
    assert len(refs) == len(set(refs))
    assert all(target["datasource"] == panel["datasource"] for target in panel["targets"])
    steps = panel["fieldConfig"]["defaults"].get("thresholds", {}).get("steps", [{"value": None}])
    # The first step is the base; above it they rise.
    assert steps[0]["value"] is None
    values = [step["value"] for step in steps[1:]]
    assert values == sorted(set(values))


@pytest.mark.parametrize("panel", PANELS, ids=title_of)
def test_a_legend_names_labels_that_the_query_keeps(panel: dict[str, Any]) -> None:
    for target in panel["targets"]:
        series, grouped = asked_by(target["expr"])
        # What is not grouped has all labels of its series.
        kept = (
            grouped
            if re.search(r"\bby\b", target["expr"])
            else frozenset().union(*(SERIES[name] for name, _ in series))
        )
        assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= kept, target["refId"]


def test_ids_and_titles_are_unique() -> None:
    ids = [panel["id"] for panel in BOARD["panels"]]
    titles = [panel["title"] for panel in BOARD["panels"] if panel["title"] != "Alerts that fire"]
    assert len(ids) == len(set(ids))
    assert len(titles) == len(set(titles))


def test_no_panel_covers_another_or_the_edge() -> None:
    for panel in BOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] >= 0
        assert place["x"] + place["w"] <= 24
    for one, other in combinations((panel["gridPos"] for panel in BOARD["panels"]), 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        above = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or above, (one, other)


def test_links_lead_to_headings_of_the_runbooks() -> None:
    alerts = {rule["alert"].lower(): rule["annotations"]["runbook"] for rule in rules_of("alerts.yml")}
    links = [link for holder in (BOARD, *PANELS) for link in holder.get("links", ())]
    found = [LINK.fullmatch(link["url"]) for link in links if "runbooks" in link["url"]]
    assert len(found) > len(PANELS) / 2
    for match in found:
        assert match
        file, anchor = match.groups()
        assert (ROOT / "docs" / "runbooks" / file).is_file()
        assert anchor is None or alerts[anchor] == f"docs/runbooks/{file}#{anchor}"
    # Each alert is within reach of some panel.
    near = {match[2] for match in found if match and match[2]}
    assert alerts.keys() - near <= {"errorbudgetburn", "errorbudgetburnslow"}


def test_the_documentation_explains_every_row() -> None:
    text = (ROOT / "docs" / "dashboards.md").read_text()
    assert not [row["title"] for row in ROWS if f"| {row['title']} |" not in text.replace("**", "")]


def test_the_pictures_are_there_and_small() -> None:
    text = "".join(path.read_text() for path in (ROOT / "docs").glob("*.md"))
    shown_there = set(re.findall(r"!\[[^\]]+\]\((images/[a-z0-9-]+\.png)\)", text))
    kept = {f"images/{path.name}": path.stat().st_size for path in (ROOT / "docs" / "images").iterdir()}
    assert shown_there == kept.keys()
    assert max(kept.values()) < 120_000
