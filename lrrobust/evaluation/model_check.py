"""Whether a model can be judged at all: tried on a few images before the long work starts."""

from __future__ import annotations

import logging

import torch
from torch import nn

from lrrobust.errors import ModelError
from lrrobust.evaluation.judge import call_model, check_logits

_log = logging.getLogger(__name__)

#: Two forwards of the same images may differ by this much before the model counts as randomised; the
#: bound AutoAttack uses.
RANDOMISED_TOLERANCE = 1e-4

#: Logits of one image, alone and among others, may differ by this share of the largest logit.
BATCH_TOLERANCE = 1e-2

#: Outputs of an image that are not negative and add up to 1 but for this much are probabilities.
PROBABILITY_TOLERANCE = 1e-3


def check_model(
    model: nn.Module, num_classes: int, images: torch.Tensor, needs_gradient: bool = True
) -> dict[str, str]:
    """Tries the model on a few images before the long work starts.

    Args:
        needs_gradient: the model is attacked itself; without, its logits need carry no gradient.

    Returns:
        What the results must say of the model: {"randomised": ...} where two forwards differ, {"probabilities": ...}
        where it ends in a softmax.

    Raises:
        ModelError: it fails, does not return (N, num_classes) logits, gives no gradient, changes the images it is
            given, or lets those of a batch influence each other.
    """
    shown = images[:4].clone()
    with torch.no_grad():
        before = call_model(model, shown)
        check_logits(before, len(shown), num_classes)
    if not torch.equal(shown, images[:4]):
        raise ModelError(
            "the model changes the images it is given, so that nothing can be compared with them afterwards: "
            "let forward work on a copy, as in (images - mean) / std instead of images.sub_(mean).div_(std)"
        )
    few = images[:4].clone().requires_grad_()
    with torch.enable_grad():
        first = call_model(model, few)
        check_logits(first, len(few), num_classes)
        if needs_gradient and not first.requires_grad:
            raise ModelError(
                "the model's logits carry no gradient (a detach, no_grad or rounding inside?): "
                "gradient attacks cannot judge it"
            )
        if first.requires_grad:
            torch.autograd.grad(first.sum(), few, allow_unused=True)
    with torch.no_grad():
        half = call_model(model, images[: -(-len(few) // 2)])
    check_logits(half, -(-len(few) // 2), num_classes)
    found = {}
    if _are_probabilities(before):
        _log.warning(
            "the model returns probabilities: attacks take their softmax once more, which leaves them weak gradients and makes "
            "the model look robust; return the logits, without the softmax at the end"
        )
        found["probabilities"] = "instead of logits: attacks are weakened"
    difference = (first - before).abs().max().item()
    if difference > RANDOMISED_TOLERANCE:
        _log.warning(
            "two forward passes of the same images differ by %.2g: the model is randomised, and attacks that "
            "do not average over its randomness overstate its robustness",
            difference,
        )
        return found | {"randomised": "yes: robustness is overstated"}
    if (half - before[: len(half)]).abs().max() > BATCH_TOLERANCE * before.abs().max().clamp_min(1e-3):
        raise ModelError(
            "the model's logits of an image depend on the other images of the batch "
            "(BatchNorm without running statistics?): no accuracy of such a model means anything"
        )
    return found


def _are_probabilities(logits: torch.Tensor) -> bool:
    sums = logits.double().sum(1)
    return bool((logits >= 0).all() and ((sums - 1).abs() <= PROBABILITY_TOLERANCE).all())
