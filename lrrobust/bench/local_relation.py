"""The local relation layer's operation: every backend, a loop over slices, and the convolution it replaces."""

from __future__ import annotations

import importlib.util
import itertools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, get_args

import torch
import torch.nn.functional as F

from lrrobust.bench.interleaved import OnTurn, say_nothing, time_interleaved
from lrrobust.bench.peak_memory import measure_peak_bytes
from lrrobust.ops import local_relation
from lrrobust.ops.local_relation import PAPER_CHANNELS_PER_GROUP, Backend, why_not
from lrrobust.out_of_memory import explain_in_brief, is_out_of_memory

_log = logging.getLogger(__name__)

KERNEL_SIZE = 7
#: Steps that are timed at once. On a GPU they are recorded and launched together: what is compared is the kernels, not how long
#: a processor takes to launch each.
STEPS = {"cpu": 1, "cuda": 10}
#: What is computed with where, and how a stage is called then.
DTYPES = {"cpu": {torch.float32: ""}, "cuda": {torch.float32: "", torch.bfloat16: " bf16"}}
BACKENDS = tuple(name for name in get_args(Backend) if name != "auto")
SLICES = "49 slices"
CONVOLUTION = "3x3 convolution"
#: Neighbourhood attention with the same window and channels: scores are products of 8 numbers, and windows are moved
#: into the image.
NATTEN = "natten"
#: A copy that moves as many bytes as must be moved: forward the inputs and the output, backward the inputs and all gradients.
COPY = "copy"


class Stage(NamedTuple):
    """The operation's place in LR-Net-50: channels and side of its input, and its stride."""

    name: str
    channels: int
    size: int
    stride: int = 1
    #: Channels of the 3x3 convolution that stands there in ResNet-50; none at the stem (7x7, stride 2).
    convolution_channels: int | None = None


#: At 224 pixels.
STAGES = (
    Stage("stem", 64, 224, 2),
    Stage("56x56", 100, 56, 1, 64),
    Stage("28x28", 200, 28, 1, 128),
    Stage("14x14", 400, 14, 1, 256),
    Stage("7x7", 800, 7, 1, 512),
)


class _Inputs(NamedTuple):
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    geometry: torch.Tensor


def compare_operations(
    stages: Sequence[Stage] = STAGES,
    *,
    batch_size: int = 8,
    repeats: int = 5,
    budget_s: float = math.inf,
    device: torch.device = torch.device("cpu"),  # noqa: B008 - immutable
    with_memory: bool = True,
    on_turn: OnTurn = say_nothing,
) -> Iterator[dict[str, object]]:
    """Forward and backward (to query, key and value, as in an attack) of all that can run on the device.

    On a GPU `STEPS` of them in one launch, by a CUDA graph; whoever cannot be recorded is told of, and runs as it is.

    Args:
        repeats, budget_s, on_turn: see `time_interleaved`; the stages have equal shares of the budget.

    Yields:
        One row for each type of numbers, stage, round and way: `stage`, those of `time_interleaved`, where it was measured
        `peak_bytes`, what was held at once beside the inputs, and `io_bytes`, inputs, outputs and gradients.
    """
    fused = fused_backend(device)
    dtypes = DTYPES[device.type]
    for dtype, stage in itertools.product(dtypes, stages):
        stage = stage._replace(name=stage.name + dtypes[dtype])
        ways = {}
        inputs = _make_inputs(stage, batch_size, device, dtype)
        for backend in BACKENDS:
            if why_not(backend, *inputs) is None:
                ways[backend] = _step(inputs, lambda *tensors, b=backend, s=stage: _call(b, s, *tensors))
        ways[SLICES] = _step(inputs, lambda *tensors, s=stage: sum_of_slices(*tensors, stride=s.stride))
        if stage.convolution_channels is not None:
            ways[CONVOLUTION] = _convolution_step(stage, batch_size, device, dtype)
        if stage.stride == 1 and importlib.util.find_spec("natten") is not None:
            try:
                ways[NATTEN] = _natten_step(stage, batch_size, device, dtype)
                ways[NATTEN]()
            except Exception as error:  # of many types, for what this build of it has no kernel for
                ways.pop(NATTEN, None)
                _log.warning("%s: without natten, which says %s: %s", stage.name, type(error).__name__, error)
        peaks = {}
        if with_memory and device.type == "cpu":
            for name in (name for name in ways if name in BACKENDS):
                on_turn(f"{stage.name}: {name}, memory")
                peaks[name] = {"peak_bytes": measure_peak_bytes(prepare_step, stage, batch_size, name)}
        outputs = inputs.value.numel() // stage.stride**2
        read = sum(t.numel() for t in inputs[:3])
        io_bytes = (2 * read + 2 * outputs) * inputs.value.element_size()
        ways[COPY] = _copy_step((3 * read + 2 * outputs) // 2, device, dtype)
        steps = STEPS[device.type]
        if device.type == "cuda":
            ways = {name: _recorded(step, steps, f"{stage.name}: {name}") for name, step in ways.items()}
        rows = time_interleaved(
            ways,
            repeats=repeats,
            device=device,
            baseline=fused,
            budget_s=budget_s / len(stages) / len(dtypes),
            case=stage.name,
            on_turn=on_turn,
        )
        for row in rows:
            of_one = {key: row[key] / steps for key in ("wall_s", "cpu_s")}
            yield {"stage": stage.name, **row, **of_one, **peaks.get(row["name"], {}), "io_bytes": io_bytes}


def fused_backend(device: torch.device) -> str:
    """Whom the others are compared with."""
    return "triton" if device.type == "cuda" else "cpu"


def sum_of_slices(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, geometry: torch.Tensor, *, stride: int = 1
) -> torch.Tensor:
    """The operation as a loop over the taps, each a shifted slice of padded maps; how one writes it without unfold."""
    channels, (height, width) = value.shape[1], query.shape[2:]
    radius = KERNEL_SIZE // 2
    padding = (radius,) * 4
    inside = F.pad(torch.zeros_like(key[:1, :1]), padding, value=float("-inf"))
    keys, values = F.pad(key, padding), F.pad(value, padding)

    def shifted(maps: torch.Tensor, dy: int, dx: int) -> torch.Tensor:
        return maps[:, :, dy : dy + (height - 1) * stride + 1 : stride, dx : dx + (width - 1) * stride + 1 : stride]

    offsets = [(dy, dx) for dy in range(KERNEL_SIZE) for dx in range(KERNEL_SIZE)]
    scores = [
        -((query - shifted(keys, dy, dx)) ** 2) + geometry[:, dy, dx].view(1, -1, 1, 1) + shifted(inside, dy, dx)
        for dy, dx in offsets
    ]
    weights = torch.stack(scores).softmax(0)
    total = value.new_zeros(())
    for weight, (dy, dx) in zip(weights, offsets, strict=True):
        spread = weight.repeat_interleave(PAPER_CHANNELS_PER_GROUP, dim=1)[:, :channels]
        total = total + spread * shifted(values, dy, dx)
    return total


def prepare_step(stage: Stage, batch_size: int, backend: str) -> tuple[Callable[[], object], Callable[[], object]]:
    """For `measure_peak_bytes`: one small step, and the step itself."""

    def build(stage: Stage, batch_size: int) -> Callable[[], object]:
        inputs = _make_inputs(stage, batch_size, torch.device("cpu"), torch.float32)
        return _step(inputs, lambda *tensors: _call(backend, stage, *tensors))

    return build(stage._replace(channels=8, size=8), 1), build(stage, batch_size)


def _make_inputs(stage: Stage, batch_size: int, device: torch.device, dtype: torch.dtype) -> _Inputs:
    groups = -(-stage.channels // PAPER_CHANNELS_PER_GROUP)
    out_size = -(-stage.size // stage.stride)

    def maps(channels: int, size: int) -> torch.Tensor:
        made = torch.randn(batch_size, channels, size, size, device=device, dtype=dtype)
        return made.contiguous(memory_format=torch.channels_last).requires_grad_()

    geometry = torch.randn(groups, KERNEL_SIZE, KERNEL_SIZE, device=device, dtype=dtype)
    return _Inputs(maps(groups, out_size), maps(groups, stage.size), maps(stage.channels, stage.size), geometry)


def _call(backend: str, stage: Stage, *inputs: torch.Tensor) -> torch.Tensor:
    return local_relation(*inputs, kernel_size=KERNEL_SIZE, stride=stage.stride, backend=backend)


def _step(inputs: _Inputs, function: Callable[..., torch.Tensor]) -> Callable[[], object]:
    def step() -> object:
        out = function(*inputs)
        return torch.autograd.grad(out, inputs[:3], out.detach())

    return step


def _recorded(step: Callable[[], object], steps: int, name: str) -> Callable[[], object]:
    """`steps` times the step, as one launch where that is possible."""
    before, stream = torch.cuda.current_stream(), torch.cuda.Stream()
    stream.wait_stream(before)
    with torch.cuda.stream(stream):
        # What is compiled or allocated once must be there before.
        for _ in range(2):
            step()
    before.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for _ in range(steps):
                step()
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        _log.warning("%s is launched kernel by kernel, since it cannot be recorded: %s", name, explain_in_brief(error))
        return lambda: [step() for _ in range(steps)]
    finally:
        torch.cuda.set_stream(before)  # which a recording that fails leaves another
    return graph.replay


def _copy_step(numbers: int, device: torch.device, dtype: torch.dtype) -> Callable[[], object]:
    source = torch.ones(numbers, device=device, dtype=dtype)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _natten_step(stage: Stage, batch_size: int, device: torch.device, dtype: torch.dtype) -> Callable[[], object]:
    import natten

    heads = -(-stage.channels // PAPER_CHANNELS_PER_GROUP)
    shape = batch_size, stage.size, stage.size, heads, PAPER_CHANNELS_PER_GROUP
    tensors = [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3)]

    def step() -> object:
        out = natten.na2d(*tensors, kernel_size=KERNEL_SIZE)
        return torch.autograd.grad(out, tensors, out.detach())

    return step


def _convolution_step(stage: Stage, batch_size: int, device: torch.device, dtype: torch.dtype) -> Callable[[], object]:
    channels = stage.convolution_channels
    layer = torch.nn.Conv2d(channels, channels, 3, padding=1, bias=False, device=device, dtype=dtype)
    layer = layer.requires_grad_(False).to(memory_format=torch.channels_last)
    images = torch.randn(batch_size, channels, stage.size, stage.size, device=device, dtype=dtype)
    images = images.contiguous(memory_format=torch.channels_last).requires_grad_()

    def step() -> object:
        out = layer(images)
        return torch.autograd.grad(out, images, out.detach())

    return step
