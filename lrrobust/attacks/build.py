"""From a spec to a callable attack."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lrrobust.attacks.carlini_wagner import carlini_wagner_l2
from lrrobust.attacks.pgd import Claim, Draw, pgd
from lrrobust.attacks.specs import AttackSpec, CwSpec, FgsmSpec, PgdSpec
from lrrobust.frozen import frozen


@dataclass(frozen=True)
class Effort:
    """What an attack spent, and what it met.

    Attributes:
        forward_passes, backward_passes: images through the network, by budget of `Attack.ladder` and
            image, int64 (L, N) on the CPU. Judging claims is not among them.
        nonfinite_gradients: how often the gradient of an image had NaN or infinite components. It
            counts as zero there: the image stays where it is for that step, instead of turning into
            NaN. Anything but 0 says that the attack was not at full strength.
    """

    forward_passes: torch.Tensor
    backward_passes: torch.Tensor
    nonfinite_gradients: int


class Attack:
    """The attack that a checked spec describes: it proposes images; whether they are adversarial the caller judges.

    Calling it takes the model, images (N, 3, H, W) in [0, 1], float32 or float64, their labels (N,),
    int64, on the model's device, how many images may pass through the model at once, and two
    callbacks: `claim` is told of proposals and says which images they broke, `draw` gives the random
    numbers of a start; see `lrrobust.attacks.pgd`. Proposals keep to box and budget up to float
    rounding, see `lrrobust.threat.TOLERANCE`.

    FGSM and PGD climb the ladder of budgets image by image, claim every iterate that the model
    misclassifies and the last of every start, and leave an image alone once it is broken. Carlini
    and Wagner's attack knows no budget: it claims its best image once, the clean one where it found none.

    The model runs in evaluation mode, with frozen parameters; both are put back afterwards, also
    after an exception.

    Attributes:
        ladder: the budgets that claims come with: those of the spec, or infinity alone for an attack
            that minimises the distance.
    """

    def __init__(self, spec: AttackSpec) -> None:
        self.ladder: tuple[float, ...] = (math.inf,) if isinstance(spec, CwSpec) else spec.eps
        self._spec = spec

    def __call__(
        self, model: nn.Module, images: torch.Tensor, labels: torch.Tensor, *, batch_size: int, claim: Claim, draw: Draw
    ) -> Effort:
        _check_inputs(images, labels)
        # Attacks need gradients whatever the caller's mode; tensors of inference mode cannot take
        # part in them, but their clones can.
        with torch.inference_mode(False), torch.enable_grad(), frozen(model):
            victim = _Victim(model)
            images = images.detach().clone(memory_format=torch.contiguous_format)
            labels = labels.clone()
            if isinstance(self._spec, CwSpec):
                return _run_carlini_wagner(self._spec, victim, images, labels, batch_size, claim)
            passes = pgd(
                victim,
                images,
                labels,
                norm=self._spec.norm,
                ladder=self.ladder,
                precision=self._spec.precision,
                batch_size=batch_size,
                claim=claim,
                draw=draw,
                **_schedule(self._spec),
            )
        return Effort(passes, passes, victim.nonfinite_gradients)


def _schedule(spec: FgsmSpec | PgdSpec) -> dict[str, Any]:
    """How PGD walks; the fast gradient sign method is one step across the whole ball from the image."""
    if isinstance(spec, PgdSpec):
        return spec.model_dump(include={"steps", "step_size_ratio", "random_start", "restarts"})
    return {"steps": 1, "step_size_ratio": 1.0, "random_start": False, "restarts": 1}


def _run_carlini_wagner(
    spec: CwSpec, victim: _Victim, images: torch.Tensor, labels: torch.Tensor, batch_size: int, claim: Claim
) -> Effort:
    forward, backward = (torch.zeros(1, len(images), dtype=torch.int64) for _ in range(2))
    for rows in torch.arange(len(images)).split(batch_size) if len(images) else ():
        before = victim.forwarded, victim.backwarded
        nearest = carlini_wagner_l2(
            victim,
            images[rows],
            labels[rows],
            binary_search_steps=spec.binary_search_steps,
            steps=spec.steps,
            lr=spec.lr,
            initial_c=spec.initial_c,
            confidence=spec.confidence,
            abort_early=spec.abort_early,
        )
        claim(rows.tolist(), nearest.detach(), [math.inf] * len(rows), [True] * len(rows))
        # Finished images leave the search, which does not say whose passes were whose: the mean stands for each.
        forward[0, rows] = round((victim.forwarded - before[0]) / len(rows))
        backward[0, rows] = round((victim.backwarded - before[1]) / len(rows))
    return Effort(forward, backward, victim.nonfinite_gradients)


class _Victim(nn.Module):
    """The model as the attacks see it: gradients that are not finite mended and counted, passes counted."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.forwarded = self.backwarded = self.nonfinite_gradients = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.forwarded += len(images)
        if images.requires_grad:
            images.register_hook(self._mend_gradient)
        return self.model(images)

    def _mend_gradient(self, gradient: torch.Tensor) -> torch.Tensor:
        """Rows with NaN or infinity become zero."""
        self.backwarded += len(gradient)
        is_finite = gradient.isfinite().flatten(1).all(1)
        self.nonfinite_gradients += int((~is_finite).sum())
        return gradient.where(is_finite[:, None, None, None], 0)


def _check_inputs(images: torch.Tensor, labels: torch.Tensor) -> None:
    if images.ndim != 4 or images.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"expected float images (N, C, H, W), got {images.shape=}, {images.dtype=}")
    if labels.shape != images.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(f"expected int64 labels ({len(images)},), got {labels.shape=}, {labels.dtype=}")
    # Box and projection take these bounds for granted; normalised images would be attacked as something else.
    if not ((images >= 0) & (images <= 1)).all():
        low, high = (f"{bound:g}" for bound in torch.aminmax(images.detach()))
        raise ValueError(f"expected images in [0, 1], got values from {low} to {high}; models normalise by themselves")
