"""From outcomes to what is stored: rows, and images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from lrrobust.evaluation.chunk_images import ChunkImages
from lrrobust.evaluation.judge import Prediction
from lrrobust.evaluation.outcomes import AtEps, Outcomes
from lrrobust.evaluation.tasks import Task
from lrrobust.results import AdversarialImage, Example, example_count
from lrrobust.threat import NORMS, distance


def make_rows(
    batch: ChunkImages,
    clean: Prediction,
    outcomes: Outcomes,
    task: Task,
    ladder: Sequence[AtEps],
    earlier: torch.Tensor,
    in_8_bits: bool,
) -> list[dict[str, Any]]:
    """One row per eps and image.

    An image counts as broken at eps when its verified adversarial image lies within eps, also where
    the attack found it at a larger eps only. `earlier` (N,): distances at which attacks before broke them.
    """
    final = zip(
        outcomes.is_broken.tolist(),
        outcomes.breaks_at.tolist(),
        outcomes.prediction.tolist(),
        outcomes.margin.tolist(),
        zip(*(outcomes.distances[norm].tolist() for norm in NORMS), strict=True),
        outcomes.quantized_at.tolist(),
        earlier.tolist(),
        strict=True,
    )
    images = list(
        zip(
            batch.indices,
            batch.keys,
            batch.wnids,
            batch.labels.tolist(),
            clean.label.tolist(),
            clean.margin.tolist(),
            outcomes.is_clean_correct.tolist(),
            final,
            strict=True,
        )
    )
    rows = []
    smaller_eps = -math.inf
    for step in ladder:
        at_eps = zip(
            step.wall_s.tolist(),
            step.forwarded.tolist(),
            step.backwarded.tolist(),
            step.prediction.tolist(),
            step.margin.tolist(),
            step.is_rejected.tolist(),
            strict=True,
        )
        for image, proposal in zip(images, at_eps, strict=True):
            index, key, wnid, label, clean_prediction, clean_margin, is_clean_correct, found = image
            ever_broken, breaks_at, prediction, margin, lengths, quantized_at, broken_earlier_at = found
            wall_s, forwarded, backwarded, last_prediction, last_margin, is_rejected = proposal
            is_broken = ever_broken and breaks_at <= step.eps
            # Infinity stands for never, also where the budget is infinite.
            was_broken_before = math.isfinite(broken_earlier_at) and broken_earlier_at <= step.eps and not is_broken
            is_broken_quantized = None
            if in_8_bits and is_broken:
                in_8_bits_at = min(quantized_at, broken_earlier_at)
                is_broken_quantized = math.isfinite(in_8_bits_at) and in_8_bits_at <= step.eps
            # A minimal-norm attack's image beyond eps is no proposal at eps.
            is_beyond = task.spec.minimises and ever_broken and not is_broken
            has_proposal = is_clean_correct and not is_beyond and not was_broken_before
            if not is_clean_correct:
                outcome = "wrong_when_clean"
            elif is_broken:
                outcome = "broken_at_smaller_eps" if breaks_at <= smaller_eps else "broken"
            elif was_broken_before:
                outcome = "broken_by_earlier_attack"
            else:
                outcome = "rejected" if is_rejected else "robust"
            rows.append(
                {
                    "index": index,
                    "key": key,
                    "label": label,
                    "wnid": wnid,
                    "attack": task.spec.name,
                    "norm": task.spec.norm,
                    "eps": step.eps,
                    "clean_prediction": clean_prediction,
                    "is_clean_correct": is_clean_correct,
                    "adversarial_prediction": (prediction if is_broken else last_prediction) if has_proposal else None,
                    "is_broken": is_broken or was_broken_before or not is_clean_correct,
                    "outcome": outcome,
                    **{f"{norm}_distance": length if is_broken else None for norm, length in zip(NORMS, lengths)},
                    "is_broken_quantized": is_broken_quantized,
                    "clean_margin": clean_margin,
                    "adversarial_margin": (margin if is_broken else last_margin) if has_proposal else None,
                    "wall_s": wall_s,
                    "forward_passes": forwarded,
                    "backward_passes": backwarded,
                }
            )
        smaller_eps = step.eps
    return rows


def make_examples(batch: ChunkImages, outcomes: Outcomes, task: Task) -> list[Example]:
    """The correct ones among the first images of the subset: the same images whatever the model and attack."""
    # They are for looking at: images of three colours.
    kept = example_count(*batch.images.shape[-2:]) - task.chunk.start if batch.images.shape[1] == 3 else 0
    examples = []
    for row in outcomes.is_clean_correct[: max(kept, 0)].nonzero().flatten().tolist():
        clean = batch.images[row].permute(1, 2, 0)
        perturbation = (outcomes.nearest[row] - batch.images[row]).permute(1, 2, 0).half().cpu().numpy()
        examples.append(
            Example(
                batch.indices[row],
                (255 * clean).round().to(torch.uint8).cpu().numpy(),
                perturbation if outcomes.is_broken[row] else None,
            )
        )
    return examples


def make_adversarial_images(batch: ChunkImages, outcomes: Outcomes, task: Task) -> list[AdversarialImage]:
    """The verified adversarial images of 8 bits, one at most for each image."""
    if outcomes.quantized is None:
        return []
    rows = outcomes.quantized_at.isfinite().nonzero().squeeze(1)
    clean, found = batch.images[rows], outcomes.quantized[rows]
    lengths = {f"{norm}_distance": distance(clean, found, norm).tolist() for norm in NORMS}
    pixels = [(255 * images).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy() for images in (clean, found)]
    reached, predictions = outcomes.quantized_at[rows].tolist(), outcomes.quantized_prediction[rows].tolist()
    return [
        AdversarialImage(
            batch.indices[row],
            batch.keys[row],
            batch.wnids[row],
            int(batch.labels[row]),
            predictions[place],
            task.spec.norm,
            next((eps for eps in task.spec.eps if reached[place] <= eps), math.inf),
            **{name: values[place] for name, values in lengths.items()},
            clean=pixels[0][place],
            adversarial=pixels[1][place],
        )
        for place, row in enumerate(rows.tolist())
    ]
