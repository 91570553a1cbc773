import numpy as np
import pytest
from scipy import stats as scipy_stats
from scipy.integrate import trapezoid

from lrrobust.stats import bootstrap_mean_interval, curves, log_area_weights


def test_area_is_scipys_trapezoid_over_log_eps():
    eps = np.array([0.05, 0.1, 0.2, 0.5, 1, 2])
    robust = np.array([0.6, 0.55, 0.3, 0.1, 0.02, 0])
    expected = trapezoid(robust, np.log(eps)) / np.log(eps[-1] / eps[0])
    assert log_area_weights(eps) @ robust == pytest.approx(expected, rel=1e-12)
    assert log_area_weights(eps) @ np.ones(6) == pytest.approx(1)


@pytest.mark.parametrize("eps", [[1.0], [], [0, 1.0], [2.0, 1.0], [1.0, 1.0], [1.0, np.inf], [[1.0, 2.0]]])
def test_what_is_no_ladder_is_refused(eps):
    with pytest.raises(ValueError, match="ladder"):
        log_area_weights(eps)


@pytest.mark.parametrize("batch_numbers", [2_000_000, 500])
def test_bootstrap_agrees_with_scipys(monkeypatch, batch_numbers):
    monkeypatch.setattr(curves, "_BATCH_NUMBERS", batch_numbers)
    values = np.random.default_rng(3).choice([-0.5, -0.25, 0, 0.25, 1], p=[0.1, 0.1, 0.6, 0.1, 0.1], size=150)
    found = bootstrap_mean_interval(values, 0.9, resamples=20_000)
    expected = scipy_stats.bootstrap(
        (values,),
        np.mean,
        confidence_level=0.9,
        method="percentile",
        n_resamples=20_000,
        rng=np.random.default_rng(5),
        batch=1000,
    ).confidence_interval
    # The quantiles of 20,000 draws have a standard error of 1.5 % of the mean's.
    assert found == pytest.approx((expected.low, expected.high), abs=0.06 * values.std() / np.sqrt(150))


def test_bootstrap_is_repeatable_and_needs_values():
    assert bootstrap_mean_interval([0.0, 0.5, 1.0]) == bootstrap_mean_interval([0.0, 0.5, 1.0])
    assert bootstrap_mean_interval([0.25] * 9) == (0.25, 0.25)
    with pytest.raises(ValueError, match="at least one"):
        bootstrap_mean_interval([])
