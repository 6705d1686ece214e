"""Pieces of Markdown: names that stay names, and files that are whole or not there."""

from pathlib import Path

import pytest

from gateway.lab.markdown import Plot, cell, code, image, plots_of, prose, put, table

PLOT = Plot("a-share.svg", "what | it shows", b"<svg/>")


def test_a_table_has_its_names_to_the_left_and_its_figures_to_the_right() -> None:
    assert table(["agent", "usd"], [["a", "1"]], names=1) == "| agent | usd |\n| :-- | --: |\n| a | 1 |"


@pytest.mark.parametrize(
    ("text", "shown"), [("a|b`c\nd", "`a\\|b'c d`"), ("", "`-`"), ("<b>", "`<b>`"), ("qa_agent", "`qa_agent`")]
)
def test_a_name_is_only_a_name(text: str, shown: str) -> None:
    assert code(text) == shown


def test_a_sentence_keeps_its_code_and_is_no_html_no_link_and_no_other_line() -> None:
    said = prose("run `gateway rollout rearm` <img src=x> [here](http://x) **now**\n# up | down")
    assert said == "run `gateway rollout rearm` &lt;img src=x> \\[here](http://x) \\*\\*now\\*\\* # up \\| down"
    assert cell("a\tb\r\nc") == "a b  c"


def test_a_report_is_written_with_its_plots_and_those_of_before_are_gone(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "report.md"
    assert put(out, "first", [PLOT], ours=["*-share.svg"]) == [out, tmp_path / "deep" / "report" / "a-share.svg"]
    (tmp_path / "deep" / "report" / "own-notes.svg").write_text("somebody's own")
    assert image(PLOT, "report") == "![what \\| it shows](report/a-share.svg)"
    put(out, "second", [], ours=["*-share.svg"])
    assert out.read_text() == "second"
    assert sorted(path.name for path in (tmp_path / "deep").rglob("*.*")) == ["own-notes.svg", "report.md"]


def test_a_report_without_plots_makes_no_folder_for_them(tmp_path: Path) -> None:
    put(tmp_path / "report.md", "text", [], ours=["*.svg"])
    assert [path.name for path in tmp_path.iterdir()] == ["report.md"]


def test_a_report_whose_name_has_no_suffix_is_no_obstacle_to_its_own_plots(tmp_path: Path) -> None:
    out = tmp_path / "results"
    assert plots_of(out) == tmp_path / "results-plots"
    for text in ("first", "second"):
        assert put(out, text, [PLOT], ours=["*.svg"]) == [out, tmp_path / "results-plots" / "a-share.svg"]
        assert out.read_text() == text


def test_what_cannot_be_written_is_an_error_and_leaves_the_report_of_before(tmp_path: Path) -> None:
    out = tmp_path / "report.md"
    put(out, "first", [], ours=[])
    (tmp_path / "report").write_text("a file where the plots belong")
    with pytest.raises(FileExistsError):
        put(out, "second", [PLOT], ours=[])
    assert out.read_text() == "first"
