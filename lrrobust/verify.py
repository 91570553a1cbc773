"""Reads exported adversarial images back from their files, and judges them again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lrrobust.data.class_lists import composed
from lrrobust.determinism import deterministic_float32
from lrrobust.errors import ModelError
from lrrobust.evaluation.chunks import DEFAULT_BATCH_SIZE
from lrrobust.evaluation.judge import Judge
from lrrobust.export import open_export, read_pairs
from lrrobust.frozen import frozen
from lrrobust.planned_evaluation import NamedClassifier
from lrrobust.threat import ThreatModel


@dataclass(frozen=True)
class Verification:
    """What a model makes of the exported images of one attack, read from their files.

    Attributes:
        n: adversarial images.
        in_ball: those within the eps that the index gives, distances computed anew.
        clean_correct: those whose clean image the model classifies correctly.
        adversarial: those that are in the ball, misclassified, and correct when clean.
        as_recorded: those predicted as the index says.
    """

    attack: str
    n: int
    in_ball: int
    clean_correct: int
    adversarial: int
    as_recorded: int


#: Entries of a model's record by which it was asked for.
_NAMES = {"name": None, "weights": None}


def verify_export(
    folder: Path, model: NamedClassifier, device: torch.device, batch_size: int = DEFAULT_BATCH_SIZE
) -> tuple[list[Verification], bool]:
    """Judges exported images in float32, as the evaluation did that found them.

    Args:
        folder: made by `lrrobust export`.
        model: that of the run, whose images must all be adversarial again, or any other.
        device: where to compute.

    Returns:
        One record an attack, and whether the model is the one that the images were verified with: the same parameters,
        structure and preprocessing.

    Raises:
        StoreError: the index or an image is missing or damaged.
        ModelError: the model knows a class not, or takes images of another size.
    """
    export = open_export(folder)
    classifier = model.classifier
    label_of = {composed(wnid): label for label, wnid in enumerate(classifier.classes)}
    unknown = sorted({composed(row["wnid"]) for row in export.rows} - label_of.keys())
    if unknown:
        raise ModelError(f"{model.name} does not know the class {unknown[0]!r} of the images in {folder}")
    # What names it is no part of it: files are renamed.
    is_same = {**model.record, **_NAMES} == {**export.about["model"], **_NAMES}
    # As in the evaluation, to the last bit: minimal perturbations end at the very boundary.
    module = model.folded.module.to(device)
    judge = Judge(module, len(classifier.classes), batch_size)
    counts: dict[str, list[int]] = {}
    pairs = read_pairs(export)
    with frozen(module), deterministic_float32():
        while batch := list(islice(pairs, batch_size)):
            for norm in dict.fromkeys(row["norm"] for row, _, _ in batch):
                of_norm = [pair for pair in batch if pair[0]["norm"] == norm]
                judged = _judge(judge, of_norm, label_of, classifier.input_size, device)
                for (row, _, _), found in zip(of_norm, judged, strict=True):
                    total = counts.setdefault(row["attack"], [0] * 5)
                    counts[row["attack"]] = [have + bool(more) for have, more in zip(total, found, strict=True)]
    return [Verification(attack, *found) for attack, found in counts.items()], is_same


def _judge(
    judge: Judge,
    pairs: Sequence[tuple[dict[str, Any], np.ndarray, np.ndarray]],
    label_of: dict[str, int],
    input_size: int,
    device: torch.device,
) -> list[tuple[bool, ...]]:
    """For each pair: counted, in the ball, correct when clean, adversarial, predicted as recorded."""
    rows = [row for row, _, _ in pairs]
    for row, clean, _ in pairs:
        if clean.shape != (input_size, input_size, 3):
            height, width, _ = clean.shape
            raise ModelError(f"{row['clean_file']} has {width} x {height} pixels, the model takes {input_size} x {input_size}")
    clean, adversarial = (
        torch.from_numpy(np.stack([pair[place] for pair in pairs])).to(device).permute(0, 3, 1, 2).contiguous().float() / 255
        for place in (1, 2)
    )
    labels = torch.tensor([label_of[composed(row["wnid"])] for row in rows], device=device)
    keys = [row["file"] for row in rows]
    threat = ThreatModel(rows[0]["norm"], torch.tensor([row["eps"] for row in rows], dtype=torch.float64, device=device))
    is_correct = judge.predict(clean, labels, keys).label == labels
    verdict = judge.judge(clean, labels, adversarial, threat, keys)
    is_as_recorded = verdict.prediction.label == torch.tensor([row["prediction"] for row in rows], device=device)
    in_ball = threat.is_in_ball(clean, adversarial)
    is_adversarial = verdict.is_adversarial & is_correct
    return list(zip([True] * len(rows), *(each.tolist() for each in (in_ball, is_correct, is_adversarial, is_as_recorded))))
