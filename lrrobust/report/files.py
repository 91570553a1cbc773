"""Runs -> tables and figures as files: CSV, Markdown, LaTeX, PNG, SVG and PDF."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from lrrobust.diagnostics.table import HOW_TO_READ as HOW_TO_READ_DIAGNOSTICS
from lrrobust.diagnostics.table import diagnostics_table
from lrrobust.report.drawing import Drawing
from lrrobust.report.naming import by_images, name_runs
from lrrobust.report.notices import mixed_metadata, warnings_with_rejections
from lrrobust.report.reproduction import reproduction
from lrrobust.report.summary_table import how_to_read, summary_table
from lrrobust.report.worst_case import WorstCases
from lrrobust.results import SCHEMA_VERSION, Run, manifest_value, write_file
from lrrobust.tables import to_latex, to_markdown


def write_report(
    runs: Sequence[Run],
    out_dir: Path,
    drawings: Sequence[Drawing],
    summary: pd.DataFrame,
    command: Sequence[str],
    worst: Mapping[str, WorstCases],
) -> list[Path]:
    """Write `robust_accuracy` and `worst_case` as `.csv`, `.md` and `.tex`, and the figures of each dataset and norm.

    The CSV holds numbers at full precision (accuracies as fractions), Markdown and LaTeX what people read, Markdown with the
    dataset, fingerprints and versions above the numbers; `worst_case` has one row a model. Figures come as PNG, SVG and PDF.

    Args:
        runs: at least one.
        out_dir: created where missing.
        drawings, summary, worst: of the same runs, by `sketch_runs`, `summarise` and `worst_cases_by_images`.
        command: of the report itself, as in `sys.argv`, for the heads of the Markdown.

    Returns:
        The files written.

    Raises:
        StoreError: a manifest does not say what was evaluated, or `out_dir` cannot be written.
    """
    figures = []
    for drawing in drawings:
        for kind, content in drawing.files.items():
            figures.append(out_dir / f"{drawing.stem}.{kind}")
            write_file(figures[-1], content)

    table, text, latex = (out_dir / f"robust_accuracy.{suffix}" for suffix in ("csv", "md", "tex"))
    write_file(table, summary.to_csv(index=False, lineterminator="\n").encode())
    write_file(text, _markdown(runs, summary, drawings, command).encode())
    write_file(latex, _latex(summary).encode())
    if not worst:
        return [table, text, latex, *figures]
    short_table, short, short_latex = (out_dir / f"worst_case.{suffix}" for suffix in ("csv", "md", "tex"))
    titles = dict(zip(summary["dataset_sha256"], summary["dataset"], strict=True))
    numbers = [_numbers(found).assign(dataset=titles[sha256], dataset_sha256=sha256) for sha256, found in worst.items()]
    write_file(short_table, pd.concat(numbers).to_csv(index=False, lineterminator="\n").encode())
    lines = _head("Robust accuracy under the worst case", runs, command)
    for sha256, found in worst.items():
        lines += ["", f"## {titles[sha256]}", "", found.how_to_read, "", *to_markdown(found.table)]
    write_file(short, ("\n".join(lines) + "\n").encode())
    tables = (
        to_latex(found.table, f"Robust accuracy under the worst case on {titles[sha256]}. {found.how_to_read}")
        for sha256, found in worst.items()
    )
    write_file(short_latex, "\n".join(tables).encode())
    return [table, text, latex, short_table, short, short_latex, *figures]


def _numbers(worst: WorstCases) -> pd.DataFrame:
    rows = [[None if cell.text == "-" else cell.value for cell in row] for row in worst.table.rows]
    return pd.DataFrame(rows, columns=[column.heading for column in worst.table.columns]).rename(columns={"clean %": "clean"})


def _markdown(runs: Sequence[Run], summary: pd.DataFrame, drawings: Sequence[Drawing], command: Sequence[str]) -> str:
    lines = _head("Robust accuracy", runs, command)
    lines += [*(line for text in how_to_read(summary) for line in ("", text))]
    for sha256, of_dataset in by_images(name_runs(runs)).items():
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


def _head(title: str, runs: Sequence[Run], command: Sequence[str]) -> list[str]:
    """Lines of Markdown: the title, and how to make the numbers again."""
    again = reproduction(runs, command)
    return [f"# {title}", "", again.how, "", *(f"    {line}" for line in again.commands)]


def _latex(summary: pd.DataFrame) -> str:
    return "\n".join(
        to_latex(
            summary_table(of_dataset),
            f"Robust accuracy on {of_dataset['dataset'].iloc[0]}. {' '.join(how_to_read(of_dataset))}",
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
    for warning in warnings_with_rejections(run):
        text += f"; **WARNING: {warning}**"
    for key, values in sorted(mixed_metadata(run).items()):
        text += f"; **computed with mixed {key}:** {', '.join(values)}"
    if not run.is_complete:
        planned = len(manifest.get("plan", {}).get("parts", []))
        text += f"; **INCOMPLETE:** {len(run.part_metadata)} of {planned} parts, "
        text += "numbers (marked * at n) cover only the images finished by each attack"
    return text
