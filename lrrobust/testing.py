"""Robust accuracy as an assertion, for any test suite.

    from lrrobust.testing import assert_robust

    def test_stays_robust(model, images, labels):
        assert_robust(model, images, labels, attack="pgd", eps="1/255", at_least=0.4)

The images are attacked and judged exactly as by `lrrobust eval`: what misbehaves there (logits with NaN, no gradient,
dependence on the rest of the batch) raises here, and what is marked there (logits that are random, gradients of zero) is
a warning. No plugin is needed. A fixture that fixes the attack for a whole suite:

    @pytest.fixture
    def robust():
        return functools.partial(assert_robust, attack="pgd", eps="1/255")
"""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn

from lrrobust.evaluation.chunks import DEFAULT_CHUNK_SIZE
from lrrobust.in_memory import evaluate
from lrrobust.models import Classifier

#: Broken images that a failure names.
_NAMED = 20


def assert_robust(
    model: nn.Module | Classifier,
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    eps: float | str,
    at_least: float,
    attack: str | Path = "pgd",
    seed: int = 0,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
) -> float:
    """Attacks a model and fails unless enough images withstand.

    The same model, images and arguments give the same result: the attack's randomness follows `seed`. The model's mode,
    the flags of its parameters and torch's random state are as before afterwards.

    Args:
        model: images (N, C, H, W) in [0, 1] -> logits (N, K); normalises by itself.
        images: (N, C, H, W), float32 in [0, 1], N at least 1.
        labels: (N,), int64, true classes.
        eps: budget in pixel units of [0, 1], or text such as "1/255", in the norm of the attack.
        at_least: smallest robust accuracy to accept, a fraction of all images; those wrong when clean count as broken.
        attack: a shipped attack or suite, or a YAML file, as `lrrobust eval --attack` takes it. Under a suite an image
            counts as broken when any of its attacks breaks it.
        seed: of the attack.
        chunk_size: images attacked together.

    Returns:
        Robust accuracy, a fraction.

    Raises:
        AssertionError: robust accuracy is below `at_least`; names the broken images by their place.
        ValueError: images, labels or `at_least` are not what they must be.
        LrRobustError: no such attack, a wrong eps, or the model does not behave like a classifier.
    """
    __tracebackhide__ = True
    if not 0 <= at_least <= 1:
        raise ValueError(f"expected at_least as a fraction of 0 to 1, got {at_least}")
    found = evaluate(
        model, images, labels, attacks=attack, eps=eps, seed=seed, chunk_size=chunk_size, diagnostics=False, progress=False
    )
    # A test that passes shows no log.
    for reason in found.warnings:
        warnings.warn(f"robust accuracy may be too high: {reason}", stacklevel=2)
    # A minimal-norm attack has a row for its nearest image at any distance besides.
    met = found.rows[np.isfinite(found.rows["eps"].to_numpy(float))]
    of_images = met.groupby("index")
    is_broken = of_images["is_broken"].any().to_numpy(bool)
    clean_accuracy = float(of_images["is_clean_correct"].first().to_numpy(bool).mean())
    robust_accuracy = 1 - float(is_broken.mean())
    if robust_accuracy < at_least:
        places = np.flatnonzero(is_broken)
        named = ", ".join(map(str, places[:_NAMED])) + (f" and {len(places) - _NAMED} more" if len(places) > _NAMED else "")
        names = ", ".join(f"{name} ({norm})" for name, norm in dict.fromkeys(zip(met["attack"], met["norm"])))
        raise AssertionError(
            f"robust accuracy {robust_accuracy:.4g} is below {at_least:.4g}: {len(images) - len(places)} of {len(images)} "
            f"images withstand {names} at eps {eps} (clean accuracy {clean_accuracy:.4g}); broken: {named}"
        )
    return robust_accuracy
