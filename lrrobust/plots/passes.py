"""Robust accuracy against what the attacks spent."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.ticker import NullLocator

from lrrobust.plots.style import (
    add_legend,
    build_panels,
    drawn_points,
    isolated_style,
    line_style,
    lowest_panels,
    render,
    set_accuracy_axis,
)


def render_passes(curves: pd.DataFrame, title: str, xlabel: str, columns: int, kinds: Sequence[str]) -> dict[str, bytes]:
    """Draw robust accuracy (%) against passes through the network spent on an image; kind -> content.

    Each panel has one line an attack, which ends where the attack had spent all it was given.

    Args:
        curves: columns panel, attack, passes (zero or more, ascending from 0 within a panel and attack),
            robust_accuracy (fractions).
        title, xlabel: of the figure, and which passes are counted.
        columns: panels side by side, at most.
        kinds: of "png", "svg", "pdf".

    Raises:
        ValueError: there is nothing to draw.
    """
    if curves.empty:
        raise ValueError("expected at least one curve to draw, got none")
    names, attacks = list(curves["panel"].unique()), list(curves["attack"].unique())
    columns = min(columns, len(names))
    with isolated_style():
        figure, panels = build_panels(
            names, columns, title=title, ylabel="robust accuracy (%)", labels=attacks,
            xlabels=dict.fromkeys(lowest_panels(len(names), columns), xlabel),
        )  # fmt: skip
        farthest = max(curves["passes"].max(), 10.0)
        handles = {}
        for panel, name in zip(panels, names):
            for place, attack in enumerate(attacks):
                curve = curves[(curves["panel"] == name) & (curves["attack"] == attack)]
                if curve.empty:
                    continue
                passes, accuracy = curve["passes"].to_numpy(np.float64), 100 * curve["robust_accuracy"].to_numpy(np.float64)
                kept = drawn_points(len(passes))
                style = line_style(place)
                # The sign stands at the end, where the attack stopped.
                (line,) = panel.plot(
                    passes[kept], accuracy[kept], drawstyle="steps-post", markevery=[len(kept) - 1], clip_on=False, **style
                )
                handles.setdefault(attack.replace("_", " "), line)
            panel.set_xscale("symlog", base=10, linthresh=1.0, linscale=0.5)
            panel.set_xticks([0, *10 ** np.arange(np.ceil(np.log10(farthest)) + 1)])
            panel.xaxis.set_minor_locator(NullLocator())
            panel.set_xlim(0, farthest * 1.1)
        set_accuracy_axis(panels[0], 100 * curves["robust_accuracy"])
        add_legend(figure, handles, is_wide=columns > 1)
        return render(figure, kinds)
