"""torchattacks 3.5.1: counterparts of FGSM, PGD and Carlini and Wagner's attack.

PGD returns the last iterate. Its CW has no search over c, stops a whole batch when the batch's summed loss rises,
cannot move pixels of exactly 0 or 1, and fails on negative logits: it breaks fewer images, at larger distances.
It returns images and claims nothing.
"""

from __future__ import annotations

from torch import nn

from lrrobust.attacks.specs import AttackSpec, CwSpec, FgsmSpec, PgdSpec
from lrrobust.crosscheck.peer import PeerAttack, claiming, is_plain_pgd
from lrrobust.threat import Norm
from lrrobust.torchvision_import import import_torchvision

import_torchvision()
import torchattacks  # noqa: E402


def find_attack(spec: AttackSpec) -> PeerAttack | None:
    # A new object for each call: after an exception its state is wrong.
    if isinstance(spec, FgsmSpec):
        return claiming(lambda model, images, labels, eps: torchattacks.FGSM(model, eps=eps)(images, labels))
    if is_plain_pgd(spec):
        return claiming(lambda model, images, labels, eps: build_pgd(model, spec, eps)(images, labels))
    if isinstance(spec, CwSpec):
        settings = {"c": spec.initial_c, "kappa": spec.confidence, "steps": spec.steps, "lr": spec.lr}
        return claiming(lambda model, images, labels, eps: torchattacks.CW(model, **settings)(images, labels))
    return None


def find_ensemble(norm: Norm) -> PeerAttack | None:
    # Its AutoAttack has other settings than the authors': 10 steps, and a schedule of Square of its own.
    return None


def build_pgd(model: nn.Module, spec: PgdSpec, eps: float) -> torchattacks.attack.Attack:
    """Its PGD in linf or l2 with the settings of `spec` at one budget."""
    kind = torchattacks.PGD if spec.norm == "linf" else torchattacks.PGDL2
    alpha = spec.step_size_ratio * eps / spec.steps
    return kind(model, eps=eps, alpha=alpha, steps=spec.steps, random_start=spec.random_start)
