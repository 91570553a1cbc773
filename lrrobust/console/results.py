"""What runs hold, as tables, verdicts and warnings."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from lrrobust.console import streams
from lrrobust.console.streams import notice, print_table
from lrrobust.console.summary import render_table
from lrrobust.diagnostics.records import load_diagnostics, why_uncounted
from lrrobust.diagnostics.table import count_results, diagnostics_table
from lrrobust.formatting import format_count
from lrrobust.report.naming import name_runs
from lrrobust.report.notices import doubt_accuracy, warnings_with_rejections
from lrrobust.report.summary import summarise
from lrrobust.results import Run, load_run

if TYPE_CHECKING:
    import pandas as pd

    from lrrobust.data.evaluation_set import EvaluationSet
    from lrrobust.verdict.records import Verdicts


def report_subset(images: EvaluationSet) -> None:
    """Says what is evaluated, and aloud what is left out."""
    notice(f"{images.name}: {format_count(len(images), 'image')}")
    if images.copies:
        count = format_count(images.copies, "image")
        notice(f"warning: {count} of the same contents as another: intervals and tests take all for different images")
    if images.left_out_count:
        unknown, without = (_name_some(names) for names in images.left_out_classes)
        also = f"; no image has its {without}" if without else ""
        notice(f"left out: {format_count(images.left_out_count, 'image')} of classes the model does not know ({unknown}){also}")
    if images.corrupt_keys:
        count = format_count(len(images.corrupt_keys), "image")
        notice(f"skipped, as they cannot be decoded: {count}, {_name_some(images.corrupt_keys)}")


def warn_of_former(earlier: Sequence[Path]) -> None:
    """A line where an evaluation goes on with none of the runs of what seems to be the same model."""
    if earlier:
        notice(
            f"warning: a new run begins, as code or parameters of the model are not those of {earlier[-1]}: if the factory "
            "draws parameters, seed it, and the same command goes on with its run"
        )


#: Classes or images that a notice names.
_NAMED = 3


def _name_some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(map(repr, names[:_NAMED])) + more


def _print_table(runs: Sequence[Run], summary: pd.DataFrame) -> None:
    is_transfer = summary["surrogate"].notna()
    for part in (summary[~is_transfer], summary[is_transfer]):
        if len(part):
            print_table(render_table(part))
    for run in runs:
        for warning in warnings_with_rejections(run):
            notice(f"warning: {run.folder.name}: {warning}")


def print_results(folders: Sequence[Path]) -> None:
    """The tables of the runs just made, and where they are."""
    runs = [load_run(folder) for folder in folders]
    summary = summarise(runs)
    _print_table(runs, summary)
    _print_diagnostics(runs)
    for name, run in name_runs(runs).items():
        if doubt := doubt_accuracy(summary[summary["run"] == name], run.manifest["model"]["num_classes"]):
            size = run.manifest["model"]["input_size"]
            notice(f"warning: {name}: {doubt}, and is {size} the side of images that it takes (--input-size)?")
    for folder in folders:
        notice(f"results: {folder}")


def warn_of_checks(runs: Sequence[Run]) -> None:
    """A line for each run whose checks have failed, or count for nothing."""
    for run in runs:
        found = load_diagnostics(run)
        if said := why_uncounted(run) if found is None else found.doubt:
            logging.warning("%s: %s", run.folder, said)


def _print_diagnostics(runs: Sequence[Run]) -> None:
    for name, run in name_runs(runs).items():
        found = diagnostics_table({name: run})
        if not found.rows:
            continue
        table = Table(title=f"did the attacks work? {escape(name)}")
        # The run is in the title.
        for column in found.columns[1:]:
            table.add_column(column.heading)
        for row in found.rows:
            table.add_row(*(escape(cell.text) for cell in row[1:]))
        print_table(table)
        streams.tables.print(f"{count_results(found)}\n", markup=False, highlight=False)


def print_verdicts(verdicts: Verdicts) -> None:
    """Each verdict with its reasons, and the claims that could not be judged."""
    for result in verdicts.results:
        pairing = result.pairing
        streams.tables.print(f"{result.verdict.upper()}: {result.claim.statement}", markup=False, style="bold")
        streams.tables.print(
            f"({result.claim.name}, {pairing.dataset}, {format_count(pairing.n, 'image')}, {result.claim.treatment} against "
            f"{result.claim.control})",
            markup=False,
            highlight=False,
        )
        for reason in result.reasons:
            streams.tables.print(f"* {reason}", markup=False, highlight=False, soft_wrap=not streams.tables.is_terminal)
        streams.tables.print()
    for unjudged in verdicts.not_judged:
        notice(f"claim {unjudged.claim} not judged: {unjudged.reason}")


def print_report(
    runs: Sequence[Run], summary: pd.DataFrame, written: Sequence[Path], removed: Sequence[Path] = (), kept: Sequence[Path] = ()
) -> None:
    """The table of all runs, which is their summary, and the files written, removed, and kept under another name."""
    _print_table(runs, summary)
    for path in written:
        notice(f"wrote {path}")
    for path in removed:
        notice(f"removed {path}, which an earlier report wrote of what is no longer in this one")
    for path in kept:
        notice(f"kept {path}: no report wrote it, or it was changed since")
