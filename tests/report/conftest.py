"""Runs in memory, made of nothing but distances."""

import math
from pathlib import Path

import pandas as pd
import pytest

from lrrobust.results import SCHEMA_VERSION, Run, rows_to_table

LADDER = (1 / 255, 2 / 255)
INF = math.inf

# Image 0 is wrong without attack; images 1 to 4 are correct.
DISTANCES = {
    "fgsm": ("linf", LADDER, [None, 0.9 / 255, 1.9 / 255, INF, INF]),
    "pgd": ("linf", LADDER, [None, 0.8 / 255, INF, 0.7 / 255, INF]),
    "cw": ("l2", (INF,), [None, 0.2, 0.4, 0.3, INF]),
}


def row(index, attack, norm, eps, distance):
    """One row; `distance` in the norm, infinite when the attack failed, None when wrong without attack."""
    is_correct = distance is not None
    is_broken = is_correct and distance <= eps and math.isfinite(distance)
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
        "adversarial_prediction": 5 if is_broken else None,
        "is_broken": is_broken or not is_correct,
        "outcome": "broken" if is_broken else "robust" if is_correct else "wrong_when_clean",
        # The other norm gets a value that would show if it were taken by mistake.
        "linf_distance": (distance if norm == "linf" else 77.0) if is_broken else None,
        "l2_distance": (distance if norm == "l2" else 77.0) if is_broken else None,
        "clean_margin": 1.0,
        "adversarial_margin": None,
        "wall_s": 0.5,
        "l1_distance": 78.0 if is_broken else None,
        "is_broken_quantized": None,
        "forward_passes": None,
        "backward_passes": None,
    }


def build_run(name="run", distances=None, *, sha256="cd" * 32, model="tiny", planned=1, metadata=({"device": "cpu"},)):
    """A run from attack -> (norm, ladder, distance of image 0, 1, ...)."""
    rows = [
        row(index, attack, norm, eps, distance)
        for attack, (norm, ladder, of_images) in (distances or DISTANCES).items()
        for index, distance in enumerate(of_images)
        for eps in ladder
    ]
    return Run(
        folder=Path("/results") / name,
        manifest={
            "schema_version": SCHEMA_VERSION,
            "fingerprint": "ab" * 32,
            "model": {"name": model, "weights": "V1"},
            "dataset": {"name": "sample", "sha256": sha256, "n": 5},
            "attacks": [
                {"name": attack, "norm": norm, "kind": attack}
                for attack, (norm, *_) in (distances or DISTANCES).items()
            ],
            "plan": {"chunk_size": 5, "parts": [["x", 0, 5]] * planned},
            "provenance": {"versions": {"lrrobust": "0.1.0", "torch": "2.13.0"}, "commit": "1234abc"},
        },
        rows=rows_to_table(rows).to_pandas(types_mapper=pd.ArrowDtype),
        is_complete=planned == len(metadata),
        part_metadata={f"part-{place}": part for place, part in enumerate(metadata)},
    )


@pytest.fixture
def make_run():
    return build_run


@pytest.fixture
def suite_distances():
    return DISTANCES
