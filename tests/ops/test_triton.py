"""The Triton kernels against the reference in double precision: on a GPU where there is one, else interpreted on the CPU."""

import importlib
import re
import sys

import op_inputs
import pytest
import torch
from op_inputs import SIMILARITIES
from own_process import environment, run_process

from lrrobust.errors import BackendError
from lrrobust.ops import local_relation
from lrrobust.ops.local_relation import choose_backend, why_not

pytest.importorskip("triton", reason="triton is not installed")

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
NAMES = ("output", "query", "key", "value", "geometry")

#: Other strides, or gradients left out, are another kernel, whose products and sums a GPU may fuse otherwise.
OF_ANOTHER_KERNEL = {"rtol": 1e-6, "atol": 1e-6} if HAS_GPU else {"rtol": 0, "atol": 0}

needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="there is no GPU")

pytestmark = [
    # The interpreter computes lanes that are masked out, and exponentials that underflow, in numpy.
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]


@pytest.fixture
def kernels(monkeypatch):
    """The module of the kernels, interpreted where there is no GPU (conftest.py)."""
    module = importlib.import_module("lrrobust.ops._triton")
    assert module.IS_INTERPRETED is not HAS_GPU
    if module.IS_INTERPRETED:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    return module


@pytest.fixture(autouse=True)
def small_blocks(kernels, monkeypatch):
    """So that small maps take several programs, whose ends fall within rows and images."""
    monkeypatch.setattr(kernels, "BLOCKS", {size: (512, warps) for size, (_, warps) in kernels.BLOCKS.items()})


def make_inputs(*sizes, dtype=torch.float32):
    return [x.to(DEVICE) for x in op_inputs.make_inputs(*sizes, dtype=dtype)]


def run(inputs, backend="triton", layout=lambda x: x, **options):
    """Output and the gradients of all inputs, for an output gradient that every dtype holds exactly."""
    leaves = [layout(x.detach().clone()).requires_grad_() for x in inputs]
    out = local_relation(*leaves, kernel_size=inputs[3].shape[-1], backend=backend, **options)
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, torch.bfloat16).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, layout(grad_out))]


def assert_agrees(found, inputs, relative=1e-5, **options):
    expected = run([x.double() for x in inputs], "reference", **options)
    for name, x, truth in zip(NAMES, found, expected, strict=True):
        # Where a window has one tap, gradients of 0 are differences of sums of products of about 1.
        tolerance = relative * max(truth.abs().max().item(), 1e-2)
        torch.testing.assert_close(x.double(), truth, rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize(
    "sizes, options",
    [
        ((2, 16, 5, 4, 3), {}),
        ((1, 12, 4, 7, 5), {}),  # the second group is half full
        ((5, 8, 2, 2, 5), {}),  # several images a program
        ((3, 4, 1, 1, 3), {}),
        ((2, 20, 7, 5, 3, 2), {"stride": 2}),
        ((1, 8, 6, 8, 5, 2), {"stride": 2}),
        ((1, 8, 8, 7, 3, 3), {"stride": 3}),
        ((1, 8, 7, 6, 3), {"dilation": 2}),
        ((1, 9, 7, 5, 3, 2), {"stride": 2, "dilation": 3}),
        ((1, 7, 4, 3, 3, 1, 3), {"channels_per_group": 3}),
        ((1, 20, 3, 4, 3, 1, 20), {"channels_per_group": 20}),
        ((1, 40, 3, 3, 1), {}),
        ((1, 1, 2, 35, 3), {}),  # two strips, the second smaller
    ],
    ids=str,
)
def test_agrees_with_the_reference(sizes, options, similarity):
    inputs = make_inputs(*sizes)
    assert_agrees(run(inputs, similarity=similarity, **options), inputs, similarity=similarity, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_error_is_at_most_twice_that_of_the_plain_op(similarity, dtype):
    inputs = make_inputs(1, 12, 4, 5, 3, dtype=dtype)
    truth = run([x.double() for x in inputs], "reference", similarity=similarity)
    plain = run(inputs, "reference", similarity=similarity)
    found = run(inputs, similarity=similarity)
    for name, x, by_plain, exact in zip(NAMES, found, plain, truth, strict=True):
        assert x.dtype == dtype
        assert (x.double() - exact).abs().max() <= 2 * (by_plain.double() - exact).abs().max() + 1e-6, name


def test_gradient_of_the_query_does_not_cancel_where_queries_are_large():
    query, key, value, geometry = make_inputs(1, 8, 4, 4, 3)
    inputs = [query + 3000, key + 3000, value, geometry]
    exact = run([x.double() for x in inputs], "reference")
    found = run(inputs)
    assert (found[1].double() - exact[1]).abs().max() <= 1e-5 * exact[1].abs().max()


def test_gradients_do_not_suffer_from_queries_far_from_all_keys():
    query, key, value, geometry = make_inputs(1, 8, 6, 6, 5)
    inputs = [query + 8, key, value, geometry]
    truth = run([x.double() for x in inputs], "reference")
    plain = run(inputs, "reference")
    for name, x, by_plain, exact in zip(NAMES, run(inputs), plain, truth, strict=True):
        assert (x.double() - exact).abs().max() <= 2 * (by_plain.double() - exact).abs().max() + 1e-7, name


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_far_apart_scores_stay_finite(similarity):
    _, _, value, _ = make_inputs(1, 8, 4, 4, 7)
    query = torch.full((1, 1, 4, 4), 1e4, device=DEVICE)
    key = -100.0 * torch.randperm(16, generator=torch.Generator().manual_seed(3)).view(1, 1, 4, 4).to(DEVICE, torch.float32)
    inputs = [query, key, value, torch.zeros(1, 7, 7, device=DEVICE)]
    found = run(inputs, similarity=similarity)
    winner = value.flatten(2)[:, :, key.flatten().argmax()]
    torch.testing.assert_close(found[0], winner[:, :, None, None].expand_as(found[0]), rtol=1e-6, atol=1e-6)
    assert all(x.isfinite().all() for x in found)


@pytest.mark.parametrize("poisoned", [0, 1, 2, 3])
def test_nan_arrives_where_it_is_seen_and_nowhere_else(poisoned):
    inputs = make_inputs(1, 8, 4, 4, 3)
    inputs[poisoned].view(-1)[4 if poisoned == 3 else 5] = float("nan")
    found = run(inputs)[0].isnan()
    assert torch.equal(found, run([x.double() for x in inputs], "reference")[0].isnan())
    assert found.any()


@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x,
        lambda x: torch.stack([torch.full_like(x, float("nan")), x], dim=-1)[..., 1],
        lambda x: x.flip(1) if x.ndim == 4 else x,
    ],
    ids=["channels last", "every second", "flipped"],
)
def test_layout_of_inputs_plays_no_part(layout):
    inputs = make_inputs(2, 12, 5, 4, 3, 2)
    expected = run([layout(x).contiguous() for x in inputs], stride=2)
    if layout(inputs[0]).equal(inputs[0]):
        torch.testing.assert_close(run(inputs, layout=layout, stride=2), expected, **OF_ANOTHER_KERNEL)
    assert_agrees(run([layout(x) for x in inputs], stride=2), [layout(x) for x in inputs], stride=2)


def test_expanded_output_gradient():
    inputs = [x.requires_grad_() for x in make_inputs(2, 8, 3, 3, 3)]
    options = {"kernel_size": 3, "backend": "triton"}
    by_sum = torch.autograd.grad(local_relation(*inputs, **options).sum(), inputs)
    out = local_relation(*inputs, **options)
    expected = torch.autograd.grad(out, inputs, torch.ones_like(out))
    torch.testing.assert_close(by_sum, expected, **OF_ANOTHER_KERNEL)


def test_results_are_channels_last():
    out, by_query, by_key, by_value, _ = run(make_inputs(2, 12, 5, 4, 3))
    for maps in (out, by_query, by_key, by_value):
        assert maps.is_contiguous(memory_format=torch.channels_last)


def test_the_output_may_be_changed_in_place():
    leaves = [x.requires_grad_() for x in make_inputs(1, 8, 3, 3, 3)]
    out = local_relation(*leaves, kernel_size=3, backend="triton")
    expected = torch.autograd.grad(out.relu().sum(), leaves)
    out = local_relation(*leaves, kernel_size=3, backend="triton")
    torch.testing.assert_close(torch.autograd.grad(out.relu_().sum(), leaves), expected)


def test_results_are_the_same_every_time():
    inputs = make_inputs(2, 12, 5, 4, 3)
    torch.testing.assert_close(run(inputs), run(inputs), rtol=0, atol=0)


@pytest.mark.parametrize("wanted", [{"value"}, {"query", "key"}, {"geometry"}, {"query", "key", "value"}])
def test_gradients_only_where_asked_for(wanted, kernels, monkeypatch):
    launched = []
    launch = kernels._launch
    monkeypatch.setattr(
        kernels, "_launch", lambda kernel, positions, arguments, **rest: launched.append(arguments) or launch(
            kernel, positions, arguments, **rest
        )
    )  # fmt: skip
    inputs = make_inputs(2, 12, 4, 3, 3)
    expected = run(inputs)[1:]
    launched.clear()
    leaves = [x.detach().clone().requires_grad_(name in wanted) for name, x in zip(NAMES[1:], inputs, strict=True)]
    out = local_relation(*leaves, kernel_size=3, backend="triton")
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(DEVICE, out.dtype)
    out.backward(grad_out)
    for name, leaf, gradient in zip(NAMES[1:], leaves, expected, strict=True):
        if name in wanted:
            torch.testing.assert_close(leaf.grad, gradient, **OF_ANOTHER_KERNEL)
        else:
            assert leaf.grad is None
    assert [x["NEEDS_GEOMETRY"] for x in launched if "NEEDS_GEOMETRY" in x] == ["geometry" in wanted]


def test_empty_batch():
    inputs = make_inputs(0, 12, 4, 5, 3, 2)
    found = run(inputs, stride=2)
    assert [x.shape for x in found] == [(0, 12, 2, 3), *(x.shape for x in inputs)]
    assert not found[4].any()


def test_refuses_to_be_differentiated_twice():
    leaves = [x.requires_grad_() for x in make_inputs(1, 8, 3, 3, 3)]
    out = local_relation(*leaves, kernel_size=3, backend="triton")
    (gradient,) = torch.autograd.grad(out.square().sum(), leaves[0], create_graph=True)
    with pytest.raises(BackendError, match="differentiated once: give .*backend='unfold'"):
        gradient.sum().backward()


def test_autocast_leaves_inputs_as_they_are():
    query, key, value, geometry = make_inputs(1, 12, 4, 4, 3)
    mixed = [query.bfloat16(), key, value.bfloat16(), geometry]
    outside = run(mixed)
    with torch.autocast(DEVICE, dtype=torch.float16 if HAS_GPU else torch.bfloat16):
        inside = run(mixed)
    torch.testing.assert_close(inside, outside, rtol=0, atol=0)
    assert [x.dtype for x in inside] == [torch.bfloat16, *(x.dtype for x in mixed)]


# Of torch 2.14 about itself.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_operations_are_registered_as_torch_wants():
    inputs = [x.requires_grad_() for x in make_inputs(1, 3, 2, 3, 3, 2)]
    options = (2, 1, "squared_difference", 8)
    torch.library.opcheck(torch.ops.lrrobust.local_relation.default, (*inputs, *options))
    out, *saved = torch.ops.lrrobust.local_relation(*(x.detach() for x in inputs), *options)
    arguments = (*(x.detach() for x in inputs), *saved, torch.ones_like(out), *options)
    for needs_geometry in (False, True):
        torch.library.opcheck(torch.ops.lrrobust.local_relation_backward.default, (*arguments, needs_geometry))


def test_compiles_to_one_graph():
    inputs = [x.requires_grad_() for x in make_inputs(1, 12, 4, 3, 3)]
    backend = "inductor" if HAS_GPU else "aot_eager"

    def op(*tensors):
        return local_relation(*(2 * x for x in tensors), kernel_size=3, backend="triton")

    out = torch.compile(op, fullgraph=True, backend=backend)(*inputs)
    expected = op(*inputs)
    torch.testing.assert_close(out, expected)
    gradients = torch.autograd.grad(out.square().sum(), inputs)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected.square().sum(), inputs))


@pytest.mark.parametrize(
    "convert, message",
    [
        (lambda x: x.double(), "backend 'triton' .* cannot run: it computes in float32 .* got torch.float64"),
        (lambda x: x.to("meta"), "backend 'triton' .* cannot run: it needs tensors on an NVIDIA GPU, got one on meta"),
    ],
)
def test_what_it_cannot_run(convert, message):
    with pytest.raises(BackendError, match=message):
        local_relation(*(convert(x) for x in make_inputs(1, 8, 3, 3, 3)), kernel_size=3, backend="triton")


def test_cpu_tensors_are_for_the_interpreter_only(monkeypatch):
    inputs = [x.cpu() for x in make_inputs(1, 8, 3, 3, 3)]
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert why_not("triton", *inputs) == "it needs tensors on an NVIDIA GPU, got one on cpu"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    # Python in place of machine code is for testing: nobody gets it without asking.
    assert choose_backend("auto", *inputs) != "triton"


def test_without_triton_it_says_why(monkeypatch):
    monkeypatch.setattr(sys.modules[local_relation.__module__], "_broken", {})
    monkeypatch.delattr("lrrobust.ops._triton")
    monkeypatch.setitem(sys.modules, "lrrobust.ops._triton", None)
    inputs = make_inputs(1, 8, 3, 3, 3)
    assert why_not("triton", *inputs).startswith("triton cannot be used (ModuleNotFoundError")
    with pytest.raises(BackendError, match="backend 'triton' .* cannot run: triton cannot be used"):
        local_relation(*inputs, kernel_size=3, backend="triton")


# --- the compiler, which needs no GPU ---------------------------------------------------------------

_COMPILE = """
import sys
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from lrrobust.ops import _triton as kernels

value = torch.empty(0, dtype={"*bf16": torch.bfloat16, "*fp32": torch.float32}[sys.argv[1]])
CONSTANTS = {
    "NEEDS_GEOMETRY": False, "GROUPS": 13, "CHANNELS": 104, "PER_GROUP": 8, "HEIGHT": 9, "WIDTH": 9, "OUT_HEIGHT": 9,
    "OUT_WIDTH": 9, "KERNEL": 3, "STRIDE": 1, "DILATION": 1, "SIMILARITY": 0, "STRIP": 9, "BLOCK_M": 8,
    "BLOCK_G": kernels.BLOCK_GROUPS, "BLOCK_P": kernels._block_positions(value, 8),
    **{f"{x}G": 1 for x in "QK"}, **{f"{x}C": 1 for x in "VO"}, **{f"{x}X": 26 for x in "QK"}, **{f"{x}X": 104 for x in "VO"},
    **{f"{x}Y": 9 * 26 for x in "QK"}, **{f"{x}Y": 9 * 104 for x in "VO"},
}
for kernel in (kernels._forward_kernel, kernels._backward_outputs_kernel, kernels._backward_inputs_kernel):
    types, aligned = {}, {}
    for position, name in enumerate(kernel.arg_names):
        if name in CONSTANTS:
            types[name] = "constexpr"
        elif name in ("batch", "ONE", "QN", "KN", "VN", "ON"):
            types[name] = "i32"
        else:
            is_single = name in ("geometry", "maximum", "normaliser", "mean_key", "delta", "grad_geometry")
            types[name] = "*fp32" if is_single else sys.argv[1]
        if types[name].startswith("*") or name in ("QN", "KN", "VN", "ON"):
            aligned[(position,)] = [["tt.divisibility", 16]]
    constants = {(kernel.arg_names.index(name),): number for name, number in CONSTANTS.items() if name in kernel.arg_names}
    source = ASTSource(kernel, types, constants, aligned)
    options = {"num_warps": kernels.BLOCKS[value.element_size()][1]}
    ptx = compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    print(kernel.fn.__name__, "synchronisations", ptx.count("bar.sync"), "wide loads", ptx.count("ld.global.v4"))
"""


def compiler_environment(cache):
    """Of a process in which Triton compiles for a GPU, afresh."""
    changed = environment(TRITON_CACHE_DIR=str(cache))
    changed.pop("TRITON_INTERPRET", None)
    return changed


@pytest.mark.parametrize("dtype", ["*bf16", "*fp32"])
def test_kernels_compile_for_a_gpu(dtype, tmp_path):
    # What the interpreter accepts is more than what the compiler does.
    script = tmp_path / "compile_kernels.py"
    script.write_text(_COMPILE, encoding="utf-8")
    done = run_process(sys.executable, script, dtype, env=compiler_environment(tmp_path))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    # Eight channels are one load, or two in float32, and threads never wait for one another.
    assert all(re.search(r"synchronisations 0 wide loads [1-9]", line) for line in lines), done.stdout


_LAUNCH = """
import sys
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

launched, loaded = [], []


class Launcher:
    def __init__(self, source, metadata):
        self.name = metadata.name

    def __call__(self, x, y, z, stream, function, packed, metadata, enter, leave, *arguments):
        told = [(a.dtype, tuple(a.shape), a.stride()) if isinstance(a, torch.Tensor) else a for a in arguments]
        launched.append((self.name, (x, y, z), told))


class Driver:
    launcher_cls = Launcher
    utils = property(lambda self: self)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_device_properties(self, device):
        return {"max_shared_mem": 232448}

    def load_binary(self, name, kernel, shared, device):
        loaded.append(name)
        return 1, 1, 32, 0, 1024


driver.set_active(Driver())
torch.cuda.current_device = lambda: 0
from lrrobust.ops import _triton as kernels


def channels_last(batch, channels, dtype, offset):
    numbers = torch.zeros(offset + batch * channels * 36, dtype=dtype)[offset:]
    return numbers.view(batch, 6, 6, channels).permute(0, 3, 1, 2).requires_grad_()


def step(batch, dtype=torch.float32, offset=0):
    launched.clear(), loaded.clear()
    maps = [channels_last(batch, channels, dtype, offset) for channels in (2, 2, 16)]
    options = {"stride": 1, "dilation": 1, "similarity": "squared_difference", "channels_per_group": 8}
    out = kernels.local_relation_triton(*maps, torch.zeros(2, 3, 3), **options)
    torch.autograd.grad(out, maps, torch.ones_like(out))
    return [*launched], [*loaded]


first, compiled = step(16)
assert compiled == ["_forward_kernel", "_backward_outputs_kernel", "_backward_inputs_kernel"], compiled
found = []
search = type(kernels._forward_kernel).run
type(kernels._forward_kernel).run = lambda self, *rest, **more: found.append(self) or search(self, *rest, **more)
again, compiled = step(16)
assert again == first and len(again) == 3 and not compiled
assert not found, "looked for what it knew"
# Attacks end with batches of any size: none of them waits for a compiler.
for batch in (1, 3, 32):
    other, compiled = step(batch)
    assert not compiled, (batch, compiled)
    assert [name for name, *_ in other] == [name for name, *_ in first] and other != first
# What is compiled for one dtype, or for aligned memory, is not launched on another: it would read other numbers.
for dtype, offset in ((torch.bfloat16, 0), (torch.float32, 1), (torch.bfloat16, 1)):
    _, compiled = step(16, dtype, offset)
    assert len(compiled) == 3, (dtype, offset, compiled)
    assert not step(16, dtype, offset)[1]
"""


def test_what_is_compiled_is_launched_without_a_search_and_for_any_batch_size(tmp_path):
    done = run_process(sys.executable, "-c", _LAUNCH, env=compiler_environment(tmp_path))
    assert done.returncode == 0, done.stderr


# --- what only a GPU can show -----------------------------------------------------------------------


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "channels, side, stride",
    [(64, 112, 2), (100, 56, 1), (104, 56, 1), (200, 56, 2), (208, 28, 1), (416, 14, 1), (800, 7, 1), (800, 4, 1), (832, 2, 1)],
)
def test_network_sizes_on_a_gpu(channels, side, stride, dtype, monkeypatch):
    monkeypatch.undo()  # the blocks of `small_blocks`
    inputs = make_inputs(2, channels, side, side, 7, stride, dtype=dtype)
    truth = run([x.double() for x in inputs], "reference", stride=stride)
    plain = run(inputs, "reference", stride=stride)
    for name, x, by_plain, exact in zip(NAMES, run(inputs, stride=stride), plain, truth, strict=True):
        assert (x.double() - exact).abs().max() <= 2 * (by_plain.double() - exact).abs().max() + 1e-6, name


@needs_gpu
def test_auto_takes_it_on_a_gpu():
    assert choose_backend("auto", *make_inputs(1, 8, 3, 3, 3)) == "triton"


@needs_gpu
def test_cuda_graph_replays_it():
    inputs = [x.requires_grad_() for x in make_inputs(2, 12, 9, 8, 5)]

    def step():
        out = local_relation(*inputs, kernel_size=5, backend="triton")
        return out, *torch.autograd.grad(out.square().sum(), inputs)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for x in inputs:
            x.mul_(-0.5)
    graph.replay()
    torch.testing.assert_close(captured, step(), rtol=0, atol=0)
