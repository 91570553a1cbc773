"""Runs made of nothing but distances: what an attack needs to break each image."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from found_safeguards import GOOD
from made_rows import to_frame

from lrrobust.diagnostics.records import Diagnostic, Diagnostics, write_diagnostics
from lrrobust.results import SCHEMA_VERSION, Run
from lrrobust.verdict.evidence import collect_evidence
from lrrobust.verdict.records import Claim
from lrrobust.verdict.safeguards import check_evidence

SOUND = Diagnostic(name="zero_gradient", passed=True, detail="All images have a gradient.", attack=None)


def build_large_eps(attack: str | None, passed: bool | None = True, norm: str = "linf") -> Diagnostic:
    """What an evaluation notes of an attack at a budget that holds plain grey."""
    survivors = 0 if passed else 3
    detail = f"{survivors} of 32 images withstand {attack}."
    return Diagnostic(name="large_eps", passed=passed, detail=detail, attack=attack, norm=norm)


def write_results(run: Run, results: Sequence[Diagnostic]) -> None:
    """Puts diagnostics into the folder of the run."""
    write_diagnostics(run, Diagnostics(fingerprint="ab" * 32, sample=(0,), wall_s=1, results=tuple(results)))


LADDER = (0.5 / 255, 1 / 255, 2 / 255)


@dataclass(frozen=True)
class Attack:
    """An attack and the distance it needs for each image: 0 wrong when clean, infinity never broken."""

    distances: Sequence[float]
    norm: str = "linf"
    eps: Sequence[float] = LADDER
    steps: int = 20


def columns(name: str, attack: Attack, images: Sequence[int]) -> dict[str, Any]:
    """The rows of one attack as columns, image by image within each eps."""
    distance = np.asarray(attack.distances, dtype=np.float64)
    n, m = len(distance), len(attack.eps)
    eps, distance, index = np.repeat(attack.eps, n), np.tile(distance, m), np.tile(images, m)
    is_correct = distance > 0
    is_found = is_correct & (distance <= eps) & np.isfinite(distance)
    length = [value if found else None for value, found in zip(distance.tolist(), is_found)]
    other = [9.0 if found else None for found in is_found]
    return {
        "index": index,
        "key": [f"ant/{i}.png" for i in index.tolist()],
        "label": (label := (index % 10).astype(np.int32)),
        "wnid": ["ant"] * (n * m),
        "attack": [name] * (n * m),
        "norm": [attack.norm] * (n * m),
        "eps": eps,
        "clean_prediction": np.where(is_correct, label, (label + 1) % 10).astype(np.int32),
        "is_clean_correct": is_correct,
        "adversarial_prediction": np.zeros(n * m, np.int32),
        "is_broken": is_found | ~is_correct,
        "outcome": np.where(is_correct, np.where(is_found, "broken", "robust"), "wrong_when_clean").tolist(),
        "linf_distance": length if attack.norm == "linf" else other,
        "l2_distance": length if attack.norm == "l2" else other,
        "clean_margin": np.ones(n * m),
        "adversarial_margin": np.ones(n * m),
        "wall_s": np.zeros(n * m),
        "l1_distance": other,
        "forward_passes": np.ones(n * m, np.int64),
        "backward_passes": np.ones(n * m, np.int64),
        "is_broken_quantized": [None] * (n * m),
    }


def build_run(
    model: str,
    attacks: Mapping[str, Mapping[str, Any]],
    *,
    images: Sequence[int] | None = None,
    folder: Path | None = None,
    dataset: str = "sample",
    weights: str | None = "V1",
    input_size: int = 64,
    seed: int = 0,
    is_complete: bool = True,
    part_metadata: Mapping[str, dict[str, str]] | None = None,
    surrogate: str | None = None,
    recipe: str | None = "short 1234",
    followed: str = "3 of 3 epochs",
) -> Run:
    """A run from the fields of `Attack` by name of attack; `images` are the numbers of the images, one class in ten each."""
    specs = {name: Attack(**attack) for name, attack in attacks.items()}
    n = max(len(attack.distances) for attack in specs.values())
    images = range(n) if images is None else images
    frames = [to_frame(columns(name, attack, images[: len(attack.distances)])) for name, attack in specs.items()]
    rows = pd.concat(frames, ignore_index=True)
    return Run(
        folder=folder or Path("/results") / f"{model}-{dataset}-{weights}-{n}-{'-'.join(attacks)}",
        manifest={
            "schema_version": SCHEMA_VERSION,
            "fingerprint": "ab" * 32,
            "model": {"name": model, "weights": weights, "state_sha256": "ef" * 32, "input_size": input_size},
            "dataset": {"name": dataset, "sha256": hashlib.sha256(repr(list(images)).encode()).hexdigest(), "n": n},
            "attacks": [
                {
                    "name": name,
                    "norm": attack.norm,
                    "kind": name,
                    "eps": [e for e in attack.eps if math.isfinite(e)],
                    "steps": attack.steps,
                }
                for name, attack in specs.items()
            ],
            "plan": {"chunk_size": 50},
            "seed": seed,
            **({} if surrogate is None else {"surrogate": {"name": surrogate, "weights": weights}}),
            **({} if recipe is None else {"training": {"recipe": recipe, "followed": followed}}),
            "provenance": {"commit": "1234abc"},
        },
        rows=rows,
        is_complete=is_complete,
        part_metadata=dict(part_metadata or {}),
    )


@pytest.fixture
def make_run(tmp_path):
    """`build_run`, in folders with diagnostics that passed."""

    def make(model: str, attacks: Mapping[str, Mapping[str, Any]], *, folder: Path | None = None, **options: Any) -> Run:
        run = build_run(model, attacks, folder=folder, **options)
        if folder is None:
            run = replace(run, folder=tmp_path / run.folder.relative_to("/results"))
            write_results(
                run, [SOUND, *(build_large_eps(name, norm=attack.get("norm", "linf")) for name, attack in attacks.items())]
            )
        return run

    return make


@pytest.fixture
def large_eps():
    return build_large_eps


@pytest.fixture
def note():
    """Replaces the diagnostics of a run."""
    return write_results


@pytest.fixture
def make_claim():
    def make(**changes: Any) -> Claim:
        settings = {
            "name": "tested",
            "statement": "A is more robust than B.",
            "source": "a test",
            "treatment": "A",
            "control": "B",
            "direction": "more_robust",
            "significance": 0.05,
            "power": 0.8,
            "smallest_difference": 0.02,
            "largest_clean_difference": 0.02,
        }
        return Claim(**settings | changes)

    return make


@pytest.fixture
def check_runs(make_claim):
    def check_runs(runs, **claim):
        (evidence,), _ = collect_evidence(make_claim(**claim), runs)
        return check_evidence(evidence)

    return check_runs


@pytest.fixture
def check(check_runs, make_run):
    def check(treatment=None, control=None, change=lambda runs: None, **claim):
        runs = [make_run("A", GOOD, **treatment or {}), make_run("B", GOOD, **control or {})]
        change(runs)
        return check_runs(runs, **claim)

    return check
