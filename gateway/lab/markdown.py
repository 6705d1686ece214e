"""Pieces of Markdown that reports are made of, and how a report with its plots is put where it belongs.

Knows nothing of what a report is about. The invariant: nothing in a name from outside is Markdown or HTML, and whoever
looks at a file meanwhile sees the old one or the new one, whole.
"""

from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

# An underscore within a word is no emphasis, and commands are full of them.
_ESCAPES = {"<": "&lt;", "[": "\\[", "*": "\\*"}


class Plot(NamedTuple):
    """A drawing, what it is called as a file, and what it shows, for those who do not see it."""

    name: str
    shows: str
    svg: bytes


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, names: int) -> str:
    """A table whose first columns are names, and the others figures."""
    rules = [":--" if index < names else "--:" for index in range(len(head))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rules, *rows))


def code(name: str) -> str:
    """A name from outside, so that nothing in it is Markdown or HTML."""
    return f"`{cell(name).replace('`', chr(39)) or '-'}`"


def cell(text: str) -> str:
    """A text that stays in its cell, and in its line."""
    return "".join(char if char.isprintable() else " " for char in text).replace("|", "\\|")


def prose(text: str) -> str:
    """A sentence in which somebody's words may be: its `code` stays, and it is no HTML, link or emphasis."""
    return "".join(_ESCAPES.get(char, char) for char in cell(text))


def why_no_plots() -> str:
    """What the plots need and is not there; empty where there can be plots."""
    has_matplotlib = find_spec("matplotlib") is not None
    missing = "the plots need matplotlib, which is not installed: pip install 'genesis-gateway[reports]'"
    return "" if has_matplotlib else missing


def image(plot: Plot, folder: str) -> str:
    """A plot, shown."""
    return f"![{cell(plot.shows)}]({folder}/{plot.name})"


def plots_of(out: Path) -> Path:
    """The folder of a report's plots: its name without the suffix, or with another one where it has none."""
    return out.with_suffix("") if out.suffix else out.with_name(f"{out.name}-plots")


def put(out: Path, text: str, plots: Sequence[Plot], *, ours: Sequence[str]) -> list[Path]:
    """Write the report to `out` and its plots into their folder, `plots_of`; what was written, the report first.

    Plots of earlier reports whose names match `ours` go: what no report shows any more would only mislead. Raises
    OSError.
    """
    folder = plots_of(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    if plots:
        folder.mkdir(exist_ok=True)
    kept = {plot.name for plot in plots}
    for stale in (path for pattern in ours for path in folder.glob(pattern)):
        if stale.name not in kept:
            stale.unlink()
    for plot in plots:
        _write(folder / plot.name, plot.svg)
    _write(out, text.encode())
    return [out, *(folder / plot.name for plot in plots)]


def _write(path: Path, content: bytes) -> None:
    beside = path.with_name(f".{path.name}.part")
    beside.write_bytes(content)
    beside.replace(path)
