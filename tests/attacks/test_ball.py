"""Projections: what they give is inside as the judge measures it, on images of every size, and no more is given away."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from lrrobust.attacks.ball import dual_length, l1_direction, largest_signs, project, sparse_unit, surface_start, unit
from lrrobust.threat import NORMS, ThreatModel, distance, is_in_box


def nearest_by_scipy(image, moved, eps):
    """The nearest point of box and l1 ball, over what is added to each value and what is taken from it."""
    image, moved = image.flatten().numpy(), moved.flatten().numpy()
    n = len(image)

    def deviation(change):
        return image + change[:n] - change[n:] - moved

    found = minimize(
        lambda change: (deviation(change) ** 2).sum(),
        np.zeros(2 * n),
        jac=lambda change: np.concatenate([2 * deviation(change), -2 * deviation(change)]),
        bounds=[(0, 1 - value) for value in image] + [(0, value) for value in image],
        constraints={"type": "ineq", "fun": lambda change: eps - change.sum(), "jac": lambda change: -np.ones(2 * n)},
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 1000},
    )
    return image + found.x[:n] - found.x[n:]


@pytest.mark.parametrize("eps", [0.1, 0.7, 2.0, 6.0])
def test_the_projection_in_l1_is_the_nearest_point_of_ball_and_box(eps):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(4, 3, 2, 2, generator=generator, dtype=torch.float64)
    images[0] = images[0].round()
    moved = images + torch.randn(4, 3, 2, 2, generator=generator, dtype=torch.float64)
    projected = project(images, moved, torch.full((4, 1, 1, 1), eps, dtype=torch.float64), "l1")
    for image, target, found in zip(images, moved, projected, strict=True):
        np.testing.assert_allclose(found.flatten().numpy(), nearest_by_scipy(image, target, eps), atol=1e-6)
    assert (distance(images, projected, "l1") <= eps + 1e-12).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_budget_is_overdrawn_by_rounding(dtype):
    """A change of all the values of a large image by little each: rounding errors add up, and must not."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 200, 200, generator=generator, dtype=dtype)
    images[1] = images[1].round()
    moved = images + 1e-3 * torch.randn(2, 3, 200, 200, generator=generator, dtype=dtype)
    for eps in (0.0, 1e-3, 0.5, 20.0):
        projected = project(images, moved, torch.full((2, 1, 1, 1), eps, dtype=dtype), "l1")
        assert projected.dtype == dtype and is_in_box(projected).all()
        assert (distance(images, projected, "l1") <= np.float32(eps) * (1 + 1e-12)).all()
        assert ThreatModel("l1", eps).is_in_ball(images, projected).all()
        assert eps == 0 or (distance(images, projected, "l1") > 0.95 * eps - 1e-2).all()
    assert torch.equal(project(images, images, torch.zeros(2, 1, 1, 1, dtype=dtype), "l1"), images)


@pytest.mark.parametrize("side", [64, 224, 299])
@pytest.mark.parametrize("eps", [0.0, 0.05, 2.0, 20.0, 70.0, 69.882])
@pytest.mark.parametrize("is_alike", [False, True])
def test_what_is_put_on_the_surface_in_l2_is_inside_on_large_images(side, eps, is_alike):
    generator = torch.Generator().manual_seed(0)
    images = 0.3 + 0.4 * torch.rand(3, 3, side, side, generator=generator)
    direction = unit(torch.randn(images.shape, generator=generator), "l2")
    if is_alike:  # All values of an image are rounded the same way.
        images, direction = images[..., :1, :1].expand_as(images), unit(torch.ones_like(images), "l2")
    budget = torch.full((3, 1, 1, 1), eps)
    # Twice the radius: then sums of image and perturbation are rounded from the middle between two numbers, all one way.
    for factor in (2.0, 3.1):
        projected = project(images, images + factor * max(eps, 0.1) * direction, budget, "l2")
        assert ThreatModel("l2", eps).is_in_ball(images, projected).all() and is_in_box(projected).all()
        is_whole = ((images + eps * direction).clamp(0, 1) == images + eps * direction).flatten(1).all()
        assert not is_whole or (distance(images, projected, "l2") > eps - (1e-4 if is_alike else 1e-5)).all()


@pytest.mark.parametrize("side", [64, 224])
def test_starts_are_on_the_surface_and_in_the_box(side):
    image = torch.full((3, side, side), 0.5)
    for norm, eps in (("l2", 2.0), ("linf", 0.25)):
        start = surface_start(image, norm, eps, torch.Generator().manual_seed(0))
        assert distance(image[None], start[None], norm).item() == pytest.approx(eps, abs=1e-5)
        assert abs((start - image).mean()) < 0.02 * (start - image).abs().max()
        assert is_in_box(surface_start(image, norm, 1000 * eps, torch.Generator().manual_seed(0))[None])
    assert (start - image).abs().mean() == pytest.approx(0.125, rel=0.02)


def test_sparse_steps_change_the_steepest_values_that_can_move():
    images = torch.tensor([[0.5, 1.0, 0.0, 0.5, 0.5, 0.0]]).view(1, 1, 2, 3)
    gradient = torch.tensor([[0.01, 0.9, -0.8, -0.2, 0.0, 0.3]]).view(1, 1, 2, 3)
    # The second and third are at the end of the box that their gradient points to.
    assert sparse_unit(gradient, images, 2 / 6).flatten().tolist() == [0, 0, 0, -0.5, 0, 0.5]
    assert sparse_unit(gradient, images, 0.01).flatten().tolist() == [0, 0, 0, 0, 0, 1]
    # No more than have a gradient, and the length is 1 all the same.
    torch.testing.assert_close(sparse_unit(gradient, images, 1.0).flatten(), torch.tensor([1, 0, 0, -1, 0, 1]) / 3)
    assert not sparse_unit(0 * gradient, images, 0.5).any()


def test_directions_in_l1_have_length_one_and_no_favourite():
    drawn = torch.stack([l1_direction(torch.Size([3, 4, 4]), torch.Generator().manual_seed(seed)) for seed in range(300)])
    torch.testing.assert_close(drawn.abs().sum((1, 2, 3)), torch.ones(300))
    assert drawn.mean(0).abs().max() < 0.01 and (drawn.abs().mean(0) * 48 - 1).abs().max() < 0.35


@pytest.mark.parametrize("norm", NORMS)
def test_the_dual_length_is_what_a_step_gains_at_most(norm):
    gradient = torch.tensor([3.0, -4.0, 0.0, 0.0]).view(1, 1, 2, 2)
    assert dual_length(gradient, norm).tolist() == {"linf": [7.0], "l2": [5.0], "l1": [4.0]}[norm]


def test_largest_signs_as_many_as_wanted_and_all_that_tie():
    gradient = torch.tensor([[4.0, -3, 2, 0], [1, 1, -1, 0.5], [0, 0, 0, 5]]).view(3, 1, 2, 2)
    found = largest_signs(gradient, torch.tensor([2, 1, 3])).flatten(1)
    torch.testing.assert_close(3 * found, torch.tensor([[1.5, -1.5, 0, 0], [1, 1, -1, 0], [0, 0, 0, 3]]))
