import numpy as np
import pytest

from lrrobust.stats import curve_over_passes, passes_up_to


def test_passes_up_to_by_definition():
    generator = np.random.default_rng(0)
    images, eps = np.divmod(generator.permutation(60), 5)
    spent = generator.integers(0, 50, 60).astype(float)
    found = passes_up_to(images, eps, spent)
    for image, at, total in zip(images, eps, found):
        assert total == spent[(images == image) & (eps <= at)].sum()


def test_what_was_not_counted_stays_unknown_and_touches_no_other_image():
    found = passes_up_to([0, 0, 0, 1, 1], [1, 2, 3, 1, 2], [5, np.nan, 7, 1, 1])
    np.testing.assert_equal(found, [5, np.nan, np.nan, 1, 2])
    np.testing.assert_equal(passes_up_to([0, 0, 1], [1, np.inf, np.inf], [np.nan, 9, 8]), [np.nan, np.nan, 8])
    assert len(passes_up_to([], [], [])) == 0


def test_curve_ends_at_the_robust_accuracy():
    generator = np.random.default_rng(0)
    spent, is_correct, is_broken = generator.integers(0, 20, 200), generator.random(200) < 0.8, generator.random(200) < 0.5
    is_broken |= ~is_correct
    steps, accuracy = curve_over_passes(spent, is_correct, is_broken)
    for at, robust in zip(steps, accuracy):
        assert robust == pytest.approx(np.mean(is_correct & ~(is_broken & (spent <= at))), abs=1e-12)
    assert accuracy[-1] == pytest.approx(np.mean(~is_broken)) and (np.diff(steps) > 0).all() and (np.diff(accuracy) <= 0).all()
