"""The local relation: aggregation with weights composed from appearance and position."""

from __future__ import annotations

import os
import warnings
from typing import Literal, get_args

import torch

from lrrobust.errors import BackendError, BackendWarning
from lrrobust.ops._reference import local_relation_reference
from lrrobust.ops._unfold import local_relation_unfold

Similarity = Literal["squared_difference", "absolute_difference", "multiplication"]
Backend = Literal["auto", "reference", "unfold", "cpu", "triton"]
#: Not asked of the types at every call, where torch's older compilers stumble over it.
_SIMILARITIES, _BACKENDS = get_args(Similarity), get_args(Backend)

#: Channels that share one aggregation in the paper (section 3.3).
PAPER_CHANNELS_PER_GROUP = 8


def local_relation(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    geometry: torch.Tensor,
    *,
    kernel_size: int,
    stride: int = 1,
    dilation: int = 1,
    similarity: Similarity = "squared_difference",
    channels_per_group: int | None = None,
    backend: Backend = "auto",
) -> torch.Tensor:
    """Weighs the k x k neighbourhood of every position by appearance and geometry, and sums the values.

    For output position p' with centre s * p' in the input, and group g:

        w(p', p) = softmax over p of [ phi(query(p'), key(p)) + geometry(p - s * p') ]
        out(p')  = sum over p of w(p', p) * value(p)

    with phi = -(q - k)^2, -|q - k| or q * k. A neighbour outside the image has weight zero, so the
    weights of the neighbours inside always sum to one.

    Args:
        query: (N, G, Ho, Wo), one scalar per group at the output resolution, Ho = ceil(H / stride).
        key: (N, G, H, W), one scalar per group at the input resolution.
        value: (N, C, H, W); channels g*m ... g*m + m - 1 share the weights of group g.
        geometry: (G, k, k), added to the scores; entry [g, i, j] belongs to the neighbour at offset
            (i - k//2, j - k//2) * dilation.
        kernel_size: k, odd.
        stride: step between output positions, at least 1.
        dilation: step between neighbours of a window, at least 1.
        similarity: phi.
        channels_per_group: m, with G = ceil(C / m); the last group has what is left. By default 8, as in
            the paper, where that fits C and G, else ceil(C / G).
        backend: what computes it.
            "reference": plain torch as one would write it down; any device and floating dtype.
            "unfold": plain torch in tiles, with bounded memory; any device and floating dtype.
            "cpu": fused loop on the CPU; "triton": fused kernels on NVIDIA GPUs. Both take float32, bfloat16 and
            float16, accumulate in float32, and can be differentiated once.
            "auto": the fused one of the device, else "unfold" with a `BackendWarning`, once for each reason.

    Returns:
        (N, C, Ho, Wo) in the dtype of `value`.

    Raises:
        ValueError: shapes, dtypes or options do not fit together.
        BackendError: the backend asked for cannot run here; the message says why.

    Warns:
        BackendWarning: "auto" found no fused backend; the message says why.

    Source: Hu et al., Local Relation Networks for Image Recognition, ICCV 2019, sections 3.2 and 3.3;
    the border follows the authors' kernel.
    """
    check_arguments(query, key, value, geometry, kernel_size, stride, dilation, similarity)
    per_group = choose_channels_per_group(value.shape[1], query.shape[1], channels_per_group)
    chosen = choose_backend(backend, query, key, value, geometry)
    if chosen == "cpu":
        from lrrobust.ops._cpu import local_relation_cpu as implementation
    elif chosen == "triton":
        from lrrobust.ops._triton import local_relation_triton as implementation
    elif chosen == "unfold":
        implementation = local_relation_unfold
    else:
        implementation = local_relation_reference
    return implementation(
        query,
        key,
        value,
        geometry,
        stride=stride,
        dilation=dilation,
        similarity=similarity,
        channels_per_group=per_group,
    )


def check_arguments(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    geometry: torch.Tensor,
    kernel_size: int,
    stride: int,
    dilation: int,
    similarity: str,
) -> None:
    """Raises ValueError unless the arguments of `local_relation` fit together."""
    if similarity not in _SIMILARITIES:
        raise ValueError(f"similarity must be one of {', '.join(_SIMILARITIES)}, got {similarity!r}")
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd and positive, got {kernel_size}")
    if stride < 1 or dilation < 1:
        raise ValueError(f"stride and dilation must be at least 1, got {stride=}, {dilation=}")
    for name, tensor, dimensions in (("query", query, 4), ("key", key, 4), ("value", value, 4), ("geometry", geometry, 3)):
        if tensor.ndim != dimensions:
            raise ValueError(f"{name} must have {dimensions} dimensions, got shape {tuple(tensor.shape)}")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be of a floating dtype, got {tensor.dtype}")
        if tensor.device != value.device:
            raise ValueError(f"all tensors must be on one device, got {name} on {tensor.device}, value on {value.device}")
    batch, groups, height, width = key.shape
    if height < 1 or width < 1 or groups < 1:
        raise ValueError(f"key must hold at least one group and one pixel, got {tuple(key.shape)}")
    expected = (batch, groups, -(-height // stride), -(-width // stride))
    if tuple(query.shape) != expected:
        raise ValueError(f"query must be {expected} for key {tuple(key.shape)} at {stride=}, got {tuple(query.shape)}")
    if (value.shape[0], *value.shape[2:]) != (batch, height, width):
        raise ValueError(f"value must be ({batch}, C, {height}, {width}) like key, got {tuple(value.shape)}")
    if tuple(geometry.shape) != (groups, kernel_size, kernel_size):
        raise ValueError(f"geometry must be {(groups, kernel_size, kernel_size)}, got {tuple(geometry.shape)}")


def choose_channels_per_group(channels: int, groups: int, asked: int | None) -> int:
    """The m of G = ceil(C / m); several m can fit, the paper's 8 goes first, then the most even split."""
    candidates = [asked] if asked is not None else [PAPER_CHANNELS_PER_GROUP, -(-channels // groups)]
    for per_group in candidates:
        if per_group >= 1 and -(-channels // per_group) == groups:
            return per_group
    raise ValueError(
        f"{channels} channels cannot be cut into {groups} groups of {candidates[-1]} (the last one smaller): "
        f"G must be ceil(C / channels_per_group)"
    )


def choose_backend(backend: str, *tensors: torch.Tensor) -> str:
    """The backend that will run: the one asked for, or with "auto" the fastest that can."""
    if backend == "auto":
        if tensors[0].device.type == "meta":
            return "reference"  # nothing is computed: the fewest operations
        fused = "triton" if tensors[0].device.type == "cuda" else "cpu"
        reason = why_not(fused, *tensors)
        if reason is None:
            return fused
        _warn_of_slow_backend(f"local_relation runs the slower backend 'unfold': {fused!r} cannot run, {reason}")
        return "unfold"
    if backend not in _BACKENDS:
        raise BackendError(f"unknown backend {backend!r} of local_relation: known are {', '.join(_BACKENDS)}")
    reason = why_not(backend, *tensors)
    if reason is not None:
        raise BackendError(f"backend {backend!r} of local_relation cannot run: {reason}")
    return backend


#: Messages that have been given: a network calls the op thousands of times.
_warned: set[str] = set()


def _warn_of_slow_backend(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, BackendWarning, stacklevel=4)


def why_not(backend: str, *tensors: torch.Tensor) -> str | None:
    """Why a backend cannot run on these tensors, or None if it can. Never raises."""
    if backend in ("reference", "unfold"):
        return None
    if backend not in ("cpu", "triton"):
        return "there is no such backend"
    for tensor in tensors:
        reason = _why_not_a_gpu(tensor.device) if backend == "triton" else _why_not_the_cpu(tensor.device)
        if reason is not None:
            return reason
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"it computes in float32 and takes float32, bfloat16 or float16, got {tensor.dtype}"
    return _why_not_importable(backend)


def _why_not_the_cpu(device: torch.device) -> str | None:
    return None if device.type == "cpu" else f"it needs tensors on the CPU, got one on {device}"


def _why_not_a_gpu(device: torch.device) -> str | None:
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if device.type != "cuda":
        return f"it needs tensors on an NVIDIA GPU, got one on {device}"
    if torch.version.hip is not None:
        return "it is made for NVIDIA GPUs, this torch is built for ROCm"
    capability = _capability(device)
    if capability < (8, 0):
        return "it needs a GPU of compute capability 8.0 or newer, got {}.{}".format(*capability)
    return None


#: Device -> its compute capability: asking torch takes a tenth of what a small map does, and a network asks at every layer.
_capabilities: dict[torch.device, tuple[int, int]] = {}


def _capability(device: torch.device) -> tuple[int, int]:
    if device not in _capabilities:
        _capabilities[device] = torch.cuda.get_device_capability(device)
    return _capabilities[device]


#: Backend -> why its packages cannot be used. Importing what is imported costs nothing, failing again would; and
#: torch's compiler follows a dictionary where it complains about functools.cache.
_broken: dict[str, str] = {}


def _why_not_importable(backend: str) -> str | None:
    if backend not in _broken:
        package = "numba" if backend == "cpu" else "triton"
        try:
            if backend == "cpu":
                import lrrobust.ops._cpu  # noqa: F401
            else:
                import lrrobust.ops._triton  # noqa: F401
        except Exception as error:  # of many types, when it does not match numpy, torch or the processor
            _broken[backend] = f"{package} cannot be used ({type(error).__name__}: {error})"
    return _broken.get(backend)
