"""Tables as people read them: one model, written as Markdown, LaTeX or HTML by whoever shows it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Cell(NamedTuple):
    """What is shown, and what the column is sorted by: a number, infinity included, or a text."""

    text: str
    value: float | str


@dataclass(frozen=True)
class Column:
    """Heading of a column, and whether it holds text (left-aligned) or numbers (right-aligned)."""

    heading: str
    is_text: bool = False


@dataclass(frozen=True)
class Table:
    """Rows of as many cells as there are columns."""

    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]

    def __post_init__(self) -> None:
        for place, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ValueError(f"expected {len(self.columns)} cells in every row, row {place} has {len(row)}")


def to_markdown(table: Table) -> list[str]:
    """Lines of a Markdown table."""
    headings = [column.heading for column in table.columns]
    rule = [":--" if column.is_text else "--:" for column in table.columns]
    rows = [[cell.text for cell in row] for row in table.rows]
    escaped = [[text.replace("|", "\\|") for text in line] for line in (headings, rule, *rows)]
    return [f"| {' | '.join(line)} |" for line in escaped]


def to_latex(table: Table, caption: str) -> str:
    """A `longtable`, which may run over pages; needs the packages longtable and booktabs."""
    layout = "".join("l" if column.is_text else "r" for column in table.columns)
    headings = _latex_row(column.heading for column in table.columns)
    lines = [
        "% \\usepackage{booktabs,longtable}",
        f"\\begin{{longtable}}{{{layout}}}",
        f"\\caption{{{escape_latex(caption)}}} \\\\",
        "\\toprule",
        headings,
        "\\midrule",
        "\\endfirsthead",
        "\\toprule",
        headings,
        "\\midrule",
        "\\endhead",
        "\\bottomrule",
        "\\endfoot",
        *(_latex_row(cell.text for cell in row) for row in table.rows),
        "\\end{longtable}",
    ]
    return "\n".join(lines) + "\n"


_LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    # Line breaks would end a row's source line; between cells they mean nothing.
    "\n": " ",
    # A row that begins with [ would be read as the argument of the \\ before it.
    "[": "{[}",
    # One that begins with * for its starred form.
    "*": "{*}",
    **{character: f"\\{character}" for character in "&%$#_"},
}


def escape_latex(text: str) -> str:
    r"""Text that LaTeX typesets as it is.

    >>> print(escape_latex("lr_resnet50 50 % {x}"))
    lr\_resnet50 50 \% \{x\}
    """
    return "".join(_LATEX.get(character, character) for character in text)


def _latex_row(texts) -> str:
    return " & ".join(map(escape_latex, texts)) + r" \\"
