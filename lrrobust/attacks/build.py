"""From a spec to a callable attack."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import BaseModel
from torch import nn

from lrrobust.attacks.adaptive import attack_by_rules
from lrrobust.attacks.apgd import apgd
from lrrobust.attacks.assignment import Assignment, Claim, Draw, Passes
from lrrobust.attacks.carlini_wagner import carlini_wagner_l2
from lrrobust.attacks.custom import run_custom
from lrrobust.attacks.deepfool import deepfool
from lrrobust.attacks.expectation import Expectation
from lrrobust.attacks.fab import fab_t
from lrrobust.attacks.fmn import fmn
from lrrobust.attacks.hop_skip_jump import hop_skip_jump
from lrrobust.attacks.momentum import mi_fgsm
from lrrobust.attacks.pgd import pgd
from lrrobust.attacks.specs import (
    ApgdSpec,
    AttackSpec,
    CustomSpec,
    CwSpec,
    DeepFoolSpec,
    FabSpec,
    FgsmSpec,
    FmnSpec,
    HopSkipJumpSpec,
    MiFgsmSpec,
    PgdAdaptiveSpec,
    PgdSpec,
    SquareSpec,
)
from lrrobust.attacks.square import square
from lrrobust.frozen import frozen
from lrrobust.gradient_rules import GradientRule


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
    numbers of a start; see `lrrobust.attacks.assignment`. `levels` (N,), int64, says at how many budgets of
    the ladder, from the smallest, each image is attacked; at all of them when not given. Proposals keep to box and budget up to
    float rounding, see `lrrobust.threat.TOLERANCE`.

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
        self.ladder: tuple[float, ...] = (math.inf,) if spec.minimises else spec.eps
        self._spec = spec

    def __call__(
        self,
        model: nn.Module,
        images: torch.Tensor,
        labels: torch.Tensor,
        *,
        batch_size: int,
        claim: Claim,
        draw: Draw,
        levels: torch.Tensor | None = None,
    ) -> Effort:
        _check_inputs(images, labels)
        if levels is None:
            levels = torch.full((len(images),), len(self.ladder))
        # Attacks need gradients whatever the caller's mode; tensors of inference mode cannot take
        # part in them, but their clones can.
        with torch.inference_mode(False), torch.enable_grad(), frozen(model):
            draws = self._spec.eot_iter
            victim = _Victim(model if draws == 1 else Expectation(model, draws))
            given = Assignment(
                victim,
                images.detach().clone(memory_format=torch.contiguous_format),
                labels.clone(),
                self.ladder,
                levels.cpu(),
                batch_size,
                claim,
                draw,
            )
            forward, backward = _RUNNERS[type(self._spec)](self._spec, given)
        if draws > 1:
            # Every gradient has its forward passes made again.
            forward, backward = draws * (forward + backward), draws * backward
        return Effort(forward, backward, victim.nonfinite_gradients)


def _run_fgsm(spec: FgsmSpec, given: Assignment) -> Passes:
    # One step of PGD across the whole ball, from the image.
    return pgd(
        given,
        norm=spec.norm,
        steps=1,
        step_size_ratio=1.0,
        random_start=False,
        restarts=1,
        precision=spec.precision,
    )


def _run_pgd_adaptive(spec: PgdAdaptiveSpec, given: Assignment) -> Passes:
    return attack_by_rules(
        pgd,
        given,
        rules=[GradientRule(gradient, spec.temperature) for gradient in spec.gradients],
        **spec.model_dump(include={"norm", "steps", "step_size_ratio", "restarts", "precision"}),
        random_start=True,
    )


def _run_carlini_wagner(spec: CwSpec, given: Assignment) -> Passes:
    passes = torch.zeros(1, len(given.images), dtype=torch.int64)
    attacked = given.levels.nonzero().squeeze(1)
    for rows in attacked.split(given.batch_size) if len(attacked) else ():
        nearest, steps = carlini_wagner_l2(
            given.model,
            given.images[rows],
            given.labels[rows],
            binary_search_steps=spec.binary_search_steps,
            steps=spec.steps,
            lr=spec.lr,
            initial_c=spec.initial_c,
            confidence=spec.confidence,
            abort_early=spec.abort_early,
        )
        given.claim(rows.tolist(), nearest.detach(), [math.inf] * len(rows), [True] * len(rows))
        passes[0, rows] = steps.cpu()
    return passes, passes


def _with_settings(attack: Callable[..., Passes]) -> Callable[[Any, Assignment], Passes]:
    """Runs an attack whose settings are called as in its spec."""

    def run(spec: AttackSpec, given: Assignment) -> Passes:
        settings = set(type(spec).model_fields) - _NO_SETTINGS
        # Who is only asked what survives need not look for anything nearer than what breaks the image at every eps.
        wanted = {"enough": spec.eps[0] if spec.survivors_only else 0.0} if spec.minimises else {}
        return attack(given, **wanted, **spec.model_dump(include=settings))

    return run


#: What a spec says beside the settings of its attack.
_NO_SETTINGS = {"kind", "name", "description", "eps", "survivors_only", "eot_iter"}

_RUNNERS: dict[type[BaseModel], Callable[[Any, Assignment], Passes]] = {
    FgsmSpec: _run_fgsm,
    PgdSpec: _with_settings(pgd),
    PgdAdaptiveSpec: _run_pgd_adaptive,
    CwSpec: _run_carlini_wagner,
    ApgdSpec: _with_settings(apgd),
    SquareSpec: _with_settings(square),
    HopSkipJumpSpec: _with_settings(hop_skip_jump),
    MiFgsmSpec: _with_settings(mi_fgsm),
    FabSpec: _with_settings(fab_t),
    FmnSpec: _with_settings(fmn),
    DeepFoolSpec: _with_settings(deepfool),
    CustomSpec: run_custom,
}


class _Victim(nn.Module):
    """The model as the attacks see it: gradients that are not finite mended and counted."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._nonfinite = torch.zeros((), dtype=torch.int64)

    @property
    def nonfinite_gradients(self) -> int:
        return int(self._nonfinite)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if images.requires_grad:
            images.register_hook(self._mend_gradient)
        return self.model(images)

    def _mend_gradient(self, gradient: torch.Tensor) -> torch.Tensor:
        """Rows with NaN or infinity become zero."""
        is_finite = gradient.isfinite().flatten(1).all(1)
        # Counted on the device: a GPU would be waited for at every gradient.
        self._nonfinite = self._nonfinite.to(gradient.device) + (~is_finite).sum()
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
