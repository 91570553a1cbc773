"""Carlini and Wagner's minimal L2 attack, every image on its own."""

from __future__ import annotations

import math

import torch
from torch import nn

from lrrobust.attacks.ball import inside_box, l2_length
from lrrobust.attacks.climb import evaluate, is_clearly_misclassified

#: Share of [-1, 1] that the arc sine is applied to: at the ends its derivative is infinite, and a
#: pixel of exactly 0 or 1 would never move.
_SHRINK = 1 - 1e-6

#: An image's search at one c ends when neither its loss nor its distance fell by this share since the
#: last check. The authors check ten times; of 100 steps, Adam needs more than ten to turn around.
_LEAST_PROGRESS = 1e-4
_CHECKS = 5

#: Longest Adam step of an image that has been broken, as a share of the distance found.
_LARGEST_STEP = 0.1

#: c beside the least that the linear model needs: networks bend, and at the least itself the search takes long.
_ABOVE_LEAST = 1.2

#: The authors' bound of c; beyond it float32 overflows after a few more factors of ten.
_LARGEST_C = 1e10

_BETA1, _BETA2, _ADAM_EPS = 0.9, 0.999, 1e-8  # Adam's usual constants


def carlini_wagner_l2(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    binary_search_steps: int,
    steps: int,
    lr: float,
    initial_c: float,
    confidence: float,
    abort_early: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Look for the nearest image of another class, per image.

    For a trade-off c, Adam minimises over w

        ||x(w) - image||_2^2 + c * max(logit_label - max_{k != label} logit_k + confidence, 0),

    with x(w) = (sin(w) + 1) / 2, which keeps every pixel in [0, 1]. Each image has a c of its own:
    it grows tenfold until an adversarial image is found, shrinks until none is, then the interval
    between the largest c that failed and the smallest that worked is halved.

    The paper affords 9 x 10000 steps. Three changes make hundreds do; their worth was measured with
    5 x 100 steps and lr 0.01, as a ratio to the optimum of linear models and to a search of 7 x 400
    steps on a small CNN:

    * The paper's map is tanh, which takes hundreds of steps to leave a pixel of 0 or 1: of black and
      white images tanh broke 0 %, sine 100 %, at the distances that tanh reaches in 5 x 1000.
    * An image's lr is capped at a tenth of the distance already found. Steps of 0.01 are longer than
      the way to a near adversarial image of many pixels: ratios up to 89 became at most 1.4.
    * c is halved on a logarithmic scale, where the paper takes the mean, and goes by what linear models
      need at least, 2 distance^2 / loss of the clean image: the first c is not less, with the distance of
      the boundary linearised there, and from too large ones it jumps down, with the distance found.
      Ratios up to 1.4 became at most 1.03 (1.05 is tested, with logits scaled by 0.0001 to 10000).

    Images do not influence each other: loss and Adam are elementwise, c and stopping are per image.
    Finished ones leave the batch, so forwards have at most N rows, in the order of `images`.

    Args:
        model: images to logits (n, K), K >= 2, in evaluation mode; logits may have any sign and
            scale, and may be log-probabilities.
        images: (N, C, H, W) in [0, 1], float32 or float64.
        labels: (N,) int64, the classes to leave.
        binary_search_steps: values of c tried.
        steps: Adam steps for each.
        lr: Adam's learning rate, in units of w, until the image is broken for the first time.
        initial_c: first c, where the linearised model does not need more.
        confidence: kappa, the margin in logits by which another class must win, zero or more.
        abort_early: end the search at one c for images whose loss no longer falls.

    Returns:
        (N, C, H, W): the nearest image found that another class won when the model saw exactly these
        values, with finite logits; the clean image where none was found. And how many gradient steps
        each image took, int64 (N,), one at the clean image among them.

    Source: Carlini and Wagner, Towards Evaluating the Robustness of Neural Networks, 2017,
    sections V and VI-A, and the authors' code (nn_robust_attacks).
    """
    nearest = images.clone()
    nearest_distance = images.new_full((len(images),), math.inf)
    steps_taken = torch.ones_like(labels)
    _, margin, gradient = evaluate(model, images, lambda logits: _margin(logits, labels))
    clean_loss = (confidence - margin).clamp_min(torch.finfo(images.dtype).tiny)
    # Where there is no slope, no boundary is in sight.
    slope = l2_length(inside_box(gradient, images)).flatten()
    above = _above_least(clean_loss / slope, clean_loss).where(slope > 0, initial_c)
    c = above.clamp(initial_c, max(initial_c, _LARGEST_C)).to(images)
    lower, upper = torch.zeros_like(c), torch.full_like(c, math.inf)
    for _ in range(binary_search_steps):
        # A step moves every pixel by up to lr / 2.
        largest_lr = _LARGEST_STEP * nearest_distance * 2 / math.sqrt(images[0].numel())
        found, distance, taken = _search_at(model, images, labels, c, steps, largest_lr.clamp_max(lr), confidence, abort_early)
        steps_taken += taken
        is_nearer = distance < nearest_distance
        nearest = torch.where(is_nearer[:, None, None, None], found, nearest)
        nearest_distance = torch.where(is_nearer, distance, nearest_distance)

        is_success = distance.isfinite()
        upper = torch.where(is_success, torch.minimum(upper, c), upper)
        lower = torch.where(is_success, lower, torch.maximum(lower, c))
        above = _above_least(nearest_distance, clean_loss)
        below = torch.where(above < upper, above, upper / 3)
        between = torch.where(lower == 0, below, (lower * upper).sqrt())
        c = torch.where(upper.isinf(), (10 * c).clamp_max(_LARGEST_C), between)
    return nearest, steps_taken


def _above_least(distance: torch.Tensor, clean_loss: torch.Tensor) -> torch.Tensor:
    """A bit more than the c that a linear model needs whose boundary is at these distances (n,)."""
    c = _ABOVE_LEAST * 2 * distance.square() / clean_loss
    # The last bits, which depend on the batch, would grow from step to step.
    return torch.exp2((4 * c.log2()).round() / 4)


def _search_at(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    c: torch.Tensor,
    steps: int,
    lr: torch.Tensor,
    confidence: float,
    abort_early: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Minimise at fixed c and lr (N,).

    Returns:
        The nearest adversarial iterates, their L2 distances (inf if none), and the steps taken.
    """
    found = images.clone()
    found_distance = torch.full_like(c, math.inf)
    taken = torch.zeros_like(labels)
    # Rows still searched, and what belongs to them; all shrink together.
    rows = torch.arange(len(images), device=images.device)
    w = torch.asin((2 * images - 1) * _SHRINK)
    moment1, moment2 = torch.zeros_like(w), torch.zeros_like(w)
    lowest_loss = torch.full_like(c, math.inf)
    progress_at_check = lowest_loss.expand(2, -1)

    for step in range(1, steps + 1):
        iterate, distance, is_success, loss, gradient = _evaluate(model, w, images[rows], labels[rows], c[rows], confidence)
        taken[rows] += 1
        is_nearer = is_success & (distance < found_distance[rows])
        found[rows[is_nearer]] = iterate[is_nearer]
        found_distance[rows[is_nearer]] = distance[is_nearer]

        moment1 = _BETA1 * moment1 + (1 - _BETA1) * gradient
        moment2 = _BETA2 * moment2 + (1 - _BETA2) * gradient.square()
        root = (moment2 / (1 - _BETA2**step)).sqrt()
        w = w - lr[rows, None, None, None] * moment1 / (1 - _BETA1**step) / (root + _ADAM_EPS)

        lowest_loss = torch.fmin(lowest_loss, loss)
        if abort_early and step % math.ceil(steps / _CHECKS) == 0:
            # Adam first shoots past near images, and its loss takes long to come down to where it
            # began; the distances found tell of progress all the while. Neither falls under NaN.
            progress = torch.stack([lowest_loss, found_distance[rows]])
            is_falling = (progress < (1 - _LEAST_PROGRESS) * progress_at_check).any(0)
            rows, w, moment1, moment2 = (state[is_falling] for state in (rows, w, moment1, moment2))
            lowest_loss, progress_at_check = lowest_loss[is_falling], progress[:, is_falling]
            if not len(rows):
                break
    return found, found_distance, taken


def _evaluate(
    model: nn.Module,
    w: torch.Tensor,
    images: torch.Tensor,
    labels: torch.Tensor,
    c: torch.Tensor,
    confidence: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """One forward and backward: iterates, distances (n,), successes (n,), losses (n,), gradients by w."""
    with torch.enable_grad():
        w = w.detach().requires_grad_()
        iterate = (torch.sin(w) + 1) / 2
        logits = model(iterate)
        margin = _margin(logits, labels)
        squared_distance = (iterate - images).flatten(1).square().sum(1)
        loss = squared_distance + c * (confidence - margin).clamp_min(0)
        (gradient,) = torch.autograd.grad(loss.sum(), w)
    is_success = is_clearly_misclassified(logits, labels) & (margin >= confidence)
    gradient = gradient.where(gradient.isfinite(), 0)
    return iterate.detach(), squared_distance.detach().sqrt(), is_success, loss.detach(), gradient


def _margin(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """By how much the best other class leads the label's, (n,); negative where the label wins."""
    own = labels[:, None]
    # Masked with -inf: multiplying by 0 would make 0 a rival of negative logits.
    return logits.scatter(1, own, -math.inf).amax(1) - logits.gather(1, own).squeeze(1)
