"""A small network that stands for any of ours."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lrrobust.models import registry
from lrrobust.models.residual import IMAGENET_MEAN, IMAGENET_STD, Normalization


def build_tiny(num_classes: int, stem: str = "imagenet") -> nn.Module:
    """4608 weights in the second convolution: enough to be stored as int8."""
    return nn.Sequential(
        Normalization(IMAGENET_MEAN, IMAGENET_STD),
        nn.Conv2d(3, 16, 3, stride=2, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, num_classes),
    )


@pytest.fixture
def tiny_networks(monkeypatch):
    """`tiny` and `other_tiny` as the only networks of ours."""
    monkeypatch.setattr(registry, "NETWORKS", {"tiny": build_tiny, "other_tiny": build_tiny})
    return build_tiny


@pytest.fixture
def seeded():
    """The same random weights in every run, and none of the randomness of other tests changed."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
