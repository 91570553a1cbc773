"""From a recipe to an optimiser and its learning rates."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from lrrobust.training.muon import Muon
from lrrobust.training.recipe import Recipe

#: Of stochastic gradient descent; the value of nearly every ImageNet recipe.
SGD_MOMENTUM = 0.9


def build_optimizer(network: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The optimiser a recipe asks for, over all parameters of `network`."""
    groups = group_parameters(network, recipe.weight_decay)
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=recipe.learning_rate, fused=True)
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=recipe.learning_rate, momentum=SGD_MOMENTUM, nesterov=True, fused=True)
    # Linear layers here are the classifier and the geometry networks, whose rows and columns are no
    # hidden features: AdamW suits them better (Jordan et al.).
    kernels = {id(m.weight) for m in network.modules() if isinstance(m, nn.Conv2d)}
    split = []
    for group in groups:
        for orthogonal in (True, False):
            chosen = [p for p in group["params"] if (id(p) in kernels) == orthogonal]
            if chosen:
                split.append({**group, "params": chosen, "orthogonal": orthogonal})
    return Muon(split, lr=recipe.learning_rate)


def group_parameters(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay for matrices and kernels, none for norms and biases."""
    decayed = [p for p in network.parameters() if p.ndim >= 2]
    others = [p for p in network.parameters() if p.ndim < 2]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def learning_rate(recipe: Recipe, step: int, steps: int) -> float:
    """Of step 0, 1, ... of `steps`: a linear rise, then half a cosine to zero."""
    warmup_steps = max(1, round(recipe.warmup * steps))
    if step < warmup_steps:
        return recipe.learning_rate * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
