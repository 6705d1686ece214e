"""Plots of an experiment: valid SVG, the same bytes for the same figures, and no end drawn that is not known."""

from xml.etree import ElementTree

from gateway.domain.experiment import METRICS, Finding, Guardrail
from gateway.domain.rollout import Change, Event, Phase
from gateway.domain.spans import Span
from gateway.lab.ab_arms import Slot, Step
from gateway.lab.ab_charts import draw_intervals, draw_share, draw_steps, metrics_with_bands
from gateway.lab.ab_figures import Point
from tests.ledgers import DAY_MS, NOON_MS

SPAN = Span(NOON_MS, NOON_MS + 5 * DAY_MS)
NONE = tuple(Finding(metric, "too few", "none") for metric in METRICS)


def texts(svg: bytes) -> list[str]:
    """What can be read in a plot."""
    root = ElementTree.fromstring(svg)
    return ["".join(found.itertext()).strip() for found in root.iter("{http://www.w3.org/2000/svg}text")]


def point(day: int, half: float | None) -> Point:
    known = Finding("success_rate", "undecided", "holds", guardrail=Guardrail("success_rate", 0.02))
    value = known._replace(treated=0.95, control=0.94, difference=0.01)
    if half is not None:
        value = value._replace(low=0.01 - half, high=0.01 + half)
    return Point(NOON_MS + day * DAY_MS, (value, *NONE[1:]))


def change(day: int, event: Event, before: int, after: int) -> Change:
    return Change(
        agent="qa_agent", version=day + 1, at_ms=NOON_MS + day * DAY_MS, by="pilot", event=event,
        from_phase=Phase.RAMPING, phase=Phase.RAMPING, from_bps=before, share_bps=after, experiment=1, why="",
        reasons=("r",), evidence="",
    )  # fmt: skip


TRACK = [Point(NOON_MS, NONE), point(1, None), point(2, 0.04), point(3, 0.03), point(5, 0.02)]
STORY = [
    change(0, Event.BEGAN, 0, 1_000),
    change(2, Event.RAISED, 1_000, 2_500),
    change(4, Event.ROLLED_BACK, 2_500, 0),
]
STEPS = [
    Step(NOON_MS, Slot(10, 9, 9_000.0), Slot(20, 20, 9_000.0)),
    Step(NOON_MS + DAY_MS, Slot(), Slot(5, 4, 1_000.0)),
]


def test_the_same_figures_give_the_same_bytes() -> None:
    for draw in (
        lambda: draw_intervals(TRACK, STORY, SPAN),
        lambda: draw_share(STORY, SPAN.until_ms),
        lambda: draw_steps(STEPS, 86_400, SPAN),
    ):
        assert draw() == draw()
    assert draw_share(STORY, SPAN.until_ms) != draw_share(STORY[:2], SPAN.until_ms)


def test_only_metrics_with_an_interval_have_a_panel() -> None:
    assert metrics_with_bands(TRACK) == ["success_rate"]
    assert metrics_with_bands(TRACK[:2]) == []
    shown = texts(draw_intervals(TRACK, STORY, SPAN))
    assert {"success rate, points", "guardrail", "up is better"} <= set(shown)
    assert not [text for text in shown if "latency" in text or "cost" in text]


def test_before_anything_is_known_there_is_still_a_drawing() -> None:
    assert ElementTree.fromstring(draw_intervals(TRACK[:2], [], SPAN)) is not None


def test_the_share_is_drawn_with_each_change_of_the_log() -> None:
    shown = texts(draw_share(STORY, SPAN.until_ms))
    assert {"10 %", "25 %", "0 %", "onwards", "held or taken back"} <= set(shown)
    assert "held or taken back" not in texts(draw_share(STORY[:2], SPAN.until_ms))
    mismatched = change(3, Event.MISMATCHED, 2_500, 2_500)
    assert "held or taken back" in texts(draw_share([*STORY[:2], mismatched], SPAN.until_ms))


def test_both_arms_are_drawn_by_hour_or_by_day() -> None:
    shown = texts(draw_steps(STEPS, 86_400, SPAN))
    assert {"Both arms by day", "fine-tuned", "baseline", "success, %", "mean latency, ms"} <= set(shown)
    assert "Both arms by hour" in texts(draw_steps(STEPS, 3_600, SPAN))
