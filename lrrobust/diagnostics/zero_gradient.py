"""Has the attack anything to follow: a gradient, or answers that change?"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import torch

from lrrobust.attacks.ball import dual_length
from lrrobust.attacks.losses import lead_of, likely_targets, log_odds, margin
from lrrobust.attacks.specs import AttackSpec
from lrrobust.diagnostics.decision import is_tolerable
from lrrobust.diagnostics.records import Diagnostic
from lrrobust.diagnostics.subject import Subject
from lrrobust.formatting import format_eps
from lrrobust.threat import Norm

#: What is climbed; "leads" are those of the likeliest other classes, one after the other.
Loss = Literal["log_odds", "cross_entropy", "margin", "leads"]

#: A gradient counts as (near) zero when, across the largest ball, it promises less than this share of the rise of
#: the loss that a misclassification takes. Sound networks are at 0.1 to 100; float32 resolves 1e-7.
NEAR_ZERO = 1e-6

#: Of the ball, at which black-box attacks are asked whether there is anything to follow.
CORNERS = 4

#: Share of images without a gradient that a sound attack may meet: a dead rectifier here and there.
TOLERATED_ZEROS = 0.01


def climbed(spec: AttackSpec) -> tuple[Loss, int]:
    """What a white-box attack climbs, and towards how many classes.

    The DLR loss is the margin over a scale: where the margin has no gradient it follows the scale, which leads to no class.
    """
    if spec.kind in ("fab_t", "deepfool") or getattr(spec, "loss", None) == "targeted_dlr":
        return "leads", spec.targets
    target = getattr(spec, "target", "none")
    if getattr(spec, "loss", None) == "margin" and target == "top_k":
        return "leads", spec.targets
    # Other targets may be far, and the margin then says little of the way to them.
    is_margin = spec.kind in ("cw", "fmn") or getattr(spec, "loss", None) in ("margin", "dlr")
    return ("margin" if is_margin and target == "none" else "log_odds"), 1


def promised_rise(subject: Subject, points: torch.Tensor, loss: Loss, norm: Norm, eps: float, targets: int = 1) -> torch.Tensor:
    """Rise of the loss that its gradient at points promises within eps, as a share of the rise that it takes; float64 (N,).

    The log odds log sum_{k != y} exp(z_k) - z_y must rise by as much as the image's class leads; the cross-entropy
    to log 2, where no other class can lead before; margins and leads to zero. The scale of the logits thus plays no
    part, but for the rounding that it causes: on confident models the float32 cross-entropy has no gradient left.

    Args:
        points: (N, 3, H, W) in [0, 1], one near each image of the sample. Where one is misclassified there is nothing
            left to promise: infinity.
        targets: for "leads", of how many likeliest classes; the first of them whose lead has a gradient counts.
    """
    promised = torch.zeros(len(points), dtype=torch.float64, device=points.device)
    for place in range(min(targets, subject.judge.num_classes - 1)):
        idle = _idle(promised).nonzero().flatten()
        for rows in idle.split(subject.judge.batch_size) if len(idle) else ():
            labels = subject.labels[rows]
            with torch.enable_grad():
                images = points[rows].detach().requires_grad_()
                logits = subject.judge.model(images)
                value, rise = _value_and_rise(logits, labels, loss, place)
                (gradient,) = torch.autograd.grad(value.sum(), images)
            share = eps * dual_length(gradient, norm) / rise.detach().double().clamp_min(torch.finfo(torch.float32).tiny)
            promised[rows] = share.where(logits.argmax(1) == labels, math.inf)
    return promised


def _idle(promised: torch.Tensor) -> torch.Tensor:
    # NaN promises nothing either.
    return ~(promised >= NEAR_ZERO)


def _value_and_rise(logits: torch.Tensor, labels: torch.Tensor, loss: Loss, place: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss, and by how much it must rise until the images leave their class; (n,) each."""
    if loss == "log_odds":
        return log_odds(logits, labels), -margin(logits, labels)
    if loss == "cross_entropy":
        own = logits.gather(1, labels[:, None]).squeeze(1)
        return logits.logsumexp(1) - own, torch.full_like(own, math.log(2))
    if loss == "leads":
        value = lead_of(logits, likely_targets(logits, labels, place + 1)[:, -1], labels)
    else:
        value = margin(logits, labels)
    return value, -value


def check_zero_gradient(subject: Subject) -> Iterator[Diagnostic]:
    """One result for each attack.

    Those by gradient are asked for that of what they climb: the log odds, for "ce" too (`lrrobust.attacks.losses.log_odds`),
    the margin, or the leads of several classes, of which one with a gradient is enough. Where the plain cross-entropy has none
    and this does, the result says so and passes: nothing that was attacked suffered by it.

    Black-box attacks follow the margin, which must not be the same at several corners of the ball, as behind a model that
    answers with nothing but its class. Attacks that need no more than the class have no result.

    Source: Carlini et al., On Evaluating Adversarial Robustness, 2019, section 4.8; near zeros by saturation:
    Carlini and Wagner, Defensive Distillation is Not Robust to Adversarial Examples, 2016.
    """
    known: dict[tuple[Loss, int, Norm, float, bool], int] = {}

    def count(loss: Loss, targets: int, norm: Norm, eps: float, is_random: bool) -> int:
        """Images without a gradient where the attack starts."""
        key = loss, targets, norm, eps, is_random
        if key not in known:
            points = subject.noisy(norm, eps) if is_random else subject.images
            known[key] = int(_idle(promised_rise(subject, points, loss, norm, eps, targets)).sum())
        return known[key]

    for outcomes in subject.outcomes:
        spec = outcomes.spec
        eps = max((each for each in outcomes.eps if math.isfinite(each)), default=0.0)
        if eps == 0:
            continue
        if not spec.needs_gradient:
            if spec.needs_logits:
                yield _follows_answers(subject, spec, eps)
            continue
        start = spec.norm, eps, getattr(spec, "random_start", False)
        zeros = count(*climbed(spec), *start)
        passed = is_tolerable(zeros, len(subject), TOLERATED_ZEROS)
        detail = (
            f"Where {spec.name} starts, the gradient it follows is zero, or too small to matter, for {zeros} of "
            f"{len(subject)} images"
        )
        if passed is False:
            detail += ": it has nothing to follow there, and what it leaves standing shows nothing"
        elif (saturated := count("cross_entropy", 1, *start)) > zeros:
            detail += (
                f"; that of the plain cross-entropy, which it does not use, for {saturated}: attacks that use it would fail on "
                "logits so large"
            )
        yield Diagnostic(name="zero_gradient", passed=passed, detail=f"{detail}.", attack=spec.name, norm=spec.norm)


@torch.no_grad()
def _follows_answers(subject: Subject, spec: AttackSpec, eps: float) -> Diagnostic:
    margins, is_own = [], torch.ones_like(subject.labels, dtype=torch.bool)
    for draw in range(CORNERS):
        corner = subject.noisy(spec.norm, eps, draw, is_corner=True)
        prediction = subject.judge.predict(corner, subject.labels, subject.keys)
        margins.append(prediction.margin)
        is_own &= prediction.label == subject.labels
    # Where one of them is another class the attack has found what it looks for.
    constant = int(((torch.stack(margins).amax(0) == torch.stack(margins).amin(0)) & is_own).sum())
    passed = is_tolerable(constant, len(subject), TOLERATED_ZEROS)
    detail = (
        f"At {CORNERS} corners of the ball of eps {format_eps(eps, spec.norm)} the margin that {spec.name} follows is one and "
        f"the same for {constant} of {len(subject)} images"
    )
    if passed is False:
        detail += ": there the model's answers tell it no more than the class, and what it leaves standing shows nothing"
        detail += "; hop_skip_jump needs no more"
    return Diagnostic(name="zero_gradient", passed=passed, detail=f"{detail}.", attack=spec.name, norm=spec.norm)
