"""Figures on the screen, in reports/ and in docs/benchmarks.md. It reckons nothing."""

import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec
from rich.table import Table

from bench.figures import FIGURES, Figure, Row
from bench.measure import MEASURES, Settings, Visit
from bench.stats import Spread

# Below this width the screen shows medians only.
LABEL_WIDTH, SPREAD_WIDTH = 27, 26
BEGIN, END = "<!-- results: written by `python -m bench --docs` -->", "<!-- end of results -->"


@dataclass(frozen=True)
class Setting:
    """Where and how the figures came about: without it they mean nothing."""

    machine: str
    software: str
    cores: str
    load_average: str
    settings: Settings
    absent: dict[str, str]

    def lines(self) -> list[str]:
        told = self.settings
        shape = (
            f"{told.rounds} rounds, windows of {told.window_s:g} s after {told.warm_s:g} s of warm-up, "
            f"{told.connections} connections"
        )
        return [self.machine, self.software, self.cores, f"load average at start {self.load_average}", shape]


def setting(settings: Settings, cores_note: str, absent: dict[str, str], nginx: str | None) -> Setting:
    model = "unknown processor"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    machine = f"{model}, {os.cpu_count()} cores, Linux {platform.release().partition('-')[0]}"
    software = [f"Python {platform.python_version()}"]
    software += [f"{name} {_version(name)}" for name in ("aiohttp", "uvloop", "msgspec")]
    if nginx:
        answer = subprocess.run([nginx, "-v"], capture_output=True, text=True, check=False, timeout=5)
        software.append(answer.stderr.strip().removeprefix("nginx version: ").replace("/", " "))
    average = " ".join(f"{value:.2f}" for value in os.getloadavg())
    return Setting(machine, ", ".join(software), cores_note, average, settings, absent)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def cell(figure: Figure, row: Row, *, spread: bool) -> str:
    """The median and, where wanted and there was more than one round, least and most."""
    found = row.figures.get(figure.key)
    if found is None:
        return "–"
    mark = "†" if figure.key == "requests_per_s" and row.generator_bound else ""
    text = _number(found.median, figure.digits) + mark
    if spread and found.rounds > 1:
        text += f" ({_number(found.low, figure.digits)}–{_number(found.high, figure.digits)})"
    return text


def _number(value: float, digits: int) -> str:
    return f"{value:,.{digits}f}"


def table(rows: Sequence[Row], width: int) -> Table:
    """Figures down, subjects across: the screen is narrower than the list of figures is long."""
    spread = width >= LABEL_WIDTH + SPREAD_WIDTH * len(rows)
    title = "median (least–most)" if spread else "median; least and most are in bench.md"
    shown = Table(title=title, title_justify="left")
    shown.add_column("")
    for row in rows:
        shown.add_column(row.subject, justify="right")
    for figure in FIGURES:
        shown.add_row(figure.title, *[cell(figure, row, spread=spread) for row in rows])
    shown.add_row("calls", *[f"{row.calls:,}" for row in rows])
    shown.add_row("errors", *[f"[bold red]{row.errors}[/]" if row.errors else "0" for row in rows])
    return shown


def notes(rows: Sequence[Row], setting: Setting) -> list[str]:
    lines = [f"{name}: {why}" for name, why in setting.absent.items()]
    if any(row.generator_bound for row in rows):
        lines.append("† generator and mock had no time left: the subject could do more")
    return lines + [f"{row.subject}, {text}" for row in rows for text in row.complaints]


def markdown(rows: Sequence[Row], setting: Setting) -> str:
    """The same table for a page; it stands between the two marks of docs/benchmarks.md."""

    def line(title: str, cells: Sequence[str]) -> str:
        return f"| {title} | {' | '.join(cells)} |"

    lines = [line("median (least–most)", [row.subject for row in rows])]
    lines.append("|---|" + "--:|" * len(rows))
    lines += [line(figure.title, [cell(figure, row, spread=True) for row in rows]) for figure in FIGURES]
    lines.append(line("calls measured", [f"{row.calls:,}" for row in rows]))
    lines.append(line("errors", [str(row.errors) for row in rows]))
    lines += ["", *[f"- {text}" for text in notes(rows, setting) + setting.lines()]]
    return "\n".join(lines) + "\n"


def write(directory: Path, rows: Sequence[Row], visits: Sequence[Visit], setting: Setting) -> None:
    """bench.json holds every visit, so that other figures can be drawn from one run; bench.md the table."""
    directory.mkdir(parents=True, exist_ok=True)
    everything = {
        "setting": asdict(setting),
        "measures": {one.name: one.what for one in MEASURES},
        "subjects": [_plain(row) for row in rows],
        "visits": [msgspec.to_builtins(visit) for visit in visits],
    }
    text = msgspec.json.format(msgspec.json.encode(everything), indent=2)
    (directory / "bench.json").write_bytes(text + b"\n")
    (directory / "bench.md").write_text(f"# The gateway measured side by side\n\n{markdown(rows, setting)}")


def _plain(row: Row) -> dict[str, object]:
    figures = {key: _named(spread) for key, spread in row.figures.items()}
    return asdict(row) | {"figures": figures}


def _named(spread: Spread) -> dict[str, float]:
    return {"median": spread.median, "min": spread.low, "max": spread.high, "rounds": spread.rounds}


def write_into_page(page: Path, rows: Sequence[Row], setting: Setting) -> None:
    """Replaces what stands between the marks. Raises ValueError where the page has none."""
    before, begin, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page} has no place for results: {BEGIN} ... {END}")
    page.write_text(f"{before}{BEGIN}\n\n{markdown(rows, setting)}\n{END}{after}")
