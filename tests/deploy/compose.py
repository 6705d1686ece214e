"""deploy/compose.yml as plain values, and its containers' files laid out as their mounts would. No engine is asked."""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from tests.prometheus.promql import ROOT

DEPLOY = ROOT / "deploy"
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")


class Mount(NamedTuple):
    """A file or folder of ours (`source`), or a volume (`name`), at a path of the container."""

    source: Path | None
    name: str
    target: str
    is_read_only: bool


def substituted(text: str, environ: Mapping[str, str] = {}) -> str:
    """A value as compose would hand it on, in an environment that is empty unless told otherwise."""
    return _VARIABLE.sub(lambda found: environ.get(found[1], "") or found[2] or "", text)


def mounts(service: str) -> list[Mount]:
    """What is mounted into a service."""
    found = []
    for text in SERVICES[service].get("volumes", ()):
        source, target, *mode = substituted(text).split(":")
        path = (DEPLOY / source).resolve() if source.startswith(".") else None
        found.append(Mount(path, "" if path else source, target, mode == ["ro"]))
    return found


def environment(service: str, environ: Mapping[str, str] = {}) -> dict[str, str]:
    """A service's variables."""
    return {name: substituted(value, environ) for name, value in SERVICES[service].get("environment", {}).items()}


def lay_out(service: str, root: Path) -> None:
    """Copy what is mounted to where the container would see it, below `root`."""
    for mount in mounts(service):
        if mount.source is not None:
            target = root / mount.target.lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            copy = shutil.copytree if mount.source.is_dir() else shutil.copyfile
            copy(mount.source, target)


def config_of(service: str, root: Path, flag: str = "--config") -> Path:
    """The file that a service's command names, below `root`."""
    (named,) = [word for word in SERVICES[service]["command"] if re.match(rf"{flag}[\w.]*=", word)]
    return root / named.partition("=")[2].lstrip("/")


# What each listens on inside of its container: said by our own files, or the programs' defaults.
LISTENS = {
    "gateway": {8080, 9090},
    "prometheus": {9090},
    "alertmanager": {9093},
    "collector": {4317, 4318, 8889},
    "jaeger": {4317, 16686},
    "grafana": {3000},
}
