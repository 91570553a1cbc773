"""What the harness costs beside the model: an evaluation, and the bare loop that makes the same passes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from lrrobust.attacks.specs import PgdSpec
from lrrobust.bench.interleaved import OnTurn, say_nothing, time_interleaved, wait_for
from lrrobust.data.tensor_images import TensorImages
from lrrobust.errors import ConfigError
from lrrobust.evaluation.chunks import DEFAULT_BATCH_SIZE, DEFAULT_CHUNK_SIZE
from lrrobust.evaluation.engine import evaluate
from lrrobust.evaluation.tasks import plan_tasks
from lrrobust.results import SCHEMA_VERSION, RunStore

HARNESS, BARE = "lrrobust", "bare loop"
#: All images withstand every budget: each takes all steps at each. Or they break as they do, and leave.
STAND, BREAK = "all images stand", "images break"

#: Budgets so small that nothing breaks, as shares of the attack's own.
_HARMLESS = 1e-4


def compare_with_bare_loop(
    model: nn.Module,
    num_classes: int,
    images: torch.Tensor,
    labels: torch.Tensor,
    spec: PgdSpec,
    *,
    repeats: int = 5,
    budget_s: float = math.inf,
    batch_size: int = DEFAULT_BATCH_SIZE,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
    seed: int = 0,
    case: str = "",
    on_turn: OnTurn = say_nothing,
) -> Iterator[dict[str, object]]:
    """Time an evaluation beside the shortest loop that does the same work, in turns.

    Both begin with images in memory. The evaluation checks the model, predicts the clean images, attacks those that are
    right, judges every claim, finds out whether the model has changed, and writes rows and examples to disk. The bare loop
    does what nobody can leave out: clean predictions, for each image and budget a random start and its steps (loss,
    gradient, step, back into ball and box), and one prediction of the outcome. Nothing is kept.

    Where images break, ours attacks fewer, and only knows on the way which; there the bare loop repeats the passes that
    ours made, in the same batches. Where all stand, they are attacked at the smallest and the largest budget only, which
    takes long enough: what is done once for all budgets, such as checking the model, weighs more here than in a whole ladder.

    A ratio of two times holds the noise of both. How much of a time is spent outside the model's passes does not: whatever
    slows the machine slows both parts of it.

    Args:
        model, num_classes, images, labels, spec, batch_size, chunk_size, seed: see `compare_attack_loops`; the norm is linf.
        repeats, budget_s, case, on_turn: see `time_interleaved`; both cases have equal shares of the budget.

    Yields:
        One row for each case and time taken: `case`, those of `time_interleaved`, and `outside`, the share of `wall_s` spent
        outside the model's forward and backward passes.

    Raises:
        ConfigError: the bare loop does not know this attack.
    """
    if spec.norm != "linf" or spec.restarts != 1 or spec.eps[0] == 0:
        raise ConfigError(
            f"{spec.name}: expected linf, one restart and budgets above 0, which is what the bare loop does, got {spec.norm=}, "
            f"{spec.restarts=}, {spec.eps=}"
        )
    model = _Clocked(model)
    with torch.no_grad():
        # What the model says is right: every image is attacked.
        predicted = torch.cat([model(part).argmax(1) for part in images.split(batch_size)])
    ends = dict.fromkeys((spec.eps[0], spec.eps[-1]))
    harmless = spec.model_copy(update={"eps": tuple(_HARMLESS * eps for eps in ends)})
    brief = harmless.model_copy(update={"eps": harmless.eps[:1], "steps": 1})
    passes: list[tuple[int, bool]] = []
    on_turn(f"{case + ': ' if case else ''}counting passes")
    build_evaluation(_Recording(model, passes), num_classes, images, labels, spec, batch_size, chunk_size, seed)()
    warm_ups = {
        HARNESS: build_evaluation(model, num_classes, images, predicted, brief, batch_size, chunk_size, seed),
        BARE: _bare_loop(model, images, predicted, brief, batch_size, seed),
    }
    cases = {
        STAND: (harmless, predicted, _bare_loop(model, images, predicted, harmless, batch_size, seed)),
        BREAK: (spec, labels, _bare_passes(model, images, labels, spec, passes)),
    }
    for name, (attack, classes, bare) in cases.items():
        ours = build_evaluation(model, num_classes, images, classes, attack, batch_size, chunk_size, seed)
        rows = time_interleaved(
            {HARNESS: model.clocked(ours), BARE: model.clocked(bare)},
            read=lambda done: {"inside_s": done.inside_s},
            warm_ups=warm_ups,
            repeats=repeats,
            budget_s=budget_s / len(cases),
            baseline=BARE,
            device=images.device,
            case=f"{case}, {name}" if case else name,
            on_turn=on_turn,
        )
        for row in rows:
            inside_s = row.pop("inside_s")
            yield {"case": name, **row, "outside": 1 - inside_s / row["wall_s"]}


def build_evaluation(
    model: nn.Module,
    num_classes: int,
    images: torch.Tensor,
    labels: torch.Tensor,
    spec: PgdSpec,
    batch_size: int,
    chunk_size: int,
    seed: int,
) -> Callable[[], list[float]]:
    """An evaluation of one attack as `lrrobust eval` makes it, into a folder that is deleted; robust accuracy at each eps."""
    at_hand = TensorImages("at hand", images, labels, [str(label) for label in range(num_classes)])
    tasks = plan_tasks([spec], len(images), chunk_size)
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "fingerprint": f"{seed:08x}",
        "attacks": [spec.model_dump(mode="json")],
        "plan": {"chunk_size": chunk_size, "parts": [list(task.part) for task in tasks]},
        "provenance": {},
    }

    def run() -> list[float]:
        with (
            TemporaryDirectory(prefix="lrrobust-bench-") as folder,
            RunStore.create_or_resume(Path(folder) / "run", manifest) as store,
        ):
            evaluate(
                model,
                num_classes,
                at_hand,
                tasks,
                store,
                fingerprint=manifest["fingerprint"],
                device=images.device,
                part_metadata={},
                batch_size=batch_size,
            )
            rows = store.read_rows()
        return [1 - float(rows[rows["eps"] == eps]["is_broken"].mean()) for eps in spec.eps]

    return run


class Done(NamedTuple):
    """What a way returned, and the seconds that the model's passes took of it."""

    result: Any
    inside_s: float


class _Clocked(nn.Module):
    """Adds up what the forward and backward passes of a model take."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.inside_s = self._begun = 0.0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self._begin(images.device)
        # Backward goes from the logits to the images.
        logits = self.model(_Signal.apply(images, self._end) if images.requires_grad else images)
        self._end(images.device)
        return _Signal.apply(logits, self._begin) if logits.requires_grad else logits

    def clocked(self, way: Callable[[], Any]) -> Callable[[], Done]:
        def run() -> Done:
            self.inside_s = 0.0
            return Done(way(), self.inside_s)

        return run

    def _begin(self, device: torch.device) -> None:
        wait_for(device)
        self._begun = time.perf_counter()

    def _end(self, device: torch.device) -> None:
        wait_for(device)
        self.inside_s += time.perf_counter() - self._begun


class _Signal(torch.autograd.Function):
    """Leaves a tensor as it is, and says when its gradient is there."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, say: Callable[[torch.device], None]) -> torch.Tensor:
        ctx.say = say
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.say(gradient.device)
        return gradient, None


class _Recording(nn.Module):
    """Notes of every forward how many images it took, and whether a backward follows."""

    def __init__(self, model: nn.Module, passes: list[tuple[int, bool]]) -> None:
        super().__init__()
        self.model = model
        self.passes = passes

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.passes.append((len(images), images.requires_grad))
        return self.model(images)


def _bare_loop(
    model: nn.Module, images: torch.Tensor, labels: torch.Tensor, spec: PgdSpec, batch_size: int, seed: int
) -> Callable[[], int]:
    """PGD as one writes it down; returns how many (image, budget) are left standing."""

    def run() -> int:
        generator = torch.Generator(images.device).manual_seed(seed)
        standing = 0
        for clean, classes in zip(images.split(batch_size), labels.split(batch_size), strict=True):
            with torch.no_grad():
                is_right = model(clean).argmax(1) == classes
            clean, classes = clean[is_right], classes[is_right]
            for eps in spec.eps:
                noise = torch.rand(clean.shape, generator=generator, device=clean.device)
                iterates = (clean + eps * (2 * noise - 1)).clamp(0, 1) if spec.random_start else clean
                for _ in range(spec.steps):
                    iterates = _step(model, clean, iterates, classes, eps, spec)
                with torch.no_grad():
                    standing += int((model(iterates).argmax(1) == classes).sum())
        return standing

    return run


def _bare_passes(
    model: nn.Module, images: torch.Tensor, labels: torch.Tensor, spec: PgdSpec, passes: Sequence[tuple[int, bool]]
) -> Callable[[], None]:
    """These passes and nothing else but the steps between them."""

    def run() -> None:
        for count, has_gradient in passes:
            clean = images[:count]
            if has_gradient:
                _step(model, clean, clean, labels[:count], spec.eps[-1], spec)
            else:
                with torch.no_grad():
                    model(clean)

    return run


def _step(
    model: nn.Module, clean: torch.Tensor, iterates: torch.Tensor, labels: torch.Tensor, eps: float, spec: PgdSpec
) -> torch.Tensor:
    iterates = iterates.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(iterates), labels), iterates)
    moved = iterates.detach() + spec.step_size_ratio * eps / spec.steps * gradient.sign()
    return (clean + (moved - clean).clamp(-eps, eps)).clamp(0, 1)
