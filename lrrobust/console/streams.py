"""Where the command line shows things: results on standard output, what accompanies them on standard error."""

from __future__ import annotations

import sys

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

#: Without a terminal nothing is wrapped or cut: files and logs scroll, and programs read lines.
_UNBOUNDED_WIDTH = 100_000

#: The longest line under headings there: what is written in a column may be far longer.
_RULE_WIDTH = 128

#: The narrowest that a column of texts is folded to, where it says nothing else.
FOLDED_WIDTH = 10


class _Console(Console):
    def on_broken_pipe(self) -> None:
        # rich would end the process; whoever calls a command decides what becomes of it.
        raise


# Without emoji: `file.py:b:` names a model.
tables = _Console(width=None if sys.stdout.isatty() else _UNBOUNDED_WIDTH, emoji=False)
notices = _Console(stderr=True, emoji=False)


def be_quiet() -> None:
    """From now on nothing is shown: another process shows it for all."""
    tables.quiet = notices.quiet = True


def notice(text: str) -> None:
    """One line on standard error, as it is."""
    notices.print(text, markup=False, highlight=False, soft_wrap=True)


def print_table(table: Table) -> None:
    """A table on standard output, all in one style; on a terminal too narrow for it texts are folded, and no number is cut."""
    table.box, table.show_edge, table.pad_edge = box.SIMPLE, False, False
    table.title_justify = table.caption_justify = "left"
    for column in table.columns:
        column.overflow = "fold"
        # For the measurement alone: long words are folded, too.
        column.max_width = None if column.no_wrap else column.min_width or FOLDED_WIDTH
    least = Measurement.get(tables, tables.options.update(width=_UNBOUNDED_WIDTH), table).minimum
    for column in table.columns:
        column.max_width = None
    if tables.width < least:
        # rich would take whole columns away.
        table.width = least
    if tables.is_terminal:
        tables.print(table, crop=False)
        return
    # Of texts of all lengths in one column, the longest would fill up all others with blanks.
    with tables.capture() as captured:
        tables.print(table, crop=False)
    for line in captured.get().splitlines():
        line = line if line.strip("─") else line[:_RULE_WIDTH]
        tables.print(line.rstrip(), markup=False, highlight=False, soft_wrap=True)
