"""Names, notices and tables as they are shown."""

import io

import pytest
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lrrobust.console import streams

NAME = "m.py:b: [red]x[/red]"


def test_notices_and_tables_show_names_as_they_are(capsys):
    # To rich, `:b:` is an emoji and [red] a colour.
    streams.notice(NAME)
    streams.tables.print(NAME, markup=False)
    shown = capsys.readouterr()
    assert (shown.err, shown.out) == (f"{NAME}\n", f"{NAME}\n")


def test_tables_are_whole_without_a_terminal(capsys):
    streams.print_table(Table("a" * 300, "b" * 300))
    assert "b" * 300 in capsys.readouterr().out


def test_without_a_terminal_no_row_is_filled_up_with_blanks(capsys):
    table = Table("name", "what it is")
    table.add_row("long", "word " * 60)
    table.add_row("short", escape("one [word]"))
    streams.print_table(table)
    shown = capsys.readouterr().out.splitlines()
    assert shown[-1].split() == ["short", "one", "[word]"] and not any(line.endswith(" ") for line in shown)
    # Nor is the rule below the headings as long as the longest text.
    assert shown[1] == 128 * "─" and shown[2].endswith("word word")


@pytest.mark.parametrize("width", [20, 60])
def test_tables_lose_nothing_on_a_narrow_terminal(width, monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr(streams, "tables", Console(file=shown, width=width))
    table = Table("name", "n")
    table.columns[1].no_wrap, table.columns[1].min_width = True, 8
    table.add_row("model" * 20, "12345678")
    streams.print_table(table)
    text = shown.getvalue()
    assert (
        text.count("m") + text.count("o") + text.count("d") + text.count("l") == 81 and "12345678" in text and "…" not in text
    )
