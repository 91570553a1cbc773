"""Rows of a run -> what its numbers are made of: the verdict on each image, attack and eps in plain dtypes."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import numpy as np
import pandas as pd

from lrrobust.results import Run, breaking_eps, distances, texts
from lrrobust.stats import passes_up_to

#: Run -> its outcomes, which tables, exact curves and curves over passes all start from.
_OUTCOMES: WeakKeyDictionary[Run, pd.DataFrame] = WeakKeyDictionary()


def outcomes(run: Run) -> pd.DataFrame:
    """What the numbers need of a run's rows, in plain dtypes; `distance` is infinite where none is known.

    Passes are those up to the row's eps, see `stats.passes_up_to`; `breaking_eps` as `breaking_eps` says. Made once for
    each run: not to be changed.
    """
    if run not in _OUTCOMES:
        _OUTCOMES[run] = _plain_outcomes(run)
    return _OUTCOMES[run]


def _plain_outcomes(run: Run) -> pd.DataFrame:
    rows = run.rows
    verdicts = pd.DataFrame(
        {
            "index": rows["index"].to_numpy(np.int64),
            "label": rows["label"].to_numpy(np.int64),
            "attack": texts(rows["attack"]),
            "norm": texts(rows["norm"]),
            "eps": rows["eps"].to_numpy(np.float64),
            "is_broken_earlier": (rows["outcome"] == "broken_by_earlier_attack").to_numpy(bool),
            "is_clean_correct": rows["is_clean_correct"].to_numpy(bool),
            "is_broken": rows["is_broken"].to_numpy(bool),
            "is_broken_quantized": _is_broken_quantized(run),
            "distance": distances(rows),
            "breaking_eps": breaking_eps(rows),
            "wall_s": rows["wall_s"].to_numpy(np.float64),
        }
    )
    for name in ("forward_passes", "backward_passes"):
        spent = rows[name].to_numpy(np.float64, na_value=np.nan)
        for places in verdicts.groupby("attack", sort=False).indices.values():
            images, eps = (verdicts[column].to_numpy()[places] for column in ("index", "eps"))
            spent[places] = passes_up_to(images, eps, spent[places])
        verdicts[name] = spent
    return verdicts


def _is_broken_quantized(run: Run) -> np.ndarray:
    """By row 1.0 or 0.0: broken also when adversarial images are held in 8 bits; NaN where that was not asked for."""
    rows = run.rows
    if run.manifest.get("real_pixels") is None:
        return np.full(len(rows), np.nan)
    is_broken = rows["is_broken_quantized"].fillna(False).to_numpy(bool)
    # Attacks that leave broken images out leave out those that are broken in 8 bits.
    is_broken |= (rows["outcome"] == "broken_by_earlier_attack").to_numpy(bool)
    return (is_broken | ~rows["is_clean_correct"].to_numpy(bool)).astype(np.float64)
