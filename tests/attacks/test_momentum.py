from functools import partial

import pytest
import torch
from made_models import Function

from lrrobust.attacks.specs import FgsmSpec, MiFgsmSpec
from lrrobust.torchvision_import import import_torchvision

import_torchvision()
import torchattacks  # noqa: E402

NORMS = pytest.mark.parametrize("norm", ["linf", "l2"])


def mi_fgsm(norm, *ladder, **settings):
    return MiFgsmSpec(kind="mi_fgsm", name="mi_fgsm", norm=norm, eps=ladder, **settings)


@NORMS
@pytest.mark.parametrize("count", [1, 3, 8])
def test_success_exactly_beyond_the_nearest_adversarial_image(norm, count, assert_breaks_beyond_the_nearest):
    assert_breaks_beyond_the_nearest(partial(mi_fgsm, norm), norm, count)


@NORMS
def test_confident_models_are_attacked_as_well_as_others(norm, trained, attack_with):
    model, images, labels = trained[0], trained[1][:60], trained[2][:60]
    spec = mi_fgsm(norm, {"linf": 0.02, "l2": 0.25}[norm])
    plain = attack_with(spec, model, images, labels).is_broken
    confident = attack_with(spec, Function(lambda images: 500 * model(images)), images, labels).is_broken
    assert 0.2 < plain.float().mean() < 0.9
    assert (plain & ~confident).sum() <= 1


def test_one_step_is_fgsm(trained, attack_with):
    model, images, labels = trained[0], trained[1][:20], trained[2][:20]
    fgsm = attack_with(FgsmSpec(kind="fgsm", name="fgsm", eps=(0.01,)), model, images, labels)
    once = attack_with(mi_fgsm("linf", 0.01, steps=1), model, images, labels)
    torch.testing.assert_close(once.proposals, fgsm.proposals)


def test_iterates_are_those_of_torchattacks(in_double, attack_with):
    """Its gradient is divided by the mean of sizes, ours by their sum: the same but for scale."""
    model, images, labels = in_double[0], in_double[1][:60], in_double[2][:60]
    attacked = attack_with(mi_fgsm("linf", 0.01), model, images, labels)
    theirs = torchattacks.MIFGSM(model, eps=0.01, alpha=0.001, steps=10, decay=1.0)(images, labels)
    standing = ~attacked.is_broken[0]
    assert 20 < standing.sum()
    assert ((attacked.proposals[0] - theirs)[standing].abs() < 1e-6).float().mean() > 0.999


def test_momentum_carries_on_where_the_gradient_turns(attack_with):
    images, labels = torch.full((1, 3, 4, 4), 0.5), torch.tensor([0])

    def margin(images):
        """Rises up to a ridge, falls slowly behind it, and is positive far beyond."""
        beyond = images.flatten(1).mean(1) - 0.5
        value = torch.where(beyond < 0.032, beyond, 0.032 - 0.1 * (beyond - 0.032)) - 0.1
        value = torch.where(beyond > 0.045, value + 1, value)
        return torch.stack([-value, value], 1)

    for decay, expected in ((1.0, True), (0.0, False)):
        attacked = attack_with(mi_fgsm("linf", 0.1, decay=decay), Function(margin), images, labels)
        assert attacked.is_broken.item() == expected


@NORMS
def test_passes_are_steps(norm, trained, attack_with):
    model, images, labels = trained[0], trained[1][:9], trained[2][:9]
    spec = mi_fgsm(norm, 1e-5, 2e-5, steps=7)
    effort = attack_with(spec, model, images, labels, batch_size=4).effort
    standing = model(images).argmax(1) == labels
    assert (effort.forward_passes[:, standing] == 7).all() and spec.max_forward_passes == 14
    assert torch.equal(effort.forward_passes, effort.backward_passes)
