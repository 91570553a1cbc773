"""What `lrrobust report` costs: time and memory of the whole command, on runs made of random numbers."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from lrrobust.bench.interleaved import OnTurn, say_nothing
from lrrobust.evaluation.chunks import DEFAULT_CHUNK_SIZE
from lrrobust.results import SCHEMA, SCHEMA_VERSION, Example, RunStore, example_count, rows_to_table

#: Attack -> norm, eps and the typical distance it needs: the ladders of the suite `standard`.
_ATTACKS = {
    "fgsm": ("linf", (0.125 / 255, 0.25 / 255, 0.5 / 255, 1 / 255, 2 / 255, 4 / 255), 1.5 / 255),
    "pgd": ("linf", (0.125 / 255, 0.25 / 255, 0.5 / 255, 1 / 255, 2 / 255, 4 / 255), 1 / 255),
    "pgd_l2": ("l2", (0.05, 0.1, 0.2, 0.5, 1.0, 2.0), 0.4),
    "cw": ("l2", (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, np.inf), 0.3),
}
ROWS_PER_IMAGE = sum(len(eps) for _, eps, _ in _ATTACKS.values())

#: The models of the claim that is judged by default, which makes the report judge these runs.
_MODELS = ("lr_resnet50", "resnet50")

_CLASSES, _IMAGE_SIZE = 200, 64

#: What is measured runs in a process of its own, which tells what it took. Resident memory is not asked of the
#: parent: what the system counts for a child may be left from the process it was forked from. That of the processes
#: that it starts itself is added up while they live, every 20 ms.
_CHILD = """
import json, multiprocessing, os, sys, threading, time
from lrrobust.bench.resident_memory import resident_bytes
from lrrobust.cli import run
peaks = [resident_bytes("VmHWM")]
def watch():
    while True:
        time.sleep(0.02)
        children = [resident_bytes("VmRSS", child.pid) for child in multiprocessing.active_children()]
        peaks[0] = max(peaks[0], resident_bytes("VmRSS") + sum(size for size in children if size == size))
threading.Thread(target=watch, daemon=True).start()
started = time.perf_counter()
code = run(sys.argv[1:])
spent = os.times()
print()
print(json.dumps({"code": code, "wall_s": time.perf_counter() - started, "cpu_s": sum(spent[:4]),
    "peak_bytes": max(peaks[0], resident_bytes("VmHWM"))}))
"""


def measure_reports(
    rows: tuple[int, ...] = (10_000, 100_000), *, runs: int = 10, repeats: int = 1, on_turn: OnTurn = say_nothing
) -> Iterator[dict[str, Any]]:
    """Builds the report of `runs` runs of as many rows each: verdicts, page, gallery, tables and figures.

    Yields:
        One row for each case and repeat: `rows` of each run, `runs`, `name`, `repeat`, `wall_s`, `cpu_s` (user and
        system, all threads and processes), `peak_bytes` (resident, of all processes together; NaN where the system does
        not tell).

    Raises:
        RuntimeError: the report failed.
    """
    for count in rows:
        with TemporaryDirectory() as folder:
            on_turn(f"{count} rows: writing {runs} runs")
            write_random_runs(Path(folder) / "runs", runs=runs, rows=count)
            for repeat in range(repeats):
                on_turn(f"{count} rows: report, round {repeat + 1} of {repeats}")
                found = measure_report(Path(folder) / "runs", Path(folder) / "out")
                yield {"rows": count, "runs": runs, "name": "report", "repeat": repeat, **found}


def measure_report(runs: Path, out: Path) -> dict[str, float]:
    """`wall_s`, `cpu_s` and `peak_bytes`, as `measure_reports` gives them, of the report on the runs in a folder.

    Raises:
        RuntimeError: the report failed.
    """
    command = ["report", str(runs), "--out", str(out)]
    done = subprocess.run([sys.executable, "-c", _CHILD, *command], capture_output=True, text=True, cwd=runs.parent)
    if done.returncode:
        raise RuntimeError(f"the report ended with exit code {done.returncode}: {done.stderr[-2000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    if found.pop("code"):
        raise RuntimeError(f"the report failed: {done.stderr[-2000:]}")
    return found


def write_random_runs(folder: Path, *, runs: int, rows: int, seed: int = 0) -> list[Path]:
    """Finished run folders as evaluations leave them, in pairs of two models on the same images.

    Args:
        runs: folders; two by two they share a data set.
        rows: of each run, rounded down to whole images, at least one.
        seed: of the distances.

    Returns:
        The folders.
    """
    n = max(1, rows // ROWS_PER_IMAGE)
    folders = []
    for place in range(runs):
        model, dataset = _MODELS[place % len(_MODELS)], f"random-{place // len(_MODELS)}"
        # Both models share how robust an image is; the numbers of the model are drawn after that.
        own = np.random.default_rng((seed, place // len(_MODELS))).gamma(2.0, 0.5, n)
        generator = np.random.default_rng((seed, place // len(_MODELS), 1 + place % len(_MODELS)))
        folders.append(folder / f"{model}-{dataset}-{place}")
        with RunStore.create_or_resume(folders[-1], _manifest(model, dataset, n)) as store:
            is_correct = generator.random(n) < 0.8
            for attack, (norm, eps, scale) in _ATTACKS.items():
                distance = np.where(is_correct, scale * own * generator.lognormal(0, 0.2, n), 0.0)
                for start, stop in _chunks(n):
                    images = np.arange(start, stop)
                    store.write_examples(attack, start, stop, _examples(images, distance, generator))
                    store.write_part(attack, start, stop, rows_to_table(_columns(attack, norm, eps, images, distance)), {})
    return folders


def _chunks(n: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + DEFAULT_CHUNK_SIZE, n)) for start in range(0, n, DEFAULT_CHUNK_SIZE))


def _manifest(model: str, dataset: str, n: int) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "fingerprint": hashlib.sha256(f"{model} {dataset} {n}".encode()).hexdigest(),
        "model": {"name": model, "weights": "RANDOM", "input_size": _IMAGE_SIZE},
        "dataset": {"name": dataset, "sha256": hashlib.sha256(dataset.encode()).hexdigest(), "n": n},
        "attacks": [{"name": name, "kind": name, "norm": norm} for name, (norm, *_) in _ATTACKS.items()],
        "plan": {"chunk_size": DEFAULT_CHUNK_SIZE, "parts": [[name, *chunk] for name in _ATTACKS for chunk in _chunks(n)]},
        "class_names": [f"class {label}" for label in range(_CLASSES)],
        "command": ["lrrobust", "eval", "--model", model],
        "seed": 0,
    }


def _columns(attack: str, norm: str, eps: tuple[float, ...], images: np.ndarray, distance: np.ndarray) -> dict[str, Any]:
    """Rows of one chunk: image by image, and for each its eps ascending."""
    index, ladder = np.repeat(images, len(eps)), np.tile(eps, len(images))
    needed = distance[index]
    is_correct, label = needed > 0, index % _CLASSES
    is_found = is_correct & (needed <= ladder)
    n = len(index)
    length = np.where(is_found, needed, 0.0).tolist()
    given = {
        "index": index, "key": [f"n{c:08d}/{i}.png" for c, i in zip(label.tolist(), index.tolist())],
        "label": label.astype(np.int32), "wnid": [f"n{c:08d}" for c in label.tolist()], "attack": [attack] * n,
        "norm": [norm] * n, "eps": ladder,
        "clean_prediction": np.where(is_correct, label, (label + 1) % _CLASSES).astype(np.int32),
        "is_clean_correct": is_correct, "adversarial_prediction": ((label + is_found) % _CLASSES).astype(np.int32),
        "is_broken": is_found | ~is_correct,
        "outcome": np.where(is_correct, np.where(is_found, "broken", "robust"), "wrong_when_clean").tolist(),
        "linf_distance": [value if found else None for value, found in zip(length, is_found)],
        "l1_distance": [value if found else None for value, found in zip(length, is_found)],
        "l2_distance": [value if found else None for value, found in zip(length, is_found)],
        "clean_margin": np.ones(n), "adversarial_margin": np.ones(n), "wall_s": np.full(n, 0.01),
        # Few steps break most images that break at all.
        "forward_passes": (passes := np.where(is_found, 1 + index % 13, 20) * is_correct), "backward_passes": passes,
    }  # fmt: skip
    return {name: given.get(name, [None] * n) for name in SCHEMA.names}


def _examples(images: np.ndarray, distance: np.ndarray, generator: np.random.Generator) -> list[Example]:
    shape = (_IMAGE_SIZE, _IMAGE_SIZE, 3)
    return [
        Example(
            int(index), generator.integers(0, 256, shape, dtype=np.uint8), generator.normal(0, 0.01, shape).astype(np.float16)
        )
        for index in images
        if index < example_count(_IMAGE_SIZE, _IMAGE_SIZE) and distance[index] > 0
    ]
