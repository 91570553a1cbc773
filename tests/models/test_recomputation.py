import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lrrobust.models.folding import RecomputedStem, fold_constants
from lrrobust.models.lrnet import LocalRelationLayer, lr_resnet26
from lrrobust.models.recomputation import recompute_in_backward
from lrrobust.models.resnet import resnet26


class _Allocations(TorchDispatchMode):
    """The memory of all tensors that operations inside return, and how much of it is still there.

    That of `owned` tensors is left out: operations return views of weights.
    """

    def __init__(self, owned):
        super().__init__()
        self.owned = {tensor.untyped_storage()._cdata for tensor in owned}
        self.storages = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        for result in tree_leaves(results):
            if isinstance(result, torch.Tensor):
                storage = result.untyped_storage()
                self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return results

    def kept_bytes(self):
        there = (size for key, (storage, size) in self.storages.items() if key not in self.owned and not storage.expired())
        return sum(there)


def bytes_kept_for_backward(network, images):
    images = images.clone().requires_grad_()
    with _Allocations([*network.parameters(), *network.buffers()]) as allocations:
        output = network(images)
    kept = allocations.kept_bytes()
    assert output.requires_grad
    return kept


def test_a_stem_keeps_nothing_at_full_resolution_but_the_images(seeded):
    stem = fold_constants(lr_resnet26(5).eval()).stem
    assert isinstance(stem, RecomputedStem)
    half = 2 * 32 * 32
    # Rectified features, two numbers per window and group; the max pool's positions and its output.
    expected = 4 * half * (64 + 2 * 8) + 2 * 16 * 16 * 64 * (8 + 4)
    features = 4 * 2 * 64 * 64 * 64
    kept = bytes_kept_for_backward(stem, torch.rand(2, 3, 64, 64))
    assert expected <= kept < expected + 0.1 * features


def test_an_lr_net_keeps_little_more_than_its_control(seeded):
    images = torch.rand(2, 3, 64, 64)
    kept, control = (bytes_kept_for_backward(fold_constants(build(5).eval()), images) for build in (lr_resnet26, resnet26))
    assert kept < 1.4 * control


@pytest.mark.parametrize("stem", ["imagenet", "small"])
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_same_bits(seeded, stem, autocast):
    recomputed = fold_constants(lr_resnet26(5, stem).eval()).stem
    kept = torch.nn.Sequential(*recomputed)
    results = []
    for layers in (recomputed, kept):
        images = seeded_images(3, 33, 35)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            output = layers(images).float()
        # Outside of autocast, as attacks take it, and twice.
        loss = output.square().sum()
        (first,) = torch.autograd.grad(loss, images, retain_graph=True)
        (second,) = torch.autograd.grad(loss, images)
        assert torch.equal(first, second)
        assert first.abs().max() > 0
        results.append((output, first))
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(ours, expected)


def seeded_images(channels, height, width):
    return torch.rand(2, channels, height, width, generator=torch.Generator().manual_seed(1)).requires_grad_()


def test_second_derivatives(seeded):
    stem = fold_constants(lr_resnet26(5).eval()).stem.double()
    for module in stem.modules():
        if isinstance(module, LocalRelationLayer):
            module.backend = "reference"
    images = seeded_images(3, 5, 4).detach().double().requires_grad_()
    curvatures = []
    for layers in (stem, torch.nn.Sequential(*stem)):
        (gradient,) = torch.autograd.grad(layers(images).square().sum(), images, create_graph=True)
        curvatures.append(torch.autograd.grad(gradient.square().sum(), images)[0])
    assert curvatures[0].abs().max() > 0
    torch.testing.assert_close(*curvatures)


def test_computed_once_more_for_a_backward_pass_and_never_without():
    calls = []

    def first(images):
        calls.append(torch.is_grad_enabled())
        rectified = torch.relu(3 * images)
        return rectified, rectified[:, ::2]

    def then(rectified, halved):
        return rectified.square().sum() + halved.exp().sum()

    images = torch.linspace(-1, 1, 8).view(1, 8).requires_grad_()
    with torch.no_grad():
        recompute_in_backward(first, then, images)
    assert calls == [False]
    calls.clear()
    result = recompute_in_backward(first, then, images)
    (gradient,) = torch.autograd.grad(result, images)
    assert calls == [True, False]
    torch.testing.assert_close(gradient, torch.autograd.grad(then(*first(images)), images)[0])
