"""A small network, a short recipe and coloured images that are easily told apart."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lrrobust.models import registry
from lrrobust.models.lrnet import LocalRelationLayer
from lrrobust.models.residual import PointwiseConvolution
from lrrobust.training.images import TrainingSet
from lrrobust.training.recipe import Phase, Recipe

CLASS_COUNT = 8


class TinyLrNet(nn.Sequential):
    """One local relation layer, so that checkpoints hold what those of LR-Nets hold."""

    def __init__(self, num_classes: int, stem: str = "imagenet") -> None:
        super().__init__(
            PointwiseConvolution(3, 12),
            nn.BatchNorm2d(12),
            LocalRelationLayer(12, stride=2, kernel_size=3),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(12, num_classes),
        )


@pytest.fixture
def tiny_lr_net(monkeypatch):
    monkeypatch.setattr(registry, "NETWORKS", {"tiny": TinyLrNet, "other": TinyLrNet})
    return "tiny"


@pytest.fixture
def recipe(tmp_path):
    classes = tmp_path / "classes.txt"
    classes.write_text("".join(f"colour {label}\n" for label in range(CLASS_COUNT)))
    return Recipe(
        name="colours",
        description="two short epochs",
        classes=str(classes),
        image_size=16,
        phases=(Phase(epochs=1, size=16), Phase(epochs=1, size=20)),
        batch_size=8,
        learning_rate=0.01,
        weight_decay=0.05,
        gradient_clip=1.0,
        warmup=0.1,
        label_smoothing=0.1,
        ema_decay=0.9,
        crop_scale_min=0.5,
        horizontal_flip=True,
        precision="float32",
        holdout=8,
        seed=3,
    )


@pytest.fixture
def colours():
    """Six noisy images of each of eight colours: the corners of the cube."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(CLASS_COUNT).repeat(6)
    bits = torch.stack([labels & 1, (labels >> 1) & 1, (labels >> 2) & 1], 1)
    noise = torch.randint(-30, 31, (len(labels), 3, 16, 16), generator=generator)
    return TrainingSet((64 + 128 * bits[:, :, None, None] + noise).to(torch.uint8), labels)
