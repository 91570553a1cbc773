"""The benchmarks by name: what each measures, and the table that sums it up."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
import torch

from lrrobust.attacks.suite import load_suite
from lrrobust.bench.attack_loop import compare_attack_loops, summarise_attack_loops
from lrrobust.bench.gradient_step import CONTROL, compare_gradient_steps
from lrrobust.bench.interleaved import summarise_times
from lrrobust.bench.local_relation import compare_operations
from lrrobust.bench.report_build import measure_reports
from lrrobust.bench.run_store import Scale, simulate_run
from lrrobust.bench.sharing import SharedWork, compare_sharing
from lrrobust.data.class_lists import IMAGENET_1K
from lrrobust.data.evaluation_set import build_evaluation_set
from lrrobust.data.preprocessing import Preprocessing
from lrrobust.data.sources import open_dataset
from lrrobust.errors import UnknownNameError
from lrrobust.models import load_classifier
from lrrobust.models.folding import fold_constants
from lrrobust.tables import Cell, Column, Table, to_markdown


@dataclass(frozen=True)
class BenchRequest:
    """What is to be measured, and on what.

    Args:
        repeats: rounds in which everything is timed once.
        n: images of the data set that the attack loops take.
        models: whom they attack.
        attack: with which attack.
        dataset: as `open_dataset` takes it.
    """

    repeats: int
    n: int
    models: tuple[str, ...]
    attack: str
    dataset: str
    device: torch.device


@dataclass(frozen=True)
class BenchResult:
    """Every time that was taken, one a row, and one row for each thing measured; None where it was measured once."""

    times: pd.DataFrame | None
    summary: pd.DataFrame


def _with_memory(times: pd.DataFrame, summary: pd.DataFrame, by: str) -> pd.DataFrame:
    """Adds the peaks, which are measured once, to the medians."""
    columns = [column for column in ("peak_bytes", "io_bytes") if column in times]
    return summary.join(times.groupby([by, "name"], sort=False)[columns].first(), on=[by, "name"])


def bench_operation(request: BenchRequest) -> BenchResult:
    """The local relation operation at the stages of LR-Net-50, forward and backward.

    Times as ratios to the fused backend's, peaks (`peak_ratio`) to the bytes of inputs, outputs and gradients.
    """
    times = compare_operations(repeats=request.repeats, device=request.device)
    fused = "triton" if request.device.type == "cuda" else "cpu"
    summary = _with_memory(times, summarise_times(times, ["stage"], fused), "stage")
    if "peak_bytes" in summary:
        summary["peak_ratio"] = summary["peak_bytes"] / summary["io_bytes"]
    return BenchResult(times, summary)


def bench_gradient_step(request: BenchRequest) -> BenchResult:
    """A gradient step on whole networks; ratios, of times and of peaks, to the convolutional control."""
    times = compare_gradient_steps(repeats=request.repeats, device=request.device)
    summary = _with_memory(times, summarise_times(times, ["size"], CONTROL), "size")
    if "peak_bytes" in summary:
        of_control = summary[summary["name"] == CONTROL].set_index("size")["peak_bytes"]
        summary["peak_ratio"] = summary["peak_bytes"] / summary["size"].map(of_control)
    return BenchResult(times, summary)


def bench_attack_loop(request: BenchRequest) -> BenchResult:
    """PGD over its ladder of budgets: ours, its peers, and the bare loop; ratios to ours."""
    (spec,) = load_suite((request.attack,))
    times, summaries = [], []
    for name in request.models:
        classifier = load_classifier(name, imagenet_classes=IMAGENET_1K)
        preprocessing = Preprocessing(classifier.input_size, classifier.resize_size, classifier.interpolation)
        images = build_evaluation_set(open_dataset(request.dataset), classifier.classes, preprocessing, n=request.n)
        pixels, labels = images.load(range(len(images)))
        frame = compare_attack_loops(
            fold_constants(classifier.module).eval().to(request.device),
            len(classifier.classes),
            pixels.to(request.device),
            labels.to(request.device),
            spec,
            repeats=request.repeats,
        )
        for table, tables in ((frame, times), (summarise_attack_loops(frame), summaries)):
            table.insert(0, "model", name)
            tables.append(table)
    return BenchResult(pd.concat(times, ignore_index=True), pd.concat(summaries, ignore_index=True))


def bench_store(request: BenchRequest) -> BenchResult:
    """The run folder of ImageNet's validation set under 20 attacks, as 1000 processes share it; done once."""
    with TemporaryDirectory(prefix="lrrobust-bench-") as folder:
        return BenchResult(None, simulate_run(Path(folder) / "run", Scale()))


def bench_report(request: BenchRequest) -> BenchResult:
    """`lrrobust report` on 10 runs of random numbers, of 10,000 and of 100,000 rows each; no images, no models."""
    times = measure_reports(repeats=request.repeats)
    cases = times.groupby(["rows", "runs", "name"], sort=False)
    return BenchResult(times, cases[["wall_s", "cpu_s", "peak_bytes"]].median().reset_index())


def bench_sharing(request: BenchRequest) -> BenchResult:
    """One evaluation by one process and by two that share it, on a thread each; ratios to one. Rows that differ are an error."""
    times = compare_sharing(SharedWork(), repeats=request.repeats).assign(case="PGD")
    return BenchResult(times, summarise_times(times, ["case"], "1 process"))


BENCHES: Mapping[str, Callable[[BenchRequest], BenchResult]] = {
    "operation": bench_operation,
    "gradient-step": bench_gradient_step,
    "attack-loop": bench_attack_loop,
    "sharing": bench_sharing,
    "store": bench_store,
    "report": bench_report,
}


def find_bench(name: str) -> Callable[[BenchRequest], BenchResult]:
    """The benchmark of that name; UnknownNameError names the nearest."""
    if name not in BENCHES:
        raise UnknownNameError("benchmark", name, BENCHES)
    return BENCHES[name]


def format_cell(column: str, value: object) -> str:
    """A number of a summary as people read it: times in ms or s, memory in MB, shares in percent."""
    if not isinstance(value, float):
        return str(value)
    if math.isnan(value):
        return "-"
    if column.endswith("_s") and column != "images_per_s":
        return f"{1e3 * value:.1f} ms" if value < 10 else f"{value:.1f} s"
    if column.endswith("_bytes"):
        return f"{value / 1e6:.1f} MB"
    if column in ("spread", "overhead") or column.startswith("robust_accuracy"):
        return f"{100 * value:.1f} %"
    return f"{value:.2f}"


def markdown_page(title: str, summary: pd.DataFrame, environment: Mapping[str, object]) -> str:
    """A summary as a page: when, on what and by what it was measured, and the table."""
    columns = [Column(name, is_text=not pd.api.types.is_numeric_dtype(summary[name])) for name in summary.columns]
    rows = [[Cell(format_cell(name, value), "") for name, value in row.items()] for row in summary.to_dict("records")]
    where = (
        f"{environment['date']}, {environment['processor']}, {environment['threads']} threads, "
        f"device {environment['device']}, torch {environment['versions']['torch']}, commit {environment['commit']}."
    )
    meaning = "`ratio` is taken within rounds; `spread` is the range of the times by their median."
    return "\n".join([f"# {title}", "", where, meaning if "spread" in summary else "", "", *to_markdown(Table(columns, rows)), ""])
