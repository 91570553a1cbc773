import pytest
import torch
from torch import nn

from lrrobust.gradient_rules import GradientRule, gradients_by
from lrrobust.models.lrnet import LocalRelationLayer

TEMPERED = GradientRule("tempered", 4.0)


@pytest.fixture
def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 8, 1), LocalRelationLayer(8, kernel_size=3), LocalRelationLayer(8, stride=2)).eval()


def gradient(network, images):
    images = images.clone().requires_grad_()
    out = network(images)
    return out.detach(), torch.autograd.grad(out.square().sum(), images)[0]


@pytest.mark.parametrize("gradient_of", ["tempered", "absolute_difference", "constant_weights"])
def test_layers_keep_their_values_and_change_their_gradient(gradient_of, network):
    images = torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    out, own = gradient(network, images)
    with gradients_by(network, GradientRule(gradient_of, 4.0)) as count:
        same_out, other = gradient(network, images)
    assert count == 2
    assert torch.equal(same_out, out)
    assert not torch.allclose(other, own, rtol=1e-3)
    assert torch.equal(gradient(network, images)[1], own)


def test_exact_is_the_networks_own_gradient(network):
    images = torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    own = gradient(network, images)[1]
    with gradients_by(network, TEMPERED), gradients_by(network, GradientRule("exact")):
        assert torch.equal(gradient(network, images)[1], own)


def test_rules_are_put_back_after_an_exception(network):
    layers = list(network)[1:]
    layers[0].gradient_rule = TEMPERED
    with pytest.raises(ZeroDivisionError), gradients_by(network, GradientRule("constant_weights")):
        assert [layer.gradient_rule.gradient_of for layer in layers] == 2 * ["constant_weights"]
        1 / 0
    assert [layer.gradient_rule for layer in layers] == [TEMPERED, None]


def test_convolutional_networks_have_nothing_to_smooth(small_cnn):
    images = torch.rand(2, 3, 8, 8)
    own = gradient(small_cnn, images)[1]
    with gradients_by(small_cnn, TEMPERED) as count:
        assert count == 0
        assert torch.equal(gradient(small_cnn, images)[1], own)
