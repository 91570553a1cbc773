"""Classifiers whose nearest adversarial images are known in closed form, and runs in memory, made of distances."""

from __future__ import annotations

import importlib.util
import math
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

# Whoever starts the tests in the background of a shell, or under nohup, has them ignore these; they are what is tested.
for _signum, _default in (("SIGINT", signal.default_int_handler), ("SIGTERM", signal.SIG_DFL), ("SIGHUP", signal.SIG_DFL)):
    if hasattr(signal, _signum) and signal.getsignal(getattr(signal, _signum)) is signal.SIG_IGN:
        signal.signal(getattr(signal, _signum), _default)

# Tests share the cores among processes, and most tensors are tiny; torch reads this once, when it is first imported.
# Tests of threads ask for them.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from made_rows import build_row, to_frame
from PIL import Image
from torch import nn

from lrrobust import cli
from lrrobust.results import SCHEMA_VERSION, Run
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

    def __iter__(self) -> Iterator[nn.Module | torch.Tensor]:
        """What attacks take."""
        return iter((self.model, self.images, self.labels))

    def nearest(self, norm: Norm) -> torch.Tensor:
        """Distance from each image to the nearest other class: margin / dual norm of the weights' difference."""
        with torch.no_grad():
            logits = self.model(self.images).double()
        own = logits.gather(1, self.labels[:, None])
        difference = self.weight.double()[self.labels][:, None] - self.weight.double()[None]
        dual = difference.norm(p={"linf": 1, "l2": 2, "l1": float("inf")}[norm], dim=2)
        return ((own - logits) / dual).scatter(1, self.labels[:, None], float("inf")).amin(1)


@pytest.fixture
def run(monkeypatch, capfd):
    """Runs a command line in this process: (exit code, standard output, standard error)."""
    monkeypatch.setenv("COLUMNS", "160")
    for name in ("GITHUB_ACTIONS", "GITHUB_STEP_SUMMARY"):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments, cwd="."):
        monkeypatch.chdir(cwd)
        arguments = [str(argument) for argument in arguments]
        monkeypatch.setattr(sys, "argv", ["lrrobust", *arguments])
        return cli.run(arguments), *capfd.readouterr()

    return run


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


_LADDER = (1 / 255, 2 / 255)
_INF = math.inf

# Image 0 is wrong without attack; images 1 to 4 are correct.
_DISTANCES = {
    "fgsm": ("linf", _LADDER, [None, 0.9 / 255, 1.9 / 255, _INF, _INF]),
    "pgd": ("linf", _LADDER, [None, 0.8 / 255, _INF, 0.7 / 255, _INF]),
    "cw": ("l2", (_INF,), [None, 0.2, 0.4, 0.3, _INF]),
}


def _build_run(name="run", distances=None, *, sha256="cd" * 32, model="tiny", planned=1, metadata=({"device": "cpu"},)):
    """A run from attack -> (norm, ladder, distance of image 0, 1, ...)."""
    rows = [
        build_row(index, attack, norm, eps, distance)
        for attack, (norm, ladder, of_images) in (distances or _DISTANCES).items()
        for index, distance in enumerate(of_images)
        for eps in ladder
    ]
    return Run(
        folder=Path("/results") / name,
        manifest={
            "schema_version": SCHEMA_VERSION,
            "fingerprint": "ab" * 32,
            "model": {"name": model, "weights": "V1"},
            "dataset": {"name": "sample", "sha256": sha256, "n": 5},
            "attacks": [
                {"name": attack, "norm": norm, "kind": attack} for attack, (norm, *_) in (distances or _DISTANCES).items()
            ],
            "plan": {"chunk_size": 5, "parts": [["x", 0, 5]] * planned},
            "provenance": {"versions": {"lrrobust": "0.1.0", "torch": "2.13.0"}, "commit": "1234abc"},
        },
        rows=to_frame(rows),
        is_complete=planned == len(metadata),
        part_metadata={f"part-{place}": part for place, part in enumerate(metadata)},
    )


@pytest.fixture
def make_run():
    return _build_run


@pytest.fixture
def suite_distances():
    return _DISTANCES


_MODEL = """
import torch
from PIL import Image
from torch import nn
from lrrobust.models import Classifier

def make(classes, scale=1.0):
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, len(classes)))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(scale * torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
    return Classifier(network, classes, input_size=8)

def build(): return make(("ant", "bee", "cat"))
def build_scaled(): return make(("ant", "bee", "cat"), 2.0)
def build_reordered(): return make(("cat", "bee", "ant"))
def build_other_classes(): return make(("bee", "cat", "dog"))
def build_stranger(): return make(("emu", "fox"))
def build_accents(): return make(("ant", "b\\u00e9e", "cat"))
def build_two_characters(): return make(("be\\u0301e", "ant", "cat"))
"""


@pytest.fixture(scope="session")
def draw_classes():
    """Writes a folder of three classes with so many images of noise each."""

    def draw(folder, each, side=8):
        generator = np.random.default_rng(0)
        for name in ("ant", "bee", "cat"):
            (folder / name).mkdir(parents=True)
            for i in range(each):
                Image.fromarray(generator.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(folder / name / f"{i}.png")

    return draw


@pytest.fixture
def request_for(tmp_path, draw_classes):
    """Requests for evaluations of tiny models, by the names of their factories, on twelve images."""
    from lrrobust.run import EvaluationRequest

    (tmp_path / "model.py").write_text(_MODEL)
    draw_classes(tmp_path / "images", 4)

    def make(*factories, **options):
        models = tuple(f"{tmp_path}/model.py:{factory}" for factory in factories)
        settings = {"attacks": ("pgd",), "dataset": str(tmp_path / "images"), "out": tmp_path / "runs", **options}
        return EvaluationRequest(models=models, **settings)

    return make
