"""The axis of budgets, which every figure against eps or distance has."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator
from numpy.typing import ArrayLike

from lrrobust.plots.style import NORM_LABELS


class EpsAxis(NamedTuple):
    """Where the axis has its points, 0 first, and whether they are a ladder or just an even division of it."""

    points: np.ndarray
    is_ladder: bool


def build_axis(eps: ArrayLike, farthest: float) -> EpsAxis:
    """The finite eps above 0 as a ladder; without any, an even division up to `farthest`."""
    eps = np.asarray(eps, dtype=np.float64)
    ladder = np.unique(eps[np.isfinite(eps) & (eps > 0)])
    if len(ladder):
        return EpsAxis(np.append(0.0, ladder), is_ladder=True)
    # No image broken at all: any length does.
    return EpsAxis(np.linspace(0.0, farthest if np.isfinite(farthest) and farthest > 0 else 1.0, 5), is_ladder=False)


def set_axis(panel: Axes, axis: EpsAxis, norm: str) -> None:
    """Linear up to the smallest eps of a ladder and in octaves beyond."""
    if axis.is_ladder:
        panel.set_xscale("symlog", base=2, linthresh=axis.points[1], linscale=0.5)  # 0 is one octave away from it
    ticks = axis.points[:: math.ceil(len(axis.points) / 9)]  # more labels than nine run into each other
    panel.set_xticks(ticks, [_tick_label(eps, norm) for eps in ticks])
    panel.xaxis.set_minor_locator(NullLocator())
    panel.set_xlim(0, axis.points[-1])


def axis_label(norm: str, what: str = r"budget $\varepsilon$") -> str:
    unit = "pixel range / 255" if norm == "linf" else "pixel range 1"
    return f"{NORM_LABELS.get(norm, norm)} {what} ({unit})"


def _tick_label(eps: float, norm: str) -> str:
    """Radius in the unit of the axis: 1/8 or 4 for linf, 0.05 for others."""
    if norm != "linf":
        return f"{eps:.3g}"
    simple = Fraction(eps * 255).limit_denominator(16)
    return str(simple) if math.isclose(simple, eps * 255, rel_tol=1e-9) else f"{eps * 255:.3g}"
