"""From names to objects to weights: what `lrrobust train` and `lrrobust average` do."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lrrobust.config_file import check_keys
from lrrobust.data.class_lists import composed, load_class_list
from lrrobust.data.evaluation_set import EvaluationSet, build_evaluation_set
from lrrobust.data.image_source import ImageSource
from lrrobust.data.parallel_map import OnProgress
from lrrobust.data.preprocessing import Preprocessing
from lrrobust.data.sources import open_dataset
from lrrobust.data.training_images import load_training_images, match_training_images
from lrrobust.errors import ConfigError, DataError, UnknownNameError, WeightsError
from lrrobust.models.registry import NETWORKS
from lrrobust.processes import choose_device
from lrrobust.provenance import describe_environment
from lrrobust.training.averaging import average_weights, check_alike
from lrrobust.training.export import export_network, weights_path
from lrrobust.training.images import StreamedImages, TrainingImages, TrainingSet
from lrrobust.training.ranks import Ranks
from lrrobust.training.recipe import Recipe, load_recipe
from lrrobust.training.trainer import Training

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingRequest:
    """What is to be trained: a network of ours, a recipe, and where the images are.

    Args:
        workers: processes that decode images while the network trains, where the recipe streams them; 0 for none.
        precision: replaces that of the recipe.
        stop_after: epochs of the recipe's schedule after which the training ends; None is all.
    """

    model: str
    recipe: str
    data: str
    out: Path
    evaluate_on: tuple[str, ...] = ()
    weights_name: str = "CUSTOM"
    device: str = "auto"
    initial_weights: Path | None = None
    workers: int = 0
    precision: str | None = None
    stop_after: int | None = None


def prepare_training(
    request: TrainingRequest,
    on_scan: OnProgress | None = None,
    ranks: Ranks = Ranks(),
    device: torch.device | None = None,
) -> tuple[Training, list[EvaluationSet]]:
    """Loads recipe and images; raises LrRobustError with one line where something does not fit.

    Args:
        ranks, device: of this process, as `joined_ranks` gives them; None is the device of the request.
    """
    recipe: Recipe = load_recipe(request.recipe, request.precision)
    last_size = recipe.size_of_epoch(recipe.last_epoch(request.stop_after) - 1)
    if ranks.is_first and last_size != recipe.image_size:
        _log.warning(
            "training by recipe %s ends at %d pixels, and its networks are for %d: batch statistics depend on the size, so "
            "that they may be far better there than here; a last phase of %d pixels mends that",
            recipe.name,
            last_size,
            recipe.image_size,
            recipe.image_size,
        )
    if request.model not in NETWORKS:
        raise UnknownNameError("network", request.model, NETWORKS)
    classes = load_class_list(recipe.classes)
    _check_weights_name(request.weights_name)
    # Measured at the end by the first process alone.
    sets = request.evaluate_on if ranks.is_first else ()
    evaluation_sets = [build_evaluation_set(open_dataset(d, classes), classes, recipe.preprocessing) for d in sets]
    source = open_dataset(request.data, classes)
    images = _open_training_images(source, classes, recipe, request.workers, on_scan)
    where = choose_device(request.device) if device is None else device
    training = Training(
        request.model, recipe, images, request.out, str(where), request.initial_weights, ranks, request.stop_after
    )
    if ranks.is_first:
        unknown = sorted(set(map(composed, source.wnids)) - set(map(composed, classes)))
        trained = set(training.train_set.labels.tolist())
        untrained = [name for label, name in enumerate(classes) if label not in trained]
        for what, names in (("does not name: left out", unknown), ("names, without an image to train on", untrained)):
            if names:
                _log.warning("%s: classes that the recipe %s: %d, such as %r", source.name, what, len(names), names[0])
    return training, evaluation_sets


def average_trained(
    files: Sequence[Path],
    shares: Sequence[float],
    data: str,
    weights_name: str,
    out: Path,
    evaluate_on: Sequence[str] = (),
    note: str = "",
    on_scan: OnProgress | None = None,
) -> Path:
    """Averages weights, see `average_weights`, measures what came of it, and writes it; the file's path.

    Args:
        data: the images of the last training, since what it held out is not to be looked at but to be measured on.

    Raises:
        LrRobustError: one line says what does not fit.
    """
    _check_weights_name(weights_name)
    shares = shares or [1.0] * len(files)
    *_, last = found = check_alike(files, shares)
    fresh = [each for each in found if each.training.get("initial_weights") is None and "averaged" not in each.training]
    # One training, left at several epochs, is the same up to there.
    if len({(each.recipe_identity, each.training.get("seed"), each.training.get("images_sha256")) for each in fresh}) > 1:
        _log.warning(
            "several of these weights were trained from fresh ones: networks that did not come one from the other mean nothing "
            "together"
        )
    target = weights_path(out, last.model, weights_name)
    if target.exists() and any(target.samefile(file) for file in files):
        raise WeightsError(f"the mean would replace {target}, which it is made of: give another --name, or another --out")
    count, digest = last.training.get("images"), last.training.get("images_sha256")
    if count is None:
        raise WeightsError(
            f"{files[-1]} does not say of how many images it was trained: give a file that `lrrobust train` wrote last"
        )
    recipe = check_keys(last.recipe, Recipe, f"the recipe in {files[-1]}")
    preprocessing = Preprocessing(last.input_size, last.resize_size, last.interpolation)
    evaluation_sets = [build_evaluation_set(open_dataset(d, last.classes), last.classes, preprocessing) for d in evaluate_on]
    images = _open_training_images(open_dataset(data, last.classes), last.classes, recipe, 0, on_scan)
    expected, found = count + recipe.holdout, len(images.labels)
    if found != expected or digest not in (None, images.sha256()):
        raise DataError(
            f"--data: expected the {expected} images that {files[-1]} was trained on, those held out among them, "
            f"found {found}{' others' * (found == expected)}: give the same as to `lrrobust train`"
        )
    images, held_out = images.split(recipe.holdout, recipe.seed)
    network, metadata = average_weights(files, shares, images)
    training = metadata.training | {"note": note, "environment": describe_environment(torch.device("cpu"))}
    metadata = metadata.model_copy(update={"name": weights_name, "training": training})
    return export_network(network, metadata, out, held_out, evaluation_sets)


def _check_weights_name(name: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9_.]+", name):
        raise ConfigError(f"--name must be letters, digits, '_' and '.', got {name!r}")


def _open_training_images(
    source: ImageSource, classes: Sequence[str], recipe: Recipe, workers: int, on_scan: OnProgress | None
) -> TrainingImages:
    if recipe.loading == "memory":
        return TrainingSet(*load_training_images(source, classes, recipe.image_size, on_scan))
    if workers and not source.is_fork_safe:
        raise DataError(
            f"{source.name}: several processes cannot read a zip or a compressed tar at once: "
            "unpack it into class folders, or give --workers 0"
        )
    positions, labels = match_training_images(source, classes)
    return StreamedImages(source, tuple(positions), torch.tensor(labels, dtype=torch.int64), workers)
