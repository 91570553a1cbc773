"""The tiled backend against the reference, above all where tiles meet; small maps are in test_local_relation.py."""

import sys
import warnings

import op_inputs
import pytest
import torch
from op_inputs import SIMILARITIES
from torch.utils._python_dispatch import TorchDispatchMode

from lrrobust.errors import BackendWarning
from lrrobust.ops import _unfold, local_relation
from lrrobust.ops.local_relation import choose_backend


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of about 3x3 and one or two images at a time, so that small maps have many."""
    monkeypatch.setattr(_unfold, "CPU_CUT", _unfold.Cut(0, (3, 3), 1, 1500))


def make_inputs(*sizes, **options):
    return [x.requires_grad_() for x in op_inputs.make_inputs(*sizes, **options)]


def run(inputs, backend, **options):
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = local_relation(*leaves, kernel_size=inputs[3].shape[-1], backend=backend, **options)
    # Numbers that every dtype here holds exactly.
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad_out)]


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize(
    "sizes, options",
    [
        ((3, 12, 7, 8, 5), {}),
        ((1, 16, 10, 4, 7), {}),
        ((2, 12, 9, 7, 3, 2), {"stride": 2}),
        ((2, 8, 8, 8, 7, 3), {"stride": 3}),
        ((2, 7, 9, 8, 3, 1, 3), {"dilation": 2, "channels_per_group": 3}),
        ((1, 8, 4, 7, 5, 2), {"stride": 2, "dilation": 3}),
    ],
)
def test_tiles_agree_with_the_reference(sizes, options, similarity, small_tiles):
    inputs = make_inputs(*sizes)
    expected = run(inputs, "reference", similarity=similarity, **options)
    torch.testing.assert_close(run(inputs, "unfold", similarity=similarity, **options), expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("stride", [1, 2])
def test_real_tiles_agree_with_the_reference(stride):
    inputs = make_inputs(2, 12, 17, 19, 7, stride)
    tiling = _unfold._Tiling(*inputs, _unfold.Options(stride, 1, "squared_difference", 8))
    assert min(tiling.counts) > 2
    expected = run(inputs, "reference", stride=stride)
    torch.testing.assert_close(run(inputs, "unfold", stride=stride), expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("side, stride", [(33, 1), (35, 2), (16, 1)])
def test_an_accelerators_tiles_agree_and_are_few_calls(side, stride, monkeypatch):
    inputs = make_inputs(2, 12, side, side, 7, stride)
    expected = run(inputs, "reference", stride=stride)
    calls = []
    for cut in (_unfold.CPU_CUT, _unfold.ACCELERATOR_CUT):
        monkeypatch.setattr(_unfold, "CPU_CUT", cut)
        with _Calls() as counted:
            torch.testing.assert_close(run(inputs, "unfold", stride=stride), expected, rtol=1e-10, atol=1e-11)
        calls.append(counted.number)
    assert calls[1] < calls[0] / 2
    assert _unfold._cut_for(torch.device("cuda")) is _unfold._cut_for(torch.device("mps")) is _unfold.ACCELERATOR_CUT


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_can_be_differentiated_twice(similarity, small_tiles):
    inputs = make_inputs(1, 3, 4, 3, 3, per_group=2)

    def op(*tensors):
        return local_relation(*tensors, kernel_size=3, similarity=similarity, channels_per_group=2, backend="unfold")

    assert torch.autograd.gradcheck(op, inputs)
    assert torch.autograd.gradgradcheck(op, inputs)


class _Calls(TorchDispatchMode):
    """Counts operations, each of which an accelerator waits for."""

    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.number += 1
        return function(*arguments, **(keywords or {}))


class _LargestResult(TorchDispatchMode):
    """Entries of the largest tensor that any operation makes; views make none."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not function.is_view:
            self.entries = max(self.entries, result.numel())
        return result


@pytest.mark.parametrize("batch", [2, 32])
def test_memory_is_bounded_whatever_the_batch(batch):
    inputs = make_inputs(batch, 64, 12, 12, 7, dtype=torch.float32)
    bound = max(inputs[2].numel(), _unfold.CPU_CUT.least_chunk)
    largest = {}
    for backend in ("unfold", "reference"):
        with _LargestResult() as seen:
            out = local_relation(*inputs, kernel_size=7, backend=backend)
            torch.autograd.grad(out.sum(), inputs)
        largest[backend] = seen.entries
    assert largest["unfold"] <= bound
    assert largest["reference"] == 49 * inputs[2].numel()
    # What is kept from forward to backward are the inputs themselves.
    kept = {x.data_ptr() for x in local_relation(*inputs, kernel_size=7, backend="unfold").grad_fn.saved_tensors}
    assert kept == {x.data_ptr() for x in inputs}


def test_geometry_gradient_is_left_out_when_not_needed(monkeypatch):
    asked = []
    original = _unfold._sum_by_tap
    monkeypatch.setattr(_unfold, "_sum_by_tap", lambda *arguments: asked.append(1) or original(*arguments))
    query, key, value, geometry = make_inputs(1, 8, 3, 3, 3)
    local_relation(query, key, value, geometry.detach(), kernel_size=3, backend="unfold").sum().backward()
    assert not asked
    local_relation(query, key, value, geometry, kernel_size=3, backend="unfold").sum().backward()
    assert asked


def test_half_precision_is_summed_in_float32_under_autocast_too():
    inputs = make_inputs(2, 12, 9, 10, 5, dtype=torch.bfloat16)
    exact = run([x.double() for x in inputs], "reference")
    outside = run(inputs, "unfold")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = run(inputs, "unfold")
        mixed = run([*inputs[:3], inputs[3].float()], "unfold")
    torch.testing.assert_close(inside, outside, rtol=0, atol=0)
    assert [x.dtype for x in mixed] == 4 * [torch.bfloat16] + [torch.float32]
    for found, expected in zip(outside, exact, strict=True):
        rounding = (expected.to(torch.bfloat16).double() - expected).abs().max()
        assert (found.double() - expected).abs().max() <= 2 * rounding + 1e-6


# torch's compiler makes an instance of the autograd function, which torch itself deprecates.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_to_one_graph():
    inputs = make_inputs(2, 12, 9, 10, 3)
    compiled = torch.compile(
        lambda *tensors: local_relation(*tensors, kernel_size=3, backend="unfold"), fullgraph=True, backend="aot_eager"
    )
    out = compiled(*inputs)
    expected = local_relation(*inputs, kernel_size=3, backend="reference")
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-11)
    gradients = torch.autograd.grad(out.square().sum(), inputs)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected.square().sum(), inputs), rtol=1e-10, atol=1e-10)


def test_runs_on_any_device():
    inputs = [x.detach().to("meta").requires_grad_() for x in make_inputs(2, 12, 9, 10, 3, 2)]
    out = local_relation(*inputs, kernel_size=3, stride=2, backend="unfold")
    assert out.shape == (2, 12, 5, 5)
    assert [x.shape for x in torch.autograd.grad(out.sum(), inputs)] == [x.shape for x in inputs]


def test_auto_says_once_that_it_is_slower(monkeypatch):
    monkeypatch.setattr(sys.modules[local_relation.__module__], "_warned", set())
    inputs = make_inputs(1, 8, 3, 3, 3)
    with pytest.warns(BackendWarning, match="slower backend 'unfold': 'cpu' cannot run, .* got torch.float64") as caught:
        local_relation(*inputs, kernel_size=3)
    # The line to look at is the caller's.
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        local_relation(*inputs, kernel_size=3)
    with pytest.warns(BackendWarning, match="got torch.float8_e5m2"):
        choose_backend("auto", *(x.to(torch.float8_e5m2) for x in inputs))
