"""Images per second of PGD over a ladder of budgets: ours beside its peers, and what the harness adds."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
import torch
from torch import nn

from lrrobust.attacks.specs import PgdSpec
from lrrobust.bench.interleaved import wait_for
from lrrobust.evaluation.chunks import DEFAULT_BATCH_SIZE, DEFAULT_CHUNK_SIZE
from lrrobust.evaluation.engine import evaluate, plan_tasks
from lrrobust.results import SCHEMA_VERSION, RunStore

#: What is compared. The usual way attacks all images, at each eps anew; the bare loops make the very
#: passes that ours made, all of them or the gradient steps alone, and nothing else.
OURS = "lrrobust"
USUAL = "torchattacks"
CORRECT_ONLY = "torchattacks, images correct when clean"
FOOLBOX = "foolbox"
BARE = "bare loop, same passes"
BARE_STEPS = "bare loop, gradient steps alone"

#: A way to attack: robust accuracy at each eps, None where nothing is judged.
_Way = Callable[[], "list[float] | None"]


def compare_attack_loops(
    model: nn.Module,
    num_classes: int,
    images: torch.Tensor,
    labels: torch.Tensor,
    spec: PgdSpec,
    *,
    repeats: int = 3,
    batch_size: int = DEFAULT_BATCH_SIZE,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
    seed: int = 0,
) -> pd.DataFrame:
    """Time PGD with the same budget in every implementation at hand, all of them once in each repeat.

    Ours is the whole harness, from the clean predictions to the stored rows. Each is warmed up first
    with a step on one batch. Foolbox takes part when it is installed.

    Args:
        model: images (N, 3, H, W) in [0, 1] to logits, in evaluation mode, on the device of `images`.
        num_classes: width of the logits.
        images: (N, 3, H, W).
        labels: (N,) int64.
        spec: the attack; one restart, budgets above 0.
        repeats: how often everything is timed.
        batch_size: images passed through the model at once, by all.
        chunk_size: images of one part of our results.
        seed: of all random starts.

    Returns:
        One row for each repeat and name: `wall_s`; `images_per_s`, of all N images over the whole ladder;
        `robust_accuracy`, the mean over the ladder, and `robust_accuracy_<eps>` at each budget (NaN for
        the bare loops); `ratio`, its time by that of ours in the same repeat; `spread`, the range of its
        times by their median.

    Raises:
        ValueError: peers cannot attack with this spec.
    """
    if spec.restarts != 1 or spec.eps[0] == 0:
        raise ValueError(f"expected one restart and budgets above 0, which all peers have, got {spec}")
    calls: list[tuple[int, bool]] = []
    ours = _ours(_Recording(model, calls), num_classes, images, labels, spec, batch_size, chunk_size, seed)
    ours()  # warms up, and tells the passes of the bare loops
    batches = list(zip(images.split(batch_size), labels.split(batch_size), strict=True))
    ways: dict[str, _Way] = {
        OURS: _ours(model, num_classes, images, labels, spec, batch_size, chunk_size, seed),
        USUAL: _torchattacks(model, batches, spec, seed, is_correct_only=False),
        CORRECT_ONLY: _torchattacks(model, batches, spec, seed, is_correct_only=True),
        BARE: _bare(model, images, labels, spec, list(calls)),
        BARE_STEPS: _bare(model, images, labels, spec, [call for call in calls if call[1]]),
    }
    peers = [_torchattacks]
    if importlib.util.find_spec("foolbox") is not None:
        ways[FOOLBOX] = _foolbox(model, batches, spec, seed)
        peers.append(_foolbox)
    brief = spec.model_copy(update={"eps": spec.eps[:1], "steps": 1})
    for peer in peers:
        peer(model, batches[:1], brief, seed)()
    rows = []
    for repeat in range(repeats):
        for name, way in ways.items():
            wait_for(images.device)
            started = time.perf_counter()
            accuracies = way()
            wait_for(images.device)
            wall_s = time.perf_counter() - started
            rows.append({"name": name, "repeat": repeat, "wall_s": wall_s, "images_per_s": len(images) / wall_s})
            if accuracies is not None:
                rows[-1]["robust_accuracy"] = sum(accuracies) / len(accuracies)
                rows[-1] |= {f"robust_accuracy_{eps:.6g}": a for eps, a in zip(spec.eps, accuracies, strict=True)}
    frame = pd.DataFrame(rows)
    frame["ratio"] = frame["wall_s"] / frame["repeat"].map(frame[frame["name"] == OURS].set_index("repeat")["wall_s"])
    frame["spread"] = frame["name"].map(frame.groupby("name")["wall_s"].agg(lambda s: (s.max() - s.min()) / s.median()))
    return frame


def summarise_attack_loops(frame: pd.DataFrame) -> pd.DataFrame:
    """One row a name: medians over the repeats of `compare_attack_loops`, and the spread of its times.

    `overhead` of a bare loop is what ours costs above it, as a share of it.
    """
    summary = frame.drop(columns="repeat").groupby("name", sort=False).median()
    summary["overhead"] = (1 / summary["ratio"] - 1).where(summary.index.isin([BARE, BARE_STEPS]))
    return summary.reset_index()


class _Recording(nn.Module):
    """Notes of every forward how many images it took, and whether a backward follows."""

    def __init__(self, model: nn.Module, calls: list[tuple[int, bool]]) -> None:
        super().__init__()
        self.model = model
        self.calls = calls

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.calls.append((len(images), images.requires_grad))
        return self.model(images)


class _ImagesAtHand:
    """Images in memory, as the engine takes them."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        self.images, self.label_tensor = images, labels
        self.labels = labels.tolist()
        self.indices = list(range(len(images)))
        self.keys = self.wnids = [str(index) for index in self.indices]

    def __len__(self) -> int:
        return len(self.images)

    def load(self, positions: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        return self.images[positions[0] : positions[-1] + 1], self.label_tensor[positions[0] : positions[-1] + 1]


def _ours(
    model: nn.Module,
    num_classes: int,
    images: torch.Tensor,
    labels: torch.Tensor,
    spec: PgdSpec,
    batch_size: int,
    chunk_size: int,
    seed: int,
) -> _Way:
    tasks = plan_tasks([spec], len(images), chunk_size)
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "fingerprint": f"{seed:08x}",
        "attacks": [spec.model_dump(mode="json")],
        "plan": {"chunk_size": chunk_size, "parts": [list(task.part) for task in tasks]},
        "provenance": {},
    }

    def run() -> list[float]:
        with TemporaryDirectory() as folder, RunStore.create_or_resume(Path(folder) / "run", manifest) as store:
            evaluate(
                model, num_classes, _ImagesAtHand(images, labels), tasks, store,
                fingerprint=manifest["fingerprint"], device=images.device, part_metadata={}, batch_size=batch_size,
            )
            rows = store.read_rows()
        return [1 - float(rows[rows["eps"] == eps]["is_broken"].mean()) for eps in spec.eps]

    return run


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


def _foolbox(
    model: nn.Module, batches: Sequence[tuple[torch.Tensor, torch.Tensor]], spec: PgdSpec, seed: int
) -> _Way:
    from lrrobust.crosscheck.with_foolbox import build_pgd, build_victim

    attack = build_pgd(spec)

    def run() -> list[float]:
        victim = build_victim(model, batches[0][0].device)
        broken = torch.cat([attack(victim, x, y, epsilons=list(spec.eps))[2] for x, y in batches], dim=1)
        return (1 - broken.double().mean(1)).tolist()

    return _seeded(run, batches[0][0].device, seed)


def _bare(
    model: nn.Module, images: torch.Tensor, labels: torch.Tensor, spec: PgdSpec, calls: Sequence[tuple[int, bool]]
) -> _Way:
    """The shortest loop that makes these passes: loss, gradient, step along its sign, back into ball and box."""
    eps = spec.eps[-1]

    def run() -> None:
        for count, has_gradient in calls:
            iterates, chosen = images[:count].clone(), labels[:count]
            if not has_gradient:
                with torch.no_grad():
                    model(iterates)
                continue
            iterates.requires_grad_()
            loss = nn.functional.cross_entropy(model(iterates), chosen)
            (gradient,) = torch.autograd.grad(loss, iterates)
            moved = iterates.detach() + spec.step_size_ratio * eps / spec.steps * gradient.sign()
            (images[:count] + (moved - images[:count]).clamp(-eps, eps)).clamp(0, 1)

    return run


def _seeded(run: Callable[[], list[float]], device: torch.device, seed: int) -> _Way:
    """Peers draw from the global generator."""

    def seeded() -> list[float]:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            return run()

    return seeded


@torch.no_grad()
def _is_correct(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return model(images).argmax(1) == labels
