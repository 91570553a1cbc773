import itertools
from functools import partial

import pytest
import torch
from made_models import Function
from torch import nn

from lrrobust.attacks.specs import SquareSpec
from lrrobust.attacks.square import square_sizes
from lrrobust.threat import ThreatModel, is_in_box
from lrrobust.torchvision_import import import_torchvision

import_torchvision()
import torchattacks  # noqa: E402

NORMS = pytest.mark.parametrize("norm", ["linf", "l2"])


def square(norm, *ladder, **settings):
    return SquareSpec(kind="square", name="square", norm=norm, eps=ladder, **{"queries": 200, **settings})


def test_sizes_shrink_as_in_the_paper():
    sizes = square_sizes(10000, 0.05, True, 32, 32)
    # p halves at queries 11, 51, 201, 501, ...: sides are sqrt(p * 1024).
    assert [sizes[at] for at in (0, 10, 11, 50, 51, 200, 201, 501)] == [7, 7, 5, 5, 4, 4, 3, 2]
    assert square_sizes(5000, 0.05, True, 32, 32) == sizes[::2]
    assert square_sizes(5000, 0.05, False, 32, 32) == sizes[:5000]
    assert set(square_sizes(50, 1.0, False, 4, 9)) <= {1, 2, 3, 4}


@NORMS
@pytest.mark.parametrize("count", [1, 3, 8])
def test_success_near_the_nearest_adversarial_image_and_never_below(norm, count, linear_problem, attack_with):
    problem = linear_problem(count, classes=3)
    nearest = problem.nearest(norm)
    ladder = (0.99 * nearest.min().item(), 3.2 * nearest.max().item())
    attacked = attack_with(square(norm, *ladder, queries=500), *problem)
    assert attacked.is_broken.tolist() == [[False] * count, [True] * count]
    for eps, proposals in zip(ladder, attacked.proposals, strict=True):
        assert ThreatModel(norm, eps).is_in_ball(problem.images, proposals).all()
        assert is_in_box(proposals).all()


def test_many_queries_come_near_the_optimum(linear_problem, attack_with):
    problem = linear_problem(1, classes=3)
    spec = square("linf", 1.15 * problem.nearest("linf").item(), queries=3000)
    assert attack_with(spec, *problem).is_broken.all()


class Watched(nn.Module):
    """Hides the gradient, and keeps what it is shown: first the images, then every query, at the end what was best."""

    def __init__(self, model):
        super().__init__()
        self.model, self.shown = model, []

    def forward(self, images):
        self.shown.append(images.detach().clone())
        return self.model(images).detach()


def flat():
    """Never wrong, and always the same."""
    return Function(lambda images: torch.tensor([1.0, 0.0]) + 0 * images.flatten(1)[:, :2])


def greedy():
    """Never wrong; every image it is shown is better than the one before."""
    calls = itertools.count(1)
    return Function(lambda images: torch.tensor([1.0, next(calls) * 1e-6]).expand(len(images), 2))


@NORMS
def test_gradients_are_not_needed_and_passes_are_queries(norm, trained, attack_with):
    model, images, labels = Watched(trained[0]), trained[1][:9], trained[2][:9]
    spec = square(norm, 1e-5, {"linf": 0.03, "l2": 0.5}[norm], restarts=2)
    attacked = attack_with(spec, model, images, labels, batch_size=4)
    assert attacked.is_broken[1].any()
    assert not attacked.effort.backward_passes.any()
    standing = ~attacked.is_broken[1]
    assert standing.any() and (attacked.effort.forward_passes[:, standing] == 400).all()
    assert spec.max_forward_passes == 800


@NORMS
def test_images_do_not_influence_each_other(norm, assert_batches_do_not_matter):
    assert_batches_do_not_matter(square(norm, {"linf": 0.02, "l2": 0.3}[norm], queries=60))


@NORMS
def test_every_image_has_squares_of_its_own(norm, attack_with):
    model = Watched(flat())
    images, labels = torch.full((6, 3, 10, 10), 0.5), torch.zeros(6, dtype=torch.int64)
    attack_with(square(norm, 0.1, queries=3, p_init=0.1), model, images, labels)
    for shown in model.shown[1:4]:
        assert len(shown.flatten(1).unique(dim=0)) == 6


def test_a_linf_query_sets_one_square_to_the_ends_of_the_ball(attack_with):
    model = Watched(greedy())
    images, labels = torch.full((4, 3, 9, 12), 0.5), torch.zeros(4, dtype=torch.int64)
    images[0, :, :, :6] = 0.01  # the box cuts the ball
    attack_with(square("linf", 0.1, queries=80, p_init=0.2), model, images, labels)
    shown = torch.stack(model.shown[1:81])
    low, high = (images - 0.1).clamp(0, 1), (images + 0.1).clamp(0, 1)
    assert ((shown - low).abs().minimum((shown - high).abs()) < 1e-6).all()
    # Vertical stripes at first, one value a colour and column.
    assert (shown[0, 1:] == shown[0, 1:, :, :1]).all()
    sizes = square_sizes(80, 0.2, False, 9, 12)
    touched = torch.zeros(9, 12, dtype=torch.bool)
    for at, (before, after) in enumerate(zip(shown, shown[1:])):
        changed = (before != after).any(1)
        assert changed.flatten(1).any(1).all(), "a query that changes nothing"
        for one in changed:
            rows, columns = one.any(1).nonzero().flatten(), one.any(0).nonzero().flatten()
            assert rows[-1] - rows[0] < sizes[at] and columns[-1] - columns[0] < sizes[at]
            touched |= one
    assert touched.all(), "pixels that no square reaches"


def test_a_l2_query_moves_the_budget_between_two_squares(attack_with):
    model = Watched(greedy())
    images, labels = torch.full((4, 3, 15, 15), 0.5), torch.zeros(4, dtype=torch.int64)
    attack_with(square("l2", 0.5, queries=60, p_init=0.1), model, images, labels)
    shown = torch.stack(model.shown[1:61])
    delta = shown - images
    # Nothing is cut off by the box here, so the whole budget is in use all the time.
    torch.testing.assert_close(delta.flatten(2).norm(dim=2), torch.full((60, 4), 0.5))
    changed = ((delta[1:] - delta[:-1]).abs() > 1e-6).any(2).flatten(2).sum(2)
    sizes = torch.tensor([max(size, 3) // 2 * 2 + 1 for size in square_sizes(60, 0.1, False, 15, 15)[:59]])
    # Now and then a square gets the pattern again that it has already.
    assert (changed <= 2 * sizes[:, None] ** 2).all() and (changed > 0).float().mean() > 0.9


@NORMS
def test_queries_are_inside_on_large_images(norm, attack_with):
    images, labels = 0.3 + 0.4 * torch.rand(2, 3, 224, 224), torch.zeros(2, dtype=torch.int64)
    model = Watched(flat())
    attack_with(square(norm, 1.0 if norm == "l2" else 0.05, queries=12), model, images, labels)
    threat = ThreatModel(norm, 1.0 if norm == "l2" else 0.05)
    assert all(threat.is_in_ball(images, shown).all() for shown in model.shown[1:])


@NORMS
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 2, 5), (1, 4, 4)])
def test_small_images(norm, shape, attack_with):
    images, labels = torch.full((3, *shape), 0.5), torch.zeros(3, dtype=torch.int64)

    def dark(images):
        mean = images.flatten(1).mean(1)
        return torch.stack([mean, 1 - mean], 1) - 5

    attacked = attack_with(square(norm, 0.3, queries=30), Function(dark), images + 0.01, labels)
    assert attacked.is_broken.all()


@NORMS
def test_no_weaker_than_torchattacks(norm, beside_peer):
    eps = {"linf": 0.05, "l2": 0.5}[norm]
    options = {"norm": {"linf": "Linf", "l2": "L2"}[norm], "eps": eps, "n_queries": 150, "p_init": 0.8, "resc_schedule": False}
    ours, theirs = beside_peer(square(norm, eps, queries=150), partial(torchattacks.Square, **options))
    # Few as they may be, on some processors other images than on others.
    assert 3 < theirs < 58
    assert ours >= theirs - 1
