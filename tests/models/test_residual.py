import pytest
import torch
from torch import nn

from lrrobust.models.residual import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Bottleneck,
    Normalization,
    PointwiseConvolution,
    ResidualNetwork,
)


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("size", [(8, 8), (7, 5), (1, 1)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_pointwise_convolution_is_a_convolution(stride, size, memory_format, seeded):
    ours = PointwiseConvolution(12, 20, stride)
    theirs = nn.Conv2d(12, 20, 1, stride=stride, bias=False)
    theirs.load_state_dict(ours.state_dict())
    inputs = [torch.randn(3, 12, *size).to(memory_format=memory_format).requires_grad_() for _ in range(1)]
    inputs.append(inputs[0].detach().clone().requires_grad_())
    out, expected = ours(inputs[0]), theirs(inputs[1])
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
    grad = torch.randn(expected.shape)
    out.backward(grad)
    expected.backward(grad)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, rtol=1e-5, atol=1e-5)


def test_normalization():
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    images = (mean + 2 * std).view(1, 3, 1, 1).expand(2, 3, 4, 4)
    normalization = Normalization(IMAGENET_MEAN, IMAGENET_STD)
    torch.testing.assert_close(normalization(images), torch.full((2, 3, 4, 4), 2.0))
    # Constants are not weights: checkpoints of plain networks fit.
    assert not normalization.state_dict()


def _spatial_layer(channels, stride):
    return nn.Conv2d(channels, channels, 3, stride=stride, padding=1, bias=False)


@pytest.mark.parametrize("inputs, stride", [(8, 1), (6, 1), (8, 2)])
def test_bottleneck_starts_as_its_shortcut(inputs, stride, seeded):
    network = ResidualNetwork(
        stem=nn.Conv2d(3, 4, 1), stem_outputs=4, widths=(2,) * 4, blocks=(1,) * 4, spatial_layer=_spatial_layer, num_classes=3
    )
    blocks = [module for module in network.modules() if isinstance(module, Bottleneck)]
    assert len(blocks) == 4
    for block in blocks:
        assert block.expand[1].weight.count_nonzero() == 0
    block = Bottleneck(inputs, 4, 8, stride, _spatial_layer).eval()
    nn.init.zeros_(block.expand[1].weight)
    features = torch.rand(2, inputs, 5, 5)
    assert isinstance(block.shortcut, nn.Identity) == (inputs == 8 and stride == 1)
    torch.testing.assert_close(block(features.clone()), block.shortcut(features).relu())
    # Away from the start the branch takes part.
    nn.init.ones_(block.expand[1].weight)
    assert not torch.allclose(block(features.clone()), block.shortcut(features).relu())


def test_network_normalises_images_itself(seeded):
    network = ResidualNetwork(
        stem=nn.Conv2d(3, 4, 1), stem_outputs=4, widths=(2,) * 4, blocks=(1,) * 4, spatial_layer=_spatial_layer, num_classes=3
    ).eval()
    images = torch.rand(2, 3, 16, 16)
    logits = network(images)
    normalised = network.normalization(images)
    network.normalization = nn.Identity()
    torch.testing.assert_close(network(normalised), logits)
    assert not torch.allclose(network(images), logits)


def test_strides_halve_from_the_second_stage_on(seeded):
    network = ResidualNetwork(
        stem=nn.Conv2d(3, 4, 1),
        stem_outputs=4,
        widths=(2,) * 4,
        blocks=(2, 1, 1, 1),
        spatial_layer=_spatial_layer,
        num_classes=3,
    ).eval()
    features, sizes = network.stem(torch.rand(1, 3, 33, 16)), []
    for stage in network.stages:
        features = stage(features)
        sizes.append(tuple(features.shape[1:]))
    assert sizes == [(256, 33, 16), (512, 17, 8), (1024, 9, 4), (2048, 5, 2)]
