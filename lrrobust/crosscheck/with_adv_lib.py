"""adv-lib 0.2: counterparts of PGD in linf, of Carlini and Wagner's attack, of targeted FAB and of FMN.

Its PGD looks at iterates before each step, so that the last of its steps is never tried, and returns the clean
image where it found nothing. It has no PGD in l2. Its FAB has no search along the line to the clean image. The step
sizes of its FMN are lengths, ours are in units of the radius: it runs with those that it comes with. It returns images
and claims nothing.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import nn

from lrrobust.attacks.specs import AttackSpec, CwSpec, FabSpec, FmnSpec, PgdSpec
from lrrobust.crosscheck.peer import PeerAttack, Proposal, is_plain_pgd, predicts_otherwise
from lrrobust.threat import Norm
from lrrobust.torchvision_import import import_torchvision

import_torchvision()
from adv_lib import attacks  # noqa: E402

_ORDERS: dict[Norm, float] = {"linf": math.inf, "l2": 2, "l1": 1}


def find_attack(spec: AttackSpec) -> PeerAttack | None:
    if is_plain_pgd(spec) and spec.norm == "linf":
        return partial(_pgd, spec)
    if isinstance(spec, CwSpec):
        return partial(_carlini_wagner, spec)
    if isinstance(spec, FabSpec):
        return partial(_fab, spec)
    if isinstance(spec, FmnSpec):
        return partial(_fmn, spec)
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


def _fab(spec: FabSpec, model: nn.Module, images: torch.Tensor, labels: torch.Tensor, eps: float) -> Proposal:
    found = attacks.fab(
        model,
        images,
        labels,
        norm=_ORDERS[spec.norm],
        n_iter=spec.steps,
        alpha_max=spec.largest_pull,
        eta=spec.overshoot,
        beta=spec.backward_share,
        restarts=spec.targets,
        targeted_restarts=True,
    )
    return Proposal(found, predicts_otherwise(model, found, labels))


def _fmn(spec: FmnSpec, model: nn.Module, images: torch.Tensor, labels: torch.Tensor, eps: float) -> Proposal:
    found = attacks.fmn(
        model,
        images,
        labels,
        norm=_ORDERS[spec.norm],
        steps=spec.steps,
        γ_init=spec.first_change,
        γ_final=spec.last_change,
    )
    return Proposal(found, predicts_otherwise(model, found, labels))
