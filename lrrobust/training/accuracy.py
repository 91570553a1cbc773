"""Clean accuracy while training, and of what came of it."""

from __future__ import annotations

import torch
from torch import nn

from lrrobust.data.evaluation_set import EvaluationSet
from lrrobust.data.preprocessing import Preprocessing
from lrrobust.determinism import deterministic_float32
from lrrobust.training.images import TrainingImages
from lrrobust.training.ranks import Ranks

#: Images at once on the CPU, and pixels on a GPU, where 1000 images of 64 x 64 take as long as 100.
_IMAGES_AT_ONCE, _PIXELS_ON_A_GPU = 100, 1000 * 64**2


def _batch_size(device: torch.device, side: int) -> int:
    return _IMAGES_AT_ONCE if device.type == "cpu" else max(1, _PIXELS_ON_A_GPU // side**2)


@torch.inference_mode()
def accuracy_on_images(
    network: nn.Module, data: TrainingImages, preprocessing: Preprocessing, precision: str, ranks: Ranks = Ranks()
) -> tuple[float, float]:
    """Top-1 and top-5 accuracy as fractions; every process measures its share of the images.

    Args:
        preprocessing: of images that are not in memory already.
        precision: "bf16" runs the network under autocast.
    """
    device = next(network.parameters()).device
    hits = torch.zeros(2, dtype=torch.int64, device=device)
    own = range(ranks.rank, len(data.labels), ranks.count)
    for images, labels in data.whole(own, preprocessing, _batch_size(device, preprocessing.input_size)):
        inputs = (images.to(device).float() / 255).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            logits = network(inputs)
        hits += _hits(logits, labels)
    top1, top5 = (ranks.total(count, device) / len(data.labels) for count in hits.tolist())
    return top1, top5


@torch.inference_mode()
def accuracy_on_set(network: nn.Module, images: EvaluationSet) -> tuple[float, float]:
    """Top-1 and top-5 accuracy as fractions, in the float32 of an evaluation."""
    device = next(network.parameters()).device
    batch_size = _batch_size(device, images.input_size)
    hits = torch.zeros(2, dtype=torch.int64, device=device)
    with deterministic_float32():
        for start in range(0, len(images), batch_size):
            batch, labels = images.load(range(start, min(start + batch_size, len(images))))
            hits += _hits(network(batch.to(device)), labels)
    top1, top5 = (count / len(images) for count in hits.tolist())
    return top1, top5


def _hits(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """How many labels are the first, and how many among the first five; int64 (2,)."""
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels.to(logits.device).view(-1, 1)
    return torch.stack([best[:, 0].sum(), best.any(1).sum()])
