"""Robust accuracy of each class, under each attack and eps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from lrrobust.formatting import format_eps
from lrrobust.page.gallery import class_name
from lrrobust.results import Run, texts
from lrrobust.stats import wilson_interval

#: One row for each run, attack, eps and class; accuracies and interval as fractions over the class's images.
PER_CLASS_COLUMNS = (
    "run",
    "attack",
    "norm",
    "eps",
    "label",
    "wnid",
    "class",
    "n",
    "clean_accuracy",
    "robust_accuracy",
    "ci_low",
    "ci_high",
)


def summarise_classes(runs: Mapping[str, Run]) -> pd.DataFrame:
    """Columns `PER_CLASS_COLUMNS`, in the order of the runs and of their attacks, then eps and label."""
    frames = []
    for name, run in runs.items():
        rows = pd.DataFrame(
            {
                "attack": texts(run.rows["attack"]),
                "norm": texts(run.rows["norm"]),
                "eps": run.rows["eps"].to_numpy(np.float64),
                "label": run.rows["label"].to_numpy(np.int64),
                "wnid": texts(run.rows["wnid"]),
                "clean": run.rows["is_clean_correct"].to_numpy(bool),
                "robust": ~run.rows["is_broken"].to_numpy(bool),
            }
        )
        keys = ["attack", "norm", "eps", "label"]
        counts = (
            rows.groupby(keys)
            .agg(wnid=("wnid", "first"), n=("clean", "size"), clean=("clean", "sum"), robust=("robust", "sum"))
            .reset_index()
        )
        order = {attack: place for place, attack in enumerate(pd.unique(rows["attack"]))}
        counts = counts.sort_values(["attack", "eps", "label"], key=lambda c: c.map(order) if c.name == "attack" else c)
        frames.append(counts.assign(run=name, **{"class": [class_name(run, label) for label in counts["label"]]}))
    filled = [frame for frame in frames if not frame.empty]
    if not filled:
        return pd.DataFrame(columns=list(PER_CLASS_COLUMNS))
    counts = pd.concat(filled, ignore_index=True)
    # Few pairs of counts are different: each interval is computed once.
    pairs = list(zip(counts["robust"].tolist(), counts["n"].tolist()))
    intervals = {pair: wilson_interval(*pair) for pair in set(pairs)}
    low, high = zip(*(intervals[pair] for pair in pairs))
    counts = counts.assign(
        clean_accuracy=counts["clean"] / counts["n"], robust_accuracy=counts["robust"] / counts["n"], ci_low=low, ci_high=high
    )
    return counts[list(PER_CLASS_COLUMNS)]


def compact(of_attack: pd.DataFrame) -> dict[str, Any]:
    """One run and attack as little JSON: the page draws its table when a reader opens it.

    Returns:
        `eps` as people write them; `rows` of [class, n, clean], then robust, low and high for each
        eps, all in tenths of a percent; classes by falling mean robust accuracy.
    """
    parts = of_attack.set_index("label")
    ladder = sorted(parts["eps"].unique())
    norm = of_attack["norm"].iloc[0]
    by_eps = [parts[parts["eps"] == eps].sort_index() for eps in ladder]
    first = by_eps[0]
    robust = np.stack([of_eps["robust_accuracy"].to_numpy(float) for of_eps in by_eps])
    order = np.lexsort((first["class"].to_numpy(str), -robust.mean(0)))
    columns = [first["class"].tolist(), first["n"].tolist(), _tenths(first["clean_accuracy"])]
    for of_eps in by_eps:
        columns += [_tenths(of_eps[name]) for name in ("robust_accuracy", "ci_low", "ci_high")]
    return {
        "eps": [format_eps(eps, norm) for eps in ladder],
        "rows": [[column[place] for column in columns] for place in order.tolist()],
    }


def _tenths(fractions: pd.Series) -> list[int]:
    return (1000 * fractions.astype(float)).round().astype(int).tolist()
