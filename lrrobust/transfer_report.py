"""Transfer as people read it: the matrix of sources and targets, and whether it speaks of masked gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lrrobust.formatting import format_eps
from lrrobust.results import Run, write_file
from lrrobust.tables import Cell, Column, Table, to_latex, to_markdown
from lrrobust.transfer import ANY_SOURCE, TransferTest, compare_with_white_box, find_masking, transfer_matrix

#: What the table shows.
HOW_TO_READ_TRANSFER = (
    "Robust accuracy in percent of the model that judges (columns) against images made on another (rows); an image "
    "misclassified without attack counts as broken. Where both are the same model, the attack is white-box. "
    f"'{ANY_SOURCE}' is the worst case over the sources of a column, transfer included; no other table or figure mixes them."
)


@dataclass(frozen=True)
class TransferFinding:
    """Whether images of other models break more of a target than its own attacks.

    Attributes:
        target: what the runs' manifests say of it.
        passed: nowhere significantly more.
        detail: one sentence with the numbers.
    """

    target: Mapping[str, Any]
    passed: bool
    detail: str


def find_transfer(runs: Sequence[Run]) -> list[TransferFinding]:
    """One finding for each target that was evaluated both white-box and with images of another model.

    Raises:
        StoreError: a manifest does not say what was evaluated.
    """
    by_target: list[list[TransferTest]] = []
    for test in compare_with_white_box(runs):
        found = next((tests for tests in by_target if tests[0].target == test.target), None)
        if found is None:
            by_target.append(found := [])
        found.append(test)
    return [_judge(tests) for tests in by_target]


def _judge(tests: Sequence[TransferTest]) -> TransferFinding:
    masking = find_masking(tests)
    shown = masking or min(tests, key=lambda test: (test.p_value, test.white_box_only - test.transfer_only))
    target, where = shown.target["name"], f"at {shown.norm} eps {format_eps(shown.eps, shown.norm)}"
    numbers = (
        f"{where}, images made on {shown.surrogate['name']} break {shown.transfer_only} of {shown.n} images that no attack on "
        f"{target} itself breaks, and attacks on {target} itself {shown.white_box_only} that those do not "
        f"(one-sided p = {shown.p_value:.2g}, {len(tests)} comparisons)"
    )
    if masking is None:
        return TransferFinding(shown.target, True, f"Transfer beats the white-box attacks nowhere; nearest to it, {numbers}.")
    detail = f"Transfer beats the white-box attacks: {numbers}; the gradients of {target} lead its own attacks astray."
    return TransferFinding(shown.target, False, detail)


def transfer_table(matrix: pd.DataFrame) -> Table:
    """The matrix of one set of images: a row for each attack, eps and source, a column for each target."""
    targets = list(dict.fromkeys(matrix["target"]))
    columns = [Column("attack", True), Column("norm", True), Column("eps"), Column("images made on", True)]
    columns += [Column(f"{target} %") for target in targets]
    rows = []
    for (attack, norm, eps), at_eps in matrix.groupby(["attack", "norm", "eps"], sort=False):
        cells = {(row.source, row.target): row.robust_accuracy for row in at_eps.itertuples()}
        sources = sorted(dict.fromkeys(at_eps["source"]), key=lambda source: (source == ANY_SOURCE, _place(source, targets)))
        for source in sources:
            about = [Cell(attack, attack), Cell(norm, norm), Cell(format_eps(eps, norm), eps), Cell(source, source)]
            rows.append(about + [_accuracy(cells.get((source, target))) for target in targets])
    return Table(columns, rows)


def _place(source: str, targets: Sequence[str]) -> int:
    return targets.index(source) if source in targets else len(targets)


def _accuracy(fraction: float | None) -> Cell:
    return Cell("-", np.inf) if fraction is None else Cell(f"{100 * fraction:.1f}", fraction)


def write_transfer(runs: Sequence[Run], out_dir: Path) -> list[Path]:
    """Writes `transfer.csv` at full precision, `transfer.md` and `transfer.tex`; nothing without a transfer run.

    Returns:
        The files written.

    Raises:
        StoreError: a manifest does not say what was evaluated, or `out_dir` cannot be written.
    """
    matrix = transfer_matrix(runs)
    if matrix.empty:
        return []
    text, latex = ["# Transfer", "", HOW_TO_READ_TRANSFER, ""], []
    text += [f"* {finding.detail}" for finding in find_transfer(runs)]
    for _, of_dataset in matrix.groupby("dataset_sha256", sort=False):
        name, table = of_dataset["dataset"].iloc[0], transfer_table(of_dataset)
        text += ["", f"## {name}, n = {of_dataset['n'].max()}", "", *to_markdown(table)]
        latex.append(to_latex(table, f"Transfer on {name}. {HOW_TO_READ_TRANSFER}"))
    contents = {
        "csv": matrix.to_csv(index=False, lineterminator="\n"),
        "md": "\n".join(text) + "\n",
        "tex": "\n".join(latex),
    }
    paths = []
    for suffix, content in contents.items():
        paths.append(Path(out_dir) / f"transfer.{suffix}")
        write_file(paths[-1], content.encode())
    return paths
