"""Weights averaged over trainings that went on from one another."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from lrrobust.data.preprocessing import Preprocessing
from lrrobust.errors import ConfigError, WeightsError
from lrrobust.models.registry import build_network
from lrrobust.models.weights import WeightsMetadata, fit_weights, read_metadata, read_weights, tensors_sha256
from lrrobust.training.images import TrainingImages

#: Images that the statistics of batch normalisation are taken of at most, and about how many at once.
STATISTICS_IMAGES, _AT_ONCE = 4096, 128

#: What averaged weights have in common.
_IN_COMMON = ("model", "stem", "input_size", "resize_size", "interpolation", "classes")

#: What of the last training is said of the mean too.
_OF_THE_LAST = ("images", "images_sha256", "steps", "epochs", "schedule_epochs", "seed", "initial_weights")


def check_alike(files: Sequence[Path], shares: Sequence[float]) -> list[WeightsMetadata]:
    """What each file says of itself.

    Raises:
        ConfigError: fewer than two files, or shares that do not fit.
        WeightsError: a file cannot be read, says nothing of itself, or is of another network than the first.
    """
    if len(files) < 2:
        raise ConfigError(f"expected two files of weights to average at least, found {len(files)}")
    if len(shares) != len(files) or not all(0 < share < float("inf") for share in shares):
        found = ", ".join(f"{share:g}" for share in shares) or "none"
        raise ConfigError(f"--share: expected a number above 0 for each of the {len(files)} files, found {found}")
    known = [read_metadata(path) for path in files]
    for path, metadata in zip(files, known, strict=True):
        for field in _IN_COMMON:
            ours, first = getattr(metadata, field), getattr(known[0], field)
            if ours != first:
                said = ("other classes", "its own") if field == "classes" else (f"{field} {ours}", str(first))
                raise WeightsError(f"{path} has {said[0]}, {files[0]} has {said[1]}: average weights of one network")
    return known


def average_weights(
    files: Sequence[Path], shares: Sequence[float], images: TrainingImages
) -> tuple[nn.Module, WeightsMetadata]:
    """The weighted mean of several weights of one network, which is often better than each where one came from another.

    Statistics of batch normalisation cannot be averaged: they are taken anew, of images without augmentation.
    Sources: Izmailov et al., Averaging Weights Leads to Wider Optima and Better Generalization, UAI 2018, section 3.2;
    Wortsman et al., Model soups, ICML 2022.

    Args:
        files: of weights as `lrrobust train` writes them.
        shares: of each in the mean, above 0; only their ratios count.
        images: that were trained on, for the statistics, of which it takes up to `STATISTICS_IMAGES`.

    Returns:
        The network in evaluation mode, and the metadata of the last file with what was averaged, but no accuracy.

    Raises:
        ConfigError, WeightsError: see `check_alike`.
    """
    known = check_alike(files, shares)
    last = known[-1]
    states = [read_weights(path)[0] for path in files]
    parts = [share / sum(shares) for share in shares]
    network = build_network(last.model, len(last.classes), last.stem)
    fit_weights(network, {key: _mean([state[key] for state in states], parts) for key in states[0]}, "the mean of the weights")
    preprocessing = Preprocessing(last.input_size, last.resize_size, last.interpolation)
    count = _take_statistics(network, images, preprocessing)
    averaged = [
        {
            "name": metadata.name,
            "sha256": tensors_sha256(state),
            "share": round(part, 6),
            "recipe": metadata.recipe_identity,
            "followed": metadata.followed,
        }
        for metadata, state, part in zip(known, states, parts, strict=True)
    ]
    training = {key: last.training[key] for key in _OF_THE_LAST if key in last.training}
    holdout, seed = last.recipe.get("holdout", 0), last.recipe.get("seed")
    unseen = all(metadata.has_never_seen(holdout, seed, len(images.labels) + holdout) for metadata in known)
    training |= {"averaged": averaged, "statistics_images": count, "held_out_unseen": unseen}
    return network.eval(), last.model_copy(update={"training": training, "accuracy": ()})


def _mean(tensors: Sequence[torch.Tensor], parts: Sequence[float]) -> torch.Tensor:
    if not tensors[0].is_floating_point():
        return tensors[-1]
    return sum(part * tensor.double() for part, tensor in zip(parts, tensors, strict=True)).to(tensors[0].dtype)


@torch.no_grad()
def _take_statistics(network: nn.Module, images: TrainingImages, preprocessing: Preprocessing) -> int:
    """Sets the statistics of batch normalisation; of how many images."""
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean of all batches
    network.train()
    # Images of one class lie side by side: chosen from all over the set, and each batch from all over the chosen, since what
    # varies between batches is in no batch's variance. In batches alike but for one image, since their mean takes no account of
    # their size.
    chosen = range(0, len(images.labels), -(-len(images.labels) // STATISTICS_IMAGES))
    batches = max(1, len(chosen) // _AT_ONCE)
    for first in range(batches):
        own = chosen[first::batches]
        for stored, _ in images.whole(own, preprocessing, len(own)):
            network((stored.float() / 255).contiguous(memory_format=torch.channels_last))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return len(chosen)
