"""The op against a loop over plain Python numbers, which shares no code and no idea with any backend."""

import itertools
import math
import multiprocessing
import os
import sys
import threading
from typing import NamedTuple

import numpy as np
import op_inputs
import pytest
import torch
from op_inputs import SIMILARITIES
from torch.utils.data import DataLoader, Dataset

import lrrobust.ops
from lrrobust.errors import BackendError, BackendWarning
from lrrobust.ops import local_relation
from lrrobust.ops.local_relation import choose_backend, choose_channels_per_group, why_not

NAMES = ("query", "key", "value", "geometry")
#: What each backend computes in, and so what it is compared in.
BACKENDS = {"reference": torch.float64, "unfold": torch.float64, "cpu": torch.float32}


class Case(NamedTuple):
    batch: int = 1
    channels: int = 8
    height: int = 5
    width: int = 5
    kernel_size: int = 7
    stride: int = 1
    dilation: int = 1
    per_group: int = 8

    def options(self) -> dict[str, int]:
        return {
            "kernel_size": self.kernel_size,
            "stride": self.stride,
            "dilation": self.dilation,
            "channels_per_group": self.per_group,
        }


SMALL = Case(height=3, width=3, kernel_size=3)
#: 60 pairs of image and group: several blocks whatever the number of lanes.
MANY = Case(batch=3, channels=20, height=3, width=4, kernel_size=3, per_group=1)
CASES = {
    "plain": Case(),
    "batch of 3, two groups": Case(batch=3, channels=16, height=4, width=4, kernel_size=3),
    "non-square": Case(channels=12, height=4, width=7, kernel_size=5),
    "odd map, stride 2": Case(channels=20, height=7, width=5, kernel_size=3, stride=2),
    "even map, stride 2": Case(height=6, width=8, kernel_size=7, stride=2),
    "stride 3": Case(batch=2, height=8, width=7, kernel_size=5, stride=3),
    "dilation 2": Case(height=7, width=6, kernel_size=3, dilation=2),
    "dilation 2, stride 2": Case(batch=3, height=7, width=9, kernel_size=5, stride=2, dilation=2),
    "dilation beyond the map": Case(height=3, width=3, kernel_size=5, dilation=3),
    "map of 2x2": Case(channels=12, height=2, width=2),
    "map of 1x1": Case(batch=3, height=1, width=1),
    "map of 3x5": Case(height=3, width=5),
    "map of 1x6, stride 2": Case(height=1, width=6, kernel_size=5, stride=2),
    "window of one": Case(channels=12, height=3, width=4, kernel_size=1),
    "window of one, stride 2": Case(channels=12, height=3, width=4, kernel_size=1, stride=2),
    "100 channels": Case(channels=100, height=2, width=3, kernel_size=3),
    "own group each": Case(batch=2, channels=5, height=3, width=4, kernel_size=3, per_group=1),
    "groups of 3, the last of 1": Case(channels=7, height=4, width=3, kernel_size=3, per_group=3),
    "groups of 16": Case(batch=2, channels=40, height=3, width=3, kernel_size=3, per_group=16),
    # Slabs of 8, 4 and no channels in the second group.
    "groups of 24, the last of 12": Case(channels=36, height=2, width=3, kernel_size=3, per_group=24),
    "one group of 20": Case(channels=20, height=3, width=4, kernel_size=5, stride=2, per_group=20),
    # More (image, group) pairs than any vector has lanes, and not a multiple of them.
    "37 groups": Case(channels=37, height=2, width=2, kernel_size=3, per_group=1),
}


def make_inputs(case: Case, dtype=torch.float64, seed: int = 0) -> list[torch.Tensor]:
    sizes = (case.batch, case.channels, case.height, case.width, case.kernel_size, case.stride, case.per_group)
    return op_inputs.make_inputs(*sizes, dtype=dtype, seed=seed)


def phi(q: float, k: float, similarity: str) -> tuple[float, float, float]:
    """Appearance composability and its derivatives by query and key."""
    if similarity == "squared_difference":
        return -((q - k) ** 2), -2 * (q - k), 2 * (q - k)
    if similarity == "absolute_difference":
        sign = (q > k) - (q < k)
        return -abs(q - k), -sign, sign
    return q * k, k, q


class Oracle:
    """The formula of the paper, position by position and neighbour by neighbour, in double precision."""

    def __init__(self, inputs, case: Case, similarity: str) -> None:
        self.case, self.similarity = case, similarity
        self.query, self.key, self.value, self.geometry = (np.asarray(x.detach().double()) for x in inputs)

    def _positions(self):
        return itertools.product(*map(range, self.query.shape))

    def _window(self, n, g, oy, ox):
        """(i, j, y, x, weight, d score / d query, d score / d key) of the neighbours inside the image."""
        case, radius = self.case, self.case.kernel_size // 2
        found = []
        for i, j in itertools.product(range(case.kernel_size), repeat=2):
            y = oy * case.stride + (i - radius) * case.dilation
            x = ox * case.stride + (j - radius) * case.dilation
            if 0 <= y < case.height and 0 <= x < case.width:
                score, by_query, by_key = phi(float(self.query[n, g, oy, ox]), float(self.key[n, g, y, x]), self.similarity)
                found.append((i, j, y, x, score + float(self.geometry[g, i, j]), by_query, by_key))
        largest = max(tap[4] for tap in found)
        total = math.fsum(math.exp(tap[4] - largest) for tap in found)
        return [(*tap[:4], math.exp(tap[4] - largest) / total, *tap[5:]) for tap in found]

    def _channels(self, g):
        return range(g * self.case.per_group, min(self.case.channels, (g + 1) * self.case.per_group))

    def forward(self) -> torch.Tensor:
        out = np.zeros((self.query.shape[0], self.case.channels, *self.query.shape[2:]))
        for n, g, oy, ox in self._positions():
            for _, _, y, x, weight, _, _ in self._window(n, g, oy, ox):
                for c in self._channels(g):
                    out[n, c, oy, ox] += weight * self.value[n, c, y, x]
        return torch.from_numpy(out)

    def gradients(self, grad_out: torch.Tensor) -> list[torch.Tensor]:
        """Of sum(grad_out * out), by the chain rule on paper; `test_oracle_differentiates_itself` checks it."""
        grad = np.asarray(grad_out.double())
        by_query, by_key, by_value, by_geometry = map(np.zeros_like, (self.query, self.key, self.value, self.geometry))
        for n, g, oy, ox in self._positions():
            window = self._window(n, g, oy, ox)
            channels = self._channels(g)
            by_weight = [sum(grad[n, c, oy, ox] * self.value[n, c, tap[2], tap[3]] for c in channels) for tap in window]
            mean = sum(tap[4] * slope for tap, slope in zip(window, by_weight, strict=True))
            for (i, j, y, x, weight, score_by_query, score_by_key), slope in zip(window, by_weight, strict=True):
                by_score = weight * (slope - mean)
                by_geometry[g, i, j] += by_score
                by_query[n, g, oy, ox] += by_score * score_by_query
                by_key[n, g, y, x] += by_score * score_by_key
                for c in channels:
                    by_value[n, c, y, x] += weight * grad[n, c, oy, ox]
        return [torch.from_numpy(array) for array in (by_query, by_key, by_value, by_geometry)]


def output_gradient(out: torch.Tensor, dtype=None, seed: int = 1) -> torch.Tensor:
    """Random numbers that `dtype`, or else the dtype of `out`, holds exactly."""
    numbers = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return numbers.to(dtype if dtype is not None else out.dtype)


def run(inputs, case: Case, similarity: str = "squared_difference", backend: str = "cpu", grad_dtype=None):
    """Output and all four gradients for the output gradient of `output_gradient`."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = local_relation(*leaves, **case.options(), similarity=similarity, backend=backend)
    out.backward(output_gradient(out, grad_dtype).to(out.dtype))
    return out.detach(), [leaf.grad for leaf in leaves]


def assert_agrees(actual: torch.Tensor, expected: torch.Tensor, what: str, relative: float = 1e-5) -> None:
    """Every entry within `relative` of the largest: single entries can be sums that cancel."""
    tolerance = relative * max(expected.abs().max().item(), 1e-6)
    torch.testing.assert_close(
        actual.double(), expected, rtol=0, atol=tolerance, equal_nan=False, msg=lambda text: f"{what}: {text}"
    )


# --- values ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_oracle_differentiates_itself(similarity):
    case = Case(batch=2, channels=7, height=4, width=3, kernel_size=3, stride=2, per_group=3)
    inputs = make_inputs(case)
    oracle = Oracle(inputs, case, similarity)
    grad_out = output_gradient(oracle.forward())
    gradients = oracle.gradients(grad_out)
    step = 1e-5
    for position, gradient in enumerate(gradients):
        direction = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        ends = []
        for sign in (1, -1):
            moved = list(inputs)
            moved[position] = inputs[position] + sign * step * direction
            ends.append((Oracle(moved, case, similarity).forward() * grad_out).sum())
        torch.testing.assert_close((gradient * direction).sum(), (ends[0] - ends[1]) / (2 * step), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_backends_agree_with_the_loop(case, similarity):
    # Numbers that float32 holds exactly: one oracle for all backends.
    inputs = make_inputs(case, torch.float32)
    oracle = Oracle(inputs, case, similarity)
    expected = oracle.forward()
    gradients = oracle.gradients(output_gradient(expected, torch.float32))
    for backend, dtype in BACKENDS.items():
        out, found = run([x.to(dtype) for x in inputs], case, similarity, backend, grad_dtype=torch.float32)
        assert out.dtype == dtype
        assert_agrees(out, expected, f"{backend} output")
        for name, actual, gradient in zip(NAMES, found, gradients, strict=True):
            assert actual.dtype == dtype
            assert_agrees(actual, gradient, f"{backend} gradient of {name}")


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_reference_passes_gradcheck(similarity):
    case = Case(batch=2, channels=5, height=4, width=3, kernel_size=3, stride=2, per_group=3)
    inputs = [x.requires_grad_() for x in make_inputs(case)]

    def op(*tensors):
        return local_relation(*tensors, **case.options(), similarity=similarity, backend="reference")

    assert torch.autograd.gradcheck(op, inputs)


def test_reference_passes_gradgradcheck():
    case = Case(channels=3, height=2, width=3, kernel_size=3, per_group=2)
    inputs = [x.requires_grad_() for x in make_inputs(case)]

    def op(*tensors):
        return local_relation(*tensors, **case.options(), backend="reference")

    assert torch.autograd.gradgradcheck(op, inputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_neighbours_outside_take_no_weight(backend):
    case = Case(batch=2, channels=12, height=4, width=5, kernel_size=7)
    query, key, value, geometry = make_inputs(case, BACKENDS[backend])
    value = torch.full_like(value, 3.0)
    out = local_relation(query, key, value, geometry, **case.options(), backend=backend)
    torch.testing.assert_close(out, value, rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_geometry_entry_belongs_to_its_offset(backend):
    # A prior far above all others at offset (dy, dx) = (-1, +2) moves the image by that offset.
    case = Case(height=6, width=7, kernel_size=5)
    query, key, value, geometry = make_inputs(case, BACKENDS[backend])
    geometry = torch.zeros_like(geometry)
    geometry[:, 2 - 1, 2 + 2] = 60.0
    out = local_relation(query, key, value, geometry, **case.options(), backend=backend)
    torch.testing.assert_close(out[:, :, 1:, :-2], value[:, :, :-1, 2:], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("channels, groups, per_group", [(16, 2, 8), (100, 13, 8), (10, 4, 3), (40, 3, 16)])
def test_default_grouping_is_that_of_the_paper_where_it_fits(channels, groups, per_group):
    assert choose_channels_per_group(channels, groups, None) == (8 if -(-channels // 8) == groups else -(-channels // groups))
    case = Case(
        channels=channels, height=3, width=3, kernel_size=3, per_group=choose_channels_per_group(channels, groups, None)
    )
    inputs = make_inputs(case, torch.float32)
    torch.testing.assert_close(
        local_relation(*inputs, kernel_size=3), local_relation(*inputs, **case.options()), rtol=0, atol=0
    )
    assert choose_channels_per_group(channels, groups, per_group) == per_group


# --- hard numbers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("poisoned", NAMES)
def test_nan_arrives(poisoned, backend):
    case = Case(height=4, width=4, kernel_size=3)
    inputs = make_inputs(case, BACKENDS[backend])
    inputs[NAMES.index(poisoned)].view(-1)[4 if poisoned == "geometry" else 5] = math.nan
    is_nan = local_relation(*inputs, **case.options(), backend=backend).isnan()
    if backend == "unfold" and poisoned in ("key", "value"):  # its matrix product multiplies NaN by zero weights
        assert is_nan[0, 0, :3, :3].all()
        assert poisoned == "key" or not is_nan[0, 1:].any()
    elif poisoned == "geometry":  # of the centre, which every window has
        assert is_nan.all()
    elif poisoned == "query":
        assert is_nan[0, :, 1, 1].all() and is_nan.sum() == 8
    else:  # seen by the nine windows around (1, 1)
        channels = 1 if poisoned == "value" else 8
        assert is_nan[0, :channels, :3, :3].all()
        # The fused loop weighs the windows of two neighbours together: zero times NaN reaches one column more.
        columns = 4 if backend == "cpu" and poisoned == "value" else 3
        assert is_nan.sum() == is_nan[0, :channels, :3, :columns].sum() == 3 * columns * channels


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_nan_arrives_in_gradients(similarity, backend):
    case = Case(height=2, width=2, kernel_size=3)
    inputs = make_inputs(case, BACKENDS[backend])
    inputs[0][0, 0, 0, 0] = math.nan
    _, gradients = run(inputs, case, similarity, backend)
    assert all(gradient.isnan().any() for gradient in gradients)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_large_differences_stay_finite_and_right(similarity, backend):
    # Whole numbers, exact in float32, whose scores are far apart: one neighbour takes all the weight.
    case = Case(height=4, width=4, kernel_size=7)
    query, key, value, geometry = make_inputs(case, BACKENDS[backend])
    query = torch.full_like(query, 1e4)
    key = -100.0 * torch.randperm(16, generator=torch.Generator().manual_seed(3)).view(1, 1, 4, 4).to(key.dtype)
    inputs = [query, key, value, torch.zeros_like(geometry)]
    out, gradients = run(inputs, case, similarity, backend)
    winner = value.flatten(2)[:, :, key.flatten().argmax()]
    torch.testing.assert_close(out, winner[:, :, None, None].expand_as(out), rtol=1e-6, atol=1e-6)
    oracle = Oracle(inputs, case, similarity)
    for name, gradient, expected in zip(NAMES, gradients, oracle.gradients(output_gradient(out)), strict=True):
        assert gradient.isfinite().all(), name
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_half_precision_costs_the_rounding_of_inputs_and_outputs_only(similarity, dtype):
    case = Case(batch=2, channels=12, height=5, width=4, kernel_size=5, stride=2)
    exact = make_inputs(case)
    rounded = [x.to(dtype) for x in exact]
    truth, least = Oracle(exact, case, similarity), Oracle(rounded, case, similarity)
    out, gradients = run(rounded, case, similarity)
    expected = truth.forward()
    assert out.dtype == dtype
    unavoidable = (least.forward().to(dtype).double() - expected).abs().max()
    assert (out.double() - expected).abs().max() <= 2 * unavoidable
    grad_out = output_gradient(out)
    for name, gradient, expected, best in zip(
        NAMES, gradients, truth.gradients(grad_out), least.gradients(grad_out), strict=True
    ):
        assert gradient.dtype == dtype
        unavoidable = (best.to(dtype).double() - expected).abs().max()
        assert (gradient.double() - expected).abs().max() <= 2 * unavoidable, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_result_has_the_dtype_of_value(backend):
    # As under autocast, where the prior stays float32 and the features do not.
    query, key, value, geometry = make_inputs(SMALL, torch.float32)
    mixed = [query.bfloat16(), key, value.bfloat16(), geometry]
    leaves = [x.requires_grad_() for x in mixed]
    out = local_relation(*leaves, **SMALL.options(), backend=backend)
    assert out.dtype == torch.bfloat16
    assert (
        local_relation(query, key.bfloat16(), value, geometry.bfloat16(), **SMALL.options(), backend=backend).dtype
        == torch.float32
    )
    out.sum().backward()
    assert [leaf.grad.dtype for leaf in leaves] == [leaf.dtype for leaf in leaves]


# --- memory layouts ----------------------------------------------------------------------------------


def _channels_last(x):
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


def _slice_of_larger(x):
    larger = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 1), math.nan, dtype=x.dtype)
    larger[..., 1::2] = x
    assert not larger[..., 1::2].is_contiguous()
    return larger[..., 1::2]


@pytest.mark.parametrize("layout", [_channels_last, _slice_of_larger])
@pytest.mark.parametrize(
    "case",
    # A row of one channel is one stride from end to end, and still not without gaps.
    [
        Case(batch=2, channels=12, height=5, width=4, kernel_size=3, stride=2),
        Case(channels=1, height=1, width=6, kernel_size=3),
    ],
    ids=["map", "row"],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_layout_of_inputs_plays_no_part(layout, case, backend):
    inputs = make_inputs(case, BACKENDS[backend])
    expected, expected_gradients = run(inputs, case, backend=backend)
    leaves = [layout(x).requires_grad_() for x in inputs]
    out = local_relation(*leaves, **case.options(), backend=backend)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
    gradients = torch.autograd.grad(out, leaves, layout(output_gradient(out)))
    torch.testing.assert_close(gradients, tuple(expected_gradients), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_expanded_inputs_and_output_gradients(backend):
    case = Case(batch=3, channels=8, height=4, width=4, kernel_size=3)
    query, key, value, geometry = (x[:1] for x in make_inputs(case, BACKENDS[backend]))
    expanded = [query.expand(3, -1, -1, -1), key.expand(3, -1, -1, -1), value.expand(3, -1, -1, -1), geometry]
    copies = [x.contiguous().requires_grad_() for x in expanded]
    expected = local_relation(*copies, **case.options(), backend=backend)
    expected.backward(torch.ones_like(expected))
    leaves = [x.detach().requires_grad_() for x in expanded]
    out = local_relation(*leaves, **case.options(), backend=backend)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    # The gradient of a sum is one number seen through strides of zero.
    gradients = torch.autograd.grad(out.sum(), leaves)
    torch.testing.assert_close(gradients, tuple(x.grad for x in copies), rtol=1e-6, atol=1e-6)


# --- autograd ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_gradient_asked_for(backend):
    out = local_relation(*make_inputs(SMALL, BACKENDS[backend]), **SMALL.options(), backend=backend)
    assert not out.requires_grad and out.grad_fn is None


@pytest.mark.parametrize("wanted", [{"value"}, {"query", "key"}, {"geometry"}, {"query", "key", "value"}])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_only_where_asked_for(wanted, backend):
    case = Case(batch=2, channels=12, height=4, width=3, kernel_size=3)
    inputs = make_inputs(case, BACKENDS[backend])
    _, expected = run(inputs, case, backend=backend)
    leaves = [x.requires_grad_(name in wanted) for name, x in zip(NAMES, inputs, strict=True)]
    out = local_relation(*leaves, **case.options(), backend=backend)
    out.backward(output_gradient(out))
    for name, leaf, gradient in zip(NAMES, leaves, expected, strict=True):
        if name in wanted:
            torch.testing.assert_close(leaf.grad, gradient, rtol=0, atol=0)
        else:
            assert leaf.grad is None


def test_geometry_gradient_is_left_out_when_not_needed(monkeypatch):
    # Attacks differentiate by the image only, thousands of times.
    from lrrobust.ops import _cpu

    asked = []
    compiled = _cpu._backward_range

    def spy(*arguments):
        asked.append(arguments[-1])
        return compiled(*arguments)

    monkeypatch.setattr(_cpu, "_backward_range", spy)
    query, key, value, geometry = make_inputs(SMALL, torch.float32)
    local_relation(query, key, value.requires_grad_(), geometry, **SMALL.options(), backend="cpu").sum().backward()
    local_relation(query, key, value, geometry.requires_grad_(), **SMALL.options(), backend="cpu").sum().backward()
    assert asked == [False, True]


def test_cpu_backend_refuses_to_be_differentiated_twice():
    leaves = [x.requires_grad_() for x in make_inputs(SMALL, torch.float32)]
    out = local_relation(*leaves, **SMALL.options(), backend="cpu")
    (gradient,) = torch.autograd.grad(out.square().sum(), leaves[0], create_graph=True)
    with pytest.raises(BackendError, match="differentiated once: give .*backend='unfold'"):
        gradient.sum().backward()


# Of torch 2.14 about itself.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_cpu_operations_are_registered_as_torch_wants():
    case = Case(height=3, width=3, kernel_size=3, stride=2)
    inputs = [x.requires_grad_() for x in make_inputs(case, torch.float32)]
    options = (2, 1, "squared_difference", 8)
    torch.library.opcheck(torch.ops.lrrobust.local_relation_cpu.default, (*inputs, *options))
    detached = [x.detach() for x in inputs]
    out, *saved = torch.ops.lrrobust.local_relation_cpu(*detached, *options)
    for needs_geometry in (False, True):
        arguments = (*detached, *saved, torch.ones_like(out), *options, needs_geometry)
        torch.library.opcheck(torch.ops.lrrobust.local_relation_cpu_backward.default, arguments)


def test_cpu_backend_compiles_to_one_graph():
    case = Case(height=4, width=5, kernel_size=3)
    inputs = [x.requires_grad_() for x in make_inputs(case, torch.float32)]

    def op(*tensors):
        return local_relation(*(2 * x for x in tensors), **case.options(), backend="cpu")

    out = torch.compile(op, fullgraph=True, backend="aot_eager")(*inputs)
    expected = op(*inputs)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    gradients = torch.autograd.grad(out.square().sum(), inputs)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected.square().sum(), inputs), rtol=0, atol=0)


def test_first_call_says_that_it_compiles(capsys):
    from lrrobust.ops import _cpu

    # As numba tells of it: nothing that is found on disk, and helpers of ours besides what is called.
    for dispatcher in (_cpu._score, _cpu._forward_range, _cpu._backward_range):
        with _cpu.event.trigger_event("numba:compile", data={"dispatcher": dispatcher}):
            pass
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all(
        line.startswith(f"lrrobust: compiling the local relation's {p} pass") for line, p in zip(lines, ("forward", "backward"))
    )


# --- threads and processes ---------------------------------------------------------------------------


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_number_of_threads_changes_nothing(threads):
    inputs = make_inputs(MANY, torch.float32)
    threads(1)
    one, one_gradients = run(inputs, MANY)
    for count in (2, 3, 64):
        threads(count)
        out, gradients = run(inputs, MANY)
        torch.testing.assert_close(out, one, rtol=0, atol=0)
        torch.testing.assert_close(gradients[:3], one_gradients[:3], rtol=0, atol=0)
        # Its sum over images is grouped by thread.
        torch.testing.assert_close(gradients[3], one_gradients[3], rtol=1e-5, atol=1e-5)


def test_calls_from_several_python_threads_at_once(threads):
    threads(2)
    case = Case(batch=3, channels=20, height=5, width=4, kernel_size=3, per_group=1)
    problems = [make_inputs(case, torch.float32, seed) for seed in range(4)]
    expected = [run(inputs, case) for inputs in problems]
    found = [[] for _ in problems]
    start = threading.Barrier(len(problems))

    def work(position):
        start.wait()
        for _ in range(5):
            found[position].append(run(problems[position], case))

    workers = [threading.Thread(target=work, args=(position,)) for position in range(len(problems))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for results, (out, gradients) in zip(found, expected, strict=True):
        assert len(results) == 5
        for result, result_gradients in results:
            torch.testing.assert_close(result, out, rtol=0, atol=0)
            torch.testing.assert_close(result_gradients, gradients, rtol=0, atol=0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_works_in_a_forked_child(threads):
    threads(2)
    inputs = make_inputs(MANY, torch.float32)
    expected, _ = run(inputs, MANY)  # the parent's threads run now; the child does not inherit them

    def child():
        out, _ = run(inputs, MANY)
        os._exit(0 if torch.equal(out, expected) else 1)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(timeout=60)
    if process.is_alive():
        process.kill()
    assert process.exitcode == 0


class _Relations(Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        return local_relation(*make_inputs(MANY, torch.float32, index), **MANY.options(), backend="cpu")


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_works_in_a_data_loader_worker(threads):
    threads(2)
    images = _Relations()
    expected = [images[0], images[1]]
    context = "fork" if hasattr(os, "fork") else None
    loader = DataLoader(images, batch_size=None, num_workers=1, multiprocessing_context=context, timeout=60)
    torch.testing.assert_close(list(loader), expected, rtol=0, atol=0)


# --- arguments ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend):
    case = Case(batch=0, channels=12, height=4, width=5, kernel_size=3, stride=2)
    out, gradients = run(make_inputs(case, BACKENDS[backend]), case, backend=backend)
    assert out.shape == (0, 12, 2, 3)
    assert [gradient.shape for gradient in gradients] == [x.shape for x in make_inputs(case)]
    assert gradients[3].count_nonzero() == 0


@pytest.mark.parametrize(
    "change, message",
    [
        ({"similarity": "cosine"}, "similarity must be one of squared_difference, .*, got 'cosine'"),
        ({"kernel_size": 4}, "kernel_size must be odd and positive, got 4"),
        ({"kernel_size": -1}, "kernel_size must be odd and positive, got -1"),
        ({"kernel_size": 0}, "kernel_size must be odd and positive, got 0"),
        ({"stride": 0}, "at least 1, got stride=0, dilation=1"),
        ({"dilation": -1}, "at least 1, got stride=1, dilation=-1"),
        ({"query": torch.zeros(2, 4, 5)}, r"query must have 4 dimensions, got shape \(2, 4, 5\)"),
        ({"key": torch.zeros(2, 4, 5)}, r"key must have 4 dimensions, got shape \(2, 4, 5\)"),
        ({"value": torch.zeros(5)}, r"value must have 4 dimensions, got shape \(5,\)"),
        ({"geometry": torch.zeros(1, 2, 3, 3)}, r"geometry must have 3 dimensions, got shape \(1, 2, 3, 3\)"),
        ({"value": torch.zeros(1, 12, 4, 5, dtype=torch.int64)}, "value must be of a floating dtype, got torch.int64"),
        ({"query": torch.zeros(1, 2, 4, 5, dtype=torch.complex64)}, "query must be of a floating dtype, got torch.complex64"),
        ({"key": torch.zeros(1, 2, 4, 5, device="meta")}, "all tensors must be on one device, got key on meta, value on cpu"),
        ({"key": torch.zeros(1, 2, 0, 5)}, r"at least one group and one pixel, got \(1, 2, 0, 5\)"),
        ({"key": torch.zeros(1, 2, 4, 0)}, r"at least one group and one pixel, got \(1, 2, 4, 0\)"),
        ({"key": torch.zeros(1, 0, 4, 5)}, r"at least one group and one pixel, got \(1, 0, 4, 5\)"),
        ({"stride": 2}, r"query must be \(1, 2, 2, 3\) for key \(1, 2, 4, 5\) at stride=2, got \(1, 2, 4, 5\)"),
        ({"query": torch.zeros(1, 3, 4, 5)}, r"query must be \(1, 2, 4, 5\) for key .* got \(1, 3, 4, 5\)"),
        ({"value": torch.zeros(2, 12, 4, 5)}, r"value must be \(1, C, 4, 5\) like key, got \(2, 12, 4, 5\)"),
        ({"value": torch.zeros(1, 12, 5, 4)}, r"value must be \(1, C, 4, 5\) like key, got \(1, 12, 5, 4\)"),
        ({"geometry": torch.zeros(3, 3, 3)}, r"geometry must be \(2, 3, 3\), got \(3, 3, 3\)"),
        ({"geometry": torch.zeros(2, 5, 5)}, r"geometry must be \(2, 3, 3\), got \(2, 5, 5\)"),
        ({"channels_per_group": 4}, "12 channels cannot be cut into 2 groups of 4 .*ceil"),
        ({"channels_per_group": 0}, "12 channels cannot be cut into 2 groups of 0"),
        ({"channels_per_group": -6}, "12 channels cannot be cut into 2 groups of -6"),
        ({"value": torch.zeros(1, 0, 4, 5)}, "0 channels cannot be cut into 2 groups"),
        ({"value": torch.zeros(1, 1, 4, 5)}, "1 channels cannot be cut into 2 groups"),
    ],
)
@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_arguments_that_do_not_fit(change, message, backend):
    query, key, value, geometry = make_inputs(Case(channels=12, height=4, width=5, kernel_size=3), torch.float32)
    arguments = {"query": query, "key": key, "value": value, "geometry": geometry, "kernel_size": 3, **change}
    with pytest.raises(ValueError, match=message):
        local_relation(**arguments, backend=backend)


# What the warning says is in test_unfold.py.
@pytest.mark.filterwarnings("ignore::lrrobust.errors.BackendWarning")
def test_choice_of_backend():
    single, double = make_inputs(SMALL, torch.float32), make_inputs(SMALL)
    assert choose_backend("auto", *single) == "cpu"
    assert choose_backend("auto", *(x.bfloat16() for x in single)) == "cpu"
    assert choose_backend("auto", *double) == "unfold"
    assert choose_backend("auto", *single[:3], double[3]) == "unfold"
    assert choose_backend("auto", *(x.to(torch.float8_e5m2) for x in single)) == "unfold"
    assert choose_backend("auto", *(x.to("meta") for x in single)) == "reference"
    assert choose_backend("reference", *single) == "reference"
    assert local_relation(*double, **SMALL.options()).dtype == torch.float64


@pytest.mark.filterwarnings("ignore::lrrobust.errors.BackendWarning")
def test_auto_runs_the_fused_loop(monkeypatch):
    from lrrobust.ops import _cpu

    called = []
    monkeypatch.setattr(_cpu, "local_relation_cpu", lambda *_, **options: called.append(options) or torch.zeros(()))
    local_relation(*make_inputs(SMALL, torch.float32), **SMALL.options())
    assert len(called) == 1
    local_relation(*make_inputs(SMALL), **SMALL.options())
    assert len(called) == 1


@pytest.mark.parametrize(
    "backend, convert, message",
    [
        ("gpu", torch.Tensor.float, "unknown backend 'gpu' of local_relation: known are auto, reference, unfold, cpu, triton"),
        ("cpu", torch.Tensor.double, "backend 'cpu' .* cannot run: it computes in float32 .* got torch.float64"),
        ("cpu", lambda x: x.to("meta"), "backend 'cpu' .* cannot run: it needs tensors on the CPU, got one on meta"),
        ("triton", torch.Tensor.float, "backend 'triton' .* cannot run: it needs tensors on an NVIDIA GPU, got one on cpu"),
    ],
)
def test_backend_that_cannot_run(backend, convert, message):
    with pytest.raises(BackendError, match=message):
        local_relation(*(convert(x) for x in make_inputs(SMALL)), **SMALL.options(), backend=backend)


@pytest.fixture
def broken_numba(monkeypatch):
    # What an import meets when numba is not installed.
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.delitem(sys.modules, "lrrobust.ops._cpu", raising=False)
    monkeypatch.delattr(lrrobust.ops, "_cpu", raising=False)
    monkeypatch.setattr(sys.modules[local_relation.__module__], "_broken", {})


def test_without_numba_auto_takes_the_tiled_backend_and_cpu_says_why(broken_numba):
    inputs = make_inputs(SMALL, torch.float32)
    with pytest.warns(BackendWarning, match="numba cannot be used"):
        assert choose_backend("auto", *inputs) == "unfold"
    with pytest.raises(BackendError, match="cannot run: numba cannot be used"):
        local_relation(*inputs, **SMALL.options(), backend="cpu")


def test_why_not_never_raises(broken_numba):
    odd = [
        torch.zeros(0),
        torch.zeros((), dtype=torch.int8),
        torch.zeros(2, device="meta"),
        torch.zeros(1, dtype=torch.complex64),
    ]
    for backend in ("reference", "unfold", "cpu", "auto", "nonsense", ""):
        for tensor in [*odd, *make_inputs(Case(), torch.float32)]:
            reason = why_not(backend, tensor)
            assert reason is None or "\n" not in reason
    assert "numba" in why_not("cpu") and "no such" in why_not("nonsense")
