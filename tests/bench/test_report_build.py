import math

import pytest

from lrrobust.bench import report_build
from lrrobust.bench.report_build import ROWS_PER_IMAGE, measure_reports, write_random_runs
from lrrobust.results import load_examples, load_run
from lrrobust.verdict.claims import DEFAULT_CLAIM, load_claim
from lrrobust.verdict.judge import judge_claims


def test_random_runs_are_whole_and_judged_in_pairs(tmp_path):
    runs = [load_run(folder) for folder in write_random_runs(tmp_path, runs=4, rows=10 * ROWS_PER_IMAGE + 3)]
    assert all(run.is_complete and len(run.rows) == 10 * ROWS_PER_IMAGE for run in runs)
    assert len({run.manifest["fingerprint"] for run in runs}) == 4
    assert all(load_examples(run) for run in runs)
    verdicts = judge_claims([load_claim(DEFAULT_CLAIM)], runs)
    assert [result.pairing.n for result in verdicts.results] == [10, 10] and not verdicts.not_judged


def test_the_whole_command_is_measured():
    (row,) = measure_reports((1,), runs=1)
    assert (row["rows"], row["runs"], row["name"]) == (1, 1, "report")
    assert 0 < row["cpu_s"] and 0 < row["wall_s"] < 60
    assert math.isnan(row["peak_bytes"]) or row["peak_bytes"] > 50e6


def test_a_report_that_fails_is_no_measurement(monkeypatch):
    monkeypatch.setattr(report_build, "write_random_runs", lambda folder, **_: folder.mkdir())
    with pytest.raises(RuntimeError, match="no runs in"):
        list(measure_reports((1,), runs=1))
