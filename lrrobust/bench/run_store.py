"""The folder of a large run, as many processes that share it would leave it: files, bytes, and what reading takes."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from lrrobust.attacks.specs import PgdSpec
from lrrobust.bench.report_build import measure_report
from lrrobust.evaluation.chunks import DEFAULT_CHUNK_SIZE
from lrrobust.evaluation.task_queue import Sharing, TaskQueue
from lrrobust.evaluation.tasks import Task, plan_tasks
from lrrobust.results import SCHEMA, SCHEMA_VERSION, RunStore, load_run, rows_to_table


@dataclass(frozen=True)
class Scale:
    """How large a run is simulated; by default ImageNet's validation set under 20 attacks on 1000 processes.

    Args:
        death_rate: share of the processes that die with a part in hand.
        restart_ranks: processes of the second session, which finds the first one's work.
    """

    images: int = 50_000
    attacks: int = 20
    budgets: int = 6
    ranks: int = 1000
    restart_ranks: int = 37
    death_rate: float = 0.05
    chunk_size: int = DEFAULT_CHUNK_SIZE


class _NothingToDo(Exception):
    pass


def _give_up(_: float) -> None:
    raise _NothingToDo


def simulate_run(folder: Path, scale: Scale, seed: int = 0) -> pd.DataFrame:
    """Fills `folder` by two sessions of many processes that share a run and take turns here, then reports on it.

    In the first session some processes die; the second has another number of them, and finishes. Everything is real but
    the rows: queues, leases, parts and the report are those of an evaluation.

    Args:
        folder: of the run; what the report writes goes beside it.

    Returns:
        One row for each session, one for reading, and one for `lrrobust report`: `name`, `ranks`, `parts` computed or
        read, `wall_s` of all (writing parts included), `take_s` for a process to come to its next part, and the
        report's `cpu_s` and `peak_bytes` as in `measure_report`. Files and `folder_bytes` of the run are counted after
        each.

    Raises:
        RuntimeError: a part was computed twice, or the run is not complete at the end.
    """
    specs = [
        PgdSpec(
            kind="pgd", name=f"attack-{i:02d}", norm="linf", eps=tuple((1 + k) / 255 for k in range(scale.budgets)), steps=20
        )
        for i in range(scale.attacks)
    ]
    tasks = plan_tasks(specs, scale.images, scale.chunk_size)
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "fingerprint": "0" * 64,
        "model": {"name": "resnet50", "weights": "RANDOM", "input_size": 224},
        "dataset": {"name": "imagenet-val", "sha256": "0" * 64, "n": scale.images},
        "attacks": [{"name": spec.name, "kind": spec.kind, "norm": spec.norm} for spec in specs],
        "plan": {"parts": [list(task.part) for task in tasks]},
    }
    rng = random.Random(seed)
    sessions = [("1st session", scale.ranks, scale.death_rate), ("2nd session", scale.restart_ranks, 0.0)]
    rows = [
        {"name": name, "ranks": ranks, **_session(folder, manifest, tasks, ranks, death_rate, rng), **_contents(folder)}
        for name, ranks, death_rate in sessions
    ]
    computed = sum(row["parts"] for row in rows)
    started = time.perf_counter()
    is_complete = load_run(folder).is_complete
    wall_s = time.perf_counter() - started
    if not is_complete or computed != len(tasks):
        raise RuntimeError(f"{computed} parts computed for {len(tasks)} in the plan, {is_complete=}")
    report = measure_report(folder, folder.parent / "report")
    for name, found in (("load_run", {"wall_s": wall_s}), ("report", report)):
        rows.append({"name": name, "ranks": 1, "parts": len(tasks), **found, **_contents(folder)})
    return pd.DataFrame(rows)


def _session(
    folder: Path, manifest: dict[str, Any], tasks: Sequence[Task], ranks: int, death_rate: float, rng: random.Random
) -> dict[str, float]:
    """Processes that finish a part each in random order, until all is done or all are dead."""
    taking_s, takes, parts = 0.0, 0, 0
    started = time.perf_counter()
    with RunStore.create_or_resume(folder, manifest) as store:

        def next_task(turns: Iterator[Task]) -> Task | None:
            nonlocal taking_s, takes
            began = time.perf_counter()
            try:
                return next(turns, None)
            except _NothingToDo:
                # The others are at all that is left.
                return None
            finally:
                taking_s += time.perf_counter() - began
                takes += 1

        queues = [
            TaskQueue(tasks, store, Sharing(rank, ranks, math.inf), lambda task: None, sleep=_give_up) for rank in range(ranks)
        ]
        at_work = [(turns, task) for turns in map(iter, queues) if (task := next_task(turns)) is not None]
        dying = set(rng.sample(range(len(at_work)), round(death_rate * len(at_work))))
        at_work = [pair for place, pair in enumerate(at_work) if place not in dying]
        while at_work:
            place = rng.randrange(len(at_work))
            turns, task = at_work[place]
            store.write_part(*task.part, _rows_of(task), {})
            parts += 1
            if (task := next_task(turns)) is None:
                at_work.pop(place)
            else:
                at_work[place] = turns, task
    return {"parts": parts, "wall_s": time.perf_counter() - started, "take_s": taking_s / takes}


def _rows_of(task: Task) -> pa.Table:
    """Rows with the noise of real ones, which compresses as badly."""
    images, budgets = range(task.chunk.start, task.chunk.stop), task.spec.eps
    n = len(images) * len(budgets)
    rng = np.random.default_rng(task.chunk.start)
    index, eps = np.tile(images, len(budgets)), np.repeat(budgets, len(images))
    is_broken = rng.random(n) < 0.7
    distance = pa.array(eps * rng.random(n), mask=~is_broken)
    known = {
        "index": index,
        "key": [f"n{10_000_000 + i // 50}/ILSVRC2012_val_{i:08d}.JPEG" for i in index.tolist()],
        "label": index // 50,
        "wnid": [f"n{10_000_000 + i // 50}" for i in index.tolist()],
        "attack": [task.spec.name] * n,
        "norm": [task.spec.norm] * n,
        "eps": eps,
        "clean_prediction": index // 50,
        "is_clean_correct": np.ones(n, dtype=bool),
        "adversarial_prediction": rng.integers(0, 1000, n),
        "is_broken": is_broken,
        "outcome": np.where(is_broken, "broken", "robust").tolist(),
        "clean_margin": rng.random(n),
        "adversarial_margin": rng.random(n),
        "wall_s": rng.random(n),
        "forward_passes": rng.integers(1, 21, n),
        "backward_passes": rng.integers(1, 21, n),
    }
    rest = {name: distance if name.endswith("_distance") else [None] * n for name in SCHEMA.names}
    return rows_to_table({name: known.get(name, rest[name]) for name in SCHEMA.names})


def _contents(folder: Path) -> dict[str, int]:
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return {"files": len(sizes), "folder_bytes": sum(sizes)}
