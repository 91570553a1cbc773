"""Networks that tests make of functions, and images in memory; found by every test, as pyproject.toml says."""

import torch
from torch import nn


class Function(nn.Module):
    """What a function makes of images or logits; an nn.Sequential puts networks before or behind it."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, given):
        return self.function(given)


def detached(network):
    """It carries no gradient."""
    return nn.Sequential(Function(torch.Tensor.detach), network)


def with_random_gradients(network, scale):
    """Answers of the network, and gradients that are mostly noise, other at each pass."""

    def answer(images):
        nothing, logits = (images - images.detach()).flatten(1), network(images)
        return logits + nothing @ (scale * torch.randn(nothing.shape[1], logits.shape[1], dtype=images.dtype))

    return Function(answer)


class ImagesInMemory:
    """An evaluation set of images (N, 3, H, W) and labels (N,), which remembers what was loaded of it."""

    def __init__(self, images, labels):
        self.images, self.labels = images, labels.tolist()
        self.indices = [10 * i for i in range(len(images))]
        self.keys = [f"class/{i}.png" for i in range(len(images))]
        self.wnids = [f"n{label:08d}" for label in self.labels]
        self.loaded = []

    def __len__(self):
        return len(self.images)

    def load(self, positions):
        places = list(positions)
        self.loaded += places
        return self.images[places].clone(), torch.tensor([self.labels[place] for place in places])
