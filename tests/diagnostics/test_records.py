import json
import os

import pytest

from lrrobust.diagnostics.records import (
    DIAGNOSTICS_FILE,
    DIAGNOSTICS_VERSION,
    Diagnostic,
    Diagnostics,
    load_diagnostics,
    why_uncounted,
    write_diagnostics,
)
from lrrobust.diagnostics.table import diagnostics_table
from lrrobust.results import SCHEMA_VERSION, RunStore, load_run

FOUND = Diagnostics(
    fingerprint="ab" * 8, sample=(3, 5), wall_s=1.5,
    results=(
        Diagnostic(name="zero_gradient", passed=False, detail="40 of 64.", attack="pgd"),
        Diagnostic(name="float64", passed=None, detail="It cannot be cast."),
    ),
)  # fmt: skip


@pytest.fixture
def run(tmp_path):
    RunStore.create_or_resume(tmp_path, {"schema_version": SCHEMA_VERSION, "fingerprint": "ab" * 8}).close()
    return load_run(tmp_path)


def test_absent_is_not_passed(run):
    assert load_diagnostics(run) is None
    assert not diagnostics_table({"a": run}).rows


def test_what_is_written_is_read(run):
    write_diagnostics(run, FOUND)
    assert load_diagnostics(run) == FOUND
    assert [[cell.text for cell in row] for row in diagnostics_table({"a": run}).rows] == [
        ["a", "zero gradient", "pgd", "FAILED", "40 of 64."],
        ["a", "float64", "-", "not known", "It cannot be cast."],
    ]


@pytest.mark.parametrize("version", [DIAGNOSTICS_VERSION - 1, DIAGNOSTICS_VERSION + 1])
def test_files_of_other_versions_count_as_none(run, version):
    # What they hold may be of another shape, and was found by other rules.
    found = [{"name": "large_eps", "passed": True, "detail": "0 of 24 withstand.", "effort": 3}]
    path = run.folder / DIAGNOSTICS_FILE
    path.write_text(
        json.dumps({"version": version, "fingerprint": "ab" * 8, "sample": [3, 5], "wall_s": 1.5, "results": found})
    )
    assert load_diagnostics(run) is None
    # But nobody is left to wonder where they are.
    ((name, _, _, result, detail),) = diagnostics_table({"a": run}).rows
    assert (name.text, result.text) == ("a", "not known") and detail.text.startswith(
        f"Its diagnostics are of version {version}"
    )


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"fingerprint": "abababababababab", "sample": [], "wall_s": 1, "results": [{"name": "x"}]}']
)
def test_damaged_ones_count_as_none_and_end_no_report(run, text):
    (run.folder / DIAGNOSTICS_FILE).write_text(text)
    assert load_diagnostics(run) is None
    assert "diagnostics.json cannot be read (" in why_uncounted(run) and "makes them anew" in why_uncounted(run)
    assert [row[3].text for row in diagnostics_table({"a": run}).rows] == ["not known"]


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_is_no_file_has_nobody_wait(run, kind):
    path = run.folder / DIAGNOSTICS_FILE
    path.unlink(missing_ok=True)
    os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero")
    assert load_diagnostics(run) is None
    assert "diagnostics.json cannot be read (not a regular file)" in why_uncounted(run)


def test_those_of_another_run_count_as_none(run):
    write_diagnostics(run, FOUND.model_copy(update={"fingerprint": "cd" * 8}))
    assert load_diagnostics(run) is None and "computed for another run" in why_uncounted(run)
