"""The shipped dashboard as plain values: its panels, and what each asks of Prometheus. Reads; judges nothing."""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from tests.prometheus.promql import ROOT

PATH = ROOT / "deploy" / "grafana" / "dashboards" / "gateway.json"
BOARD: dict[str, Any] = json.loads(PATH.read_text())
VARIABLES: list[dict[str, Any]] = BOARD["templating"]["list"]
ROWS: list[dict[str, Any]] = [panel for panel in BOARD["panels"] if panel["type"] == "row"]
PANELS: list[dict[str, Any]] = [panel for panel in BOARD["panels"] if panel["type"] != "row"]
# What Grafana would put in where everything is chosen.
EVERYTHING = dict.fromkeys(("environment", "instance", "agent", "model"), ".*")


class Asked(NamedTuple):
    """One query of a panel, or of the board itself."""

    title: str
    ref: str
    expression: str


def filled_in(expression: str, *, rate_interval: str, values: Mapping[str, str] = EVERYTHING) -> str:
    """The expression with its variables' values in, as Grafana sends it."""
    found = expression.replace("$__rate_interval", rate_interval)
    for name, value in values.items():
        found = found.replace(f"${name}", value)
    return found


def queries() -> list[Asked]:
    """Every query of every panel, and those of the annotations."""
    of_panels = [
        Asked(panel["title"], target["refId"], target["expr"]) for panel in PANELS for target in panel["targets"]
    ]
    return of_panels + [Asked(f"annotation {one['name']}", "A", one["expr"]) for one in BOARD["annotations"]["list"]]
