"""The local relation as Triton kernels, forward and backward, for NVIDIA GPUs.

What must move is every input once and the output once; the 49-fold reuse has to come from caches. So:

* A program owns BLOCK_P output (or input) positions of BLOCK_G groups, all channels of a group at once.
  Positions run row by row through vertical strips of the image (`_strip_width`), then through the
  images: a block of a large map is about square, so that its halo is small and stays in the first-level
  cache, and a block of a small map (7x7, 4x4, 2x2) takes several images.
* Taps are a plain loop over registers. Tensors are (groups, positions, channels), so that neighbouring threads
  take neighbouring groups, whose queries and keys lie side by side in memory. In half precision a thread holds all
  channels of its groups, and nothing in the forward pass and in the gradients of query, key and value passes
  between threads. In float32 a group's 8 channels are two 16-byte loads in two threads, which exchange one weight
  a tap: so a program is a single warp there, in which nobody waits for others (`BLOCKS`).
  There are no atomic additions: all results are the same from run to run.
* The forward pass finds the largest score first, from the keys alone (an eighth of the bytes), then sums
  in one pass, and saves it and the sum of the weights, from which the backward pass recomputes them. Their
  logarithm would be one number less, and lose what a window whose scores are all far below zero is told by.
* Backward is two launches, because the first finds a number per output position that all input positions
  around it need, delta = sum over p of weight * d loss / d weight. Reading it off the stored output
  instead would cost half-precision gradients their accuracy. The first launch also adds up the geometry's gradient
  by block, if it is wanted (attacks do not); torch sums the blocks.
* Tensors are read through their strides, so no input is ever copied; results are channels-last, which is
  also the fast layout for inputs (8 channels of a group are one 16-byte load in half precision).

Scores, weights and sums are float32 whatever the inputs. A 7x7 window costs a position 49 exponentials and
49 * 9 multiply-adds a group, for 4 * 8 bytes moved in half precision: counted against the H200's data
sheet that arithmetic, not memory, is the bound there. On small maps it is the way to the launch (reports/bench).

Block sizes are fixed by rule, so that results do not depend on timing.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lrrobust.ops._operation import build_operation, new_channels_last

SIMILARITY_CODES = {"squared_difference": 0, "absolute_difference": 1, "multiplication": 2}

#: Groups of a program.
BLOCK_GROUPS = 4
#: Numbers that a program holds per accumulator, and its warps, by the bytes of a number in `value`.
BLOCKS = {2: (1024, 4), 4: (256, 1)}


@triton.jit
def _locate(batch, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, STRIP: tl.constexpr, BLOCK_P: tl.constexpr):
    """Image, row, column and existence of this program's positions.

    The kernels multiply the groups of what has one number a group by ONE, whose value the compiler is not told. If
    it knew that they are contiguous, it would load several in one thread, and then exchange them between
    threads at every tap, since that is not how the channels are laid out over threads.
    """
    PER_STRIP: tl.constexpr = HEIGHT * STRIP
    PER_IMAGE: tl.constexpr = PER_STRIP * ((WIDTH + STRIP - 1) // STRIP)
    position = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    n = position // PER_IMAGE
    in_image = (position % PER_IMAGE).to(tl.int32)
    in_strip = in_image % PER_STRIP
    y = in_strip // STRIP
    x = in_image // PER_STRIP * STRIP + in_strip % STRIP
    return n, y, x, (n < batch) & (x < WIDTH)


@triton.jit
def _score(q, k, bias, SIMILARITY: tl.constexpr):
    if SIMILARITY == 2:
        return q * k + bias
    difference = q - k
    if SIMILARITY == 1:
        return bias - tl.abs(difference)
    return bias - difference * difference


@triton.jit
def _sign(difference):
    """-1, 0 or 1; NaN for NaN."""
    return tl.where(difference > 0, 1.0, tl.where(difference < 0, -1.0, difference))


@triton.jit(do_not_specialize=["batch", "ONE"])
def _forward_kernel(
    query, key, value, geometry, out, maximum, normaliser, mean_key, batch, ONE,
    QN, QG: tl.constexpr, QY: tl.constexpr, QX: tl.constexpr,
    KN, KG: tl.constexpr, KY: tl.constexpr, KX: tl.constexpr,
    VN, VC: tl.constexpr, VY: tl.constexpr, VX: tl.constexpr,
    GROUPS: tl.constexpr, CHANNELS: tl.constexpr, PER_GROUP: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, OUT_HEIGHT: tl.constexpr, OUT_WIDTH: tl.constexpr,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr, SIMILARITY: tl.constexpr,
    STRIP: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    RADIUS: tl.constexpr = KERNEL // 2
    n, y, x, exists = _locate(batch, OUT_HEIGHT, OUT_WIDTH, STRIP, BLOCK_P)
    g = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)
    alone = g * ONE  # see `_locate`
    m = tl.arange(0, BLOCK_M)
    c = g[:, None] * PER_GROUP + m[None, :]
    has_group = g < GROUPS
    has_channel = (m < PER_GROUP)[None, :] & (c < CHANNELS)
    exists_2d = exists[None, :] & has_group[:, None]

    q = tl.load(query + (n * QN + y * QY + x * QX)[None, :] + alone[:, None] * QG, mask=exists_2d, other=0.0).to(tl.float32)
    keys = key + (n * KN)[None, :] + alone[:, None] * KG
    values = value + (n * VN)[None, :, None] + c[:, None, :] * VC

    largest = tl.full((BLOCK_G, BLOCK_P), float("-inf"), tl.float32)
    for i in range(KERNEL):
        row = y * STRIDE + (i - RADIUS) * DILATION
        for j in tl.static_range(KERNEL):
            column = x * STRIDE + (j - RADIUS) * DILATION
            inside = exists & (row >= 0) & (row < HEIGHT) & (column >= 0) & (column < WIDTH)
            mask = inside[None, :] & has_group[:, None]
            k = tl.load(keys + (row * KY + column * KX)[None, :], mask=mask, other=0.0).to(tl.float32)
            bias = tl.load(geometry + alone * (KERNEL * KERNEL) + i * KERNEL + j, mask=has_group, other=0.0).to(tl.float32)
            score = _score(q, k, bias[:, None], SIMILARITY)
            largest = tl.maximum(largest, tl.where(mask, score, float("-inf")))
    largest = tl.where(exists_2d, largest, 0.0)

    total = tl.zeros((BLOCK_G, BLOCK_P), tl.float32)
    from_query = tl.zeros((BLOCK_G, BLOCK_P), tl.float32)
    sums = tl.zeros((BLOCK_G, BLOCK_P, BLOCK_M), tl.float32)
    for i in range(KERNEL):
        row = y * STRIDE + (i - RADIUS) * DILATION
        for j in tl.static_range(KERNEL):
            column = x * STRIDE + (j - RADIUS) * DILATION
            inside = exists & (row >= 0) & (row < HEIGHT) & (column >= 0) & (column < WIDTH)
            mask = inside[None, :] & has_group[:, None]
            k = tl.load(keys + (row * KY + column * KX)[None, :], mask=mask, other=0.0).to(tl.float32)
            v = tl.load(
                values + (row * VY + column * VX)[None, :, None], mask=mask[:, :, None] & has_channel[:, None, :], other=0.0
            ).to(tl.float32)
            bias = tl.load(geometry + alone * (KERNEL * KERNEL) + i * KERNEL + j, mask=has_group, other=0.0).to(tl.float32)
            weight = tl.where(mask, tl.exp(_score(q, k, bias[:, None], SIMILARITY) - largest), 0.0)
            total += weight
            from_query += weight * (k - q)
            sums += weight[:, :, None] * v

    total = tl.where(exists_2d, total, 1.0)
    at = n * (OUT_HEIGHT * OUT_WIDTH) + y * OUT_WIDTH + x
    at_group = at[None, :] * GROUPS + alone[:, None]
    tl.store(maximum + at_group, largest, mask=exists_2d)
    tl.store(normaliser + at_group, 1.0 / total, mask=exists_2d)
    tl.store(mean_key + at_group, q + from_query / total, mask=exists_2d)
    result = sums / total[:, :, None]
    tl.store(
        out + at[None, :, None] * CHANNELS + c[:, None, :],
        result.to(out.dtype.element_ty), mask=exists_2d[:, :, None] & has_channel[:, None, :],
    )  # fmt: skip


@triton.jit(do_not_specialize=["batch", "ONE"])
def _backward_outputs_kernel(
    query, key, value, geometry, maximum, normaliser, mean_key, grad_out, grad_query, delta, grad_geometry, batch, ONE,
    QN, QG: tl.constexpr, QY: tl.constexpr, QX: tl.constexpr,
    KN, KG: tl.constexpr, KY: tl.constexpr, KX: tl.constexpr,
    VN, VC: tl.constexpr, VY: tl.constexpr, VX: tl.constexpr,
    ON, OC: tl.constexpr, OY: tl.constexpr, OX: tl.constexpr,
    NEEDS_GEOMETRY: tl.constexpr,
    GROUPS: tl.constexpr, CHANNELS: tl.constexpr, PER_GROUP: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, OUT_HEIGHT: tl.constexpr, OUT_WIDTH: tl.constexpr,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr, SIMILARITY: tl.constexpr,
    STRIP: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Per output position: gradient of its query, delta, and its block's share of the geometry's gradient."""
    RADIUS: tl.constexpr = KERNEL // 2
    n, y, x, exists = _locate(batch, OUT_HEIGHT, OUT_WIDTH, STRIP, BLOCK_P)
    g = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)
    alone = g * ONE  # see `_locate`
    m = tl.arange(0, BLOCK_M)
    c = g[:, None] * PER_GROUP + m[None, :]
    has_group = g < GROUPS
    has_channel = (m < PER_GROUP)[None, :] & (c < CHANNELS)
    exists_2d = exists[None, :] & has_group[:, None]
    exists_3d = exists_2d[:, :, None] & has_channel[:, None, :]

    at = (n * (OUT_HEIGHT * OUT_WIDTH) + y * OUT_WIDTH + x)[None, :] * GROUPS + alone[:, None]
    q = tl.load(query + (n * QN + y * QY + x * QX)[None, :] + alone[:, None] * QG, mask=exists_2d, other=0.0).to(tl.float32)
    largest = tl.load(maximum + at, mask=exists_2d, other=0.0)
    share = tl.load(normaliser + at, mask=exists_2d, other=0.0)
    grad = tl.load(grad_out + (n * ON + y * OY + x * OX)[None, :, None] + c[:, None, :] * OC, mask=exists_3d, other=0.0).to(
        tl.float32
    )
    keys = key + (n * KN)[None, :] + alone[:, None] * KG
    values = value + (n * VN)[None, :, None] + c[:, None, :] * VC
    # d score / d query is needed up to what all neighbours have in common, since the weights' gradients sum to zero: keys
    # relative to their weighted mean do not cancel, wherever queries and keys lie.
    middle = tl.load(mean_key + at, mask=exists_2d, other=0.0)

    mean = tl.zeros((BLOCK_G, BLOCK_P), tl.float32)
    mean_slope = tl.zeros((BLOCK_G, BLOCK_P), tl.float32)
    mean_product = tl.zeros((BLOCK_G, BLOCK_P), tl.float32)
    for i in range(KERNEL):
        row = y * STRIDE + (i - RADIUS) * DILATION
        for j in tl.static_range(KERNEL):
            column = x * STRIDE + (j - RADIUS) * DILATION
            inside = exists & (row >= 0) & (row < HEIGHT) & (column >= 0) & (column < WIDTH)
            mask = inside[None, :] & has_group[:, None]
            k = tl.load(keys + (row * KY + column * KX)[None, :], mask=mask, other=0.0).to(tl.float32)
            v = tl.load(
                values + (row * VY + column * VX)[None, :, None], mask=mask[:, :, None] & has_channel[:, None, :], other=0.0
            ).to(tl.float32)
            bias = tl.load(geometry + alone * (KERNEL * KERNEL) + i * KERNEL + j, mask=has_group, other=0.0).to(tl.float32)
            weight = tl.where(mask, tl.exp(_score(q, k, bias[:, None], SIMILARITY) - largest) * share, 0.0)
            by_weight = tl.sum(grad * v, axis=2)
            slope = -_sign(q - k) if SIMILARITY == 1 else k - middle
            mean += weight * by_weight
            mean_slope += weight * slope
            mean_product += weight * by_weight * slope
    by_query = mean_product - mean * mean_slope
    if SIMILARITY == 0:
        by_query *= 2.0
    grad_at = grad_query + at
    tl.store(grad_at, by_query.to(grad_query.dtype.element_ty), mask=exists_2d)
    tl.store(delta + at, mean, mask=exists_2d)

    if NEEDS_GEOMETRY:
        for i in range(KERNEL):
            row = y * STRIDE + (i - RADIUS) * DILATION
            for j in tl.static_range(KERNEL):
                column = x * STRIDE + (j - RADIUS) * DILATION
                inside = exists & (row >= 0) & (row < HEIGHT) & (column >= 0) & (column < WIDTH)
                mask = inside[None, :] & has_group[:, None]
                k = tl.load(keys + (row * KY + column * KX)[None, :], mask=mask, other=0.0).to(tl.float32)
                v = tl.load(
                    values + (row * VY + column * VX)[None, :, None],
                    mask=mask[:, :, None] & has_channel[:, None, :], other=0.0,
                ).to(tl.float32)  # fmt: skip
                tap = alone * (KERNEL * KERNEL) + i * KERNEL + j
                bias = tl.load(geometry + tap, mask=has_group, other=0.0).to(tl.float32)
                weight = tl.where(mask, tl.exp(_score(q, k, bias[:, None], SIMILARITY) - largest) * share, 0.0)
                by_score = tl.sum(weight * (tl.sum(grad * v, axis=2) - mean), axis=1)
                block = tl.program_id(0).to(tl.int64) * (GROUPS * KERNEL * KERNEL)
                tl.store(grad_geometry + block + tap, by_score, mask=has_group)


@triton.jit(do_not_specialize=["batch", "ONE"])
def _backward_inputs_kernel(
    query, key, value, geometry, maximum, normaliser, grad_out, delta, grad_key, grad_value, batch, ONE,
    QN, QG: tl.constexpr, QY: tl.constexpr, QX: tl.constexpr,
    KN, KG: tl.constexpr, KY: tl.constexpr, KX: tl.constexpr,
    VN, VC: tl.constexpr, VY: tl.constexpr, VX: tl.constexpr,
    ON, OC: tl.constexpr, OY: tl.constexpr, OX: tl.constexpr,
    GROUPS: tl.constexpr, CHANNELS: tl.constexpr, PER_GROUP: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, OUT_HEIGHT: tl.constexpr, OUT_WIDTH: tl.constexpr,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr, SIMILARITY: tl.constexpr,
    STRIP: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Per input position: gradients of its key and value, gathered from the outputs that see it."""
    RADIUS: tl.constexpr = KERNEL // 2
    n, y, x, exists = _locate(batch, HEIGHT, WIDTH, STRIP, BLOCK_P)
    g = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)
    alone = g * ONE  # see `_locate`
    m = tl.arange(0, BLOCK_M)
    c = g[:, None] * PER_GROUP + m[None, :]
    has_group = g < GROUPS
    has_channel = (m < PER_GROUP)[None, :] & (c < CHANNELS)
    exists_2d = exists[None, :] & has_group[:, None]
    exists_3d = exists_2d[:, :, None] & has_channel[:, None, :]

    k = tl.load(key + (n * KN + y * KY + x * KX)[None, :] + alone[:, None] * KG, mask=exists_2d, other=0.0).to(tl.float32)
    v = tl.load(value + (n * VN + y * VY + x * VX)[None, :, None] + c[:, None, :] * VC, mask=exists_3d, other=0.0).to(
        tl.float32
    )
    queries = query + (n * QN)[None, :] + alone[:, None] * QG
    grads = grad_out + (n * ON)[None, :, None] + c[:, None, :] * OC
    outputs = (n * (OUT_HEIGHT * OUT_WIDTH * GROUPS))[None, :] + alone[:, None]

    by_key = tl.zeros((BLOCK_G, BLOCK_P), tl.float32)
    by_value = tl.zeros((BLOCK_G, BLOCK_P, BLOCK_M), tl.float32)
    for i in range(KERNEL):
        # stride * row: of the output that has this position as its tap (i, j)
        row_at = y - (i - RADIUS) * DILATION
        row = row_at // STRIDE
        row_inside = (row_at >= 0) & (row_at % STRIDE == 0) & (row < OUT_HEIGHT)
        for j in tl.static_range(KERNEL):
            column_at = x - (j - RADIUS) * DILATION
            column = column_at // STRIDE
            inside = exists & row_inside & (column_at >= 0) & (column_at % STRIDE == 0) & (column < OUT_WIDTH)
            mask = inside[None, :] & has_group[:, None]
            q = tl.load(queries + (row * QY + column * QX)[None, :], mask=mask, other=0.0).to(tl.float32)
            grad = tl.load(
                grads + (row * OY + column * OX)[None, :, None], mask=mask[:, :, None] & has_channel[:, None, :], other=0.0
            ).to(tl.float32)
            at = outputs + ((row * OUT_WIDTH + column) * GROUPS)[None, :]
            largest = tl.load(maximum + at, mask=mask, other=0.0)
            share = tl.load(normaliser + at, mask=mask, other=0.0)
            mean = tl.load(delta + at, mask=mask, other=0.0)
            bias = tl.load(geometry + alone * (KERNEL * KERNEL) + i * KERNEL + j, mask=has_group, other=0.0).to(tl.float32)
            weight = tl.where(mask, tl.exp(_score(q, k, bias[:, None], SIMILARITY) - largest) * share, 0.0)
            by_score = weight * (tl.sum(grad * v, axis=2) - mean)
            if SIMILARITY == 0:
                by_key += by_score * (2.0 * (q - k))
            elif SIMILARITY == 1:
                by_key += by_score * _sign(q - k)
            else:
                by_key += by_score * q
            by_value += weight[:, :, None] * grad

    at = n * (HEIGHT * WIDTH) + y * WIDTH + x
    tl.store(grad_key + at[None, :] * GROUPS + alone[:, None], by_key.to(grad_key.dtype.element_ty), mask=exists_2d)
    tl.store(
        grad_value + at[None, :, None] * CHANNELS + c[:, None, :],
        by_value.to(grad_value.dtype.element_ty), mask=exists_3d,
    )  # fmt: skip


#: Under TRITON_INTERPRET=1 the kernels run on CPU tensors, as Python: the way they are tested without a GPU.
IS_INTERPRETED = not isinstance(_forward_kernel, triton.JITFunction)


def _strip_width(width: int) -> int:
    """Strips as equal as possible, of about 16 positions; maps up to twice that are not cut."""
    return width if width <= 32 else -(-width // -(-width // 16))


def _block_positions(value: Tensor, block_channels: int) -> int:
    numbers, _ = BLOCKS[value.element_size()]
    return max(8, numbers // (BLOCK_GROUPS * block_channels))


@functools.lru_cache(maxsize=4096)
def _constants(
    query_shape: torch.Size, value_shape: torch.Size, kernel_size: int, strides: tuple[tuple[str, tuple[int, ...]], ...],
    stride: int, dilation: int, similarity: str, per_group: int,
) -> dict[str, int]:  # fmt: skip
    """What kernels are told beside tensors: the same for all calls of a layer, and longer to put together than a launch.

    Args:
        strides: of tensors, from image to image, channel to channel, row to row and column to column, by their letter.
    """
    constants = {
        "ONE": 1,
        "batch": value_shape[0],
        "GROUPS": query_shape[1],
        "CHANNELS": value_shape[1],
        "PER_GROUP": per_group,
        "HEIGHT": value_shape[2],
        "WIDTH": value_shape[3],
        "OUT_HEIGHT": query_shape[2],
        "OUT_WIDTH": query_shape[3],
        "KERNEL": kernel_size,
        "STRIDE": stride,
        "DILATION": dilation,
        "SIMILARITY": SIMILARITY_CODES[similarity],
        "BLOCK_M": triton.next_power_of_2(per_group),
    }
    for name, by_axis in strides:
        channel = "C" if name in "VO" else "G"
        constants |= dict(zip((f"{name}N", f"{name}{channel}", f"{name}Y", f"{name}X"), by_axis, strict=True))
    return constants


def _arguments(query, key, value, geometry, stride, dilation, similarity, per_group, grad_out=None) -> dict[str, Any]:
    """What all kernels are given."""
    strides = ("Q", query.stride()), ("K", key.stride()), ("V", value.stride())
    if grad_out is not None:
        strides += (("O", grad_out.stride()),)
    sizes = (query.shape, value.shape, geometry.shape[-1], strides)
    constants = _constants(*sizes, stride, dilation, similarity, per_group)
    return {"query": query, "key": key, "value": value, "geometry": geometry.contiguous(), **constants}


def _blocks(shape: torch.Size, block_positions: int) -> int:
    """How many programs cover the positions of all images of a (N, *, H, W) tensor."""
    batch, _, height, width = shape
    strip = _strip_width(width)
    return triton.cdiv(batch * height * strip * triton.cdiv(width, strip), block_positions)


def _launch(kernel, positions: Tensor, arguments: dict[str, Any]) -> None:
    """Runs a kernel over the positions of a (N, *, H, W) tensor and all groups."""
    value = arguments["value"]
    block_p = _block_positions(value, arguments["BLOCK_M"])
    grid = (_blocks(positions.shape, block_p), triton.cdiv(arguments["GROUPS"], BLOCK_GROUPS))
    blocks = {"STRIP": _strip_width(positions.shape[3]), "BLOCK_P": block_p, "BLOCK_G": BLOCK_GROUPS}
    _, warps = BLOCKS[value.element_size()]
    _run(kernel, grid, arguments | blocks, warps)


#: What Triton compiled, by all that it looks at to tell whether it has: the device, types and alignment of tensors,
#: and numbers.
_compiled: dict[tuple, Any] = {}

#: From 3.3 on a compiled kernel takes the arguments of its source, constants among them.
_HAS_FULL_SIGNATURES = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 3)


def _run(kernel, grid: tuple[int, int], arguments: dict[str, Any], warps: int) -> None:
    """`kernel[grid](**arguments)`, past the search for what is compiled already, which takes longer than small maps do."""
    if IS_INTERPRETED or not _HAS_FULL_SIGNATURES:
        kernel[grid](**arguments, num_warps=warps)
        return
    values = [arguments[name] for name in kernel.arg_names]
    key = (kernel, torch.cuda.current_device(), warps)
    # All but the number of images, which makes no other kernel.
    told = (x for name, x in zip(kernel.arg_names, values, strict=True) if name != "batch")
    key += tuple((x.dtype, x.data_ptr() % 16 == 0) if isinstance(x, Tensor) else x for x in told)
    compiled = _compiled.get(key)
    if compiled is None:
        _compiled[key] = kernel[grid](**arguments, num_warps=warps)
    else:
        compiled[(*grid, 1)](*values)


def _allocate_outputs(query: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    batch, groups, *size = query.shape
    out = new_channels_last(value, (batch, value.shape[1], *size))
    return out, *(new_channels_last(query, (batch, groups, *size), torch.float32) for _ in range(3))


def _allocate_gradients(query: Tensor, key: Tensor, value: Tensor, geometry: Tensor, needs_geometry: bool):
    grads = [new_channels_last(x, x.shape) for x in (query, key, value)]
    return *grads, geometry.new_empty(geometry.shape if needs_geometry else 0)


def _forward(
    query: Tensor, key: Tensor, value: Tensor, geometry: Tensor,
    stride: int, dilation: int, similarity: str, per_group: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The output, and of every window in float32 the largest score, the inverse of its normaliser, and the mean key."""
    out, maximum, normaliser, mean_key = _allocate_outputs(query, value)
    if query.shape[0]:
        arguments = _arguments(query, key, value, geometry, stride, dilation, similarity, per_group)
        with _on(value):
            results = {"out": out, "maximum": maximum, "normaliser": normaliser, "mean_key": mean_key}
            _launch(_forward_kernel, query, arguments | results)
    return out, maximum, normaliser, mean_key


def _backward(
    query: Tensor, key: Tensor, value: Tensor, geometry: Tensor,
    maximum: Tensor, normaliser: Tensor, mean_key: Tensor, grad_out: Tensor,
    stride: int, dilation: int, similarity: str, per_group: int, needs_geometry: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of query, key, value and geometry; that of the geometry is empty if it is not needed."""
    *grads, grad_geometry = _allocate_gradients(query, key, value, geometry, needs_geometry)
    if not query.shape[0]:
        return *grads, grad_geometry.zero_()
    delta = torch.empty_like(maximum)
    arguments = _arguments(query, key, value, geometry, stride, dilation, similarity, per_group, grad_out)
    # One row a program, added up in their order by torch: atomic additions would come in any order.
    blocks = _blocks(query.shape, _block_positions(value, arguments["BLOCK_M"])) if needs_geometry else 0
    by_block = maximum.new_empty((blocks, *geometry.shape))
    arguments |= {"maximum": maximum, "normaliser": normaliser, "grad_out": grad_out, "delta": delta}
    by_output = {"mean_key": mean_key, "grad_query": grads[0], "grad_geometry": by_block, "NEEDS_GEOMETRY": needs_geometry}
    by_input = {"grad_key": grads[1], "grad_value": grads[2]}
    with _on(value):
        _launch(_backward_outputs_kernel, query, arguments | by_output)
        _launch(_backward_inputs_kernel, key, arguments | by_input)
    if needs_geometry:
        grad_geometry.copy_(by_block.sum(0))
    return *grads, grad_geometry


def _on(tensor: Tensor) -> AbstractContextManager:
    """Triton launches on the current device, whatever the tensors' is."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


_local_relation = build_operation(
    "local_relation", forward=_forward, backward=_backward, allocate_outputs=_allocate_outputs,
    allocate_gradients=_allocate_gradients, device_types=("cpu", "cuda"),
)  # fmt: skip


def local_relation_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    geometry: Tensor,
    *,
    stride: int,
    dilation: int,
    similarity: str,
    channels_per_group: int,
) -> Tensor:
    """Same arguments and result as `local_relation`, which checks them first. Differentiable once."""
    return _local_relation(query, key, value, geometry, stride, dilation, similarity, channels_per_group)
