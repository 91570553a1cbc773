"""An attack by classes alone, on models whose nearest adversarial images are known, and on answers that say no more."""

import math
from dataclasses import replace

import pytest
import torch
from made_models import Function
from torch import nn

from lrrobust.attacks import hop_skip_jump
from lrrobust.attacks.build import Attack
from lrrobust.attacks.specs import HopSkipJumpSpec
from lrrobust.threat import distance, is_in_box

SPECS = [
    HopSkipJumpSpec(kind="hop_skip_jump", name="hsj", norm=norm, eps=(0.1,), queries=2500, initial_evaluations=50)
    for norm in ("linf", "l2")
]
EVERY = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.norm)


def draw(row, eps, start):
    return torch.Generator().manual_seed(row)


def answering(network, levels=None):
    """The class of a network, and nothing of its logits; of images rounded to some levels."""

    @torch.no_grad()
    def answer(images):
        if levels is not None:
            images = (images * levels).round() / levels
        logits = network(images)
        return nn.functional.one_hot(logits.argmax(1), logits.shape[1]).to(logits)

    return Function(answer)


@EVERY
def test_distances_come_near_the_optimum(spec, linear_problem, attack_with):
    # Of several classes it may come to one that is not the nearest.
    problem = linear_problem(6, classes=2)
    attacked = attack_with(spec, answering(problem.model), problem.images, problem.labels)
    assert attacked.is_broken.all() and is_in_box(attacked.proposals).all()
    ratio = distance(problem.images, attacked.proposals[0], spec.norm) / problem.nearest(spec.norm)
    assert (ratio >= 1 - 1e-4).all() and (ratio <= (1.6 if spec.norm == "linf" else 1.2)).all()
    assert (attacked.effort.forward_passes <= spec.queries).all() and not attacked.effort.backward_passes.any()


@EVERY
def test_logits_do_not_matter(spec, linear_problem, attack_with):
    problem = linear_problem(4, classes=3)
    spec = spec.model_copy(update={"queries": 600})
    by_class, by_logits = (
        attack_with(spec, model, problem.images, problem.labels) for model in (answering(problem.model), problem.model)
    )
    # But for what is too near the boundary for another batch.
    torch.testing.assert_close(by_class.proposals, by_logits.proposals, atol=3e-3, rtol=0)


def test_answers_of_rounded_images_are_asked_farther_away(linear_problem, attack_with, monkeypatch):
    problem = linear_problem(8, classes=2)
    # On the grid, between whose levels no answer changes: a hundredth of the distance is far less.
    images = (problem.images * 255).round() / 255
    rounded = answering(problem.model, levels=255)
    labels = rounded(images).argmax(1)
    nearest = replace(problem, images=images, labels=labels).nearest("linf")
    ratios = []
    for growth in (hop_skip_jump._GROWTH, 1.0):
        monkeypatch.setattr(hop_skip_jump, "_GROWTH", growth)
        attacked = attack_with(SPECS[0], rounded, images, labels)
        assert attacked.is_broken.all()
        ratios.append((distance(images, attacked.proposals[0], "linf") / nearest).median())
    # Half a level of all values is as long as the nearest distance.
    assert ratios[0] <= 3 and ratios[0] < 0.7 * ratios[1]


@EVERY
def test_batches_change_nothing_but_rounding(spec, in_double, attack_with):
    model, images, labels = in_double[0], in_double[1][:10], in_double[2][:10]
    spec = spec.model_copy(update={"queries": 400})
    whole = attack_with(spec, model, images, labels)
    for batch_size in (7, 32):
        parts = attack_with(spec, model, images[3:5], labels[3:5], batch_size=batch_size, names=range(3, 5))
        torch.testing.assert_close(whole.proposals[:, 3:5], parts.proposals, atol=1e-7, rtol=0)
        assert torch.equal(whole.effort.forward_passes[:, 3:5], parts.effort.forward_passes)


@pytest.mark.parametrize("queries", [1, 7, 90, 300])
def test_no_query_more_than_allowed(queries, trained):
    model, images, labels = trained[0], trained[1][:9], trained[2][:9]
    seen, claimed = [], []

    def count(images):
        seen.append(len(images))
        return model(images)

    def claim(rows, proposals, eps, is_last):
        claimed.extend(rows)
        return [True] * len(rows)

    spec = SPECS[1].model_copy(update={"queries": queries})
    effort = Attack(spec)(Function(count), images, labels, batch_size=4, claim=claim, draw=draw)
    assert effort.forward_passes.sum() == sum(seen) and max(seen) <= 4
    assert (effort.forward_passes <= queries).all() and (effort.forward_passes > 0).all()
    assert sorted(claimed) == list(range(9))


def test_where_there_is_no_other_class_the_clean_image_is_proposed(attack_with):
    images, labels = torch.full((3, 3, 4, 4), 0.5), torch.zeros(3, dtype=torch.int64)
    constant = Function(lambda images: images.flatten(1)[:, :3] * 0 + torch.tensor([1.0, 0.0, 0.5]))
    attacked = attack_with(SPECS[0], constant, images, labels)
    assert torch.equal(attacked.proposals[0], images) and not attacked.is_broken.any()
    assert [row for row, *_ in attacked.claims] == [0, 1, 2]


def test_who_is_asked_for_survivors_stops_at_the_smallest_budget(linear_problem):
    problem = linear_problem(4, classes=3)
    eps = 1.5 * problem.nearest("l2").max().item()
    spec = SPECS[1].model_copy(update={"eps": (eps, 2 * eps)})
    spent = []
    for each in (spec, spec.model_copy(update={"survivors_only": True})):
        found = []

        def claim(rows, proposals, eps, is_last, found=found):
            found.extend(distance(problem.images[rows], proposals, "l2").tolist())
            assert eps == [math.inf] * len(rows)
            return [True] * len(rows)

        effort = Attack(each)(*problem, batch_size=8, claim=claim, draw=draw)
        assert max(found) <= eps
        spent.append(effort.forward_passes)
    assert (spent[1] < spent[0]).all()
