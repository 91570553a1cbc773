import json
import math
from dataclasses import replace

import numpy as np
import pytest
from made_rows import by_pgd

from lrrobust.diagnostics.records import DIAGNOSTICS_FILE, DIAGNOSTICS_VERSION, Diagnostics
from lrrobust.verdict.evidence import collect_evidence
from lrrobust.verdict.judge import judge
from lrrobust.verdict.safeguards import check_evidence, find_excess

INF = math.inf
PIXEL = 1 / 255
LADDER = (0.5 / 255, 1 / 255, 2 / 255)
GOOD = {
    "pgd": dict(distances=[INF, PIXEL, PIXEL, 0]),
    "cw": dict(distances=[0.5, 0.1, 0.1, 0], norm="l2", eps=(0.2, INF)),
}


@pytest.fixture
def check_runs(make_claim):
    def check_runs(runs, **claim):
        (evidence,), _ = collect_evidence(make_claim(**claim), runs)
        return check_evidence(evidence)

    return check_runs


@pytest.fixture
def check(check_runs, make_run):
    def check(treatment=None, control=None, change=lambda runs: None, **claim):
        runs = [make_run("A", GOOD, **treatment or {}), make_run("B", GOOD, **control or {})]
        change(runs)
        return check_runs(runs, **claim)

    return check


def named(safeguards, name):
    return [safeguard for safeguard in safeguards if safeguard.name == name]


def failed(safeguards):
    return [(guard.name, guard.attack, guard.withholds) for guard in safeguards if guard.passed is False]


def test_sound_evidence_passes_and_says_what_was_not_looked_into(check):
    safeguards = check()
    assert not failed(safeguards)
    assert {guard.name for guard in safeguards if guard.passed is None} == {"transfer"}
    linf, l2 = named(safeguards, "unbounded_attack")[:2]
    assert linf.detail.endswith(
        "is without a budget, but diagnostics tried one that holds plain grey: 0 of 32 images withstand pgd."
    )
    assert "Without a budget, 0 of 4 images of A withstand cw" in l2.detail
    assert all(guard.detail.endswith(".") for guard in safeguards)


BOTH = ("supported", "refuted")


@pytest.mark.parametrize(
    ("options", "name", "text"),
    [
        ({"treatment": {"images": [0, 1, 2, 9]}}, "same_images", "3 images were evaluated with both models; left out: 1 of A"),
        ({"treatment": {"input_size": 32}}, "same_configuration", "differ in input_size"),
        ({"control": {"seed": 3}}, "same_configuration", "differ in seed"),
        ({"treatment": {"is_complete": False}}, "complete_runs", "Not complete: A-sample"),
    ],
)
def test_models_treated_differently_withhold_both_verdicts(check, options, name, text):
    safeguards = check(**options)
    assert failed(safeguards) == [(name, None, BOTH)]
    assert text in named(safeguards, name)[0].detail


@pytest.mark.parametrize(
    ("key", "value"),
    [("input_size", 32), ("resize_size", 70), ("interpolation", "bicubic"), ("num_classes", 11), ("classes_sha256", "01" * 32)],
)
def test_what_decides_which_images_a_model_sees_must_be_the_same(check, key, value):
    def change(runs):
        runs[0].manifest["model"][key] = value

    safeguards = check(change=change)
    assert failed(safeguards) == [("same_configuration", None, BOTH)]
    assert f"differ in {key}" in named(safeguards, "same_configuration")[0].detail


@pytest.mark.parametrize(("copies", "passed"), [(0, True), (2, True), (3, False)])
def test_copies_of_images_are_no_more_images(make_claim, make_run, copies, passed):
    runs = [make_run(model, by_pgd([distance] * 200)) for model, distance in zip("AB", (INF, PIXEL / 2))]
    for run in runs:
        run.manifest["copies"] = copies
    (evidence,), _ = collect_evidence(make_claim(), runs)
    (found,) = named(check_evidence(evidence), "distinct_images")
    assert found.passed is passed and f"{copies} of 200 images have the same contents" in found.detail
    assert judge(evidence).verdict == ("supported" if passed else "inconclusive")


def test_runs_of_one_model_at_two_image_sizes_are_not_mixed(check_runs, make_run):
    runs = [
        make_run(model, {attack: dict(distances=[INF, PIXEL, PIXEL, 0])}, input_size=size)
        for model in "AB"
        for attack, size in (("pgd", 64), ("apgd", 96))
    ]
    (found,) = named(check_runs(runs), "same_configuration")
    assert not found.passed and found.withholds == ("supported", "refuted")
    assert "The runs of one model differ among themselves in input_size" in found.detail


def test_attacks_must_have_the_same_settings(check):
    def weaken(runs):
        runs[0].manifest["attacks"][0]["steps"] = 2

    assert failed(check(change=weaken)) == [("same_configuration", None, BOTH)]
    assert "attack pgd" in named(check(change=weaken), "same_configuration")[0].detail
    # What the claim does not ask for may differ.
    assert not failed(check(change=weaken, attacks=("cw",)))


def test_an_attack_that_only_one_model_met_is_a_difference(check_runs, make_run):
    runs = [make_run("A", GOOD), make_run("B", GOOD | {"extra": dict(distances=[INF, INF, INF, 0])})]
    assert failed(check_runs(runs)) == [("same_configuration", None, BOTH)]


def test_images_of_one_name_may_differ(check):
    def rename(runs):
        runs[0].manifest["dataset"]["sha256"] = "01" * 32

    safeguards = check(change=rename)
    assert failed(safeguards) == [("same_images", None, BOTH)]
    assert "same names for both models, but other hashes" in named(safeguards, "same_images")[0].detail


def test_more_images_of_one_side_say_nothing_against_those_of_both(make_claim, make_run):
    few = by_pgd([INF, PIXEL])
    runs = [make_run("A", GOOD), make_run("A", few), make_run("B", few)]
    (evidence,), _ = collect_evidence(make_claim(), runs)
    assert len(evidence.treatment.runs) == 2 and len(evidence.images) == 2
    assert named(check_evidence(evidence), "same_images")[0].passed


def test_two_names_of_one_network_are_no_comparison(make_claim, make_run):
    claim = make_claim(treatment="A@V1", control="A@V2")
    runs = [make_run("A", GOOD, weights=weights) for weights in ("V1", "V2")]
    for run in runs:
        run.manifest["model"]["code_sha256"] = "ab" * 32
    (evidence,), _ = collect_evidence(claim, runs)
    assert failed(check_evidence(evidence)) == [("one_network", None, BOTH)]
    assert "A@V1 and A@V2 are one network" in named(check_evidence(evidence), "one_network")[0].detail
    runs[1].manifest["model"]["state_sha256"] = "cd" * 32
    (evidence,), _ = collect_evidence(claim, runs)
    assert not failed(check_evidence(evidence))


@pytest.mark.parametrize("key", ["state_sha256", "code_sha256"])
def test_runs_of_two_trainings_are_no_model(check_runs, make_run, key):
    runs = [make_run("A", {name: attack}) for name, attack in GOOD.items()] + [make_run("B", GOOD)]
    runs[1].manifest["model"][key] = "01" * 32
    safeguards = check_runs(runs)
    assert failed(safeguards) == [("one_network", None, BOTH)]
    assert "The runs of A are of different parameters" in named(safeguards, "one_network")[0].detail


def test_runs_of_one_network_predict_alike(check_runs, make_run):
    for count, passed in ((1, True), (2, False)):
        attacks = {"pgd": dict(distances=[INF] * 100), "fgsm": dict(distances=[INF] * 100)}
        runs = [make_run("A", {name: attack}) for name, attack in attacks.items()] + [make_run("B", attacks)]
        runs[1].rows.loc[runs[1].rows["index"] < count, "clean_prediction"] = 7
        (found,) = named(check_runs(runs), "one_network")
        assert found.passed is passed and (passed or "2 of 100 images by A" in found.detail)


@pytest.mark.parametrize(
    ("recipes", "passed", "text"),
    [
        (("short 12", "short 12"), True, "the same recipe (short 12)"),
        (("short 12", "fast_at 34"), False, "different recipes (short 12; fast_at 34)"),
        (("short 12", None), None, "not known"),
        ((None, None), None, "not known"),
    ],
)
def test_models_of_different_recipes_are_not_compared(check, recipes, passed, text):
    ours, theirs = ({"recipe": recipe} for recipe in recipes)
    safeguards = check(treatment=ours, control=theirs)
    (found,) = named(safeguards, "same_training")
    assert found.passed is passed and text in found.detail and found.withholds == BOTH


@pytest.mark.parametrize(
    ("followed", "text"),
    [
        (("3 of 3 epochs", "3 of 3 epochs"), "(short 1234)."),
        (("3 of 3 epochs", "2 of 3 epochs"), "(short 1234); how far they followed it: A 3 of 3 epochs; B 2 of 3 epochs."),
        (("3 of 3 epochs", ""), "A 3 of 3 epochs; B not said."),
    ],
)
def test_who_learns_faster_may_be_stopped_earlier(check, followed, text):
    ours, theirs = ({"followed": length} for length in followed)
    (found,) = named(check(treatment=ours, control=theirs), "same_training")
    assert found.passed and found.detail.endswith(text)


def test_recipes_named_by_another_version_are_not_known_to_differ(check_runs, make_run):
    for recipes, passed, text in (
        (("short 1", "short 2"), None, "as older versions did"),
        (("short 1", "long 2"), False, "different"),
    ):
        runs = [make_run(model, by_pgd([INF] * 100), recipe=recipe) for model, recipe in zip("AB", recipes)]
        del runs[0].manifest["training"]["followed"]
        (found,) = named(check_runs(runs), "same_training")
        assert found.passed is passed and text in found.detail


def test_a_claim_may_mean_the_trainings(make_claim, make_run):
    distances = by_pgd([INF] * 200), by_pgd([PIXEL / 2] * 200)
    runs = [
        make_run(model, attacks, recipe=recipe) for model, attacks, recipe in zip("AB", distances, ("fast_at 1", "short 2"))
    ]
    for same_training, passed, verdict in ((True, False, "inconclusive"), (False, None, "supported")):
        (evidence,), _ = collect_evidence(make_claim(same_training=same_training), runs)
        (found,) = named(check_evidence(evidence), "same_training")
        assert found.passed is passed and judge(evidence).verdict == verdict
        assert ("`same_training: false`" in found.detail) == same_training


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


def test_a_run_given_twice_for_one_model_is_a_difference(check_runs, make_run):
    runs = [make_run("A", GOOD), make_run("A", GOOD), make_run("B", GOOD)]
    assert failed(check_runs(runs)) == [("same_configuration", None, BOTH)]


def test_attacks_may_be_spread_over_runs(check_runs, make_run):
    runs = [make_run("A", {name: attack}) for name, attack in GOOD.items()] + [make_run("B", GOOD)]
    assert not failed(check_runs(runs))


def test_different_clean_accuracy(check_runs, make_run):
    runs = [make_run("A", by_pgd([INF] * 97 + [0] * 3)), make_run("B", by_pgd([INF] * 100))]
    for limit, passed in ((0.02, False), (0.03, True)):
        (found,) = named(check_runs(runs, largest_clean_difference=limit), "clean_accuracy")
        assert found.passed is passed and "97.0 % for A and 100.0 % for B" in found.detail
        assert "(largest_clean_difference)" in found.detail


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


def test_where_both_models_are_broken_nothing_is_refuted(make_claim, make_run):
    for distances, telling in (
        ([PIXEL / 3] * 400, 0),
        ([INF] * 400, 0),
        ([PIXEL] * 400, 0),
        ([PIXEL] * 200 + [PIXEL / 3] * 200, 1),
        ([PIXEL / 3] * 390 + [INF] * 10, 3),
    ):
        attacks, passed = by_pgd(distances), telling > 0
        (evidence,), _ = collect_evidence(make_claim(), [make_run(model, attacks) for model in "AB"])
        (found,) = named(check_evidence(evidence), "telling_eps")
        assert (found.passed, found.withholds) == (passed, ("refuted",))
        assert judge(evidence).verdict == ("refuted" if passed else "inconclusive")
        assert found.detail.startswith(f"At {telling} of 3 budgets")


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
