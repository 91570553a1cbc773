"""adv-lib 0.2: counterparts of PGD in linf and of Carlini and Wagner's attack.

Its PGD looks at iterates before each step, so that the last of its steps is never tried, and returns the clean
image where it found nothing. It has no PGD in l2. It returns images and claims nothing.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from lrrobust.attacks.specs import AttackSpec, CwSpec, PgdSpec
from lrrobust.crosscheck.peer import PeerAttack, Proposal, predicts_otherwise
from lrrobust.threat import Norm
from lrrobust.torchvision_import import import_torchvision

import_torchvision()
from adv_lib import attacks  # noqa: E402


def find_attack(spec: AttackSpec) -> PeerAttack | None:
    if isinstance(spec, PgdSpec) and spec.norm == "linf":
        return partial(_pgd, spec)
    if isinstance(spec, CwSpec):
        return partial(_carlini_wagner, spec)
    return None


def find_ensemble(norm: Norm) -> PeerAttack | None:
    return None


def _pgd(spec: PgdSpec, model: nn.Module, images: torch.Tensor, labels: torch.Tensor, eps: float) -> Proposal:
    found = attacks.pgd_linf(
        model,
        images,
        labels,
        eps,
        steps=spec.steps,
        random_init=spec.random_start,
        relative_step_size=spec.step_size_ratio / spec.steps,
    )
    return Proposal(found, predicts_otherwise(model, found, labels))


def _carlini_wagner(spec: CwSpec, model: nn.Module, images: torch.Tensor, labels: torch.Tensor, eps: float) -> Proposal:
    found = attacks.carlini_wagner_l2(
        model,
        images,
        labels,
        confidence=spec.confidence,
        learning_rate=spec.lr,
        initial_const=spec.initial_c,
        binary_search_steps=spec.binary_search_steps,
        max_iterations=spec.steps,
        abort_early=spec.abort_early,
    )
    return Proposal(found, predicts_otherwise(model, found, labels))
