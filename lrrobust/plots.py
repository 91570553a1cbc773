"""Summaries -> figures: robust accuracy against eps, one panel an attack, one line a model."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from lrrobust.results import write_file
from lrrobust.stats import wilson_interval

#: Okabe and Ito's palette without its yellow, which is too pale for lines on white.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9", "#E69F00")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_LINES = ("-", "--", "-.", ":")

#: Points of a minimal-norm attack's curve that are drawn at most.
_MOST_STEPS = 400

_NORM_LABELS = {"linf": r"$\ell_\infty$", "l2": r"$\ell_2$", "l1": r"$\ell_1$"}

_STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.4,
    "lines.markersize": 4.5,
    # A constant, or the identifiers inside an SVG change each time it is written.
    "svg.hashsalt": "lrrobust",
    # Type 42 fonts: journals refuse matplotlib's own choice.
    "pdf.fonttype": 42,
}


class _Axis(NamedTuple):
    """Where the eps axis has its points, and whether they are a ladder or just an even division of it."""

    points: np.ndarray
    is_ladder: bool


def plot_robustness_curves(
    summary: pd.DataFrame, norm: str, out_stem: Path, curves: pd.DataFrame | None = None
) -> list[Path]:
    """Draw robust accuracy (%) against eps with 95 % Wilson bands; eps = 0 is the clean accuracy.

    Each attack has a panel, each run a line told apart by colour, marker and dash. The eps axis is
    linear up to the smallest eps of the ladder and in octaves beyond. The same input gives the same
    bytes, whatever the user's matplotlib settings, which are left as they were.

    Args:
        summary: as made by `report.summarise`, of one dataset.
        norm: "linf", "l2" or "l1"; rows of another norm are left out.
        out_stem: path without suffix; ".png", ".svg" and ".pdf" are added, missing folders created.
        curves: as made by `report.minimal_norm_curves`; those attacks are then drawn as exact steps
            instead of at the eps of the ladder. Curves of runs not in `summary` are left out.

    Returns:
        The PNG, the SVG and the PDF; nothing when no attack of this norm has anything to draw.

    Raises:
        ValueError: the summary mixes datasets, which must never share a figure.
        StoreError: the files cannot be written.
    """
    contents = render_robustness_curves(summary, norm, ("png", "svg", "pdf"), curves)
    # Not with_suffix, which would cut a name at its last dot.
    paths = {kind: Path(f"{out_stem}.{kind}") for kind in contents}
    for kind, content in contents.items():
        write_file(paths[kind], content)
    return list(paths.values())


def render_robustness_curves(
    summary: pd.DataFrame,
    norm: str,
    kinds: Sequence[str],
    curves: pd.DataFrame | None = None,
    is_transparent: bool = False,
) -> dict[str, bytes]:
    """The figure of `plot_robustness_curves` as files in memory: kind ("png", "svg", "pdf") -> content.

    Nothing when no attack of this norm has anything to draw. `is_transparent` leaves the paper away.
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

    with _isolated_style():
        figure = _draw(summary, steps, attacks, norm)
        return {kind: _rendered(figure, kind, is_transparent) for kind in kinds}


def render_differences(
    differences: pd.DataFrame, title: str, smallest: float, kinds: Sequence[str], is_transparent: bool = False
) -> dict[str, bytes]:
    """Draw paired differences of robust accuracy against eps, with their intervals; kind -> content.

    Each attack has a panel. A band marks the differences too small to matter.

    Args:
        differences: columns attack, norm, eps (finite), difference, low, high (fractions), of one norm.
        title: of the figure.
        smallest: difference that matters, a fraction.
        kinds: of "png", "svg", "pdf".
        is_transparent: leave the paper away.

    Raises:
        ValueError: several norms, or nothing to draw.
    """
    if differences["norm"].nunique() != 1:
        raise ValueError(f"a figure shows one norm, got {differences['norm'].unique().tolist()}")
    norm, attacks = differences["norm"].iloc[0], list(differences["attack"].unique())
    axis = _Axis(np.append(0.0, np.unique(differences["eps"].to_numpy(np.float64))), is_ladder=True)
    columns = min(3, len(attacks))
    with _isolated_style():
        rows = math.ceil(len(attacks) / columns)
        figure = Figure(figsize=(max(2.6 * columns + 0.4, 4.2), 2.3 * rows + 0.5), layout="constrained")
        panels = list(figure.subplots(rows, columns, sharey=True, squeeze=False).flat)
        for panel, attack in zip(panels, attacks):
            of_attack = differences[differences["attack"] == attack].sort_values("eps")
            points = 100 * of_attack[["difference", "low", "high"]].to_numpy(np.float64).T
            # A score interval contains its estimate; rounding must not put it outside.
            reach = np.maximum([points[0] - points[1], points[2] - points[0]], 0.0)
            panel.axhspan(-100 * smallest, 100 * smallest, color="#000000", alpha=0.1, linewidth=0)
            panel.axhline(0, color="#000000", linewidth=0.8)
            panel.errorbar(of_attack["eps"], points[0], reach, color=_COLOURS[0], marker="o", linestyle="", capsize=3)
            panel.set_title(attack.replace("_", " "))
            _set_eps_axis(panel, axis, norm)
            # Intervals at the ladder's end would be cut in half.
            panel.set_xlim(0, axis.points[-1] * 1.15)
        _finish_panels(panels, len(attacks), columns, norm)
        figure.suptitle(title, fontsize=10)
        figure.supylabel("difference (percentage points)", fontsize=9)
        return {kind: _rendered(figure, kind, is_transparent) for kind in kinds}


def _finish_panels(panels: Sequence[Axes], count: int, columns: int, norm: str) -> None:
    """Labels the lowest panel of each column, and takes away those that nothing was drawn in."""
    unit = "pixel range / 255" if norm == "linf" else "pixel range 1"
    for panel in panels[max(0, count - columns) : count]:
        panel.set_xlabel(rf"{_NORM_LABELS[norm]} budget $\varepsilon$ ({unit})")
    for panel in panels[count:]:
        panel.remove()


def _draw(summary: pd.DataFrame, steps: pd.DataFrame, attacks: list[str], norm: str) -> Figure:
    labels = label_runs(summary)
    axis = _eps_axis(summary, steps)
    columns = min(3, len(attacks))
    rows = math.ceil(len(attacks) / columns)
    width = max(2.6 * columns + 0.4, 4.2)
    figure = Figure(figsize=(width, 2.3 * rows + 0.5 + 0.2 * len(labels)), layout="constrained")
    panels = list(figure.subplots(rows, columns, sharey=True, squeeze=False).flat)
    for panel, attack in zip(panels, attacks):
        for place, (run, label) in enumerate(labels.items()):
            style = {
                "color": _COLOURS[place % len(_COLOURS)],
                "marker": _MARKERS[place % len(_MARKERS)],
                "linestyle": _LINES[place % len(_LINES)],
                "label": label,
            }
            of_run = summary[(summary["attack"] == attack) & (summary["run"] == run)]
            of_steps = steps[(steps["attack"] == attack) & (steps["run"] == run)]
            if not of_steps.empty:
                _draw_steps(panel, of_steps, axis, style)
            elif not of_run.empty:
                _draw_ladder(panel, of_run, style)
        panel.set_title(attack.replace("_", " "))
        _set_eps_axis(panel, axis, norm)
    _finish_panels(panels, len(attacks), columns, norm)
    panels[0].set_ylim(0, 100)

    figure.suptitle(f"{summary['dataset'].iloc[0]}, {_NORM_LABELS[norm]}, n = {_span(summary['n'])}", fontsize=10)
    figure.supylabel("robust accuracy (%)", fontsize=9)
    handles = {line.get_label(): line for panel in panels[: len(attacks)] for line in panel.get_lines()}
    figure.legend(
        [handles[label] for label in labels.values() if label in handles],
        [label for label in labels.values() if label in handles],
        loc="outside lower center",
        ncols=2 if columns > 1 else 1,
        frameon=False,
        handlelength=3.5,
    )
    return figure


def _draw_ladder(panel: Axes, of_run: pd.DataFrame, style: dict[str, str]) -> None:
    """A line through the clean accuracy and the finite eps of one attack on one run."""
    points = of_run[np.isfinite(of_run["eps"]) & (of_run["eps"] > 0)].sort_values("eps")
    first = of_run.iloc[0]
    low, high = wilson_interval(round(first["clean_accuracy"] * first["n"]), int(first["n"]))
    eps = np.append(0.0, points["eps"])
    panel.plot(eps, 100 * np.append(first["clean_accuracy"], points["robust_accuracy"]), clip_on=False, **style)
    _draw_band(panel, eps, np.append(low, points["ci_low"]), np.append(high, points["ci_high"]), style)


def _draw_steps(panel: Axes, of_steps: pd.DataFrame, axis: _Axis, style: dict[str, str]) -> None:
    """The exact curve of a minimal-norm attack, marked at the ticks so that it can be told from others."""
    inside = of_steps[of_steps["eps"] <= axis.points[-1]]
    inside = pd.concat([inside, inside.iloc[-1:].assign(eps=axis.points[-1])])
    marked = np.searchsorted(inside["eps"].to_numpy(), axis.points, side="right") - 1
    at_ticks = 100 * inside["robust_accuracy"].to_numpy()[marked]
    # More steps than this are finer than the line is wide, and would make files of megabytes.
    inside = inside.iloc[np.unique(np.linspace(0, len(inside) - 1, _MOST_STEPS).round().astype(int))]
    accuracy = 100 * inside["robust_accuracy"]
    panel.plot(inside["eps"], accuracy, drawstyle="steps-post", **(style | {"marker": "", "label": "_"}))
    panel.plot(axis.points, at_ticks, clip_on=False, **(style | {"linestyle": "", "label": "_"}))
    panel.plot([], [], **style)  # line and marker together, for the legend
    _draw_band(panel, inside["eps"], inside["ci_low"], inside["ci_high"], style, step="post")


def _draw_band(panel: Axes, eps, low, high, style: dict[str, str], step: str | None = None) -> None:
    panel.fill_between(eps, 100 * low, 100 * high, color=style["color"], alpha=0.15, linewidth=0, step=step)


def _eps_axis(summary: pd.DataFrame, steps: pd.DataFrame) -> _Axis:
    eps = summary["eps"].to_numpy(np.float64)
    ladder = np.unique(eps[np.isfinite(eps) & (eps > 0)])
    if len(ladder):
        return _Axis(np.append(0.0, ladder), is_ladder=True)
    stop = steps["eps"].max() or 1.0  # no image broken at all: any length does
    return _Axis(np.linspace(0.0, stop, 5), is_ladder=False)


def _set_eps_axis(panel: Axes, axis: _Axis, norm: str) -> None:
    if axis.is_ladder:
        panel.set_xscale("symlog", base=2, linthresh=axis.points[1], linscale=0.5)  # 0 is one octave away from it
    ticks = axis.points[:: math.ceil(len(axis.points) / 9)]  # more labels than nine run into each other
    panel.set_xticks(ticks, [_tick_label(eps, norm) for eps in ticks])
    panel.xaxis.set_minor_locator(NullLocator())
    panel.set_xlim(0, axis.points[-1])


def _tick_label(eps: float, norm: str) -> str:
    """Radius in the unit of the axis: 1/8 or 4 for linf, 0.05 for l2, 12 for l1."""
    if norm != "linf":
        return f"{eps:.3g}"
    simple = Fraction(eps * 255).limit_denominator(16)
    return str(simple) if math.isclose(simple, eps * 255, rel_tol=1e-9) else f"{eps * 255:.3g}"


def label_runs(summary: pd.DataFrame) -> dict[str, str]:
    """Run -> what its line is called: as little as tells it from the others."""
    runs = summary.drop_duplicates("run").set_index("run")
    weights = runs["weights"].fillna("no weights").astype(str)
    longer = runs["model"] + " (" + weights
    names = [runs["model"], longer + ")", longer + ", " + runs.index + ")"]
    chosen = next((name for name in names if name.is_unique), names[-1])
    is_complete = runs["is_complete"].astype(bool)
    return (chosen + np.where(is_complete, "", ", incomplete")).to_dict()


def _span(counts: pd.Series) -> str:
    low, high = counts.min(), counts.max()
    return f"{low}" if low == high else f"{low} to {high}"


def _rendered(figure: Figure, kind: str, is_transparent: bool) -> bytes:
    buffer = io.BytesIO()
    # Dates would make the same figure differ each time.
    metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind)
    figure.savefig(buffer, format=kind, dpi=200, metadata=metadata, transparent=is_transparent)
    return buffer.getvalue()


@contextmanager
def _isolated_style() -> Iterator[None]:
    """Matplotlib's own defaults and ours inside, the user's settings again outside."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield
