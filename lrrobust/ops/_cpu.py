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

import functools
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import llvmlite.binding
import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, models, register_model

#: Lanes of a vector: one AVX-512 register, or one of AVX2 and narrower machines' register pairs.
LANES = 16 if llvmlite.binding.get_host_cpu_features().get("avx512f") else 8
#: Channels aggregated together; wider groups are run as several slabs of this many channels.
SLAB = 8

SIMILARITY_CODES = {"squared_difference": 0, "absolute_difference": 1, "multiplication": 2}


def _compiled(function, **options):
    """Compiled at first use; kept on disk, unless no folder for it can be written (containers)."""
    try:
        return njit(cache=True, nogil=True, **options)(function)
    except RuntimeError:
        return njit(nogil=True, **options)(function)


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


#: exp(r) on |r| <= ln(2)/2: a polynomial fitted once, at import, at Chebyshev nodes in float64
#: (relative error 2e-8 before rounding).
_NODES = np.cos((2 * np.arange(64) + 1) * np.pi / 128) * np.log(2) / 2
_EXP_COEFFICIENTS = np.polynomial.chebyshev.Chebyshev.fit(_NODES, np.exp(_NODES), 6).convert(
    kind=np.polynomial.Polynomial
).coef


@intrinsic
def _exp(typing_context, vector):
    """exp(x) for x <= 0: 2^n * exp(r) with x = n*ln(2) + r; below -87 it gives about 1e-38. NaN for NaN."""

    def codegen(context, builder, signature, arguments):
        (operand,) = arguments
        fma = _vector_function(builder, "fma", 3)
        too_small = builder.fcmp_ordered("<", operand, _splat_constant(-87.0))
        clipped = builder.select(too_small, _splat_constant(-87.0), operand)
        rint = _vector_function(builder, "rint", 1)
        whole = builder.call(rint, [builder.fmul(clipped, _splat_constant(1 / np.log(2)))])
        # ln(2) in two parts, the first with trailing zeros, so that whole * ln(2) is exact.
        high = float(np.float32(0.693145751953125))
        rest = builder.call(fma, [whole, _splat_constant(-high), clipped])
        rest = builder.call(fma, [whole, _splat_constant(float(high - np.log(2))), rest])
        power = _splat_constant(float(_EXP_COEFFICIENTS[-1]))
        for coefficient in _EXP_COEFFICIENTS[-2::-1]:
            power = builder.call(fma, [power, rest, _splat_constant(float(coefficient))])
        # fptosi of NaN is poison: replace it by 0 here, the NaN still arrives through `power`.
        is_number = builder.fcmp_ordered("ord", whole, whole)
        exponent = builder.fptosi(builder.select(is_number, whole, _splat_constant(0.0)), _INT_VECTOR)
        bias = ir.Constant(_INT_VECTOR, [127] * LANES)
        shift = ir.Constant(_INT_VECTOR, [23] * LANES)
        scale = builder.bitcast(builder.shl(builder.add(exponent, bias), shift), _VECTOR)
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
# Scratch is flat: pixel-major, then channel within the group (padded to whole slabs), then lane.


# Tensors are flat too: channels-last, so the channels of a group are neighbours in memory.


@_compiled
def _gather_groups(source, first, pairs, groups, pixels, scratch):
    """scratch[p, l] = source[n, p, g] for the lanes l of the block that starts at pair `first`."""
    for lane in range(LANES):
        pair = first + lane
        if pair < pairs:
            base = (pair // groups) * pixels * groups + pair % groups
            for p in range(pixels):
                scratch[p * LANES + lane] = source[base + p * groups]
        else:
            for p in range(pixels):
                scratch[p * LANES + lane] = 0.0


@_compiled
def _scatter_groups(scratch, first, pairs, groups, pixels, target):
    for lane in range(min(LANES, pairs - first)):
        base = ((first + lane) // groups) * pixels * groups + (first + lane) % groups
        for p in range(pixels):
            target[base + p * groups] = scratch[p * LANES + lane]


@_compiled
def _locate_lanes(first, pairs, groups, channels, per_group, slab, pixels, bases, starts, counts):
    """Where the channels of each lane's slab begin, and how many they are; -1 in `bases` unless SLAB."""
    for lane in range(LANES):
        pair = first + lane
        counts[lane] = 0
        if pair < pairs:
            c = (pair % groups) * per_group + slab * SLAB
            end = min((pair % groups) * per_group + per_group, channels)
            starts[lane] = (pair // groups) * pixels * channels + c
            counts[lane] = max(0, min(SLAB, end - c))
        bases[lane] = starts[lane] if counts[lane] == SLAB else -1


@_compiled
def _gather_channels(source, first, pairs, groups, channels, per_group, slabs, pixels, scratch):
    """scratch[p, j, l] = source[n, p, g * per_group + j]; zero for channels and pairs that do not exist."""
    bases, starts, counts = np.empty(LANES, np.int64), np.empty(LANES, np.int64), np.empty(LANES, np.int64)
    spare = np.zeros(LANES * SLAB, np.float32)
    for slab in range(slabs):
        _locate_lanes(first, pairs, groups, channels, per_group, slab, pixels, bases, starts, counts)
        spare[:] = 0.0
        for p in range(pixels):
            for lane in range(LANES):
                if bases[lane] < 0:
                    for j in range(counts[lane]):
                        spare[lane * SLAB + j] = source[starts[lane] + p * channels + j]
            _gather_tile(source, bases, p * channels, spare, scratch, (p * slabs + slab) * SLAB * LANES)


@_compiled
def _scatter_channels(scratch, first, pairs, groups, channels, per_group, slabs, pixels, target):
    bases, starts, counts = np.empty(LANES, np.int64), np.empty(LANES, np.int64), np.empty(LANES, np.int64)
    spare = np.empty(LANES * SLAB, np.float32)
    for slab in range(slabs):
        _locate_lanes(first, pairs, groups, channels, per_group, slab, pixels, bases, starts, counts)
        for p in range(pixels):
            _scatter_tile(target, bases, p * channels, spare, scratch, (p * slabs + slab) * SLAB * LANES)
            for lane in range(LANES):
                if bases[lane] < 0:
                    for j in range(counts[lane]):
                        target[starts[lane] + p * channels + j] = spare[lane * SLAB + j]


@_compiled
def _gather_geometry(geometry, first, scratch):
    groups, taps = geometry.shape
    for t in range(taps):
        for lane in range(LANES):
            scratch[t * LANES + lane] = geometry[(first + lane) % groups, t]


# --- one output position -----------------------------------------------------------------------------


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
def _window_scores(q, k, g, at, cy, cx, y0, y1, x0, x1, height, width, kernel_size, dilation, similarity, scores):
    """Writes the scores of the taps inside the image, in order; returns their maximum."""
    radius = (kernel_size - 1) // 2
    query = _load(q, at)
    largest = _splat(np.float32(-np.inf))
    tap = 0
    for ty in range(y0, y1):
        row = (cy + (ty - radius) * dilation) * width + cx
        for tx in range(x0, x1):
            p = row + (tx - radius) * dilation
            score = _score(query, _load(k, p * LANES), _load(g, (ty * kernel_size + tx) * LANES), similarity)
            _store(scores, tap, score)
            largest = _max(score, largest)
            tap += LANES
    return largest


@_compiled
def _forward_block(q, k, v, g, out, maximum, normaliser, shape, slabs, kernel_size, stride, dilation, similarity, scores):
    height, width, out_height, out_width = shape
    radius = (kernel_size - 1) // 2
    zero = _splat(np.float32(0.0))
    one = _splat(np.float32(1.0))
    for oy in range(out_height):
        cy = oy * stride
        y0, y1 = _tap_range(cy, height, kernel_size, dilation)
        for ox in range(out_width):
            cx = ox * stride
            x0, x1 = _tap_range(cx, width, kernel_size, dilation)
            at = (oy * out_width + ox) * LANES
            largest = _window_scores(
                q, k, g, at, cy, cx, y0, y1, x0, x1, height, width, kernel_size, dilation, similarity, scores
            )
            total = zero
            for tap in range((y1 - y0) * (x1 - x0)):
                weight = _exp(_sub(_load(scores, tap * LANES), largest))
                _store(scores, tap * LANES, weight)
                total = _add(total, weight)
            inverse = _div(one, total)
            _store(maximum, at, largest)
            _store(normaliser, at, inverse)
            for slab in range(slabs):
                s0, s1, s2, s3, s4, s5, s6, s7 = zero, zero, zero, zero, zero, zero, zero, zero
                tap = 0
                for ty in range(y0, y1):
                    row = (cy + (ty - radius) * dilation) * width + cx
                    for tx in range(x0, x1):
                        b = ((row + (tx - radius) * dilation) * slabs + slab) * SLAB * LANES
                        weight = _load(scores, tap)
                        tap += LANES
                        s0 = _fma(weight, _load(v, b), s0)
                        s1 = _fma(weight, _load(v, b + LANES), s1)
                        s2 = _fma(weight, _load(v, b + 2 * LANES), s2)
                        s3 = _fma(weight, _load(v, b + 3 * LANES), s3)
                        s4 = _fma(weight, _load(v, b + 4 * LANES), s4)
                        s5 = _fma(weight, _load(v, b + 5 * LANES), s5)
                        s6 = _fma(weight, _load(v, b + 6 * LANES), s6)
                        s7 = _fma(weight, _load(v, b + 7 * LANES), s7)
                b = (at * slabs + slab * LANES) * SLAB
                _store(out, b, _mul(s0, inverse))
                _store(out, b + LANES, _mul(s1, inverse))
                _store(out, b + 2 * LANES, _mul(s2, inverse))
                _store(out, b + 3 * LANES, _mul(s3, inverse))
                _store(out, b + 4 * LANES, _mul(s4, inverse))
                _store(out, b + 5 * LANES, _mul(s5, inverse))
                _store(out, b + 6 * LANES, _mul(s6, inverse))
                _store(out, b + 7 * LANES, _mul(s7, inverse))


@_compiled
def _backward_block(
    q, k, v, g, maximum, normaliser, grad_out, grad_q, grad_k, grad_v, grad_g,
    shape, slabs, kernel_size, stride, dilation, similarity, needs_geometry, scores, grad_weights,
):
    height, width, out_height, out_width = shape
    radius = (kernel_size - 1) // 2
    zero = _splat(np.float32(0.0))
    two = _splat(np.float32(2.0))
    minus_one = _splat(np.float32(-1.0))
    for oy in range(out_height):
        cy = oy * stride
        y0, y1 = _tap_range(cy, height, kernel_size, dilation)
        for ox in range(out_width):
            cx = ox * stride
            x0, x1 = _tap_range(cx, width, kernel_size, dilation)
            at = (oy * out_width + ox) * LANES
            _window_scores(
                q, k, g, at, cy, cx, y0, y1, x0, x1, height, width, kernel_size, dilation, similarity, scores
            )
            largest = _load(maximum, at)
            inverse = _load(normaliser, at)
            for tap in range((y1 - y0) * (x1 - x0)):
                weight = _mul(_exp(_sub(_load(scores, tap * LANES), largest)), inverse)
                _store(scores, tap * LANES, weight)
                _store(grad_weights, tap * LANES, zero)
            for slab in range(slabs):
                b = (at * slabs + slab * LANES) * SLAB
                d0 = _load(grad_out, b)
                d1 = _load(grad_out, b + LANES)
                d2 = _load(grad_out, b + 2 * LANES)
                d3 = _load(grad_out, b + 3 * LANES)
                d4 = _load(grad_out, b + 4 * LANES)
                d5 = _load(grad_out, b + 5 * LANES)
                d6 = _load(grad_out, b + 6 * LANES)
                d7 = _load(grad_out, b + 7 * LANES)
                tap = 0
                for ty in range(y0, y1):
                    row = (cy + (ty - radius) * dilation) * width + cx
                    for tx in range(x0, x1):
                        b = ((row + (tx - radius) * dilation) * slabs + slab) * SLAB * LANES
                        weight = _load(scores, tap)
                        # Two partial sums: one chain of eight dependent additions would be latency-bound.
                        even = _fma(d0, _load(v, b), _load(grad_weights, tap))
                        odd = _mul(d1, _load(v, b + LANES))
                        even = _fma(d2, _load(v, b + 2 * LANES), even)
                        odd = _fma(d3, _load(v, b + 3 * LANES), odd)
                        even = _fma(d4, _load(v, b + 4 * LANES), even)
                        odd = _fma(d5, _load(v, b + 5 * LANES), odd)
                        even = _fma(d6, _load(v, b + 6 * LANES), even)
                        odd = _fma(d7, _load(v, b + 7 * LANES), odd)
                        _store(grad_weights, tap, _add(even, odd))
                        _store(grad_v, b, _fma(weight, d0, _load(grad_v, b)))
                        _store(grad_v, b + LANES, _fma(weight, d1, _load(grad_v, b + LANES)))
                        _store(grad_v, b + 2 * LANES, _fma(weight, d2, _load(grad_v, b + 2 * LANES)))
                        _store(grad_v, b + 3 * LANES, _fma(weight, d3, _load(grad_v, b + 3 * LANES)))
                        _store(grad_v, b + 4 * LANES, _fma(weight, d4, _load(grad_v, b + 4 * LANES)))
                        _store(grad_v, b + 5 * LANES, _fma(weight, d5, _load(grad_v, b + 5 * LANES)))
                        _store(grad_v, b + 6 * LANES, _fma(weight, d6, _load(grad_v, b + 6 * LANES)))
                        _store(grad_v, b + 7 * LANES, _fma(weight, d7, _load(grad_v, b + 7 * LANES)))
                        tap += LANES
            # The softmax's Jacobian subtracts the weighted mean of the weights' gradients.
            mean_grad = zero
            for tap in range((y1 - y0) * (x1 - x0)):
                mean_grad = _fma(_load(scores, tap * LANES), _load(grad_weights, tap * LANES), mean_grad)
            query = _load(q, at)
            query_grad = zero
            tap = 0
            for ty in range(y0, y1):
                row = (cy + (ty - radius) * dilation) * width + cx
                for tx in range(x0, x1):
                    p = (row + (tx - radius) * dilation) * LANES
                    score_grad = _mul(_load(scores, tap), _sub(_load(grad_weights, tap), mean_grad))
                    tap += LANES
                    key = _load(k, p)
                    if similarity == 2:
                        by_query = _mul(score_grad, key)
                        by_key = _mul(score_grad, query)
                    else:
                        difference = _sub(query, key)
                        slope = _mul(two, difference) if similarity == 0 else _sign(difference)
                        by_key = _mul(score_grad, slope)
                        by_query = _mul(by_key, minus_one)
                    query_grad = _add(query_grad, by_query)
                    _store(grad_k, p, _add(_load(grad_k, p), by_key))
                    if needs_geometry:
                        t = (ty * kernel_size + tx) * LANES
                        _store(grad_g, t, _add(_load(grad_g, t), score_grad))
            _store(grad_q, at, query_grad)


# --- a range of blocks: what one thread does ---------------------------------------------------------


@_compiled
def _forward_range(
    start, stop, query, key, value, geometry, sizes, per_group, stride, dilation, similarity, out, maximum, normaliser
):
    batch, channels, height, width, out_height, out_width = sizes
    groups, taps = geometry.shape
    kernel_size = int(round(taps**0.5))
    shape = (height, width, out_height, out_width)
    pixels, out_pixels, pairs = height * width, out_height * out_width, batch * groups
    slabs = (per_group + SLAB - 1) // SLAB
    q = np.empty(out_pixels * LANES, np.float32)
    k = np.empty(pixels * LANES, np.float32)
    v = np.empty(pixels * slabs * SLAB * LANES, np.float32)
    y = np.empty(out_pixels * slabs * SLAB * LANES, np.float32)
    g = np.empty(taps * LANES, np.float32)
    scores = np.empty(taps * LANES, np.float32)
    for block in range(start, stop):
        first = block * LANES
        _gather_groups(query, first, pairs, groups, out_pixels, q)
        _gather_groups(key, first, pairs, groups, pixels, k)
        _gather_channels(value, first, pairs, groups, channels, per_group, slabs, pixels, v)
        _gather_geometry(geometry, first, g)
        _forward_block(
            q, k, v, g, y, maximum[block], normaliser[block],
            shape, slabs, kernel_size, stride, dilation, similarity, scores,
        )
        _scatter_channels(y, first, pairs, groups, channels, per_group, slabs, out_pixels, out)


@_compiled
def _backward_range(
    start, stop, query, key, value, geometry, sizes, per_group, stride, dilation, similarity, maximum, normaliser,
    grad_out, grad_query, grad_key, grad_value, grad_geometry, needs_geometry,
):
    batch, channels, height, width, out_height, out_width = sizes
    groups, taps = geometry.shape
    kernel_size = int(round(taps**0.5))
    shape = (height, width, out_height, out_width)
    pixels, out_pixels, pairs = height * width, out_height * out_width, batch * groups
    slabs = (per_group + SLAB - 1) // SLAB
    q = np.empty(out_pixels * LANES, np.float32)
    k = np.empty(pixels * LANES, np.float32)
    v = np.empty(pixels * slabs * SLAB * LANES, np.float32)
    dy = np.empty(out_pixels * slabs * SLAB * LANES, np.float32)
    g = np.empty(taps * LANES, np.float32)
    dq = np.empty_like(q)
    dk = np.empty_like(k)
    dv = np.empty_like(v)
    dg = np.empty_like(g)
    scores = np.empty(taps * LANES, np.float32)
    grad_weights = np.empty(taps * LANES, np.float32)
    for block in range(start, stop):
        first = block * LANES
        _gather_groups(query, first, pairs, groups, out_pixels, q)
        _gather_groups(key, first, pairs, groups, pixels, k)
        _gather_channels(value, first, pairs, groups, channels, per_group, slabs, pixels, v)
        _gather_channels(grad_out, first, pairs, groups, channels, per_group, slabs, out_pixels, dy)
        _gather_geometry(geometry, first, g)
        dk[:] = 0.0
        dv[:] = 0.0
        dg[:] = 0.0
        _backward_block(
            q, k, v, g, maximum[block], normaliser[block], dy, dq, dk, dv, dg,
            shape, slabs, kernel_size, stride, dilation, similarity, needs_geometry, scores, grad_weights,
        )
        _scatter_groups(dq, first, pairs, groups, out_pixels, grad_query)
        _scatter_groups(dk, first, pairs, groups, pixels, grad_key)
        _scatter_channels(dv, first, pairs, groups, channels, per_group, slabs, pixels, grad_value)
        if needs_geometry:
            for lane in range(min(LANES, pairs - first)):
                for t in range(taps):
                    grad_geometry[(first + lane) % groups, t] += dg[t * LANES + lane]


# --- threads -----------------------------------------------------------------------------------------


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

    def run(self, work: Callable[[int, int, int], None], count: int) -> None:
        """Calls work(share, start, stop) for equal shares of range(count)."""
        shares = max(1, min(torch.get_num_threads(), count))
        bounds = [count * share // shares for share in range(shares + 1)]
        futures = []
        if shares > 1:
            pool = self._get_pool(shares - 1)
            futures = [pool.submit(work, s, bounds[s], bounds[s + 1]) for s in range(1, shares)]
        work(0, bounds[0], bounds[1])
        for future in futures:
            future.result()

    def _get_pool(self, size: int) -> ThreadPoolExecutor:
        with self._lock:
            if self._pool is None or self._owner != os.getpid() or self._size < size:
                self._pool = ThreadPoolExecutor(size, thread_name_prefix="lrrobust-op")
                self._owner, self._size = os.getpid(), size
            return self._pool


_threads = _Threads()


def _flat(tensor: torch.Tensor) -> np.ndarray:
    """float32, channels-last, one-dimensional; a view of the tensor where it is laid out so already."""
    # `reshape` alone keeps strides other than one, as of an expanded gradient; the tiles read past them.
    return tensor.detach().to(torch.float32).permute(0, 2, 3, 1).reshape(-1).contiguous().numpy()


def _rows(geometry: torch.Tensor) -> np.ndarray:
    """float32 (G, k * k)."""
    return geometry.detach().to(torch.float32).flatten(1).contiguous().numpy()


def _sizes(query: torch.Tensor, value: torch.Tensor) -> tuple[int, ...]:
    batch, channels, height, width = value.shape
    return batch, channels, height, width, query.shape[2], query.shape[3]


def _empty_like(tensor: torch.Tensor, *shape: int) -> torch.Tensor:
    """float32 (N, C, H, W) whose memory is (N, H, W, C) without gaps, whatever the sizes."""
    batch, channels, height, width = shape or tensor.shape
    return torch.empty(batch, height, width, channels, dtype=torch.float32).permute(0, 3, 1, 2)


class _LocalRelation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, geometry, stride, dilation, similarity, per_group):
        batch, groups, out_height, out_width = query.shape
        blocks = -(-batch * groups // LANES)
        arrays = (*map(_flat, (query, key, value)), _rows(geometry), _sizes(query, value))
        out = _empty_like(value, batch, value.shape[1], out_height, out_width)
        maximum = torch.empty(blocks, out_height * out_width * LANES)
        normaliser = torch.empty_like(maximum)
        options = (per_group, stride, dilation, SIMILARITY_CODES[similarity])
        results = (_flat(out), maximum.numpy(), normaliser.numpy())
        _threads.run(lambda _, start, stop: _forward_range(start, stop, *arrays, *options, *results), blocks)
        ctx.save_for_backward(query, key, value, geometry, maximum, normaliser)
        ctx.options = options
        return out.to(value.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out):
        query, key, value, geometry, maximum, normaliser = ctx.saved_tensors
        blocks, shares = maximum.shape[0], torch.get_num_threads()
        arrays = (*map(_flat, (query, key, value)), _rows(geometry), _sizes(query, value))
        needs_geometry = ctx.needs_input_grad[3]

        grads = [_empty_like(tensor) for tensor in (query, key, value)]
        # One accumulator a thread, added at the end: the geometry is shared by all images.
        grad_geometry = torch.zeros(shares, geometry.shape[0], geometry[0].numel())
        saved = (maximum.numpy(), normaliser.numpy(), _flat(grad_out))
        targets = tuple(map(_flat, grads))
        per_thread = grad_geometry.numpy()

        def work(share: int, start: int, stop: int) -> None:
            _backward_range(
                start, stop, *arrays, *ctx.options, *saved, *targets, per_thread[share], needs_geometry
            )

        _threads.run(work, blocks)
        grads.append(grad_geometry.sum(0).view_as(geometry) if needs_geometry else None)
        inputs = (query, key, value, geometry)
        typed = [grad if grad is None else grad.to(x.dtype) for grad, x in zip(grads, inputs, strict=True)]
        return *typed, None, None, None, None


def local_relation_cpu(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    geometry: torch.Tensor,
    *,
    stride: int,
    dilation: int,
    similarity: str,
    channels_per_group: int,
) -> torch.Tensor:
    """Same arguments and result as `local_relation`, which checks them first. Computes in float32."""
    return _LocalRelation.apply(query, key, value, geometry, stride, dilation, similarity, channels_per_group)
