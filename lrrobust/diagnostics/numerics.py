"""Does the model answer the same twice, and do its answers hang on rounding?"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator

import numpy as np
import torch

from lrrobust.diagnostics.decision import is_tolerable
from lrrobust.diagnostics.records import Diagnostic
from lrrobust.diagnostics.subject import Subject
from lrrobust.errors import BackendWarning
from lrrobust.evaluation.model_check import RANDOMISED_TOLERANCE
from lrrobust.evaluation.judge import Judge
from lrrobust.frozen import frozen

#: Forward passes of the same images, as AutoAttack's check makes.
FORWARDS = 5


@torch.no_grad()
def check_determinism(subject: Subject) -> Iterator[Diagnostic]:
    """Whether the logits of the same images in the same batch are the same, up to rounding of a parallel sum."""
    images = subject.images[: subject.judge.batch_size]
    first = subject.judge.model(images)
    difference = max(float((subject.judge.model(images) - first).abs().max()) for _ in range(FORWARDS - 1))
    passed = difference <= RANDOMISED_TOLERANCE
    detail = f"In {FORWARDS} forward passes the logits of {len(images)} images differ by at most {difference:.2g}"
    detail += "" if passed else ": the model is randomised, and attacks that do not average over that overstate its robustness"
    yield Diagnostic(name="determinism", passed=passed, detail=f"{detail}.")


@torch.no_grad()
def check_float64(subject: Subject) -> Iterator[Diagnostic]:
    """Whether adversarial images found in float32 are misclassified in float64 too, on the CPU.

    The attack of the run that breaks most is made once more on the images it broke; iterates that have just crossed
    the boundary are where rounding decides.
    """
    images, labels = subject.images, subject.labels
    norm = next((norm for norm in subject.norms if norm.strongest is not None), None)
    if norm is not None and len(places := np.flatnonzero(norm.strongest.breaking_eps[: len(subject)] <= norm.choose_eps())):
        strike = subject.strike(norm.strongest.spec, norm.choose_eps(), places)
        found = torch.from_numpy(np.flatnonzero(strike.is_broken)).to(labels.device)
        images = torch.cat([images, strike.adversarial[found]])
        labels = torch.cat([labels, labels[torch.from_numpy(places).to(labels.device)][found]])
    keys = [""] * len(labels)
    single = subject.judge.predict(images, labels, keys)
    try:
        exact_model = copy.deepcopy(subject.judge.model).to("cpu", torch.float64)
        with frozen(exact_model), warnings.catch_warnings():
            # A fused backend of float32 gives way to another one, as it should here.
            warnings.simplefilter("ignore", BackendWarning)
            judge = Judge(exact_model, subject.judge.num_classes, subject.judge.batch_size)
            exact = judge.predict(images.cpu().double(), labels.cpu(), keys)
    except Exception as error:
        # Whatever a network of other people does when it is cast is no failure of an attack.
        reason = " ".join(str(error).split())[:150]
        detail = f"The model cannot be computed in float64 ({type(error).__name__}: {reason}), so whether rounding decides is not known."
        yield Diagnostic(name="float64", passed=None, detail=detail)
        return
    differing = int((single.label.cpu() != exact.label).sum())
    gap = float((single.margin.cpu() - exact.margin).abs().max())
    passed = is_tolerable(differing, len(labels))
    detail = (
        f"Of {len(subject)} clean images and {len(labels) - len(subject)} adversarial ones at the boundary, {differing} are "
        f"classified otherwise in float64; margins differ by at most {gap:.2g}"
    )
    detail += ": what breaks and what withstands hangs on rounding" if passed is False else ""
    yield Diagnostic(name="float64", passed=passed, detail=f"{detail}.")
