import json
from dataclasses import replace

import pytest
from found_safeguards import GOOD, INF, PIXEL, failed, named
from made_rows import by_pgd

from lrrobust.diagnostics.records import DIAGNOSTICS_FILE, DIAGNOSTICS_VERSION, Diagnostics
from lrrobust.verdict.evidence import collect_evidence
from lrrobust.verdict.judge import judge
from lrrobust.verdict.safeguards import check_evidence

LADDER = (0.5 / 255, 1 / 255, 2 / 255)


def test_who_always_says_the_same_is_not_robust(check_runs, make_run):
    def says_only_zero(runs):
        rows = runs[0].rows
        rows["clean_prediction"] = 0
        rows["is_clean_correct"] = rows["label"] == 0

    for change, passed in ((lambda runs: None, True), (says_only_zero, False)):
        runs = [make_run(model, by_pgd([INF] * 100)) for model in "AB"]
        change(runs)
        ours, theirs = named(check_runs(runs, largest_clean_difference=0.95), "better_than_chance")
        assert (ours.passed, theirs.passed) == (passed, True) and ours.withholds == ("supported",)
    assert "right on 10 of 100 images; by chance, with the same answers, it would be on 10.0" in ours.detail


@pytest.mark.parametrize("of_class", [90, 100])
def test_chance_is_that_of_the_answers_given(check_runs, make_run, of_class):
    """Nine of ten images are of one class, or all: whoever says it most often is right most often."""
    runs = [make_run(model, by_pgd([INF] * of_class + [0] * (100 - of_class))) for model in "AB"]
    for run in runs:
        run.rows["label"] = (run.rows["index"] >= of_class).astype("int32")
        run.rows["clean_prediction"] = 0
    ours, theirs = named(check_runs(runs), "better_than_chance")
    assert ours.passed is theirs.passed is False
    said = f"right on {of_class} of 100 images; by chance, with the same answers, it would be on {of_class}.0:"
    assert said in ours.detail


def rise(model, count):
    """The first images recover at the largest eps."""

    def change(runs):
        rows = runs["AB".index(model)].rows
        recovered = (rows["attack"] == "pgd") & (rows["eps"] == LADDER[2]) & (rows["index"] < count)
        rows.loc[recovered, "is_broken"] = False

    return change


@pytest.mark.parametrize(("count", "passed"), [(0, True), (5, True), (6, False)])
def test_curves_may_not_rise_beyond_noise(check_runs, count, passed, make_run):
    # Two steps at 5 %: p <= 2.5 % takes six rises without a fall.
    runs = [make_run(model, by_pgd([0.4 * PIXEL] * 20)) for model in "AB"]
    rise("A", count)(runs)
    ours, theirs = named(check_runs(runs), "monotone_curves")
    assert (ours.passed, theirs.passed) == (passed, True)
    assert (f"{count} images of A" in ours.detail) == (count > 0)


@pytest.mark.parametrize(
    ("direction", "withheld"), [("more_robust", ["supported", "refuted"]), ("less_robust", ["refuted", "supported"])]
)
def test_doubts_about_a_model_withhold_what_rests_on_its_robustness(check_runs, direction, withheld, make_run):
    survivor = GOOD | {"cw": dict(distances=[0.5, INF, 0.1, 0], norm="l2", eps=(0.2, INF))}
    for place, verdict in enumerate(withheld):
        attacks = [GOOD, GOOD]
        attacks[place] = survivor
        runs = [make_run(model, these) for model, these in zip("AB", attacks)]
        safeguards = check_runs(runs, direction=direction)
        assert failed(safeguards) == [("unbounded_attack", "cw", (verdict,))]
        (found,) = [guard for guard in safeguards if guard.passed is False]
        assert f"1 of 4 images of {'AB'[place]} withstand cw" in found.detail


def test_one_attack_without_budget_is_enough_to_end_robustness(check_runs, make_run):
    attacks = {
        "fgsm": dict(distances=[INF, 0.1, 0.2], eps=(*LADDER, 0.5)),
        "pgd": dict(distances=[0.3, 0.1, 0.2], eps=(*LADDER, 0.5)),
        "square": dict(distances=[INF, INF, 0.001]),
    }
    found = named(check_runs([make_run(model, attacks) for model in "AB"]), "unbounded_attack")
    assert [(guard.passed, guard.attack) for guard in found] == [(True, "worst_case")] * 2


def test_what_another_attack_breaks_within_a_budget_is_broken_without_one(check_runs, make_run):
    for broken_by_pgd, passed in ((0.005, True), (INF, False)):
        attacks = {
            "pgd": dict(distances=[broken_by_pgd, 0.005, 0.005], norm="l2"),
            "cw": dict(distances=[INF, 0.004, 0.006], norm="l2", eps=(*LADDER, INF)),
        }
        found = named(check_runs([make_run(model, attacks) for model in "AB"]), "unbounded_attack")
        assert [(guard.passed, guard.attack) for guard in found] == [(passed, "cw")] * 2


@pytest.mark.parametrize(
    ("noted", "passed"),
    [
        ([("pgd", True)], True),
        ([("pgd", True), ("pgd", False)], False),
        ([("pgd", None)], False),
        ([("pgd", True, "l2")], False),
        ([(None, True)], True),
        ([("unjudged", True)], False),
        ([], False),
    ],
    ids=[
        "broken",
        "not in every run",
        "not known",
        "of another norm",
        "by what stands in for several",
        "of another attack",
        "nothing",
    ],
)
def test_without_an_unbounded_attack_diagnostics_must_say_that_it_would_break_all(
    make_claim, make_run, large_eps, note, noted, passed
):
    ours, theirs = (make_run(model, by_pgd([distance] * 200)) for model, distance in zip("AB", (INF, PIXEL / 2)))
    note(ours, [large_eps(*each) for each in noted])
    (evidence,), _ = collect_evidence(make_claim(), [ours, theirs])
    found, of_control = named(check_evidence(evidence), "unbounded_attack")
    assert (found.passed, found.withholds, of_control.passed) == (passed, ("supported",), True)
    assert passed or "run one that has no budget, such as cw" in found.detail
    assert judge(evidence).verdict == ("supported" if passed else "inconclusive")


def test_what_is_known_of_an_attack_in_one_norm_is_not_known_in_another(check_runs, make_run, large_eps, note):
    runs = []
    for model, distance in zip("AB", (INF, PIXEL / 2)):
        for norm, results in (("linf", [large_eps("pgd")]), ("l2", [])):
            # As two configurations of one name.
            run = make_run(model, {"pgd": dict(distances=[distance] * 200, norm=norm)}, folder=None, seed=norm == "l2")
            runs.append(replace(run, folder=run.folder.with_name(f"{model}-{norm}")))
            note(runs[-1], results)
    found = {guard.detail.split()[1]: guard.passed for guard in named(check_runs(runs), "unbounded_attack")[:2]}
    assert found == {"linf": True, "l2": False}


def test_what_another_run_says_of_attacks_that_do_not_judge_is_no_success_of_those(check_runs, make_run, large_eps, note):
    runs = []
    for model, distance in zip("AB", (INF, PIXEL / 2)):
        for attack in ("pgd", "apgd"):
            run = make_run(model, {attack: dict(distances=[distance] * 200)}, folder=None)
            runs.append(replace(run, folder=run.folder.with_name(f"{model}-{attack}")))
            note(runs[-1], [large_eps(None)] if attack == "apgd" else [])
    for attacks, passed in ((("pgd",), False), (("apgd",), True)):
        assert named(check_runs(runs, attacks=attacks), "unbounded_attack")[0].passed is passed


def test_attacks_that_only_break_the_rules_have_failed(check_runs, make_run):
    runs = [make_run(model, by_pgd([INF] * 100)) for model in "AB"]
    for count, passed in ((1, True), (2, False)):
        runs[0].rows.loc[runs[0].rows["index"] < count, "outcome"] = "rejected"
        ours, theirs = named(check_runs(runs), "valid_proposals")
        assert (ours.passed, theirs.passed) == (passed, True) and f"For {count} of 100 images of A" in ours.detail


def test_what_the_engine_noticed_counts(check):
    noticed = {"pgd-000000-000004": {"nonfinite_gradients": "yes: the attack was not at full strength"}}
    safeguards = check(treatment={"part_metadata": noticed})
    assert failed(safeguards) == [("attack_diagnostics", None, ("supported",))]
    assert any("gradients were infinite or NaN: the attack was not at full strength" in guard.detail for guard in safeguards)


def test_runs_that_were_not_looked_into_support_nothing(check, tmp_path):
    safeguards = check(treatment={"folder": tmp_path / "other"})
    assert failed(safeguards) == [("unbounded_attack", "pgd", ("supported",)), ("attack_diagnostics", None, ("supported",))]
    assert "other carries no diagnostics" in named(safeguards, "attack_diagnostics")[0].detail


def test_diagnostics_of_another_version_are_none(check, tmp_path):
    found = Diagnostics(fingerprint="ab" * 32, sample=(0,), wall_s=1.0, results=()).model_dump()
    for version in (DIAGNOSTICS_VERSION - 1, DIAGNOSTICS_VERSION + 1):
        (tmp_path / DIAGNOSTICS_FILE).write_text(json.dumps({**found, "version": version}))
        (noted,) = [each for each in named(check(treatment={"folder": tmp_path}), "attack_diagnostics") if not each.passed]
        assert "carries no diagnostics by the rules of this version" in noted.detail and "same eval command" in noted.detail


def test_diagnostics_of_runs_count(check, large_eps, tmp_path):
    for passed in (True, False, None):
        found = {"name": "zero_gradient", "passed": passed, "detail": "40 % of images have none.", "attack": "pgd"}
        content = {"fingerprint": "ab" * 32, "sample": [0], "wall_s": 1.0, "results": [found, large_eps("pgd").model_dump()]}
        (tmp_path / DIAGNOSTICS_FILE).write_text(json.dumps(content))
        safeguards = check(treatment={"folder": tmp_path})
        assert failed(safeguards) == ([("attack_diagnostics", "pgd", ("supported",))] if passed is False else [])
        assert any("zero_gradient: 40 % of images have none." in guard.detail for guard in safeguards)


class TestTransfer:
    N = 40

    def runs(self, make_run, treatment, transferred):
        """White-box runs of A and B, and what images made on B do to A."""
        attacks = [by_pgd(distances) for distances in (treatment, [0.4 * PIXEL] * self.N, transferred)]
        yield make_run("A", attacks[0])
        yield make_run("B", attacks[1])
        yield make_run("A", attacks[2], surrogate="B")

    def check(self, make_claim, runs):
        (evidence,), refused = collect_evidence(make_claim(), list(runs))
        assert not refused
        return evidence, named(check_evidence(evidence), "transfer")

    def test_a_model_that_falls_to_images_of_another_only_is_not_called_robust(self, make_claim, make_run):
        runs = self.runs(make_run, [INF] * self.N, [PIXEL] * 30 + [INF] * 10)
        evidence, (treatment, control) = self.check(make_claim, runs)
        assert treatment.passed is False and treatment.withholds == ("supported",)
        assert "Transfer beats the white-box attacks" in treatment.detail and "break 30 of 40 images" in treatment.detail
        assert control.passed is None
        assert judge(evidence).verdict == "inconclusive"

    def test_transfer_on_some_of_the_images_guards_all(self, make_claim, make_run):
        on_all = [make_run(model, by_pgd([INF] * 60)) for model in "AB"]
        runs = [*on_all, *self.runs(make_run, [INF] * self.N, [PIXEL] * 30 + [INF] * 10)]
        (largest, _), _ = collect_evidence(make_claim(), runs)
        assert len(largest.treatment.images) == 60
        assert [guard.passed for guard in named(check_evidence(largest), "transfer")] == [False, None]

    def test_without_transfer_the_same_runs_support_the_claim(self, make_claim, make_run):
        runs = list(self.runs(make_run, [INF] * self.N, [PIXEL] * 30 + [INF] * 10))[:2]
        evidence, _ = self.check(make_claim, runs)
        assert judge(evidence).verdict == "supported"

    def test_a_sound_model_passes_and_no_number_changes(self, make_claim, make_run):
        runs = list(self.runs(make_run, [PIXEL] * 30 + [INF] * 10, [PIXEL] * 15 + [INF] * 25))
        evidence, (treatment, _) = self.check(make_claim, runs)
        assert treatment.passed is True
        alone, _ = self.check(make_claim, runs[:2])
        assert judge(evidence).comparisons == judge(alone).comparisons
        assert len(judge(evidence).runs) == 2
