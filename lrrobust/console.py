"""What the command line shows: progress bars, tables, notices."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from lrrobust.diagnostics.records import other_rules
from lrrobust.diagnostics.table import diagnostics_table
from lrrobust.report.formatting import format_eps
from lrrobust.report.naming import name_runs
from lrrobust.report.notices import warnings_with_rejections
from lrrobust.report.summary import summarise
from lrrobust.report.summary_table import render_table
from lrrobust.results import load_run, write_file
from lrrobust.stats import wilson_interval

if TYPE_CHECKING:
    import pandas as pd
    import torch

    from lrrobust.bench.suites import BenchRequest, BenchResult
    from lrrobust.check.baseline import Baseline
    from lrrobust.crosscheck import Comparison
    from lrrobust.data.evaluation_set import EvaluationSet
    from lrrobust.evaluation.tasks import Task
    from lrrobust.export import Exported
    from lrrobust.results import Run
    from lrrobust.run import Evaluation
    from lrrobust.training.trainer import Progress as TrainingState
    from lrrobust.training.trainer import Training
    from lrrobust.verdict.records import Verdicts
    from lrrobust.verify import Verification

#: Width of tables in files and logs, which wrap nothing.
_LOG_WIDTH = 140


class _Console(Console):
    def on_broken_pipe(self) -> None:
        # rich would end the process; whoever calls a command decides what becomes of it.
        raise


# Tables go to standard output; everything that only accompanies them to standard error. Without emoji: `file.py:b:` names
# a model.
_tables = _Console(width=None if sys.stdout.isatty() else _LOG_WIDTH, emoji=False)
_notices = _Console(stderr=True, emoji=False)

#: Without a terminal a line of progress at most this often.
_LINE_INTERVAL_S = 30.0


def be_quiet() -> None:
    """From now on nothing is shown: another process shows it for all."""
    _tables.quiet = _notices.quiet = True


def _notice(text: str) -> None:
    _notices.print(text, markup=False, highlight=False, soft_wrap=True)


#: A slower bfloat16 is worth a line from here on: below, what it saves in memory traffic may make up for it.
_SLOW_BF16 = 2.0


def _notice_slow_bf16(device: torch.device) -> None:
    from lrrobust.half_precision import bf16_slowdown

    slowdown = bf16_slowdown(device)
    if slowdown > _SLOW_BF16:
        _notice(
            f"warning: this processor emulates bf16 (a matrix product takes {slowdown:.0f} times as long as in float32): "
            "`--precision float32` is much faster here"
        )


@contextmanager
def scanning(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar for reading images, gone when it is done; yields the callback that moves it."""
    bar = Progress(
        TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), console=_notices, transient=True,
        disable=not _notices.is_terminal,
    )
    with bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def report_subset(images: EvaluationSet) -> None:
    """Says what is evaluated, and aloud what is left out."""
    _notice(f"{images.name}: {len(images)} images")
    if images.left_out_count:
        unknown, without = (_name_some(names) for names in images.left_out_classes)
        also = f"; no image has its {without}" if without else ""
        _notice(f"left out: {images.left_out_count} images of classes the model does not know ({unknown}){also}")
    if images.corrupt_keys:
        shown = ", ".join(images.corrupt_keys[:5]) + (", ..." if len(images.corrupt_keys) > 5 else "")
        _notice(f"skipped: {len(images.corrupt_keys)} images that cannot be decoded: {shown}")


#: Classes that a notice names.
_NAMED = 3


def _name_some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(map(repr, names[:_NAMED])) + more


def _build_bar(*columns: ProgressColumn | str) -> Progress:
    """A bar for long work on a terminal; `state` of its task is free text."""
    return Progress(
        TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.fields[state]}", markup=False), TimeElapsedColumn(), *columns,
        console=_notices, disable=not _notices.is_terminal,
    )


class EvaluationProgress:
    """Progress of one evaluation, with the time left estimated from forward passes still to do."""

    def __init__(self, evaluation: Evaluation) -> None:
        self._evaluation = evaluation
        self._bar = _build_bar()
        surrogate = evaluation.manifest.get("surrogate")
        self._name = evaluation.manifest["model"]["name"] + (f" (attacking {surrogate['name']})" if surrogate else "")
        self._parts_done = 0
        self._is_resumed = False
        #: Forward passes that the parts of each attack still to do need at most, and those that parts finished since the
        #: start, here and anywhere, would have needed at most.
        self._left: Counter[str] = Counter()
        for task in evaluation.tasks:
            self._left[task.spec.name] += task.cost
        self._finished_here: Counter[str] = Counter()
        self._finished = 0
        #: Passes really made: fewer, because images wrong when clean or broken are not attacked.
        self._made: Counter[str] = Counter()
        self._present = 0
        #: What parts begun here need at most, by cost alone and by the images that they really attack; that of them which
        #: is not finished, and what it needs at most.
        self._begun = self._begun_bound = 0.0
        self._at: Task | None = None
        self._at_bound = 0.0
        self._opened = self._last_line = time.monotonic()
        #: End of the first pass; what comes before, such as compiling, tells nothing of the speed.
        self._started: float | None = None

    def __enter__(self) -> EvaluationProgress:
        if any(getattr(task.spec, "precision", None) == "bf16" for task in self._evaluation.tasks):
            _notice_slow_bf16(self._evaluation.device)
        self._bar.start()
        self._task = self._bar.add_task(self._name, total=self._left.total(), state=self._parts())
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def on_begin(self, task: Task, share: float) -> None:
        self._at, self._at_bound = task, share * task.cost
        self._begun += task.cost
        self._begun_bound += self._at_bound

    def on_forward(self, count: int) -> None:
        if self._started is None:
            # How long this one took is not known, so it does not count.
            self._started = time.monotonic()
            return
        self._present += count
        self._show()

    def on_task(self, task: Task, is_new: bool) -> None:
        self._parts_done += 1
        self._left[task.spec.name] -= task.cost
        if is_new:
            self._finished_here[task.spec.name] += task.cost
            self._made[task.spec.name] += self._present
            self._present = 0
            self._at = None
        elif not self._is_resumed and not self._done():
            _notice(f"going on with {self._evaluation.folder}")
            self._is_resumed = True
        # What is stored once the work has begun, others have done that share it.
        if is_new or self._done():
            self._finished += task.cost
        self._show()

    def _show(self) -> None:
        done = self._done()
        total = done + self._passes_left()[0]
        self._bar.update(self._task, completed=done, total=total, state=f"{self._parts()}{self._time_left()}")
        now = time.monotonic()
        if _notices.is_terminal or now - self._last_line < _LINE_INTERVAL_S or not done:
            return
        self._last_line = now
        _notice(f"{self._name}: {self._parts()}, {now - self._opened:.0f} s{self._time_left()}")

    def _done(self) -> int:
        """Passes made since the start."""
        return self._made.total() + self._present

    def _passes_left(self) -> tuple[float, bool]:
        """Passes still to make, and whether this is a bound rather than an estimate.

        What parts need is known only as an upper bound, and those of an attack that are finished say how far off it is for
        that attack. For other attacks the parts begun say what share is attacked at all.
        """
        attacked = self._begun_bound / self._begun if self._begun_bound else 1.0
        shares = {name: self._made[name] / self._finished_here[name] if self._made[name] else attacked for name in self._left}
        needed = sum(left * shares[name] for name, left in self._left.items())
        is_bound = any(left and not self._made[name] for name, left in self._left.items())
        if self._at is not None and self._present >= (expected := self._at.cost * shares[self._at.spec.name]):
            # A part that needs more than those before it: all the others are still to do.
            return needed - expected + max(self._at_bound - self._present, 0.0), True
        return max(needed - self._present, 0.0), is_bound

    def _time_left(self) -> str:
        """By the speed of the passes made so far, those of others who share the work included."""
        if not self._done() or self._started is None:
            return ""
        passes, is_bound = self._passes_left()
        seconds = (time.monotonic() - self._started) * passes / self._done()
        if self._finished_here.total():
            seconds *= self._finished_here.total() / self._finished
        return f", {'at most' if is_bound else 'about'} {_round_duration(seconds)} left"

    def _parts(self) -> str:
        return f"{self._parts_done}/{len(self._evaluation.tasks)} parts"


def _round_duration(seconds: float) -> str:
    """As exact as an estimate is: 40 s, 12 min, 3.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


@contextmanager
def diagnosing(evaluation: Evaluation) -> Iterator[Callable[[str, int, int], None]]:
    """A bar for the diagnostics of one run; yields the callback that moves it."""
    name = f"{evaluation.manifest['model']['name']}: diagnostics"
    with _build_bar("left", TimeRemainingColumn()) as bar:
        task = bar.add_task(name, total=None, state="")
        started = False

        def on_check(check: str, done: int, total: int) -> None:
            nonlocal started
            # Without a terminal one line says what takes the time.
            if not started and not _notices.is_terminal:
                _notice(f"{name}: {total} checks")
            started = True
            bar.update(task, completed=done, total=total, state=check.replace("_", " "))

        yield on_check


class TrainingProgress:
    """Progress of a training run: loss, speed, time left; one line an epoch, and without a terminal now and then."""

    def __init__(self, training: Training) -> None:
        self._training = training
        self._bar = _build_bar("left", TimeRemainingColumn())
        self._last_line = time.monotonic()

    def __enter__(self) -> TrainingProgress:
        if self._training.recipe.precision == "bf16":
            _notice_slow_bf16(self._training.device)
        if self._training.step:
            _notice(f"going on at step {self._training.step} of {self._training.steps}")
        self._bar.start()
        self._task = self._bar.add_task(
            self._training.model_name, total=self._training.steps, completed=self._training.step, state=""
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def on_step(self, state: TrainingState) -> None:
        text = f"epoch {state.epoch}/{state.epochs} loss {state.loss:.3f} {state.images_per_s:.0f} img/s"
        self._bar.update(self._task, completed=state.step, state=text)
        now = time.monotonic()
        if not _notices.is_terminal and now - self._last_line >= _LINE_INTERVAL_S:
            self._last_line = now
            _notice(f"{self._training.model_name}: step {state.step}/{state.steps}, {text}")

    def on_epoch(self, row: dict[str, Any]) -> None:
        top1 = row["holdout_top1"]
        accuracy = "" if math.isnan(top1) else f"held-out top-1 {100 * top1:.1f} %, "
        _notice(
            f"epoch {row['epoch']}: {row['image_size']} px, loss {row['train_loss']:.3f}, {accuracy}"
            f"{row['images_per_s']:.0f} img/s"
        )


def _print_table(runs: Sequence[Run], summary: pd.DataFrame) -> None:
    _tables.print(render_table(summary))
    for run in runs:
        for warning in warnings_with_rejections(run):
            _notice(f"warning: {run.folder.name}: {warning}")


def print_results(folders: Sequence[Path]) -> None:
    """The tables of the runs just made, and where they are."""
    runs = [load_run(folder) for folder in folders]
    summary = summarise(runs)
    _print_table(runs, summary)
    _print_diagnostics(runs)
    for name, run in name_runs(runs).items():
        if doubt := _doubt_accuracy(run, summary[summary["run"] == name]):
            _notice(f"warning: {name}: {doubt}")
    for folder in folders:
        _notice(f"results: {folder}")


def _doubt_accuracy(run: Run, summary: pd.DataFrame) -> str | None:
    """A clean accuracy that is no better than guessing mostly means that labels or preprocessing are not the network's."""
    clean_accuracy, n = summary[["clean_accuracy", "n"]].iloc[0]
    correct, classes = round(clean_accuracy * n), run.manifest["model"]["num_classes"]
    if wilson_interval(correct, int(n))[0] > 1 / classes:
        return None
    return (
        f"{correct} of {int(n)} images are correct when clean, as guessing among {classes} classes might be: is the class list "
        "in the order of the logits, are the weights trained, does the network normalise as it did in training, and is "
        f"{run.manifest['model']['input_size']} the side of images that it takes (--input-size)?"
    )


def warn_of_other_rules(runs: Sequence[Run]) -> None:
    """A line for each run whose diagnostics count for nothing."""
    for run in runs:
        if (said := other_rules(run)) is not None:
            logging.warning("%s: %s", run.folder, said)


def _print_diagnostics(runs: Sequence[Run]) -> None:
    for name, run in name_runs(runs).items():
        found = diagnostics_table({name: run})
        if not found.rows:
            continue
        table = Table(title=f"did the attacks work? {escape(name)}", box=box.SIMPLE, title_justify="left")
        # The run is in the title.
        for column in found.columns[1:]:
            table.add_column(column.heading)
        for row in found.rows:
            table.add_row(*(escape(cell.text) for cell in row[1:]))
        _tables.print(table)


def print_verdicts(verdicts: Verdicts) -> None:
    """Each verdict with its reasons, and the claims that could not be judged."""
    for result in verdicts.results:
        pairing = result.pairing
        _tables.print(f"{result.verdict.upper()}: {result.claim.statement}", markup=False, style="bold")
        _tables.print(
            f"({result.claim.name}, {pairing.dataset}, {pairing.n} images, {result.claim.treatment} against "
            f"{result.claim.control})", markup=False, highlight=False,
        )
        for reason in result.reasons:
            _tables.print(f"* {reason}", markup=False, highlight=False, soft_wrap=not _tables.is_terminal)
        _tables.print()
    for unjudged in verdicts.not_judged:
        _notice(f"claim {unjudged.claim} not judged: {unjudged.reason}")


def print_report(runs: Sequence[Run], summary: pd.DataFrame, written: Sequence[Path]) -> None:
    """The table of all runs, which is their summary, and the files written."""
    _print_table(runs, summary)
    for path in written:
        _notice(f"wrote {path}")


def print_export(export: Exported) -> None:
    """How many images were written, and where."""
    _notice(f"wrote {len(export.rows)} adversarial images of {export.about['model']['name']} to {export.folder}")
    if not export.about["is_complete"]:
        _notice("warning: the run is not finished, or lost some of its images: run its command again, and export it again")
    _notice(f"`lrrobust verify {export.folder} --model ...` reads them back and judges them again")


def print_verification(found: Sequence[Verification], is_same_model: bool) -> None:
    """What a model makes of exported images, attack by attack."""
    columns = ("attack", "images", "within eps", "correct when clean", "adversarial", "predicted as recorded")
    table = Table(*columns, title="exported images, read back and judged again")
    for each in found:
        counts = (each.n, each.in_ball, each.clean_correct, each.adversarial, each.as_recorded)
        table.add_row(each.attack, *map(str, counts))
    _tables.print(table)
    if not found:
        _notice("warning: there was no image to judge: the attacks found none that outlasts the rounding, or the run was not finished")
    if not is_same_model:
        _notice("this is not the model that the images were verified with: they need not be adversarial for it")


def print_baseline(path: Path, before: Baseline | None, now: Baseline) -> None:
    """What a baseline now holds, and what it no longer says of the evaluation."""
    from lrrobust.check.compare import find_differences, smallest_noticed_fall

    if before is not None:
        manifests = [{**now.protocol, "model": of_model.model} for of_model in now.models]
        for changes in find_differences(before, manifests):
            for change in changes:
                _notice(f"new in the baseline: {change}")
    for of_model in now.models:
        accuracies = [measurement.robust_accuracy for measurement in of_model.measurements]
        _notice(
            f"{of_model.name}: {len(accuracies)} robust accuracies from {100 * min(accuracies):.1f} to "
            f"{100 * max(accuracies):.1f} % on {of_model.measurements[0].n} images"
        )
    noticed = smallest_noticed_fall(now)
    if noticed is None:
        logging.warning(
            "%s is not sure to notice a fall of every model: the loss of all its robust images may pass as chance; take more "
            "images, or a smaller eps",
            path,
        )
    else:
        _notice(f"a check is sure to notice a fall of {100 * noticed / now.models[0].measurements[0].n:.1f} points")
    _notice(f"wrote {path}: commit it; `lrrobust check {path}` does the evaluation again and compares")


def print_bench(name: str, result: BenchResult, request: BenchRequest, out: Path) -> None:
    """The medians of a benchmark as a table; with date and hardware, as Markdown too, and all its times as CSV, in `out`.

    What was interrupted stands apart from what was finished, and does not overwrite it.
    """
    from lrrobust.bench.suites import format_cell, markdown_page
    from lrrobust.provenance import describe_environment

    if not len(result.summary):
        return
    environment = describe_environment(request.device)
    environment["date"] = time.strftime("%Y-%m-%d")
    is_timed = result.times is not None
    title = f"{name}: medians of interleaved rounds" if is_timed else name
    if result.interruption is not None:
        title, name = f"{title}, interrupted", f"{name}-interrupted"
    table = Table(title=title)
    for column in result.summary.columns:
        table.add_column(column)
    for row in result.summary.itertuples(index=False):
        table.add_row(*(format_cell(column, value) for column, value in zip(result.summary.columns, row, strict=True)))
    _tables.print(table)
    for kind, frame in (("times", result.times), ("summary", result.summary)) if is_timed else (("summary", result.summary),):
        path = out / f"{name}-{kind}.csv"
        write_file(path, frame.assign(**{key: str(value) for key, value in environment.items()}).to_csv(index=False).encode())
        _notice(f"wrote {path}")
    page = out / f"{name}.md"
    write_file(page, markdown_page(title, result.summary, environment).encode())
    _notice(f"wrote {page}")


@contextmanager
def bench_progress(name: str) -> Iterator[Callable[[str], None]]:
    """A bar that says what a benchmark is at, without a terminal a line now and then; yields the callback that changes it."""
    last_line = -math.inf
    with _build_bar() as bar:
        task = bar.add_task(name, total=None, state="")

        def show(text: str) -> None:
            nonlocal last_line
            bar.update(task, state=text)
            if not _notices.is_terminal and time.monotonic() - last_line >= _LINE_INTERVAL_S:
                last_line = time.monotonic()
                _notice(f"{name}: {text}")

        yield show


@contextmanager
def crosscheck_progress() -> Iterator[Callable[[str, str, str, float], None]]:
    """A line that says what a cross-check is at, gone when it is done; yields the callback that changes it."""
    with _notices.status("") as status:

        def show(peer: str, attack: str, norm: str, eps: float) -> None:
            text = f"{peer}: {attack}, eps {format_eps(eps, norm)}"
            status.update(text)
            if not _notices.is_terminal:
                _notice(text)

        yield show


def print_crosscheck(evaluation: Evaluation, comparison: Comparison, missing: Sequence[str], path: Path) -> None:
    """Ours beside theirs, who could not take part and why; all of it as a CSV file."""
    table = Table(
        "attack", "eps", "library", "ours", "theirs, judged", "theirs, claimed", "only ours breaks", "only theirs",
        "difference (points)", "p", title=f"robust accuracy (%), {evaluation.manifest['model']['name']}",
    )
    for row in comparison.table.itertuples():
        accuracies = (row.robust_accuracy, row.peer_robust_accuracy, row.peer_claimed)
        points = [f"{100 * value:+.1f}" for value in (row.difference, row.low, row.high)]
        table.add_row(
            row.attack, f"{row.norm} {format_eps(row.eps, row.norm)}", row.peer, *(f"{100 * a:.1f}" for a in accuracies),
            str(row.only_ours), str(row.only_peer), f"{points[0]} ({points[1]} to {points[2]})", f"{row.p_value:.3g}",
        )
    if len(comparison.table):
        _tables.print(table)
        write_file(path, comparison.table.to_csv(index=False).encode())
        _notice("difference: what ours leaves standing less what theirs does, with a 95 % interval; p: exact McNemar")
        _notice(f"wrote {path}")
    for note in (*comparison.notes, *missing):
        _notice(note)


def print_weights(path: Path) -> None:
    """What a new weights file says of itself."""
    from lrrobust.models.weights import read_weights

    metadata = read_weights(path)[1]
    for accuracy in metadata.accuracy:
        _notice(f"{accuracy.dataset}: top-1 {100 * accuracy.top1:.2f} %, top-5 {100 * accuracy.top5:.2f} % of {accuracy.n}")
    _notice(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB): use it with --weights {path}")


def print_models() -> None:
    """Our networks, their size, and their shipped weights with what they score."""
    import torch

    from lrrobust.models.registry import NETWORKS
    from lrrobust.models.weights import SHIPPED_WEIGHTS, TRAINED_FOLDER, read_metadata

    table = Table("model", "parameters (M)", "weights", "classes", "input", "clean accuracy (%)", title="networks")
    for name, build in NETWORKS.items():
        with torch.device("meta"):
            count = sum(p.numel() for p in build(1000).parameters())
        size = f"{count / 1e6:.1f}"
        if name not in SHIPPED_WEIGHTS:
            table.add_row(name, size, "-", "-", "any", "-")
            continue
        for weights in SHIPPED_WEIGHTS[name].values():
            metadata = read_metadata(TRAINED_FOLDER / weights.file)
            scores = ", ".join(f"{100 * a.top1:.1f} ({a.dataset}, n = {a.n})" for a in metadata.accuracy)
            table.add_row(name, size, metadata.name, str(len(metadata.classes)), f"{metadata.input_size}", scores)
    _tables.print(table)
    _notice("also: any torchvision name, timm:NAME, path/to/file.py:factory; parameters are for 1000 classes")


def print_attacks() -> None:
    """The shipped attacks and suites."""
    from lrrobust.attacks.suite import list_attacks

    table = Table("name", "kind", "norm", "what it does", title="attacks and suites")
    for listing in list_attacks():
        table.add_row(listing.name, listing.kind, listing.norm, listing.description)
    _tables.print(table)
