"""Classifiers whose nearest adversarial images are known in closed form."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
from dataclasses import dataclass

import pytest

# Whoever starts the tests in the background of a shell, or under nohup, has them ignore these; they are what is tested.
for _signum, _default in (("SIGINT", signal.default_int_handler), ("SIGTERM", signal.SIG_DFL), ("SIGHUP", signal.SIG_DFL)):
    if hasattr(signal, _signum) and signal.getsignal(getattr(signal, _signum)) is signal.SIG_IGN:
        signal.signal(getattr(signal, _signum), _default)

# Tests share the cores among processes, and most tensors are tiny; torch reads this once, when it is first imported.
# Tests of threads ask for them.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import nn

from lrrobust.threat import Norm

#: Processes beyond these hardly make the tests faster, and each holds half a gigabyte.
MOST_PROCESSES = 8


def pytest_xdist_auto_num_workers() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MOST_PROCESSES)


# Without a GPU the Triton kernels are interpreted, which triton decides once, when it is first imported; torch's
# compiler imports it too, and other packages through it, so here, before any test module is collected.
if importlib.util.find_spec("triton") is not None and not torch.cuda.is_available():
    assert "triton" not in sys.modules, "something imported triton before it could be told to interpret its kernels"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        import lrrobust.ops._triton  # noqa: F401

SIZE = 8


@dataclass(frozen=True)
class LinearProblem:
    """Images near mid grey, so that the box [0, 1] plays no part, and a classifier that gets them right."""

    model: nn.Module
    weight: torch.Tensor  # (K, 3 * SIZE * SIZE)
    images: torch.Tensor
    labels: torch.Tensor

    def nearest(self, norm: Norm) -> torch.Tensor:
        """Distance from each image to the nearest other class: margin / dual norm of the weights' difference."""
        with torch.no_grad():
            logits = self.model(self.images).double()
        own = logits.gather(1, self.labels[:, None])
        difference = self.weight.double()[self.labels][:, None] - self.weight.double()[None]
        dual = difference.norm(p={"linf": 1, "l2": 2, "l1": float("inf")}[norm], dim=2)
        return ((own - logits) / dual).scatter(1, self.labels[:, None], float("inf")).amin(1)


@pytest.fixture
def linear_problem():
    def build(count: int, classes: int, seed: int = 0, slope: float = 3.0) -> LinearProblem:
        generator = torch.Generator().manual_seed(seed)
        pixels = 3 * SIZE * SIZE
        layer = nn.Linear(pixels, classes)
        with torch.no_grad():
            layer.weight.copy_(slope * torch.randn(classes, pixels, generator=generator))
            layer.bias.copy_(-0.5 * layer.weight.sum(1))
        model = nn.Sequential(nn.Flatten(), layer).eval()
        images = 0.5 + 0.02 * torch.randn(count, 3, SIZE, SIZE, generator=generator)
        with torch.no_grad():
            labels = model(images).argmax(1)
        return LinearProblem(model, layer.weight.detach(), images, labels)

    return build


@pytest.fixture
def small_cnn():
    """An untrained network with BatchNorm, in evaluation mode; 5 classes."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1),
            nn.BatchNorm2d(8),
            nn.Tanh(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(64, 5),
        )
    return model.eval()
