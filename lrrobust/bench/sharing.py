"""How much faster an evaluation is when processes share it, and whether the rows stay the same."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.synchronize import Barrier
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from lrrobust.attacks.suite import load_suite
from lrrobust.bench.interleaved import OnTurn, say_nothing
from lrrobust.data.tensor_images import TensorImages
from lrrobust.evaluation.chunk_attack import Surrogate
from lrrobust.evaluation.chunks import DEFAULT_BATCH_SIZE
from lrrobust.evaluation.engine import evaluate
from lrrobust.evaluation.task_queue import Sharing
from lrrobust.evaluation.tasks import plan_tasks
from lrrobust.models.folding import fold_constants
from lrrobust.models.registry import NETWORKS
from lrrobust.process_settings import settle_process
from lrrobust.results import SCHEMA_VERSION, RunStore, load_run

_CLASSES = 10
_FINGERPRINT = "5ba7e5ba7e"


@dataclass(frozen=True)
class SharedWork:
    """What is evaluated: PGD on random images under a network with random weights, on one thread in each process.

    The attack goes on to its last step on every image, as that of a transfer does, so that the work does not depend on
    what breaks.

    The images have the size of CIFAR's, on which most evaluations of robustness are made, in the batches that
    `lrrobust eval` makes of itself: a batch is computed mostly in the caches that each core has for itself. Cores that
    wait for the memory which they share would be slower together whoever divided the work; what is to be measured is what
    dividing it costs.

    Args:
        network: one of `NETWORKS`.
        images, side: how many, and their sides in pixels.
        steps: of PGD.
        chunk_size: images of a part, and of a batch.
    """

    network: str = "resnet26"
    images: int = 512
    side: int = 32
    steps: int = 5
    chunk_size: int = DEFAULT_BATCH_SIZE


def compare_sharing(
    work: SharedWork = SharedWork(), *, processes: int = 2, repeats: int, on_turn: OnTurn = say_nothing
) -> Iterator[dict[str, object]]:
    """Times the same evaluation by one process and by several that share it, in turns.

    Starting processes and loading is not timed: they wait for each other before they begin. On a device there would be one
    process on each; this is about the CPU, and needs as many idle cores as processes.

    Yields:
        One row for each round and number of processes: `name`, `repeat`, `wall_s` until the last was done.

    Raises:
        RuntimeError: the rows differ in any bit, or a process failed.
    """
    rows = None
    for repeat in range(repeats):
        for count in (1, processes):
            name = "1 process" if count == 1 else f"{count} processes"
            on_turn(f"{name}, round {repeat + 1} of {repeats}")
            with TemporaryDirectory(prefix="lrrobust-bench-") as folder:
                wall_s = _time_shared(work, Path(folder) / "run", count)
                now = load_run(Path(folder) / "run")
            timeless = now.rows.drop(columns="wall_s")
            if not now.is_complete or not (rows is None or timeless.equals(rows)):
                raise RuntimeError(f"{count} processes made other rows than one")
            rows = timeless
            yield {"name": name, "repeat": repeat, "wall_s": wall_s}


def _time_shared(work: SharedWork, folder: Path, count: int) -> float:
    context = multiprocessing.get_context("spawn")
    begin = context.Barrier(count + 1)
    workers = [context.Process(target=_evaluate, args=(work, folder, rank, count, begin)) for rank in range(count)]
    for worker in workers:
        worker.start()
    begin.wait(timeout=300)
    started = time.perf_counter()
    for worker in workers:
        worker.join()
    wall_s = time.perf_counter() - started
    if failed := [worker.exitcode for worker in workers if worker.exitcode]:
        raise RuntimeError(f"a process that shared the work ended with exit code {failed[0]}")
    return wall_s


def _evaluate(work: SharedWork, folder: Path, rank: int, count: int, begin: Barrier) -> None:
    # As in the processes of `lrrobust eval`: its allocator, its memory format, and the network as it is run.
    settle_process()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = fold_constants(NETWORKS[work.network](_CLASSES).to(memory_format=torch.channels_last)).eval()
    shape = work.images, 3, work.side, work.side
    pixels = torch.rand(shape, generator=torch.Generator().manual_seed(0)).mul(255).round().div(255)
    with torch.no_grad():
        # What the network says is right: every image is attacked.
        labels = torch.cat([network(part).argmax(1) for part in pixels.split(work.chunk_size)])
    images = TensorImages("random", pixels, labels, [str(label) for label in range(_CLASSES)])
    specs = load_suite(("pgd",), eps=("4/255",), steps=work.steps)
    tasks = plan_tasks(specs, len(images), work.chunk_size)
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "fingerprint": _FINGERPRINT,
        "attacks": [{"name": spec.name, "norm": spec.norm} for spec in specs],
        "plan": {"parts": [list(task.part) for task in tasks]},
    }
    begin.wait(timeout=300)
    with RunStore.create_or_resume(folder, manifest, is_shared=True) as store:
        evaluate(
            network,
            _CLASSES,
            images,
            tasks,
            store,
            fingerprint=_FINGERPRINT,
            device=torch.device("cpu"),
            part_metadata={},
            batch_size=work.chunk_size,
            surrogate=Surrogate(network, _CLASSES, images.labels),
            sharing=Sharing(rank, count),
        )
