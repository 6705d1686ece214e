"""Plots of spend as SVG, by matplotlib, which only `gateway costs report` needs. Draws; computes nothing."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gateway.domain.money import NUSD_PER_USD, format_usd
from gateway.domain.spans import Span
from gateway.lab.cost_figures import Curve
from gateway.lab.paper import COLOURS, GREY, RED, WIDTH_INCHES, day, legend, over_time, short, style, svg
from gateway.store.ledger import Series

_HEIGHT_INCHES = 3.6


def draw_spend(series: Series, step_s: int, span: Span, by: str) -> bytes:
    """Stacked bars: spend per step, a colour for each group."""
    with style():
        figure, axes = _paper(span)
        bottoms = [0.0] * len(series.starts_ms)
        for (name, values), colour in zip(_most(series.groups).items(), (*COLOURS, GREY), strict=False):
            dollars = [nusd / NUSD_PER_USD for nusd in values]
            axes.bar(
                [day(at_ms) for at_ms in series.starts_ms], dollars, bottom=bottoms, width=step_s / 86_400 * 0.9,
                align="edge", color=GREY if name == "others" else colour, label=short(name),
            )  # fmt: skip
            bottoms = [low + high for low, high in zip(bottoms, dollars, strict=True)]
        axes.set_title(f"Spend per {_step_name(step_s)} by {by}", loc="left")
        legend(axes)
        return svg(figure)


def draw_shares(groups: Sequence[tuple[str, int]], by: str) -> bytes:
    """Lying bars: what each group spent, the largest on top."""
    with style():
        figure = Figure(figsize=(WIDTH_INCHES, 1.0 + 0.34 * max(1, len(groups))), layout="constrained")
        axes = figure.add_subplot()
        names = [short(name or "-") for name, _ in groups]
        # By place and not by name: two names may look the same once they are short.
        bars = axes.barh(range(len(groups)), [nusd / NUSD_PER_USD for _, nusd in groups], color=COLOURS[0])
        axes.set_yticks(range(len(groups)), names)
        axes.bar_label(bars, [format_usd(nusd) for _, nusd in groups], padding=3)
        axes.invert_yaxis()
        axes.margins(x=0.15)
        axes.set_xlabel("dollars")
        axes.set_title(f"Spend by {by}", loc="left")
        return svg(figure)


def draw_cap(curve: Curve, span: Span) -> bytes:
    """Steps that climb through each window, below the cap's limit and its thresholds."""
    with style():
        figure, axes = _paper(span)
        for (name, points), colour in zip(curve.lines.items(), COLOURS, strict=False):
            days = [day(at_ms) for at_ms, _ in points]
            axes.step(days, [nusd / NUSD_PER_USD for _, nusd in points], where="post", color=colour, label=short(name))
        limit = curve.limit_nusd / NUSD_PER_USD
        axes.axhline(limit, color=RED, linewidth=1.4, label=f"limit {format_usd(curve.limit_nusd)}")
        for share in curve.warn_at:
            if share < 1:
                axes.axhline(limit * share, color=RED, linewidth=0.7, linestyle=":")
                axes.annotate(
                    f"{share:.0%}", (1, limit * share), xycoords=("axes fraction", "data"), fontsize=7, color=RED
                )
        axes.set_ylim(bottom=0)
        axes.set_title(short(curve.label, 90), loc="left")
        legend(axes)
        return svg(figure)


def _paper(span: Span) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH_INCHES, _HEIGHT_INCHES), layout="constrained")
    axes = figure.add_subplot()
    over_time([axes], span)
    axes.set_ylabel("dollars")
    return figure, axes


def _most(groups: Mapping[str, Sequence[int]]) -> dict[str, Sequence[int]]:
    """The largest groups, which come first, and the sum of the others: no more than there are colours."""
    names = list(groups)
    kept: dict[str, Sequence[int]] = {name or "-": groups[name] for name in names[: len(COLOURS)]}
    rest = [groups[name] for name in names[len(COLOURS) :]]
    if rest:
        kept["others"] = [sum(values) for values in zip(*rest, strict=True)]
    return kept


def _step_name(step_s: int) -> str:
    return {3_600: "hour", 86_400: "day"}.get(step_s, f"{step_s // 86_400} days")
