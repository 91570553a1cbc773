"""Runs as the command line shows them, on a terminal and through a pipe."""

import io
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
from rich.console import Console

from lrrobust.console import results, streams
from lrrobust.diagnostics.records import Diagnostic, Diagnostics, write_diagnostics
from lrrobust.report.summary import summarise


def test_what_is_left_out_is_named(capsys):
    images = SimpleNamespace(
        copies=0, name="cifar", left_out_count=8, left_out_classes=(("a", "b", "c", "d", "e"), ("plane",)), corrupt_keys=()
    )

    class Images(list):
        __getattr__ = lambda self, name: getattr(images, name)  # noqa: E731

    results.report_subset(Images(range(32)))
    said = " ".join(capsys.readouterr().err.split())
    assert "cifar: 32 images" in said
    assert "left out: 8 images of classes the model does not know ('a', 'b', 'c' and 2 more); no image has its 'plane'" in said


@pytest.fixture
def shown(monkeypatch):
    """What is shown on standard output, which is no terminal."""
    shown = io.StringIO()
    monkeypatch.setattr(streams, "tables", Console(file=shown, width=100_000))
    return shown


def test_images_of_other_models_stand_in_a_table_of_their_own(shown, make_run):
    of_others = make_run("b")
    of_others.manifest["surrogate"] = {"name": "other"}
    runs = [make_run("a"), of_others]
    results.print_report(runs, summarise(runs), [])
    own, apart = shown.getvalue().split("images made on other models, ")
    assert "worst_case" in own and "other" not in own
    assert "worst_case" in apart and "other" in apart


def test_whoever_is_evaluated_or_reported_learns_what_the_checks_come_to(shown, make_run, tmp_path, caplog):
    run = replace(make_run(), folder=tmp_path)
    found = (("noise", True), ("convergence", False), ("numerics", None))
    checks = [Diagnostic(name=name, attack="pgd", norm="linf", passed=passed, detail="Found so.") for name, passed in found]
    write_diagnostics(run, Diagnostics(fingerprint=run.manifest["fingerprint"], sample=(), wall_s=0, results=tuple(checks)))
    results._print_diagnostics([run])
    assert "checks: 1 passed, 1 FAILED, 1 not known: robust accuracies may be too high" in shown.getvalue()
    results.warn_of_checks([run])
    assert f"{tmp_path}: 1 of 3 checks failed (convergence): robust accuracies may be too high" in caplog.text


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_names_are_folded_and_no_number_is_cut(make_run, width, monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr(streams, "tables", Console(file=shown, width=width))
    runs = [make_run(name, model=f"package/{'long_' * 8}{name}.py:build") for name in ("a", "b")]
    for run in runs:
        run.manifest["model"]["weights"] = f"path/to/{'weights' * 4}.safetensors"
    results.print_report(runs, summarise(runs), [])
    # In fewer columns not even the numbers and folded names have room.
    assert max(map(len, shown.getvalue().splitlines())) <= max(width, 72)
    rows = [line for line in shown.getvalue().splitlines() if "pgd" in line]
    assert len(rows) == 4 and "…" not in shown.getvalue()
    assert all(re.search(r"pgd\s+linf\s*[12]/255\s+5\s+80\.0\s+\d+\.0", row) for row in rows)
