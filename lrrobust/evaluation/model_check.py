"""Whether a model can be judged at all: tried on a few images before the long work starts."""

from __future__ import annotations

import logging

import torch
from torch import nn

from lrrobust.errors import ModelError
from lrrobust.evaluation.judge import call_model, check_logits, gap, logit_scale
from lrrobust.out_of_memory import is_out_of_memory

_log = logging.getLogger(__name__)

#: Forwards of the same images may differ by this share of `logit_scale` before the model counts as randomised; with
#: logits of ten the bound that AutoAttack uses.
RANDOMISED_TOLERANCE = 1e-5

#: Logits of one image, alone and among others, may differ by this share of `logit_scale`.
BATCH_TOLERANCE = 1e-2

#: Images on which most is tried.
TRIED = 4

#: Forwards that show what is random. Of models that draw one of two ways each time, one in eight passes.
_FORWARDS = 4

#: Size of the noise in linf that takes images off the grid of 8 bits.
OFF_GRID = 2 / 255

#: Times the randomness seen: more than that is not random.
_BEYOND_RANDOM = 10

#: Outputs of an image that are not negative and add up to 1 but for this much are probabilities.
PROBABILITY_TOLERANCE = 1e-3


def check_model(model: nn.Module, num_classes: int, images: torch.Tensor, needs_gradient: bool = True) -> dict[str, str]:
    """Tries the model on a few images before the long work starts.

    Args:
        images: as many as go through it at once; most is tried on the first `TRIED`.
        needs_gradient: attacks follow the model's gradient; without, as under black-box ones, its logits need carry none.

    Returns:
        What the results must say of the model: {"randomised": ...} where two forwards differ, {"probabilities": ...}
        where it ends in a softmax, {"flat": ...} where all gradients that were asked for are zero.

    Raises:
        ModelError: it fails, does not return (N, num_classes) logits, gives no gradient, changes the images it is
            given, or lets those of a batch influence each other.
    """
    few = images[:TRIED]
    shown = few.clone()
    before = _predict(model, shown, num_classes)
    if not torch.equal(shown, few):
        raise ModelError(
            "the model changes the images it is given, so that nothing can be compared with them afterwards: "
            "let forward work on a copy, as in (images - mean) / std instead of images.sub_(mean).div_(std)"
        )
    attacked, is_flat = _logits_with_gradient(model, few.clone(), num_classes, needs_gradient)
    found = {}
    if is_flat:
        _log.warning(
            "the gradient of the model's logits is zero on all of %d images (rounding inside?): attacks that follow it find "
            "nothing, however fragile the model is; --suite blackbox attacks by answers alone",
            len(few),
        )
        found["flat"] = "yes: attacks that follow the gradient find nothing"
    if _are_probabilities(before):
        _log.warning(
            "the model returns probabilities: attacks take their softmax once more, which leaves them weak gradients and makes "
            "the model look robust; return the logits, without the softmax at the end"
        )
        found["probabilities"] = "instead of logits: attacks are weakened"
    scale = logit_scale(before)
    difference = _randomness(model, few, before, num_classes)
    noisy = _off_grid(few)
    beside = _predict(model, noisy.clone(), num_classes)
    difference_beside = _randomness(model, noisy, beside, num_classes)
    # With a gradient wanted some layers compute another way, to the same up to rounding.
    attacked_beside, _ = _logits_with_gradient(model, noisy.clone(), num_classes, is_needed=False)
    with_gradient = max(gap(attacked, before), gap(attacked_beside, beside))
    is_random = difference > RANDOMISED_TOLERANCE * scale or difference_beside > RANDOMISED_TOLERANCE * logit_scale(beside)
    if is_random or with_gradient > BATCH_TOLERANCE * scale:
        difference = max(difference, with_gradient)
        _log.warning(
            "forward passes of the same images differ by %.2g: the model is randomised: images stand or break by "
            "chance, and attacks that do not average over that (--eot-iter 20 does) may overstate its robustness",
            max(difference, difference_beside),
        )
        found["randomised"] = "yes: attacks that do not average over it may overstate robustness"
    half = -(-len(few) // 2)
    apart = max(
        gap(_predict(model, few[:half].clone(), num_classes), before[:half]),
        gap(_predict(model, few.flip(0), num_classes), before.flip(0)),
        gap(_predict(model, images.clone(), num_classes)[: len(few)], before),
    )
    if apart > max(BATCH_TOLERANCE * scale, _BEYOND_RANDOM * difference):
        raise ModelError(
            "the model's logits of an image depend on the other images of the batch, or on its place among them "
            "(BatchNorm without running statistics, layers in a plain list that .eval() does not reach, random numbers seeded "
            "inside forward?): no accuracy of such a model means anything"
        )
    return found


def _predict(model: nn.Module, images: torch.Tensor, num_classes: int) -> torch.Tensor:
    with torch.no_grad():
        logits = call_model(model, images)
    check_logits(logits, len(images), num_classes)
    return logits


def _randomness(model: nn.Module, images: torch.Tensor, before: torch.Tensor, num_classes: int) -> float:
    """By how much logits of the same images differ from pass to pass."""
    return max(gap(_predict(model, images.clone(), num_classes), before) for _ in range(_FORWARDS - 1))


def _off_grid(images: torch.Tensor) -> torch.Tensor:
    """With noise, where attacks go: a model may be random off the grid of 8 bits alone."""
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(0))
    return (images + OFF_GRID * (2 * noise - 1).to(images)).clamp(0, 1)


def _logits_with_gradient(
    model: nn.Module, images: torch.Tensor, num_classes: int, is_needed: bool
) -> tuple[torch.Tensor, bool]:
    """Logits as an attack sees them, and whether their gradient is zero; ModelError where it is needed and there is none."""
    images.requires_grad_()
    with torch.enable_grad():
        logits = call_model(model, images)
        check_logits(logits, len(images), num_classes)
        if not is_needed:
            return logits.detach(), False
        # Not the plain sum, which is 1 where they are probabilities.
        weights = torch.arange(1.0, num_classes + 1).to(logits)
        gradient = None
        if logits.requires_grad:
            try:
                # Enabled anew: some models leave it off.
                with torch.enable_grad():
                    (gradient,) = torch.autograd.grad((logits * weights).sum(), images, allow_unused=True)
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                reason = " ".join(str(error).split())[:200]
                raise ModelError(
                    f"the gradient of the model's logits cannot be computed ({reason}): let forward be differentiable"
                ) from error
    if gradient is None:
        raise ModelError(
            "the model's logits carry no gradient to the images (a detach, no_grad or rounding inside?): "
            "gradient attacks cannot judge it; --suite blackbox attacks by answers alone"
        )
    return logits.detach(), not gradient.any()


def _are_probabilities(logits: torch.Tensor) -> bool:
    sums = logits.double().sum(1)
    return bool((logits >= 0).all() and ((sums - 1).abs() <= PROBABILITY_TOLERANCE).all())
