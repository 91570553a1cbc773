"""Has the attack a gradient to follow?"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import torch

from lrrobust.attacks.ball import dual_length
from lrrobust.attacks.losses import log_odds
from lrrobust.diagnostics.decision import is_tolerable
from lrrobust.diagnostics.outcomes import is_white_box
from lrrobust.diagnostics.records import Diagnostic
from lrrobust.diagnostics.subject import Subject
from lrrobust.threat import Norm

Loss = Literal["log_odds", "cross_entropy"]

#: A gradient counts as (near) zero when, across the largest ball, it promises less than this share of the rise of
#: the loss that a misclassification takes. Sound networks are at 0.1 to 100; float32 resolves 1e-7.
NEAR_ZERO = 1e-6

#: Share of images without a gradient that a sound attack may meet: a dead rectifier here and there.
TOLERATED_ZEROS = 0.01


def promised_rise(subject: Subject, points: torch.Tensor, loss: Loss, norm: Norm, eps: float) -> torch.Tensor:
    """Rise of the loss that its gradient at points promises within eps, as a share of the rise that it takes; float64 (N,).

    The log odds log sum_{k != y} exp(z_k) - z_y must rise by as much as the image's class leads; the cross-entropy
    to log 2, where no other class can lead before. The scale of the logits thus plays no part, but for the rounding
    that it causes: on confident models the float32 cross-entropy has no gradient left.

    Args:
        points: (N, 3, H, W) in [0, 1], one near each image of the sample. Where one is misclassified there is nothing
            left to promise: infinity.
    """
    shares = []
    size = subject.judge.batch_size
    for images, labels in zip(points.split(size), subject.labels.split(size), strict=True):
        with torch.enable_grad():
            images = images.detach().requires_grad_()
            logits = subject.judge.model(images)
            own = logits.gather(1, labels[:, None]).squeeze(1)
            if loss == "log_odds":
                value = log_odds(logits, labels)
                lead = own - logits.scatter(1, labels[:, None], -math.inf).amax(1)
            else:
                value, lead = logits.logsumexp(1) - own, torch.full_like(own, math.log(2))
            (gradient,) = torch.autograd.grad(value.sum(), images)
        slope = dual_length(gradient, norm)
        share = eps * slope / lead.detach().double().clamp_min(torch.finfo(torch.float32).tiny)
        shares.append(share.where(logits.argmax(1) == labels, math.inf))
    return torch.cat(shares)


def check_zero_gradient(subject: Subject) -> Iterator[Diagnostic]:
    """One result for each white-box attack.

    All of them climb differences of logits, "ce" too, see `lrrobust.attacks.losses.log_odds`. Where the plain
    cross-entropy has no gradient and this does, the result says so and passes: nothing that was attacked suffered by it.

    Source: Carlini et al., On Evaluating Adversarial Robustness, 2019, section 4.8; near zeros by saturation:
    Carlini and Wagner, Defensive Distillation is Not Robust to Adversarial Examples, 2016.
    """
    known: dict[tuple[Loss, Norm, float, bool], int] = {}

    def count(loss: Loss, norm: Norm, eps: float, is_random: bool) -> int:
        """Images without a gradient where the attack starts."""
        key = loss, norm, eps, is_random
        if key not in known:
            points = subject.noisy(norm, eps) if is_random else subject.images
            # NaN promises nothing either.
            known[key] = int((~(promised_rise(subject, points, loss, norm, eps) >= NEAR_ZERO)).sum())
        return known[key]

    for outcomes in subject.outcomes:
        spec = outcomes.spec
        eps = max((each for each in outcomes.eps if math.isfinite(each)), default=0.0)
        if not is_white_box(spec) or eps == 0:
            continue
        start = spec.norm, eps, getattr(spec, "random_start", False)
        zeros = count("log_odds", *start)
        passed = is_tolerable(zeros, len(subject), TOLERATED_ZEROS)
        detail = f"Where {spec.name} starts, the gradient it follows is zero, or too small to matter, for {zeros} of {len(subject)} images"
        if passed is False:
            detail += ": it has nothing to follow there, and what it leaves standing shows nothing"
        elif (saturated := count("cross_entropy", *start)) > zeros:
            detail += (
                f"; that of the plain cross-entropy, which it does not use, for {saturated}: attacks that use it would fail on "
                "logits so large"
            )
        yield Diagnostic(name="zero_gradient", passed=passed, detail=f"{detail}.", attack=spec.name, norm=spec.norm)
