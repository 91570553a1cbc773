"""Which images the page shows, and their pictures: chosen by a rule, the same for all models."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from PIL import Image, features

from lrrobust.formatting import format_distance, format_eps
from lrrobust.results import Example, Run, load_examples

#: Images shown at most, and pictures on a page at most, whatever the number of runs and attacks.
_MOST_IMAGES, _MOST_PICTURES = 3, 160

#: Of the pictures, pixel for pixel; WebP is a fifth smaller, and missing from some builds of Pillow.
_FORMAT = "WEBP" if features.check("webp") else "PNG"


@dataclass(frozen=True)
class Attempt:
    """What one attack did to one image under one model; pictures are data URIs.

    `factor` is what the perturbation is multiplied by before it is added to mid grey. All but `run` and
    `detail` are None when the attack found no adversarial image.
    """

    run: str
    factor: float | None
    perturbation: str | None
    adversarial: str | None
    predicted: str | None
    detail: str


@dataclass(frozen=True)
class Shown:
    """One image under one attack."""

    index: int
    key: str
    true_class: str
    clean: str
    attempts: Sequence[Attempt]


@dataclass(frozen=True)
class Gallery:
    """Attack -> its images, or why there are none; `missing` names the runs that kept no examples."""

    attacks: Mapping[str, Sequence[Shown]]
    missing: Sequence[str]
    reason: str | None


NO_GALLERY = Gallery({}, (), "Images were left out on request (--no-gallery).")


def build_gallery(runs: Mapping[str, Run], labels: Mapping[str, str]) -> Gallery:
    """The first images of the subset that every run classifies correctly, among those that runs keep.

    Args:
        runs: name -> run, all of one dataset.
        labels: name -> what readers call the run.

    Raises:
        StoreError: a file of examples cannot be read.
    """
    loaded = {name: load_examples(run) for name, run in runs.items()}
    kept = {name: examples for name, examples in loaded.items() if examples}
    missing = [labels[name] for name in runs if name not in kept]
    if not kept:
        reason = "These runs kept no adversarial images: they were made before runs did, or are at their start."
        return Gallery({}, missing, reason)
    # Images that no row speaks of are none of ours.
    known = (set(runs[name].rows["index"].unique()) for name in kept)
    common = sorted(
        set.intersection(*({e.index for found in examples.values() for e in found} for examples in kept.values()), *known)
    )
    if not common:
        return Gallery({}, missing, "No image at the beginning of the subset is classified correctly by every model.")
    attacks = list(dict.fromkeys(attack for examples in kept.values() for attack in examples))
    per_image = sum(1 + 2 * sum(attack in examples for examples in kept.values()) for attack in attacks)
    chosen = common[: max(1, min(_MOST_IMAGES, _MOST_PICTURES // per_image))]
    rows = {name: run.rows[run.rows["index"].isin(chosen)].to_dict("records") for name, run in runs.items()}
    shown = {}
    for attack in attacks:
        of_attack = {name: {e.index: e for e in examples[attack]} for name, examples in kept.items() if attack in examples}
        shown[attack] = [_show(index, attack, of_attack, runs, rows, labels) for index in chosen if _is_known(index, of_attack)]
    return Gallery(shown, missing, None)


def class_name(run: Run, label: int) -> str:
    """What the run calls a class; its number where the run does not say, as older ones do not."""
    names = run.manifest.get("class_names") or ()
    return str(names[label]) if 0 <= label < len(names) else f"class {label}"


def _is_known(index: int, of_attack: Mapping[str, Mapping[int, Example]]) -> bool:
    # A run that is not finished may have the image under its first attacks only.
    return any(index in examples for examples in of_attack.values())


def _show(
    index: int,
    attack: str,
    of_attack: Mapping[str, Mapping[int, Example]],
    runs: Mapping[str, Run],
    rows: Mapping[str, Sequence[Mapping[str, object]]],
    labels: Mapping[str, str],
) -> Shown:
    examples = {name: found[index] for name, found in of_attack.items() if index in found}
    name, first = next(iter(examples.items()))
    (row, *_) = (row for row in rows[name] if row["index"] == index)
    attempts = [
        _attempt(labels[name], example, runs[name], [r for r in rows[name] if (r["index"], r["attack"]) == (index, attack)])
        for name, example in examples.items()
    ]
    true_class = class_name(runs[name], int(row["label"]))
    return Shown(index, str(row["key"]), true_class, _data_uri(first.clean), attempts)


def _attempt(label: str, example: Example, run: Run, rows: Sequence[Mapping[str, object]]) -> Attempt:
    broken = [row for row in rows if pd.notna(row[f"{row['norm']}_distance"]) and pd.notna(row["adversarial_prediction"])]
    if example.perturbation is None and any(row["outcome"] == "broken_by_earlier_attack" for row in rows):
        return Attempt(label, None, None, None, None, "not attacked: an earlier attack of the suite had broken it")
    if example.perturbation is None or not broken:
        finite = [row for row in rows if math.isfinite(row["eps"])]
        largest = max(finite or rows, key=lambda row: row["eps"], default=None)
        tried = "" if largest is None else f" at {largest['norm']} eps {format_eps(largest['eps'], largest['norm'])} or below"
        return Attempt(label, None, None, None, None, f"none found{tried}")
    row = min(broken, key=lambda row: row["eps"])
    distance = row[f"{row['norm']}_distance"]
    found = "" if math.isinf(row["eps"]) else f", within eps {format_eps(row['eps'], row['norm'])}"
    perturbation = example.perturbation.astype(np.float32)
    factor = _factor(perturbation)
    return Attempt(
        label,
        factor,
        _data_uri(_to_bytes(0.5 + factor * perturbation)),
        _data_uri(_to_bytes(example.clean.astype(np.float32) / 255 + perturbation)),
        class_name(run, int(row["adversarial_prediction"])),
        f"{row['norm']} distance {format_distance(distance, row['norm'])}{found}",
    )


def _factor(perturbation: np.ndarray) -> float:
    """The largest power of two that keeps 99 % of the values within mid grey -+ 0.5."""
    high = float(np.quantile(abs(perturbation), 0.99)) or float(abs(perturbation).max())
    return 2.0 ** math.floor(math.log2(0.5 / high)) if high else 1.0


def _to_bytes(image: np.ndarray) -> np.ndarray:
    return (255 * image.clip(0, 1)).round().astype(np.uint8)


def _data_uri(pixels: np.ndarray) -> str:
    buffer = io.BytesIO()
    # Of WebP's efforts the default costs six times as long for one percent.
    Image.fromarray(pixels).save(buffer, _FORMAT, lossless=True, method=2)
    return f"data:image/{_FORMAT.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
