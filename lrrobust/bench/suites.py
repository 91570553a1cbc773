"""The benchmarks by name: what each measures, and the table that sums it up."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
import torch

from lrrobust.attacks.specs import PgdSpec
from lrrobust.attacks.suite import load_suite
from lrrobust.bench.attack_loop import compare_attack_loops, summarise_attack_loops
from lrrobust.bench.gradient_step import CONTROL, SIZES, compare_gradient_steps
from lrrobust.bench.harness import BARE, compare_with_bare_loop
from lrrobust.bench.interleaved import OnTurn, collect, say_nothing, summarise_times
from lrrobust.bench.local_relation import compare_operations, fused_backend
from lrrobust.bench.report_build import measure_reports
from lrrobust.bench.run_store import Scale, simulate_run
from lrrobust.bench.sharing import SharedWork, compare_sharing
from lrrobust.data.class_lists import IMAGENET_1K
from lrrobust.data.evaluation_set import build_evaluation_set
from lrrobust.data.preprocessing import Preprocessing
from lrrobust.data.sources import open_dataset
from lrrobust.determinism import deterministic_float32
from lrrobust.errors import ConfigError, UnknownNameError
from lrrobust.evaluation.chunks import DEFAULT_BATCH_SIZE
from lrrobust.models import load_classifier
from lrrobust.models.folding import fold_constants
from lrrobust.models.replay import replayed
from lrrobust.tables import Cell, Column, Table, to_markdown


@dataclass(frozen=True)
class BenchRequest:
    """What is to be measured, and on what.

    Args:
        repeats: rounds in which everything is timed once, but for what the budget does not suffice.
        device: where.
        budget_s: for all rounds of a benchmark that times in turns, see `time_interleaved`.
        n: images of the data set that attacks take.
        models: whom they attack.
        attack: with which attack.
        dataset: as `open_dataset` takes it.
        sizes: sides of the images; None for those of the models, and for a gradient step `SIZES`.
        batch_size: images passed through the model at once; None for each benchmark's own.
        on_turn: told what is being done.
    """

    repeats: int
    device: torch.device
    budget_s: float = math.inf
    n: int = 32
    models: tuple[str, ...] = (CONTROL,)
    attack: str = "pgd"
    dataset: str = "photos"
    sizes: tuple[int, ...] | None = None
    batch_size: int | None = None
    on_turn: OnTurn = say_nothing


@dataclass(frozen=True)
class BenchResult:
    """Every time that was taken, one a row, and one row for each thing measured.

    Attributes:
        times: None where things were measured once.
        summary: empty where an interruption came before anything was measured.
        interruption: what ended it early; the rest is what was measured until then.
    """

    times: pd.DataFrame | None
    summary: pd.DataFrame
    interruption: KeyboardInterrupt | None = None


def _measure(rows: Iterable[dict[str, object]], summarise: Callable[[pd.DataFrame], pd.DataFrame]) -> BenchResult:
    """Takes the measurements, and sums up those that were taken.

    With the float32 of an evaluation for all: convolutions of torch's own choice would take TF32 on a GPU, and be compared
    with products that may not.
    """
    with deterministic_float32():
        times, interruption = collect(rows)
    if not len(times) and interruption is None:
        raise ConfigError(
            "nothing was measured: all that the others are compared with ran out of memory; give a smaller --batch-size"
        )
    return BenchResult(times, summarise(times) if len(times) else times, interruption)


def _with_memory(times: pd.DataFrame, summary: pd.DataFrame, by: str) -> pd.DataFrame:
    """Adds the peaks, which are measured once, to the medians."""
    columns = [column for column in ("peak_bytes", "io_bytes") if column in times]
    return summary.join(times.groupby([by, "name"], sort=False)[columns].first(), on=[by, "name"])


def bench_operation(request: BenchRequest) -> BenchResult:
    """The local relation operation at the stages of LR-Net-50, forward and backward.

    Times as ratios to the fused backend's, peaks (`peak_ratio`) to the bytes of inputs, outputs and gradients. In float32, and
    on a GPU in bfloat16 too.
    """

    def summarise(times: pd.DataFrame) -> pd.DataFrame:
        summary = _with_memory(times, summarise_times(times, ["stage"], fused_backend(request.device)), "stage")
        if "peak_bytes" in summary:
            summary["peak_ratio"] = summary["peak_bytes"] / summary["io_bytes"]
        return summary

    batch_size = {} if request.batch_size is None else {"batch_size": request.batch_size}
    return _measure(
        compare_operations(
            repeats=request.repeats, budget_s=request.budget_s, device=request.device, on_turn=request.on_turn, **batch_size
        ),
        summarise,
    )


def bench_gradient_step(request: BenchRequest) -> BenchResult:
    """A gradient step on whole networks; ratios, of times and of peaks, to the convolutional control."""

    def summarise(times: pd.DataFrame) -> pd.DataFrame:
        summary = _with_memory(times, summarise_times(times, ["size", "batch_size", "case"], CONTROL), "size")
        if "peak_bytes" in summary:
            of_control = summary[summary["name"] == CONTROL].groupby("size")["peak_bytes"].first()
            summary["peak_ratio"] = summary["peak_bytes"] / summary["size"].map(of_control)
        return summary

    steps = compare_gradient_steps(
        request.sizes or SIZES,
        batch_size=request.batch_size,
        repeats=request.repeats,
        budget_s=request.budget_s,
        device=request.device,
        on_turn=request.on_turn,
    )
    return _measure(steps, summarise)


def bench_attack_loop(request: BenchRequest) -> BenchResult:
    """PGD over its ladder of budgets: ours and its peers; ratios to ours."""
    return _measure(_on_models(compare_attack_loops, request), lambda times: summarise_attack_loops(times, ["model", "size"]))


def bench_harness(request: BenchRequest) -> BenchResult:
    """An evaluation beside a bare loop that makes the same passes; ratios to the bare loop."""
    return _measure(
        _on_models(compare_with_bare_loop, request),
        lambda times: summarise_times(times, ["model", "size", "case"], BARE, ["outside"]),
    )


def _on_models(compare: Callable[..., Iterator[dict[str, object]]], request: BenchRequest) -> Iterator[dict[str, object]]:
    """The rows of a comparison on every model and size asked for, which have equal shares of the budget."""
    specs = load_suite((request.attack,))
    if len(specs) != 1 or not isinstance(specs[0], PgdSpec):
        raise ConfigError(
            f"--attack: expected one attack of kind pgd, got {request.attack!r}: {', '.join(s.kind for s in specs)}"
        )
    (spec,) = specs
    cases = [(name, size) for name in request.models for size in request.sizes or (None,)]
    for name, size in cases:
        classifier = load_classifier(name, imagenet_classes=IMAGENET_1K, input_size=size)
        preprocessing = Preprocessing(classifier.input_size, classifier.resize_size, classifier.interpolation)
        source = open_dataset(request.dataset, classifier.classes)
        images = build_evaluation_set(source, classifier.classes, preprocessing, n=request.n)
        pixels, labels = images.load(range(len(images)))
        rows = compare(
            # The same network for all, however its passes are launched: what is compared is the loops.
            replayed(fold_constants(classifier.module).eval().to(request.device)),
            len(classifier.classes),
            pixels.to(request.device),
            labels.to(request.device),
            spec,
            repeats=request.repeats,
            budget_s=request.budget_s / len(cases),
            batch_size=request.batch_size or DEFAULT_BATCH_SIZE,
            case=f"{name}, {classifier.input_size} pixels",
            on_turn=request.on_turn,
        )
        for row in rows:
            yield {"model": name, "size": classifier.input_size, **row}


def bench_store(request: BenchRequest) -> BenchResult:
    """The run folder of ImageNet's validation set under 20 attacks, as 1000 processes share it; done once."""
    request.on_turn("1000 processes fill a folder, then it is read")
    with TemporaryDirectory(prefix="lrrobust-bench-") as folder:
        return BenchResult(None, simulate_run(Path(folder) / "run", Scale()))


def bench_report(request: BenchRequest) -> BenchResult:
    """`lrrobust report` on 10 runs of random numbers, of 10,000 and of 100,000 rows each; no images, no models."""

    def summarise(times: pd.DataFrame) -> pd.DataFrame:
        cases = times.groupby(["rows", "runs", "name"], sort=False)
        return cases.size().rename("repeats").to_frame().join(cases[["wall_s", "cpu_s", "peak_bytes"]].median()).reset_index()

    return _measure(measure_reports(repeats=request.repeats, on_turn=request.on_turn), summarise)


def bench_sharing(request: BenchRequest) -> BenchResult:
    """One evaluation by one process and by two that share it, a thread each; ratios to one. Rows that differ are an error."""
    return _measure(
        compare_sharing(SharedWork(), repeats=request.repeats, on_turn=request.on_turn),
        lambda times: summarise_times(times.assign(case="PGD"), ["case"], "1 process"),
    )


BENCHES: Mapping[str, Callable[[BenchRequest], BenchResult]] = {
    "operation": bench_operation,
    "gradient-step": bench_gradient_step,
    "attack-loop": bench_attack_loop,
    "harness": bench_harness,
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
    if not isinstance(value, float | int) or (isinstance(value, int) and not column.endswith("_bytes")):
        return str(value)
    if math.isnan(value):
        return "-"
    if column.endswith("_s") and column != "images_per_s":
        return f"{1e3 * value:.1f} ms" if value < 10 else f"{value:.1f} s"
    if column.endswith("_bytes"):
        return f"{value / 1e6:.1f} MB"
    if column in ("spread", "outside") or column.startswith("robust_accuracy"):
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
    meaning = (
        "`repeats` says how often each was timed, in turns with the others; `ratio` is taken within rounds, `cpu_ratio` "
        "likewise of CPU times; `spread` is the range of the times by their median."
    )
    return "\n".join(
        [f"# {title}", "", where, meaning if "spread" in summary else "", "", *to_markdown(Table(columns, rows)), ""]
    )
