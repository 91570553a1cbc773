"""Fixed budgets and minimal distances of two models on one axis."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.lines import Line2D

from lrrobust.plots.eps_axis import axis_label, build_axis, set_axis
from lrrobust.plots.style import (
    COLOURS,
    LINES,
    MARKERS,
    add_legend,
    build_panels,
    isolated_style,
    render,
    set_accuracy_axis,
)


def render_distances(curves: pd.DataFrame, norm: str, title: str, kinds: Sequence[str]) -> dict[str, bytes]:
    """Draw robust accuracy against distance; kind -> content.

    An attack with fixed budgets is a line through filled signs, one that searches the nearest adversarial image a
    step at every distance found, with hollow signs at the ticks: read at eps, both say the share of images without
    an adversarial image within eps. Colour and dash tell the models apart, signs the attacks.

    Args:
        curves: columns model, attack, eps (finite, ascending, from 0), robust_accuracy (fractions), is_minimal_norm.
        norm: of all attacks.
        title: of the figure.
        kinds: of "png", "svg", "pdf".

    Raises:
        ValueError: there is nothing to draw.
    """
    if curves.empty:
        raise ValueError("expected at least one curve to draw, got none")
    models, attacks = list(curves["model"].unique()), list(curves["attack"].unique())
    axis = build_axis(curves.loc[~curves["is_minimal_norm"], "eps"], farthest=curves["eps"].max())
    signs: dict[str, Line2D] = {}
    with isolated_style():
        figure, (panel,) = build_panels(
            [""], 1, title=title, ylabel="robust accuracy (%)", labels=[*models, *attacks], size=(4.6, 2.6),
            xlabels={0: axis_label(norm, r"distance, or budget $\varepsilon$")},
        )  # fmt: skip
        for (model, attack, is_minimal), curve in curves.groupby(["model", "attack", "is_minimal_norm"], sort=False):
            place = models.index(model)
            line = {"color": COLOURS[place % len(COLOURS)], "linestyle": LINES[place % len(LINES)]}
            sign = {"marker": MARKERS[attacks.index(attack) % len(MARKERS)]}
            if is_minimal:
                sign["markerfacecolor"] = "none"
            eps, accuracy = curve["eps"].to_numpy(np.float64), 100 * curve["robust_accuracy"].to_numpy(np.float64)
            # Beyond the farthest image found, what is left stays left.
            eps, accuracy = np.append(eps, max(eps[-1], axis.points[-1])), np.append(accuracy, accuracy[-1])
            at = axis.points if is_minimal else eps[:-1]
            panel.plot(eps, accuracy, drawstyle="steps-post" if is_minimal else "default", **line)
            at_signs = accuracy[np.searchsorted(eps, at, side="right") - 1]
            panel.plot(at, at_signs, clip_on=False, **line | {"linestyle": ""}, **sign)
            signs[model] = Line2D([], [], **line)
            # In black: a sign stands for its attack whatever the model.
            signs[attack.replace("_", " ")] = Line2D([], [], linestyle="", color="#000000", **sign)
        set_axis(panel, axis, norm)
        set_accuracy_axis(panel, 100 * curves["robust_accuracy"])
        names = [*models, *(attack.replace("_", " ") for attack in attacks)]
        add_legend(figure, {name: signs[name] for name in names}, is_wide=True)
        return render(figure, kinds)
