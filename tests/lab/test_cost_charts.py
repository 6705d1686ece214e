"""Plots: valid SVG, the same bytes for the same figures, and nothing of a name taken for anything but a name."""

from xml.etree import ElementTree

import pytest

from gateway.domain.spans import Span
from gateway.lab.cost_charts import draw_cap, draw_shares, draw_spend
from gateway.lab.cost_figures import Curve
from gateway.store.ledger import Series
from tests.ledgers import DAY_MS, NOON_MS, USD

SPAN = Span(NOON_MS - 3 * DAY_MS, NOON_MS)
STARTS = [SPAN.since_ms + day * DAY_MS for day in range(3)]
NASTY = '<script>alert("1")</script> $x^2$ & _hidden \u4e2d\U0001f600'


def texts(svg: bytes) -> list[str]:
    """What can be read in a plot."""
    root = ElementTree.fromstring(svg)
    return ["".join(found.itertext()).strip() for found in root.iter("{http://www.w3.org/2000/svg}text")]


def spend(groups: dict[str, list[int]]) -> bytes:
    return draw_spend(Series(STARTS, groups), 86_400, SPAN, "agent")


def cap(lines: dict[str, list[tuple[int, int]]], warn_at: tuple[float, ...] = (0.25, 0.5, 1.0)) -> bytes:
    return draw_cap(Curve("global 20.00 usd per day", 20 * USD, warn_at, lines), SPAN)


def test_the_same_figures_give_the_same_bytes() -> None:
    for draw in (
        lambda: spend({"qa_agent": [1, 2, 3]}),
        lambda: draw_shares([("a", USD)], "model"),
        lambda: cap({"all": [(STARTS[0], 0), (STARTS[1], USD)]}),
    ):
        first = draw()
        assert first == draw()
        assert b"<dc:date>" not in first
    assert spend({"qa_agent": [1, 2, 3]}) != spend({"qa_agent": [1, 2, 4]})


def test_a_plot_says_what_it_shows() -> None:
    assert {"Spend per day by agent", "qa_agent", "legal_agent", "dollars"} <= set(
        texts(spend({"qa_agent": [USD, 0, 0], "legal_agent": [0, USD, 0]}))
    )
    assert {"Spend by model", "mistral/small", "1.50"} <= set(
        texts(draw_shares([("mistral/small", 3 * USD // 2)], "model"))
    )
    shown = texts(cap({"all": [(STARTS[0], 0), (STARTS[1], USD)]}))
    assert {"global 20.00 usd per day", "limit 20.00", "all", "25%", "50%"} <= set(shown)
    # The last threshold is the limit itself.
    assert "100%" not in shown


def test_more_agents_than_colours_are_summed_up() -> None:
    names = [f"agent-{n}" for n in range(12)]
    shown = texts(spend({name: [12 - n, 0, 0] for n, name in enumerate(names)}))
    assert [name for name in names if name in shown] == names[:7]
    assert "others" in shown


def test_names_are_only_names() -> None:
    for svg in (spend({NASTY: [1, 2, 3]}), draw_shares([(NASTY, USD)], "model"), cap({NASTY: [(STARTS[0], 1)]})):
        assert b"<script" not in svg
        assert any("$x^2$" in text for text in texts(svg))


def test_two_long_names_with_the_same_beginning_are_two() -> None:
    names = [f"mistral/ft:open-mistral-7b:5010731d:20251031:{agent}" for agent in ("qa_agent", "legal_agent")]
    shown = texts(draw_shares([(name, USD) for name in names], "model"))
    assert sum("qa_agent" in text for text in shown) == sum("legal_agent" in text for text in shown) == 1


@pytest.mark.parametrize("name", ["_hidden", ""])
def test_no_name_is_left_out_of_a_legend(name: str) -> None:
    assert any(text == (name or "-") for text in texts(spend({name: [1, 0, 0]})))


def test_a_cap_that_nobody_has_touched_is_drawn() -> None:
    assert "limit 20.00" in texts(cap({}))
