"""What all plots of reports share: matplotlib's style, colours, an axis of time, and the way to SVG.

matplotlib is imported with it, so only drawing modules may import it, and these only where something is drawn. The
invariant: the same drawing gives the same bytes, so that a report can be kept under version control.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from io import BytesIO
from typing import Any

import matplotlib as mpl
from matplotlib import dates as _dates
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from gateway.domain.spans import Span

# Of all that is used here this module alone has no types.
DATES: Any = _dates
# Okabe and Ito's, which people who see few colours can tell apart.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
GREY, RED = "#999999", "#B00020"
WIDTH_INCHES = 9.0
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


def style() -> AbstractContextManager[None]:
    """Within it everything is drawn, and made SVG of."""
    return mpl.rc_context(_STYLE)


def over_time(axes: Sequence[Axes], span: Span) -> None:
    """Let these plots run from the beginning of a time to its end."""
    for one in axes:
        one.set_xlim(day(span.since_ms), day(span.until_ms))
        locator = DATES.AutoDateLocator(tz=UTC)
        one.xaxis.set_major_locator(locator)
        one.xaxis.set_major_formatter(DATES.ConciseDateFormatter(locator, tz=UTC))
        one.grid(axis="y", linewidth=0.4, color="#dddddd")


def legend(axes: Axes) -> None:
    """Beside the plot, where there is something to explain."""
    if axes.get_legend_handles_labels()[1]:
        axes.legend(loc="upper left", bbox_to_anchor=(1.03, 1.0), frameon=False, fontsize=8)


def svg(figure: Figure) -> bytes:
    """The drawing as a file."""
    paper = BytesIO()
    FigureCanvasSVG(figure)
    figure.savefig(paper, format="svg", metadata={"Date": None, "Creator": None})
    return paper.getvalue()


def day(at_ms: int) -> float:
    """An instant as a place on the axis."""
    return float(DATES.date2num(datetime.fromtimestamp(at_ms / 1000, UTC)))


def short(text: str, longest: int = _LONGEST_NAME) -> str:
    """What fits beside a plot, in characters that its fonts have."""
    plain = "".join(char if " " <= char <= "~" else "?" for char in text)
    # matplotlib leaves out of a legend what begins so.
    plain = f" {plain}" if plain.startswith("_") else plain
    if len(plain) <= longest:
        return plain
    # Names of models differ at their ends.
    return f"{plain[: longest // 2 - 3]}...{plain[-longest // 2 :]}"
