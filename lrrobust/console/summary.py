"""A summary as a table for a terminal."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

import pandas as pd
from rich.markup import escape
from rich.table import Table

from lrrobust.console.streams import FOLDED_WIDTH
from lrrobust.report.summary_table import (
    HOW_TO_READ_ANY,
    HOW_TO_READ_CUMULATIVE,
    IDENTITY_HEADINGS,
    NAME_HEADINGS,
    TEXT_HEADINGS,
    format_row,
    unused_headings,
)

#: Columns that a terminal has no room for.
_FOR_FILES = ("passes", "balanced clean %", "balanced 95 % CI")


def render_table(summary: pd.DataFrame) -> Table:
    """The summary for a terminal, names folded where it is narrow, numbers never; unfinished runs are named below it."""
    rows = [format_row(row) for row in summary.to_dict("records")]
    # What all rows share goes above the table, which is wide enough without.
    shared = [name for name in IDENTITY_HEADINGS[:-1] if len({row[name] for row in rows}) == 1]
    title = ", ".join(f"{name} {rows[0][name]}" for name in shared)
    if len(summary) and summary["surrogate"].notna().all():
        title = ", ".join(filter(None, ("images made on other models", title)))
    unfinished = dict.fromkeys(row["run"] for row in rows if row["n"].endswith("*"))
    captions = [f"* incomplete, only the images finished so far: {', '.join(unfinished)}"] if unfinished else []
    captions += [HOW_TO_READ_ANY] if (summary["eps"] == math.inf).any() else []
    captions += [HOW_TO_READ_CUMULATIVE] if summary["is_cumulative"].any() else []
    caption = "\n".join(captions)
    table = Table(padding=0, title=escape(title) or None, caption=escape(caption) or None)
    # Folder names are long; only runs that nothing else tells apart need theirs, and its end where that suffices.
    identities = {(row["dataset"], row["model"], row["weights"], row["images made on"]) for row in rows}
    needs_run = len({row["run"] for row in rows}) > len(identities)
    short = _shorten({row["run"] for row in rows})
    # What would make it wider than a terminal, files and the page have.
    hidden = {*shared, *_FOR_FILES, *unused_headings(rows), *(() if needs_run else ("run",))}
    shown = [heading for heading in (rows[0] if rows else ()) if heading not in hidden]
    columns = {heading: [short[row["run"]] if heading == "run" else row[heading] for row in rows] for heading in shown}
    for heading, texts in columns.items():
        # Headings on two lines: most tables fit a terminal of 80 columns.
        lines = [part for part in heading.rpartition(" ")[::2] if part]
        is_name = heading in NAME_HEADINGS
        widest = max(map(len, [*lines, *texts]))
        table.add_column(
            "\n".join(lines),
            justify="left" if heading in TEXT_HEADINGS else "right",
            no_wrap=not is_name,
            overflow="fold",
            min_width=min(widest, FOLDED_WIDTH) if is_name else widest,
        )
    for texts in zip(*columns.values(), strict=True):
        table.add_row(*map(escape, texts))
    return table


def _shorten(runs: Iterable[str]) -> dict[str, str]:
    """Runs -> the fingerprints that end the names `eval` gives their folders, where these tell all apart."""
    ends = {run: found[1] for run in runs if (found := re.search(r"-([0-9a-f]{10})$", run))}
    return ends if len(set(ends.values())) == len(set(runs)) else {run: run for run in runs}
