"""The house rules that a reader relies on and no linter knows: floors, silence below the edge, twins, documentation."""

import ast
import re
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from gateway.config import Paths, load
from gateway.decide.breaker import TRANSITIONS
from gateway.decide.fallback import REMEDIES
from gateway.decide.rollout_words import LABELS, allowance
from gateway.domain.errors import CODES
from gateway.domain.experiment import Terms
from gateway.domain.policy import Policy
from gateway.domain.rules import Routing
from gateway.domain.settings import Settings
from gateway.simulator.faults import FAULTS
from gateway.telemetry.metrics import METRICS

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "gateway").rglob("*.py"))
# Imports go down or sideways. What stands directly under gateway/ is named with its suffix.
FLOORS = {
    "__init__.py": 0,
    "domain": 1,
    "decide": 2,
    "store": 3,
    "telemetry": 3,
    "simulator": 3,
    "edge": 4,
    "lab": 4,
    "config.py": 5,
    "treasury.py": 6,
    "app.py": 6,
    "cli": 7,
    "__main__.py": 8,
}
# Below the edge nothing waits, reads a clock or throws dice: it is told.
BARRED_BELOW = {
    "aiohttp", "asyncio", "logging", "multiprocessing", "os", "pathlib", "random", "secrets", "signal", "socket",
    "subprocess", "sys", "threading", "time", "uuid",
}  # fmt: skip
# Each is paid for only by those who use it; none may come in with the gateway itself.
HEAVY = (
    "grpc", "litellm", "matplotlib", "mistralai", "openai", "opentelemetry", "pydantic", "requests", "rich", "tenacity",
    "toml", "watchfiles",
)  # fmt: skip
MAX_LINES = 400
BROAD_EXCEPTS = {
    "gateway/edge/chat.py": 1, "gateway/edge/bookkeeper.py": 1, "gateway/edge/shadow.py": 1, "gateway/edge/pilot.py": 1,
    "gateway/app.py": 1, "gateway/edge/open_call.py": 1,
    "gateway/edge/health.py": 1, "gateway/telemetry/otlp_exporter.py": 2,
}  # fmt: skip


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def floor_of(path: Path) -> int:
    return FLOORS[path.relative_to(ROOT / "gateway").parts[0]]


def imports_of(path: Path) -> Iterator[tuple[str, bool]]:
    """Each imported module, and whether it is imported when the file is."""
    tree = ast.parse(path.read_text())
    at_top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in at_top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module, id(node) in at_top
            # `from gateway import config` names a module too.
            yield from ((f"{node.module}.{alias.name}", id(node) in at_top) for alias in node.names)


def file_of(module: str) -> Path | None:
    path = ROOT.joinpath(*module.split("."))
    if path.with_suffix(".py").is_file():
        return path.with_suffix(".py")
    return path / "__init__.py" if (path / "__init__.py").is_file() else None


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_imports_go_down_or_sideways(path: Path) -> None:
    for module, _ in imports_of(path):
        target = file_of(module) if module.startswith("gateway") else None
        if target is not None:
            assert floor_of(target) <= floor_of(path), f"{name_of(path)} reaches up to {name_of(target)}"


@pytest.mark.parametrize("path", [path for path in SOURCES if floor_of(path) in (1, 2)], ids=name_of)
def test_below_the_edge_nothing_waits_or_looks_at_a_clock(path: Path) -> None:
    used = {module.partition(".")[0] for module, _ in imports_of(path)}
    assert not used & BARRED_BELOW


def test_there_is_no_import_cycle() -> None:
    graph = {
        path: {file_of(name) for name, is_at_top in imports_of(path) if is_at_top} - {None, path} for path in SOURCES
    }
    done: set[Path] = set()

    def walk(path: Path, way: tuple[Path, ...]) -> None:
        assert path not in way, " -> ".join(name_of(step) for step in (*way, path))
        if path not in done:
            for target in graph.get(path, ()):
                walk(target, (*way, path))
            done.add(path)

    for path in SOURCES:
        walk(path, ())


@pytest.mark.parametrize("path", [path for path in SOURCES if path.name != "__init__.py"], ids=name_of)
def test_every_source_file_has_its_test_file(path: Path) -> None:
    inside = path.relative_to(ROOT / "gateway")
    assert (ROOT / "tests" / inside.parent / f"test_{inside.name}").is_file()


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_files_are_of_one_idea(path: Path) -> None:
    text = path.read_text()
    assert ast.get_docstring(ast.parse(text)), "a module opens with what it is"
    assert len(text.splitlines()) <= MAX_LINES
    assert text.count("except Exception") == BROAD_EXCEPTS.get(name_of(path), 0)


def test_only_config_reads_the_environment() -> None:
    readers = {name_of(path) for path in SOURCES if re.search(r"os\.environ|\bgetenv\b", path.read_text())}
    assert readers == {"gateway/config.py"}


def test_heavy_packages_are_not_imported_with_the_gateway() -> None:
    script = f"import sys, gateway.app, gateway.cli.main; print([n for n in {HEAVY!r} if n in sys.modules])"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout.strip() == "[]"


# --- Documentation ---------------------------------------------------------------------------------------------------


def settings_of(struct: type, prefix: str = "") -> Iterator[str]:
    """Every key of a file, dotted; names that the user chooses are written as NAME."""
    for field in msgspec.structs.fields(struct):
        key = f"{prefix}{field.encode_name}"
        inner = next((kind for kind in _structs_in(field.type)), None)
        if inner is None:
            yield key
        elif typing.get_origin(field.type) is dict:
            yield from settings_of(inner, f"{key}.NAME.")
        elif typing.get_origin(field.type) is list:
            yield from settings_of(inner, f"{key}[].")
        else:
            yield from settings_of(inner, f"{key}.")


def _structs_in(kind: object) -> Iterator[type]:
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        yield kind
    for argument in typing.get_args(kind):
        yield from _structs_in(argument)


@pytest.mark.parametrize("struct", [Settings, Policy, Routing], ids=lambda struct: struct.__name__)
def test_every_setting_is_documented(struct: type) -> None:
    text = (ROOT / "docs" / "configuration.md").read_text()
    missing = [key for key in settings_of(struct) if f"`{key}`" not in text]
    assert not missing


def test_every_documented_setting_exists() -> None:
    known = {key for struct in (Settings, Policy, Routing) for key in settings_of(struct)}
    text = (ROOT / "docs" / "configuration.md").read_text().partition("\n## config.toml")[2]
    rows = re.findall(r"^\| `([^`]+)` \|", text, flags=re.MULTILINE)
    assert rows
    assert not [row for row in rows if row not in known]


def test_every_error_code_is_documented_with_its_status() -> None:
    text = (ROOT / "docs" / "api.md").read_text()
    missing = [code for code, row in CODES.items() if f"| `{code}` | {row.status} | `{row.type}` |" not in text]
    assert not missing


def test_every_header_is_documented() -> None:
    text = (ROOT / "docs" / "api.md").read_text()
    used = {name for path in SOURCES for name in re.findall(r"x-gateway-[a-z]+(?:-[a-z]+)*", path.read_text())}
    assert used
    assert not [name for name in used if f"`{name}`" not in text]


def test_every_metric_is_documented() -> None:
    text = (ROOT / "docs" / "metrics.md").read_text()
    assert not [metric.name for metric in METRICS if f"`{metric.name}" not in text or metric.help not in text]


def test_every_fault_is_documented_as_the_table_has_it() -> None:
    text = (ROOT / "docs" / "failover.md").read_text()
    for kind, remedy in REMEDIES.items():
        billed, counts = ("yes" if flag else "no" for flag in (remedy.may_be_billed, remedy.is_models_fault))
        cells = (f"`{kind}`", remedy.retries_here or "–", remedy.then.value, billed, counts, remedy.why)
        assert f"| {' | '.join(map(str, cells))} |" in text


def test_every_transition_of_a_breaker_is_documented() -> None:
    text = (ROOT / "docs" / "failover.md").read_text()
    rows = [f"| {before} | {event} | {after} |" for (before, event), after in TRANSITIONS.items()]
    assert not [row for row in rows if row not in text]


def test_every_command_is_documented() -> None:
    from gateway.cli.main import main

    text = (ROOT / "docs" / "cli.md").read_text()
    assert not [name for name in main.commands if f"`gateway {name}" not in text]


def test_every_fault_of_the_simulator_is_documented_as_the_table_has_it() -> None:
    text = (ROOT / "docs" / "cli.md").read_text().partition("\n| fault | what happens |\n|---|---|\n")[2]
    assert text.partition("\n\n")[0].splitlines() == [f"| `{name}` | {what} |" for name, what in FAULTS.items()]


def test_the_least_that_a_comparison_wants_is_documented() -> None:
    text = (ROOT / "docs" / "rollouts.md").read_text()
    least = Terms()
    assert (
        f"With fewer than {least.min_users} in an arm, or calls as if from fewer than {least.min_effective_users:g} "
        "equally busy users, the comparison says nothing" in text
    )


@pytest.mark.parametrize("name", ["reports.md", "rollouts.md", "runbooks/rollout.md"])
def test_what_is_shown_of_production_has_the_guardrails_that_it_ships(name: str) -> None:
    text = (ROOT / "docs" / name).read_text()
    policy = load(Paths(ROOT / "config.toml", ROOT / "policies"), "production", litellm_map={}, want_secrets=False)
    shipped = {
        f"{LABELS[rail.metric]}: {allowance(rail)}" for rail in policy.plan.rollouts["qa_agent"].terms.guardrails
    }
    labels = "|".join(LABELS.values())
    # As the audit log has it, and as a report's table does, which counts costs by the thousand.
    said = re.findall(rf"({labels})[^<\n|]*? the guardrail of ([^<\n|]+ (?:less|more))", text)
    said += re.findall(rf"^\| ({labels}|cost per 1,000 requests) \|.*\(at most ([^)]+)\) \|$", text, re.MULTILINE)
    shown = {f"{metric.replace('1,000 requests', 'request')}: {margin}" for metric, margin in said}
    assert shown
    assert shown <= shipped


def test_the_picture_of_the_house_names_every_room_on_its_floor() -> None:
    picture = (ROOT / "docs" / "architecture.md").read_text().partition("```\ngateway/\n")[2].partition("```")[0]
    rooms = {path.relative_to(ROOT / "gateway").as_posix() for path in SOURCES if path.name != "__init__.py"}
    floor, drawn = "", set()
    for line in picture.splitlines():
        entry = line.split()[0]
        if entry.endswith("/"):
            floor = entry
        elif line.startswith("   "):
            # Some lines name a room's neighbours, too.
            drawn |= {f"{floor}{name}" for name in re.findall(r"\w+\.py", line)} & rooms
            drawn.add(f"{floor}{entry}")
        else:
            drawn.add(entry)
    assert drawn == rooms
