"""Both families with either stem."""

import pytest
import torch

from lrrobust.errors import UnknownNameError
from lrrobust.models import build_network, load_classifier
from lrrobust.models.residual import STEMS
from lrrobust.models.weights import WeightsMetadata, quantise, read_metadata, save_weights


def parameters_of(network):
    return {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}


def stage_sizes(network, size):
    """Sides of the maps that the stem and the four stages give."""
    sizes = []
    for module in (network.stem, *network.stages):
        module.register_forward_hook(lambda module, inputs, output: sizes.append(tuple(output.shape[2:])))
    with torch.inference_mode():
        network.eval()(torch.zeros(1, 3, size, size))
    assert all(height == width for height, width in sizes)
    return [height for height, _ in sizes]


@pytest.mark.parametrize("name", ["lr_resnet26", "resnet26"])
@pytest.mark.parametrize("stem, expected", [("imagenet", [16, 16, 8, 4, 2]), ("small", [32, 32, 16, 8, 4])])
def test_resolution_of_the_stages(name, stem, expected):
    assert stage_sizes(build_network(name, 5, stem), 64) == expected


@pytest.mark.parametrize("name, fewer", [("lr_resnet26", 0), ("resnet26", 7680)])
def test_parameters_that_the_small_stem_changes(name, fewer):
    with torch.device("meta"):
        published, small = (build_network(name, 10, stem) for stem in STEMS)
    before, after = parameters_of(published), parameters_of(small)
    assert before.keys() == after.keys()
    changed = {key for key in before if before[key] != after[key]}
    assert changed == ({"stem.0.weight"} if fewer else set())
    assert sum(p.numel() for p in published.parameters()) - sum(p.numel() for p in small.parameters()) == fewer


@pytest.mark.parametrize("name", ["lr_resnet26", "resnet26"])
def test_descriptions_tell_stems_apart(name):
    published, small = (repr(build_network(name, 5, stem)) for stem in STEMS)
    assert published != small
    assert "kernel_size=3" in small if name == "lr_resnet26" else "kernel_size=(7, 7)" not in small


@pytest.mark.parametrize("name", ["lr_resnet26", "resnet26"])
def test_weights_bring_their_stem_along(name, tmp_path, seeded):
    network = build_network(name, 3, "small").eval()
    metadata = WeightsMetadata(
        name="SMALL",
        model=name,
        stem="small",
        description="",
        classes=("a", "b", "c"),
        input_size=32,
        resize_size=32,
        interpolation="bilinear",
        recipe={},
        training={},
        accuracy=(),
    )
    path = tmp_path / "small.safetensors"
    save_weights(path, quantise(network.state_dict()), metadata)
    assert read_metadata(path).stem == "small"
    module = load_classifier(name, weights=str(path), imagenet_classes=()).module.eval()
    assert stage_sizes(module, 32)[0] == 16
    images = torch.rand(2, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(module(images), network(images), rtol=0.05, atol=0.05)


def test_unknown_stem():
    with pytest.raises(UnknownNameError, match="unknown stem 'smal': did you mean small"):
        build_network("resnet26", 5, "smal")
