"""The local relation as one fused loop on the CPU, forward and backward, compiled by numba.

Every (image, group) pair is an independent problem of the same shape, so the loop runs `LANES` of them
at once, one in each lane of a vector register: no reduction ever crosses lanes, maps of 2x2 vectorise
as well as maps of 56x56, and lanes stay full whatever the number of groups. The windows are never
materialised: one row of k*k scores lives in the first-level cache, and the backward pass recomputes the
weights from the saved maximum and normaliser of each softmax.

numba would leave the vectorising to LLVM's heuristics, which keep the accumulators in memory; the small
vector type below says explicitly what is held in registers. All functions stay in this file because
numba's on-disk cache notices changes of this file only.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import llvmlite.binding
import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.core import event
from numba.core.caching import FunctionCache
from numba.extending import intrinsic, models, register_model
from torch import Tensor

from lrrobust.ops._operation import build_operation, new_channels_last

#: Lanes of a vector: one AVX-512 register, or one of AVX2 and narrower machines' register pairs.
LANES = 16 if llvmlite.binding.get_host_cpu_features().get("avx512f") else 8
#: Channels aggregated together; wider groups are run as several slabs of this many channels.
SLAB = 8
#: Channels of a slab whose sums are in registers at once: with two windows, eight sums hide the latency of the
#: arithmetic, and the sixteen registers of AVX2 hold them together with what they are computed from.
QUAD = 4

SIMILARITY_CODES = {"squared_difference": 0, "absolute_difference": 1, "multiplication": 2}


class _Cache(FunctionCache):
    """numba's cache on disk, which may fail at any time: then what is compiled serves this process alone."""

    _is_failure_said = False

    def load_overload(self, sig, target_context):
        try:
            return super().load_overload(sig, target_context)
        except Exception:
            # Cut short by a power cut or a full disk: what cannot be read is made anew, unpickling raises whatever strikes it.
            with contextlib.suppress(OSError):
                self.flush()
            return None

    def save_overload(self, sig, data):
        try:
            super().save_overload(sig, data)
        except OSError as error:
            if not _Cache._is_failure_said:
                reason = f"{self.cache_path} cannot be written ({error.strerror}): the next start compiles again"
                print(f"lrrobust: {reason}; NUMBA_CACHE_DIR can name another folder", file=sys.stderr)
                _Cache._is_failure_said = True


def _compiled(function, **options):
    """Compiled at first use; kept on disk, unless no folder for it can be written (containers)."""
    dispatcher = njit(nogil=True, **options)(function)
    # What `cache=True` does, but for the class.
    with contextlib.suppress(RuntimeError):
        dispatcher._cache = _Cache(function)
    return dispatcher


_compiled_inline = functools.partial(_compiled, inline="always")

# --- a vector of LANES float32 as a numba type -------------------------------------------------------

_FLOAT = ir.FloatType()
_INT = ir.IntType(32)
_VECTOR = ir.VectorType(_FLOAT, LANES)
_INT_VECTOR = ir.VectorType(_INT, LANES)


class _VectorType(types.Type):
    def __init__(self) -> None:
        super().__init__(name=f"float32x{LANES}")


_vector = _VectorType()


@register_model(_VectorType)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, kind) -> None:
        super().__init__(manager, kind, _VECTOR)


def _splat_constant(number: float) -> ir.Constant:
    return ir.Constant(_VECTOR, [number] * LANES)


def _vector_function(builder, name: str, arity: int) -> ir.Function:
    """LLVM's own function `name` for our vectors, declared in the module being built."""
    mangled = f"llvm.{name}.v{LANES}f32"
    known = builder.module.globals.get(mangled)
    return known or ir.Function(builder.module, ir.FunctionType(_VECTOR, [_VECTOR] * arity), mangled)


def _address(context, builder, array_type, array, offset):
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [offset]), _VECTOR.as_pointer())


@intrinsic
def _load(typing_context, array, offset):
    """array[offset : offset + LANES] of a flat float32 array."""

    def codegen(context, builder, signature, arguments):
        return builder.load(_address(context, builder, signature.args[0], *arguments), align=4)

    return _vector(array, types.intp), codegen


@intrinsic
def _store(typing_context, array, offset, vector):
    def codegen(context, builder, signature, arguments):
        builder.store(arguments[2], _address(context, builder, signature.args[0], *arguments[:2]), align=4)
        return context.get_dummy_value()

    return types.void(array, types.intp, _vector), codegen


@intrinsic
def _splat(typing_context, number):
    def codegen(context, builder, signature, arguments):
        single = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), arguments[0], ir.Constant(_INT, 0))
        return builder.shuffle_vector(single, single, ir.Constant(_INT_VECTOR, [0] * LANES))

    return _vector(types.float32), codegen


def _binary(operation: str):
    @intrinsic
    def apply(typing_context, left, right):
        def codegen(context, builder, signature, arguments):
            return getattr(builder, operation)(*arguments)

        return _vector(_vector, _vector), codegen

    return apply


_add, _sub, _mul, _div = (_binary(operation) for operation in ("fadd", "fsub", "fmul", "fdiv"))


@intrinsic
def _fma(typing_context, left, right, addend):
    """left * right + addend, rounded once."""

    def codegen(context, builder, signature, arguments):
        return builder.call(_vector_function(builder, "fma", 3), arguments)

    return _vector(_vector, _vector, _vector), codegen


@intrinsic
def _max(typing_context, left, right):
    """The larger of the two; where either is NaN, the right one."""

    def codegen(context, builder, signature, arguments):
        return builder.select(builder.fcmp_ordered(">", *arguments), *arguments)

    return _vector(_vector, _vector), codegen


@intrinsic
def _sign(typing_context, vector):
    """-1, 0 or 1; NaN for NaN."""

    def codegen(context, builder, signature, arguments):
        (operand,) = arguments
        zero = _splat_constant(0.0)
        positive = builder.fcmp_ordered(">", operand, zero)
        negative = builder.fcmp_ordered("<", operand, zero)
        magnitude = builder.select(negative, _splat_constant(-1.0), operand)
        return builder.select(positive, _splat_constant(1.0), magnitude)

    return _vector(_vector), codegen


#: 2^r on |r| <= 1/2: a polynomial fitted once, at import, at Chebyshev nodes in float64 (relative error
#: 1e-7 before rounding).
_NODES = np.cos((2 * np.arange(64) + 1) * np.pi / 128) / 2
_EXP2_COEFFICIENTS = np.polynomial.chebyshev.Chebyshev.fit(_NODES, np.exp2(_NODES), 5).convert(
    kind=np.polynomial.Polynomial
).coef
#: Added to a float32 below 2^22 in size, it leaves the nearest whole number in the lowest bits.
_ROUNDER = 1.5 * 2.0**23


@intrinsic
def _exp(typing_context, vector):
    """exp(x) for x <= 0: 2^n * 2^r with x / ln(2) = n + r; below -87 it gives about 1e-38. NaN for NaN.

    Half of the arithmetic of a window is here, so every instruction counts: the whole number n is found by
    an addition that rounds, and goes into the exponent's bits by a shift.
    """

    def codegen(context, builder, signature, arguments):
        (operand,) = arguments
        fma = _vector_function(builder, "fma", 3)
        lowest = _splat_constant(-87.0)
        clipped = builder.select(builder.fcmp_ordered(">", lowest, operand), lowest, operand)
        per_octave = _splat_constant(1 / np.log(2))
        rounded = builder.call(fma, [clipped, per_octave, _splat_constant(_ROUNDER)])
        whole = builder.fsub(rounded, _splat_constant(_ROUNDER))
        rest = builder.call(fma, [clipped, per_octave, builder.fneg(whole)])
        power = _splat_constant(float(_EXP2_COEFFICIENTS[-1]))
        for coefficient in _EXP2_COEFFICIENTS[-2::-1]:
            power = builder.call(fma, [power, rest, _splat_constant(float(coefficient))])
        # A multiplication, not an addition of the bits: it keeps a NaN a NaN.
        shifted = builder.shl(builder.bitcast(rounded, _INT_VECTOR), ir.Constant(_INT_VECTOR, [23] * LANES))
        scale = builder.bitcast(builder.add(shifted, ir.Constant(_INT_VECTOR, [127 << 23] * LANES)), _VECTOR)
        return builder.fmul(power, scale)

    return _vector(_vector), codegen


# --- transposing tiles: LANES rows of SLAB channels <-> SLAB vectors of LANES ------------------------

_ROW = ir.VectorType(_FLOAT, SLAB)


def _row_address(context, builder, signature, arguments, lane: int):
    """Address of one lane's channels: in the tensor, or in its spare row where the group is not full."""
    array_type, bases_type, spare_type = signature.args[0], signature.args[1], signature.args[3]
    array, bases, offset, spare = arguments[:4]
    bases_data = context.make_array(bases_type)(context, builder, bases).data
    base = builder.load(builder.gep(bases_data, [ir.Constant(ir.IntType(64), lane)]))
    data = context.make_array(array_type)(context, builder, array).data
    spare_data = context.make_array(spare_type)(context, builder, spare).data
    is_full = builder.icmp_signed(">=", base, ir.Constant(base.type, 0))
    inside = builder.gep(data, [builder.add(base, offset)])
    aside = builder.gep(spare_data, [ir.Constant(ir.IntType(64), lane * SLAB)])
    return builder.bitcast(builder.select(is_full, inside, aside), _ROW.as_pointer())


def _shuffle(builder, left, right, indices):
    mask = ir.Constant(ir.VectorType(_INT, len(indices)), list(indices))
    return builder.shuffle_vector(left, right, mask)


def _transpose_blocks(builder, vectors):
    """Transposes every SLAB x SLAB block of SLAB vectors, whose length is a multiple of SLAB."""
    length = vectors[0].type.count
    span = SLAB // 2
    while span:
        swapped = list(vectors)
        for i in range(SLAB):
            if i & span == 0:
                low, high = vectors[i], vectors[i + span]
                # Exchange the off-diagonal halves of blocks of 2 * span.
                first = [e if e & span == 0 else length + e - span for e in range(length)]
                second = [e + span if e & span == 0 else length + e for e in range(length)]
                swapped[i] = _shuffle(builder, low, high, first)
                swapped[i + span] = _shuffle(builder, low, high, second)
        vectors = swapped
        span //= 2
    return vectors


@intrinsic
def _gather_tile(typing_context, array, bases, offset, spare, scratch, at):
    """scratch[at + j * LANES + l] = array[bases[l] + offset + j] for all j < SLAB and lanes l.

    Lanes with a negative base are read from their row of `spare`.
    """

    def codegen(context, builder, signature, arguments):
        rows = [
            builder.load(_row_address(context, builder, signature, arguments, lane), align=4) for lane in range(LANES)
        ]
        if LANES == 2 * SLAB:
            rows = [_shuffle(builder, rows[i], rows[i + SLAB], range(LANES)) for i in range(SLAB)]
        for j, vector in enumerate(_transpose_blocks(builder, rows)):
            place = builder.add(arguments[5], ir.Constant(arguments[5].type, j * LANES))
            builder.store(vector, _address(context, builder, signature.args[4], arguments[4], place), align=4)
        return context.get_dummy_value()

    return types.void(array, bases, types.intp, spare, scratch, types.intp), codegen


@intrinsic
def _scatter_tile(typing_context, array, bases, offset, spare, scratch, at):
    """The way back of `_gather_tile`."""

    def codegen(context, builder, signature, arguments):
        vectors = []
        for j in range(SLAB):
            place = builder.add(arguments[5], ir.Constant(arguments[5].type, j * LANES))
            vectors.append(builder.load(_address(context, builder, signature.args[4], arguments[4], place), align=4))
        rows = _transpose_blocks(builder, vectors)
        if LANES == 2 * SLAB:
            low = [_shuffle(builder, row, row, range(SLAB)) for row in rows]
            high = [_shuffle(builder, row, row, range(SLAB, LANES)) for row in rows]
            rows = low + high
        for lane, row in enumerate(rows):
            builder.store(row, _row_address(context, builder, signature, arguments, lane), align=4)
        return context.get_dummy_value()

    return types.void(array, bases, types.intp, spare, scratch, types.intp), codegen


# --- moving LANES (image, group) pairs between tensors and lane-minor scratch ------------------------
# Tensors are flat and channels-last, so the channels of a group are neighbours in memory. Scratch is flat
# too: pixel-major, then channel within the group (padded to whole slabs), then lane. It holds single rows
# of the outputs, and of the inputs a ring of as many rows as a window is high (row y in slot y mod `ring`),
# so that what is worked on stays in the second-level cache however large the map is.


@_compiled
def _gather_groups(source, first, pairs, groups, pixels, row, width, scratch, at):
    """scratch[at + x, l] = source[n, row, x, g] for the lanes l of the block that starts at pair `first`."""
    for lane in range(LANES):
        pair = first + lane
        if pair < pairs:
            base = ((pair // groups) * pixels + row * width) * groups + pair % groups
            for x in range(width):
                scratch[(at + x) * LANES + lane] = source[base + x * groups]
        else:
            for x in range(width):
                scratch[(at + x) * LANES + lane] = 0.0


@_compiled
def _scatter_groups(scratch, at, first, pairs, groups, pixels, row, width, target):
    for lane in range(min(LANES, pairs - first)):
        base = (((first + lane) // groups) * pixels + row * width) * groups + (first + lane) % groups
        for x in range(width):
            target[base + x * groups] = scratch[(at + x) * LANES + lane]


@_compiled
def _locate_lanes(first, pairs, groups, channels, per_group, slabs, pixels, bases, starts, counts):
    """Where the channels of each slab and lane begin, and how many they are; -1 in `bases` unless SLAB."""
    for slab in range(slabs):
        for lane in range(LANES):
            pair = first + lane
            counts[slab, lane] = 0
            if pair < pairs:
                c = (pair % groups) * per_group + slab * SLAB
                end = min((pair % groups) * per_group + per_group, channels)
                starts[slab, lane] = (pair // groups) * pixels * channels + c
                counts[slab, lane] = max(0, min(SLAB, end - c))
            bases[slab, lane] = starts[slab, lane] if counts[slab, lane] == SLAB else -1


@_compiled
def _gather_channels(source, lanes, channels, row, width, spare, scratch, at):
    """scratch[at + x, j, l] = source[n, row, x, g * per_group + j]; zero where that does not exist."""
    bases, starts, counts = lanes
    slabs = bases.shape[0]
    for slab in range(slabs):
        spare[:] = 0.0
        for x in range(width):
            offset = (row * width + x) * channels
            for lane in range(LANES):
                if bases[slab, lane] < 0:
                    for j in range(counts[slab, lane]):
                        spare[lane * SLAB + j] = source[starts[slab, lane] + offset + j]
            _gather_tile(source, bases[slab], offset, spare, scratch, ((at + x) * slabs + slab) * SLAB * LANES)


@_compiled
def _scatter_channels(scratch, at, lanes, channels, row, width, spare, target):
    bases, starts, counts = lanes
    slabs = bases.shape[0]
    for slab in range(slabs):
        for x in range(width):
            offset = (row * width + x) * channels
            _scatter_tile(target, bases[slab], offset, spare, scratch, ((at + x) * slabs + slab) * SLAB * LANES)
            for lane in range(LANES):
                if bases[slab, lane] < 0:
                    for j in range(counts[slab, lane]):
                        target[starts[slab, lane] + offset + j] = spare[lane * SLAB + j]


@_compiled
def _gather_geometry(geometry, first, scratch):
    groups, taps = geometry.shape
    for t in range(taps):
        for lane in range(LANES):
            scratch[t * LANES + lane] = geometry[(first + lane) % groups, t]


# --- two neighbouring output positions ---------------------------------------------------------------
# Their windows share most columns, so values are loaded once for both. The weights of both live in rows of
# `columns` entries, one for each column of the united window, zero outside their own window.


@_compiled_inline
def _tap_range(position, size, kernel_size, dilation):
    """The taps of a window centred at `position` that fall inside [0, size): [start, stop)."""
    radius = (kernel_size - 1) // 2
    start = max(0, radius - position // dilation)
    stop = min(kernel_size, radius + (size - 1 - position) // dilation + 1)
    return start, stop


@_compiled_inline
def _score(query, key, geometry, similarity):
    if similarity == 0:
        difference = _sub(query, key)
        return _fma(_mul(difference, _splat(np.float32(-1.0))), difference, geometry)
    if similarity == 1:
        difference = _sub(query, key)
        return _fma(_mul(difference, _splat(np.float32(-1.0))), _sign(difference), geometry)
    return _fma(query, key, geometry)


@_compiled
def _window_weights(
    query, k, g, rows, cx, y0, y1, x0, x1, shift, columns, kernel_size, dilation, similarity,
    is_known, largest, scale, weights,
):
    """Writes scale * exp(score - maximum) of the taps inside the image, and zero in the other columns.

    Args:
        rows: for each tap row, the scratch pixel at which its input row begins.
        shift: column of the united window at which this window begins.
        is_known: whether `largest` is the maximum of the scores; otherwise it is found.

    Returns:
        the maximum of the scores and the sum of what was written.
    """
    radius = (kernel_size - 1) // 2
    zero = _splat(np.float32(0.0))
    found = _splat(np.float32(-np.inf))
    for ty in range(y0, y1):
        base = ty * columns + shift
        for tx in range(x0, x1):
            p = rows[ty] + cx + (tx - radius) * dilation
            score = _score(query, _load(k, p * LANES), _load(g, (ty * kernel_size + tx) * LANES), similarity)
            _store(weights, (base + tx) * LANES, score)
            found = _max(score, found)
    if is_known:
        found = largest
    total = zero
    for ty in range(y0, y1):
        base = ty * columns
        for u in range(x0 + shift):
            _store(weights, (base + u) * LANES, zero)
        for u in range(x0 + shift, x1 + shift):
            weight = _mul(_exp(_sub(_load(weights, (base + u) * LANES), found)), scale)
            _store(weights, (base + u) * LANES, weight)
            total = _add(total, weight)
        for u in range(x1 + shift, columns):
            _store(weights, (base + u) * LANES, zero)
    return found, total


@_compiled_inline
def _load_quad(source, at):
    return _load(source, at), _load(source, at + LANES), _load(source, at + 2 * LANES), _load(source, at + 3 * LANES)


@_compiled_inline
def _store_quad(target, at, scale, s0, s1, s2, s3):
    _store(target, at, _mul(s0, scale))
    _store(target, at + LANES, _mul(s1, scale))
    _store(target, at + 2 * LANES, _mul(s2, scale))
    _store(target, at + 3 * LANES, _mul(s3, scale))


@_compiled_inline
def _pairing(kernel_size, stride, dilation):
    """How many neighbouring outputs are computed together, and by how many columns their windows differ.

    One at a time where the taps of neighbours fall on different pixels or their windows do not meet.
    """
    if stride % dilation == 0 and stride // dilation < kernel_size:
        return 2, stride // dilation
    return 1, 0


@_compiled
def _forward_row(
    q, k, v, g, y, maximum, normaliser, at, rows, y0, y1, width, out_width, slabs,
    kernel_size, stride, dilation, similarity, weights, next_weights,
):
    radius = (kernel_size - 1) // 2
    zero = _splat(np.float32(0.0))
    one = _splat(np.float32(1.0))
    together, shift = _pairing(kernel_size, stride, dilation)
    columns = kernel_size + shift
    quads = slabs * (SLAB // QUAD)
    for ox in range(0, out_width, together):
        cx = ox * stride
        x0, x1 = _tap_range(cx, width, kernel_size, dilation)
        largest, total = _window_weights(
            _load(q, ox * LANES), k, g, rows, cx, y0, y1, x0, x1, 0, columns, kernel_size, dilation, similarity,
            False, zero, one, weights,
        )
        inverse = _div(one, total)
        _store(maximum, (at + ox) * LANES, largest)
        _store(normaliser, (at + ox) * LANES, inverse)
        has_next = together == 2 and ox + 1 < out_width
        next_inverse = one
        if has_next:
            n0, n1 = _tap_range(cx + stride, width, kernel_size, dilation)
            largest, total = _window_weights(
                _load(q, (ox + 1) * LANES), k, g, rows, cx + stride, y0, y1, n0, n1, shift, columns, kernel_size,
                dilation, similarity, False, zero, one, next_weights,
            )
            next_inverse = _div(one, total)
            _store(maximum, (at + ox + 1) * LANES, largest)
            _store(normaliser, (at + ox + 1) * LANES, next_inverse)
            x1 = n1 + shift
        for quad in range(quads):
            s0, s1, s2, s3, n0, n1, n2, n3 = zero, zero, zero, zero, zero, zero, zero, zero
            for ty in range(y0, y1):
                base = rows[ty] + cx - radius * dilation
                for u in range(x0, x1):
                    b = ((base + u * dilation) * quads + quad) * QUAD * LANES
                    weight = _load(weights, (ty * columns + u) * LANES)
                    next_weight = _load(next_weights, (ty * columns + u) * LANES)
                    value = _load(v, b)
                    s0, n0 = _fma(weight, value, s0), _fma(next_weight, value, n0)
                    value = _load(v, b + LANES)
                    s1, n1 = _fma(weight, value, s1), _fma(next_weight, value, n1)
                    value = _load(v, b + 2 * LANES)
                    s2, n2 = _fma(weight, value, s2), _fma(next_weight, value, n2)
                    value = _load(v, b + 3 * LANES)
                    s3, n3 = _fma(weight, value, s3), _fma(next_weight, value, n3)
            _store_quad(y, (ox * quads + quad) * QUAD * LANES, inverse, s0, s1, s2, s3)
            if has_next:
                _store_quad(y, ((ox + 1) * quads + quad) * QUAD * LANES, next_inverse, n0, n1, n2, n3)


@_compiled
def _query_backward(
    query, k, rows, cx, y0, y1, x0, x1, shift, columns, kernel_size, dilation, similarity,
    weights, grad_weights, grad_k, grad_g, needs_geometry,
):
    """From the weights and their gradients to those of query (returned), keys and geometry (added)."""
    radius = (kernel_size - 1) // 2
    zero = _splat(np.float32(0.0))
    two = _splat(np.float32(2.0))
    # The softmax's Jacobian subtracts the weighted mean of the weights' gradients.
    mean_grad = zero
    for ty in range(y0, y1):
        for u in range(x0 + shift, x1 + shift):
            tap = (ty * columns + u) * LANES
            mean_grad = _fma(_load(weights, tap), _load(grad_weights, tap), mean_grad)
    query_grad = zero
    for ty in range(y0, y1):
        for tx in range(x0, x1):
            p = (rows[ty] + cx + (tx - radius) * dilation) * LANES
            tap = (ty * columns + tx + shift) * LANES
            score_grad = _mul(_load(weights, tap), _sub(_load(grad_weights, tap), mean_grad))
            key = _load(k, p)
            if similarity == 2:
                by_query = _mul(score_grad, key)
                by_key = _mul(score_grad, query)
            else:
                difference = _sub(query, key)
                slope = _mul(two, difference) if similarity == 0 else _sign(difference)
                by_key = _mul(score_grad, slope)
                by_query = _sub(zero, by_key)
            query_grad = _add(query_grad, by_query)
            _store(grad_k, p, _add(_load(grad_k, p), by_key))
            if needs_geometry:
                t = (ty * kernel_size + tx) * LANES
                _store(grad_g, t, _add(_load(grad_g, t), score_grad))
    return query_grad


@_compiled_inline
def _channel_backward(v, grad_v, b, weight, next_weight, d, n, grad, next_grad):
    """One channel's part in the gradients of both weights; adds that of the value to `grad_v`."""
    value = _load(v, b)
    _store(grad_v, b, _fma(weight, d, _fma(next_weight, n, _load(grad_v, b))))
    return _fma(d, value, grad), _fma(n, value, next_grad)


@_compiled
def _backward_row(
    q, k, v, g, maximum, normaliser, at, grad_y, grad_q, grad_k, grad_v, grad_g, rows, y0, y1, width, out_width, slabs,
    kernel_size, stride, dilation, similarity, needs_geometry, weights, next_weights, grad_weights, next_grad_weights,
):
    radius = (kernel_size - 1) // 2
    zero = _splat(np.float32(0.0))
    together, shift = _pairing(kernel_size, stride, dilation)
    columns = kernel_size + shift
    quads = slabs * (SLAB // QUAD)
    for ox in range(0, out_width, together):
        cx = ox * stride
        x0, x1 = _tap_range(cx, width, kernel_size, dilation)
        query = _load(q, ox * LANES)
        _window_weights(
            query, k, g, rows, cx, y0, y1, x0, x1, 0, columns, kernel_size, dilation, similarity,
            True, _load(maximum, (at + ox) * LANES), _load(normaliser, (at + ox) * LANES), weights,
        )
        has_next = together == 2 and ox + 1 < out_width
        next_x0, next_x1, stop = 0, 0, x1
        if has_next:
            next_x0, next_x1 = _tap_range(cx + stride, width, kernel_size, dilation)
            stop = next_x1 + shift
            _window_weights(
                _load(q, (ox + 1) * LANES), k, g, rows, cx + stride, y0, y1, next_x0, next_x1, shift, columns,
                kernel_size, dilation, similarity, True,
                _load(maximum, (at + ox + 1) * LANES), _load(normaliser, (at + ox + 1) * LANES), next_weights,
            )
        else:
            next_weights[:] = 0.0
        for quad in range(quads):
            d0, d1, d2, d3 = _load_quad(grad_y, (ox * quads + quad) * QUAD * LANES)
            n0, n1, n2, n3 = zero, zero, zero, zero
            if has_next:
                n0, n1, n2, n3 = _load_quad(grad_y, ((ox + 1) * quads + quad) * QUAD * LANES)
            for ty in range(y0, y1):
                base = rows[ty] + cx - radius * dilation
                for u in range(x0, stop):
                    b = ((base + u * dilation) * quads + quad) * QUAD * LANES
                    tap = (ty * columns + u) * LANES
                    w, m = _load(weights, tap), _load(next_weights, tap)
                    even, next_even = zero, zero
                    if quad > 0:
                        even, next_even = _load(grad_weights, tap), _load(next_grad_weights, tap)
                    # Two partial sums each: one chain of dependent additions would be latency-bound.
                    odd, next_odd = zero, zero
                    even, next_even = _channel_backward(v, grad_v, b, w, m, d0, n0, even, next_even)
                    odd, next_odd = _channel_backward(v, grad_v, b + LANES, w, m, d1, n1, odd, next_odd)
                    even, next_even = _channel_backward(v, grad_v, b + 2 * LANES, w, m, d2, n2, even, next_even)
                    odd, next_odd = _channel_backward(v, grad_v, b + 3 * LANES, w, m, d3, n3, odd, next_odd)
                    _store(grad_weights, tap, _add(even, odd))
                    _store(next_grad_weights, tap, _add(next_even, next_odd))
        query_grad = _query_backward(
            query, k, rows, cx, y0, y1, x0, x1, 0, columns, kernel_size, dilation, similarity,
            weights, grad_weights, grad_k, grad_g, needs_geometry,
        )
        _store(grad_q, ox * LANES, query_grad)
        if has_next:
            query_grad = _query_backward(
                _load(q, (ox + 1) * LANES), k, rows, cx + stride, y0, y1, next_x0, next_x1, shift, columns, kernel_size,
                dilation, similarity, next_weights, next_grad_weights, grad_k, grad_g, needs_geometry,
            )
            _store(grad_q, (ox + 1) * LANES, query_grad)


# --- a range of blocks: what one thread does ---------------------------------------------------------


@_compiled_inline
def _ring_rows(height, kernel_size, dilation):
    return min(height, (kernel_size - 1) * dilation + 1)


@_compiled
def _locate_rows(cy, y0, y1, ring, width, kernel_size, dilation, rows):
    radius = (kernel_size - 1) // 2
    for ty in range(y0, y1):
        rows[ty] = ((cy + (ty - radius) * dilation) % ring) * width


@_compiled
def _forward_range(
    start, stop, query, key, value, geometry, sizes, per_group, stride, dilation, similarity, out, maximum, normaliser
):
    batch, channels, height, width, out_height, out_width = sizes
    groups, taps = geometry.shape
    kernel_size = int(round(taps**0.5))
    radius = (kernel_size - 1) // 2
    pixels, out_pixels, pairs = height * width, out_height * out_width, batch * groups
    slabs = (per_group + SLAB - 1) // SLAB
    ring = _ring_rows(height, kernel_size, dilation)
    q = np.empty(out_width * LANES, np.float32)
    k = np.empty(ring * width * LANES, np.float32)
    v = np.empty(ring * width * slabs * SLAB * LANES, np.float32)
    y = np.empty(out_width * slabs * SLAB * LANES, np.float32)
    g = np.empty(taps * LANES, np.float32)
    columns = kernel_size + _pairing(kernel_size, stride, dilation)[1]
    weights = np.zeros(kernel_size * columns * LANES, np.float32)
    next_weights = np.zeros_like(weights)
    rows = np.zeros(kernel_size, np.int64)
    spare = np.zeros(LANES * SLAB, np.float32)
    lanes = (np.empty((slabs, LANES), np.int64), np.zeros((slabs, LANES), np.int64), np.empty((slabs, LANES), np.int64))
    out_lanes = (np.empty_like(lanes[0]), np.zeros_like(lanes[1]), np.empty_like(lanes[2]))
    for block in range(start, stop):
        first = block * LANES
        _locate_lanes(first, pairs, groups, channels, per_group, slabs, pixels, *lanes)
        _locate_lanes(first, pairs, groups, channels, per_group, slabs, out_pixels, *out_lanes)
        _gather_geometry(geometry, first, g)
        entered = 0
        for oy in range(out_height):
            cy = oy * stride
            y0, y1 = _tap_range(cy, height, kernel_size, dilation)
            while entered <= cy + (y1 - 1 - radius) * dilation:
                slot = (entered % ring) * width
                _gather_groups(key, first, pairs, groups, pixels, entered, width, k, slot)
                _gather_channels(value, lanes, channels, entered, width, spare, v, slot)
                entered += 1
            _locate_rows(cy, y0, y1, ring, width, kernel_size, dilation, rows)
            _gather_groups(query, first, pairs, groups, out_pixels, oy, out_width, q, 0)
            _forward_row(
                q, k, v, g, y, maximum[block], normaliser[block], oy * out_width, rows, y0, y1, width, out_width, slabs,
                kernel_size, stride, dilation, similarity, weights, next_weights,
            )
            _scatter_channels(y, 0, out_lanes, channels, oy, out_width, spare, out)


@_compiled
def _backward_range(
    start, stop, query, key, value, geometry, sizes, per_group, stride, dilation, similarity, maximum, normaliser,
    grad_out, grad_query, grad_key, grad_value, grad_geometry, needs_geometry,
):
    batch, channels, height, width, out_height, out_width = sizes
    groups, taps = geometry.shape
    kernel_size = int(round(taps**0.5))
    radius = (kernel_size - 1) // 2
    pixels, out_pixels, pairs = height * width, out_height * out_width, batch * groups
    slabs = (per_group + SLAB - 1) // SLAB
    ring = _ring_rows(height, kernel_size, dilation)
    row_floats = width * slabs * SLAB * LANES
    q = np.empty(out_width * LANES, np.float32)
    k = np.empty(ring * width * LANES, np.float32)
    v = np.empty(ring * row_floats, np.float32)
    dy = np.empty(out_width * slabs * SLAB * LANES, np.float32)
    g = np.empty(taps * LANES, np.float32)
    dq = np.empty_like(q)
    dk = np.empty_like(k)
    dv = np.empty_like(v)
    dg = np.empty_like(g)
    columns = kernel_size + _pairing(kernel_size, stride, dilation)[1]
    weights = np.zeros(kernel_size * columns * LANES, np.float32)
    next_weights, grad_weights, next_grad_weights = np.zeros_like(weights), np.zeros_like(weights), np.zeros_like(weights)
    rows = np.zeros(kernel_size, np.int64)
    spare = np.zeros(LANES * SLAB, np.float32)
    lanes = (np.empty((slabs, LANES), np.int64), np.zeros((slabs, LANES), np.int64), np.empty((slabs, LANES), np.int64))
    out_lanes = (np.empty_like(lanes[0]), np.zeros_like(lanes[1]), np.empty_like(lanes[2]))
    for block in range(start, stop):
        first = block * LANES
        _locate_lanes(first, pairs, groups, channels, per_group, slabs, pixels, *lanes)
        _locate_lanes(first, pairs, groups, channels, per_group, slabs, out_pixels, *out_lanes)
        _gather_geometry(geometry, first, g)
        dg[:] = 0.0
        # A row of gradients is complete, and written, when the ring has no more room for it.
        entered = written = 0
        for oy in range(out_height + 1):
            cy = oy * stride
            y0, y1 = _tap_range(cy, height, kernel_size, dilation)
            last = height + ring - 1
            if oy < out_height:
                last = cy + (y1 - 1 - radius) * dilation
            while entered <= last:
                slot = (entered % ring) * width
                if entered >= ring:
                    _scatter_groups(dk, slot, first, pairs, groups, pixels, written, width, grad_key)
                    _scatter_channels(dv, slot, lanes, channels, written, width, spare, grad_value)
                    written += 1
                if entered < height:
                    dk[slot * LANES : (slot + width) * LANES] = 0.0
                    dv[slot * slabs * SLAB * LANES : slot * slabs * SLAB * LANES + row_floats] = 0.0
                    _gather_groups(key, first, pairs, groups, pixels, entered, width, k, slot)
                    _gather_channels(value, lanes, channels, entered, width, spare, v, slot)
                entered += 1
            if oy == out_height:
                break
            _locate_rows(cy, y0, y1, ring, width, kernel_size, dilation, rows)
            _gather_groups(query, first, pairs, groups, out_pixels, oy, out_width, q, 0)
            _gather_channels(grad_out, out_lanes, channels, oy, out_width, spare, dy, 0)
            _backward_row(
                q, k, v, g, maximum[block], normaliser[block], oy * out_width, dy, dq, dk, dv, dg, rows, y0, y1,
                width, out_width, slabs, kernel_size, stride, dilation, similarity, needs_geometry,
                weights, next_weights, grad_weights, next_grad_weights,
            )
            _scatter_groups(dq, 0, first, pairs, groups, out_pixels, oy, out_width, grad_query)
        if needs_geometry:
            for lane in range(min(LANES, pairs - first)):
                for t in range(taps):
                    grad_geometry[(first + lane) % groups, t] += dg[t * LANES + lane]


# --- the first call ----------------------------------------------------------------------------------


class _Announcement(event.Listener):
    """Says on standard error what a first call waits for: half a minute of silence looks like a hang."""

    def on_start(self, event) -> None:
        dispatcher = event.data["dispatcher"]
        if dispatcher in (_forward_range, _backward_range):
            which = "forward" if dispatcher is _forward_range else "backward"
            folder = dispatcher.stats.cache_path
            kept = f"kept in {folder}" if folder else "not kept: no folder can be written, NUMBA_CACHE_DIR can name one"
            said = f"lrrobust: compiling the local relation's {which} pass for this processor ({kept})"
            print(said, file=sys.stderr, flush=True)

    def on_end(self, event) -> None:
        pass


event.register("numba:compile", _Announcement())


# --- threads -----------------------------------------------------------------------------------------


#: Pieces that each thread takes on average.
PIECES = 2


class _Threads:
    """Runs a compiled range on as many threads as torch uses.

    Plain Python threads around code that holds no interpreter lock: unlike OpenMP they survive a fork
    (the child makes its own) and may be called from several threads at once.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner = -1
        self._size = 0
        self._pool: ThreadPoolExecutor | None = None

    @staticmethod
    def count_pieces(count: int) -> int:
        """Into how many pieces range(count) is cut: the more, the sooner a thread that comes late finds its work done."""
        threads = max(1, min(torch.get_num_threads(), count))
        return min(count, threads * PIECES) if threads > 1 else 1

    def run(self, work: Callable[[int, int, int], None], count: int, pieces: int) -> None:
        """Calls work(piece, start, stop) for equal pieces of range(count); who comes first takes the next one.

        The second thread may well come late: where torch has just used it, its core is kept busy waiting for more.
        """
        left = iter(range(pieces))

        def take() -> None:
            # One `next` of a range's iterator is one step of the interpreter: no piece is taken twice.
            for piece in left:
                work(piece, count * piece // pieces, count * (piece + 1) // pieces)

        others = min(torch.get_num_threads(), pieces) - 1
        futures = [self._get_pool(others).submit(take) for _ in range(others)]
        try:
            take()
        finally:
            # After an error, or Ctrl-C, nobody begins another piece.
            for _ in left:
                pass
            for future in futures:
                # Who has not even begun finds nothing to do.
                if not future.cancel():
                    future.result()

    def _get_pool(self, size: int) -> ThreadPoolExecutor:
        with self._lock:
            if self._pool is None or self._owner != os.getpid() or self._size < size:
                self._pool = ThreadPoolExecutor(size, thread_name_prefix="lrrobust-op")
                self._owner, self._size = os.getpid(), size
            return self._pool


_threads = _Threads()


def _flat(tensor: Tensor) -> np.ndarray:
    """float32, channels-last, one-dimensional; a view of the tensor where it is laid out so already."""
    # `reshape` alone keeps strides other than one, as of an expanded gradient; the tiles read past them.
    return tensor.detach().to(torch.float32).permute(0, 2, 3, 1).reshape(-1).contiguous().numpy()


def _rows(geometry: Tensor) -> np.ndarray:
    """float32 (G, k * k)."""
    return geometry.detach().to(torch.float32).flatten(1).contiguous().numpy()


def _sizes(query: Tensor, value: Tensor) -> tuple[int, ...]:
    batch, channels, height, width = value.shape
    return batch, channels, height, width, query.shape[2], query.shape[3]


def _empty_like(tensor: Tensor, *shape: int) -> Tensor:
    return new_channels_last(tensor, shape or tensor.shape, torch.float32)


def _forward(
    query: Tensor, key: Tensor, value: Tensor, geometry: Tensor,
    stride: int, dilation: int, similarity: str, per_group: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The output, and of every window the maximum of its scores and the inverse of its normaliser."""
    out, maximum, normaliser = _allocate_outputs(query, value)
    arrays = (*map(_flat, (query, key, value)), _rows(geometry), _sizes(query, value))
    options = (per_group, stride, dilation, SIMILARITY_CODES[similarity])
    results = (_flat(out), maximum.numpy(), normaliser.numpy())
    count = len(maximum)
    _threads.run(
        lambda _, start, stop: _forward_range(start, stop, *arrays, *options, *results), count, _threads.count_pieces(count)
    )
    return out.to(value.dtype), maximum, normaliser


def _allocate_outputs(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    batch, groups, *size = query.shape
    maximum = query.new_empty((-(-batch * groups // LANES), size[0] * size[1] * LANES), dtype=torch.float32)
    return _empty_like(value, batch, value.shape[1], *size), maximum, torch.empty_like(maximum)


def _backward(
    query: Tensor, key: Tensor, value: Tensor, geometry: Tensor, maximum: Tensor, normaliser: Tensor, grad_out: Tensor,
    stride: int, dilation: int, similarity: str, per_group: int, needs_geometry: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of query, key, value and geometry; that of the geometry is empty if it is not needed."""
    arrays = (*map(_flat, (query, key, value)), _rows(geometry), _sizes(query, value))
    options = (per_group, stride, dilation, SIMILARITY_CODES[similarity])
    grads = [_empty_like(tensor) for tensor in (query, key, value)]
    # One accumulator a piece, added at the end in order, whoever computed it: the geometry is shared by all images.
    pieces = _threads.count_pieces(len(maximum))
    by_piece = torch.zeros(pieces, *geometry.flatten(1).shape)
    saved = (maximum.numpy(), normaliser.numpy(), _flat(grad_out))
    targets, accumulators = tuple(map(_flat, grads)), by_piece.numpy()

    def work(piece: int, start: int, stop: int) -> None:
        _backward_range(start, stop, *arrays, *options, *saved, *targets, accumulators[piece], needs_geometry)

    _threads.run(work, len(maximum), pieces)
    grads.append(by_piece.sum(0).view_as(geometry) if needs_geometry else geometry.new_empty(0))
    return tuple(grad.to(x.dtype) for grad, x in zip(grads, (query, key, value, geometry), strict=True))


def _fake_outputs(query: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    out, maximum, normaliser = _allocate_outputs(query, value)
    return out.to(value.dtype), maximum, normaliser


def _fake_gradients(query: Tensor, key: Tensor, value: Tensor, geometry: Tensor, needs_geometry: bool) -> tuple[Tensor, ...]:
    grads = [_empty_like(x).to(x.dtype) for x in (query, key, value)]
    return *grads, geometry.new_empty(geometry.shape if needs_geometry else 0)


_local_relation = build_operation(
    "local_relation_cpu", forward=_forward, backward=_backward, allocate_outputs=_fake_outputs,
    allocate_gradients=_fake_gradients, device_types=("cpu",),
)  # fmt: skip


def local_relation_cpu(
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
    """Same arguments and result as `local_relation`, which checks them first. Computes in float32."""
    return _local_relation(query, key, value, geometry, stride, dilation, similarity, channels_per_group)
