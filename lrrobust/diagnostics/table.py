"""What was found out about runs, as people read it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from lrrobust.diagnostics.records import load_diagnostics, why_uncounted
from lrrobust.results import Run
from lrrobust.tables import Cell, Column, Table

#: What the table is about, and how a result reads.
HOW_TO_READ = (
    "Checks of whether the attacks worked, on each run's rows and on images that were attacked once more: a failed attack "
    "makes a model look robust, so a failed check withholds the verdict that would rest on it."
)

RESULTS = {True: "passed", False: "FAILED", None: "not known"}

_HEADINGS = ("run", "check", "attack", "result", "what was found")


def diagnostics_table(runs: Mapping[str, Run]) -> Table:
    """A row for each check of each run that was looked into, one for a run whose file counts as none; else without rows.

    Args:
        runs: name to show -> run.
    """
    rows = []
    for name, run in runs.items():
        found = load_diagnostics(run)
        for result in found.results if found is not None else ():
            texts = (name, result.name.replace("_", " "), result.attack or "-", RESULTS[result.passed], result.detail)
            rows.append([Cell(text, text) for text in texts])
        said = why_uncounted(run)
        if said is not None:
            rows.append([Cell(text, text) for text in (name, "all", "-", RESULTS[None], f"{said[0].upper()}{said[1:]}.")])
    return Table([Column(heading, is_text=True) for heading in _HEADINGS], rows)


def count_results(table: Table) -> str:
    """What the checks of `diagnostics_table` come to, in one line.

    >>> row = [Cell(text, text) for text in ("first", "noise", "pgd", "passed", "...")]
    >>> count_results(Table([Column(heading) for heading in _HEADINGS], [row, row]))
    'all checks passed (2)'
    """
    found = Counter(row[_HEADINGS.index("result")].text for row in table.rows)
    if len(found) == 1 and RESULTS[True] in found:
        return f"all checks passed ({found.total()})"
    counts = ", ".join(f"{found[result]} {result}" for result in RESULTS.values() if found[result])
    doubt = (
        ": robust accuracies may be too high; --suite strong (strong_l2, strong_l1) finds more, and --suite "
        "blackbox needs no gradients"
        if found[RESULTS[False]]
        else ""
    )
    return f"checks: {counts}{doubt}"
