import copy

import pytest
import torch
from torch import nn

from lrrobust.models import folding
from lrrobust.models.folding import ConstantGeometry, fold_constants
from lrrobust.models.lrnet import GeometryPrior, LocalRelationLayer, lr_resnet26
from lrrobust.models.resnet import resnet26


@pytest.fixture(params=[lr_resnet26, resnet26], ids=["lr_resnet26", "resnet26"])
def network(request, seeded):
    """With statistics, scales and shifts that would show if they were lost."""
    network = request.param(5).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
    return network


def gradient(network, images):
    images = images.clone().requires_grad_(True)
    logits = network(images)
    return logits.detach(), torch.autograd.grad(logits.logsumexp(1).sum(), images)[0]


def test_same_function_and_gradient(network):
    images = torch.rand(2, 3, 33, 35)
    exact = copy.deepcopy(network).double()
    for module in exact.modules():
        if isinstance(module, LocalRelationLayer):
            module.backend = "reference"
    exact_logits, exact_gradient = gradient(exact, images.double())
    logits, input_gradient = gradient(fold_constants(network), images)
    assert (logits - exact_logits).abs().max() < 2e-5 * exact_logits.abs().max()
    # Rounding, which the plain network has as much of: up to 3e-4 where a processor adds in wider vectors.
    assert (input_gradient - exact_gradient).abs().max() < 6e-4 * exact_gradient.abs().max()


def test_nothing_constant_is_left_and_the_original_stays(network):
    before = copy.deepcopy(network.state_dict())
    folded = fold_constants(network)
    assert not folded.training and not any(p.requires_grad for p in folded.parameters())
    assert not any(isinstance(module, (nn.BatchNorm2d, GeometryPrior)) for module in folded.modules())
    priors = sum(isinstance(module, GeometryPrior) for module in network.modules())
    assert sum(isinstance(module, ConstantGeometry) for module in folded.modules()) == priors
    assert any(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    for key, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[key]), key
    assert all(p.requires_grad for p in network.parameters())


def test_the_stem_takes_a_few_images_at_a_time(seeded, monkeypatch):
    folded = fold_constants(lr_resnet26(5).eval())
    images = torch.rand(5, 3, 32, 32)
    whole = gradient(folded, images)
    taken = []
    relation = next(layer for layer in folded.stem if isinstance(layer, LocalRelationLayer))
    relation.output.register_forward_hook(lambda module, inputs, output: taken.append(len(output)))
    monkeypatch.setattr(folding, "_PIXELS_AT_ONCE", 2 * 32 * 32 + 1)
    parts = gradient(folded, images)
    assert taken == [2, 2, 1]
    for found, expected in zip(parts, whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    # Images larger than that go one by one; none at all are no error.
    monkeypatch.setattr(folding, "_PIXELS_AT_ONCE", 1)
    del taken[:]
    assert folded(images[:2]).shape == (2, 5) and taken == [1, 1]
    assert folded(images[:0]).shape == (0, 5)


def test_networks_of_others_are_left_alone():
    other = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    assert fold_constants(other) is other
