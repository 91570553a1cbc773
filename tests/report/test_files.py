import csv
import subprocess
import sys

import pandas as pd
import pytest

from lrrobust.report.drawing import Drawers
from lrrobust.report.figures import sketch_runs
from lrrobust.report.files import write_report
from lrrobust.report.summary import SUMMARY_COLUMNS, summarise
from lrrobust.report.worst_case import worst_cases_by_images

LADDER = (1 / 255, 2 / 255)


def report(runs, out):
    summary = summarise(runs)
    with Drawers() as drawers:
        drawings = drawers.begin(sketch_runs(runs, summary))()
    return write_report(runs, out, drawings, summary, ["lrrobust", "report", "reports/runs"], worst_cases_by_images(runs))


class TestWriteReport:
    def test_csv_keeps_full_precision(self, make_run, tmp_path):
        runs = [make_run("a"), make_run("b", model="other")]
        report(runs, tmp_path / "new" / "out")
        with open(tmp_path / "new" / "out" / "robust_accuracy.csv", newline="") as file:
            found = list(csv.DictReader(file))
        expected = summarise(runs).to_dict("records")
        for column in ("eps", "robust_accuracy", "ci_low", "ci_high", "median_distance", "wall_s"):
            assert [float(record[column]) for record in found] == [record[column] for record in expected], column
        # Passes that were not counted are empty.
        uncounted = {"forward_passes", "backward_passes"}
        assert {record[column] for record in found for column in uncounted} == {""}
        for column in set(SUMMARY_COLUMNS) - {"eps", "robust_accuracy", "ci_low", "ci_high", "median_distance", *uncounted}:
            told = ["" if pd.isna(record[column]) else str(record[column]) for record in expected]
            assert [record[column] for record in found] == told, column

    def test_worst_cases_come_as_numbers_too(self, make_run, tmp_path):
        report([make_run("a"), make_run("b", sha256="ef" * 32)], tmp_path)
        found = pd.read_csv(tmp_path / "worst_case.csv")
        assert found[["n", "clean", "linf 1/255", "linf 2/255"]].values.tolist() == [[5, 0.8, 0.4, 0.2]] * 2
        assert found["dataset_sha256"].tolist() == ["cd" * 32, "ef" * 32]

    def test_files_and_text(self, make_run, tmp_path):
        paths = report([make_run("a"), make_run("b|c", model="other")], tmp_path)
        assert sorted(paths) == sorted(tmp_path.iterdir())
        assert {path.suffix for path in paths} == {".csv", ".md", ".tex", ".png", ".svg", ".pdf"} and len(paths) == 12
        text = (tmp_path / "robust_accuracy.md").read_text()
        assert "## sample, n = 5" in text and "ab" * 32 in text and "torch 2.13.0" in text and "1234abc" in text
        assert "| tiny | V1 | pgd | linf | 1/255 | 5 | 80.0 | 40.0 | 11.8-76.9 | inf | 2.5 s | - | a |" in text
        assert "b\\|c" in text and "INCOMPLETE" not in text and "mixed" not in text
        for path in paths:
            assert path.suffix != ".png" or f"]({path.name})" in text

    def test_markdown_begins_with_how_to_make_it_again(self, make_run, tmp_path):
        report([make_run("a")], tmp_path)
        heads = [(tmp_path / name).read_text().splitlines()[:6] for name in ("robust_accuracy.md", "worst_case.md")]
        assert [head[0] for head in heads] == ["# Robust accuracy", "# Robust accuracy under the worst case"]
        assert heads[0][1:] == heads[1][1:] and any("lrrobust report" in line for line in heads[0])

    def test_latex(self, make_run, tmp_path):
        report([make_run("a_1"), make_run("b", model="100 %")], tmp_path)
        text = (tmp_path / "robust_accuracy.tex").read_text()
        assert "tiny & V1 & pgd & linf & 1/255 & 5 & 80.0 & 40.0 & 11.8-76.9 & inf & 2.5 s & - & a\\_1 \\\\\n" in text
        assert r"100 \% &" in text and text.count(r"\begin{longtable}") == 1

    def test_says_what_a_reader_must_know(self, make_run, tmp_path):
        report([make_run(planned=3, metadata=({"device": "cpu"}, {"device": "cuda"}))], tmp_path)
        text = (tmp_path / "robust_accuracy.md").read_text()
        assert "**INCOMPLETE:** 2 of 3 parts" in text and "| 5* |" in text
        assert "**computed with mixed device:** cpu, cuda" in text

    def test_datasets_never_share_a_table_or_figure(self, make_run, suite_distances, tmp_path):
        linf_only = {"pgd": suite_distances["pgd"]}
        paths = report([make_run("a", linf_only), make_run("b", linf_only, sha256="ef" * 32)], tmp_path)
        assert len([path for path in paths if path.suffix == ".svg"]) == 2
        text = (tmp_path / "robust_accuracy.md").read_text()
        first, second = text.split("## sample")[1:]
        assert "| a |" in first and "| b |" not in first and "| b |" in second and "| a |" not in second

    def test_no_finished_part_yet(self, make_run, tmp_path):
        paths = report([make_run(distances={"pgd": ("linf", LADDER, [])}, planned=2)], tmp_path)
        assert len(paths) == 3
        assert "No part is finished yet." in paths[1].read_text()


@pytest.mark.parametrize(
    ("imported", "spared"),
    [("lrrobust.plots, lrrobust.results", ("torch", "numba", "triton", "matplotlib.pyplot")), ("sys", ("matplotlib", "rich"))],
)
def test_reports_need_no_torch_and_tables_no_matplotlib_nor_rich(imported, spared):
    code = f"import sys, lrrobust.report.files, {imported}; print([name for name in {spared} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
