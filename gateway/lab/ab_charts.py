"""Plots of an experiment as SVG: intervals as they narrowed, the share as it moved, both arms day by day.

Draws; computes nothing. The invariant: an end that an interval does not have is not drawn as if it had one.
"""

from collections.abc import Sequence
from math import isfinite, nan
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gateway.decide.compare import KINDS
from gateway.decide.rollout_words import LABELS, percent
from gateway.domain.experiment import METRICS, Metric
from gateway.domain.money import NUSD_PER_USD
from gateway.domain.rollout import Change, Event
from gateway.domain.rollout_policy import ALL_BPS
from gateway.domain.spans import Span
from gateway.lab.ab_arms import Slot, Step
from gateway.lab.ab_figures import Effect, Point, effect_of
from gateway.lab.paper import COLOURS, GREY, RED, WIDTH_INCHES, day, legend, over_time, style, svg

_TREATED, _CONTROL = COLOURS[1], COLOURS[0]
_PANEL_INCHES = 1.9
_BACK = (Event.ROLLED_BACK, Event.LOWERED, Event.EMPTIED, Event.HELD, Event.MISMATCHED)
# What one sees at the beginning is wide, and would press all that follows flat.
_SETTLED = 1 / 3


def draw_intervals(track: Sequence[Point], changes: Sequence[Change], span: Span) -> bytes:
    """A panel for each metric that has an interval: the difference, its band, zero, and the guardrail."""
    with style():
        metrics = metrics_with_bands(track)
        figure = Figure(figsize=(WIDTH_INCHES, 0.5 + _PANEL_INCHES * len(metrics)), layout="constrained")
        panels = [figure.add_subplot(len(metrics), 1, 1 + number) for number in range(len(metrics))]
        over_time(panels, span)
        for axes, metric in zip(panels, metrics, strict=True):
            _band(axes, metric, track)
            for change in changes:
                if change.from_bps != change.share_bps and span.since_ms < change.at_ms < span.until_ms:
                    axes.axvline(day(change.at_ms), color=GREY, linewidth=0.6, linestyle=":")
        if panels:
            panels[0].set_title("Fine-tuned less baseline; dotted: the share changed", loc="left")
        return svg(figure)


def metrics_with_bands(track: Sequence[Point]) -> list[Metric]:
    """The metrics of which an interval can be drawn."""
    known = {
        finding.metric
        for point in track
        for finding in point.findings
        if (found := effect_of(finding)).low is not None and found.high is not None
    }
    return [metric for metric in METRICS if metric in known]


def draw_share(changes: Sequence[Change], until_ms: int) -> bytes:
    """The share of users with the fine-tuned model, a mark at each change of the audit log."""
    with style():
        span = Span(changes[0].at_ms, max(until_ms, changes[-1].at_ms + 1))
        figure = Figure(figsize=(WIDTH_INCHES, 2.6), layout="constrained")
        axes = figure.add_subplot()
        over_time([axes], span)
        days = [day(change.at_ms) for change in changes]
        shares = [100 * change.share_bps / ALL_BPS for change in changes]
        axes.step([*days, day(span.until_ms)], [*shares, shares[-1]], where="post", color=_TREATED)
        for colour, label, is_back in ((COLOURS[2], "onwards", False), (RED, "held or taken back", True)):
            marked = [number for number, change in enumerate(changes) if (change.event in _BACK) is is_back]
            if marked:
                axes.plot(
                    [days[number] for number in marked], [shares[number] for number in marked], "o", markersize=4,
                    clip_on=False, color=colour, label=label,
                )  # fmt: skip
        for number, change in enumerate(changes):
            if change.from_bps != change.share_bps:
                place = (days[number], shares[number])
                axes.annotate(percent(change.share_bps), place, (4, 4), textcoords="offset points", fontsize=7)
        axes.set_ylim(0, 109)
        axes.set_ylabel("% of users")
        axes.set_title("Share of users with the fine-tuned model", loc="left")
        legend(axes)
        return svg(figure)


def draw_steps(steps: Sequence[Step], step_s: int, span: Span) -> bytes:
    """Success rate and mean latency of both arms, by hour or day."""
    with style():
        figure = Figure(figsize=(WIDTH_INCHES, 0.5 + 2 * _PANEL_INCHES), layout="constrained")
        success, latency = figure.add_subplot(2, 1, 1), figure.add_subplot(2, 1, 2)
        over_time([success, latency], span)
        # In the middle of the step that it is the mean of.
        days = [day(step.start_ms) + step_s / 86_400 / 2 for step in steps]
        for name, colour, slots in (
            ("fine-tuned", _TREATED, [step.treated for step in steps]),
            ("baseline", _CONTROL, [step.control for step in steps]),
        ):
            line: Any = {"color": colour, "label": name, "marker": "o", "markersize": 3, "linewidth": 1.2}
            success.plot(days, [_mean(100 * slot.answered, slot) for slot in slots], **line)
            latency.plot(days, [_mean(slot.latency_ms, slot) for slot in slots], **line)
        success.set_ylabel("success, %")
        latency.set_ylabel("mean latency, ms")
        latency.set_ylim(bottom=0)
        every = {3_600: "hour", 86_400: "day"}.get(step_s, f"{step_s // 86_400} days")
        success.set_title(f"Both arms by {every}", loc="left")
        legend(success)
        return svg(figure)


def _band(axes: Axes, metric: Metric, track: Sequence[Point]) -> None:
    found = [_effect(metric, point) for point in track]
    days = [day(point.at_ms) for point in track]
    values, lows, highs = ([_or_nan(getattr(one, field)) for one in found] for field in ("value", "low", "high"))
    axes.fill_between(days, lows, highs, color=_CONTROL, alpha=0.2, linewidth=0)
    axes.plot(days, values, color=_CONTROL, linewidth=1.4)
    axes.axhline(0, color="black", linewidth=0.7)
    limit = found[-1].limit
    if limit is not None:
        axes.axhline(limit, color=RED, linewidth=1.0, linestyle="--")
        axes.annotate(
            "guardrail", (1, limit), (2, 0), xycoords=("axes fraction", "data"), textcoords="offset points",
            fontsize=7, color=RED, va="center",
        )  # fmt: skip
    settled = [end for ends in (lows, highs) for end in ends[int(len(ends) * _SETTLED) :] if isfinite(end)]
    seen = [
        *(settled or [end for end in (*lows, *highs) if isfinite(end)]),
        0.0,
        *([limit] if limit is not None else []),
    ]
    room = 0.08 * (max(seen) - min(seen)) or 1.0
    axes.set_ylim(min(seen) - room, max(seen) + room)
    better = "up" if KINDS[metric].is_higher_better else "down"
    axes.set_ylabel(f"{LABELS[metric]}{_unit(metric, found[-1])}\n{better} is better", fontsize=8)


def _effect(metric: Metric, point: Point) -> Effect:
    """In the unit of the axis: per cent, points, ms or dollars."""
    found = effect_of(next(finding for finding in point.findings if finding.metric == metric))
    factor = 1.0
    if found.is_relative or metric == "success_rate":
        factor = 100.0
    elif metric == "cost_per_request":
        factor = 1 / NUSD_PER_USD
    ends = (None if end is None else factor * end for end in found[1:])
    return Effect(found.is_relative, *ends)


def _unit(metric: Metric, found: Effect) -> str:
    if found.is_relative:
        return ", %"
    units: dict[Metric, str] = {"success_rate": ", points", "cost_per_request": ", $", "satisfaction": ""}
    return units.get(metric, ", ms")


def _mean(total: float, slot: Slot) -> float:
    return total / slot.calls if slot.calls else nan


def _or_nan(end: float | None) -> float:
    return nan if end is None else end
