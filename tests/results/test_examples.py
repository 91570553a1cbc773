import numpy as np
import pytest

from lrrobust.results.examples import Example, examples_to_table, table_to_examples


def test_tables_hold_every_value():
    clean = np.arange(256, dtype=np.uint8)[:252].reshape(7, 12, 3)
    perturbation = np.array([1e-7, -6e-5, 0.25, -1.0], np.float16).repeat(63).reshape(7, 12, 3)
    (found,) = table_to_examples(examples_to_table([Example(9, clean, perturbation)]))
    assert found.index == 9
    np.testing.assert_array_equal(found.clean, clean)
    np.testing.assert_array_equal(found.perturbation, perturbation)


@pytest.mark.parametrize(
    "clean, perturbation", [(np.zeros((2, 2, 3)), None), (np.zeros((2, 2, 3), np.uint8), np.zeros((2, 2, 3)))]
)
def test_other_types_are_refused_rather_than_rounded(clean, perturbation):
    with pytest.raises(TypeError, match="cast"):
        examples_to_table([Example(0, clean, perturbation)])
