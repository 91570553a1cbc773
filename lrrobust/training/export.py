"""From a training to a file of weights that says what it is."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lrrobust.data.evaluation_set import EvaluationSet
from lrrobust.data.preprocessing import Preprocessing
from lrrobust.determinism import deterministic_float32
from lrrobust.models.weights import Accuracy, WeightsMetadata, dequantise, fit_weights, quantise, save_weights
from lrrobust.provenance import describe_environment
from lrrobust.training.accuracy import accuracy_on_images, accuracy_on_set
from lrrobust.training.images import TrainingImages

if TYPE_CHECKING:
    from lrrobust.training.trainer import Training

_log = logging.getLogger(__name__)

#: The name under which the accuracy on them stands in the metadata.
HELD_OUT = "held out of the training images"


def export_weights(training: Training, name: str, evaluation_sets: Sequence[EvaluationSet], note: str = "") -> Path:
    """Writes the averaged weights as int8 with their metadata, measured on the held-out images and the sets given.

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
            # Of these and those held out.
            "images_sha256": training.images_sha256,
            "steps": training.step,
            "epochs": len(training.rows),
            # Fewer were done where the training was stopped before its recipe's end.
            "schedule_epochs": recipe.epochs,
            "seed": recipe.seed,
            "initial_weights": _describe_initial_weights(training),
            "held_out_unseen": training.is_held_out_unseen,
            "note": note,
            "wall_s": round(training.wall_s, 1),
            "threads": torch.get_num_threads(),
            "processes": training.ranks.count,
            "environment": describe_environment(training.device),
        },
        accuracy=(),
    )
    return export_network(training.average, metadata, training.folder, training.held_out, evaluation_sets)


def weights_path(folder: Path, model: str, name: str) -> Path:
    """Where weights of a network are written to."""
    return folder / f"{model}-{name.lower()}.safetensors"


def export_network(
    network: nn.Module,
    metadata: WeightsMetadata,
    folder: Path,
    held_out: TrainingImages,
    evaluation_sets: Sequence[EvaluationSet],
) -> Path:
    """Writes a network's weights as int8, with metadata to which its accuracy is added, of the weights as stored.

    Args:
        held_out: images that the training left out; there may be none. Where it went on from weights that may have been trained
            on them, a warning says so, and nothing is measured on them.

    Returns:
        The file's path: MODEL-NAME.safetensors in `folder`.
    """
    stored = quantise(network.state_dict())
    rounded = copy.deepcopy(network)
    fit_weights(rounded, dequantise(stored), "the rounded state")

    def measure(dataset: str, sha256: str, n: int, score: Callable[[nn.Module], tuple[float, float]]) -> Accuracy:
        (exact, _), (top1, top5) = score(network), score(rounded)
        return Accuracy(dataset=dataset, dataset_sha256=sha256, n=n, top1=top1, top5=top5, top1_float32=exact)

    accuracies = []
    if (n := len(held_out.labels)) and metadata.training["held_out_unseen"]:
        preprocessing = Preprocessing(metadata.input_size, metadata.resize_size, metadata.interpolation)
        with deterministic_float32():
            accuracies.append(
                measure(HELD_OUT, held_out.sha256(), n, lambda x: accuracy_on_images(x, held_out, preprocessing, "float32"))
            )
    elif n:
        _log.warning(
            "no accuracy on held-out images is stored: the weights that %s went on from may have seen them", metadata.name
        )
    for images in evaluation_sets:
        accuracies.append(measure(images.name, images.sha256, len(images), partial(accuracy_on_set, images=images)))
    path = weights_path(folder, metadata.model, metadata.name)
    save_weights(path, stored, metadata.model_copy(update={"accuracy": tuple(accuracies)}))
    return path


def _describe_initial_weights(training: Training) -> dict[str, Any] | None:
    """What `WeightsMetadata` reads again: of weights that say nothing of themselves, neither recipe nor stages."""
    said = training.initial_metadata
    if said is None:
        return training.initial_weights
    return {**training.initial_weights, "recipe": said.recipe_identity, "stages": said.stages}
