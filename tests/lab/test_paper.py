"""What plots share: the same drawing is the same bytes, and a name is drawn as it is."""

import pytest
from matplotlib.figure import Figure

from gateway.domain.spans import Span
from gateway.lab.paper import day, legend, over_time, short, style, svg
from tests.ledgers import DAY_MS, NOON_MS


def drawing(label: str = "all") -> bytes:
    with style():
        figure = Figure(figsize=(4, 2), layout="constrained")
        axes = figure.add_subplot()
        over_time([axes], Span(NOON_MS - DAY_MS, NOON_MS))
        axes.plot([day(NOON_MS - DAY_MS), day(NOON_MS)], [0, 1], label=label)
        legend(axes)
        return svg(figure)


def test_the_same_drawing_gives_the_same_bytes_and_no_date() -> None:
    first = drawing()
    assert first == drawing()
    assert first != drawing("some")
    assert b"<dc:date>" not in first
    assert b"Matplotlib" not in first


def test_an_instant_has_its_place_in_days() -> None:
    assert day(NOON_MS + DAY_MS) - day(NOON_MS) == 1


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("qa_agent", "qa_agent"),
        ("_hidden", " _hidden"),
        ("中文", "??"),
        ("a" * 30 + "b" * 30, "a" * 19 + "..." + "b" * 22),
    ],
)
def test_a_name_that_is_too_long_or_strange_is_made_to_fit(name: str, shown: str) -> None:
    assert short(name) == shown
