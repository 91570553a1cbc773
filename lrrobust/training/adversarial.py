"""Adversarial training: the network learns from what an attack makes of each batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from lrrobust.attacks.ball import project, unit
from lrrobust.config_file import Settings
from lrrobust.eps import Eps
from lrrobust.frozen import frozen
from lrrobust.norm import LinfOrL2


class AdversarialSpec(Settings):
    """The attack a network is trained against, in the terms of the attacks that evaluate it.

    One step from a random start is fast adversarial training (Wong, Rice and Kolter, Fast is better than free,
    ICLR 2020, algorithm 3; they step 1.25 eps); more steps are PGD adversarial training (Madry et al., Towards
    Deep Learning Models Resistant to Adversarial Attacks, ICLR 2018, section 2).
    """

    norm: LinfOrL2
    #: Budget in pixel units of [0, 1], as in 4/255.
    eps: Eps = Field(gt=0)
    steps: int = Field(ge=1)
    #: A step is step_size_ratio * eps / steps long.
    step_size_ratio: float = Field(gt=0)
    random_start: bool = True


def draw_starts(shape: torch.Size, spec: AdversarialSpec, generator: torch.Generator) -> torch.Tensor:
    """Random perturbations (N, C, H, W) within the budget, on the generator's device.

    Uniform in the linf ball; in l2 of a uniform direction and a uniform share of eps as length.
    """
    device = generator.device
    if spec.norm == "linf":
        return (2 * torch.rand(shape, generator=generator, device=device) - 1) * spec.eps
    direction = torch.randn(shape, generator=generator, device=device)
    length = spec.eps * torch.rand((shape[0], 1, 1, 1), generator=generator, device=device)
    return direction * (length / direction.flatten(1).norm(dim=1).view(-1, 1, 1, 1))


def perturb(
    network: nn.Module,
    images: torch.Tensor,
    targets: torch.Tensor,
    spec: AdversarialSpec,
    starts: torch.Tensor | None,
    precision: str,
) -> torch.Tensor:
    """Images within the budget on which the network's cross-entropy is high.

    The network is attacked in evaluation mode: this is the network that will be judged, an image's
    perturbation does not depend on the rest of its batch, nor on how the batch is spread over machines, and the
    running statistics of batch normalisation see only the images that are learned from. Pang et al., Bag of Tricks
    for Adversarial Training, ICLR 2021, section 3.6, find it as robust as attacking in training mode, and more
    accurate on clean images.

    Args:
        network: images to logits; afterwards as it was, modes and gradients included.
        images: float32 (N, 3, H, W) in [0, 1].
        targets: class probabilities (N, K), or labels (N,).
        starts: of `draw_starts`, or None for the images themselves.
        precision: "bf16" runs the network under autocast.

    Returns:
        float32 (N, 3, H, W) in [0, 1], within eps of `images`.
    """
    eps = torch.full((len(images), 1, 1, 1), spec.eps, device=images.device)
    length = spec.step_size_ratio * spec.eps / spec.steps
    iterates = images if starts is None else (images + starts).clamp(0, 1)
    with frozen(network), torch.enable_grad():
        for _ in range(spec.steps):
            iterates = iterates.detach().requires_grad_()
            with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
                logits = network(iterates)
            # Summed, so that an image's gradient has the same size in a batch of any size.
            loss = F.cross_entropy(logits.float(), targets, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, iterates)
            iterates = project(images, iterates.detach() + length * unit(gradient, spec.norm), eps, spec.norm)
    return iterates.detach()
