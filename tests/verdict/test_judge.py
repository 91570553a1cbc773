import dataclasses
import math

import numpy as np
import pytest
from made_rows import by_pgd

from lrrobust.stats import paired_difference_interval
from lrrobust.verdict import judge as judge_module
from lrrobust.verdict.judge import judge_claims, write_verdicts
from lrrobust.verdict.records import POPULATIONS, Claim, Verdicts

INF = math.inf
PIXEL = 1 / 255
L2 = (0.1, 0.2, 0.4, INF)


def attacks_of(images, seed, gain=1.0, rate=0.9):
    """Two attacks a norm on images of some robustness, of which a model classifies `rate` correctly.

    Both models of a pair share the robustness of the images, up to a tenth, and `gain` multiplies it.
    """
    own = np.random.default_rng(0).gamma(2.0, 1.0, images)
    generator = np.random.default_rng(seed)
    distance = gain * own * generator.lognormal(0, 0.1, images) * (generator.random(images) < rate)
    weaker = distance * generator.uniform(1, 1.5, images)
    return {
        "fgsm": dict(distances=weaker * PIXEL),
        "pgd": dict(distances=distance * PIXEL),
        "pgd_l2": dict(distances=0.15 * weaker, norm="l2", eps=L2[:3]),
        "cw": dict(distances=0.1 * distance, norm="l2", eps=L2),
    }


def better():
    return attacks_of(1500, 1, gain=1.5, rate=0.97)


def usual():
    return attacks_of(1500, 2, rate=0.97)


@pytest.fixture
def judged(make_run, make_claim):
    def judged(ours, theirs, claim=None, **options):
        runs = [make_run("A", ours, **options), make_run("B", theirs)]
        (result,) = judge_claims([make_claim(**claim or {})], runs).results
        return result

    return judged


@pytest.fixture
def supported(judged):
    return judged(better(), usual())


class TestVerdicts:
    def test_supported(self, supported):
        assert supported.verdict == "supported"
        assert [reason.partition(" in every population")[0] for reason in supported.reasons[:2]] == [
            "At eps 0.2 in l2 (worst_case), A is more robust than B",
            "At eps 2/255 in linf (worst_case), A is more robust than B",
        ]
        assert "all intervals lie above" in supported.reasons[2]
        assert "with probability 80 %" in supported.reasons[-2]
        found = [row.smallest_detectable for row in supported.comparisons if row.is_decisive and row.population == "all"]
        assert (
            f"{100 * min(found):.3g} points to {100 * max(found):.3g} points on all images (n = 1500)" in supported.reasons[-2]
        )
        assert "attacks that break more of A than those made here" in supported.reasons[-1]

    def test_the_mirrored_claim_is_supported_by_mirrored_evidence(self, judged, supported):
        mirrored = judged(usual(), better(), {"direction": "less_robust"})
        assert mirrored.verdict == "supported"
        assert [row.difference for row in mirrored.comparisons] == [-row.difference for row in supported.comparisons]
        assert mirrored.reasons[0].startswith("At eps 0.2 in l2 (worst_case), B is more robust than A")
        assert mirrored.reasons[0].partition(": ")[2] == supported.reasons[0].partition(": ")[2]

    def test_harm_refutes(self, judged):
        result = judged(attacks_of(1500, 1, gain=0.6, rate=0.97), usual())
        assert result.verdict == "refuted"
        assert "B is more robust than A in every population" in result.reasons[0]
        assert result.reasons[1] == "Nowhere is A significantly more robust."
        assert "attacks that break more of B than those made here" in result.reasons[-1]

    def test_no_difference_refutes(self, judged):
        result = judged(attacks_of(1500, 1, rate=0.99), attacks_of(1500, 2, rate=0.99), {"smallest_difference": 0.05})
        assert result.verdict == "refuted"
        assert "Nowhere is A more robust by the 5 points that matter" in result.reasons[0]

    def test_few_images_are_inconclusive_and_say_how_few(self, judged):
        result = judged(attacks_of(50, 1, rate=1), attacks_of(50, 2, rate=1))
        assert result.verdict == "inconclusive"
        assert not any("safeguard" in reason for reason in result.reasons)
        assert "more images, on which smaller differences show" in result.reasons[-1]
        text = " ".join(result.reasons)
        assert "In l2 and linf no eps shows A more robust in every population" in text
        assert "not ruled out" in text and "(n = 50)" in text

    def test_what_fails_besides_is_said_too(self, judged):
        result = judged(attacks_of(50, 1, rate=1), attacks_of(50, 2, rate=0.9))
        assert any(reason.startswith("Besides, a safeguard failed: Clean accuracy is 100.0 %") for reason in result.reasons)
        assert "What would change this verdict: clean accuracy in order, and then more images" in result.reasons[-1]

    def test_better_here_but_possibly_worse_there(self, judged):
        ours, theirs = np.full(1000, 3 * PIXEL), np.full(1000, 3 * PIXEL)
        # At 0.5/255 80 images fall to the control alone, at 1/255 both lose 60 others.
        theirs[:80], ours[100:160], theirs[200:260] = 0.3 * PIXEL, 0.7 * PIXEL, 0.7 * PIXEL
        ours[:80] = 0.7 * PIXEL
        result = judged(by_pgd(ours), by_pgd(theirs))
        assert result.verdict == "inconclusive"
        assert result.reasons[0].startswith("At eps 0.5/255 in linf (pgd), A is more robust than B in every population")
        assert any("not ruled out that A is less robust by 2 points or more: its lead is " in r for r in result.reasons)
        assert not any("not ruled out that A is more robust" in reason for reason in result.reasons)

    def test_a_reason_about_one_norm_speaks_of_that_norm(self, judged):
        generator = np.random.default_rng(0)
        either = [dict(distances=np.where(generator.random(300) < 0.5, 0.7, 0.3) * PIXEL) for _ in range(2)]
        ours, theirs = (dict(distances=np.full(300, distance), norm="l2", eps=L2[:3]) for distance in (3.0, 0.03))
        result = judged({"pgd": either[0], "pgd_l2": ours}, {"pgd": either[1], "pgd_l2": theirs})
        (said,) = [reason for reason in result.reasons if "In linf no eps shows" in reason]
        assert "its largest lead there is" in said and said.endswith("in linf (pgd) on all images.") and "in l2" not in said

    @pytest.mark.parametrize("accurate", [150, 300])
    def test_too_few_images_to_tell_equal_from_worse_are_said(self, judged, accurate):
        # One is robust to 1/255 and the other to nothing; at 2/255 both are broken, which few images cannot tell from worse.
        ours, theirs = ([distance * PIXEL] * accurate + [0] * (1000 - accurate) for distance in (1.5, 0.3))
        result = judged(by_pgd(ours), by_pgd(theirs))
        found = [reason for reason in result.reasons if reason.startswith("That alone is not enough for *supported*")]
        assert result.verdict == ("inconclusive" if accurate == 150 else "supported") and len(found) == (accurate == 150)
        if found:
            assert "and 1 of 9 have too few images" in found[0]
            assert "such as the 150 of eps 2/255 in linf (pgd) on images both classify correctly: " in found[0]
            assert "at least 189 are needed, of about 1260 in all (now 1000), even" in found[0]

    @pytest.mark.parametrize(("significance", "delta", "enough"), [(0.05, 0.02, 189), (0.01, 0.05, 127)])
    def test_how_many_images_tell_equal_from_worse(self, judged, significance, delta, enough):
        for n, is_enough in ((enough - 1, False), (enough, True)):
            assert (paired_difference_interval(0, 0, n, 1 - significance)[0] > -delta) == is_enough
        distances = dict(distances=[0.3 * PIXEL] * 20 + [INF])
        result = judged({"pgd": distances}, {"pgd": distances}, {"significance": significance, "smallest_difference": delta})
        (said,) = [reason for reason in result.reasons if f"at least {enough} are needed" in reason]
        assert "are needed, even where none tells the two apart" in said

    def test_curves_that_cross_are_said_to(self, judged):
        # 30 % of the treatment's images withstand 2/255 and the others not even 0.5/255; the control's the latter only.
        ours, theirs = [0.3 * PIXEL] * 700 + [3 * PIXEL] * 300, [0.7 * PIXEL] * 1000
        result = judged(by_pgd(ours), by_pgd(theirs))
        assert result.verdict == "inconclusive"
        assert any("The curves cross" in reason for reason in result.reasons)
        assert "no number of images" in result.reasons[-1]

    def test_populations_without_images_are_said(self, judged):
        ours, theirs = np.array([PIXEL, 0] * 20), np.array([0, PIXEL] * 20)
        result = judged(by_pgd(ours), by_pgd(theirs))
        assert result.verdict == "inconclusive"
        assert "There are no images both classify correctly." in result.reasons
        assert {row.population for row in result.comparisons} == {"all", "matched_accuracy"}

    def test_a_failed_safeguard_withholds_and_says_why(self, judged):
        ours = better()
        ours["cw"]["distances"][3] = INF
        result = judged(ours, usual())
        assert result.verdict == "inconclusive"
        assert result.reasons[0].startswith("By the numbers alone the claim would be supported; that is withheld")
        assert "1 of 1500 images of A withstand cw in l2" in result.reasons[1]
        assert "A is more robust than B" in result.reasons[2]
        assert "no failed safeguard (unbounded attack) it is supported" in result.reasons[-1]

    def test_a_doubt_about_the_control_leaves_supported_alone(self, judged):
        theirs = usual()
        theirs["cw"]["distances"][3] = INF
        result = judged(better(), theirs)
        assert result.verdict == "supported"
        assert any(guard.passed is False for guard in result.safeguards)

    def test_better_on_all_images_by_clean_accuracy_alone_is_not_supported(self, judged):
        result = judged(attacks_of(1500, 1, rate=0.97), attacks_of(1500, 2, rate=0.85), {"largest_clean_difference": 0.5})
        on_all = [row for row in result.comparisons if row.is_decisive and row.population == "all"]
        assert all(row.difference > 0.02 and row.p_holm < 0.05 for row in on_all if row.eps < PIXEL)
        assert result.verdict == "inconclusive"


class TestNumbers:
    OURS = [0, 0.3 * PIXEL, 1.5 * PIXEL, INF, INF, 1.5 * PIXEL]
    THEIRS = [1.5 * PIXEL, 0.3 * PIXEL, 0.3 * PIXEL, 0.3 * PIXEL, INF, 0]

    @pytest.fixture
    def result(self, judged):
        return judged(by_pgd(self.OURS), by_pgd(self.THEIRS))

    def test_counts_by_hand(self, result):
        found = {
            (row.population, round(row.eps * 255, 1)): (row.n, row.treatment_only, row.control_only)
            for row in result.comparisons
        }
        assert found == {
            ("all", 0.5): (6, 3, 1),
            ("all", 1.0): (6, 3, 1),
            ("all", 2.0): (6, 1, 0),
            ("both_correct", 0.5): (4, 2, 0),
            ("both_correct", 1.0): (4, 2, 0),
            ("both_correct", 2.0): (4, 1, 0),
            ("matched_accuracy", 0.5): (6, 3, 1),
            ("matched_accuracy", 1.0): (6, 3, 1),
            ("matched_accuracy", 2.0): (6, 1, 0),
        }
        row = result.comparisons[0]
        assert (row.treatment_accuracy, row.control_accuracy) == (4 / 6, 2 / 6)
        assert row.difference == pytest.approx(1 / 3) and row.low < 1 / 3 < row.high
        assert row.p_value == pytest.approx(10 / 16) and row.p_holm == 1 and row.smallest_detectable is None

    def test_pairing_by_hand(self, result):
        pairing = result.pairing
        assert (pairing.n, pairing.both_correct, pairing.treatment_correct_only, pairing.control_correct_only) == (6, 4, 1, 1)
        assert (pairing.treatment_clean, pairing.control_clean, pairing.discarded) == (5 / 6, 5 / 6, 0)

    def test_areas_by_hand(self, result):
        curve = result.curves[0]
        assert curve.treatment_robust == pytest.approx((4 / 6, 4 / 6, 2 / 6))
        assert curve.treatment_area == pytest.approx((4 + 2 * 4 + 2) / 4 / 6)
        assert curve.control_area == pytest.approx((2 + 2 * 2 + 1) / 4 / 6)

    def test_areas_have_the_interval_of_paired_differences(self, supported):
        ours, theirs = better(), usual()
        ours, theirs = (
            (attacks["pgd"]["distances"][:, None] > np.array([0.5, 1, 2]) * PIXEL) @ [0.25, 0.5, 0.25]
            for attacks in (ours, theirs)
        )
        (curve,) = [curve for curve in supported.curves if (curve.attack, curve.population) == ("pgd", "all")]
        assert curve.difference == pytest.approx((ours - theirs).mean())
        standard_error = (ours - theirs).std() / np.sqrt(1500)
        expected = curve.difference - 1.96 * standard_error, curve.difference + 1.96 * standard_error
        assert (curve.low, curve.high) == pytest.approx(expected, abs=0.1 * standard_error)

    def test_every_comparison_of_two_norms(self, supported):
        decisive = [row for row in supported.comparisons if row.is_decisive]
        assert {(row.attack, row.norm) for row in decisive} == {("worst_case", "linf"), ("worst_case", "l2")}
        assert len(decisive) == 3 * 6 and len(supported.comparisons) == 3 * 18
        assert {(curve.attack, curve.population) for curve in supported.curves} == {
            (attack, population) for attack in ("fgsm", "pgd", "pgd_l2", "cw", "worst_case") for population in POPULATIONS
        }

    def test_distances_by_hand(self, judged):
        ours = {"cw": dict(distances=[0, 0.1, 0.2, INF, 0.4], norm="l2", eps=L2)}
        theirs = {"cw": dict(distances=[0.1, 0.1, 0.1, 0.3, INF], norm="l2", eps=L2)}
        on_all, both, _ = judged(ours, theirs).norms
        assert (on_all.treatment_median, on_all.control_median) == pytest.approx((0.2, 0.1))
        assert (on_all.treatment_failures, on_all.control_failures) == (1, 1)
        assert (on_all.treatment_farther, on_all.control_farther) == (2, 2)
        assert (both.n, both.treatment_median, both.control_median) == (4, pytest.approx(0.3), pytest.approx(0.2))
        points = [(point.distance, point.treatment, point.control) for point in on_all.survival]
        expected = [(0, 0.8, 1), (0.1, 0.6, 0.4), (0.2, 0.4, 0.4), (0.3, 0.4, 0.2), (0.4, 0.2, 0.2)]
        assert np.array(points) == pytest.approx(np.array(expected))

    def test_the_worst_case_has_distances_where_all_its_attacks_have(self, judged):
        free = dict(norm="l2", eps=L2)
        attacks = {"cw": dict(distances=[0.3, 0.2, INF], **free), "fmn": dict(distances=[0.2, 0.3, INF], **free)}
        names = {found.attack: found.treatment_median for found in judged(attacks, attacks).norms if found.population == "all"}
        assert names == {"cw": pytest.approx(0.3), "fmn": pytest.approx(0.3), "worst_case": pytest.approx(0.2)}
        # A step of a ladder is no distance.
        attacks["pgd_l2"] = dict(distances=[0.1, 0.1, 0.1], norm="l2", eps=L2[:3])
        assert {found.attack for found in judged(attacks, attacks).norms} == {"cw", "fmn"}

    def test_half_failures_make_the_median_infinite(self, judged):
        ours = {"cw": dict(distances=[0.1, INF], norm="l2", eps=L2)}
        assert judged(ours, ours).norms[0].treatment_median is None


def test_claims_may_narrow_the_evidence(judged):
    ours, theirs = attacks_of(300, 1), attacks_of(300, 2)
    result = judged(ours, theirs, {"attacks": ("pgd", "cw"), "eps": {"linf": (PIXEL,)}})
    assert {(row.attack, row.eps, row.is_decisive) for row in result.comparisons} == {("pgd", PIXEL, True)}
    assert not result.curves and not result.norms


def test_several_claims_and_what_cannot_be_judged(make_run, make_claim):
    runs = [make_run(model, attacks_of(40, 1)) for model in "AB"]
    claims = [make_claim(), make_claim(name="other", treatment="X"), make_claim(name="third", treatment="B", control="A")]
    verdicts = judge_claims(claims, runs)
    assert [result.claim.name for result in verdicts.results] == ["tested", "third"]
    assert [unjudged.claim for unjudged in verdicts.not_judged] == ["other"]


def test_the_best_of_several_verdicts_is_said_to_be_one_of_several(make_run, make_claim):
    distances = dict(distances=[PIXEL] * 20)
    runs = [make_run(model, {"pgd": distances}, dataset=name) for model in "AB" for name in ("one", "two")]
    results = judge_claims([make_claim()], runs).results
    assert [result.reasons[-1].startswith("This is one of 2 verdicts on the claim") for result in results] == [True, True]
    (alone,) = judge_claims([make_claim(dataset="one")], runs).results
    assert not any("one of" in reason for reason in alone.reasons)


def test_attacks_and_budgets_that_a_claim_leaves_out_are_named(judged):
    ours, theirs = attacks_of(100, 1), attacks_of(100, 2)
    assert judged(ours, theirs, {"attacks": ("fgsm", "pgd_l2")}).reasons[-1] == (
        "The claim leaves out attacks that both models were evaluated with: cw, pgd."
    )
    assert not any("leaves out" in reason for reason in judged(ours, theirs).reasons)
    narrow = judged(ours, theirs, {"attacks": ("pgd",), "eps": {"linf": (PIXEL,)}})
    assert narrow.reasons[-1].endswith("leaves out budgets that both models were evaluated at: linf 0.5/255, linf 2/255.")


def test_what_a_claim_leaves_to_the_defaults_is_said(make_run, make_claim):
    said = make_claim().model_dump(exclude={"power", "smallest_difference"})
    runs = [make_run(model, by_pgd([PIXEL] * 20)) for model in "AB"]
    (result,) = judge_claims([Claim(**said)], runs).results
    assert result.reasons[-1] == "The claim does not say, so that the usual is taken: power 0.8, smallest_difference 0.02."


@pytest.mark.parametrize(("ours", "theirs"), [(0, 0), (INF, 0), (0, INF), (INF, INF), (PIXEL, PIXEL)])
@pytest.mark.parametrize("images", [1, 4, 300])
def test_models_perfect_or_hopeless_are_not_supported_without_a_lead(judged, images, ours, theirs):
    result = judged(by_pgd([ours] * images), by_pgd([theirs] * images), {"largest_clean_difference": 0.99})
    assert result.verdict != "supported"


def test_few_images_support_only_what_the_exact_test_grants(judged):
    # Three rows, exact test at 5 % / 3: 2 * 0.5^7 is just enough, 2 * 0.5^6 is not.
    for images, verdict in ((6, "inconclusive"), (7, "supported")):
        ours, theirs = by_pgd([3 * PIXEL] * images), by_pgd([0.1 * PIXEL] * images)
        assert judged(ours, theirs).verdict == verdict


def test_provenance_names_the_runs(supported):
    ours, theirs = supported.runs
    assert (ours.role, ours.model, ours.weights, ours.commit) == ("treatment", "A", "V1", "1234abc")
    assert theirs.role == "control"
    assert [check.name for check in theirs.diagnostics] == ["zero_gradient"] + 4 * ["large_eps"]
    assert ours.attacks == ("fgsm", "pgd", "pgd_l2", "cw")


def test_json_comes_back_the_same(supported, tmp_path):
    verdicts = Verdicts(made_with="lrrobust 1.2", results=(supported,), not_judged=())
    write_verdicts(verdicts, tmp_path / "new" / "claim.json")
    assert Verdicts.model_validate_json((tmp_path / "new" / "claim.json").read_bytes()) == verdicts


def test_the_order_of_rows_and_runs_changes_nothing(make_run, make_claim):
    runs = [make_run("A", attacks_of(200, 1)), make_run("B", attacks_of(200, 2))]
    shuffled = [
        dataclasses.replace(run, rows=run.rows.sample(frac=1, random_state=seed).reset_index(drop=True))
        for seed, run in enumerate(runs)
    ]
    there, back = (judge_claims([make_claim()], each).results[0] for each in (runs, shuffled[::-1]))
    for part in ("verdict", "reasons", "pairing"):
        assert getattr(there, part) == getattr(back, part)
    for part in ("comparisons", "curves", "norms", "safeguards"):
        assert sorted(map(repr, getattr(there, part))) == sorted(map(repr, getattr(back, part)))


def test_many_images_are_judged(make_run, make_claim):
    runs = [make_run(model, attacks_of(3000, seed), weights=f"V{seed // 2}") for seed in range(2) for model in "AB"]
    for result in judge_claims([make_claim()], runs).results:
        assert result.pairing.n == 3000
        # The JSON does not grow with the images.
        assert len(result.norms[0].survival) <= 200
        assert len(result.model_dump_json()) < 200_000


class TestErrorsEndToEnd:
    """Verdicts of whole evidence: rows, diagnostics and safeguards included."""

    SIMULATIONS = 40

    @pytest.fixture(autouse=True)
    def few_resamples(self, monkeypatch):
        # No verdict rests on the areas.
        monkeypatch.setattr(judge_module, "RESAMPLES", 100)

    def verdicts(self, judged, gain):
        generator = np.random.default_rng(5)
        found = []
        for _ in range(self.SIMULATIONS):
            own, sides = generator.gamma(2.0, 1.0, 400), []
            for factor in (gain, 1.0):
                distance = factor * own * generator.lognormal(0, 0.3, 400) * (generator.random(400) < 0.95)
                sides.append(by_pgd(distance * PIXEL))
            # How far clean accuracies lie apart is chance here, not the claim's affair.
            found.append(judged(*sides, {"largest_clean_difference": 0.2}).verdict)
        return found

    def test_equal_models(self, judged):
        # At 5 %, more than 5 of 40 have a probability of less than 2 %.
        assert self.verdicts(judged, 1.0).count("supported") <= 5

    def test_a_real_difference(self, judged):
        verdicts = self.verdicts(judged, 1.4)
        assert verdicts.count("supported") >= 0.8 * self.SIMULATIONS and "refuted" not in verdicts
