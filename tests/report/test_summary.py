import math

import pytest
from scipy.stats import binomtest

from lrrobust.errors import StoreError
from lrrobust.report.summary import SUMMARY_COLUMNS, summarise

LADDER = (1 / 255, 2 / 255)
INF = math.inf


def numbers(summary, attack, eps):
    (record,) = summary[(summary["attack"] == attack) & (summary["eps"] == eps)].to_dict("records")
    return record


class TestSummary:
    def test_numbers_by_hand(self, make_run):
        summary = summarise([make_run()])
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

    def test_medians_are_in_the_attacks_norm_with_failures_infinite(self, make_run):
        summary = summarise([make_run()])
        assert numbers(summary, "cw", INF)["median_distance"] == pytest.approx(0.35)  # of 0.2 0.3 0.4 inf
        assert numbers(summary, "pgd", LADDER[1])["median_distance"] == INF  # of 0.7 0.8 inf inf
        # 0.7 0.8 1.9 inf, of which 1.9 lies outside the smaller eps.
        assert numbers(summary, "worst_case", LADDER[1])["median_distance"] == pytest.approx(1.35 / 255)
        assert numbers(summary, "worst_case", LADDER[0])["median_distance"] == INF

    def test_balanced_accuracy_counts_every_class_alike(self, make_run):
        run = make_run()
        # Images 0 and 4, wrong when clean and never broken, are the only ones of their classes.
        run.rows["label"] = run.rows["index"].map({0: 1, 1: 3, 2: 3, 3: 3, 4: 2})
        summary = summarise([run])
        one = numbers(summary, "pgd", LADDER[0])
        found = (one["balanced_clean_accuracy"], one["balanced_robust_accuracy"])
        assert found == pytest.approx(((0 + 1 + 1) / 3, (0 + 1 / 3 + 1) / 3))
        assert one["effective_n"] == pytest.approx(9 / (1 + 1 + 1 / 3))
        assert numbers(summary, "worst_case", LADDER[1])["balanced_robust_accuracy"] == pytest.approx(1 / 3)
        assert one["balanced_ci_low"] < one["balanced_robust_accuracy"] < one["balanced_ci_high"]

    def test_what_earlier_attacks_broke_is_marked_and_no_failure(self, make_run):
        apgd, square = [0.5 / 255, 1.5 / 255, INF], [INF, INF, 0.7 / 255]
        run = make_run(distances={"apgd": ("linf", LADDER, apgd), "square": ("linf", LADDER, square)})
        is_earlier = (run.rows["attack"] == "square") & (run.rows["index"] == 0)
        run.rows.loc[is_earlier, ["is_broken", "outcome"]] = [True, "broken_by_earlier_attack"]
        summary = summarise([run])
        assert summary.drop_duplicates("attack").set_index("attack")["is_cumulative"].to_dict() == {
            "apgd": False,
            "square": True,
            "worst_case": False,
        }
        # Of three images one was broken before and one is broken by squares: no median distance of two thirds failed.
        assert numbers(summary, "square", LADDER[0])["robust_accuracy"] == 1 / 3
        assert math.isnan(numbers(summary, "square", LADDER[0])["median_distance"])
        assert numbers(summary, "worst_case", LADDER[0])["median_distance"] == pytest.approx(0.7 / 255)

    def test_worst_case_counts_what_any_eps_or_minimal_norm_proves(self, make_run):
        distances = {
            "cw": ("l2", (INF,), [0.3, 0.6, INF]),
            "pgd": ("l2", (0.25, 0.5), [INF, INF, 0.2]),
        }
        summary = summarise([make_run(distances=distances)])
        worst = summary[summary["attack"] == "worst_case"].set_index("eps")["robust_accuracy"]
        assert worst.to_dict() == {0.25: 2 / 3, 0.5: 1 / 3, INF: 0.0}

    def test_worst_case_does_not_count_the_unbroken_at_infinity(self, make_run):
        distances = {"cw": ("l2", (INF,), [None, 0.3, INF, INF]), "fab": ("l2", (INF,), [None, INF, INF, INF])}
        assert numbers(summarise([make_run(distances=distances)]), "worst_case", INF)["robust_accuracy"] == 2 / 4

    def test_8_bits_are_counted_in_the_worst_case_too(self, make_run):
        distances = {
            "pgd": ("linf", LADDER, [None, 0.5 / 255, 0.5 / 255, INF, INF]),
            "apgd": ("linf", LADDER, [None, INF, 1.5 / 255, 1.5 / 255, INF]),
            "cw": ("l2", (INF,), [None, 0.1, 0.2, INF, 0.3]),
            "fab": ("l2", (INF,), [None, INF, INF, 0.1, INF]),
        }
        assert summarise([make_run(distances=distances)])["robust_accuracy_quantized"].isna().all()
        run = make_run(distances=distances)
        run.manifest["real_pixels"] = {"bits": 8}
        # Image 1 is broken in no file.
        run.rows["is_broken_quantized"] = run.rows["is_broken"] & (run.rows["index"] != 1)
        summary = summarise([run]).set_index(["attack", "eps"])
        one, two = LADDER
        assert (5 * summary["robust_accuracy_quantized"]).round(9).groupby("attack").agg(list).to_dict() == {
            "pgd": [3, 3], "apgd": [4, 2], "cw": [2], "fab": [3], "worst_case": [3, 2, 1]
        }  # fmt: skip

    def test_a_distance_over_eps_by_the_tolerance_is_broken_in_the_worst_case_too(self, make_run):
        run = make_run(distances={"pgd": ("l2", (0.5,), [0.5]), "apgd": ("l2", (0.5,), [INF])})
        run.rows["l2_distance"] = run.rows["l2_distance"] + 1e-7
        assert numbers(summarise([run]), "worst_case", 0.5)["robust_accuracy"] == 0

    def test_worst_case_is_over_images_that_all_attacks_finished(self, make_run, suite_distances):
        distances = suite_distances | {"fgsm": ("linf", LADDER, [None, 0.9 / 255, INF])}
        summary = summarise([make_run(distances=distances, planned=2)])
        assert numbers(summary, "fgsm", LADDER[0])["n"] == 3
        assert numbers(summary, "pgd", LADDER[0])["n"] == 5
        worst = numbers(summary, "worst_case", LADDER[0])
        assert (worst["n"], worst["clean_accuracy"], worst["robust_accuracy"]) == (3, 2 / 3, 1 / 3)
        assert worst["wall_s"] == 3.0
        assert not summary["is_complete"].any()

    def test_no_worst_case_before_every_attack_has_begun(self, make_run, suite_distances):
        distances = suite_distances | {"fgsm": ("linf", LADDER, [])}
        assert set(summarise([make_run(distances=distances)])["attack"]) == {"pgd", "cw"}

    def test_one_attack_is_its_own_worst_case(self, make_run, suite_distances):
        assert set(summarise([make_run(distances={"cw": suite_distances["cw"]})])["attack"]) == {"cw"}

    def test_all_wrong_when_clean(self, make_run):
        record = numbers(summarise([make_run(distances={"pgd": ("linf", LADDER, [None, None])})]), "pgd", LADDER[0])
        assert (record["clean_accuracy"], record["robust_accuracy"]) == (0, 0)
        assert math.isnan(record["median_distance"])

    def test_a_run_without_rows(self, make_run):
        empty = make_run("empty", {"pgd": ("linf", LADDER, [])})
        assert summarise([empty]).empty and tuple(summarise([empty]).columns) == SUMMARY_COLUMNS
        assert len(summarise([empty, make_run()])) == len(summarise([make_run()]))

    def test_a_manifest_that_says_too_little(self, make_run):
        run = make_run()
        del run.manifest["dataset"]["sha256"]
        with pytest.raises(StoreError, match="/results/run/manifest.json must hold dataset.sha256"):
            summarise([run])
