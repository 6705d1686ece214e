"""What is shown on a terminal, in pieces: tables of names and figures, and lines between them.

The invariant: a text from outside is shown as it is, whatever it looks like, and a figure is never cut.
"""

from collections.abc import Collection

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text


def table_of(*columns: str, names: int, words: Collection[str] = (), whole: Collection[str] = ()) -> Table:
    """A table whose first columns are names, and the others figures but for `words`. What is `whole` is not wrapped."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for index, column in enumerate(columns):
        is_figure = index >= names and column not in words
        table.add_column(
            column, justify="right" if is_figure else "left", overflow="fold", no_wrap=is_figure or column in whole
        )
    return table


def add_row(table: Table, *cells: object, style: str = "") -> None:
    """A line of it."""
    # As Text: names may hold brackets, which are markup elsewhere.
    table.add_row(*(Text(str(cell)) for cell in cells), style=style)


def say(screen: Console, text: str) -> None:
    """A line of text, which the terminal may wrap."""
    screen.print(text, markup=False, soft_wrap=True)
