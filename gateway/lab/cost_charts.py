"""Plots of spend as SVG, by matplotlib, which only `gateway costs report` needs. Draws; computes nothing.

The invariant: the same figures give the same bytes, so that a report can be kept under version control.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from io import BytesIO
from typing import Any

import matplotlib as mpl
from matplotlib import dates as _dates
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from gateway.domain.money import NUSD_PER_USD, format_usd
from gateway.domain.spans import Span
from gateway.lab.cost_figures import Curve
from gateway.store.ledger import Series

# Of all that is used here this module alone has no types.
DATES: Any = _dates
# Okabe and Ito's colours, which people who see few colours can tell apart; what is more than them is summed up.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
_OTHERS, _LIMIT = "#999999", "#B00020"
_SIZE_INCHES = (9.0, 3.6)
_LONGEST_NAME = 44
_STYLE: Any = {
    # Ids within the file are made of this and not of chance.
    "svg.hashsalt": "genesis-gateway",
    "svg.fonttype": "none",
    # Dollars in a name begin no formula.
    "text.parse_math": False,
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "timezone": "UTC",
}


def draw_spend(series: Series, step_s: int, span: Span, by: str) -> bytes:
    """Stacked bars: spend per step, a colour for each group."""
    with _style():
        figure, axes = _paper(span)
        bottoms = [0.0] * len(series.starts_ms)
        for (name, values), colour in zip(_most(series.groups).items(), (*_COLOURS, _OTHERS), strict=False):
            dollars = [nusd / NUSD_PER_USD for nusd in values]
            axes.bar(
                [_day(at_ms) for at_ms in series.starts_ms], dollars, bottom=bottoms, width=step_s / 86_400 * 0.9,
                align="edge", color=_OTHERS if name == "others" else colour, label=_short(name),
            )  # fmt: skip
            bottoms = [low + high for low, high in zip(bottoms, dollars, strict=True)]
        axes.set_title(f"Spend per {_step_name(step_s)} by {by}", loc="left")
        _legend(axes)
        return _svg(figure)


def draw_shares(groups: Sequence[tuple[str, int]], by: str) -> bytes:
    """Lying bars: what each group spent, the largest on top."""
    with _style():
        figure = Figure(figsize=(_SIZE_INCHES[0], 1.0 + 0.34 * max(1, len(groups))), layout="constrained")
        axes = figure.add_subplot()
        names = [_short(name or "-") for name, _ in groups]
        # By place and not by name: two names may look the same once they are short.
        bars = axes.barh(range(len(groups)), [nusd / NUSD_PER_USD for _, nusd in groups], color=_COLOURS[0])
        axes.set_yticks(range(len(groups)), names)
        axes.bar_label(bars, [format_usd(nusd) for _, nusd in groups], padding=3)
        axes.invert_yaxis()
        axes.margins(x=0.15)
        axes.set_xlabel("dollars")
        axes.set_title(f"Spend by {by}", loc="left")
        return _svg(figure)


def draw_cap(curve: Curve, span: Span) -> bytes:
    """Steps that climb through each window, below the cap's limit and its thresholds."""
    with _style():
        figure, axes = _paper(span)
        for (name, points), colour in zip(curve.lines.items(), _COLOURS, strict=False):
            days = [_day(at_ms) for at_ms, _ in points]
            axes.step(days, [nusd / NUSD_PER_USD for _, nusd in points], where="post", color=colour, label=_short(name))
        limit = curve.limit_nusd / NUSD_PER_USD
        axes.axhline(limit, color=_LIMIT, linewidth=1.4, label=f"limit {format_usd(curve.limit_nusd)}")
        for share in curve.warn_at:
            if share < 1:
                axes.axhline(limit * share, color=_LIMIT, linewidth=0.7, linestyle=":")
                axes.annotate(
                    f"{share:.0%}", (1, limit * share), xycoords=("axes fraction", "data"), fontsize=7, color=_LIMIT
                )
        axes.set_ylim(bottom=0)
        axes.set_title(_short(curve.label, 90), loc="left")
        _legend(axes)
        return _svg(figure)


def _style() -> AbstractContextManager[None]:
    return mpl.rc_context(_STYLE)


def _paper(span: Span) -> tuple[Figure, Axes]:
    figure = Figure(figsize=_SIZE_INCHES, layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlim(_day(span.since_ms), _day(span.until_ms))
    locator = DATES.AutoDateLocator(tz=UTC)
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(DATES.ConciseDateFormatter(locator, tz=UTC))
    axes.set_ylabel("dollars")
    axes.grid(axis="y", linewidth=0.4, color="#dddddd")
    return figure, axes


def _most(groups: Mapping[str, Sequence[int]]) -> dict[str, Sequence[int]]:
    """The largest groups, which come first, and the sum of the others."""
    names = list(groups)
    kept: dict[str, Sequence[int]] = {name or "-": groups[name] for name in names[: len(_COLOURS)]}
    rest = [groups[name] for name in names[len(_COLOURS) :]]
    if rest:
        kept["others"] = [sum(values) for values in zip(*rest, strict=True)]
    return kept


def _legend(axes: Axes) -> None:
    if axes.get_legend_handles_labels()[1]:
        axes.legend(loc="upper left", bbox_to_anchor=(1.03, 1.0), frameon=False, fontsize=8)


def _svg(figure: Figure) -> bytes:
    paper = BytesIO()
    FigureCanvasSVG(figure)
    figure.savefig(paper, format="svg", metadata={"Date": None, "Creator": None})
    return paper.getvalue()


def _day(at_ms: int) -> float:
    return float(DATES.date2num(datetime.fromtimestamp(at_ms / 1000, UTC)))


def _step_name(step_s: int) -> str:
    return {3_600: "hour", 86_400: "day"}.get(step_s, f"{step_s // 86_400} days")


def _short(text: str, longest: int = _LONGEST_NAME) -> str:
    """What fits beside a plot, in characters that its fonts have."""
    plain = "".join(char if " " <= char <= "~" else "?" for char in text)
    # matplotlib leaves out of a legend what begins so.
    plain = f" {plain}" if plain.startswith("_") else plain
    if len(plain) <= longest:
        return plain
    # Names of models differ at their ends.
    return f"{plain[: longest // 2 - 3]}...{plain[-longest // 2 :]}"
