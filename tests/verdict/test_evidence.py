import math
from dataclasses import replace

import numpy as np
import pytest
from made_rows import by_pgd

from lrrobust.errors import ConfigError, StoreError
from lrrobust.verdict.evidence import (
    collect_evidence,
    gather,
    label_runs,
    match_accuracy,
)
from lrrobust.verdict.records import Subset, is_unbounded

INF = math.inf
PIXEL = 1 / 255
LADDER = (0.5 / 255, 1 / 255, 2 / 255)


def outcomes(*runs):
    return {(attack.name, attack.norm): attack for attack in gather(runs).attacks}


class TestGather:
    def test_breaking_eps_by_hand(self, make_run):
        found = outcomes(make_run("A", by_pgd([0, 0.3 * PIXEL, 1.7 * PIXEL, INF])))["pgd", "linf"]
        assert found.breaking_eps == pytest.approx([0, 0.3 * PIXEL, 1.7 * PIXEL, INF])
        assert found.eps == LADDER

    def test_images_are_ordered_by_name_whatever_the_rows_are(self, make_run):
        run = make_run("A", by_pgd([0, 1 * PIXEL, INF]), images=[7, 3, 5])
        side = gather([run])
        assert list(side.images) == ["ant\nant/3.png", "ant\nant/5.png", "ant\nant/7.png"]
        assert list(side.is_clean_correct) == [True, True, False]
        assert list(side.attacks[0].breaking_eps) == pytest.approx([PIXEL, INF, 0])

    def test_a_tolerated_overshoot_is_broken_at_its_eps(self, make_run):
        run = make_run("A", {"pgd": dict(distances=[PIXEL], eps=(PIXEL, 2 * PIXEL))})
        run.rows["linf_distance"] = run.rows["linf_distance"] + 1e-7
        assert list(outcomes(run)["pgd", "linf"].breaking_eps) == [PIXEL]

    def test_images_not_finished_are_unknown(self, make_run):
        run = make_run("A", {"pgd": dict(distances=[INF, INF, INF]), "cw": dict(distances=[0.2], norm="l2", eps=(0.5, INF))})
        assert np.isnan(outcomes(run)["cw", "l2"].breaking_eps).tolist() == [False, True, True]

    def test_an_attack_of_two_runs_breaks_what_either_broke(self, make_run):
        runs = [
            make_run("A", by_pgd(distances), seed=seed) for seed, distances in enumerate(([INF, PIXEL, INF], [PIXEL, INF, INF]))
        ]
        assert outcomes(*runs)["pgd", "linf"].breaking_eps == pytest.approx([PIXEL, PIXEL, INF])

    def test_curves_that_rise_are_counted(self, make_run):
        run = make_run("A", by_pgd([INF, 0.3 * PIXEL, 0.3 * PIXEL, 1.5 * PIXEL]))
        assert outcomes(run)["pgd", "linf"].rises.tolist() == [[0, 0], [1, 0]]
        # Image 1 recovers at the largest eps.
        run.rows.loc[(run.rows["index"] == 1) & (run.rows["eps"] == LADDER[2]), "is_broken"] = False
        assert outcomes(run)["pgd", "linf"].rises.tolist() == [[0, 0], [1, 1]]


class TestMatchAccuracy:
    def test_discards_from_the_more_accurate_until_both_agree(self):
        generator = np.random.default_rng(0)
        ours, theirs = generator.random(400) < 0.7, generator.random(400) < 0.5
        names = np.array([f"image {i}" for i in range(400)], dtype=object)
        keep = match_accuracy(ours, theirs, names)
        assert ours[keep].sum() == theirs[keep].sum()
        assert (ours & ~theirs)[~keep].all()
        assert (~keep).sum() == ours.sum() - theirs.sum()
        assert (match_accuracy(theirs, ours, names) == keep).all()

    def test_names_decide_not_places(self):
        ours, theirs = np.array([True] * 20 + [False] * 6), np.array([False] * 20 + [True] * 6)
        names = np.array([f"image {i}" for i in range(26)], dtype=object)
        kept = set(names[match_accuracy(ours, theirs, names)])
        order = np.random.default_rng(0).permutation(26)
        assert set(names[order][match_accuracy(ours[order], theirs[order], names[order])]) == kept
        assert len(kept) == 12

    def test_equal_accuracies_keep_all(self):
        ours, theirs = np.array([True, False, True]), np.array([False, True, True])
        assert match_accuracy(ours, theirs, np.array(list("abc"), dtype=object)).all()


class TestCollect:
    def pair(self, make_run, **options):
        return [make_run(model, by_pgd([INF, PIXEL, 0]), **options) for model in "AB"]

    def test_runs_of_the_claims_models_are_paired(self, make_claim, make_run):
        found, refused = collect_evidence(make_claim(), [*self.pair(make_run), make_run("C", by_pgd([0]))])
        assert [side.name for side in (found[0].treatment, found[0].control)] == ["A", "B"]
        assert len(found) == 1 and not refused
        assert {name: members.sum() for name, members in found[0].populations.items()} == {
            "all": 3,
            "both_correct": 2,
            "matched_accuracy": 3,
        }

    def test_rows_meet_by_image_not_by_place(self, make_claim, make_run):
        runs = [
            make_run("A", by_pgd([0, PIXEL, INF]), images=[0, 1, 2]),
            make_run("B", by_pgd([INF, PIXEL, 0.4 * PIXEL]), images=[2, 1, 5]),
        ]
        (evidence,), refused = collect_evidence(make_claim(), runs)
        (attack,) = evidence.attacks
        assert attack.treatment == pytest.approx([PIXEL, INF]) and attack.control == pytest.approx([PIXEL, INF])
        assert not refused

    @pytest.mark.parametrize("sides", [("A@V2", "A@V1"), ("A@V2", "A"), ("A", "A@V1"), ("A@cdcdcdcd", "A@efefefef01")])
    def test_a_claim_may_be_about_weights(self, make_claim, make_run, sides):
        distances = {"V1": [INF, PIXEL, 0], "V2": [PIXEL, INF, 0]}
        runs = [make_run("A", by_pgd(of), weights=weights) for weights, of in distances.items()]
        runs[0].manifest["model"]["state_sha256"] = "efefefef01" + 54 * "0"
        runs[1].manifest["model"]["state_sha256"] = "cd" * 32
        other = make_run("B", by_pgd([INF, INF, INF]))
        (found,), refused = collect_evidence(make_claim(treatment=sides[0], control=sides[1]), [*runs, other])
        (attack,) = found.attacks
        assert attack.treatment == pytest.approx([PIXEL, INF, 0]) and attack.control == pytest.approx([INF, PIXEL, 0])
        assert (found.treatment.name, found.control.name) == sides and not refused

    @pytest.mark.parametrize("side", ["A@V3", "A@", "A@cdcdcdc", "A@V", "@V1", "B@V1", "A@CDCDCDCD"])
    def test_weights_that_no_run_has_are_named(self, make_claim, make_run, side):
        runs = [make_run("A", by_pgd([INF]), weights=weights) for weights in ("V1", "V2")]
        found, (refused,) = collect_evidence(make_claim(treatment=side, control="A@V1"), runs)
        assert not found and refused.reason == f"No run of {side} is among those given, which are of A@V1, A@V2."

    def test_hashes_are_named_where_names_of_weights_tell_too_little(self, make_claim, make_run):
        runs = [make_run("A", by_pgd(of)) for of in ([INF], [INF, INF])]
        runs[1].manifest["model"]["state_sha256"] = "cd" * 32
        runs.append(make_run("B", by_pgd([INF]), weights=None))
        _, (refused,) = collect_evidence(make_claim(treatment="A@none", control="B@none"), runs)
        assert refused.reason.endswith("which are of A@cdcdcdcd, A@efefefef, B@efefefef.")

    @pytest.mark.parametrize("sides", [("A@V1", "A@efefefef"), ("A@efefefef", "A@efefefef01")])
    def test_no_run_is_of_both_sides(self, make_claim, make_run, sides):
        run = make_run("A", by_pgd([INF]), weights="V1")
        run.manifest["model"]["state_sha256"] = "efefefef01" + 54 * "0"
        found, (refused,) = collect_evidence(make_claim(treatment=sides[0], control=sides[1]), [run])
        assert not found and refused.reason == f"Treatment and control are the same: {run.folder.name} is a run of both."

    def test_weights_that_are_named_meet_all_others(self, make_claim, make_run):
        runs = [make_run("A", by_pgd([INF]), weights=f"V{i}") for i in (1, 2, 3)]
        found, refused = collect_evidence(make_claim(treatment="A@V2", control="A"), runs)
        assert not refused and [(of.treatment.runs, of.control.runs) for of in found] == [
            ((runs[1],), (runs[i],)) for i in (0, 2)
        ]

    def test_a_model_whose_name_looks_like_weights_is_a_model(self, make_claim, make_run):
        ours, theirs = (
            make_run("A", by_pgd([INF]), weights="V1"),
            make_run("A@V1", by_pgd([INF])),
        )
        (found,), refused = collect_evidence(make_claim(treatment="A", control="A@V1"), [ours, theirs])
        assert not refused and (found.treatment.runs, found.control.runs) == ((ours,), (theirs,))

    def test_each_subset_is_judged_by_itself_the_largest_first(self, make_claim, make_run):
        small = [make_run(model, by_pgd([INF]), images=[4]) for model in "AB"]
        found, _ = collect_evidence(make_claim(), small + self.pair(make_run))
        assert [len(evidence.images) for evidence in found] == [3, 1]

    def test_attacks_on_more_images_judge_a_subset_too(self, make_claim, make_run):
        """A cheap attack on all images, a costly one on the first two."""
        runs = [
            run
            for model in "AB"
            for run in (
                make_run(model, by_pgd([INF, PIXEL, 0])),
                make_run(model, {"cw": dict(distances=[0.3, 0.1], norm="l2", eps=(0.2, INF))}, images=[0, 1]),
            )
        ]
        found, refused = collect_evidence(make_claim(), runs)
        assert not refused
        judged = [
            ([attack.name for attack in evidence.attacks], len(evidence.treatment.images), len(evidence.treatment.runs))
            for evidence in found
        ]
        assert judged == [(["pgd"], 3, 1), (["pgd", "cw"], 2, 2)]
        assert [len(evidence.on_fewer) for evidence in found] == [1, 0] and len(found[0].on_fewer[0].treatment.images) == 2
        assert found[1].attacks[0].treatment == pytest.approx([INF, PIXEL])

    def test_a_claim_may_name_its_draw(self, make_claim, make_run):
        many, few = dict(distances=[PIXEL] * 4), dict(distances=[PIXEL] * 2)
        runs = [make_run(model, attacks) for model in "AB" for attacks in ({"pgd": many}, {"cw": few})]
        for run in runs:
            run.manifest["dataset"]["subset"] = {"n": run.manifest["dataset"]["n"], "seed": 3, "balanced": False}
        sha256 = runs[0].manifest["dataset"]["sha256"]
        for subset in ({"n": 4}, {"n": 4, "seed": 3, "balanced": False}, {"sha256": sha256[:8]}):
            (found,), (refused,) = collect_evidence(make_claim(subset=Subset(**subset)), runs)
            assert len(found.images) == 4 and [attack.name for attack in found.attacks] == ["pgd"]
            # What the others show of the attacks is still seen.
            assert [len(evidence.images) for evidence in found.on_fewer] == [2]
            assert (
                refused.reason.startswith("On sample, the claim asks for the subset ")
                and "these 2 images (sha256 " in refused.reason
            )
        for subset in ({"n": 3}, {"seed": 4}, {"n": 4, "balanced": True}, {"sha256": "0" * 8}):
            found, refused = collect_evidence(make_claim(subset=Subset(**subset)), runs)
            assert not found and len(refused) == 2
        # What is not finished yet is no other draw.
        for run in runs:
            unfinished = replace(run, rows=run.rows[run.rows["index"] != 1], is_complete=False)
            found, _ = collect_evidence(
                make_claim(subset=Subset(n=4, seed=3)), [unfinished if each is run else each for each in runs]
            )
            assert len(found) == 1
        # Any seed draws the same where all are drawn.
        for run in runs:
            run.manifest["dataset"]["subset"] = {"n": None, "seed": 0, "balanced": False}
        assert [len(e.images) for e in collect_evidence(make_claim(subset=Subset(n=4, seed=9)), runs)[0]] == [4]
        # Nothing is known of how images in common were drawn.
        apart = [make_run(model, {"pgd": many}, images=images) for model, images in (("A", [0, 1, 2, 3]), ("B", [0, 1, 2, 4]))]
        found, (refused,) = collect_evidence(make_claim(subset=Subset(n=3)), apart)
        assert not found and "the models were evaluated on two others" in refused.reason

    def test_overlapping_subsets_do_not_lend_each_other_attacks(self, make_claim, make_run):
        runs = [
            run
            for model in "AB"
            for run in (
                make_run(model, by_pgd([INF, PIXEL, INF])),
                make_run(model, {"fgsm": dict(distances=[INF, PIXEL])}, images=[2, 7]),
            )
        ]
        found, _ = collect_evidence(make_claim(), runs)
        assert [[attack.name for attack in evidence.attacks] for evidence in found] == [["pgd"], ["fgsm"]]
        assert all(len(evidence.treatment.runs) == 1 for evidence in found)

    def test_images_of_the_same_names_are_no_larger_set(self, make_claim, make_run):
        runs = [*self.pair(make_run), *self.pair(make_run)]
        for run in runs[2:]:
            run.manifest["dataset"]["sha256"] = "01" * 32
        found, _ = collect_evidence(make_claim(), runs)
        assert [len(evidence.treatment.runs) for evidence in found] == [1, 1]

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"treatment": "X"}, "No run of X is among"),
            ({"treatment": "X", "control": "Y"}, "No run of X or Y is among"),
            ({"dataset": "val"}, "not on val"),
            ({"attacks": ("pgd", "cw")}, "asks for the attacks cw"),
            ({"eps": {"linf": (0.3,)}}, "linf budgets"),
            ({"eps": {"l2": (0.3,)}}, "share no attack"),
            ({"eps": {"linf": (PIXEL,), "l2": (0.3,)}}, "l2 budgets"),
        ],
    )
    def test_says_why_a_claim_cannot_be_judged(self, make_claim, changes, message, make_run):
        found, (refused,) = collect_evidence(make_claim(**changes), self.pair(make_run))
        assert not found and refused.claim == "tested"
        assert message in refused.reason

    def test_nothing_in_common(self, make_claim, make_run):
        ours, theirs = self.pair(make_run)[0], make_run("B", by_pgd([INF]), images=[9])
        assert "no image was evaluated with both" in collect_evidence(make_claim(), [ours, theirs])[1][0].reason
        theirs = make_run("B", by_pgd([INF]), dataset="other")
        assert "not on a common data set" in collect_evidence(make_claim(), [ours, theirs])[1][0].reason

    def test_weights_go_with_weights_of_the_same_name(self, make_claim, make_run):
        runs = [run for weights in ("V0", "V1", "V2") for run in self.pair(make_run, weights=weights)][:-1]
        found, (refused,) = collect_evidence(make_claim(), runs)
        weights = [[run.manifest["model"]["weights"] for side in (e.treatment, e.control) for run in side.runs] for e in found]
        assert weights == [["V0", "V0"], ["V1", "V1"]]
        assert "A-sample-V2" in refused.reason and "left out" in refused.reason

    def test_the_only_weights_go_together_whatever_their_names(self, make_claim, make_run):
        runs = [self.pair(make_run, weights="mine")[0], self.pair(make_run, weights=None)[1]]
        assert len(collect_evidence(make_claim(), runs)[0]) == 1

    def test_worst_case_and_ladders(self, make_claim, make_run):
        attacks = {
            "fgsm": dict(distances=[INF, PIXEL, INF]),
            "pgd": dict(distances=[PIXEL, INF, INF], eps=(*LADDER, 0.5)),
            "cw": dict(distances=[0.1, 0.2, 0.3], norm="l2", eps=(0.0, 0.25, 0.5, INF)),
        }
        (evidence,), _ = collect_evidence(make_claim(), [make_run(model, attacks) for model in "AB"])
        assert [attack.name for attack in evidence.attacks] == ["fgsm", "pgd", "cw", "worst_case"]
        worst, cw = evidence.decisive
        assert (worst.name, cw.name) == ("worst_case", "cw")
        assert worst.treatment == pytest.approx([PIXEL, PIXEL, INF])
        # No budget of 0, and none without bound.
        assert evidence.ladder(worst) == LADDER and evidence.ladder(cw) == (0.25, 0.5)


class TestLabels:
    @pytest.fixture
    def runs(self, make_run):
        of_models = (("A", "V1"), ("A", "V2"), ("B", "V1"))
        runs = [make_run(model, by_pgd([INF]), weights=weights) for model, weights in of_models]
        runs[1].manifest["model"]["state_sha256"] = "01" * 32
        return runs

    def test_as_a_claim_names_a_side(self, runs):
        assert label_runs(["A@V2=A (ours)", "B=B=b"], runs) == {runs[1]: "A (ours)", runs[2]: "B=b"}
        assert label_runs([f"A@{'01' * 4}=A (ours)"], runs) == {runs[1]: "A (ours)"}

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            (["A=mine"], "A is more than one network; give each its own, of A@V1, A@V2"),
            (["C=mine"], "no run is of C; the runs are of A@V1, A@V2, B@V1"),
            (["A@V1"], "expected MODEL=TEXT"),
            (["A@V1= "], "expected MODEL=TEXT"),
            (["A@V1=B"], "another model is called 'B' already"),
            (["A@V1=mine", "B=mine"], "another model is called 'mine' already"),
        ],
    )
    def test_that_would_mislead_are_refused(self, runs, given, message):
        with pytest.raises(ConfigError, match=message):
            label_runs(given, runs)


def test_grey_is_within_half_the_pixel_range():
    assert is_unbounded(0.5, "linf") and is_unbounded(INF, "l2")
    assert not is_unbounded(0.49, "linf") and not is_unbounded(2.0, "l2")


def test_a_manifest_that_says_too_little(make_claim, make_run):
    run = make_run("A", by_pgd([INF]))
    del run.manifest["dataset"]["name"]
    with pytest.raises(StoreError, match="must hold dataset.name"):
        collect_evidence(make_claim(), [run, make_run("B", by_pgd([INF]))])
