"""Projected gradient descent over a ladder of budgets, no step spent on an image that is broken."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lrrobust.threat import Norm

#: Told of proposals: their rows among the attacked images, the proposals (M, C, H, W), the budget of each,
#: and whether each is the last of its start. Says which images are broken: by these, and for good.
Claim = Callable[[Sequence[int], torch.Tensor, Sequence[float], Sequence[bool]], Sequence[bool]]

#: Random numbers for one start: row among the attacked images, budget, restart -> a generator on the CPU.
Draw = Callable[[int, float, int], torch.Generator]


@dataclass(eq=False)
class _Climb:
    """An image on its way up the ladder: where it stands, and its present iterate (None: not started there)."""

    row: int
    level: int
    #: First level at which it is not attacked any more.
    stop: int
    restart: int = 0
    step: int = 0
    iterate: torch.Tensor | None = None


def pgd(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    norm: Norm,
    ladder: Sequence[float],
    levels: torch.Tensor,
    steps: int,
    step_size_ratio: float,
    random_start: bool,
    restarts: int,
    precision: str,
    batch_size: int,
    claim: Claim,
    draw: Draw,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attack images at every budget, from the smallest up, until they are broken.

    At budget eps an image takes `steps` steps of length step_size_ratio * eps / steps along the sign
    of the gradient (linf) or the gradient divided by its length (l2), each followed by the projection
    onto the ball and onto [0, 1]. Iterates that the model misclassifies are claimed on the way, the
    last iterate of every start in any case. A broken image leaves the batch and is attacked at no
    larger budget; its place goes to the next image that waits, which may stand at another budget.

    The loss is log sum_{k != y} exp(z_k) - z_y. Its gradient is that of the cross-entropy divided by
    1 - p_y, which sign and length take no notice of; but it does not vanish where the label's
    probability p_y rounds to 1, as the cross-entropy does on confident models.

    Random starts are those of torchattacks: uniform in the linf ball; in l2 of a uniform direction and
    a uniform share of eps as length. They follow from `draw` alone: which images share a batch changes
    nothing but the rounding of the model.

    Args:
        model: images to logits (n, K), K >= 2, in evaluation mode.
        images: (N, C, H, W) in [0, 1], float32 or float64.
        labels: (N,) int64, the classes to leave.
        ladder: budgets in pixel units of [0, 1], ascending. Nothing is claimed at a budget of 0.
        levels: (N,) int64, how many budgets of the ladder, from the smallest, each image is attacked at.
        precision: "bf16" runs the model under autocast to bfloat16; iterates and steps stay as `images`.
        batch_size: images passed through the model at once.
        claim: judges; may be asked about any number of images up to `batch_size` at once, each once.
        draw: for random starts.

    Returns:
        Forward and backward passes by budget and image, int64 (len(ladder), N): as many of the ones as of the
        others, one each a gradient step.

    Source: Madry et al., Towards Deep Learning Models Resistant to Adversarial Attacks, 2018, section 2.1.
    """
    passes = torch.zeros(len(ladder), len(images), dtype=torch.int64)
    first = next((level for level, eps in enumerate(ladder) if eps > 0), len(ladder))
    waiting = deque(_Climb(row, first, stop) for row, stop in enumerate(levels.tolist()) if first < stop)
    active: list[_Climb] = []
    claims: list[tuple[_Climb, torch.Tensor, bool]] = []
    while waiting or active or claims:
        while waiting and len(active) < batch_size:
            active.append(_started(waiting.popleft(), images, norm, ladder, random_start, draw))
        # Claims are judged together: when they fill a batch, or the batch needs who comes back from them.
        # Few do but those whose start came to its end.
        is_short = len(active) < batch_size and (not active or any(is_last for *_, is_last in claims))
        if len(claims) >= batch_size or (claims and is_short):
            judged, claims = claims[:batch_size], claims[batch_size:]
            for climb, is_last in _unbroken(judged, ladder, claim):
                if not is_last and climb.step == steps:
                    claims.append((climb, climb.iterate, True))
                elif not is_last or _goes_on(climb, restarts):
                    waiting.append(climb)
            continue
        rows = torch.tensor([climb.row for climb in active], device=images.device)
        budgets = [ladder[climb.level] for climb in active]
        eps = images.new_tensor(budgets)[:, None, None, None]
        length = images.new_tensor([step_size_ratio * budget / steps for budget in budgets])[:, None, None, None]
        iterates = torch.stack([climb.iterate for climb in active])
        logits, gradient = _evaluate(model, iterates, labels[rows], precision)
        stepped = _project(images[rows], iterates + length * _unit(gradient, norm), eps, norm)
        is_candidate = (logits.argmax(1) != labels[rows]) & logits.isfinite().all(1)
        still = []
        for climb, now, then, is_claimed in zip(active, iterates, stepped, is_candidate.tolist(), strict=True):
            passes[climb.level, climb.row] += 1
            climb.step += 1
            climb.iterate = then
            if is_claimed:
                claims.append((climb, now, False))
            elif climb.step == steps:
                claims.append((climb, then, True))
            else:
                still.append(climb)
        active = still
    return passes, passes


def _started(
    climb: _Climb, images: torch.Tensor, norm: Norm, ladder: Sequence[float], random_start: bool, draw: Draw
) -> _Climb:
    if climb.iterate is None:
        image, eps = images[climb.row], ladder[climb.level]
        climb.step = 0
        climb.iterate = _start(image, norm, eps, draw(climb.row, eps, climb.restart)) if random_start else image
    return climb


def _start(image: torch.Tensor, norm: Norm, eps: float, generator: torch.Generator) -> torch.Tensor:
    """A random image (C, H, W) of ball and box. Drawn on the CPU in float32: the same on every device."""
    if norm == "linf":
        noise = (2 * torch.rand(image.shape, generator=generator) - 1) * eps
    else:
        direction = torch.randn(image.shape, generator=generator)
        noise = direction * (torch.rand((), generator=generator) * eps / direction.norm())
    return (image + noise.to(image)).clamp(0, 1)


def _unbroken(
    claims: Sequence[tuple[_Climb, torch.Tensor, bool]], ladder: Sequence[float], claim: Claim
) -> list[tuple[_Climb, bool]]:
    """Has the claims judged; those that broke nothing, with whether they were the last of their start."""
    climbs, proposals, is_last = zip(*claims, strict=True)
    is_broken = claim(
        [climb.row for climb in climbs],
        torch.stack(proposals),
        [ladder[climb.level] for climb in climbs],
        is_last,
    )
    return [(climb, last) for climb, last, broken in zip(climbs, is_last, is_broken, strict=True) if not broken]


def _goes_on(climb: _Climb, restarts: int) -> bool:
    """Moves an image to its next restart or budget; False when there is none."""
    climb.iterate = None
    climb.restart += 1
    if climb.restart == restarts:
        climb.restart = 0
        climb.level += 1
    return climb.level < climb.stop


def _evaluate(
    model: nn.Module, iterates: torch.Tensor, labels: torch.Tensor, precision: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """One forward and backward: logits (n, K) and the gradient of the loss by the iterates."""
    iterates = iterates.detach().requires_grad_()
    with torch.autocast(iterates.device.type, torch.bfloat16, enabled=precision == "bf16"):
        logits = model(iterates)
    own = labels[:, None]
    exact = logits.double()
    others = exact.scatter(1, own, -math.inf).logsumexp(1)
    (gradient,) = torch.autograd.grad((others - exact.gather(1, own).squeeze(1)).sum(), iterates)
    return logits.detach(), gradient


def _unit(gradient: torch.Tensor, norm: Norm) -> torch.Tensor:
    """The steepest direction of length 1 in the norm; zero where the gradient is."""
    if norm == "linf":
        return gradient.sign()
    # In float64, where squares of small numbers are no zeros.
    length = torch.linalg.vector_norm(gradient, dim=(1, 2, 3), keepdim=True, dtype=torch.float64)
    return (gradient / length.clamp_min(torch.finfo(torch.float64).tiny)).to(gradient)


def _project(images: torch.Tensor, moved: torch.Tensor, eps: torch.Tensor, norm: Norm) -> torch.Tensor:
    """Back into the ball around the images, then into the box, which lengthens no perturbation."""
    delta = moved - images
    if norm == "linf":
        delta = torch.minimum(torch.maximum(delta, -eps), eps)
    else:
        length = torch.linalg.vector_norm(delta, dim=(1, 2, 3), keepdim=True)
        delta = delta * (eps / length.clamp_min(torch.finfo(delta.dtype).tiny)).clamp_max(1)
    return (images + delta).clamp(0, 1)
