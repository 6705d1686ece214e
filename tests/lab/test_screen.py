"""Names stand left and figures right; nothing is cut, and nothing is taken for markup."""

from io import StringIO

from rich.console import Console

from gateway.lab.screen import add_row, say, table_of


def screen_of(width: int) -> tuple[Console, StringIO]:
    paper = StringIO()
    return Console(file=paper, width=width, highlight=False), paper


def test_names_and_words_stand_left_and_figures_right() -> None:
    table = table_of("agent", "usd", "note", names=1, words={"note"})
    assert [column.justify for column in table.columns] == ["left", "right", "left"]


def test_figures_and_what_is_whole_are_not_wrapped_where_names_are() -> None:
    screen, paper = screen_of(30)
    table = table_of("name", "at", "usd", names=2, whole={"at"})
    add_row(table, "a-long-name-of-an-agent", "2026-11-21", "1.234567891")
    screen.print(table)
    lines = paper.getvalue().splitlines()
    assert any("2026-11-21" in line and "1.234567891" in line for line in lines)
    assert not any("a-long-name-of-an-agent" in line for line in lines)
    assert "…" not in paper.getvalue()


def test_brackets_are_not_markup() -> None:
    screen, paper = screen_of(80)
    table = table_of("name", names=1)
    add_row(table, "[red]x[/red]")
    screen.print(table)
    say(screen, "[link=a]b[/link]")
    assert "[red]x[/red]" in paper.getvalue()
    assert "[link=a]b[/link]" in paper.getvalue()


def test_a_sentence_is_not_broken() -> None:
    screen, paper = screen_of(20)
    say(screen, "word " * 20)
    assert len(paper.getvalue().splitlines()) == 1
