"""Robust accuracy as an assertion, for any test suite.

    from lrrobust.testing import assert_robust

    def test_stays_robust(model, images, labels):
        assert_robust(model, images, labels, attack="pgd", eps="1/255", at_least=0.4)

The images are attacked and judged exactly as by `lrrobust eval`: what misbehaves there (logits with NaN, no gradient,
dependence on the rest of the batch) raises here. No plugin is needed. A fixture that fixes the attack for a whole suite:

    @pytest.fixture
    def robust():
        return functools.partial(assert_robust, attack="pgd", eps="1/255")
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import nn

from lrrobust.attacks.suite import load_suite
from lrrobust.errors import ModelError
from lrrobust.evaluation.chunks import DEFAULT_CHUNK_SIZE
from lrrobust.evaluation.engine import evaluate
from lrrobust.evaluation.judge import call_model
from lrrobust.evaluation.tasks import plan_tasks
from lrrobust.frozen import frozen
from lrrobust.models import Classifier
from lrrobust.results import SCHEMA_VERSION, RunStore

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
        model: images (N, 3, H, W) in [0, 1] -> logits (N, K); normalises by itself.
        images: (N, 3, H, W), float32 in [0, 1], N at least 1.
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
    module = model.module if isinstance(model, Classifier) else model
    if not isinstance(module, torch.nn.Module):
        raise ValueError(f"expected a Classifier or a torch.nn.Module, got {type(module).__name__}")
    if any(parameter.is_inference() for parameter in module.parameters()):
        raise ValueError("the model was built inside torch.inference_mode(), so that it has no gradients: build it outside")
    _check(images, labels, at_least)
    specs = load_suite([attack], eps=[eps])
    device = next((p.device for p in [*module.parameters(), *module.buffers()]), images.device)
    with frozen(module), torch.no_grad():
        logits = call_model(module, images[:1].to(device))
    if not isinstance(logits, torch.Tensor) or logits.ndim != 2:
        found = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise ModelError(f"expected logits (N, classes) of the model, got {found}")
    if not ((labels >= 0) & (labels < logits.shape[1])).all():
        raise ValueError(f"expected labels of 0 to {logits.shape[1] - 1}, got {int(labels.min())} to {int(labels.max())}")
    # Seeds of chunks derive from it.
    fingerprint = hashlib.sha256(f"assert_robust {seed}".encode()).hexdigest()
    manifest = {"schema_version": SCHEMA_VERSION, "fingerprint": fingerprint}
    # Inside torch.inference_mode() nothing could be attacked.
    unlocked = torch.inference_mode(False)
    with unlocked, TemporaryDirectory(prefix="lrrobust-") as folder, RunStore.create_or_resume(Path(folder), manifest) as store:
        evaluate(
            module, logits.shape[1], _TensorImages(images, labels), plan_tasks(specs, len(images), chunk_size), store,
            fingerprint=fingerprint, device=device, part_metadata={},
        )
        rows = store.read_rows()
    # A minimal-norm attack has a row for its nearest image at any distance besides.
    of_images = rows[np.isfinite(rows["eps"].to_numpy(float))].groupby("index")
    is_broken = of_images["is_broken"].any().to_numpy(bool)
    clean_accuracy = float(of_images["is_clean_correct"].first().to_numpy(bool).mean())
    robust_accuracy = 1 - float(is_broken.mean())
    if robust_accuracy < at_least:
        places = np.flatnonzero(is_broken)
        named = ", ".join(map(str, places[:_NAMED])) + (f" and {len(places) - _NAMED} more" if len(places) > _NAMED else "")
        names = ", ".join(f"{spec.name} ({spec.norm})" for spec in specs)
        raise AssertionError(
            f"robust accuracy {robust_accuracy:.4g} is below {at_least:.4g}: {len(images) - len(places)} of {len(images)} "
            f"images withstand {names} at eps {eps} (clean accuracy {clean_accuracy:.4g}); broken: {named}"
        )
    return robust_accuracy


def _check(images: torch.Tensor, labels: torch.Tensor, at_least: float) -> None:
    for what, given, hint in (("images", images, "torch.from_numpy(images)"), ("labels", labels, "torch.tensor(labels)")):
        if not isinstance(given, torch.Tensor):
            raise ValueError(f"expected {what} as a torch.Tensor, got {type(given).__name__}: {hint}")
    if images.ndim != 4 or images.dtype != torch.float32 or not len(images):
        raise ValueError(f"expected at least one float32 image, (N, 3, H, W), got {tuple(images.shape)}, {images.dtype}")
    if not ((images >= 0) & (images <= 1)).all():
        raise ValueError("expected images in [0, 1]: let the model normalise by itself")
    if labels.shape != images.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(f"expected int64 labels ({len(images)},), got {tuple(labels.shape)}, {labels.dtype}")
    if not 0 <= at_least <= 1:
        raise ValueError(f"expected at_least as a fraction of 0 to 1, got {at_least}")


@dataclass(frozen=True)
class _TensorImages:
    """Images in memory, as the engine takes them."""

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.images)

    @property
    def indices(self) -> Sequence[int]:
        return range(len(self))

    @property
    def keys(self) -> Sequence[str]:
        return [f"image {index}" for index in range(len(self))]

    @property
    def wnids(self) -> Sequence[str]:
        return [str(label) for label in self.labels.tolist()]

    def load(self, positions: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        places = list(positions)
        return self.images[places].detach(), self.labels[places]
