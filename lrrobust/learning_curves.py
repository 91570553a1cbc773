"""The logs of trainings -> a figure of their learning curves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lrrobust.errors import StoreError
from lrrobust.plots.style import isolated_style, line_style, render
from lrrobust.results import write_file


def plot_learning_curves(logs: Mapping[str, Path], out_stem: Path) -> list[Path]:
    """Draw what `lrrobust train` wrote: training loss and held-out accuracy (%) against the epoch, a line a training.

    Args:
        logs: what a line is called -> the `log.csv` of that training.
        out_stem: path without suffix; ".png" and ".svg" are added, missing folders created.

    Returns:
        The PNG and the SVG.

    Raises:
        StoreError: a log cannot be read, or the files cannot be written.
    """
    curves = {}
    for name, path in logs.items():
        try:
            curves[name] = pd.read_csv(path)[["epoch", "train_loss", "holdout_top1"]]
        except (OSError, ValueError, KeyError) as error:
            raise StoreError(f"{path} is no log of a training ({error}): give the log.csv of `lrrobust train`") from None
    with isolated_style():
        figure = Figure(figsize=(7, 3), layout="constrained")
        loss, accuracy = figure.subplots(1, 2)
        for place, (name, curve) in enumerate(curves.items()):
            style = {**line_style(place), "label": name}
            loss.plot(curve["epoch"], curve["train_loss"], **style)
            accuracy.plot(curve["epoch"], 100 * curve["holdout_top1"], **style)
        loss.set_ylabel("training loss")
        accuracy.set_ylabel("top-1 on held-out images (%)")
        for panel in (loss, accuracy):
            panel.set_xlabel("epoch")
            panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        loss.legend(frameon=False, handlelength=3.5)
        paths = []
        for kind, content in render(figure, ("png", "svg")).items():
            paths.append(Path(f"{out_stem}.{kind}"))
            write_file(paths[-1], content)
    return paths
