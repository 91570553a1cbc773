"""What every attack is given: images to break, whom to tell of proposals, and where random numbers come from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

#: Told of proposals: their rows among the attacked images, the proposals (M, C, H, W), the budget of each,
#: and whether each is the last of its start. Says which images are broken within these budgets, and for good.
Claim = Callable[[Sequence[int], torch.Tensor, Sequence[float], Sequence[bool]], Sequence[bool]]

#: Random numbers for one start: row among the attacked images, budget, restart -> a generator on the CPU.
Draw = Callable[[int, float, int], torch.Generator]

#: What an attack spent: forward and backward passes by budget and image, int64 (len(ladder), N) each, on the CPU.
Passes = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Assignment:
    """Images to break, at the budgets of a ladder.

    Attributes:
        model: images to logits (n, K), K >= 2, in evaluation mode.
        images: (N, C, H, W) in [0, 1], float32 or float64.
        labels: (N,) int64, the classes to leave.
        ladder: budgets in pixel units of [0, 1], ascending; infinity alone for attacks that look for the nearest
            adversarial image. Nothing is claimed at a budget of 0.
        levels: (N,) int64 on the CPU, at how many budgets of the ladder, from the smallest, each image is attacked.
        batch_size: how many images may pass through the model at once.
        claim: judges; is asked about at most `batch_size` images at once, each once.
        draw: for all that is random, so that it depends on the image alone and not on who shares its batch.
    """

    model: nn.Module
    images: torch.Tensor
    labels: torch.Tensor
    ladder: tuple[float, ...]
    levels: torch.Tensor
    batch_size: int
    claim: Claim
    draw: Draw
