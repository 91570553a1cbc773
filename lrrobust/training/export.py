"""From a training to a file of weights that says what it is."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from lrrobust.data.evaluation_set import EvaluationSet
from lrrobust.models.weights import Accuracy, WeightsMetadata, dequantise, fit_weights, quantise, save_weights
from lrrobust.provenance import describe_environment
from lrrobust.training.accuracy import accuracy_on_set

if TYPE_CHECKING:
    from lrrobust.training.trainer import Training


def export_weights(training: Training, name: str, evaluation_sets: Sequence[EvaluationSet], note: str = "") -> Path:
    """Writes the averaged weights as int8 with their metadata, measured on the sets given.

    Args:
        name: of the weights, as in TINY_IMAGENET_V1.
        evaluation_sets: where top-1 and top-5 accuracy are measured, before and after rounding to int8.
        note: what the recipe does not say of this training.
    """
    recipe = training.recipe
    metadata = WeightsMetadata(
        name=name,
        model=training.model_name,
        stem=recipe.stem,
        description=recipe.description,
        classes=training.classes,
        input_size=recipe.preprocessing.input_size,
        resize_size=recipe.preprocessing.resize_size,
        interpolation=recipe.preprocessing.interpolation,
        recipe=recipe.model_dump(mode="json"),
        training={
            "images": len(training.train_set.labels),
            "steps": training.step,
            "epochs": len(training.rows),
            # Fewer were done where the training was stopped before its recipe's end.
            "schedule_epochs": recipe.epochs,
            "seed": recipe.seed,
            "initial_weights": training.initial_weights,
            "note": note,
            "wall_s": round(training.wall_s, 1),
            "threads": torch.get_num_threads(),
            "processes": training.ranks.count,
            "environment": describe_environment(training.device),
        },
        accuracy=(),
    )
    return export_network(training.average, metadata, training.folder, evaluation_sets)


def export_network(
    network: nn.Module, metadata: WeightsMetadata, folder: Path, evaluation_sets: Sequence[EvaluationSet]
) -> Path:
    """Writes a network's weights as int8, with metadata to which its accuracy on the sets is added.

    Returns:
        The file's path: MODEL-NAME.safetensors in `folder`.
    """
    stored = quantise(network.state_dict())
    rounded = copy.deepcopy(network)
    fit_weights(rounded, dequantise(stored), "the rounded state")
    accuracies = []
    for images in evaluation_sets:
        exact, _ = accuracy_on_set(network, images)
        top1, top5 = accuracy_on_set(rounded, images)
        accuracies.append(
            Accuracy(
                dataset=images.name, dataset_sha256=images.sha256, n=len(images), top1=top1, top5=top5, top1_float32=exact
            )
        )
    path = folder / f"{metadata.model}-{metadata.name.lower()}.safetensors"
    save_weights(path, stored, metadata.model_copy(update={"accuracy": tuple(accuracies)}))
    return path
