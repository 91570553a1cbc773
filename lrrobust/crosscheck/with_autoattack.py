"""AutoAttack by its authors: the standard evaluation, as the counterpart of all our attacks together.

APGD-CE, APGD-T, FAB-T and Square with 100 steps, 9 targets and 5000 queries, each on what the earlier ones left
standing. It needs ten classes, for nine targets beside the label. Images that it could not break it returns
unchanged, and its own count is over the labels that it returns.
"""

from __future__ import annotations

import importlib
import importlib.util

import torch
from torch import nn

from lrrobust.attacks.specs import AttackSpec
from lrrobust.crosscheck.peer import PeerAttack, Proposal
from lrrobust.threat import Norm

_NORMS = {"linf": "Linf", "l2": "L2", "l1": "L1"}

#: The authors' code as they publish it; pyautoattack renames arguments, and always returns labels.
_IS_ORIGINAL = importlib.util.find_spec("autoattack") is not None
_library = importlib.import_module("autoattack" if _IS_ORIGINAL else "pyautoattack")


def find_attack(spec: AttackSpec) -> PeerAttack | None:
    return None


def find_ensemble(norm: Norm) -> PeerAttack | None:
    def propose(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, eps: float) -> Proposal:
        # Its attacks draw from the global generator, seeded anew in each from this number.
        seed = int(torch.randint(2**31, ()))
        settings = {"norm": _NORMS[norm], "eps": eps, "seed": seed, "version": "standard", "device": str(images.device)}
        if _IS_ORIGINAL:
            evaluation = _library.AutoAttack(model, verbose=False, **settings)
            found, predicted = evaluation.run_standard_evaluation(images, labels, bs=len(images), return_labels=True)
        else:
            evaluation = _library.AutoAttack(model, **settings)
            found, predicted = evaluation.run_standard_evaluation(images, labels, batch_size=len(images))
        return Proposal(found, predicted != labels)

    return propose
