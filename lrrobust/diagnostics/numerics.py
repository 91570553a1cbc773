"""Does the model answer the same twice, and do its answers hang on rounding?"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from lrrobust.diagnostics.decision import is_tolerable
from lrrobust.diagnostics.records import Diagnostic
from lrrobust.diagnostics.subject import Subject
from lrrobust.errors import BackendWarning
from lrrobust.evaluation.judge import Judge, call_model, gap, gaps, logit_scale
from lrrobust.evaluation.model_check import BATCH_TOLERANCE, OFF_GRID, RANDOMISED_TOLERANCE
from lrrobust.frozen import frozen

#: Forward passes of the same images, as AutoAttack's check makes.
FORWARDS = 5

#: Noise on all values, and a change of one by a level of 8 bits: neither moves logits as much as noise of `OFF_GRID` on all.
TINY, LEVEL = 1e-6, 1 / 255

#: Share of what noise of `OFF_GRID` moves the logits by, at the median image, from which on less than that moves them without
#: reason. It is 0.06 at most on small trained networks, their 8-bit and bfloat16 forms, and behind JPEG; 1 with drawn noise.
ARBITRARY = 0.5

#: Of the way from a clean image to an adversarial one: what is left beyond the boundary is less than 1 % of it, as
#: minimal-norm attacks leave. Much nearer, rounding would decide on sound models too.
HALVINGS = 7


#: Share of the median clean margin that rounding may move margins by: it then moves boundaries by about as much of the way to
#: them. Autocast to bfloat16 moves those of the trained networks, and of small ones, by 0.06 at most.
SLIGHT = 0.1


@torch.no_grad()
def check_determinism(subject: Subject) -> Iterator[Diagnostic]:
    """Whether the logits of the same images in the same batch are the same, up to rounding of a parallel sum.

    Of clean images, and of noisy ones: attacks leave the grid of 8 bits, off which alone a model may be random. And of images
    that nearly agree: noise whose seed is made of the image itself is the same twice, and as random for an attack. Where all
    attacks average over several passes it is not known whether these are enough; `check_convergence` averages over more.
    """
    clean, noisy = _clean_and_noisy(subject)
    differences, passed = _differences(subject)
    detail = (
        f"In {FORWARDS} forward passes the logits of {len(clean)} images differ by at most {differences[0]:.2g}, with noise on "
        f"them by at most {differences[1]:.2g}"
    )
    if not passed:
        detail += ": the model is randomised, and "
        draws = min(outcomes.spec.eot_iter for outcomes in subject.outcomes)
        if draws == 1:
            detail += "attacks that do not average over that (--eot-iter) may overstate its robustness"
        else:
            passed = None
            detail += f"attacks average over {draws} passes; whether these are enough is not known"
    elif (found := _drawn_from_images(subject, clean, noisy)) is not None:
        passed = False
        detail += (
            f", but by {found}: randomness drawn from the image is randomness all the same, and attacks that do not average "
            "over it overstate the model's robustness"
        )
    yield Diagnostic(name="determinism", passed=passed, detail=f"{detail}.")


def _clean_and_noisy(subject: Subject) -> tuple[torch.Tensor, torch.Tensor]:
    """One batch of the sample, (N, C, H, W) each."""
    size = subject.judge.batch_size
    return subject.images[:size], subject.noisy("linf", OFF_GRID)[:size]


def is_deterministic(subject: Subject) -> bool:
    """Whether logits of the same images are the same, clean and noisy, up to rounding of a parallel sum."""
    return bool(_differences(subject)[1])


def _differences(subject: Subject) -> tuple[list[float], bool | None]:
    """By how much logits of the same images differ, clean and noisy, and whether that is rounding."""
    model = subject.judge.model
    differences, passed = [], True
    for images in _clean_and_noisy(subject):
        first = call_model(model, images)
        differences.append(max(gap(call_model(model, images), first) for _ in range(FORWARDS - 1)))
        # Written so that NaN fails.
        passed &= differences[-1] <= RANDOMISED_TOLERANCE * logit_scale(first)
    return differences, passed


def _drawn_from_images(subject: Subject, clean: torch.Tensor, noisy: torch.Tensor) -> str | None:
    """How much logits change where next to nothing changes of the images, if as much as where all does; else None."""
    draws = [subject.generator("nearly agree", key, OFF_GRID) for key in subject.keys[: len(clean)]]
    places = torch.stack([torch.randint(clean[0].numel(), (1,), generator=draw) for draw in draws]).to(clean.device)
    values = clean.flatten(1)
    one = values.scatter_add(1, places, (LEVEL * torch.where(values < 0.5, 1, -1)).gather(1, places)).view_as(clean)
    # Not about the clean images: where a model rounds images, many values of 8 bits may lie just between two levels.
    tiny = noisy + (clean - noisy) * (TINY / OFF_GRID)
    before, beside = (call_model(subject.judge.model, images) for images in (clean, noisy))
    least = max(BATCH_TOLERANCE * logit_scale(before), ARBITRARY * float(gaps(beside, before).median()))
    for images, near, what in ((tiny, beside, f"noise of {TINY:g}"), (one, before, "one value changed by 1/255")):
        change = float(gaps(call_model(subject.judge.model, images), near).median())
        if change > least:
            return f"{change:.2g} with {what}, as with noise of {round(255 * OFF_GRID)}/255 on all"
    return None


@torch.no_grad()
def check_float64(subject: Subject) -> Iterator[Diagnostic]:
    """Whether clean images, and adversarial ones at the boundary, are classified in float64 as in float32; on the CPU.

    At the boundary is where minimal-norm attacks end, and where rounding decides. Where it moves the margin by no more than
    `SLIGHT`, as half precision does, it does not count. In a randomised model chance decides.
    """
    if not is_deterministic(subject):
        detail = "The model is randomised, so that two passes differ in any case: whether rounding decides is not known."
        yield Diagnostic(name="float64", passed=None, detail=detail)
        return
    places, edge = boundary_images(subject)
    images, labels = torch.cat([subject.images, edge]), torch.cat([subject.labels, subject.labels[places]])
    keys = [""] * len(labels)
    single = subject.judge.predict(images, labels, keys)
    try:
        with exact_model(subject.judge.model) as model:
            judge = Judge(model, subject.judge.num_classes, subject.judge.batch_size)
            exact = judge.predict(images.cpu().double(), labels.cpu(), keys)
    except Exception as error:
        # Whatever a network of other people does when it is cast is no failure of an attack.
        detail = f"{explain_no_float64(error)}, so whether rounding decides is not known."
        yield Diagnostic(name="float64", passed=None, detail=detail)
        return
    moved = (single.margin.cpu() - exact.margin).abs()
    gap, slight = float(moved.max()), SLIGHT * float(single.margin[: len(subject)].median())
    is_other = single.label.cpu() != exact.label
    # Written so that NaN counts.
    differing = int((is_other & ~(moved <= slight)).sum())
    overlooked = int(is_other.sum()) - differing
    passed = is_tolerable(differing, len(labels))
    detail = (
        f"Of {len(subject)} clean images and {len(edge)} adversarial ones at the boundary, {differing} are "
        f"classified otherwise in float64; margins differ by at most {gap:.2g}"
    )
    if overlooked:
        detail += f" ({overlooked} more are, by less than {100 * SLIGHT:g} % of the median clean margin)"
    if passed is False:
        detail += ": what breaks and what withstands hangs on rounding"
    elif not len(edge):
        passed = None
        detail += ". No attack came to the boundary, so whether rounding decides there is not known"
    yield Diagnostic(name="float64", passed=passed, detail=f"{detail}.")


@contextmanager
def exact_model(model: nn.Module) -> Iterator[nn.Module]:
    """A copy on the CPU in float64; raises whatever strikes a network that cannot be cast."""
    model = copy.deepcopy(model).to("cpu", torch.float64)
    with frozen(model), warnings.catch_warnings():
        # A fused backend of float32 gives way to another one, as it should here.
        warnings.simplefilter("ignore", BackendWarning)
        yield model


def explain_no_float64(error: Exception) -> str:
    """The beginning of a sentence."""
    reason = " ".join(str(error).split())[:150]
    return f"The model cannot be computed in float64 ({type(error).__name__}: {reason})"


def boundary_images(subject: Subject) -> tuple[torch.Tensor, torch.Tensor]:
    """Places in the sample, (M,) int64, and an adversarial image just beyond the boundary for each, (M, 3, H, W).

    The strongest attack is made once more on what the run broke, in the first norm in which it breaks any; what it finds is
    moved towards the clean image for as long as it is misclassified.
    """
    for norm in subject.norms:
        eps = norm.choose_eps()
        broken = np.flatnonzero(norm.breaking_eps[: len(subject)] <= eps)
        if not len(broken):
            continue
        strike = subject.strike(norm.strongest, eps, broken)
        if not strike.is_broken.any():
            continue
        again = torch.from_numpy(strike.is_broken).to(subject.labels.device)
        places = torch.from_numpy(broken).to(subject.labels.device)[again]
        clean, labels, keys = subject.images[places], subject.labels[places], [subject.keys[place] for place in places.tolist()]
        way = strike.adversarial[again] - clean
        inside, outside = torch.zeros_like(way[:, :1, :1, :1]), torch.ones_like(way[:, :1, :1, :1])
        for _ in range(HALVINGS):
            middle = (inside + outside) / 2
            is_wrong = (subject.judge.predict(clean + middle * way, labels, keys).label != labels)[:, None, None, None]
            inside, outside = torch.where(is_wrong, inside, middle), torch.where(is_wrong, middle, outside)
        return places, clean + outside * way
    return subject.labels[:0], subject.images[:0]
