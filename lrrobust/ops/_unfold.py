"""The local relation in plain torch, in tiles: what runs wherever no fused backend can.

The image is cut into tiles of output positions. The windows of a tile lie in one small patch of the
image, so a tile is dense masked attention between its positions and the pixels of its patch: scores are
a (positions, pixels) matrix per group, with a bias gathered from the geometry that is -inf outside the
window, and the aggregation is one batched matrix product. No window is ever copied out, a patch is
clipped where the image ends instead of padded, and a map of 8x8 and below is a single tile.

Zero weights outside the window take part in that product, so a NaN or infinity reaches every position of
its tile, not only those that see it.

The backward pass keeps the inputs only and recomputes the weights tile by tile, so forward and backward
both need, beside their results, a few arrays of the size of `value` at most, or of a fixed size. It is written in
differentiable operations: with `create_graph` torch records them, and can differentiate again.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

#: Maps of at most this many pixels are one tile: nearly every pixel sees nearly every other.
WHOLE_MAP = 64
#: Rows and columns of the image whose output positions make a tile of a larger map.
TILE = 8
#: At most as many scores as there are values are held at once; never fewer than the first of these
#: (small operations cost their calls), and on the CPU never more than the second (its caches).
LEAST_CHUNK, LARGEST_CPU_CHUNK = 2**16, 2**20


class Options(NamedTuple):
    """What decides the function, beside the tensors."""

    stride: int
    dilation: int
    similarity: str
    channels_per_group: int


class _Tile(NamedTuple):
    """Some images' output rows and columns, and the rows and columns of the image that they see."""

    images: slice
    out_rows: slice
    out_columns: slice
    rows: slice
    columns: slice

    def of_output(self, maps: Tensor) -> Tensor:
        return maps[self.images, :, self.out_rows, self.out_columns]

    def of_input(self, maps: Tensor) -> Tensor:
        return maps[self.images, :, self.rows, self.columns]


def _seen(positions: slice, size: int, radius: int, options: Options) -> slice:
    """The rows (or columns) within `radius` of the centres of some output rows, and inside the image."""
    first = positions.start * options.stride - radius
    last = (positions.stop - 1) * options.stride + radius
    return slice(max(first, 0), min(last + 1, size))


def _tiles(query: Tensor, key: Tensor, kernel_size: int, options: Options) -> Iterator[_Tile]:
    batch, groups, height, width = key.shape
    out_height, out_width = query.shape[2:]
    is_small = height * width <= WHOLE_MAP
    tile_height, tile_width = (out_height, out_width) if is_small else 2 * (max(1, TILE // options.stride),)
    radius = options.dilation * (kernel_size // 2)
    chunk = max(LEAST_CHUNK, batch * groups * options.channels_per_group * height * width)
    if key.device.type == "cpu":
        chunk = min(chunk, LARGEST_CPU_CHUNK)
    for top in range(0, out_height, tile_height):
        out_rows = slice(top, min(top + tile_height, out_height))
        rows = _seen(out_rows, height, radius, options)
        for left in range(0, out_width, tile_width):
            out_columns = slice(left, min(left + tile_width, out_width))
            columns = _seen(out_columns, width, radius, options)
            positions = (out_rows.stop - out_rows.start) * (out_columns.stop - out_columns.start)
            pixels = (rows.stop - rows.start) * (columns.stop - columns.start)
            images = max(1, chunk // (groups * positions * pixels))
            for first in range(0, batch, images):
                yield _Tile(slice(first, min(first + images, batch)), out_rows, out_columns, rows, columns)


def _taps(out: slice, seen: slice, kernel_size: int, options: Options, device: torch.device) -> Tensor:
    """(out, seen): which of k neighbours a row is to an output row; negative where it is none."""
    centres = torch.arange(out.start, out.stop, device=device) * options.stride
    offsets = torch.arange(seen.start, seen.stop, device=device) - centres[:, None]
    taps = torch.div(offsets, options.dilation, rounding_mode="floor") + kernel_size // 2
    is_neighbour = (offsets % options.dilation == 0) & (taps >= 0) & (taps < kernel_size)
    return torch.where(is_neighbour, taps, -1)


def _window_index(tile: _Tile, kernel_size: int, options: Options, device: torch.device) -> Tensor:
    """(positions, pixels) of a tile: the entry of the flat geometry, k * k where a pixel is no neighbour."""
    by_row = _taps(tile.out_rows, tile.rows, kernel_size, options, device)[:, None, :, None]
    by_column = _taps(tile.out_columns, tile.columns, kernel_size, options, device)[None, :, None, :]
    index = torch.where((by_row >= 0) & (by_column >= 0), by_row * kernel_size + by_column, kernel_size**2)
    return index.flatten(2).flatten(0, 1)


def _bias(geometry: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    """(1, G, positions, pixels): the geometry, -inf where a pixel is no neighbour."""
    entries = F.pad(geometry.to(dtype).flatten(1), (0, 1), value=float("-inf"))
    return entries[:, index].unsqueeze(0)


def _sum_by_tap(scores: Tensor, index: Tensor, taps: int) -> Tensor:
    """(G, positions, pixels) -> (G, taps). Gathers instead of scattering, so that order never depends on timing."""
    positions, pixels = index.shape
    # The pixel that is tap t of each position; a column of zeros stands in for those outside.
    pixel_of = torch.full((positions, taps + 1), pixels, device=index.device)
    pixel_of.scatter_(1, index, torch.arange(pixels, device=index.device).expand(positions, -1))
    pixel_of = pixel_of[:, :taps].expand(scores.shape[0], -1, -1)
    return F.pad(scores, (0, 1)).gather(2, pixel_of).sum(1)


def _by_group(maps: Tensor, options: Options, groups: int, dtype: torch.dtype) -> Tensor:
    """(N, C, h, w) -> (N, G, m, h * w), zeros for the channels that the last group lacks."""
    missing = groups * options.channels_per_group - maps.shape[1]
    padded = F.pad(maps, (0, 0, 0, 0, 0, missing)) if missing else maps
    return padded.to(dtype).reshape(maps.shape[0], groups, options.channels_per_group, -1)


def _weigh(query: Tensor, key: Tensor, bias: Tensor, similarity: str) -> tuple[Tensor | None, Tensor]:
    """(what the scores' gradient is multiplied with, weights) of query (N, G, P) and key (N, G, Q)."""
    if similarity == "multiplication":
        return None, torch.addcmul(bias, query.unsqueeze(3), key.unsqueeze(2)).softmax(dim=3)
    difference = query.unsqueeze(3) - key.unsqueeze(2)
    if similarity == "squared_difference":
        return difference, torch.addcmul(bias, difference, difference, value=-1).softmax(dim=3)
    return difference.sign(), (bias - difference.abs()).softmax(dim=3)


def _without_autocast(device: torch.device) -> AbstractContextManager:
    """Autocast would round the weights to half precision for the matrix product."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def _accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    return functools.reduce(torch.promote_types, (x.dtype for x in tensors), torch.float32)


class _LocalRelation(torch.autograd.Function):
    @staticmethod
    def forward(query, key, value, geometry, options):
        dtype = _accumulation_dtype(query, key, value, geometry)
        kernel_size, groups = geometry.shape[-1], query.shape[1]
        out = value.new_empty(*value.shape[:2], *query.shape[2:])
        with _without_autocast(value.device):
            for tile in _tiles(query, key, kernel_size, options):
                bias = _bias(geometry, _window_index(tile, kernel_size, options, value.device), dtype)
                q, k = (x.to(dtype).flatten(2) for x in (tile.of_output(query), tile.of_input(key)))
                _, weights = _weigh(q, k, bias, options.similarity)
                found = _by_group(tile.of_input(value), options, groups, dtype) @ weights.mT
                target = tile.of_output(out)
                target.copy_(found.flatten(1, 2)[:, : value.shape[1]].unflatten(2, target.shape[2:]))
        return out

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.options = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, grad_out):
        query, key, value, geometry = inputs = ctx.saved_tensors
        options, needs_geometry = ctx.options, ctx.needs_input_grad[3]
        dtype = _accumulation_dtype(*inputs)
        kernel_size, groups = geometry.shape[-1], query.shape[1]
        # Summed over tiles that overlap, so in the dtype of the computation.
        grad_query, grad_key, grad_value, grad_geometry = (torch.zeros_like(x, dtype=dtype) for x in inputs)
        with _without_autocast(value.device):
            for tile in _tiles(query, key, kernel_size, options):
                index = _window_index(tile, kernel_size, options, value.device)
                bias = _bias(geometry, index, dtype)
                q, k = (x.to(dtype).flatten(2) for x in (tile.of_output(query), tile.of_input(key)))
                slope, weights = _weigh(q, k, bias, options.similarity)
                v = _by_group(tile.of_input(value), options, groups, dtype)
                grad = _by_group(tile.of_output(grad_out), options, groups, dtype)

                by_value = grad @ weights
                by_weight = grad.mT @ v
                by_score = weights * (by_weight - torch.linalg.vecdot(weights, by_weight).unsqueeze(3))
                if slope is None:
                    by_query, by_key = (by_score @ k.unsqueeze(3)).squeeze(3), (q.unsqueeze(2) @ by_score).squeeze(2)
                else:
                    factor = 2 if options.similarity == "squared_difference" else 1
                    by_slope = by_score * slope
                    by_query, by_key = -factor * by_slope.sum(3), factor * by_slope.sum(2)

                for whole, part in (
                    (tile.of_output(grad_query), by_query),
                    (tile.of_input(grad_key), by_key),
                    (tile.of_input(grad_value), by_value.flatten(1, 2)[:, : value.shape[1]]),
                ):
                    whole += part.unflatten(2, whole.shape[2:])
                if needs_geometry:
                    taps = _sum_by_tap(by_score.sum(0), index, kernel_size**2)
                    grad_geometry += taps.view_as(geometry)
        grads = [grad_query, grad_key, grad_value, grad_geometry if needs_geometry else None]
        return *(g if g is None else g.to(x.dtype) for g, x in zip(grads, inputs, strict=True)), None


def local_relation_unfold(
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
    """Same arguments and result as `local_relation`, which checks them first. Computes in float32 or wider."""
    return _LocalRelation.apply(query, key, value, geometry, Options(stride, dilation, similarity, channels_per_group))
