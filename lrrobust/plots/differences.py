"""Paired differences of two models against eps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from lrrobust.plots.eps_axis import axis_label, build_axis, set_axis
from lrrobust.plots.style import COLOURS, build_panels, isolated_style, lowest_panels, render


def render_differences(differences: pd.DataFrame, title: str, smallest: float, kinds: Sequence[str]) -> dict[str, bytes]:
    """Draw paired differences of robust accuracy against eps, with their intervals; kind -> content.

    Each attack has a panel. A band marks the differences too small to matter.

    Args:
        differences: columns attack, norm, eps (finite), difference, low, high (fractions), of one norm.
        title: of the figure.
        smallest: difference that matters, a fraction.
        kinds: of "png", "svg", "pdf".

    Raises:
        ValueError: several norms, or nothing to draw.
    """
    if differences["norm"].nunique() != 1:
        raise ValueError(f"a figure shows one norm, got {differences['norm'].unique().tolist()}")
    norm, attacks = differences["norm"].iloc[0], list(differences["attack"].unique())
    axis = build_axis(differences["eps"], farthest=0.0)
    columns = min(3, len(attacks))
    with isolated_style():
        figure, panels = build_panels(
            [attack.replace("_", " ") for attack in attacks], columns, title=title, ylabel="difference (percentage points)",
            xlabels=dict.fromkeys(lowest_panels(len(attacks), columns), axis_label(norm)),
        )  # fmt: skip
        for panel, attack in zip(panels, attacks):
            of_attack = differences[differences["attack"] == attack].sort_values("eps")
            points = 100 * of_attack[["difference", "low", "high"]].to_numpy(np.float64).T
            # A score interval contains its estimate; rounding must not put it outside.
            reach = np.maximum([points[0] - points[1], points[2] - points[0]], 0.0)
            panel.axhspan(-100 * smallest, 100 * smallest, color="#000000", alpha=0.1, linewidth=0)
            panel.axhline(0, color="#000000", linewidth=0.8)
            panel.errorbar(of_attack["eps"], points[0], reach, color=COLOURS[0], marker="o", linestyle="", capsize=3)
            set_axis(panel, axis, norm)
            # Intervals at the ladder's end would be cut in half.
            panel.set_xlim(0, axis.points[-1] * 1.15)
        return render(figure, kinds)
