import pytest
import torch

from lrrobust.attacks.piecewise_linear import find_crossing


@pytest.mark.parametrize("seed", range(5))
def test_the_crossing_is_the_smallest_place_where_the_value_is_reached(seed):
    generator = torch.Generator().manual_seed(seed)
    knots = torch.randn(6, 9, generator=generator, dtype=torch.float64)
    changes = torch.rand(6, 9, generator=generator, dtype=torch.float64)
    ends = knots + torch.rand(6, 9, generator=generator, dtype=torch.float64)
    knots, changes = torch.cat([knots, ends], 1), torch.cat([changes, -changes], 1)

    def height(t):
        return (changes * (t[:, None] - knots).clamp_min(0)).sum(1)

    top = height(torch.full((6,), 10.0, dtype=torch.float64))
    for share in (0.01, 0.3, 0.99):
        crossing = find_crossing(knots, changes, share * top)
        torch.testing.assert_close(height(crossing), share * top, atol=1e-12, rtol=0)
        assert (height(crossing - 1e-6) < share * top - 1e-9).all()
    assert find_crossing(knots, changes, 1.01 * top).isinf().all()
    assert torch.equal(find_crossing(knots, changes, 0 * top), knots.amin(1))


def test_rows_of_zeros_reach_nothing_but_zero():
    knots, changes = torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.float64)
    assert find_crossing(knots, changes, torch.tensor([0.0, 1.0], dtype=torch.float64)).tolist() == [0.0, torch.inf]
