from dataclasses import replace

import numpy as np
import pytest
from found_safeguards import INF, PIXEL, named
from made_rows import by_pgd

from lrrobust.verdict.evidence import collect_evidence
from lrrobust.verdict.judge import judge
from lrrobust.verdict.other_attacks import find_excess
from lrrobust.verdict.records import BOTH
from lrrobust.verdict.safeguards import check_evidence


class TestStrongerAttacks:
    """What attacks break that do not judge: on the same images, or on some of them."""

    def found(self, make_claim, make_run, strong, few=None, **claim):
        """pgd breaks nothing of 200 images; `strong` of the models, (A, B), breaks the first ones."""
        runs = []
        for model, count in zip("AB", strong):
            runs.append(make_run(model, by_pgd([INF] * 200)))
            distances = ([PIXEL] * count + [INF] * 200)[: few or 200]
            runs.append(make_run(model, {"strong": dict(distances=distances)}))
        found, refused = collect_evidence(make_claim(**claim), runs)
        assert not refused
        return found

    def leading(self, make_run):
        """A leads by 100 of 200 images."""
        return make_run("A", by_pgd([INF] * 200)), make_run("B", by_pgd([PIXEL] * 100 + [INF] * 100))

    def test_attacks_that_judge_leave_nothing_out(self, make_claim, make_run):
        (evidence,) = self.found(make_claim, make_run, (9, 0))
        assert not named(check_evidence(evidence), "stronger_attacks")

    @pytest.mark.parametrize(
        ("strong", "passed", "doubted"),
        [
            ((0, 0), True, ()), ((3, 0), True, ()), ((4, 0), None, ("supported",)), ((6, 0), False, ("supported",)),
            ((55, 50), None, ("supported",)), ((56, 50), False, ("supported",)), ((0, 5), None, ("refuted",)),
            ((0, 6), False, ("refuted",)),
        ],
    )  # fmt: skip
    @pytest.mark.parametrize("direction", ["more_robust", "less_robust"])
    def test_attacks_left_out_by_the_claim(self, make_claim, make_run, strong, passed, doubted, direction):
        """Of 200 images 4 are what matters, and 6 against none, at two eps, what chance makes less often than at 5 %."""
        (evidence,) = self.found(make_claim, make_run, strong, attacks=("pgd",), direction=direction)
        (found,) = named(check_evidence(evidence), "stronger_attacks")
        if direction == "less_robust":
            doubted = tuple({"supported": "refuted", "refuted": "supported"}[verdict] for verdict in doubted)
        assert found.passed is passed and found.withholds == (doubted or BOTH)
        assert "On 200 of these images strong was made too" in found.detail
        assert f"broke {strong[0]} more images of A and {strong[1]} more of B" in found.detail

    @pytest.mark.parametrize("direction", ["more_robust", "less_robust"])
    @pytest.mark.parametrize(("count", "passed"), [(0, True), (30, True), (97, False), (200, False)])
    def test_attacks_that_one_model_alone_has_met(self, make_claim, make_run, count, passed, direction):
        """A leads by 100 of 200 images, of which 4 matter; `strong`, made on A alone, breaks `count` of those that stand."""
        runs = [
            *self.leading(make_run),
            make_run("A", {"strong": dict(distances=[PIXEL] * count + [INF] * (200 - count))}),
        ]  # fmt: skip
        (evidence,), _ = collect_evidence(make_claim(attacks=("pgd",), direction=direction), runs)
        (found,) = named(check_evidence(evidence), "stronger_attacks")
        verdict = "supported" if direction == "more_robust" else "refuted"
        assert found.passed is passed and found.withholds == (verdict,)
        assert f"A alone has met strong, which would take {count / 2:.3g} points" in found.detail
        assert judge(evidence).verdict == (verdict if passed else "inconclusive")

    @pytest.mark.parametrize(
        ("images", "broken", "passed"),
        [(range(100), 100, False), (range(150, 250), 50, False), (range(100), 0, True), (range(5), 3, None)],
    )
    @pytest.mark.parametrize(("beside", "weights"), [("square", "V1"), ("pgd", "V1"), ("square", "mine.safetensors")])
    def test_attacks_that_one_model_alone_has_met_on_some_images(
        self, make_claim, make_run, images, broken, passed, beside, weights
    ):
        """Another attack or one of more steps, on A, which leads by 100 of 200; of 5 images chance breaks 3."""
        distances = [PIXEL] * broken + [INF] * (len(images) - broken)
        runs = [
            *self.leading(make_run),
            make_run("A", {beside: dict(distances=distances, steps=200)}, images=images, weights=weights),
        ]
        (evidence,), _ = collect_evidence(make_claim(treatment="A@V1"), runs)
        (found,) = named(check_evidence(evidence), "stronger_attacks")
        shared = sum(image < 200 for image in images)
        assert found.passed is passed and f"has met {beside} on {shared} of these images" in found.detail
        assert judge(evidence).verdict == ("inconclusive" if passed is False else "supported")

    def test_attacks_that_the_other_model_has_met_on_more_images_are_not_met_alone(self, check_runs, make_run):
        runs = [
            *self.leading(make_run),
            make_run("A", {"square": dict(distances=[PIXEL] * 100)}, images=range(100)),
        ]
        on_all = make_run("B", {"square": dict(distances=[PIXEL] * 200)})
        for others, alone in (([], True), ([on_all], False)):
            found = named(check_runs([*runs, *others], attacks=("pgd",)), "stronger_attacks")
            assert any("A alone has met square" in each.detail for each in found) is alone

    @pytest.mark.parametrize(("images", "beside"), [(range(50, 150), "pgd"), (range(100, 220), "square")])
    def test_attacks_made_stronger_on_some_images_of_both(self, make_claim, make_run, images, beside):
        runs = [make_run(model, by_pgd([INF] * 200)) for model in "AB"]
        for model, reach in (("A", PIXEL), ("B", INF)):
            attacks = {"pgd": dict(distances=[INF] * len(images)), beside: dict(distances=[reach] * len(images), steps=200)}
            runs.append(make_run(model, attacks, images=images))
        (found,) = named(check_evidence(collect_evidence(make_claim(), runs)[0][0]), "stronger_attacks")
        assert found.passed is False and f"On 100 of these images {beside} was made too" in found.detail
        assert "broke 100 more images of A and 0" in found.detail

    def test_attacks_made_on_some_of_the_images(self, make_claim, make_run):
        all_images, some = self.found(make_claim, make_run, (6, 0), few=100)
        (found,) = named(check_evidence(all_images), "stronger_attacks")
        assert found.withholds == ("supported",) and "On 100 of these images strong was made too" in found.detail
        assert not named(check_evidence(some), "stronger_attacks")
        assert [attack.name for attack in some.attacks] == ["pgd", "strong", "worst_case"]

    def simulated(self, lead, taken, draws=1000):
        """Excesses on 200 of 1000 images: at six eps attacks break 2 % more of either model, at the fourth `taken` besides
        of the one that leads by `lead` there, seen with its error."""
        generator = np.random.default_rng(0)
        rates = np.full((2, 6, 1), 0.02)
        rates[0, 3] += taken
        leads = np.where(np.arange(6) == 3, lead, 0) + generator.normal(0, 0.01, (draws, 6))
        newly = generator.random((draws, 2, 6, 200)) < rates
        return [find_excess(*each, seen, 0.02, 0.05) for each, seen in zip(newly, leads)]

    @pytest.mark.parametrize("lead", [0.08, 0.2])
    def test_attacks_that_break_both_alike_undermine_no_more_than_chance_allows(self, lead):
        found = self.simulated(lead, taken=0)
        assert np.mean([excess.undermines for excess in found]) <= 0.05
        # What the largest difference alone would say.
        assert np.mean([excess.matters for excess in found]) > 0.3

    @pytest.mark.parametrize(("lead", "least"), [(0.04, 0.75), (0.06, 0.8), (0.08, 0.85), (0.15, 0.99)])
    def test_attacks_that_take_the_lead_undermine(self, lead, least):
        found = self.simulated(lead, taken=lead)
        assert np.mean([excess.undermines for excess in found]) >= least

    @pytest.mark.parametrize(
        "broken, lead, place, matters, is_beyond_chance, undermines",
        [
            ([(30, 0), (300, 260), (0, 0)], 0.0, 0, True, True, True),
            ([(10, 0), (300, 260), (0, 0)], 0.05, 1, True, False, True),
            ([(10, 0), (19, 0), (0, 30)], 0.03, 1, False, False, False),
        ],
    )
    def test_the_eps_that_tells_most_is_shown(self, broken, lead, place, matters, is_beyond_chance, undermines):
        of_one, of_other = (np.arange(1000) < np.array(counts)[:, None] for counts in zip(*broken))
        found = find_excess(of_one, of_other[:, ::-1], np.array([0, lead, 0]), 0.02, 0.05)
        assert (found.place, found.share) == (place, pytest.approx((broken[place][0] - broken[place][1]) / 1000))
        assert (found.matters, found.is_beyond_chance, found.undermines) == (matters, is_beyond_chance, undermines)

    def test_what_would_be_left_of_the_lead_is_said(self, check_runs, make_run):
        """Of 200 images A withstands 6 more; strong breaks 4 of them, which chance might make."""
        runs = []
        for model, broken in (("A", 0), ("B", 6)):
            runs.append(make_run(model, by_pgd([PIXEL] * broken + [INF] * (200 - broken))))
            runs.append(make_run(model, {"strong": dict(distances=[PIXEL] * 4 + [INF] * 196)}))
        (found,) = named(check_runs(runs, attacks=("pgd",)), "stronger_attacks")
        assert found.passed is False and found.withholds == ("supported",)
        assert "which would leave 1 points of a lead of 3: a verdict of supported" in found.detail

    def test_unfinished_runs_may_lack_the_attacks_that_judge(self, make_claim, make_run):
        runs = [make_run(model, by_pgd([INF] * 200)) for model in "AB"]
        runs += [make_run(model, {"strong": dict(distances=[PIXEL] * 100)}) for model in "AB"]
        runs[1] = replace(runs[1], rows=runs[1].rows[runs[1].rows["index"] < 20].reset_index(drop=True), is_complete=False)
        found, refused = collect_evidence(make_claim(), runs)
        assert [len(evidence.images) for evidence in found] == [100, 20] and not refused
        for evidence in found:
            assert not named(check_evidence(evidence), "stronger_attacks")
