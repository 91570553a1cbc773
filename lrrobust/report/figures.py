"""Runs -> figures, for each set of images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import pandas as pd

from lrrobust.formatting import format_eps
from lrrobust.report.curves import minimal_norm_curves, pass_curves, telling_eps
from lrrobust.report.drawing import Sketch
from lrrobust.report.naming import name_runs, slug
from lrrobust.results import Run


def sketch_runs(runs: Sequence[Run], summary: pd.DataFrame, kinds: Sequence[str] = ("png", "svg", "pdf")) -> Iterator[Sketch]:
    """The figures of runs, for each set of images: robust accuracy against eps by norm, then against passes.

    Args:
        runs: of any sets of images.
        summary: made by `summarise` of the same runs.
        kinds: of "png", "svg", "pdf".

    Raises:
        StoreError: a manifest does not say what was evaluated, or a folder is given twice.
    """
    # Matplotlib takes most of a second to load; tables do without.
    from lrrobust.plots import render_passes, render_robustness_curves

    named, curves = name_runs(runs), minimal_norm_curves(runs)
    # Attacks on the model itself alone: transfer has its own tables.
    summary = summary[summary["surrogate"].isna()]
    for sha256, of_dataset in summary.groupby("dataset_sha256", sort=False):
        models = ", ".join(dict.fromkeys(of_dataset["model"]))
        stem = f"{slug(of_dataset['dataset'].iloc[0])}_{sha256[:8]}"
        for norm in of_dataset["norm"].unique():
            description = f"Robust accuracy against {norm} eps: {models}"
            arguments = (of_dataset, norm, kinds, curves[curves["run"].isin(of_dataset["run"])])
            yield Sketch(sha256, f"robust_accuracy_{stem}_{norm}", description, render_robustness_curves, arguments)
        if arguments := _passes({name: named[name] for name in of_dataset["run"].unique()}, of_dataset):
            description = f"Robust accuracy against passes: {models}"
            yield Sketch(sha256, f"passes_{stem}", description, render_passes, (*arguments, kinds))


def _passes(runs: Mapping[str, Run], summary: pd.DataFrame) -> tuple[pd.DataFrame, str, str, int] | None:
    """What `render_passes` takes, a panel for each norm and run of a dataset, at one eps of each norm."""
    from lrrobust.plots import label_runs

    eps = {norm: found for norm, rows in summary.groupby("norm", sort=False) if (found := telling_eps(rows)) is not None}
    curves, with_backward = pass_curves(runs, eps)
    if curves.empty:
        return None
    labels = label_runs(summary)
    budgets = {norm: f", {norm} {format_eps(found, norm)}" for norm, found in eps.items()}
    panel = curves["run"].map(labels) + curves["norm"].map(budgets)
    # All runs of a norm side by side.
    curves = curves.assign(panel=panel).sort_values("norm", key=lambda norms: norms.map(list(eps).index), kind="stable")
    what = "forward and backward passes" if with_backward else "forward passes"
    title = f"{summary['dataset'].iloc[0]}: robust accuracy against {what}"
    return curves, title, "passes per image", min(3, len(runs))
