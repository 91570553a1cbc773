"""Tables -> figures, readable in black and white.

- `robustness`: robust accuracy against eps, one panel an attack, one line a run.
- `differences`: paired differences of two models against eps.
- `distances`: fixed budgets and minimal distances of two models on one axis.
- `passes`: robust accuracy against what the attacks spent.
"""

from lrrobust.plots.differences import render_differences
from lrrobust.plots.distances import render_distances
from lrrobust.plots.passes import render_passes
from lrrobust.plots.robustness import label_runs, render_robustness_curves

__all__ = ["label_runs", "render_differences", "render_distances", "render_passes", "render_robustness_curves"]
