"""The way to a hyperplane beside general solvers, in float64."""

import numpy as np
import pytest
import torch
from scipy.optimize import linprog, minimize

from lrrobust.attacks.hyperplane import way_to_hyperplane
from lrrobust.threat import distance

NORMS = pytest.mark.parametrize("norm", ["linf", "l2"])


def draw(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(count, 3, 2, 2, generator=generator, dtype=torch.float64)
    images[0] = images[0].round()
    return images, torch.randn(count, 3, 2, 2, generator=generator, dtype=torch.float64)


def shortest_by_scipy(image, normal, rise, norm):
    image, normal = image.flatten().numpy(), normal.flatten().numpy()
    bounds = [(-value, 1 - value) for value in image]
    if norm == "linf":  # over the way and its length
        below = np.block([[np.eye(12), -np.ones((12, 1))], [-np.eye(12), -np.ones((12, 1))]])
        found = linprog(
            [0] * 12 + [1], A_ub=below, b_ub=np.zeros(24), A_eq=[[*normal, 0]], b_eq=[rise], bounds=[*bounds, (0, None)]
        )
        return found.fun
    meets = {"type": "eq", "fun": lambda way: normal @ way - rise, "jac": lambda way: normal}
    found = minimize(
        lambda way: way @ way,
        np.zeros(12),
        jac=lambda way: 2 * way,
        bounds=bounds,
        constraints=meets,
        method="SLSQP",
        options={"ftol": 1e-12, "maxiter": 500},
    )
    assert abs(normal @ found.x - rise) < 1e-9
    return found.fun**0.5


@NORMS
@pytest.mark.parametrize("share", [-0.9, -0.3, 0.01, 0.5, 0.95])
def test_no_way_is_shorter(norm, share):
    images, normals = draw(4)
    # The most that the box allows in this direction.
    room = torch.where((normals > 0) == (share > 0), 1 - images, images)
    rises = share * (normals.abs() * room).sum((1, 2, 3))
    ways = way_to_hyperplane(images, normals, rises, norm)
    torch.testing.assert_close((normals * ways).sum((1, 2, 3)), rises, atol=1e-12, rtol=0)
    assert (images + ways >= -1e-15).all() and (images + ways <= 1 + 1e-15).all()
    lengths = distance(images, images + ways, norm)
    for image, normal, rise, length in zip(images, normals, rises.tolist(), lengths.tolist(), strict=True):
        assert length == pytest.approx(shortest_by_scipy(image, normal, rise, norm), rel=1e-5)


@NORMS
def test_where_the_box_ends_before_the_hyperplane_the_way_ends_in_the_nearest_corner(norm):
    images, normals = draw(3)
    for sign in (1, -1):
        ways = way_to_hyperplane(images, normals, torch.full((3,), 1e3 * sign), norm)
        torch.testing.assert_close(images + ways, (sign * normals > 0).double())


@NORMS
def test_extreme_and_absent_normals_make_no_nan(norm):
    images, normals = draw(5)
    scales = torch.tensor([0.0, 1e-300, 1e-38, 1e30, 1.0], dtype=torch.float64)
    ways = way_to_hyperplane(images, scales[:, None, None, None] * normals, 0.1 * scales, norm)
    assert not ways[0].any()
    plain = way_to_hyperplane(images, normals, torch.full((5,), 0.1), norm)
    torch.testing.assert_close(ways[1:], plain[1:], atol=1e-8, rtol=0)
    # A rise where no value counts, and no rise at all.
    assert not way_to_hyperplane(images, 0 * normals, torch.ones(5), norm).any()
    assert not way_to_hyperplane(images, normals, torch.zeros(5), norm).any()


@NORMS
def test_images_are_solved_each_on_its_own_in_their_type(norm):
    images, normals = (each.float() for each in draw(4))
    rises = torch.tensor([0.1, -0.4, 2.0, 1e5])
    together = way_to_hyperplane(images, normals, rises, norm)
    assert together.dtype == torch.float32 and together.shape == images.shape
    for row in range(4):
        one = slice(row, row + 1)
        torch.testing.assert_close(way_to_hyperplane(images[one], normals[one], rises[one], norm), together[one])
