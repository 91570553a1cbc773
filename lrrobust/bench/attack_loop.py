"""Images per second of PGD over a ladder of budgets: ours beside its peers."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence

import pandas as pd
import torch
from torch import nn

from lrrobust.attacks.specs import PgdSpec
from lrrobust.bench.harness import build_evaluation
from lrrobust.bench.interleaved import OnTurn, say_nothing, summarise_times, time_interleaved
from lrrobust.determinism import seeded
from lrrobust.errors import ConfigError
from lrrobust.evaluation.chunks import DEFAULT_BATCH_SIZE, DEFAULT_CHUNK_SIZE

#: What is compared. The usual way attacks all images, at each eps anew.
OURS = "lrrobust"
USUAL = "torchattacks"
CORRECT_ONLY = "torchattacks, images correct when clean"
FOOLBOX = "foolbox"

#: A way to attack: robust accuracy at each eps.
_Way = Callable[[], "list[float]"]


def compare_attack_loops(
    model: nn.Module,
    num_classes: int,
    images: torch.Tensor,
    labels: torch.Tensor,
    spec: PgdSpec,
    *,
    repeats: int = 3,
    budget_s: float = math.inf,
    batch_size: int = DEFAULT_BATCH_SIZE,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
    seed: int = 0,
    case: str = "",
    on_turn: OnTurn = say_nothing,
) -> Iterator[dict[str, object]]:
    """Time PGD with the same budget in every implementation at hand, in turns.

    Ours is the whole harness, from the clean predictions to the stored rows. Each is warmed up first
    with a step on one batch. Foolbox takes part when it is installed.

    Args:
        model: images (N, 3, H, W) in [0, 1] to logits, in evaluation mode, on the device of `images`.
        num_classes: width of the logits.
        images: (N, 3, H, W).
        labels: (N,) int64.
        spec: the attack; one restart, budgets above 0.
        repeats, budget_s, case, on_turn: see `time_interleaved`.
        batch_size: images passed through the model at once, by all.
        chunk_size: images of one part of our results.
        seed: of all random starts.

    Yields:
        One row for each time taken: those of `time_interleaved`; `images_per_s`, of all N images over the whole ladder;
        `gradients`, how many gradients of one image it took; `robust_accuracy`, the mean over the ladder, and
        `robust_accuracy_<eps>` at each budget.

    Raises:
        ConfigError: peers cannot attack with this spec.
    """
    if spec.restarts != 1 or spec.eps[0] == 0:
        raise ConfigError(
            f"{spec.name}: expected one restart and budgets above 0, which all peers have, got {spec.restarts=}, {spec.eps=}"
        )
    batches = list(zip(images.split(batch_size), labels.split(batch_size), strict=True))
    counting = _Counting(model)

    def build_ways(model: nn.Module, batches: Sequence[tuple[torch.Tensor, torch.Tensor]], spec: PgdSpec) -> dict[str, _Way]:
        pixels, classes = (torch.cat(parts) for parts in zip(*batches, strict=True))
        ways = {
            OURS: build_evaluation(model, num_classes, pixels, classes, spec, batch_size, chunk_size, seed),
            USUAL: _torchattacks(model, batches, spec, seed, is_correct_only=False),
            CORRECT_ONLY: _torchattacks(model, batches, spec, seed, is_correct_only=True),
        }
        if importlib.util.find_spec("foolbox") is not None:
            ways[FOOLBOX] = _foolbox(model, batches, spec, seed)
        return {name: counted(way) for name, way in ways.items()}

    def counted(way: _Way) -> _Way:
        # From zero for each: one that ended in an error leaves what it counted.
        def run() -> list[float]:
            counting.gradients = 0
            return way()

        return run

    def read(accuracies: Sequence[float]) -> dict[str, float]:
        at_each = {f"robust_accuracy_{eps:.6g}": a for eps, a in zip(spec.eps, accuracies, strict=True)}
        return {"gradients": counting.gradients, "robust_accuracy": sum(accuracies) / len(accuracies), **at_each}

    brief = spec.model_copy(update={"eps": spec.eps[:1], "steps": 1})
    rows = time_interleaved(
        build_ways(counting, batches, spec),
        warm_ups=build_ways(model, batches[:1], brief),
        read=read,
        repeats=repeats,
        budget_s=budget_s,
        baseline=OURS,
        device=images.device,
        case=case,
        on_turn=on_turn,
    )
    for row in rows:
        yield {**row, "images_per_s": len(images) / row["wall_s"]}


def summarise_attack_loops(frame: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """Times as `summarise_times` gives them, beside the medians of all else that `compare_attack_loops` yields."""
    also = frame.drop(columns=[*by, "name", "repeat", "wall_s", "cpu_s"]).columns
    return summarise_times(frame, by, OURS, also)


class _Counting(nn.Module):
    """Counts the images whose gradient is taken."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.gradients = 0
        # torchattacks gives back the mode that it found, to this and all in it: batch normalisation would learn of
        # the attacked.
        self.eval()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.gradients += len(images) * images.requires_grad
        return self.model(images)


def _torchattacks(
    model: nn.Module,
    batches: Sequence[tuple[torch.Tensor, torch.Tensor]],
    spec: PgdSpec,
    seed: int,
    is_correct_only: bool = False,
) -> _Way:
    from lrrobust.crosscheck.with_torchattacks import build_pgd

    def run() -> list[float]:
        chosen, count = list(batches), sum(len(labels) for _, labels in batches)
        if is_correct_only:
            pixels, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
            is_correct = torch.cat([_is_correct(model, *batch) for batch in batches])
            size = len(batches[0][1])
            chosen = list(zip(pixels[is_correct].split(size), labels[is_correct].split(size), strict=True))
        accuracies = []
        for eps in spec.eps:
            attack = build_pgd(model, spec, eps)
            robust = sum(int(_is_correct(model, attack(x, y), y).sum()) for x, y in chosen if len(y))
            accuracies.append(robust / count)
        return accuracies

    return _seeded(run, batches[0][0].device, seed)


def _foolbox(model: nn.Module, batches: Sequence[tuple[torch.Tensor, torch.Tensor]], spec: PgdSpec, seed: int) -> _Way:
    from lrrobust.crosscheck.with_foolbox import build_pgd, build_victim

    attack = build_pgd(spec)

    def run() -> list[float]:
        victim = build_victim(model, batches[0][0].device)
        broken = torch.cat([attack(victim, x, y, epsilons=list(spec.eps))[2] for x, y in batches], dim=1)
        return (1 - broken.double().mean(1)).tolist()

    return _seeded(run, batches[0][0].device, seed)


def _seeded(run: Callable[[], list[float]], device: torch.device, seed: int) -> _Way:
    """Peers draw from the global generator."""

    def run_seeded() -> list[float]:
        with seeded(device, seed):
            return run()

    return run_seeded


@torch.no_grad()
def _is_correct(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return model(images).argmax(1) == labels
