"""From runs and verdicts to one HTML file; runs no model and reads nothing but run folders."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
import pandas as pd

import lrrobust
from lrrobust.diagnostics.table import HOW_TO_READ as HOW_TO_READ_DIAGNOSTICS
from lrrobust.diagnostics.table import RESULTS, diagnostics_table
from lrrobust.formatting import format_eps
from lrrobust.page.gallery import NO_GALLERY, Gallery, build_gallery
from lrrobust.page.per_class import compact, summarise_classes
from lrrobust.page.verdict_tables import HOW_TO_READ_COMPARISONS, area_table, comparison_table, norm_table
from lrrobust.plots import label_runs
from lrrobust.report.drawing import Collect, Drawing
from lrrobust.report.naming import by_images, name_attack, name_runs
from lrrobust.report.notices import mixed_metadata, warnings_with_rejections
from lrrobust.report.reproduction import format_command, reproduction
from lrrobust.report.summary_table import HOW_TO_READ_CUMULATIVE, how_to_read, summary_table
from lrrobust.report.worst_case import WorstCases
from lrrobust.results import Run, example_count, write_file
from lrrobust.tables import Table, to_latex, to_markdown
from lrrobust.transfer import transfer_matrix
from lrrobust.transfer_report import HOW_TO_READ_TRANSFER, find_transfer, transfer_table
from lrrobust.verdict.records import ClaimResult, NotJudged, Verdicts

PAGE_NAME = "report.html"

#: How a verdict looks: a word, a sign that needs no colour, and a name for the style sheet.
_SIGNS = {"supported": "✓", "refuted": "✗", "inconclusive": "?"}


@dataclass(frozen=True)
class _Figure:
    source: str
    alt: str


@dataclass(frozen=True)
class _Judged:
    """A claim's result with its figures and tables."""

    result: ClaimResult
    sign: str
    figures: Sequence[_Figure]
    decisive: Table
    informative: Table
    areas: Table
    norms: Table
    is_cumulative: bool


@dataclass(frozen=True)
class _Classes:
    """Robust accuracy by class of one run and attack; drawn in the browser from `key`."""

    key: str
    run: str
    attack: str
    count: int


@dataclass(frozen=True)
class _Dataset:
    """All that the page shows of the runs on one set of images, but for its figures."""

    anchor: str
    name: str
    n: int
    sha256: str
    notices: Sequence[str]
    how_to_read: Sequence[str]
    worst: WorstCases | None
    summary: Table
    transfer: Table
    transfer_findings: Sequence[str]
    diagnostics: Table
    gallery: Gallery
    examples_from: int | None
    classes: Sequence[_Classes]


@dataclass(frozen=True)
class _Provenance:
    """Where the numbers of one run come from: term -> text, and what is to be repeated."""

    run: str
    facts: Mapping[str, str]
    command: str | None


def write_page(
    runs: Sequence[Run],
    out_dir: Path,
    command: Sequence[str],
    verdicts: Verdicts,
    drawings: Collect,
    summary: pd.DataFrame,
    *,
    claim_drawings: Sequence[Collect],
    worst: Mapping[str, WorstCases],
    with_gallery: bool = True,
) -> list[Path]:
    """Write `report.html`, and beside it what it shows of classes and claims as files of their own.

    `per_class.csv` holds the robust accuracies by class; `comparisons.csv`, `.md` and `.tex` the paired
    differences of all verdicts, and `differences_*` their figures as PNG, SVG and PDF.

    Args:
        runs: at least one; runs on different images are never compared.
        out_dir: created where missing.
        command: of the report itself, as in `sys.argv`; the last of those that reproduce the page.
        verdicts: of the claims judged on these runs.
        drawings: gives the figures that `sketch_runs` sketches of the same runs; called last, since others may draw meanwhile.
        summary, worst: made of the same runs by `summarise` and `worst_cases_by_images`.
        claim_drawings: as `drawings`, of the figures that `sketch_claims` sketches of each verdict.
        with_gallery: show images; without, no pixel of any image is in the page.

    Returns:
        The files written.

    Raises:
        StoreError: a manifest does not say what was evaluated, or a file cannot be read or written.
    """
    named = name_runs(runs)
    classes = summarise_classes(named)
    page, table = Path(out_dir) / PAGE_NAME, Path(out_dir) / "per_class.csv"
    write_file(table, classes.to_csv(index=False, lineterminator="\n").encode())
    per_class: dict[str, dict[str, Any]] = {}
    datasets = list(_datasets(named, summary, worst, classes, per_class, with_gallery))
    figures: defaultdict[str, list[_Figure]] = defaultdict(list)
    for drawing in drawings():
        figures[drawing.dataset_sha256].append(_figure(drawing))
    judged = [(result, collect()) for result, collect in zip(verdicts.results, claim_drawings, strict=True)]
    write_file(page, _render(named, command, judged, verdicts.not_judged, datasets, figures, per_class).encode())
    return [page, table, *_write_comparisons(judged, Path(out_dir))]


def _write_comparisons(judged: Sequence[tuple[ClaimResult, Sequence[Drawing]]], out_dir: Path) -> list[Path]:
    if not judged:
        return []
    rows, text, latex = [], ["# Paired differences of robust accuracy"], []
    paths = [out_dir / f"comparisons.{suffix}" for suffix in ("csv", "md", "tex")]
    for result, drawings in judged:
        claim, pairing = result.claim, result.pairing
        about = {"claim": claim.name, "dataset": pairing.dataset, "treatment": claim.treatment, "control": claim.control}
        rows += [about | comparison.model_dump() for comparison in result.comparisons]
        table = comparison_table(result.comparisons)
        caption = f"{claim.treatment} minus {claim.control} in percentage points, {pairing.dataset}, claim {claim.name}"
        how = [HOW_TO_READ_COMPARISONS, *([HOW_TO_READ_CUMULATIVE] if any(c.is_cumulative for c in result.comparisons) else [])]
        text += ["", f"## {caption}: {result.verdict}", *(line for each in how for line in ("", each)), "", *to_markdown(table)]
        latex.append(to_latex(table, f"{caption}. {' '.join(how)}"))
        for drawing in drawings:
            for kind, content in drawing.files.items():
                paths.append(out_dir / f"{drawing.stem}.{kind}")
                write_file(paths[-1], content)
    write_file(paths[0], pd.DataFrame(rows).to_csv(index=False, lineterminator="\n").encode())
    write_file(paths[1], ("\n".join(text) + "\n").encode())
    write_file(paths[2], "\n".join(latex).encode())
    return paths


def _render(
    runs: Mapping[str, Run],
    command: Sequence[str],
    judged: Sequence[tuple[ClaimResult, Sequence[Drawing]]],
    not_judged: Sequence[NotJudged],
    datasets: Sequence[_Dataset],
    figures: Mapping[str, Sequence[_Figure]],
    per_class: Mapping[str, Mapping[str, Any]],
) -> str:
    """The page's text; the same input gives the same text."""
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_read),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = _read("report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("report.html.j2").render(
        version=lrrobust.__version__,
        style=_read("report.css"),
        script=script,
        script_sha256=digest,
        judged=[_judge(result, of_claim) for result, of_claim in judged],
        not_judged=not_judged,
        datasets=datasets,
        figures=figures,
        provenance=[_provenance(name, run) for name, run in runs.items()],
        reproduction=reproduction(list(runs.values()), command),
        per_class=per_class,
        how_to_read_comparisons=HOW_TO_READ_COMPARISONS,
        how_to_read_cumulative=HOW_TO_READ_CUMULATIVE,
        how_to_read_transfer=HOW_TO_READ_TRANSFER,
        how_to_read_diagnostics=HOW_TO_READ_DIAGNOSTICS,
        diagnostic_results=RESULTS,
        infinity=math.inf,
    )


def _read(name: str) -> str:
    return (resources.files("lrrobust.page") / name).read_text(encoding="utf-8")


def _judge(result: ClaimResult, drawings: Sequence[Drawing]) -> _Judged:
    return _Judged(
        result,
        _SIGNS[result.verdict],
        [_figure(drawing) for drawing in drawings],
        comparison_table([c for c in result.comparisons if c.is_decisive]),
        comparison_table([c for c in result.comparisons if not c.is_decisive]),
        area_table(result),
        norm_table(result),
        any(c.is_cumulative for c in result.comparisons),
    )


def _figure(drawing: Drawing) -> _Figure:
    return _Figure(_data_uri(drawing.files["svg"]), f"{drawing.description}. The numbers are in the tables below.")


def _datasets(
    runs: Mapping[str, Run],
    summary: pd.DataFrame,
    worst: Mapping[str, WorstCases],
    classes: pd.DataFrame,
    per_class: dict[str, dict[str, Any]],
    with_gallery: bool,
) -> Iterator[_Dataset]:
    # As the verdicts: the most images first.
    ordered = sorted(by_images(runs).items(), key=lambda group: -next(iter(group[1].values())).manifest["dataset"]["n"])
    for place, (sha256, of_dataset) in enumerate(ordered):
        dataset = next(iter(of_dataset.values())).manifest["dataset"]
        rows = summary[summary["dataset_sha256"] == sha256]
        # Runs without a finished part are in no summary.
        labels = {name: name for name in of_dataset} | label_runs(rows)
        tables = []
        for (name, attack), group in classes[classes["run"].isin(list(of_dataset))].groupby(["run", "attack"], sort=False):
            key = f"classes-{len(per_class)}"
            per_class[key] = compact(group)
            is_cumulative = bool(rows.loc[(rows["run"] == name) & (rows["attack"] == attack), "is_cumulative"].any())
            tables.append(_Classes(key, labels[name], name_attack(attack, is_cumulative), group["label"].nunique()))
        yield _Dataset(
            anchor=f"images-{place}",
            name=dataset["name"],
            n=dataset["n"],
            sha256=sha256,
            notices=[f"{name}: {notice}" for name, run in of_dataset.items() for notice in _notices(run)],
            how_to_read=how_to_read(rows),
            worst=worst.get(sha256),
            summary=summary_table(rows),
            transfer=transfer_table(transfer_matrix(list(of_dataset.values()))),
            transfer_findings=[finding.detail for finding in find_transfer(list(of_dataset.values()))],
            diagnostics=diagnostics_table(of_dataset),
            gallery=build_gallery(of_dataset, labels) if with_gallery else NO_GALLERY,
            examples_from=_examples_from(of_dataset),
            classes=tables,
        )


def _examples_from(runs: Mapping[str, Run]) -> int | None:
    """Of how many images at the beginning of the subset every run keeps what is correct, where manifests say."""
    sizes = [run.manifest["model"].get("input_size") for run in runs.values()]
    return min(example_count(size, size) for size in sizes) if all(sizes) else None


def _data_uri(svg: bytes) -> str:
    # Base64 is longer, and hides what repeats from whoever compresses the page.
    return "data:image/svg+xml," + quote(svg, safe=" =():/;,?!*[]{}|^`~@$+")


def _notices(run: Run) -> list[str]:
    """What a reader must know before the numbers."""
    notices = [f"warning: {warning}" for warning in warnings_with_rejections(run)]
    notices += [f"computed with mixed {key}: {', '.join(values)}" for key, values in sorted(mixed_metadata(run).items())]
    if not run.is_complete:
        planned = len(run.manifest.get("plan", {}).get("parts", []))
        notices.append(
            f"incomplete, {len(run.part_metadata)} of {planned} parts: its numbers, marked * at n, cover only the images "
            "that each attack has finished"
        )
    return notices


def _settings(spec: Mapping[str, Any]) -> str:
    """All that an attack was told, its name aside."""
    told = {key: value for key, value in spec.items() if key != "name" and value is not None}
    if isinstance(told.get("eps"), list):
        told["eps"] = ", ".join(
            format_eps(eps, spec.get("norm")) if isinstance(eps, float) else str(eps) for eps in told["eps"]
        )
    return "; ".join(f"{key} {value if isinstance(value, str) else json.dumps(value)}" for key, value in told.items())


def _provenance(name: str, run: Run) -> _Provenance:
    manifest = run.manifest
    environment = manifest.get("provenance") or {}
    model, dataset = manifest["model"], manifest["dataset"]
    facts = {
        "model": model["name"],
        "weights": model["weights"],
        "parameters (sha256)": model.get("state_sha256"),
        "images made on": (manifest.get("surrogate") or {}).get("name"),
        "images": f"{dataset['name']}, {dataset['n']} images",
        "images (sha256)": dataset["sha256"],
        "images of other classes, left out": dataset.get("left_out_count") or None,
        "side of the images in pixels": model.get("input_size"),
        "fingerprint": manifest["fingerprint"],
        "seed": manifest.get("seed"),
        "created": manifest.get("created_at"),
        "sessions": 1 + len(manifest.get("sessions", [])),
        "commit": environment.get("commit"),
        "device": environment.get("device"),
        "processor": environment.get("processor"),
        "threads": environment.get("threads"),
        "python": environment.get("python"),
    }
    facts |= {
        f"attack {spec.get('name')}": _settings(spec) for spec in manifest.get("attacks", []) if isinstance(spec, Mapping)
    }
    versions = environment.get("versions")
    if isinstance(versions, Mapping):
        facts["versions"] = ", ".join(f"{package} {version}" for package, version in versions.items() if version)
    command = manifest.get("command")
    return _Provenance(
        name,
        {term: str(fact) for term, fact in facts.items() if fact is not None},
        format_command(command) if command else None,
    )
