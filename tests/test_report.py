import csv
import doctest
import io
import math
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console
from scipy.stats import binomtest

from lrrobust import report
from lrrobust.errors import StoreError
from lrrobust.report import (
    SUMMARY_COLUMNS,
    minimal_norm_curves,
    render_table,
    summarise,
    summarise_run,
    warnings_of,
    write_report,
)
from lrrobust.results import SCHEMA_VERSION, Run, rows_to_table

LADDER = (1 / 255, 2 / 255)
INF = math.inf


def row(index, attack, norm, eps, distance):
    """One row; `distance` in the norm, infinite when the attack failed, None when wrong without attack."""
    is_correct = distance is not None
    is_broken = is_correct and distance <= eps and math.isfinite(distance)
    return {
        "index": index,
        "key": f"val_{index}",
        "label": 3,
        "wnid": "n01440764",
        "attack": attack,
        "norm": norm,
        "eps": eps,
        "clean_prediction": 3 if is_correct else 4,
        "is_clean_correct": is_correct,
        "adversarial_prediction": 5 if is_broken else None,
        "is_broken": is_broken or not is_correct,
        "outcome": "broken" if is_broken else "robust" if is_correct else "wrong_when_clean",
        # The other norm gets a value that would show if it were taken by mistake.
        "linf_distance": (distance if norm == "linf" else 77.0) if is_broken else None,
        "l2_distance": (distance if norm == "l2" else 77.0) if is_broken else None,
        "clean_margin": 1.0,
        "adversarial_margin": None,
        "wall_s": 0.5,
        "l1_distance": 78.0 if is_broken else None,
        "is_broken_quantized": None,
        "forward_passes": None,
        "backward_passes": None,
    }


def make_run(name="run", distances=None, *, sha256="cd" * 32, model="tiny", planned=1, metadata=({"device": "cpu"},)):
    """A run from attack -> (norm, ladder, distance of image 0, 1, ...)."""
    rows = [
        row(index, attack, norm, eps, distance)
        for attack, (norm, ladder, of_images) in (distances or DISTANCES).items()
        for index, distance in enumerate(of_images)
        for eps in ladder
    ]
    return Run(
        folder=Path("/results") / name,
        manifest={
            "schema_version": SCHEMA_VERSION,
            "fingerprint": "ab" * 32,
            "model": {"name": model, "weights": "V1"},
            "dataset": {"name": "sample", "sha256": sha256, "n": 5},
            "attacks": [
                {"name": attack, "norm": norm, "kind": attack}
                for attack, (norm, *_) in (distances or DISTANCES).items()
            ],
            "plan": {"chunk_size": 5, "parts": [["x", 0, 5]] * planned},
            "provenance": {"versions": {"lrrobust": "0.1.0", "torch": "2.13.0"}, "commit": "1234abc"},
        },
        rows=rows_to_table(rows).to_pandas(types_mapper=pd.ArrowDtype),
        is_complete=planned == len(metadata),
        part_metadata={f"part-{place}": part for place, part in enumerate(metadata)},
    )


# Image 0 is wrong without attack; images 1 to 4 are correct.
DISTANCES = {
    "fgsm": ("linf", LADDER, [None, 0.9 / 255, 1.9 / 255, INF, INF]),
    "pgd": ("linf", LADDER, [None, 0.8 / 255, INF, 0.7 / 255, INF]),
    "cw": ("l2", (INF,), [None, 0.2, 0.4, 0.3, INF]),
}


def numbers(summary, attack, eps):
    (record,) = summary[(summary["attack"] == attack) & (summary["eps"] == eps)].to_dict("records")
    return record


class TestSummary:
    def test_numbers_by_hand(self):
        summary = summarise_run(make_run())
        assert tuple(summary.columns) == SUMMARY_COLUMNS
        robust = {
            (record["attack"], record["norm"], round(record["eps"], 6)): record["robust_accuracy"]
            for record in summary.to_dict("records")
        }
        one, two = (round(eps, 6) for eps in LADDER)
        assert robust == {
            ("fgsm", "linf", one): 3 / 5,
            ("fgsm", "linf", two): 2 / 5,
            ("pgd", "linf", one): 2 / 5,
            ("pgd", "linf", two): 2 / 5,
            ("cw", "l2", INF): 1 / 5,
            ("worst_case", "linf", one): 2 / 5,
            ("worst_case", "linf", two): 1 / 5,
        }
        assert (summary["clean_accuracy"] == 4 / 5).all() and (summary["n"] == 5).all()

        record = numbers(summary, "cw", INF)
        interval = binomtest(1, 5).proportion_ci(0.95, method="wilson")
        assert (record["ci_low"], record["ci_high"]) == pytest.approx((interval.low, interval.high))
        assert record["wall_s"] == 2.5
        assert record["model"] == "tiny" and record["weights"] == "V1" and record["dataset"] == "sample"
        assert record["run"] == "run" and record["is_complete"] and record["dataset_sha256"] == "cd" * 32

    def test_medians_are_in_the_attacks_norm_with_failures_infinite(self):
        summary = summarise_run(make_run())
        assert numbers(summary, "cw", INF)["median_distance"] == pytest.approx(0.35)  # of 0.2 0.3 0.4 inf
        assert numbers(summary, "pgd", LADDER[1])["median_distance"] == INF  # of 0.7 0.8 inf inf
        # 0.7 0.8 1.9 inf, of which 1.9 lies outside the smaller eps.
        assert numbers(summary, "worst_case", LADDER[1])["median_distance"] == pytest.approx(1.35 / 255)
        assert numbers(summary, "worst_case", LADDER[0])["median_distance"] == INF

    def test_balanced_accuracy_counts_every_class_alike(self):
        run = make_run()
        # Images 0 and 4, wrong when clean and never broken, are the only ones of their classes.
        run.rows["label"] = run.rows["index"].map({0: 1, 1: 3, 2: 3, 3: 3, 4: 2})
        summary = summarise_run(run)
        one = numbers(summary, "pgd", LADDER[0])
        assert (one["balanced_clean_accuracy"], one["balanced_robust_accuracy"]) == pytest.approx(((0 + 1 + 1) / 3, (0 + 1 / 3 + 1) / 3))
        assert one["effective_n"] == pytest.approx(9 / (1 + 1 + 1 / 3))
        assert numbers(summary, "worst_case", LADDER[1])["balanced_robust_accuracy"] == pytest.approx(1 / 3)
        assert one["balanced_ci_low"] < one["balanced_robust_accuracy"] < one["balanced_ci_high"]

    def test_what_earlier_attacks_broke_is_marked_and_no_failure(self):
        run = make_run(distances={"apgd": ("linf", LADDER, [0.5 / 255, 1.5 / 255, INF]), "square": ("linf", LADDER, [INF, INF, 0.7 / 255])})
        is_earlier = (run.rows["attack"] == "square") & (run.rows["index"] == 0)
        run.rows.loc[is_earlier, ["is_broken", "outcome"]] = [True, "broken_by_earlier_attack"]
        summary = summarise_run(run)
        assert summary.drop_duplicates("attack").set_index("attack")["is_cumulative"].to_dict() == {
            "apgd": False, "square": True, "worst_case": False
        }
        # Of three images one was broken before and one is broken by squares: no median distance of two thirds failed.
        assert numbers(summary, "square", LADDER[0])["robust_accuracy"] == 1 / 3
        assert math.isnan(numbers(summary, "square", LADDER[0])["median_distance"])
        assert numbers(summary, "worst_case", LADDER[0])["median_distance"] == pytest.approx(0.7 / 255)
        assert "square†" in rendered(summary) and "its robust accuracy counts what any of them broke" in rendered(summary)
        assert report.how_to_read(summary)[1:] == [report.HOW_TO_READ_CUMULATIVE]

    def test_worst_case_counts_what_any_eps_or_minimal_norm_proves(self):
        distances = {
            "cw": ("l2", (INF,), [0.3, 0.6, INF]),
            "pgd": ("l2", (0.25, 0.5), [INF, INF, 0.2]),
        }
        summary = summarise_run(make_run(distances=distances))
        worst = summary[summary["attack"] == "worst_case"].set_index("eps")["robust_accuracy"]
        assert worst.to_dict() == {0.25: 2 / 3, 0.5: 1 / 3, INF: 0.0}

    def test_worst_case_does_not_count_the_unbroken_at_infinity(self):
        distances = {"cw": ("l2", (INF,), [None, 0.3, INF, INF]), "fab": ("l2", (INF,), [None, INF, INF, INF])}
        assert numbers(summarise_run(make_run(distances=distances)), "worst_case", INF)["robust_accuracy"] == 2 / 4

    def test_a_distance_over_eps_by_the_tolerance_is_broken_in_the_worst_case_too(self):
        run = make_run(distances={"pgd": ("l2", (0.5,), [0.5]), "apgd": ("l2", (0.5,), [INF])})
        run.rows["l2_distance"] = run.rows["l2_distance"] + 1e-7
        assert numbers(summarise_run(run), "worst_case", 0.5)["robust_accuracy"] == 0

    def test_worst_case_is_over_images_that_all_attacks_finished(self):
        distances = DISTANCES | {"fgsm": ("linf", LADDER, [None, 0.9 / 255, INF])}
        summary = summarise_run(make_run(distances=distances, planned=2))
        assert numbers(summary, "fgsm", LADDER[0])["n"] == 3
        assert numbers(summary, "pgd", LADDER[0])["n"] == 5
        worst = numbers(summary, "worst_case", LADDER[0])
        assert (worst["n"], worst["clean_accuracy"], worst["robust_accuracy"]) == (3, 2 / 3, 1 / 3)
        assert worst["wall_s"] == 3.0
        assert not summary["is_complete"].any()

    def test_no_worst_case_before_every_attack_has_begun(self):
        distances = DISTANCES | {"fgsm": ("linf", LADDER, [])}
        assert set(summarise_run(make_run(distances=distances))["attack"]) == {"pgd", "cw"}

    def test_one_attack_is_its_own_worst_case(self):
        assert set(summarise_run(make_run(distances={"cw": DISTANCES["cw"]}))["attack"]) == {"cw"}

    def test_all_wrong_when_clean(self):
        record = numbers(summarise_run(make_run(distances={"pgd": ("linf", LADDER, [None, None])})), "pgd", LADDER[0])
        assert (record["clean_accuracy"], record["robust_accuracy"]) == (0, 0)
        assert math.isnan(record["median_distance"])

    def test_runs_are_told_apart_by_their_folders(self):
        assert list(summarise([make_run("a"), make_run("b")])["run"].unique()) == ["a", "b"]
        assert list(summarise([make_run("x/a"), make_run("y/a")])["run"].unique()) == ["x/a", "y/a"]
        with pytest.raises(StoreError, match="/results/a twice"):
            summarise([make_run("a"), make_run("a")])

    def test_a_run_without_rows(self):
        empty = make_run("empty", {"pgd": ("linf", LADDER, [])})
        assert summarise([empty]).empty and tuple(summarise([empty]).columns) == SUMMARY_COLUMNS
        assert len(summarise([empty, make_run()])) == len(summarise_run(make_run()))

    def test_a_manifest_that_says_too_little(self):
        run = make_run()
        del run.manifest["dataset"]["sha256"]
        with pytest.raises(StoreError, match="/results/run/manifest.json must hold dataset.sha256"):
            summarise_run(run)


def test_minimal_norm_curve_is_exact():
    curve = minimal_norm_curves([make_run()])
    assert list(curve["eps"]) == [0, 0.2, 0.3, 0.4]
    assert list(curve["robust_accuracy"]) == [4 / 5, 3 / 5, 2 / 5, 1 / 5]
    interval = binomtest(3, 5).proportion_ci(0.95, method="wilson")
    assert tuple(curve.loc[1, ["ci_low", "ci_high"]]) == pytest.approx((interval.low, interval.high))
    assert set(curve["attack"]) == {"cw"}


def test_doctests():
    result = doctest.testmod(report)
    assert result.attempted > 0 and result.failed == 0


@pytest.mark.parametrize(
    "changes, heading, text",
    [
        ({}, "eps", "0.5/255"),
        ({"eps": 4 / 255}, "eps", "4/255"),
        ({"eps": 0.05, "norm": "l2"}, "eps", "0.05"),
        ({"eps": INF}, "eps", "any"),
        ({"eps": 0.0}, "eps", "0"),
        ({}, "robust %", "34.5"),
        ({}, "95 % CI", "30.0-40.1"),
        ({}, "n", "100"),
        ({"is_complete": False}, "n", "100*"),
        ({}, "median distance", "0.5/255"),
        ({"median_distance": INF}, "median distance", "inf"),
        ({"median_distance": math.nan}, "median distance", "-"),
        ({"median_distance": 0.1234, "norm": "l2"}, "median distance", "0.123"),
        ({}, "time", "12.3 s"),
        ({"wall_s": 600.0}, "time", "10.0 min"),
        ({"wall_s": 9000.0}, "time", "2.5 h"),
        ({"weights": None}, "weights", "-"),
        ({}, "passes", "61.2+60"),
        ({"backward_passes": math.nan}, "passes", "61.2+?"),
        ({"forward_passes": math.nan, "backward_passes": math.nan}, "passes", "-"),
        ({}, "images made on", "-"),
        ({"surrogate": "other"}, "images made on", "other"),
        ({}, "attack", "pgd"),
        ({"is_cumulative": True}, "attack", "pgd†"),
        ({}, "balanced %", "-"),
        ({"effective_n": 60.0}, "balanced %", "25.0"),
        ({"effective_n": 60.0}, "balanced clean %", "70.0"),
        ({"effective_n": 60.0}, "balanced 95 % CI", "15.0-45.0"),
        ({}, "8-bit robust %", "-"),
        ({"robust_accuracy_quantized": 0.4}, "8-bit robust %", "40.0"),
    ],
)
def test_format_row(changes, heading, text):
    record = {
        "forward_passes": 61.234,
        "backward_passes": 60.0,
        "model": "tiny",
        "weights": "V1",
        "surrogate": None,
        "robust_accuracy_quantized": math.nan,
        "balanced_clean_accuracy": 0.7,
        "balanced_robust_accuracy": 0.25,
        "balanced_ci_low": 0.15,
        "balanced_ci_high": 0.45,
        "effective_n": 90.0,
        "is_cumulative": False,
        "dataset": "sample",
        "attack": "pgd",
        "norm": "linf",
        "eps": 0.5 / 255,
        "n": 100,
        "clean_accuracy": 0.8,
        "robust_accuracy": 0.345,
        "ci_low": 0.3,
        "ci_high": 0.401,
        "median_distance": 0.5 / 255,
        "wall_s": 12.3,
        "is_complete": True,
        "run": "run",
    }
    assert report.format_row(record | changes)[heading] == text


def rendered(summary, width=200):
    console = Console(width=width, file=io.StringIO())
    console.print(render_table(summary))
    return console.file.getvalue()


class TestTable:
    def test_shows_the_rows_and_lifts_what_they_share(self):
        text = rendered(summarise([make_run("a", model="one"), make_run("b", model="two[red]")]))
        assert "two[red]" in text and "worst_case" in text and "2/255" in text and "60.0" in text
        assert text.count("sample") == 1 and "incomplete" not in text

    def test_cuts_nothing_at_80_columns(self):
        text = rendered(summarise([make_run("a", model="lr_resnet50"), make_run("b", model="resnet50")]), width=80)
        assert "lr_resnet50" in text and "worst_case" in text and "/255" in text
        assert "…" not in text and max(map(len, text.splitlines())) <= 80

    def test_says_what_the_engine_noticed(self):
        run = make_run(metadata=({"device": "cpu", "randomised": "yes: robustness is overstated"},))
        assert warnings_of(run) == ["randomised: yes: robustness is overstated"]
        assert warnings_of(make_run()) == []

    def test_names_the_unfinished(self):
        text = rendered(summarise([make_run("done"), make_run("half", planned=2)]))
        assert "incomplete, only the images finished so far: half" in text and "5*" in text

    @pytest.mark.parametrize("others", [[], ["trained"]])
    def test_models_without_weights(self, others):
        run = make_run("untrained")
        run.manifest["model"]["weights"] = None
        text = rendered(summarise([run, *map(make_run, others)]))
        assert ("\n-  " if others else "weights -") in text
        assert "nan" not in text and "None" not in text and ("V1" in text) == bool(others)

    def test_of_nothing(self):
        assert rendered(summarise([])).strip() == ""


class TestWriteReport:
    def test_csv_keeps_full_precision(self, tmp_path):
        runs = [make_run("a"), make_run("b", model="other")]
        write_report(runs, tmp_path / "new" / "out")
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

    def test_files_and_text(self, tmp_path):
        paths = write_report([make_run("a"), make_run("b|c", model="other")], tmp_path)
        assert sorted(paths) == sorted(tmp_path.iterdir())
        assert {path.suffix for path in paths} == {".csv", ".md", ".tex", ".png", ".svg", ".pdf"} and len(paths) == 9
        text = (tmp_path / "robust_accuracy.md").read_text()
        assert "## sample, n = 5" in text and "ab" * 32 in text and "torch 2.13.0" in text and "1234abc" in text
        assert "| tiny | V1 | pgd | linf | 1/255 | 5 | 80.0 | 40.0 | 11.8-76.9 | inf | 2.5 s | - | a |" in text
        assert "b\\|c" in text and "INCOMPLETE" not in text and "mixed" not in text
        for path in paths:
            assert path.suffix != ".png" or f"]({path.name})" in text

    def test_latex(self, tmp_path):
        write_report([make_run("a_1"), make_run("b", model="100 %")], tmp_path)
        text = (tmp_path / "robust_accuracy.tex").read_text()
        assert "tiny & V1 & pgd & linf & 1/255 & 5 & 80.0 & 40.0 & 11.8-76.9 & inf & 2.5 s & - & a\\_1 \\\\\n" in text
        assert r"100 \% &" in text and text.count(r"\begin{longtable}") == 1

    def test_says_what_a_reader_must_know(self, tmp_path):
        write_report([make_run(planned=3, metadata=({"device": "cpu"}, {"device": "cuda"}))], tmp_path)
        text = (tmp_path / "robust_accuracy.md").read_text()
        assert "**INCOMPLETE:** 2 of 3 parts" in text and "| 5* |" in text
        assert "**computed with mixed device:** cpu, cuda" in text

    def test_datasets_never_share_a_table_or_figure(self, tmp_path):
        linf_only = {"pgd": DISTANCES["pgd"]}
        paths = write_report([make_run("a", linf_only), make_run("b", linf_only, sha256="ef" * 32)], tmp_path)
        assert len([path for path in paths if path.suffix == ".svg"]) == 2
        text = (tmp_path / "robust_accuracy.md").read_text()
        first, second = text.split("## sample")[1:]
        assert "| a |" in first and "| b |" not in first and "| b |" in second and "| a |" not in second

    def test_no_finished_part_yet(self, tmp_path):
        paths = write_report([make_run(distances={"pgd": ("linf", LADDER, [])}, planned=2)], tmp_path)
        assert len(paths) == 3
        assert "No part is finished yet." in paths[1].read_text()

    def test_no_runs(self, tmp_path):
        with pytest.raises(StoreError, match="at least one run"):
            write_report([], tmp_path)


def test_reports_need_no_torch():
    code = (
        "import sys, lrrobust.report, lrrobust.plots, lrrobust.results\n"
        "print([name for name in ('torch', 'numba', 'triton', 'matplotlib.pyplot') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_tables_need_no_matplotlib_nor_rich():
    code = "import sys, lrrobust.report; print([name for name in ('matplotlib', 'rich') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
