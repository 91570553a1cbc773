"""Clean accuracy while training, and of what came of it."""

from __future__ import annotations

import torch
from torch import nn

from lrrobust.data.evaluation_set import EvaluationSet
from lrrobust.data.preprocessing import Preprocessing
from lrrobust.training.images import TrainingImages
from lrrobust.training.ranks import Ranks

EVALUATION_BATCH_SIZE = 100


@torch.inference_mode()
def accuracy_on_images(
    network: nn.Module, data: TrainingImages, preprocessing: Preprocessing, precision: str, ranks: Ranks
) -> float:
    """Top-1 accuracy as a fraction; every process measures its share of the images.

    Args:
        preprocessing: of images that are not in memory already.
        precision: "bf16" runs the network under autocast.
    """
    device = next(network.parameters()).device
    correct = torch.zeros((), dtype=torch.int64, device=device)
    own = range(ranks.rank, len(data.labels), ranks.count)
    for images, labels in data.whole(own, preprocessing, EVALUATION_BATCH_SIZE):
        inputs = (images.to(device).float() / 255).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            logits = network(inputs)
        correct += (logits.argmax(1) == labels.to(device)).sum()
    return ranks.total(int(correct.item()), device) / len(data.labels)


@torch.inference_mode()
def accuracy_on_set(network: nn.Module, images: EvaluationSet) -> tuple[float, float]:
    """Top-1 and top-5 accuracy as fractions, in float32."""
    device = next(network.parameters()).device
    top1 = top5 = 0
    for start in range(0, len(images), EVALUATION_BATCH_SIZE):
        batch, labels = images.load(range(start, min(start + EVALUATION_BATCH_SIZE, len(images))))
        logits = network(batch.to(device))
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices.cpu()
        hits = best == labels.view(-1, 1)
        top1 += hits[:, 0].sum().item()
        top5 += hits.any(1).sum().item()
    return top1 / len(images), top5 / len(images)
