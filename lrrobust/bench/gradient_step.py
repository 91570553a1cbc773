"""What an attack is made of: the gradient of the loss with respect to the images, on whole networks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn

from lrrobust.bench.interleaved import time_interleaved
from lrrobust.bench.peak_memory import measure_peak_bytes
from lrrobust.models import build_network
from lrrobust.models.folding import fold_constants
from lrrobust.models.lrnet import LocalRelationLayer

NETWORK, CONTROL = "lr_resnet50", "resnet50"
NUM_CLASSES = 200
#: Sides of the images and how many of them a step takes.
SIZES = ((64, 32), (224, 4))


def compare_gradient_steps(
    sizes: Sequence[tuple[int, int]] = SIZES,
    *,
    repeats: int = 5,
    device: torch.device = torch.device("cpu"),  # noqa: B008 - immutable
    with_memory: bool = True,
) -> pd.DataFrame:
    """An LR-Net beside its control and beside itself with the reference operation, random weights.

    Returns:
        One row for each size, round and network: `size`, `batch_size`, `name`, `repeat`, `wall_s`, and where it
        was measured `peak_bytes`, the most that the step held beside weights and images.
    """
    frames = []
    names = (CONTROL, NETWORK, f"{NETWORK}, reference")
    for size, batch_size in sizes:
        ways = {name: build_step(name, size, batch_size, device) for name in names}
        frame = time_interleaved(ways, repeats=repeats, device=device)
        frame.insert(0, "size", size)
        frame.insert(1, "batch_size", batch_size)
        if with_memory and device.type == "cpu":
            peaks = {name: measure_peak_bytes(prepare_step, name, size, batch_size) for name in names}
            frame["peak_bytes"] = frame["name"].map(peaks)
        frames.append(frame)
    return pd.concat(frames, ignore_index=True)


def build_step(name: str, size: int, batch_size: int, device: torch.device) -> Callable[[], torch.Tensor]:
    """One step of the network called `name`, as the harness evaluates it; "NAME, BACKEND" fixes the backend."""
    name, _, backend = name.partition(", ")
    network = fold_constants(build_network(name, NUM_CLASSES).eval()).to(device)
    for module in network.modules():
        if backend and isinstance(module, LocalRelationLayer):
            module.backend = backend
    return _step_of(network, torch.rand(batch_size, 3, size, size, device=device))


def prepare_step(name: str, size: int, batch_size: int) -> tuple[Callable[[], object], Callable[[], object]]:
    """For `measure_peak_bytes`: a step on one small image, and the step itself."""
    cpu = torch.device("cpu")
    return build_step(name, 32, 1, cpu), build_step(name, size, batch_size, cpu)


def _step_of(network: nn.Module, images: torch.Tensor) -> Callable[[], torch.Tensor]:
    labels = torch.arange(len(images), device=images.device) % NUM_CLASSES

    def step() -> torch.Tensor:
        attacked = images.clone().requires_grad_()
        return torch.autograd.grad(F.cross_entropy(network(attacked), labels), attacked)[0]

    return step
