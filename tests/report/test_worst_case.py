import math
from dataclasses import replace

import pytest

from lrrobust.diagnostics.records import Diagnostic, Diagnostics, write_diagnostics
from lrrobust.errors import ConfigError
from lrrobust.report.summary import summarise
from lrrobust.report.worst_case import parse_budget, worst_cases, worst_cases_by_images

PIXEL = 1 / 255
LADDER = (PIXEL, 2 * PIXEL)


def texts(found):
    headings = [column.heading for column in found.table.columns]
    return [dict(zip(headings, (cell.text for cell in row), strict=True)) for row in found.table.rows]


class TestPooling:
    def test_of_one_run_it_is_the_summarys_worst_case(self, make_run):
        run = make_run("a")
        (row,) = texts(worst_cases({"a": run}))
        summary = summarise([run])
        for of_norm in summary.groupby("norm"):
            worst = of_norm[1][of_norm[1]["attack"] == "worst_case"]
            worst = worst if len(worst) else of_norm[1]
            for record in worst[worst["eps"] < math.inf].to_dict("records"):
                eps = f"{record['eps'] * 255:.4g}/255" if record["norm"] == "linf" else f"{record['eps']:.4g}"
                assert row[f"{record['norm']} {eps}"] == f"{100 * record['robust_accuracy']:.1f}"

    def test_what_any_run_of_a_network_breaks_is_broken(self, make_run):
        first = make_run("a", {"pgd": ("linf", LADDER, [0.5 * PIXEL, 9, 9, 9])})
        second = make_run("b", {"apgd": ("linf", LADDER, [9, 1.5 * PIXEL, 9, 9])})
        found = worst_cases({"a": first, "b": second})
        (row,) = texts(found)
        assert (row["n"], row["clean %"], row["linf 1/255"], row["linf 2/255"]) == ("4", "100.0", "75.0", "50.0")
        assert "Attacks: apgd, pgd (linf)." in found.how_to_read and "attacks" not in row
        # Wilson, 2 of 4: 15.0 to 85.0 %; 3 of 4: 30.1 to 95.4 %.
        assert "reach at most 44.9 points" in found.how_to_read

    def test_images_wrong_when_clean_are_no_success_and_budgets_are_in_order(self, make_run):
        run = make_run("a", {"cw": ("l2", (0.5, math.inf), [None, None, 0.4, 1]), "pgd": ("linf", LADDER, [None, None, 0, 0])})
        found = worst_cases({"a": run})
        (row,) = texts(found)
        assert list(row.items())[1:] == [
            ("weights", "V1"), ("n", "4"), ("clean %", "50.0"), ("linf 1/255", "0.0"), ("linf 2/255", "0.0"), ("l2 0.5", "25.0")
        ]  # fmt: skip
        assert "reach at most 49.0 points" in found.how_to_read

    def test_networks_of_one_name_are_rows_of_their_own(self, make_run):
        runs = {name: make_run(name, {"pgd": ("linf", LADDER, [9, 9])}) for name in "ab"}
        for name, run in runs.items():
            run.manifest["model"]["state_sha256"] = name * 64
        assert [row["parameters"] for row in texts(worst_cases(runs))] == ["a" * 8, "b" * 8]

    def test_other_attacks_are_told_beside_each_model(self, make_run):
        cw = {"cw": ("l2", (0.5,), [1, 1])}
        runs = {
            "a": make_run("a", {"pgd": ("linf", LADDER, [9, 9]), **cw}),
            "b": make_run(
                "b", {"pgd": ("linf", LADDER[:1], [9, 9]), "fgsm": ("linf", LADDER[:1], [9, 9]), **cw}, model="other"
            ),
        }
        found = worst_cases(runs)
        rows = [(row["attacks"], row["linf 2/255"]) for row in texts(found)]
        assert rows == [("pgd (linf); cw (l2)", "100.0"), ("fgsm, pgd (linf); cw (l2)", "-")]
        # A budget that one of them has is none that no run has.
        (chosen,) = worst_cases_by_images(list(runs.values()), [("linf", LADDER[1])]).values()
        assert [row["linf 2/255"] for row in texts(chosen)] == ["100.0", "-"]
        assert "did not meet the same attacks" in found.how_to_read

    def test_images_that_an_attack_has_not_finished_do_not_count(self, make_run):
        run = make_run("a", {"pgd": ("linf", LADDER, [PIXEL, 9, 9]), "fgsm": ("linf", LADDER, [9, 9])}, planned=2)
        (row,) = texts(worst_cases({"a": run}))
        assert (row["n"], row["linf 1/255"]) == ("3*", "50.0")
        run.manifest["attacks"].append({"name": "cw", "norm": "linf"})
        assert texts(worst_cases({"a": run}))[0]["linf 1/255"] == "-"

    def test_transfer_is_no_attack_on_the_model(self, make_run):
        run = make_run("a")
        run.manifest["surrogate"] = {"name": "other", "weights": "V1"}
        assert not worst_cases({"a": run}).table.rows and not worst_cases_by_images([run])


def test_doubts_about_the_attacks_are_said_of_the_models_they_are_of(make_run, tmp_path):
    runs = {name: replace(make_run(name, model=name), folder=tmp_path / name) for name in ("failed", "sound", "none")}
    for name, run in runs.items():
        run.folder.mkdir()
        results = tuple(
            Diagnostic(name=check, passed=check != "noise" or name == "sound", detail="Seen.", attack="pgd")
            for check in ("zero_gradient", "noise", "late_breaks")
        )
        if name != "none":
            write_diagnostics(run, Diagnostics(fingerprint="ab" * 32, sample=(0,), wall_s=1, results=results))
    said = worst_cases(runs).how_to_read
    assert "Checks of attacks failed for failed: robust accuracies may be too high." in said
    assert "not looked into for all runs of none: robust accuracies may be too high." in said
    assert "not complete" not in said


def test_budgets_choose_and_order_the_columns(make_run):
    run = make_run("a", {"pgd": ("linf", LADDER, [9, 9]), "cw": ("l2", (0.5, math.inf), [1, 1])})
    (found,) = worst_cases_by_images([run], [("l2", 0.5), ("linf", PIXEL)]).values()
    assert [column.heading for column in found.table.columns][-2:] == ["l2 0.5", "linf 1/255"]
    with pytest.raises(ConfigError, match="--budget linf:8/255: no run has rows of it"):
        worst_cases_by_images([run], [("linf", 8 * PIXEL)])


@pytest.mark.parametrize("text", ["8/255", "linf", "linf:", "linf:0", "l3:1", "linf:-1", "linf:x", "linf:1/0"])
def test_what_is_no_budget_is_refused(text):
    with pytest.raises(ConfigError, match="expected a budget such as linf:8/255"):
        parse_budget(text)
    assert parse_budget("linf:8/255") == ("linf", 8 / 255)


def test_labels_take_the_place_of_names(make_run):
    run = make_run("a")
    run.manifest["model"]["state_sha256"] = "0a" * 32
    found = worst_cases({"a": run}, labels={run: "Tiny (ours)"})
    assert texts(found)[0]["model"] == "Tiny (ours)"
    assert "Tiny (ours) is tiny with the parameters 0a0a0a0a (sha256)." in found.how_to_read
