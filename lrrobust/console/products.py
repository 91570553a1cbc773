"""What other commands made and measured: exported images, baselines, benchmarks, cross-checks, weights."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from lrrobust.console.streams import notice, print_table
from lrrobust.formatting import format_count, format_eps
from lrrobust.results import write_file

if TYPE_CHECKING:
    from lrrobust.bench.suites import BenchRequest, BenchResult
    from lrrobust.check.baseline import Baseline
    from lrrobust.crosscheck import Comparison
    from lrrobust.export import Exported
    from lrrobust.planned_evaluation import Evaluation
    from lrrobust.verify import Verification


def print_export(export: Exported) -> None:
    """How many images were written, and where."""
    notice(f"wrote {format_count(len(export.rows), 'adversarial image')} of {export.about['model']['name']} to {export.folder}")
    if not export.about["is_complete"]:
        notice("warning: the run is not finished, or lost some of its images: run its command again, and export it again")
    notice(f"`lrrobust verify {export.folder} --model ...` reads them back and judges them again")


def print_verification(found: Sequence[Verification], is_same_model: bool) -> None:
    """What a model makes of exported images, attack by attack."""
    columns = ("attack", "images", "within eps", "correct when clean", "adversarial", "predicted as recorded")
    table = Table(*columns, title="exported images, read back and judged again")
    for each in found:
        counts = (each.n, each.in_ball, each.clean_correct, each.adversarial, each.as_recorded)
        table.add_row(each.attack, *map(str, counts))
    print_table(table)
    if not found:
        notice(
            "warning: there was no image to judge: the attacks found none that outlasts the rounding, or the run was not "
            "finished"
        )
    if not is_same_model:
        notice("this is not the model that the images were verified with: they need not be adversarial for it")


def print_baseline(path: Path, before: Baseline | None, now: Baseline, doubt: str | None = None) -> None:
    """What a baseline now holds, what it no longer says of the evaluation, and why no check against it could fail."""
    from lrrobust.check.compare import find_differences, smallest_noticed_fall

    if before is not None:
        manifests = [{**now.protocol, "model": of_model.model} for of_model in now.models]
        for changes in find_differences(before, manifests):
            for change in changes:
                notice(f"new in the baseline: {change}")
    for of_model in now.models:
        accuracies = [measurement.robust_accuracy for measurement in of_model.measurements]
        clean = "not known" if of_model.clean_accuracy is None else f"{100 * of_model.clean_accuracy:.1f} %"
        low, high = (f"{100 * extreme(accuracies):.1f}" for extreme in (min, max))
        robust = (
            f"{len(accuracies)} robust accuracies from {low} to {high}" if len(accuracies) > 1 else f"robust accuracy {low}"
        )
        n = format_count(of_model.measurements[0].n, "image")
        notice(f"{of_model.name}: {robust} % on {n}, clean accuracy {clean}")
    noticed = smallest_noticed_fall(now)
    if doubt is not None:
        logging.warning("%s", doubt)
    elif noticed is None:
        logging.warning(
            "%s is not sure to notice a fall of every model: the loss of all its robust images may pass as chance; take more "
            "images, or a smaller eps",
            path,
        )
    else:
        notice(f"a check is sure to notice a fall of {100 * noticed / now.models[0].measurements[0].n:.1f} points")
    notice(f"wrote {path}: commit it; `lrrobust check {path}` does the evaluation again and compares")


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
    print_table(table)
    for kind, frame in (("times", result.times), ("summary", result.summary)) if is_timed else (("summary", result.summary),):
        path = out / f"{name}-{kind}.csv"
        write_file(path, frame.assign(**{key: str(value) for key, value in environment.items()}).to_csv(index=False).encode())
        notice(f"wrote {path}")
    page = out / f"{name}.md"
    write_file(page, markdown_page(title, result.summary, environment).encode())
    notice(f"wrote {page}")


def print_crosscheck(evaluation: Evaluation, comparison: Comparison, missing: Sequence[str], path: Path) -> None:
    """Ours beside theirs, who could not take part and why; all of it as a CSV file."""
    table = Table(
        "attack",
        "eps",
        "library",
        "ours",
        "theirs, judged",
        "theirs, claimed",
        "only ours breaks",
        "only theirs",
        "difference (points)",
        "p",
        title=f"robust accuracy (%), {evaluation.manifest['model']['name']}",
    )
    for row in comparison.table.itertuples():
        accuracies = (row.robust_accuracy, row.peer_robust_accuracy, row.peer_claimed)
        points = [f"{100 * value:+.1f}" for value in (row.difference, row.low, row.high)]
        table.add_row(
            row.attack,
            f"{row.norm} {format_eps(row.eps, row.norm)}",
            row.peer,
            *(f"{100 * a:.1f}" for a in accuracies),
            str(row.only_ours),
            str(row.only_peer),
            f"{points[0]} ({points[1]} to {points[2]})",
            f"{row.p_value:.3g}",
        )
    if len(comparison.table):
        print_table(table)
        write_file(path, comparison.table.to_csv(index=False).encode())
        notice("difference: what ours leaves standing less what theirs does, with a 95 % interval; p: exact McNemar")
        notice(f"wrote {path}")
    for note in (*comparison.notes, *missing):
        notice(note)


def print_weights(path: Path) -> None:
    """What a new weights file says of itself."""
    from lrrobust.models.weights import read_weights

    metadata = read_weights(path)[1]
    for accuracy in metadata.accuracy:
        # Of five classes or fewer, every answer is among the first five.
        top5 = f", top-5 {100 * accuracy.top5:.2f} %" if len(metadata.classes) > 5 else ""
        notice(f"{accuracy.dataset}: top-1 {100 * accuracy.top1:.2f} %{top5} of {format_count(accuracy.n, 'image')}")
    notice(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB): use it with --weights {path}")
