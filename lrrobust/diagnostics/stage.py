"""The second stage of an evaluation: every check, on a small sample of a finished run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

from lrrobust.attacks.specs import AttackSpec
from lrrobust.determinism import deterministic_float32, seeded
from lrrobust.diagnostics.finite_differences import check_finite_differences
from lrrobust.diagnostics.jumps import check_jumps
from lrrobust.diagnostics.late_breaks import check_late_breaks
from lrrobust.diagnostics.loss_rises import check_loss_rises
from lrrobust.diagnostics.numerics import check_determinism, check_float64
from lrrobust.diagnostics.outcomes import predicted_classes, read_outcomes
from lrrobust.diagnostics.records import Diagnostic, Diagnostics
from lrrobust.diagnostics.stronger_attacks import check_convergence, check_large_eps
from lrrobust.diagnostics.subject import Subject
from lrrobust.diagnostics.weaker_attacks import check_black_box, check_random_noise, check_single_step
from lrrobust.diagnostics.zero_gradient import check_zero_gradient
from lrrobust.evaluation.chunk_images import Images
from lrrobust.evaluation.chunks import DEFAULT_BATCH_SIZE, chunk_seed
from lrrobust.evaluation.judge import Judge
from lrrobust.evaluation.memory import FittingBatch
from lrrobust.frozen import frozen
from lrrobust.results import Run

#: In the order of reading.
CHECKS: tuple[Callable[[Subject], Iterator[Diagnostic]], ...] = (
    check_zero_gradient,
    check_finite_differences,
    check_jumps,
    check_loss_rises,
    check_single_step,
    check_random_noise,
    check_black_box,
    check_late_breaks,
    check_convergence,
    check_large_eps,
    check_determinism,
    check_float64,
)

#: Images of the sample: a fifth of those attacked, which keeps the cost near a fifth of the run's, but as many as
#: it takes to tell a failure from chance, and no more than it takes to see one.
SAMPLE_SHARE, FEWEST, MOST = 0.2, 24, 64

#: Told which check comes next, how many are done, and of how many.
OnCheck = Callable[[str, int, int], None]


def diagnose(
    model: nn.Module,
    num_classes: int,
    images: Images,
    specs: Sequence[AttackSpec],
    run: Run,
    device: torch.device,
    *,
    batch_size: int = DEFAULT_BATCH_SIZE,
    on_check: OnCheck | None = None,
) -> Diagnostics:
    """Looks into whether the attacks of a complete run worked. The same run gives the same results.

    Args:
        model: the run's, images (N, 3, H, W) in [0, 1] -> logits (N, num_classes), on `device`.
        num_classes: width of the logits.
        images: the run's, in its order.
        specs: the run's attacks.
        run: its rows; all planned parts must be there.
        device: where to compute.
        batch_size: images passed through the model at once; fewer where they do not fit into memory.
        on_check: called before every check, and once after the last.

    Raises:
        ModelError: the model does not behave like a classifier, or there is no room for a single image.
        DataError: an image can no longer be read.
        ValueError: the run is not complete.
    """
    if not run.is_complete:
        raise ValueError(f"expected a complete run, got {run.folder} with parts missing")
    started = time.perf_counter()
    fingerprint = run.manifest["fingerprint"]
    correct, outcomes = read_outcomes(run.rows, specs)
    places = correct[: min(max(round(SAMPLE_SHARE * len(correct)), FEWEST), MOST)].tolist()

    def load(chosen: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
        at = [int(correct[place]) for place in chosen]
        pixels, labels = images.load(at)
        return pixels.to(device), labels.to(device), [images.keys[place] for place in at]

    results: list[Diagnostic] = []
    if not places:
        detail = "No image is classified correctly when clean, so no attack was made and none can be looked into."
        results.append(Diagnostic(name="sample", passed=None, detail=detail))
    else:
        with frozen(model), deterministic_float32():
            judge = Judge(model, num_classes, batch_size)
            eot_iter = max(spec.eot_iter for spec in specs)
            predicted = predicted_classes(run.rows)
            subject = Subject(judge, *load(range(len(places))), outcomes, load, fingerprint, predicted, eot_iter)
            fitting = FittingBatch(batch_size, device)
            for done, check in enumerate(CHECKS):
                name = check.__name__.removeprefix("check_")
                if on_check is not None:
                    on_check(name, done, len(CHECKS))

                def try_with(size: int) -> list[Diagnostic]:
                    subject.judge.batch_size = size
                    # For what a randomised model draws itself.
                    with seeded(device, chunk_seed(fingerprint, f"diagnostics {name}", 0)):
                        return list(check(subject))

                results += fitting.run(try_with)
    if on_check is not None:
        on_check("done", len(CHECKS), len(CHECKS))
    return Diagnostics(
        fingerprint=fingerprint,
        sample=[images.indices[place] for place in places],
        wall_s=time.perf_counter() - started,
        results=results,
    )
