"""What an attack is made of: the gradient of the loss with respect to the images, on whole networks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from lrrobust.bench.interleaved import OnTurn, say_nothing, time_interleaved
from lrrobust.bench.peak_memory import measure_peak_bytes
from lrrobust.models import build_network
from lrrobust.models.folding import fold_constants
from lrrobust.models.lrnet import LocalRelationLayer
from lrrobust.models.replay import replayed

NETWORK, CONTROL = "lr_resnet50", "resnet50"
#: How the LR-Net's operation is computed, and on a GPU how passes of both networks are launched: recorded, as the harness
#: does, or kernel by kernel.
FUSED, EAGER, REFERENCE = "fused", "fused, kernel by kernel", "reference"
NUM_CLASSES = 200
#: Sides of the images.
SIZES = (64, 224)
#: A step takes as many images as have the pixels of four of 224 x 224, and no more than an attack's batch.
_PIXELS, _MOST_IMAGES = 4 * 224**2, 32


def compare_gradient_steps(
    sizes: Sequence[int] = SIZES,
    *,
    batch_size: int | None = None,
    repeats: int = 5,
    budget_s: float = math.inf,
    device: torch.device = torch.device("cpu"),  # noqa: B008 - immutable
    with_memory: bool = True,
    on_turn: OnTurn = say_nothing,
) -> Iterator[dict[str, object]]:
    """An LR-Net, and the same with the reference operation, each beside the convolutional control; random weights.

    In turns of their own: what the reference leaves of the heap would slow the other down.

    Args:
        batch_size: images of a step; by default 32 of 64 x 64 and 4 of 224 x 224.
        repeats, budget_s, on_turn: see `time_interleaved`; the sizes have equal shares of the budget.

    Yields:
        One row for each size, case, round and network: `size`, `batch_size`, `case`, those of `time_interleaved`, and where it
        was measured `peak_bytes`, the most that the step held beside weights and images.
    """
    names = (CONTROL, NETWORK, f"{NETWORK}, reference")
    for size in sizes:
        count = batch_size or min(_MOST_IMAGES, max(1, _PIXELS // size**2))
        peaks = {}
        if with_memory and device.type == "cpu":
            for name in names:
                on_turn(f"{size} pixels: {name}, memory")
                peaks[name] = {"peak_bytes": measure_peak_bytes(prepare_step, name, size, count)}
        cases = {FUSED: names[1], **({EAGER: names[1]} if device.type == "cuda" else {}), REFERENCE: names[2]}
        for case, network in cases.items():
            ways = {name: build_step(name, size, count, device, is_recorded=case != EAGER) for name in (CONTROL, network)}
            rows = time_interleaved(
                ways,
                repeats=repeats,
                device=device,
                baseline=CONTROL,
                budget_s=budget_s / len(sizes) / len(cases),
                case=f"{size} pixels, {case}",
                on_turn=on_turn,
            )
            for row in rows:
                yield {"size": size, "batch_size": count, "case": case, **row, **peaks.get(row["name"], {})}


def build_step(
    name: str, size: int, batch_size: int, device: torch.device, is_recorded: bool = True
) -> Callable[[], torch.Tensor]:
    """One step of the network called `name`, as the harness evaluates it; "NAME, BACKEND" fixes the backend."""
    name, _, backend = name.partition(", ")
    network = fold_constants(build_network(name, NUM_CLASSES).eval()).to(device)
    for module in network.modules():
        if backend and isinstance(module, LocalRelationLayer):
            module.backend = backend
    return _step_of(replayed(network) if is_recorded else network, torch.rand(batch_size, 3, size, size, device=device))


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
