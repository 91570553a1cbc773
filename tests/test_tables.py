import math

import pytest

from lrrobust.tables import Cell, Column, Table, to_latex, to_markdown

TABLE = Table(
    [Column("model", is_text=True), Column("robust %")],
    [[Cell("a|b_c", "a|b_c"), Cell("50.0", 0.5)], [Cell("[x]\\", "x"), Cell("inf", math.inf)]],
)


def test_markdown():
    assert to_markdown(TABLE) == ["| model | robust % |", "| :-- | --: |", "| a\\|b_c | 50.0 |", "| [x]\\ | inf |"]


def test_latex_typesets_every_character_as_it_is():
    lines = to_latex(TABLE, "50 % of $x$").splitlines()
    assert r"\begin{longtable}{lr}" in lines and r"\caption{50 \% of \$x\$} \\" in lines
    assert lines.count(r"model & robust \% \\") == 2
    assert lines[-3:-1] == [r"a\textbar{}b\_c & 50.0 \\", r"{[}x]\textbackslash{} & inf \\"]


def test_rows_fit_the_columns():
    with pytest.raises(ValueError, match="expected 1 cells in every row, row 0 has 2"):
        Table([Column("n")], [[Cell("1", 1), Cell("2", 2)]])
