import pytest
from scipy.stats import binomtest

from lrrobust.stats import binomial_p_value, wilson_interval


@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
@pytest.mark.parametrize("successes, n", [(0, 1), (1, 1), (0, 10), (3, 10), (10, 10), (1748, 5000), (5000, 5000)])
def test_wilson_agrees_with_scipy(successes, n, confidence):
    expected = binomtest(successes, n).proportion_ci(confidence, method="wilson")
    assert wilson_interval(successes, n, confidence) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize(
    "successes, n, low, high",
    # Newcombe, Two-sided confidence intervals for the single proportion, Stat. Med. 17, 1998, table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_agrees_with_published_values(successes, n, low, high):
    assert wilson_interval(successes, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_ends_are_exact():
    assert wilson_interval(0, 7)[0] == 0
    assert wilson_interval(7, 7)[1] == 1
    assert wilson_interval(0, 0) == (0, 1)


@pytest.mark.parametrize("successes, n, share", [(0, 10, 0.1), (1, 10, 0.1), (5, 64, 0.02), (64, 64, 0.5), (0, 0, 0.3)])
def test_binomial_test_agrees_with_scipy(successes, n, share):
    expected = binomtest(successes, n, share, alternative="greater").pvalue if n else 1.0
    assert binomial_p_value(successes, n, share) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        *((wilson_interval, arguments) for arguments in [(-1, 5), (6, 5), (1, -1), (1, 5, 0), (1, 5, 1), (1, 5, 95)]),
        *((binomial_p_value, arguments) for arguments in [(-1, 5, 0.5), (6, 5, 0.5), (1, 5, 0.0), (1, 5, 1.0)]),
    ],
)
def test_what_is_out_of_range_is_refused(function, arguments):
    with pytest.raises(ValueError, match="expected 0 <"):
        function(*arguments)
