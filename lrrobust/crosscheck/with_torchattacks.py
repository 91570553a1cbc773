"""torchattacks 3.5.1: counterparts of FGSM, PGD and Carlini and Wagner's attack.

PGD returns the last iterate. Its CW has no search over c, stops a whole batch when the batch's summed loss rises,
cannot move pixels of exactly 0 or 1, and fails on negative logits: it breaks fewer images, at larger distances.
It returns images and claims nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from lrrobust.attacks.specs import AttackSpec, CwSpec, FgsmSpec, PgdSpec
from lrrobust.crosscheck.peer import PeerAttack, Proposal, is_plain_pgd, predicts_otherwise
from lrrobust.threat import Norm
from lrrobust.torchvision_import import import_torchvision

import_torchvision()
import torchattacks  # noqa: E402


def find_attack(spec: AttackSpec) -> PeerAttack | None:
    if isinstance(spec, FgsmSpec):
        return _attack_with(lambda model, eps: torchattacks.FGSM(model, eps=eps))
    if is_plain_pgd(spec):
        return _attack_with(lambda model, eps: build_pgd(model, spec, eps))
    if isinstance(spec, CwSpec):
        settings = {"c": spec.initial_c, "kappa": spec.confidence, "steps": spec.steps, "lr": spec.lr}
        return _attack_with(lambda model, eps: torchattacks.CW(model, **settings))
    return None


def find_ensemble(norm: Norm) -> PeerAttack | None:
    # Its AutoAttack has other settings than the authors': 10 steps, and a schedule of Square of its own.
    return None


def build_pgd(model: nn.Module, spec: PgdSpec, eps: float) -> torchattacks.attack.Attack:
    """Its PGD in linf or l2 with the settings of `spec` at one budget."""
    kind = torchattacks.PGD if spec.norm == "linf" else torchattacks.PGDL2
    alpha = spec.step_size_ratio * eps / spec.steps
    return kind(model, eps=eps, alpha=alpha, steps=spec.steps, random_start=spec.random_start)


def _attack_with(build: Callable[[nn.Module, float], torchattacks.attack.Attack]) -> PeerAttack:
    def propose(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, eps: float) -> Proposal:
        # A new object each time: after an exception its state is wrong.
        found = build(model, eps)(images, labels)
        return Proposal(found, predicts_otherwise(model, found, labels))

    return propose
