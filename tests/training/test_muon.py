import pytest
import torch

from lrrobust.training.muon import QUINTIC, Muon, orthogonalise


def matrix_with(singular_values, rows, columns, seed=0):
    """A float64 matrix of these singular values, and the nearest orthogonal matrix U V^T."""
    generator = torch.Generator().manual_seed(seed)
    count = len(singular_values)
    left = torch.linalg.qr(torch.randn(rows, count, generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(columns, count, generator=generator, dtype=torch.float64)).Q
    return left * torch.tensor(singular_values, dtype=torch.float64) @ right.t(), left @ right.t()


@pytest.mark.parametrize("rows, columns", [(6, 6), (6, 40), (40, 6)])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_singular_values_come_near_one_and_directions_stay(rows, columns, scale):
    matrix, nearest = matrix_with([5.0, 2.0, 1.0, 0.5, 0.2, 0.1], rows, columns)
    result = orthogonalise((matrix * scale).float(), iterations=5).double()
    assert result.shape == matrix.shape
    singular = torch.linalg.svdvals(result)
    assert 0.65 < singular.min() and singular.max() < 1.25
    # In the basis of U and V the result is diagonal.
    cosine = (result * nearest).sum() / (result.norm() * nearest.norm())
    assert cosine > 0.97


@pytest.mark.parametrize("iterations", [0, 1, 3, 5])
def test_iterations_are_those_of_the_polynomial(iterations):
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(5, 30, generator=generator)
    expected = matrix.double() / matrix.double().norm()
    a, b, c = QUINTIC
    for _ in range(iterations):
        gram = expected @ expected.t()
        expected = a * expected + (b * gram + c * gram @ gram) @ expected
    torch.testing.assert_close(orthogonalise(matrix, iterations).double(), expected, rtol=1e-4, atol=1e-5)


def test_zero_stays_zero():
    assert not orthogonalise(torch.zeros(3, 5)).any()


def test_groups_of_other_tensors_follow_adamw():
    generator = torch.Generator().manual_seed(0)
    ours = torch.nn.Parameter(torch.randn(7, generator=generator))
    theirs = torch.nn.Parameter(ours.detach().clone())
    options = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    optimizers = [Muon([{"params": [ours]}], **options), torch.optim.AdamW([theirs], **options)]
    for _ in range(5):
        gradient = torch.randn(7, generator=generator)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_first_step_on_a_kernel():
    gradient, nearest = matrix_with([1.0, 1.0, 1.0, 1.0], 4, 18)
    kernel = torch.nn.Parameter(torch.ones(4, 2, 3, 3))
    kernel.grad = gradient.float().view(4, 2, 3, 3)
    Muon([{"params": [kernel], "orthogonal": True}], lr=0.1, weight_decay=0.5).step()
    moved = (kernel.detach().flatten(1) - (1 - 0.1 * 0.5)).double()
    # A matrix of equal singular values s becomes c * U V^T: only the length of the step is the iteration's.
    size = 0.1 * 0.2 * 18**0.5
    factor = -(moved * nearest).sum() / (nearest.norm() ** 2)
    assert 0.65 * size < factor < 1.25 * size
    assert (moved + factor * nearest).norm() < 1e-3 * moved.norm()
