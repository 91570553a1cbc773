"""Runs -> tables: robust accuracy with its interval, per attack and for the worst case."""

from __future__ import annotations

import math
import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import pandas as pd

from lrrobust.diagnostics.table import HOW_TO_READ as HOW_TO_READ_DIAGNOSTICS
from lrrobust.diagnostics.table import diagnostics_table
from lrrobust.errors import StoreError
from lrrobust.results import SCHEMA_VERSION, Run, breaking_eps, distances, manifest_value, write_file
from lrrobust.stats import balanced_share, curve_over_passes, median_with_failures, passes_up_to, wilson_interval
from lrrobust.tables import Cell, Column, Table, to_latex, to_markdown

if TYPE_CHECKING:
    from rich.table import Table as TerminalTable

#: Name of the rows that count an image as broken when any attack of the norm breaks it.
WORST_CASE = "worst_case"

#: Columns of a summary. Accuracies and interval are fractions, eps and median_distance pixel units of
#: [0, 1], wall_s seconds, passes images through the network, the mean over images of what was spent on one up to
#: that eps (`stats.passes_up_to`), NaN where not counted; dataset_sha256 tells apart datasets and subsets of one name.
#: surrogate names the model that the images were made on, where it is not the model itself; robust_accuracy_quantized is
#: NaN where it was not asked for. The balanced accuracies are means over classes, effective_n says how many images that
#: are spread evenly would tell as much (`stats.balanced_share`). is_cumulative: see `name_attack`.
SUMMARY_COLUMNS = (
    "model",
    "weights",
    "surrogate",
    "dataset",
    "attack",
    "norm",
    "eps",
    "n",
    "clean_accuracy",
    "robust_accuracy",
    "ci_low",
    "ci_high",
    "balanced_clean_accuracy",
    "balanced_robust_accuracy",
    "balanced_ci_low",
    "balanced_ci_high",
    "effective_n",
    "robust_accuracy_quantized",
    "median_distance",
    "wall_s",
    "forward_passes",
    "backward_passes",
    "is_cumulative",
    "is_complete",
    "run",
    "dataset_sha256",
)

#: Columns of the curves over passes; units as in a summary, `passes` of one image.
PASS_COLUMNS = ("run", "attack", "norm", "eps", "passes", "robust_accuracy")

#: Columns of the curves of minimal-norm attacks; units as in a summary.
CURVE_COLUMNS = (
    "model",
    "weights",
    "dataset",
    "attack",
    "norm",
    "eps",
    "n",
    "robust_accuracy",
    "ci_low",
    "ci_high",
    "is_complete",
    "run",
    "dataset_sha256",
)


def summarise_run(run: Run) -> pd.DataFrame:
    """One row for each attack and eps, then one `worst_case` row for each eps of a norm.

    An attack's rows cover the images it has finished. The worst case covers the images that every
    attack of the norm has finished, and is given for norms with more than one attack: an image counts
    as broken at eps when any of them has a verified adversarial image within eps, be it one found at
    a smaller eps or by a minimal-norm attack. It hence never rises with eps, nor with more attacks.

    Returns:
        Columns `SUMMARY_COLUMNS`. `median_distance` is over the images correct when clean, in the
        norm of the attack, failures counted as infinity, and NaN where an earlier attack of the suite broke
        images; `is_complete` is that of the run; `wall_s` adds up the rows summarised.

    Raises:
        StoreError: the manifest does not say what was evaluated.
    """
    return _summary(run, run.folder.resolve().name)


def summarise(runs: Sequence[Run]) -> pd.DataFrame:
    """The summaries of `runs`, one after the other; runs are never pooled.

    Returns:
        As `summarise_run`; `run` holds as much of the folders' paths as makes them differ, and so does `model` where
        files of one name hold different models.

    Raises:
        StoreError: a manifest does not say what was evaluated, or a folder is given twice.
    """
    named = name_runs(runs)
    models = _name_models(named)
    frames = [_summary(run, name).assign(model=models[name]) for name, run in named.items()]
    return _stacked(frames, SUMMARY_COLUMNS)


def minimal_norm_curves(runs: Sequence[Run]) -> pd.DataFrame:
    """Robust accuracy at every eps at once, for the attacks that search the nearest adversarial image.

    These are the attacks with rows at eps = infinity. Their robust accuracy at eps is the share of
    images that are correct when clean and whose adversarial image is farther away than eps: a step
    function, given by its value at 0 and at each distance found.

    Returns:
        Columns `CURVE_COLUMNS`, eps ascending within each run and attack.
    """
    curves = []
    for name, run in name_runs(runs).items():
        verdicts = _verdicts(run)
        for (attack, norm), group in verdicts.groupby(["attack", "norm"], sort=False):
            if not np.isinf(group["eps"]).any():
                continue
            # Over all rows of an image: what an earlier attack of the suite broke has no distance of this one's.
            images, image = np.unique(group["index"], return_inverse=True)
            broken_at = np.full(len(images), np.inf)
            np.minimum.at(broken_at, image, group["breaking_eps"].to_numpy())
            n, steps = len(images), np.unique(np.append(broken_at[np.isfinite(broken_at)], 0.0))
            robust = n - np.searchsorted(np.sort(broken_at), steps, side="right")
            low, high = np.transpose([wilson_interval(count, n) for count in robust.tolist()])
            curve = {"attack": attack, "norm": norm, "eps": steps, "n": n}
            curve |= {"robust_accuracy": robust / n, "ci_low": low, "ci_high": high}
            curves.append(pd.DataFrame(_identity(run, name) | curve)[list(CURVE_COLUMNS)])
    return _stacked(curves, CURVE_COLUMNS)


def pass_curves(runs: Mapping[str, Run], eps: Mapping[str, float]) -> tuple[pd.DataFrame, bool]:
    """Robust accuracy against the passes that each attack spent on an image.

    Args:
        runs: name, as in a summary, -> run.
        eps: norm -> the budget shown; attacks without it are left out, and those whose passes were not counted.

    Returns:
        Columns `PASS_COLUMNS`, passes ascending from 0 within each run and attack; and whether they include backward
        passes, which older runs did not count: then no run's are, so that they compare.
    """
    verdicts = {name: _verdicts(run) for name, run in runs.items()}
    shown = {name: found[found["eps"] == found["norm"].map(eps)] for name, found in verdicts.items()}
    with_backward = all(found["backward_passes"].notna().all() for found in shown.values())
    curves = []
    for name, found in shown.items():
        for (attack, norm), group in found.groupby(["attack", "norm"], sort=False):
            spent = group["forward_passes"] + (group["backward_passes"] if with_backward else 0)
            if spent.isna().any():
                continue
            passes, accuracy = curve_over_passes(spent, group["is_clean_correct"], group["is_broken"])
            if group["is_broken_earlier"].any():
                attack += ", cumulative"
            curve = {"run": name, "attack": attack, "norm": norm, "eps": eps[norm], "passes": passes, "robust_accuracy": accuracy}
            curves.append(pd.DataFrame(curve))
    return _stacked(curves, PASS_COLUMNS), with_backward


def format_row(row: Mapping[str, Any]) -> dict[str, str]:
    """A row of a summary as people read it: heading -> text, accuracies in percent.

    An asterisk after n marks a run that is not complete.

    >>> format_row({"model": "lrnet", "weights": None, "dataset": "sample", "attack": "pgd", "norm": "linf",
    ...     "eps": 0.5 / 255, "n": 1000, "clean_accuracy": 0.76, "robust_accuracy": 0.5, "ci_low": 0.469,
    ...     "ci_high": 0.531, "balanced_clean_accuracy": 0.7, "balanced_robust_accuracy": 0.5, "balanced_ci_low": 0.4,
    ...     "balanced_ci_high": 0.6, "effective_n": 950.0, "is_cumulative": False, "surrogate": None,
    ...     "robust_accuracy_quantized": float("nan"), "median_distance": float("inf"), "wall_s": 75.0, "forward_passes": 20.0, "backward_passes": 20.0, "is_complete": True, "run": "first"})["eps"]
    '0.5/255'
    """
    return {
        "model": row["model"],
        "weights": "-" if pd.isna(row["weights"]) or not row["weights"] else row["weights"],
        "images made on": "-" if pd.isna(row["surrogate"]) else row["surrogate"],
        "dataset": row["dataset"],
        "attack": name_attack(row["attack"], row["is_cumulative"]),
        "norm": row["norm"],
        "eps": format_eps(row["eps"], row["norm"]),
        "n": f"{row['n']}" if row["is_complete"] else f"{row['n']}*",
        "clean %": _percent(row["clean_accuracy"]),
        "robust %": _percent(row["robust_accuracy"]),
        "95 % CI": f"{_percent(row['ci_low'])}-{_percent(row['ci_high'])}",
        "balanced clean %": _unless_even(row, _percent(row["balanced_clean_accuracy"])),
        "balanced %": _unless_even(row, _percent(row["balanced_robust_accuracy"])),
        "balanced 95 % CI": _unless_even(row, f"{_percent(row['balanced_ci_low'])}-{_percent(row['balanced_ci_high'])}"),
        "8-bit robust %": "-" if pd.isna(row["robust_accuracy_quantized"]) else _percent(row["robust_accuracy_quantized"]),
        "median distance": format_distance(row["median_distance"], row["norm"]),
        "time": _format_duration(row["wall_s"]),
        "passes": _format_passes(row["forward_passes"], row["backward_passes"]),
        "run": row["run"],
    }


def name_attack(attack: str, is_cumulative: bool) -> str:
    """An attack as tables call it, marked where its robust accuracy is not its own work alone.

    An attack of a suite such as `strong` meets only what the attacks before it left standing, and what those broke
    counts as broken in its rows.
    """
    return f"{attack}†" if is_cumulative else attack


def _unless_even(row: Mapping[str, Any], text: str) -> str:
    """Where images are spread evenly over classes, balanced accuracy says nothing that plain accuracy does not."""
    return text if row["effective_n"] < _EVEN_SHARE * row["n"] else "-"


def format_eps(eps: float, norm: str) -> str:
    """A radius in pixel units as people write it.

    >>> format_eps(4 / 255, "linf"), format_eps(0.5, "l2"), format_eps(float("inf"), "l2")
    ('4/255', '0.5', 'any')
    """
    if math.isinf(eps):
        return "any"
    return f"{eps * 255:.4g}/255" if norm == "linf" and eps > 0 else f"{eps:.4g}"


def render_table(summary: pd.DataFrame) -> TerminalTable:
    """The summary for a terminal; unfinished runs are named below it."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table as TerminalTable

    rows = [format_row(row) for row in summary.to_dict("records")]
    # What all rows share goes above the table, which is wide enough without.
    shared = [name for name in _IDENTITY_HEADINGS[:-1] if len({row[name] for row in rows}) == 1]
    title = ", ".join(f"{name} {rows[0][name]}" for name in shared)
    unfinished = dict.fromkeys(row["run"] for row in rows if row["n"].endswith("*"))
    captions = [f"* incomplete, only the images finished so far: {', '.join(unfinished)}"] if unfinished else []
    captions += [HOW_TO_READ_CUMULATIVE] if summary["is_cumulative"].any() else []
    caption = "\n".join(captions)
    table = TerminalTable(box=box.SIMPLE, padding=0, show_edge=False, title=escape(title) or None, caption=escape(caption) or None)
    # Folder names are long; only runs that nothing else tells apart need them.
    identities = {(row["dataset"], row["model"], row["weights"], row["images made on"]) for row in rows}
    needs_run = len({row["run"] for row in rows}) > len(identities)
    # What would make it wider than a terminal, files and the page have.
    hidden = {*shared, *_FOR_FILES, *_unused(rows), *(() if needs_run else ("run",))}
    shown = [heading for heading in (rows[0] if rows else ()) if heading not in hidden]
    for heading in shown:
        # Headings on two lines: the table fits a terminal of 80 columns, with no number cut.
        lines = "\n".join(part for part in heading.rpartition(" ")[::2] if part)
        table.add_column(lines, justify="left" if heading in _TEXT_HEADINGS else "right", no_wrap=heading != "run")
    for row in rows:
        table.add_row(*(escape(row[heading]) for heading in shown))
    return table


#: Columns that a terminal has no room for.
_FOR_FILES = ("passes", "balanced clean %", "balanced 95 % CI")

#: Heading -> the column that a table is sorted by; other columns sort by what they show.
_SORT_COLUMNS = {
    "balanced clean %": "balanced_clean_accuracy",
    "balanced %": "balanced_robust_accuracy",
    "balanced 95 % CI": "balanced_ci_low",
    "eps": "eps",
    "n": "n",
    "clean %": "clean_accuracy",
    "robust %": "robust_accuracy",
    "95 % CI": "ci_low",
    "8-bit robust %": "robust_accuracy_quantized",
    "median distance": "median_distance",
    "time": "wall_s",
    "passes": "forward_passes",
}


def summary_table(summary: pd.DataFrame) -> Table:
    """The summary of one dataset as people read it, see `format_row`."""
    rows = [(record, format_row(record)) for record in summary.to_dict("records")]
    hidden = {"dataset", *_unused([texts for _, texts in rows])}
    shown = [heading for heading in (rows[0][1] if rows else ()) if heading not in hidden]
    return Table(
        [Column(heading, heading in _TEXT_HEADINGS) for heading in shown],
        [
            [Cell(texts[name], float(record[_SORT_COLUMNS[name]]) if name in _SORT_COLUMNS else texts[name]) for name in shown]
            for record, texts in rows
        ],
    )


class Drawing(NamedTuple):
    """A figure of the runs on one set of images: what it shows in words, and kind ("png", "svg", "pdf") -> content."""

    dataset_sha256: str
    stem: str
    description: str
    files: Mapping[str, bytes]


def draw_runs(
    runs: Sequence[Run], kinds: Sequence[str] = ("png", "svg", "pdf"), summary: pd.DataFrame | None = None
) -> list[Drawing]:
    """The figures of runs, for each set of images: robust accuracy against eps by norm, then against passes.

    Args:
        runs: of any sets of images.
        kinds: of "png", "svg", "pdf".
        summary: made by `summarise` of the same runs; None makes it.

    Raises:
        StoreError: a manifest does not say what was evaluated, or a folder is given twice.
    """
    # Matplotlib takes most of a second to load; tables do without.
    from lrrobust.plots import render_robustness_curves

    named, curves = name_runs(runs), minimal_norm_curves(runs)
    summary = summarise(runs) if summary is None else summary
    drawings = []
    # Attacks on the model itself alone: transfer has its own tables.
    summary = summary[summary["surrogate"].isna()]
    for sha256, of_dataset in summary.groupby("dataset_sha256", sort=False):
        models = ", ".join(dict.fromkeys(of_dataset["model"]))
        stem = f"{slug(of_dataset['dataset'].iloc[0])}_{sha256[:8]}"
        for norm in of_dataset["norm"].unique():
            if files := render_robustness_curves(of_dataset, norm, kinds, curves):
                description = f"Robust accuracy against {norm} eps: {models}"
                drawings.append(Drawing(sha256, f"robust_accuracy_{stem}_{norm}", description, files))
        if files := _draw_passes({name: named[name] for name in of_dataset["run"].unique()}, of_dataset, kinds):
            drawings.append(Drawing(sha256, f"passes_{stem}", f"Robust accuracy against passes: {models}", files))
    return drawings


def _draw_passes(runs: Mapping[str, Run], summary: pd.DataFrame, kinds: Sequence[str]) -> dict[str, bytes]:
    """A panel for each norm and run of a dataset, at one eps of each norm; nothing where no passes were counted."""
    from lrrobust.plots import label_runs, render_passes

    eps = {norm: found for norm, rows in summary.groupby("norm", sort=False) if (found := telling_eps(rows)) is not None}
    curves, with_backward = pass_curves(runs, eps)
    if curves.empty:
        return {}
    labels = label_runs(summary)
    panel = curves["run"].map(labels) + ", " + curves["norm"] + " " + curves["norm"].map({n: format_eps(e, n) for n, e in eps.items()})
    # All runs of a norm side by side.
    curves = curves.assign(panel=panel).sort_values("norm", key=lambda norms: norms.map(list(eps).index), kind="stable")
    what = "forward and backward passes" if with_backward else "forward passes"
    title = f"{summary['dataset'].iloc[0]}: robust accuracy against {what}"
    return render_passes(curves, title, f"{what}, an image", min(3, len(runs)), kinds)


def telling_eps(rows: pd.DataFrame) -> float | None:
    """The eps of a norm that tells attacks apart best: where about half of the accuracy is left in the worst case.

    Args:
        rows: of a summary, of one norm and dataset.

    Returns:
        Of the finite eps above 0, that at which the mean robust accuracy of all runs is nearest to half of their
        clean accuracy, the smallest of several; None where there is none.
    """
    worst = rows[rows["attack"] == WORST_CASE]
    found = rows if worst.empty else worst
    found = found[np.isfinite(found["eps"]) & (found["eps"] > 0)]
    if found.empty:
        return None
    means = found.groupby("eps")[["robust_accuracy", "clean_accuracy"]].mean()
    return float((means["robust_accuracy"] - means["clean_accuracy"] / 2).abs().idxmin())


class Reproduction(NamedTuple):
    """What makes a report again: the commits that its runs were made with, and every command once, the report's last."""

    commits: Sequence[str]
    commands: Sequence[str]

    @property
    def how(self) -> str:
        if not self.commits:
            return "With the versions given:"
        return f"With the code at commit {', '.join(self.commits).replace('-dirty', ' with uncommitted changes')}:"


def reproduction(runs: Sequence[Run], command: Sequence[str]) -> Reproduction:
    """Args: runs in their order; command of the report itself, as in `sys.argv`."""
    found = {str(commit) for run in runs if (commit := (run.manifest.get("provenance") or {}).get("commit"))}
    evaluations = [format_command(run.manifest["command"]) for run in runs if run.manifest.get("command")]
    return Reproduction(sorted(found), [*dict.fromkeys(evaluations), format_command(command)])


def format_command(command: Sequence[str]) -> str:
    """A command line as a shell takes it; where the program lies is a matter of the machine."""
    return shlex.join(["lrrobust", *map(str, command[1:])])


def write_report(
    runs: Sequence[Run],
    out_dir: Path,
    drawings: Sequence[Drawing] | None = None,
    summary: pd.DataFrame | None = None,
    command: Sequence[str] | None = None,
) -> list[Path]:
    """Write `robust_accuracy.csv`, `.md` and `.tex`, and the figures of each dataset and norm.

    The CSV holds a summary at full precision, Markdown and LaTeX what people read, Markdown with the
    dataset, fingerprints and versions above the numbers. Figures come as PNG, SVG and PDF.

    Args:
        runs: at least one.
        out_dir: created where missing.
        drawings, summary: made by `draw_runs` and `summarise` of the same runs; None makes them.
        command: of the report itself, as in `sys.argv`, for the head of the Markdown; None leaves that out.

    Returns:
        The files written.

    Raises:
        StoreError: there are no runs, a manifest does not say what was evaluated, or `out_dir` cannot
            be written.
    """
    if not runs:
        raise StoreError("expected at least one run to report, found none: give the folder of a run")
    out_dir = Path(out_dir)
    summary = summarise(runs) if summary is None else summary
    figures = []
    drawings = draw_runs(runs, summary=summary) if drawings is None else drawings
    for drawing in drawings:
        for kind, content in drawing.files.items():
            figures.append(out_dir / f"{drawing.stem}.{kind}")
            write_file(figures[-1], content)

    table, text, latex = (out_dir / f"robust_accuracy.{suffix}" for suffix in ("csv", "md", "tex"))
    write_file(table, summary.to_csv(index=False, lineterminator="\n").encode())
    write_file(text, _markdown(runs, summary, drawings, command).encode())
    write_file(latex, _latex(summary).encode())
    return [table, text, latex, *figures]


#: What the numbers of a summary mean.
HOW_TO_READ = (
    "Accuracies in percent of all images; an image misclassified without attack counts as broken. "
    "Intervals are 95 % Wilson intervals. Distances are medians over the images correct when clean, "
    "a failed attack counting as infinite. Passes are forward + backward passes through the network, the mean of what "
    "was spent on an image up to that eps."
)

#: What the column of rounded images means, where there is one.
HOW_TO_READ_QUANTIZED = (
    "8-bit: an image counts as broken once its adversarial image still fools the model when rounded to 8 bits inside ball "
    "and box, at the size that the model takes. The attacks do not know of the rounding: an upper bound."
)

#: What the mark of `name_attack` means.
HOW_TO_READ_CUMULATIVE = (
    "† attacked only what earlier attacks of its suite left standing: its robust accuracy counts what any of them broke."
)

#: What the balanced columns mean, where there are any.
HOW_TO_READ_BALANCED = (
    "Balanced: the mean of the classes' accuracies, as some classes have many more images here than others; intervals are "
    "put together from Wilson intervals of the classes with as many images."
)

#: Headings that are left out where no row has anything to say under them.
_OPTIONAL_HEADINGS = ("images made on", "balanced clean %", "balanced %", "balanced 95 % CI", "8-bit robust %")

#: Share of the images that those of even classes would make up before classes count as uneven.
_EVEN_SHARE = 2 / 3


def how_to_read(summary: pd.DataFrame) -> list[str]:
    """What a reader of the table of a summary must know, in paragraphs."""
    texts = [HOW_TO_READ]
    if summary["is_cumulative"].any():
        texts.append(HOW_TO_READ_CUMULATIVE)
    if (summary["effective_n"] < _EVEN_SHARE * summary["n"]).any():
        texts.append(HOW_TO_READ_BALANCED)
    if summary["robust_accuracy_quantized"].notna().any():
        texts.append(HOW_TO_READ_QUANTIZED)
    return texts


def _unused(rows: Sequence[Mapping[str, str]]) -> list[str]:
    return [heading for heading in _OPTIONAL_HEADINGS if all(row[heading] == "-" for row in rows)]


#: Part metadata that the engine writes only where something is wrong.
_WARNING_KEYS = ("randomised", "probabilities", "nonfinite_gradients")

_IDENTITY_HEADINGS = ("dataset", "model", "weights", "run")
_TEXT_HEADINGS = {*_IDENTITY_HEADINGS, "images made on", "attack", "norm"}


def name_runs(runs: Sequence[Run]) -> dict[str, Run]:
    """Each run under the end of its path, as long as it takes for all to differ."""
    folders = [run.folder.resolve() for run in runs]
    for folder in folders:
        if folders.count(folder) > 1:
            raise StoreError(f"expected different runs, got {folder} twice: give each once")
    depth = 1
    while len(names := {"/".join(folder.parts[-depth:]): run for folder, run in zip(folders, runs)}) < len(runs):
        depth += 1
    return names


def _name_models(named: Mapping[str, Run]) -> dict[str, str]:
    """Run -> its model's name, with as much of the path as tells apart files of one name that hold other code.

    The path is the one given on the command line, which manifests keep beside what identifies the run.
    """
    names = {run: manifest_value(of, "model", "name") for run, of in named.items()}
    paths = {run: _model_path(of, names[run]) for run, of in named.items()}
    for shared in set(names.values()):
        runs = [run for run, name in names.items() if name == shared]
        if len({named[run].manifest["model"].get("code_sha256") for run in runs}) < 2:
            continue
        given = {paths[run] for run in runs}
        depth = 1
        while len({path.parts[-depth:] for path in given}) < len(given):
            depth += 1
        names |= {run: "/".join(paths[run].parts[-depth:]) for run in runs}
    return names


def _model_path(run: Run, name: str) -> PurePath:
    """What the command line called the model of a run; its name where the manifest does not say."""
    request, position = run.manifest.get("request"), run.manifest.get("position")
    if not isinstance(request, dict) or not isinstance(position, int):
        return PurePath(name)
    # Models one after the other, each with all surrogates.
    place = position // max(1, len(request.get("surrogates", ())))
    given = request.get("models", ())[place : place + 1]
    return PurePath(os.path.normpath(given[0])) if given and PurePath(given[0]).name == name else PurePath(name)


def _summary(run: Run, name: str) -> pd.DataFrame:
    verdicts = _verdicts(run)
    # As far as another attack had a hand in its rows.
    cumulative = set(verdicts.loc[verdicts["is_broken_earlier"], "attack"])
    records = [
        {"attack": attack, "norm": norm, "eps": eps, "is_cumulative": attack in cumulative} | _accuracies(group, attack in cumulative)
        for (attack, norm), of_attack in verdicts.groupby(["attack", "norm"], sort=False)
        for eps, group in of_attack.groupby("eps")
    ]
    for norm, of_norm in verdicts.groupby("norm", sort=False):
        records.extend({"attack": WORST_CASE, "norm": norm, "is_cumulative": False} | record for record in _worst_cases(run, norm, of_norm))
    identity = _identity(run, name)
    return pd.DataFrame([identity | record for record in records], columns=list(SUMMARY_COLUMNS))


#: Run -> its verdicts, which tables, exact curves and curves over passes all start from.
_VERDICTS: WeakKeyDictionary[Run, pd.DataFrame] = WeakKeyDictionary()


def _verdicts(run: Run) -> pd.DataFrame:
    """What the numbers need of a run's rows, in plain dtypes; `distance` is infinite where none is known.

    Passes are those up to the row's eps, see `stats.passes_up_to`; `breaking_eps` as `breaking_eps` says. Made once for
    each run: not to be changed.
    """
    if run not in _VERDICTS:
        _VERDICTS[run] = _plain_verdicts(run)
    return _VERDICTS[run]


def _plain_verdicts(run: Run) -> pd.DataFrame:
    rows = run.rows
    verdicts = pd.DataFrame(
        {
            "index": rows["index"].to_numpy(np.int64),
            "label": rows["label"].to_numpy(np.int64),
            "attack": rows["attack"].to_numpy(object),
            "norm": rows["norm"].to_numpy(object),
            "eps": rows["eps"].to_numpy(np.float64),
            "is_broken_earlier": (rows["outcome"] == "broken_by_earlier_attack").to_numpy(bool),
            "is_clean_correct": rows["is_clean_correct"].to_numpy(bool),
            "is_broken": rows["is_broken"].to_numpy(bool),
            "is_broken_quantized": _is_broken_quantized(run),
            "distance": distances(rows),
            "breaking_eps": breaking_eps(rows),
            "wall_s": rows["wall_s"].to_numpy(np.float64),
        }
    )
    for name in ("forward_passes", "backward_passes"):
        spent = rows[name].to_numpy(np.float64, na_value=np.nan)
        for places in verdicts.groupby("attack", sort=False).indices.values():
            spent[places] = passes_up_to(verdicts["index"].to_numpy()[places], verdicts["eps"].to_numpy()[places], spent[places])
        verdicts[name] = spent
    return verdicts


def _is_broken_quantized(run: Run) -> np.ndarray:
    """By row 1.0 or 0.0: broken also when adversarial images are held in 8 bits; NaN where that was not asked for."""
    rows = run.rows
    if run.manifest.get("real_pixels") is None:
        return np.full(len(rows), np.nan)
    is_broken = rows["is_broken_quantized"].fillna(False).to_numpy(bool)
    # Attacks that leave broken images out leave out those that are broken in 8 bits.
    is_broken |= (rows["outcome"] == "broken_by_earlier_attack").to_numpy(bool)
    return (is_broken | ~rows["is_clean_correct"].to_numpy(bool)).astype(np.float64)


def _accuracies(verdicts: pd.DataFrame, is_cumulative: bool = False) -> dict[str, Any]:
    """Numbers of one attack at one eps; `verdicts` has one row for each image, at least one."""
    balanced = balanced_share(~verdicts["is_broken"], verdicts["label"])
    n, robust = len(verdicts), int((~verdicts["is_broken"]).sum())
    attacked = verdicts.loc[verdicts["is_clean_correct"], "distance"]
    low, high = wilson_interval(robust, n)
    return {
        "n": n,
        "clean_accuracy": len(attacked) / n,
        "robust_accuracy": robust / n,
        "ci_low": low,
        "ci_high": high,
        "balanced_clean_accuracy": balanced_share(verdicts["is_clean_correct"], verdicts["label"]).share,
        "balanced_robust_accuracy": balanced.share,
        "balanced_ci_low": balanced.low,
        "balanced_ci_high": balanced.high,
        "effective_n": balanced.effective_n,
        "robust_accuracy_quantized": float(1 - verdicts["is_broken_quantized"].mean()),
        # What an earlier attack broke was not attacked: there is no distance, and that is no failure.
        "median_distance": math.nan if is_cumulative else median_with_failures(attacked[np.isfinite(attacked)], len(attacked)),
        "wall_s": float(verdicts["wall_s"].sum()),
        "forward_passes": float(verdicts["forward_passes"].mean(skipna=False)),
        "backward_passes": float(verdicts["backward_passes"].mean(skipna=False)),
    }


def _worst_cases(run: Run, norm: str, verdicts: pd.DataFrame) -> Iterator[dict[str, Any]]:
    attacks = {spec["name"] for spec in manifest_value(run, "attacks") if spec["norm"] == norm}
    if len(attacks) < 2:
        return
    images, image = np.unique(verdicts["index"], return_inverse=True)
    made = np.zeros((len(images), verdicts["attack"].nunique()), dtype=bool)
    made[image, pd.factorize(verdicts["attack"])[0]] = True
    is_finished = made.sum(axis=1) == len(attacks)
    if not is_finished.any():
        return
    eps = verdicts["eps"].to_numpy()
    worst, nearest, worst_quantized = np.full((3, len(images)), np.inf)
    np.minimum.at(worst, image, verdicts["breaking_eps"].to_numpy())
    np.minimum.at(nearest, image, verdicts["distance"].to_numpy())
    is_clean_correct = np.ones(len(images), dtype=bool)
    is_clean_correct[image[~verdicts["is_clean_correct"].to_numpy()]] = False
    labels = np.zeros(len(images), dtype=np.int64)
    labels[image] = verdicts["label"].to_numpy()
    # The distance of a rounded image is not in the rows: it counts from the eps of its row, at any distance at the latest.
    quantized = verdicts["is_broken_quantized"].to_numpy()
    row_eps = np.minimum(eps, np.finfo(np.float64).max)
    np.minimum.at(worst_quantized, image, np.where(quantized == 1, row_eps, np.inf))
    worst_quantized[~is_clean_correct] = 0.0
    is_asked = not np.isnan(quantized).any()
    for at in np.unique(eps[is_finished[image]]):
        # At eps = infinity `worst <= at` would hold for the unbroken too.
        is_broken = (worst <= at) & np.isfinite(worst)
        is_quantized = (worst_quantized <= at) & np.isfinite(worst_quantized)
        rows = eps == at
        spent = {
            name: np.bincount(image[rows], verdicts[name].to_numpy()[rows], len(images))
            for name in ("wall_s", "forward_passes", "backward_passes")
        }
        columns = {
            "label": labels,
            "is_clean_correct": is_clean_correct,
            "is_broken": is_broken,
            "is_broken_quantized": is_quantized.astype(float) if is_asked else np.full(len(images), np.nan),
            "distance": np.where(is_broken, nearest, np.inf),
        }
        yield {"eps": float(at)} | _accuracies(pd.DataFrame(columns | spent)[is_finished])


def _identity(run: Run, name: str) -> dict[str, Any]:
    weights = manifest_value(run, "model", "weights")
    surrogate = run.manifest.get("surrogate")
    return {
        "model": manifest_value(run, "model", "name"),
        "weights": None if weights is None else str(weights),
        "surrogate": None if surrogate is None else str(surrogate["name"]),
        "dataset": manifest_value(run, "dataset", "name"),
        "is_complete": run.is_complete,
        "run": name,
        "dataset_sha256": manifest_value(run, "dataset", "sha256"),
    }


def _stacked(frames: Sequence[pd.DataFrame], columns: Sequence[str]) -> pd.DataFrame:
    # Empty frames have no dtypes worth keeping, and pandas warns when it has to guess.
    filled = [frame for frame in frames if not frame.empty]
    return pd.concat(filled, ignore_index=True) if filled else pd.DataFrame(columns=list(columns))


def _markdown(
    runs: Sequence[Run], summary: pd.DataFrame, drawings: Sequence[Drawing], command: Sequence[str] | None
) -> str:
    by_dataset: dict[str, dict[str, Run]] = {}
    for name, run in name_runs(runs).items():
        by_dataset.setdefault(manifest_value(run, "dataset", "sha256"), {})[name] = run

    lines = ["# Robust accuracy"]
    if command is not None:
        again = reproduction(runs, command)
        lines += ["", again.how, "", *(f"    {line}" for line in again.commands)]
    lines += [*(line for text in how_to_read(summary) for line in ("", text))]
    for sha256, of_dataset in by_dataset.items():
        any_run = next(iter(of_dataset.values()))
        name, n = manifest_value(any_run, "dataset", "name"), manifest_value(any_run, "dataset", "n")
        lines += ["", f"## {name}, n = {n}", ""]
        lines += [f"Dataset sha256 `{sha256}`.", ""]
        lines += [f"* {_describe(run, name)}" for name, run in of_dataset.items()]
        table = summary_table(summary[summary["dataset_sha256"] == sha256])
        lines += ["", *(to_markdown(table) if table.rows else ["No part is finished yet."])]
        lines += [f"\n![{drawing.description}]({drawing.stem}.png)" for drawing in drawings if drawing.dataset_sha256 == sha256]
        diagnostics = diagnostics_table(of_dataset)
        if diagnostics.rows:
            lines += ["", "### Did the attacks work?", "", HOW_TO_READ_DIAGNOSTICS, "", *to_markdown(diagnostics)]
    return "\n".join(lines) + "\n"


def _latex(summary: pd.DataFrame) -> str:
    return "\n".join(
        to_latex(
            summary_table(of_dataset), f"Robust accuracy on {of_dataset['dataset'].iloc[0]}. {' '.join(how_to_read(of_dataset))}"
        )
        for _, of_dataset in summary.groupby("dataset_sha256", sort=False)
    )


def _describe(run: Run, name: str) -> str:
    """One line on a run: identity, versions, and all that a reader must know to trust its numbers."""
    manifest = run.manifest
    text = f"`{name}`: {manifest['model']['name']}, weights {manifest['model']['weights'] or '-'}"
    if manifest.get("surrogate"):
        text += f", judging images made on {manifest['surrogate']['name']}"
    text += f", fingerprint `{manifest['fingerprint']}`, schema {SCHEMA_VERSION}"
    provenance = manifest.get("provenance") or {}
    versions = provenance.get("versions")
    if isinstance(versions, Mapping):
        text += ", " + ", ".join(f"{name} {version}" for name, version in versions.items())
    if provenance.get("commit"):
        text += f", commit `{provenance['commit']}`"
    for warning in warnings_of(run):
        text += f"; **WARNING: {warning}**"
    for key, values in sorted(mixed_metadata(run).items()):
        text += f"; **computed with mixed {key}:** {', '.join(values)}"
    if not run.is_complete:
        planned = len(manifest.get("plan", {}).get("parts", []))
        text += f"; **INCOMPLETE:** {len(run.part_metadata)} of {planned} parts, "
        text += "numbers (marked * at n) cover only the images finished by each attack"
    return text


def warnings_of(run: Run) -> list[str]:
    """What the engine noticed while it computed the run and readers of its numbers must know."""
    noticed = {key: part[key] for part in run.part_metadata.values() for key in _WARNING_KEYS if key in part}
    return [f"{key.replace('_', ' ')}: {text}" for key, text in sorted(noticed.items())]


def mixed_metadata(run: Run) -> dict[str, list[str]]:
    """The metadata in which the parts of a run differ, such as devices, with their values."""
    keys = {key for metadata in run.part_metadata.values() for key in metadata} - set(_WARNING_KEYS)
    values = {key: sorted({part.get(key, "unknown") for part in run.part_metadata.values()}) for key in keys}
    return {key: found for key, found in values.items() if len(found) > 1}


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}"


def format_distance(distance: float, norm: str) -> str:
    if math.isnan(distance):
        return "-"
    if math.isinf(distance):
        return "inf"
    return f"{distance * 255:.3g}/255" if norm == "linf" else f"{distance:.3g}"


def _format_duration(wall_s: float) -> str:
    if wall_s < 100:
        return f"{wall_s:.3g} s"
    return f"{wall_s / 60:.1f} min" if wall_s < 6000 else f"{wall_s / 3600:.1f} h"


def _format_passes(forward: float, backward: float) -> str:
    """Forward and backward passes; where only some were counted, a question mark stands for the others."""
    if pd.isna(forward) and pd.isna(backward):
        return "-"
    return "+".join("?" if pd.isna(passes) else f"{passes:.3g}" for passes in (forward, backward))


def slug(name: str) -> str:
    """A name as part of a file's name."""
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-").lower()
