"""Rows of runs, made of the distances that attacks need; found by every test, as pyproject.toml says."""

import math

import pandas as pd

from lrrobust.norm import NORMS
from lrrobust.results import rows_to_table


def build_row(index, attack, norm, eps, distance, prediction=5, **changes):
    """One row; `distance` in the norm, infinite when the attack failed, None when wrong without attack."""
    is_correct = distance is not None
    is_broken = is_correct and distance <= eps and math.isfinite(distance)
    # The other norms get a value that would show if it were taken by mistake.
    lengths = {f"{other}_distance": distance if other == norm else 77.0 for other in NORMS}
    return {
        "index": index,
        "key": f"val_{index}",
        "label": 3,
        "wnid": "n01440764",
        "attack": attack,
        "norm": norm,
        "eps": eps,
        "clean_prediction": 3 if is_correct else 4,
        "is_clean_correct": is_correct,
        "adversarial_prediction": prediction if is_broken else None,
        "is_broken": is_broken or not is_correct,
        "outcome": "broken" if is_broken else "robust" if is_correct else "wrong_when_clean",
        **{name: length if is_broken else None for name, length in lengths.items()},
        "is_broken_quantized": None,
        "clean_margin": 1.0,
        "adversarial_margin": None,
        "wall_s": 0.5,
        "forward_passes": None,
        "backward_passes": None,
        **changes,
    }


def to_frame(rows):
    """As runs hold their rows."""
    return rows_to_table(rows).to_pandas(types_mapper=pd.ArrowDtype)


def by_pgd(distances):
    """What the verdicts' `make_run` takes, of one attack on the usual ladder."""
    return {"pgd": {"distances": distances}}
