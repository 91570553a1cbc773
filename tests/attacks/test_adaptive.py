"""PGD by several gradients: a network that hides its own, and networks that have nothing to hide."""

import pytest
import torch
from torch import nn

from lrrobust.attacks.build import Attack
from lrrobust.attacks.specs import PgdAdaptiveSpec, PgdSpec
from lrrobust.gradient_rules import GradientRule
from lrrobust.ops.surrogate_gradient import local_relation_with_gradient

GRADIENTS = ("exact", "tempered", "absolute_difference", "constant_weights")


def adaptive(*ladder, gradients=GRADIENTS, name="pgd", **settings):
    settings = {"norm": "linf", "steps": 10, "temperature": 1e5, **settings}
    return PgdAdaptiveSpec(kind="pgd_adaptive", name=name, eps=ladder, gradients=gradients, **settings)


class Masked(nn.Module):
    """Two classes, brighter or darker than mid grey, told apart by a softmax with scores of a million.

    Every position takes the value of that neighbour whose key is nearest to its brightness.
    """

    gradient_rule: GradientRule | None = None

    def forward(self, images):
        brightness = images.mean(1, keepdim=True)
        dark = (torch.arange(8) % 2).expand(len(images), 1, 8, 8).to(images)
        key = 1000 * (0.55 - 0.1 * dark)
        # The brightness takes part in the values, so that there is a gradient, of zero, when weights are held constant.
        value = 1 - 2 * dark + 0 * brightness
        rule = self.gradient_rule or GradientRule("exact")
        out = local_relation_with_gradient(
            rule, 1000 * brightness, key, value, images.new_zeros(1, 3, 3), kernel_size=3, backend="reference"
        )
        evidence = out.mean(dim=(1, 2, 3))
        return torch.stack([evidence, -evidence], dim=1)


@pytest.fixture
def masked():
    images = 0.5 + torch.tensor([0.02, 0.02, -0.02, -0.02])[:, None, None, None] * torch.ones(4, 3, 8, 8)
    labels = torch.tensor([0, 0, 1, 1])
    model = Masked().eval()
    assert torch.equal(model(images).argmax(1), labels)
    return model, images, labels


def test_hidden_gradients_are_found_by_a_smoother_layer(masked, attack_with):
    model, images, labels = masked
    for norm, eps in (("linf", 0.03), ("l2", 0.4)):
        plain = attack_with(PgdSpec(kind="pgd", name="pgd", norm=norm, eps=(eps,), steps=10, restarts=4), model, images, labels)
        found = attack_with(adaptive(eps, norm=norm), model, images, labels)
        assert not plain.is_broken.any() and found.is_broken.all()
    assert model.gradient_rule is None


def test_without_such_layers_it_is_pgd_with_as_many_restarts(linear_problem, attack_with):
    problem = linear_problem(12, 5)
    eps = problem.nearest("linf").median().item()
    plain = attack_with(
        PgdSpec(kind="pgd", name="pgd", norm="linf", eps=(eps,), steps=10, restarts=8),
        problem.model,
        problem.images,
        problem.labels,
    )
    found = attack_with(adaptive(eps, restarts=2), *problem)
    assert sorted(found.claims) == sorted(plain.claims) and 0 < found.is_broken.sum() < 12
    assert torch.equal(found.effort.forward_passes, plain.effort.forward_passes)
    assert torch.equal(found.effort.backward_passes, plain.effort.backward_passes)


def test_success_is_where_the_closed_form_says(linear_problem, attack_with):
    problem = linear_problem(12, 2)
    for norm in ("linf", "l2"):
        nearest = problem.nearest(norm)
        ladder = tuple(float(nearest.quantile(q)) for q in (0.2, 0.5, 0.8))
        found = attack_with(adaptive(*ladder, norm=norm), *problem)
        for level, eps in enumerate(ladder):
            assert (
                found.is_broken[level][nearest < 0.99 * eps].all() and not found.is_broken[level][nearest > 1.001 * eps].any()
            )


def test_an_image_goes_only_to_budgets_at_which_earlier_gradients_left_it(linear_problem, attack_with):
    problem = linear_problem(9, 3)
    ladder = tuple(float(problem.nearest("linf").quantile(q)) for q in (0.3, 0.6, 1.0))
    ladder = (*ladder[:2], 1.5 * ladder[2])
    found = attack_with(adaptive(*ladder, gradients=("exact", "tempered")), *problem)
    for row in range(9):
        lasts = [(eps, broke) for r, eps, is_last, broke in found.claims if r == row and is_last and not broke]
        breaks = [eps for r, eps, _, broke in found.claims if r == row and broke]
        # Broken at every budget where it can be at once; at those below, one last claim for each of both gradients.
        assert lasts == 2 * [(eps, False) for eps in ladder if eps < min(breaks)] and len(breaks) == 1
    per_budget = found.effort.forward_passes
    assert (per_budget[found.is_broken.logical_not()] == 20).all() and torch.equal(per_budget, found.effort.backward_passes)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_batches_do_not_matter(masked, attack_with, batch_size):
    model, images, labels = masked
    images = images.repeat(2, 1, 1, 1)
    # What a budget of 0.019 leaves standing, 0.03 breaks.
    found = attack_with(adaptive(0.019, 0.03), model, images, labels.repeat(2), batch_size=batch_size)
    together = attack_with(adaptive(0.019, 0.03), model, images, labels.repeat(2), batch_size=32)
    assert found.is_broken.tolist() == together.is_broken.tolist() == [8 * [False], 8 * [True]]
    assert torch.equal(found.effort.forward_passes, together.effort.forward_passes)
    torch.testing.assert_close(found.proposals, together.proposals)


def test_levels_are_kept_to(linear_problem):
    problem = linear_problem(3, 2)
    claimed = []
    effort = Attack(adaptive(1e-5, 2e-5))(
        problem.model,
        problem.images,
        problem.labels,
        batch_size=2,
        levels=torch.tensor([0, 1, 2]),
        claim=lambda rows, proposals, eps, is_last: claimed.extend(zip(rows, eps)) or [False] * len(rows),
        draw=lambda row, eps, restart: torch.Generator().manual_seed(restart),
    )
    assert set(claimed) == {(1, 1e-5), (2, 1e-5), (2, 2e-5)}
    assert effort.forward_passes.tolist() == [[0, 40, 40], [0, 0, 40]]


def test_starts_of_the_gradients_differ(linear_problem):
    problem = linear_problem(1, 2)
    drawn = []
    Attack(adaptive(1e-5, restarts=2))(
        problem.model,
        problem.images,
        problem.labels,
        batch_size=2,
        claim=lambda rows, *_: [False] * len(rows),
        draw=lambda row, eps, restart: drawn.append(restart) or torch.Generator().manual_seed(restart),
    )
    assert drawn == list(range(8))
