"""Runs and baselines made of chosen outcomes, without a model."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from made_rows import build_row, to_frame

from lrrobust.check.baseline import Rule, build_baseline
from lrrobust.results import SCHEMA_VERSION, Run

PROVENANCE = {"lrrobust": "0.1.0", "python": "3.11", "platform": "Linux", "device": "cpu", "versions": {"torch": "2.13.0"}}


@pytest.fixture(scope="session")
def run_of():
    def make(outcomes, *, models=("model.py:build",), position=0, keys=None, hashes=("a", "b"), is_complete=True, **manifest):
        """A run from (attack, norm, eps) -> bool (n,) of whether each image is robust."""
        n = len(next(iter(outcomes.values())))
        keys = keys or [f"ant/{index:04d}.png" for index in range(n)]
        rows = [
            build_row(
                index, attack, norm, eps, math.inf if robust else 0.0, key=keys[index], wnid="ant", adversarial_margin=1.0
            )
            for (attack, norm, eps), of_images in outcomes.items()
            for index, robust in enumerate(np.asarray(of_images, dtype=bool).tolist())
        ]
        attacks = {}
        for attack, norm, eps in outcomes:
            attacks.setdefault(attack, {"name": attack, "kind": "pgd", "norm": norm, "steps": 20, "eps": []})["eps"].append(
                None if math.isinf(eps) else eps
            )
        full = {
            "schema_version": SCHEMA_VERSION,
            "rows_version": 1,
            "fingerprint": "ab" * 32,
            "created_at": "2026-01-01",
            "command": ["lrrobust"],
            "provenance": PROVENANCE,
            "request": {"models": list(models), "attacks": list(attacks)},
            "position": position,
            "model": {
                "name": models[position],
                "weights": "V1",
                "state_sha256": hashes[0] * 64,
                "code_sha256": hashes[1] * 64,
                "input_size": 8,
            },
            "dataset": {"name": "images", "sha256": "cd" * 32, "n": n, "subset": {"n": None, "seed": 0}},
            "attacks": list(attacks.values()),
            "plan": {"chunk_size": 32, "parts": [["pgd", 0, n]]},
            "seed": 0,
        }
        full = json.loads(json.dumps({**full, **manifest}))
        return Run(Path("/results/run"), full, to_frame(rows), is_complete, {})

    return make


@pytest.fixture(scope="session")
def baseline_of(run_of):
    def make(outcomes, rule=None, **options):
        return build_baseline([run_of(outcomes, **options)], rule or Rule())

    return make
