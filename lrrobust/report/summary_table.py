"""A summary -> the table that people read, in a terminal, in files and on the page; and how to read it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from lrrobust.formatting import (
    format_distance,
    format_duration,
    format_eps,
    format_interval,
    format_passes,
    format_percent,
)
from lrrobust.report.naming import name_attack
from lrrobust.tables import Cell, Column, Table

#: What the numbers of a summary mean.
HOW_TO_READ = (
    "Accuracies in percent of all images; an image misclassified without attack counts as broken. Intervals are 95 % Wilson "
    "intervals. Distances are medians over the images correct when clean, a failed attack counting as infinite. Passes are "
    "forward + backward passes through the network, the mean of what was spent on an image up to that eps. Time is what was "
    "spent at that eps alone; that of an attack which looks for the nearest adversarial image stands at eps any."
)

#: What rows of infinite eps mean, where there are any.
HOW_TO_READ_ANY = "eps any: what attacks that look for the nearest adversarial image broke at whatever distance."

#: What the column of rounded images means, where there is one.
HOW_TO_READ_QUANTIZED = (
    "8-bit: an image counts as broken once its adversarial image still fools the model when rounded to 8 bits inside ball "
    "and box, at the size that the model takes. The attacks do not know of the rounding: an upper bound."
)

#: What the mark of `name_attack` means.
HOW_TO_READ_CUMULATIVE = (
    "† attacked only what earlier attacks of its suite left standing: its robust accuracy counts what any of them broke."
)

#: What the balanced columns mean, where there are any.
HOW_TO_READ_BALANCED = (
    "Balanced: the mean of the classes' accuracies, as some classes have many more images here than others; intervals are "
    "put together from Wilson intervals of the classes with as many images."
)

#: Headings that are left out where no row has anything to say under them.
_OPTIONAL_HEADINGS = ("images made on", "balanced clean %", "balanced %", "balanced 95 % CI", "8-bit robust %")

#: Share of the images that those of even classes would make up before classes count as uneven.
_EVEN_SHARE = 2 / 3

#: What a row is of.
IDENTITY_HEADINGS = ("dataset", "model", "weights", "run")

#: Names of any length.
NAME_HEADINGS = {*IDENTITY_HEADINGS, "images made on"}

TEXT_HEADINGS = {*NAME_HEADINGS, "attack", "norm"}

#: Heading -> the column that a table is sorted by; other columns sort by what they show.
_SORT_COLUMNS = {
    "balanced clean %": "balanced_clean_accuracy",
    "balanced %": "balanced_robust_accuracy",
    "balanced 95 % CI": "balanced_ci_low",
    "eps": "eps",
    "n": "n",
    "clean %": "clean_accuracy",
    "robust %": "robust_accuracy",
    "95 % CI": "ci_low",
    "8-bit robust %": "robust_accuracy_quantized",
    "median distance": "median_distance",
    "time": "wall_s",
    "passes": "forward_passes",
}


def how_to_read(summary: pd.DataFrame) -> list[str]:
    """What a reader of the table of a summary must know, in paragraphs."""
    texts = [HOW_TO_READ]
    if (summary["eps"] == math.inf).any():
        texts.append(HOW_TO_READ_ANY)
    if summary["is_cumulative"].any():
        texts.append(HOW_TO_READ_CUMULATIVE)
    if (summary["effective_n"] < _EVEN_SHARE * summary["n"]).any():
        texts.append(HOW_TO_READ_BALANCED)
    if summary["robust_accuracy_quantized"].notna().any():
        texts.append(HOW_TO_READ_QUANTIZED)
    return texts


def summary_table(summary: pd.DataFrame) -> Table:
    """The summary of one dataset as people read it, see `format_row`."""
    rows = [(record, format_row(record)) for record in summary.to_dict("records")]
    hidden = {"dataset", *unused_headings([texts for _, texts in rows])}
    shown = [heading for heading in (rows[0][1] if rows else ()) if heading not in hidden]
    return Table(
        [Column(heading, heading in TEXT_HEADINGS) for heading in shown],
        [
            [Cell(texts[name], float(record[_SORT_COLUMNS[name]]) if name in _SORT_COLUMNS else texts[name]) for name in shown]
            for record, texts in rows
        ],
    )


def format_row(row: Mapping[str, Any]) -> dict[str, str]:
    """A row of a summary as people read it: heading -> text, accuracies in percent.

    An asterisk after n marks a run that is not complete.

    >>> format_row({"model": "lrnet", "weights": None, "dataset": "sample", "attack": "pgd", "norm": "linf",
    ...     "eps": 0.5 / 255, "n": 1000, "clean_accuracy": 0.76, "robust_accuracy": 0.5, "ci_low": 0.469,
    ...     "ci_high": 0.531, "balanced_clean_accuracy": 0.7, "balanced_robust_accuracy": 0.5, "balanced_ci_low": 0.4,
    ...     "balanced_ci_high": 0.6, "effective_n": 950.0, "is_cumulative": False, "surrogate": None,
    ...     "robust_accuracy_quantized": float("nan"), "median_distance": float("inf"), "wall_s": 75.0,
    ...     "forward_passes": 20.0, "backward_passes": 20.0, "is_complete": True, "run": "first"})["eps"]
    '0.5/255'
    """
    quantized = row["robust_accuracy_quantized"]
    return {
        "model": row["model"],
        "weights": "-" if pd.isna(row["weights"]) or not row["weights"] else row["weights"],
        "images made on": "-" if pd.isna(row["surrogate"]) else row["surrogate"],
        "dataset": row["dataset"],
        "attack": name_attack(row["attack"], row["is_cumulative"]),
        "norm": row["norm"],
        "eps": format_eps(row["eps"], row["norm"]),
        "n": f"{row['n']}" if row["is_complete"] else f"{row['n']}*",
        "clean %": format_percent(row["clean_accuracy"]),
        "robust %": format_percent(row["robust_accuracy"]),
        "95 % CI": format_interval(row["ci_low"], row["ci_high"]),
        "balanced clean %": _unless_even(row, format_percent(row["balanced_clean_accuracy"])),
        "balanced %": _unless_even(row, format_percent(row["balanced_robust_accuracy"])),
        "balanced 95 % CI": _unless_even(row, format_interval(row["balanced_ci_low"], row["balanced_ci_high"])),
        "8-bit robust %": "-" if pd.isna(quantized) else format_percent(quantized),
        "median distance": format_distance(row["median_distance"], row["norm"]),
        "time": format_duration(row["wall_s"]),
        "passes": format_passes(row["forward_passes"], row["backward_passes"]),
        "run": row["run"],
    }


def _unless_even(row: Mapping[str, Any], text: str) -> str:
    """Where images are spread evenly over classes, balanced accuracy says nothing that plain accuracy does not."""
    return text if row["effective_n"] < _EVEN_SHARE * row["n"] else "-"


def unused_headings(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """Headings under which none of these rows, which `format_row` made, has anything to say."""
    return [heading for heading in _OPTIONAL_HEADINGS if all(row[heading] == "-" for row in rows)]
