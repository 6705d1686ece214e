"""What a PromQL expression asks for, and what there is to be asked for. Reads names; evaluates nothing."""

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from gateway.telemetry.metrics import METRICS, Kind

ROOT = Path(__file__).parent.parent.parent
FOLDER = ROOT / "prometheus"
# Prometheus adds these to whatever it scrapes, and makes these series itself.
TARGET_LABELS = frozenset({"job", "instance"})
ITS_OWN = {"up": frozenset(), "ALERTS": frozenset({"alertname", "alertstate", "severity"})}

_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
_GROUPING = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)")
_RANGE = re.compile(r"\[[^\]]*\]|\boffset\s+\w+")
_SELECTOR = re.compile(r"([A-Za-z_:][\w:]*)\s*(?:\{([^}]*)\})?(\s*\()?")
_MATCHER = re.compile(r"([A-Za-z_]\w*)\s*(?:=~|!~|!=|=)")
_WORDS = frozenset({"and", "or", "unless", "bool", "offset", "by", "on", "inf", "nan"})


class Asked(NamedTuple):
    """One series an expression names, and the labels it matches."""

    name: str
    labels: frozenset[str]


def asked_by(expression: str) -> tuple[list[Asked], set[str]]:
    """The series of an expression, and the labels that it groups or joins by."""
    text = _STRING.sub('""', expression)
    grouped = {label.strip() for found in _GROUPING.findall(text) for label in found.split(",") if label.strip()}
    text = _RANGE.sub(" ", _GROUPING.sub(" ", text))
    series = []
    # A number such as 1e9 is no name.
    for name, matchers, call in _SELECTOR.findall(re.sub(r"\b\d[\w.]*", " ", text)):
        if not call and name.lower() not in _WORDS:
            series.append(Asked(name, frozenset(_MATCHER.findall(matchers))))
    return series, grouped


def shown() -> dict[str, frozenset[str]]:
    """Every series that a gateway shows, as Prometheus names it, with its labels."""
    found = dict(ITS_OWN)
    for metric in METRICS:
        labels = frozenset(metric.labels)
        if metric.kind is Kind.COUNTER:
            found[f"{metric.name}_total"] = labels
        elif metric.kind is Kind.HISTOGRAM:
            found |= {f"{metric.name}_bucket": labels | {"le"}, f"{metric.name}_sum": labels}
            found[f"{metric.name}_count"] = labels
        else:
            found[metric.name] = labels
    return {name: labels | TARGET_LABELS for name, labels in found.items()}


def read(name: str) -> Any:
    return yaml.safe_load((FOLDER / name).read_text())


def rules_of(name: str) -> list[dict[str, Any]]:
    """The rules of all groups of a file, in order."""
    return [rule for group in read(name)["groups"] for rule in group["rules"]]


def recorded() -> dict[str, frozenset[str]]:
    """What rules.yml records; its names say which labels are kept."""
    levels = {rule["record"]: rule["record"].partition(":")[0] for rule in rules_of("rules.yml")}
    return {name: frozenset(level.split("_")) for name, level in levels.items()}


@cache
def cases() -> Sequence[tuple[str, dict[str, Any]]]:
    """Every group of tests/*.yml, with its file."""
    paths = sorted((FOLDER / "tests").glob("*.yml"))
    return [(path.name, case) for path in paths for case in yaml.safe_load(path.read_text())["tests"]]
