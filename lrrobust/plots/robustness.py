"""Robust accuracy against eps, one panel an attack, one line a run."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lrrobust.plots.eps_axis import EpsAxis, axis_label, build_axis, set_axis
from lrrobust.plots.style import (
    NORM_LABELS,
    add_legend,
    build_panels,
    drawn_points,
    isolated_style,
    line_style,
    lowest_panels,
    render,
    set_accuracy_axis,
    span,
)
from lrrobust.stats import wilson_interval


def render_robustness_curves(
    summary: pd.DataFrame,
    norm: str,
    kinds: Sequence[str],
    curves: pd.DataFrame | None = None,
) -> dict[str, bytes]:
    """Draw robust accuracy (%) against eps with 95 % Wilson bands; eps = 0 is the clean accuracy.

    Each attack has a panel, each run a line told apart by colour, marker and dash. The eps axis is
    linear up to the smallest eps of the ladder and in octaves beyond. The same input gives the same
    bytes, whatever the user's matplotlib settings, which are left as they were.

    Args:
        summary: as made by `report.summarise`, of one dataset.
        norm: rows of another norm are left out.
        kinds: of "png", "svg", "pdf".
        curves: as made by `report.minimal_norm_curves`; those attacks are then drawn as exact steps
            instead of at the eps of the ladder. Curves of runs not in `summary` are left out.

    Returns:
        Kind -> content of a file; nothing when no attack of this norm has anything to draw.

    Raises:
        ValueError: the summary mixes datasets, which must never share a figure.
    """
    summary = summary[summary["norm"] == norm]
    if summary["dataset_sha256"].nunique() > 1:
        raise ValueError("a figure shows one dataset, got " + ", ".join(summary["dataset_sha256"].unique()))
    steps = summary.iloc[:0]
    if curves is not None:
        steps = curves[(curves["norm"] == norm) & curves["run"].isin(summary["run"])]
    drawable = np.isfinite(summary["eps"].astype(float)) | summary["attack"].isin(steps["attack"])
    attacks = list(summary.loc[drawable, "attack"].unique())
    if not attacks:
        return {}

    with isolated_style():
        return render(_draw(summary, steps, attacks, norm), kinds)


def _draw(summary: pd.DataFrame, steps: pd.DataFrame, attacks: list[str], norm: str) -> Figure:
    labels = label_runs(summary)
    axis = build_axis(summary["eps"], farthest=steps["eps"].max())
    columns = min(3, len(attacks))
    # Where attacks met only what others had left standing, the curve is not theirs alone.
    cumulative = set(summary.loc[summary["is_cumulative"], "attack"]) if "is_cumulative" in summary else set()
    figure, panels = build_panels(
        [attack.replace("_", " ") + (", cumulative" if attack in cumulative else "") for attack in attacks],
        columns, labels=list(labels.values()), ylabel="robust accuracy (%)",
        title=f"{summary['dataset'].iloc[0]}, {NORM_LABELS.get(norm, norm)}, n = {span(summary['n'])}",
        xlabels=dict.fromkeys(lowest_panels(len(attacks), columns), axis_label(norm)),
    )  # fmt: skip
    for panel, attack in zip(panels, attacks):
        for place, (run, label) in enumerate(labels.items()):
            style = line_style(place) | {"label": label}
            of_run = summary[(summary["attack"] == attack) & (summary["run"] == run)]
            of_steps = steps[(steps["attack"] == attack) & (steps["run"] == run)]
            if not of_steps.empty:
                _draw_steps(panel, of_steps, axis, style)
            elif not of_run.empty:
                _draw_ladder(panel, of_run, style)
        set_axis(panel, axis, norm)
    set_accuracy_axis(panels[0], 100 * np.append(summary["clean_accuracy"], summary["ci_high"]))
    handles = {line.get_label(): line for panel in panels for line in panel.get_lines()}
    add_legend(figure, {label: handles[label] for label in labels.values() if label in handles}, is_wide=columns > 1)
    return figure


def _draw_ladder(panel: Axes, of_run: pd.DataFrame, style: dict[str, str]) -> None:
    """A line through the clean accuracy and the finite eps of one attack on one run."""
    points = of_run[np.isfinite(of_run["eps"]) & (of_run["eps"] > 0)].sort_values("eps")
    first = of_run.iloc[0]
    low, high = wilson_interval(round(first["clean_accuracy"] * first["n"]), int(first["n"]))
    eps = np.append(0.0, points["eps"])
    panel.plot(eps, 100 * np.append(first["clean_accuracy"], points["robust_accuracy"]), clip_on=False, **style)
    _draw_band(panel, eps, np.append(low, points["ci_low"]), np.append(high, points["ci_high"]), style)


def _draw_steps(panel: Axes, of_steps: pd.DataFrame, axis: EpsAxis, style: dict[str, str]) -> None:
    """The exact curve of a minimal-norm attack, marked at the ticks so that it can be told from others."""
    inside = of_steps[of_steps["eps"] <= axis.points[-1]]
    inside = pd.concat([inside, inside.iloc[-1:].assign(eps=axis.points[-1])])
    marked = np.searchsorted(inside["eps"].to_numpy(), axis.points, side="right") - 1
    at_ticks = 100 * inside["robust_accuracy"].to_numpy()[marked]
    # More steps are finer than the line is wide, and would make files of megabytes.
    inside = inside.iloc[drawn_points(len(inside))]
    accuracy = 100 * inside["robust_accuracy"]
    panel.plot(inside["eps"], accuracy, drawstyle="steps-post", **(style | {"marker": "", "label": "_"}))
    panel.plot(axis.points, at_ticks, clip_on=False, **(style | {"linestyle": "", "label": "_"}))
    panel.plot([], [], **style)  # line and marker together, for the legend
    _draw_band(panel, inside["eps"], inside["ci_low"], inside["ci_high"], style, step="post")


def _draw_band(panel: Axes, eps, low, high, style: dict[str, str], step: str | None = None) -> None:
    panel.fill_between(eps, 100 * low, 100 * high, color=style["color"], alpha=0.15, linewidth=0, step=step)


def label_runs(summary: pd.DataFrame) -> dict[str, str]:
    """Run -> what its line is called: as little as tells it from the others."""
    runs = summary.drop_duplicates("run").set_index("run")
    weights = runs["weights"].fillna("").astype(str)
    models = runs["model"]
    if "surrogate" in runs:
        sources = runs["surrogate"].fillna("").astype(str)
        models = models.where(sources == "", models + ", images made on " + sources)
    # Networks out of a user's own file have no named weights. The name of a run ends with its fingerprint.
    of_weights, fingerprints = np.where(weights == "", "", weights + ", "), runs.index.str.rsplit("-", n=1).str[-1]
    longer = [weights.replace("", "own weights"), of_weights + fingerprints, of_weights + runs.index]
    names = [models, *(models + " (" + each + ")" for each in longer)]
    chosen = next((name for name in names if name.is_unique), names[-1])
    is_complete = runs["is_complete"].astype(bool)
    return (chosen + np.where(is_complete, "", ", incomplete")).to_dict()
