import pytest
import torch
from torch import nn

from lrrobust.models import lrnet
from lrrobust.models.lrnet import GeometryPrior, LocalRelationLayer, lr_resnet26, lr_resnet50, lr_resnet101


@pytest.mark.parametrize(
    "build, millions, giga_multiply_adds",
    # Recomputed from the paper's description; table 3 of the paper has 14.7 and 23.3 M.
    [(lr_resnet26, 14.6, 2.38), (lr_resnet50, 23.35, 4.03), (lr_resnet101, 40.7, 7.50)],
)
def test_size_of_the_published_networks(build, millions, giga_multiply_adds, monkeypatch):
    with torch.device("meta"):
        network = build(1000).eval()
        images = torch.zeros(1, 3, 224, 224)
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)
    # Autocast, which the prior switches off, knows no meta device.
    monkeypatch.setattr(GeometryPrior, "forward", lambda prior: torch.zeros(prior.output.out_features, 7, 7, device="meta"))
    total = 0

    def count(module, inputs, output):
        nonlocal total
        if isinstance(module, nn.Conv2d):
            total += module.weight.numel() * output.shape[2] * output.shape[3]
        elif isinstance(module, nn.Linear):
            total += module.weight.numel()
        elif isinstance(module, LocalRelationLayer):
            positions = output.shape[2] * output.shape[3]
            total += positions * module.kernel_size**2 * (output.shape[1] + module.groups)
            # The query is needed at the output positions only; where it is made together with the key, one
            # product does more than the definition asks for.
            total -= output.shape[1] * module.groups * (inputs[0].shape[2] * inputs[0].shape[3] - positions)

    for module in network.modules():
        module.register_forward_hook(count)
    network(images)
    assert total / 1e9 == pytest.approx(giga_multiply_adds, rel=0.01)


def _shake(network):
    """Norms away from the start, where every residual branch is switched off."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var):
                tensor.uniform_(0.5, 1.5)
            for tensor in (module.bias.data, module.running_mean):
                tensor.normal_(std=0.2)


@pytest.mark.parametrize("size", [(32, 32), (64, 64), (33, 47)])
def test_network_agrees_with_its_reference_in_double_precision(size, seeded, monkeypatch):
    network = lr_resnet26(5).eval()
    _shake(network)
    images = torch.rand(2, 3, *size)
    used = []
    op = lrnet.local_relation

    def spy(*tensors, **options):
        used.append(tensors[0].dtype)
        return op(*tensors, **{**options, "backend": "cpu" if tensors[0].dtype == torch.float32 else "reference"})

    monkeypatch.setattr(lrnet, "local_relation", spy)
    with torch.inference_mode():
        logits = network(images)
        expected = network.double()(images.double())
    # The stem and one layer in each of eight blocks.
    assert used == [torch.float32] * 9 + [torch.float64] * 9
    assert logits.shape == (2, 5)
    torch.testing.assert_close(logits.double(), expected, rtol=0, atol=1e-4 * expected.abs().max().item())


@pytest.mark.filterwarnings("ignore::lrrobust.errors.BackendWarning")
def test_input_gradient_agrees_with_the_reference_in_double_precision(seeded):
    network = lr_resnet26(5).eval()
    _shake(network)
    images = torch.rand(1, 3, 32, 32)
    exact = images.double().requires_grad_()
    images.requires_grad_()
    nn.functional.cross_entropy(network(images), torch.tensor([2])).backward()
    nn.functional.cross_entropy(network.double()(exact), torch.tensor([2])).backward()
    torch.testing.assert_close(images.grad.double(), exact.grad, rtol=0, atol=1e-3 * exact.grad.abs().max().item())


def test_prior_is_a_network_on_offsets(seeded):
    prior = GeometryPrior(groups=3, kernel_size=5)
    table = prior()
    assert table.shape == (3, 5, 5)
    for i, j in ((0, 0), (1, 4), (2, 2), (4, 1)):
        offset = torch.tensor([(i - 2) / 2, (j - 2) / 2])
        torch.testing.assert_close(table[:, i, j], prior.output(prior.hidden(offset).relu()))
    assert not prior.state_dict().keys() & {"offsets"}


def test_prior_of_a_window_of_one_is_finite():
    assert GeometryPrior(groups=2, kernel_size=1)().isfinite().all()


def test_prior_stays_float32_under_autocast(seeded):
    prior = GeometryPrior(groups=3, kernel_size=5)
    expected = prior()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(prior(), expected, rtol=0, atol=0)


@torch.no_grad()
def test_large_prior_at_one_offset_moves_the_image_by_it(seeded):
    layer = LocalRelationLayer(8, kernel_size=7).eval()
    # g = 60 * (relu(dy) + relu(-dx)): largest by 20 at the offset of three rows down, three columns left.
    for parameter in layer.geometry.parameters():
        parameter.zero_()
    layer.geometry.hidden.weight[0, 0] = 1.0
    layer.geometry.hidden.weight[1, 1] = -1.0
    layer.geometry.output.weight[:, :2] = 60.0
    layer.query_key[0].weight.zero_()
    layer.output.weight.copy_(torch.eye(8)[:, :, None, None])
    features = torch.rand(2, 8, 10, 9)
    torch.testing.assert_close(layer(features)[:, :, :-3, 3:], features[:, :, 3:, :-3], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("channels, groups", [(100, 13), (64, 8), (12, 2)])
@pytest.mark.parametrize("stride", [1, 2])
def test_layer_shapes_and_groups(channels, groups, stride, seeded):
    layer = LocalRelationLayer(channels, stride)
    assert layer.groups == groups
    assert layer(torch.rand(2, channels, 7, 4)).shape == (2, channels, -(-7 // stride), 4 // stride)


def test_every_parameter_of_a_layer_is_trained(seeded):
    layer = LocalRelationLayer(12, stride=2, kernel_size=3, similarity="multiplication")
    layer(torch.rand(2, 12, 6, 6)).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None and parameter.grad.count_nonzero() > 0, name


@pytest.mark.parametrize("size", [(8, 6), (7, 5)])
def test_stride_skips_positions_and_changes_nothing_else(size, seeded):
    dense, strided = LocalRelationLayer(12).eval(), LocalRelationLayer(12, stride=2).eval()
    strided.load_state_dict(dense.state_dict())
    features = torch.randn(2, 12, *size)
    with torch.inference_mode():
        torch.testing.assert_close(strided(features), dense(features)[:, :, ::2, ::2])
