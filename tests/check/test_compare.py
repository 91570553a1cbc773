import json
import math

import numpy as np
import pytest
from scipy.stats import binomtest

from lrrobust.check.baseline import Rule, build_baseline
from lrrobust.check.compare import compare, find_differences, require_sensitivity, smallest_noticed_fall
from lrrobust.errors import BaselineError

LADDER = tuple(eps / 255 for eps in (0.125, 0.25, 0.5, 1, 2, 4))
KEYS = [("pgd", "linf", eps) for eps in LADDER]
KEY = KEYS[0]
SUITE = [
    *(("fgsm", "linf", eps) for eps in LADDER),
    *KEYS,
    *(("pgd_l2", "l2", eps) for eps in (0.05, 0.1, 0.2, 0.5, 1, 2)),
    *(("cw", "l2", eps) for eps in (0.05, 0.1, 0.2, 0.5, 1, 2, math.inf)),
]


def nested(generator, n, keys):
    """Outcomes as attacks give them: each image has a distance at which it breaks, so accuracy falls along a ladder."""
    breaks_at = generator.random(n)
    shares = np.linspace(0.1, 0.9, len(keys))
    return {key: breaks_at > share for key, share in zip(keys, shares, strict=True)}


def with_lost(outcomes, generator, count, at=None):
    """The same, with `count` robust images lost at each key (or at one)."""
    changed = {key: is_robust.copy() for key, is_robust in outcomes.items()}
    for key in [at] if at else changed:
        robust = np.flatnonzero(changed[key])
        changed[key][generator.permutation(robust)[:count]] = False
    return changed


def verdict(baseline, run):
    return compare(baseline, [run], "b.json").verdict


class TestPlantedLoss:
    @pytest.mark.parametrize("seed", range(20))
    def test_of_5_points_on_200_images_is_caught(self, run_of, baseline_of, seed):
        generator = np.random.default_rng(seed)
        outcomes = nested(generator, 200, KEYS)
        baseline = baseline_of(outcomes)
        planted = KEYS[seed % len(KEYS)]
        result = compare(baseline, [run_of(with_lost(outcomes, generator, 10, at=planted))], "b.json")
        assert result.verdict == "regressed"
        (fallen,) = [c for c in result.comparisons if c.is_regression]
        assert (fallen.attack, fallen.norm, fallen.eps) == planted
        assert fallen.fall == pytest.approx(0.05)
        assert len(fallen.lost) == 10 and not fallen.gained

    def test_is_caught_under_a_whole_suite(self, run_of, baseline_of):
        generator = np.random.default_rng(0)
        outcomes = {key: generator.random(200) < 0.5 for key in SUITE}
        baseline = baseline_of(outcomes)
        for key in SUITE:
            assert verdict(baseline, run_of(with_lost(outcomes, generator, 10, at=key))) == "regressed"
        everywhere = compare(baseline, [run_of(with_lost(outcomes, generator, 10))], "b.json")
        assert all(c.is_regression for c in everywhere.comparisons)

    def test_is_caught_through_noise(self, run_of, baseline_of):
        """20 images lost and 2 gained: p by the binomial distribution, adjusted by hand."""
        generator = np.random.default_rng(3)
        before = generator.random(200) < 0.5
        now = before.copy()
        now[np.flatnonzero(before)[:20]] = False
        now[np.flatnonzero(~before)[:2]] = True
        same = generator.random(200) < 0.5
        keys = KEYS[:3]
        baseline = baseline_of({keys[0]: before, keys[1]: same, keys[2]: before})
        result = compare(baseline, [run_of({keys[0]: now, keys[1]: same, keys[2]: now})], "b.json")
        p = binomtest(20, 22, alternative="greater").pvalue
        assert [c.p_value for c in result.comparisons] == pytest.approx([p, 1.0, p])
        # Without a flipped image there is nothing to test: two comparisons share the level.
        assert [c.p_holm for c in result.comparisons] == [pytest.approx(2 * p), None, pytest.approx(2 * p)]
        assert result.verdict == "regressed"


class TestHonestReruns:
    def test_identical_rows_pass_100_of_100(self, run_of, baseline_of):
        for seed in range(100):
            outcomes = nested(np.random.default_rng(seed), 200, KEYS)
            result = compare(baseline_of(outcomes), [run_of(outcomes)], "b.json")
            assert result.verdict == "passed"
            assert not any(c.lost or c.gained for c in result.comparisons)

    def test_rounding_noise_passes_100_of_100(self, run_of, baseline_of):
        """Both runs err on images near the border, as the rounding of other machines makes them."""
        flips = 0
        for seed in range(100):
            generator = np.random.default_rng(seed)
            outcomes = nested(generator, 200, KEYS)
            first, second = (
                {key: is_robust ^ (generator.random(200) < 0.0025) for key, is_robust in outcomes.items()} for _ in range(2)
            )
            result = compare(baseline_of(first), [run_of(second)], "b.json")
            flips += sum(len(c.lost) + len(c.gained) for c in result.comparisons)
            assert result.verdict == "passed", (seed, result.reason)
        assert flips > 400

    def test_false_alarms_keep_to_the_level(self, run_of, baseline_of):
        """Heavy symmetric noise, as retraining makes: at most the stated share of checks fails."""
        keys = KEYS[:3]
        failed, rule = 0, Rule(significance=0.2, floor=0.0)
        for seed in range(300):
            generator = np.random.default_rng(seed)
            halves = generator.random((2, 3, 60)) < 0.5
            baseline = baseline_of(dict(zip(keys, halves[0])), rule)
            failed += verdict(baseline, run_of(dict(zip(keys, halves[1])))) == "regressed"
        # 300 * 0.2 = 60 at most; the test is exact, hence conservative, yet not idle.
        assert 5 < failed < 60


def test_a_fall_below_the_floor_passes(run_of, baseline_of):
    generator = np.random.default_rng(0)
    outcomes = {KEY: generator.random(2000) < 0.5}
    lost = run_of(with_lost(outcomes, generator, 19))
    for floor, expected in ((0.01, "passed"), (0.0095, "regressed"), (0.0, "regressed")):
        result = compare(baseline_of(outcomes, Rule(floor=floor)), [lost], "b.json")
        assert result.comparisons[0].p_holm < 1e-4
        assert result.verdict == expected


def test_gains_never_fail(run_of, baseline_of):
    result = compare(baseline_of({KEY: np.zeros(200)}), [run_of({KEY: np.ones(200)})], "b.json")
    assert result.verdict == "passed"
    assert len(result.comparisons[0].gained) == 200
    assert result.comparisons[0].p_value == 1


@pytest.mark.parametrize(("gained", "lost", "said"), [(20, 0, 1), (20, 10, 0), (3, 0, 0)])
def test_gains_beyond_chance_are_said_as_attacks_that_fail_make_them_too(run_of, baseline_of, gained, lost, said):
    place = np.arange(200)
    now = (place >= 100 - gained) & (place < 200 - lost)
    notes = compare(baseline_of({KEY: place >= 100}), [run_of({KEY: now})], "b.json").notes
    assert [" rose beyond chance, by 10.0 points under pgd at eps" in note for note in notes] == [True] * said


def test_flipped_images_are_named(run_of, baseline_of):
    before, now = np.ones(50, bool), np.ones(50, bool)
    before[3], now[[7, 20]] = False, False
    run = run_of({KEY: now})
    # Parts are written in any order; the bitmap follows the data set.
    shuffled = run.rows.sample(frac=1, random_state=0)
    object.__setattr__(run, "rows", shuffled)
    (c,) = compare(baseline_of({KEY: before}), [run], "b.json").comparisons
    assert [(f.index, f.key, f.outcome) for f in c.lost] == [(7, "ant/0007.png", "broken"), (20, "ant/0020.png", "broken")]
    assert [f.key for f in c.gained] == ["ant/0003.png"]
    assert c.fall == pytest.approx(1 / 50)


def test_smallest_noticed_fall_is_the_smallest_that_fails(run_of, baseline_of):
    for n, rule in ((200, Rule()), (50, Rule(significance=0.01)), (2000, Rule(floor=0.02))):
        outcomes = {key: np.ones(n, bool) for key in KEYS}
        baseline = baseline_of(outcomes, rule)
        count = smallest_noticed_fall(baseline)
        for lost, expected in ((count, "regressed"), (count - 1, "passed")):
            # All comparisons lose as much, so that all share the level.
            changed = with_lost(outcomes, np.random.default_rng(0), lost)
            assert verdict(baseline, run_of(changed)) == expected, (n, lost)


@pytest.mark.parametrize(("robust", "noticed"), [(5, None), (6, 6)])
def test_only_robust_images_can_be_lost(run_of, baseline_of, robust, noticed):
    baseline = baseline_of({KEY: np.arange(20) < robust})
    assert smallest_noticed_fall(baseline) == noticed
    nothing_left = run_of({KEY: np.zeros(20, bool)})
    result = compare(baseline, [nothing_left], "b.json")
    assert result.verdict == ("passed" if noticed is None else "regressed")
    if noticed is None:
        assert "sure to notice no fall at all: too few images are robust in the baseline" in result.reason
        assert result.reason.startswith("no fall beyond chance in 1 comparison on 20 images, ")


@pytest.mark.parametrize(
    ("robust", "n", "rule"),
    [
        (0, 50, Rule()),  # attacks that break all, as with an eps that is too large
        (5, 50, Rule()),
        (5, 5, Rule()),
        (50, 50, Rule(significance=5e-324)),
        (40, 50, Rule(floor=0.9)),
    ],
)
def test_a_check_that_could_never_fail_is_refused(baseline_of, run_of, robust, n, rule):
    outcomes = {KEY: np.arange(n) < robust}
    baseline = baseline_of(outcomes, rule)
    assert verdict(baseline, run_of({key: np.zeros(n, bool) for key in outcomes})) == "passed"
    with pytest.raises(BaselineError, match=f"never fail: at most {robust} of its {n} images"):
        require_sensitivity(baseline, "b.json")


@pytest.mark.parametrize(("robust", "n", "rule"), [(6, 50, Rule()), (50, 50, Rule(floor=0.9)), (6, 6, Rule())])
def test_a_check_that_could_just_fail_is_not_refused(baseline_of, run_of, robust, n, rule):
    outcomes = {("pgd", "linf", eps): np.arange(n) < robust * (eps == LADDER[0]) for eps in LADDER}
    baseline = baseline_of(outcomes, rule)
    require_sensitivity(baseline, "b.json")
    assert verdict(baseline, run_of({key: np.zeros(n, bool) for key in outcomes})) == "regressed"


def test_one_model_of_which_nothing_could_be_lost_is_refused_beside_another(baseline_of, run_of):
    strong, weak = (baseline_of({KEY: np.arange(50) < robust}) for robust in (40, 2))
    of_weak = weak.models[0].model_copy(update={"model": {**weak.models[0].model, "name": "weak"}})
    both = strong.model_copy(update={"models": (strong.models[0], of_weak)})
    with pytest.raises(BaselineError, match="at most 2 of its 50 images .* for weak.*or leave that model out"):
        require_sensitivity(both, "b.json")
    assert smallest_noticed_fall(both) is None and smallest_noticed_fall(strong) is not None


class TestAnotherComparison:
    OUTCOMES = {KEY: np.ones(50, bool)}

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"seed": 1}, "seed: 0 in the baseline, 1 now"),
            ({"rows_version": 2}, "rows_version: 1 in the baseline, 2 now"),
            ({"torchattacks": "9.9"}, "torchattacks: none in the baseline, 9.9 now"),
            ({"plan": {"chunk_size": 8, "parts": []}}, "plan.chunk_size: 32 in the baseline, 8 now"),
            ({"precision": "float16"}, "precision: none in the baseline, float16 now"),
            (
                {"attacks": [{"name": "pgd", "kind": "pgd", "norm": "linf", "steps": 10, "eps": [LADDER[0]]}]},
                "attacks.0.steps: 20 in the baseline, 10 now",
            ),
            ({"attacks": []}, "attacks: "),
            (
                {"dataset": {"name": "images", "sha256": "ef" * 32, "n": 50, "subset": {"n": None, "seed": 0}}},
                "dataset.sha256: cdcdcdcdcdcd... in the baseline, efefefefefef... now",
            ),
            (
                {"dataset": {"name": "images", "sha256": "cd" * 32, "n": 50, "subset": {"n": None, "seed": False}}},
                "dataset.subset.seed: 0 in the baseline, False now",
            ),
        ],
    )
    @pytest.mark.parametrize("weights_may_change", [False, True])
    def test_settings_and_images(self, run_of, baseline_of, change, said, weights_may_change):
        baseline = baseline_of(self.OUTCOMES, Rule(weights_may_change=weights_may_change))
        result = compare(baseline, [run_of(self.OUTCOMES, **change)], "b.json")
        assert result.verdict == "another_comparison"
        assert said in result.differences[0]
        assert said in result.reason
        assert not result.comparisons

    def test_the_same_images_by_another_name_are_compared_and_said(self, run_of, baseline_of):
        run = run_of(self.OUTCOMES)
        run.manifest["dataset"] = {**run.manifest["dataset"], "name": "elsewhere"}
        result = compare(baseline_of(self.OUTCOMES), [run], "b.json")
        assert result.verdict == "passed"
        assert "the data set is called elsewhere now, images in the baseline" in result.notes

    def test_the_same_images_among_others_are_compared_and_said(self, run_of, baseline_of):
        around = {"left_out_count": 4750}
        before = run_of(self.OUTCOMES)
        before.manifest["dataset"] = {**before.manifest["dataset"], **around}
        now = run_of(self.OUTCOMES)
        now.manifest["dataset"] = {**now.manifest["dataset"], "left_out_count": 0}
        result = compare(build_baseline([before], Rule()), [now], "b.json")
        assert result.verdict == "passed"
        assert "0 images of other classes are left out now, 4750 in the baseline" in result.notes

    def test_preprocessing(self, run_of, baseline_of):
        run = run_of(self.OUTCOMES)
        run.manifest["model"]["input_size"] = 16
        result = compare(baseline_of(self.OUTCOMES, Rule(weights_may_change=True)), [run], "b.json")
        assert result.differences == ("model.input_size: 8 in the baseline, 16 now",)

    @pytest.mark.parametrize(
        ("hashes", "said"), [(("f", "b"), "weights of"), (("a", "f"), "code of"), (("f", "f"), "weights and code of")]
    )
    def test_the_model_is_refused_or_noted(self, run_of, baseline_of, hashes, said):
        run = run_of(self.OUTCOMES, hashes=hashes)
        refused = compare(baseline_of(self.OUTCOMES), [run], "b.json")
        assert refused.verdict == "another_comparison"
        assert said in refused.reason and "--weights-may-change" in refused.reason
        compared = compare(baseline_of(self.OUTCOMES, Rule(weights_may_change=True)), [run], "b.json")
        assert compared.verdict == "passed"
        assert said in compared.notes[0]

    def test_a_model_of_another_recipe_is_another_model_alone(self, run_of, baseline_of):
        baseline = baseline_of(self.OUTCOMES, Rule(weights_may_change=True), training={"recipe": "short 1"})
        run = run_of(self.OUTCOMES, hashes=("f", "b"), training={"recipe": "long 2"})
        assert compare(baseline, [run], "b.json").verdict == "passed"

    def test_the_same_model_under_another_name_is_the_same(self, run_of, baseline_of):
        run = run_of(self.OUTCOMES, models=("elsewhere/model.py:build",))
        assert find_differences(baseline_of(self.OUTCOMES), [run.manifest]) == ([], [])

    def test_number_of_models(self, run_of):
        models = ("a.py:build", "b.py:build")
        runs = [run_of(self.OUTCOMES, models=models, position=position) for position in (0, 1)]
        baseline = build_baseline(runs, Rule())
        result = compare(baseline, [run_of(self.OUTCOMES)], "b.json")
        assert result.differences == ("models: 2 in the baseline, 1 now",)
        assert compare(baseline, runs, "b.json").verdict == "passed"

    def test_measurements_taken_out_of_the_file_do_not_pass(self, run_of, baseline_of):
        both = {**self.OUTCOMES, ("pgd", "linf", LADDER[1]): np.ones(50, bool)}
        baseline = baseline_of(both)
        (model,) = baseline.models
        fewer = baseline.model_copy(update={"models": (model.model_copy(update={"measurements": model.measurements[:1]}),)})
        with pytest.raises(BaselineError, match="measurements of model.py:build"):
            compare(fewer, [run_of(both)], "b.json")


def test_result_is_plain_json(run_of, baseline_of):
    outcomes = {("cw", "l2", math.inf): np.ones(50, bool)}
    result = compare(baseline_of(outcomes), [run_of(outcomes)], "b.json")
    document = json.loads(result.model_dump_json(), parse_constant=pytest.fail)
    assert document["comparisons"][0]["eps"] is None
