import numpy as np
import pytest

from lrrobust.verdict.rule import compare_pairs, find, smallest_detectable

ALPHA, DELTA = 0.05, 0.02


def verdicts(counts, n, norms, is_more=True, delta=DELTA):
    tests = compare_pairs(counts[0], counts[1], n, ALPHA)
    return find(tests, norms, is_more=is_more, significance=ALPHA, smallest_difference=delta)


def one(treatment_only, control_only, n=1000, norms=None, **options):
    """Verdict on one case: rows of equal populations."""
    counts = np.array([[treatment_only] * 3, [control_only] * 3])
    found = verdicts(counts, n, norms or ["linf"] * len(treatment_only), **options)
    assert not (found.is_supported and found.is_refuted)
    return "supported" if found.is_supported else "refuted" if found.is_refuted else "inconclusive"


class TestByHand:
    def test_better_somewhere_and_nowhere_worse_is_supported(self):
        assert one([60, 5, 0], [20, 4, 0]) == "supported"
        assert one([20, 4, 0], [60, 5, 0], is_more=False) == "supported"

    def test_every_norm_has_to_show_it(self):
        assert one([60, 5], [20, 4], norms=["linf", "l2"]) == "inconclusive"
        assert one([60, 60], [20, 20], norms=["linf", "l2"]) == "supported"

    def test_every_population_has_to_show_it_at_the_same_eps(self):
        counts = np.array([[[60, 20]] * 2 + [[20, 60]], [[20, 19]] * 2 + [[19, 20]]])
        assert not verdicts(counts, 1000, ["linf"] * 2).is_supported
        counts[:, 2] = counts[:, 0]
        assert verdicts(counts, 1000, ["linf"] * 2).is_supported

    @pytest.mark.parametrize(
        "agreed, otherwise, verdict",
        [
            (([60, 5], [20, 4]), ([60, 100], [20, 100]), "is_supported"),
            (([20, 100], [80, 100]), ([20, 100], [20, 100]), "is_refuted"),
            (([10, 3], [11, 2]), ([60, 3], [50, 2]), "is_refuted"),
        ],
    )
    @pytest.mark.parametrize("odd", [0, 1, 2])
    def test_one_population_that_says_otherwise_withholds(self, agreed, otherwise, verdict, odd):
        counts = np.array([[side] * 3 for side in agreed])
        assert getattr(verdicts(counts, 1000, ["linf"] * 2), verdict)
        counts[:, odd] = otherwise
        found = verdicts(counts, 1000, ["linf"] * 2)
        assert not found.is_supported and not found.is_refuted

    def test_significant_but_smaller_than_matters_is_not_enough(self):
        # 16 of 1000 with p = 3e-5.
        assert one([16], [0]) == "inconclusive"
        assert one([20], [0]) == "supported"
        assert one([16], [0], delta=0.03) == "refuted"

    def test_large_but_not_significant_is_not_enough(self):
        assert one([5], [1], n=100) == "inconclusive"

    def test_significantly_worse_elsewhere_withholds_however_little(self):
        assert one([300, 5], [100, 5], n=5000) == "supported"
        assert one([300, 5], [100, 35], n=5000) == "inconclusive"

    def test_no_advantage_that_matters_is_refuted(self):
        assert one([10, 3], [11, 2]) == "refuted"
        assert one([10, 3], [40, 2]) == "refuted"

    def test_harm_is_refuted_although_little_is_known_elsewhere(self):
        assert one([20, 100], [80, 100]) == "refuted"
        assert one([20, 100], [80, 100], is_more=False) == "inconclusive"

    def test_curves_that_cross_are_inconclusive(self):
        assert one([80, 20], [20, 80]) == "inconclusive"

    def test_nothing_is_known_without_images(self):
        assert one([0], [0], n=0) == "inconclusive"
        counts = np.array([[[60], [60], [0]], [[20], [20], [0]]])
        found = verdicts(counts, np.array([[1000], [1000], [0]]), ["linf"])
        assert not found.is_supported and not found.is_refuted


def test_never_supported_and_refuted_at_once():
    generator = np.random.default_rng(0)
    counts = np.minimum(generator.integers(0, 60, (2, 20_000, 1, 2)), generator.integers(0, 60, (2, 20_000, 1, 2)))
    counts = counts // np.array([1, 8]) + generator.integers(0, 3, (2, 20_000, 3, 2))
    found = verdicts(counts, 800, ["linf", "linf"])
    assert found.is_supported.any() and found.is_refuted.any()
    assert not (found.is_supported & found.is_refuted).any()


def simulate(simulations, n, *, lead=0.0, dropped=0.0, seed=0):
    """Counts (2, simulations, 3, 6) and images (simulations, 3, 6) of two models over three eps of two norms.

    An image's robustness under a model is its own part and the model's, correlated across norms; it is classified
    correctly above 0. `lead` shifts the treatment; the control fails on a share `dropped` of images, clean.
    """
    generator = np.random.default_rng(seed)
    own = generator.normal(0.8, 1, (simulations, n, 1))
    sides = []
    for shift, share in ((lead, 0.0), (0.0, dropped)):
        of_model = own + shift + 0.6 * generator.normal(size=(simulations, n, 1))
        of_model = np.where(generator.random((simulations, n, 1)) < share, -1.0, of_model)
        survives = [of_model + 0.2 * generator.normal(size=(simulations, n, 1)) * (of_model > 0) > np.array([0.2, 0.7, 1.5])]
        survives += [of_model > np.array([0.3, 0.9, 1.6])]
        is_correct = of_model[..., 0] > 0
        sides.append((is_correct, np.concatenate(survives, axis=2) & is_correct[..., None]))
    (ours, we_survive), (theirs, they_survive) = sides
    keep = np.ones_like(ours)
    for more, other in ((ours, theirs), (theirs, ours)):
        only = more & ~other
        excess = only.sum(1) - (other & ~more).sum(1)
        keep &= ~(only & (np.cumsum(only, axis=1) <= excess[:, None]))
    populations = [np.ones_like(ours), ours & theirs, keep]
    counts = [
        np.stack([(members[..., None] & a & ~b).sum(1) for members in populations], axis=1)
        for a, b in ((we_survive, they_survive), (they_survive, we_survive))
    ]
    images = np.stack([np.repeat(members.sum(1)[:, None], 6, axis=1) for members in populations], axis=1)
    return np.array(counts), images


NORMS = ["linf"] * 3 + ["l2"] * 3


class TestErrors:
    """Rates of wrong verdicts; 2000 simulations have a standard error of at most 0.5 points at 5 %."""

    def test_equal_models_are_rarely_called_different(self):
        counts, images = simulate(2000, 400)
        assert verdicts(counts, images, NORMS).is_supported.mean() <= ALPHA
        assert verdicts(counts, images, NORMS, is_more=False).is_supported.mean() <= ALPHA

    def test_a_lead_in_clean_accuracy_alone_is_no_robustness(self):
        counts, images = simulate(2000, 400, dropped=0.15)
        on_all_images = compare_pairs(counts[0][:, :1], counts[1][:, :1], images[:, :1], ALPHA)
        assert find(on_all_images, NORMS, is_more=True, significance=ALPHA, smallest_difference=DELTA).is_supported.mean() > 0.5
        assert verdicts(counts, images, NORMS).is_supported.mean() <= ALPHA

    def test_family_of_rows_keeps_the_level(self):
        # Independent rows of no difference, the hardest case for Holm; no other condition.
        counts = np.random.default_rng(1).multinomial(500, [0.1, 0.1, 0.8], (4000, 1, 12))
        tests = compare_pairs(counts[..., 0], counts[..., 1], 500, ALPHA)
        rate = (tests.p_holm <= ALPHA).any(axis=(1, 2)).mean()
        assert 0.01 < rate <= ALPHA
        unadjusted = (tests.p_value <= ALPHA).any(axis=(1, 2)).mean()
        assert unadjusted > 4 * ALPHA

    def test_worse_by_what_matters_in_one_row_is_rarely_supported(self):
        generator = np.random.default_rng(2)
        better = generator.multinomial(1000, [0.15, 0.05, 0.8], (4000, 1))
        worse = generator.multinomial(1000, [0.04, 0.06, 0.9], (4000, 1))
        counts = np.stack([better, worse], axis=2)
        rate = verdicts((counts[..., 0], counts[..., 1]), 1000, ["linf"] * 2).is_supported.mean()
        assert 0.01 < rate <= ALPHA

    def test_a_true_claim_is_rarely_refuted(self):
        # d = delta in one row and 0 in the others, known precisely enough that refuting is within reach.
        generator = np.random.default_rng(3)
        lead = generator.multinomial(5000, [0.06, 0.04, 0.9], (4000, 1))
        none = generator.multinomial(5000, [0.01, 0.01, 0.98], (4000, 1))
        counts = np.stack([lead, none], axis=2)
        rate = verdicts((counts[..., 0], counts[..., 1]), 5000, ["linf"] * 2).is_refuted.mean()
        assert 0.01 < rate <= ALPHA

    def test_no_difference_is_refuted_once_there_are_images_enough(self):
        counts = np.random.default_rng(4).multinomial(5000, [0.02, 0.02, 0.96], (1000, 3, 2))
        assert verdicts((counts[..., 0], counts[..., 1]), 5000, ["linf"] * 2).is_refuted.mean() > 0.9


class TestPower:
    @pytest.mark.parametrize("power", [0.6, 0.8, 0.95])
    def test_the_promised_difference_is_supported_as_often_as_promised(self, power):
        # Independent populations and norms are the hardest: what one misses the others do not miss with it.
        n, discordance = 1500, 0.12
        promised = smallest_detectable(
            n,
            round(n * discordance),
            rows=4,
            norms=2,
            populations=3,
            significance=ALPHA,
            power=power,
            smallest_difference=DELTA,
        )
        shares = [(discordance + promised) / 2, (discordance - promised) / 2, 1 - discordance]
        counts = np.random.default_rng(5).multinomial(n, shares, (4000, 3, 2))
        tail = np.random.default_rng(6).multinomial(n, [0.01, 0.005, 0.985], (4000, 3, 2))
        counts = np.concatenate([counts, tail], axis=2)
        rate = verdicts((counts[..., 0], counts[..., 1]), n, ["linf", "l2"] * 2).is_supported.mean()
        assert rate >= power - 0.01
        # The promise is of a difference within reach: about four standard errors of the difference seen.
        assert promised < 5.5 * np.sqrt(discordance / n)

    def test_a_lead_of_correlated_curves_is_supported(self):
        counts, images = simulate(500, 1000, lead=0.35)
        assert verdicts(counts, images, NORMS).is_supported.mean() > 0.8
        assert not verdicts(counts, images, NORMS).is_refuted.any()

    def test_no_images_promise_nothing(self):
        settings = {"rows": 2, "norms": 1, "populations": 3, "significance": ALPHA, "power": 0.8}
        assert smallest_detectable(0, 0, smallest_difference=DELTA, **settings) is None
        assert smallest_detectable(6, 3, smallest_difference=DELTA, **settings) is None
