"""The local relation in plain torch, in tiles: what runs wherever no fused backend can.

The output is cut into tiles of a few positions. The windows of a tile lie in one small patch of the image, so
a tile is dense masked attention between its positions and the pixels of its patch: scores are a
(positions, pixels) matrix per group, with a bias gathered from the geometry that is -inf outside the window
and the image, and the aggregation is a batched matrix product. Small tiles waste few scores but would cost
many calls, so a row of tiles is one: keys and values are laid out once as strips, the columns that one column
of tiles sees, and what a row of tiles sees are rows of the strips. No window is ever copied out: strips hold
each pixel two or three times. A map of 8x8 and below is a single tile, and its own patch.

Zero weights outside the window take part in that product, so a NaN or infinity reaches every position of
its tile, not only those that see it.

The backward pass keeps the inputs only and recomputes the weights, so forward and backward both need,
beside their results, a few arrays of the size of `value` at most, or of a fixed size. It is written in
differentiable operations: with `create_graph` torch records them, and can differentiate again.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Cut(NamedTuple):
    """How finely maps and batches are cut.

    Attributes:
        whole_map: maps of at most this many pixels are one tile: nearly every pixel sees nearly every other.
        tile: rows of output positions, and columns of pixels that such a row steps over, in a tile of a larger map.
        least_chunk, largest_chunk: at most as many scores as there are values are held at once; never fewer than the
            first of these (small operations cost their calls), and never more than the second.
    """

    whole_map: int
    tile: tuple[int, int]
    least_chunk: int
    largest_chunk: float


#: A 7x7 window costs 80 scores for 49; smaller tiles save less of that than their products and copies cost. Chunks fit
#: the caches.
CPU_CUT = Cut(64, (2, 4), 2**16, 2**20)
#: An accelerator has the arithmetic to spare, and waits for every call: large tiles, 196 scores for 49, and few chunks.
ACCELERATOR_CUT = Cut(256, (8, 8), 2**24, math.inf)


def _cut_for(device: torch.device) -> Cut:
    return CPU_CUT if device.type == "cpu" else ACCELERATOR_CUT


class Options(NamedTuple):
    """What decides the function, beside the tensors."""

    stride: int
    dilation: int
    similarity: str
    channels_per_group: int


class _Tiling:
    """How the maps of one call are cut; pairs are (rows, columns).

    Attributes:
        counts: how many tiles there are.
        tile, patch: output positions of a tile, and pixels that they see.
        step: pixels from one patch to the next.
        before: rows and columns of the first patch that lie before the image. Such columns are padded, rows left out.
        index: (positions, pixels) of every tile, the entry of the flat geometry, k * k where a pixel is no neighbour.
    """

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, geometry: Tensor, options: Options) -> None:
        self.groups, self.depth = query.shape[1], options.channels_per_group
        self.dtype = functools.reduce(torch.promote_types, (x.dtype for x in (query, key, value, geometry)), torch.float32)
        self.out_size, self.size, self.kernel_size = query.shape[2:], key.shape[2:], geometry.shape[-1]
        self._cut = cut = _cut_for(value.device)
        if math.prod(self.size) <= cut.whole_map:
            self.counts, self.tile, self.patch, self.step, self.before = (1, 1), self.out_size, self.size, self.size, 0
        else:
            self.before = options.dilation * (self.kernel_size // 2)
            # Strips are never more than about three times as wide as the part of the map that they stand for.
            self.tile = (cut.tile[0], -(-max(cut.tile[1], self.before) // options.stride))
            self.counts = [-(-length // part) for length, part in zip(self.out_size, self.tile, strict=True)]
            self.step = [length * options.stride for length in self.tile]
            self.patch = [length - options.stride + 2 * self.before + 1 for length in self.step]
        # Columns of all patches together, and the padding of an image to that: less than none where no patch sees its end.
        self.span = (self.counts[1] - 1) * self.step[1] + self.patch[1]
        self.padding = (self.before, self.span - self.before - self.size[1])

        row_taps = self._taps(0, options, geometry.device)[:, None, :, None]
        column_taps = self._taps(1, options, geometry.device)[None, :, None, :]
        is_neighbour = (row_taps >= 0) & (column_taps >= 0)
        index = torch.where(is_neighbour, row_taps * self.kernel_size + column_taps, self.kernel_size**2)
        self.index = index.flatten(2).flatten(0, 1)
        columns = torch.arange(self.patch[1], device=geometry.device) - self.before
        columns = columns + torch.arange(self.counts[1], device=geometry.device)[:, None] * self.step[1]
        is_outside = (columns < 0) | (columns >= self.size[1])
        self._column_bias = torch.zeros(is_outside.shape, dtype=self.dtype, device=geometry.device)
        self._column_bias = self._column_bias.masked_fill_(is_outside, float("-inf"))[:, None, None, :]
        self._window_bias = F.pad(geometry.to(self.dtype).flatten(1), (0, 1), value=float("-inf"))[:, None, self.index]

    def _taps(self, axis: int, options: Options, device: torch.device) -> Tensor:
        """(tile, patch), for its rows (or columns): which of k neighbours the second is to the first, -1 where it is none."""
        out = torch.arange(self.tile[axis], device=device)[:, None]
        offsets = torch.arange(self.patch[axis], device=device) - self.before - out * options.stride
        taps = torch.div(offsets, options.dilation, rounding_mode="floor") + self.kernel_size // 2
        is_neighbour = (offsets % options.dilation == 0) & (taps >= 0) & (taps < self.kernel_size)
        return torch.where(is_neighbour, taps, -1)

    def _rows(self, row: int) -> slice:
        """Of the image, those that a row of tiles sees."""
        first = row * self.step[0] - self.before
        return slice(max(first, 0), min(first + self.patch[0], self.size[0]))

    def within(self, pixels: Tensor, row: int) -> Tensor:
        """(..., pixels of a patch) -> (..., rows, columns) of those in the image, a view."""
        rows, first = self._rows(row), row * self.step[0] - self.before
        return pixels.unflatten(-1, self.patch)[..., rows.start - first : rows.stop - first, :]

    def bias(self, row: int) -> Tensor:
        """(G, columns, positions, pixels) of a row of tiles: the geometry, -inf where a pixel is no neighbour."""
        bias = (self.within(self._window_bias, row) + self._column_bias).flatten(3)
        height, width = self.out_size[0] - row * self.tile[0], self.out_size[1] - (self.counts[1] - 1) * self.tile[1]
        # A softmax over nothing would be NaN where nothing is asked for.
        positions = bias.unflatten(2, self.tile)
        positions[:, :, height:] = 0
        positions[:, -1, :, width:] = 0
        return bias

    def chunks(self, value: Tensor) -> Iterator[slice]:
        """The images of the batch, some at a time."""
        chunk = min(max(self._cut.least_chunk, value.numel()), self._cut.largest_chunk)
        largest = self.groups * self.counts[1] * max(self.index.numel(), self.depth * self.size[0] * self.patch[1])
        images = max(1, chunk // max(1, largest))
        return (slice(first, min(first + images, len(value))) for first in range(0, len(value), images))

    def seen(self, strips: Tensor, row: int) -> Tensor:
        """(n, G, columns, depth, rows, columns) of the pixels that a row of tiles sees, a view."""
        return strips[..., self._rows(row), :]

    def tiles(self, maps: Tensor, depth: int) -> Tensor:
        """Output maps (n, C, h, w) -> (rows, n, G, columns, depth, positions), zeros for channels that the last group lacks."""
        (rows, columns), (height, width) = self.counts, self.tile
        past = (0, columns * width - maps.shape[3], 0, rows * height - maps.shape[2], 0, self.groups * depth - maps.shape[1])
        padded = F.pad(maps.to(self.dtype), past).unflatten(1, (self.groups, depth))
        return padded.unflatten(4, (columns, width)).unflatten(3, (rows, height)).permute(3, 0, 1, 5, 2, 4, 6).flatten(5)

    def join_tiles(self, tiles: Tensor, channels: int) -> Tensor:
        """The way back."""
        maps = tiles.unflatten(5, self.tile).permute(1, 2, 4, 0, 5, 3, 6).flatten(5).flatten(3, 4).flatten(1, 2)
        return maps[:, :channels, : self.out_size[0], : self.out_size[1]]

    def strips(self, maps: Tensor, depth: int) -> Tensor:
        """Input maps (n, C, H, W) -> (n, G, columns, depth, rows, columns of a patch)."""
        padded = F.pad(maps.to(self.dtype), (*self.padding, 0, 0, 0, self.groups * depth - maps.shape[1]))
        strips = padded.unflatten(1, (self.groups, depth)).unfold(4, self.patch[1], self.step[1])
        return strips.permute(0, 1, 4, 2, 3, 5).contiguous()

    def sum_strips(self, strips: Tensor, channels: int) -> Tensor:
        """The way back of gradients: a pixel's is the sum over the strips that hold it."""
        strips = strips.transpose(2, 3).flatten(1, 2)[:, :channels].transpose(2, 3)
        pieces = strips.split(self.step[1], dim=4)
        total = strips.new_zeros(*strips.shape[:3], strips.shape[3] + len(pieces) - 1, self.step[1])
        for first, piece in enumerate(pieces):
            total[:, :, :, first : first + strips.shape[3], : piece.shape[4]] += piece
        return F.pad(total.flatten(3)[..., : self.span], [-width for width in self.padding])


def _sum_by_tap(scores: Tensor, index: Tensor, taps: int) -> Tensor:
    """(G, positions, pixels) -> (G, taps). Gathers instead of scattering, so that order never depends on timing."""
    positions, pixels = index.shape
    # The pixel that is tap t of each position; a column of zeros stands in for those outside.
    pixel_of = torch.full((positions, taps + 1), pixels, device=index.device)
    pixel_of.scatter_(1, index, torch.arange(pixels, device=index.device).expand(positions, -1))
    pixel_of = pixel_of[:, :taps].expand(scores.shape[0], -1, -1)
    return F.pad(scores, (0, 1)).gather(2, pixel_of).sum(1)


def _weigh(query: Tensor, key: Tensor, bias: Tensor, similarity: str) -> tuple[Tensor | None, Tensor]:
    """(what the scores' gradient is multiplied with, weights) of query (..., P, 1) and key (..., 1, Q)."""
    if similarity == "multiplication":
        return None, torch.addcmul(bias, query, key).softmax(dim=-1)
    difference = query - key
    if similarity == "squared_difference":
        return difference, torch.addcmul(bias, difference, difference, value=-1).softmax(dim=-1)
    return difference.sign(), (bias - difference.abs()).softmax(dim=-1)


def _without_autocast(device: torch.device) -> AbstractContextManager:
    """Autocast would round the weights to half precision for the matrix product."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


class _LocalRelation(torch.autograd.Function):
    @staticmethod
    def forward(query, key, value, geometry, options):
        out = value.new_empty(*value.shape[:2], *query.shape[2:])
        with _without_autocast(value.device):
            tiling = _Tiling(query, key, value, geometry, options)
            for images in tiling.chunks(value):
                q, k = tiling.tiles(query[images], 1), tiling.strips(key[images], 1)
                v, found = tiling.strips(value[images], tiling.depth), []
                for row in range(tiling.counts[0]):
                    patch, bias = tiling.seen(k, row).flatten(4), tiling.bias(row)
                    _, weights = _weigh(q[row].mT, patch, bias, options.similarity)
                    found.append(tiling.seen(v, row).flatten(4) @ weights.mT)
                out[images] = tiling.join_tiles(torch.stack(found), value.shape[1])
        return out

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.options = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, grad_out):
        query, key, value, geometry = inputs = ctx.saved_tensors
        options, needs_geometry = ctx.options, ctx.needs_input_grad[3]
        grad_query, grad_key, grad_value = (torch.empty_like(x) for x in inputs[:3])
        with _without_autocast(value.device):
            tiling = _Tiling(*inputs, options)
            grad_bias = torch.zeros(len(geometry), *tiling.index.shape, dtype=tiling.dtype, device=value.device)
            for images in tiling.chunks(value):
                q, grad = tiling.tiles(query[images], 1), tiling.tiles(grad_out[images], tiling.depth)
                k, v = tiling.strips(key[images], 1), tiling.strips(value[images], tiling.depth)
                grad_q, grad_k, grad_v = [], torch.zeros_like(k), torch.zeros_like(v)
                for row in range(tiling.counts[0]):
                    patch, bias = tiling.seen(k, row).flatten(4), tiling.bias(row)
                    slope, weights = _weigh(q[row].mT, patch, bias, options.similarity)
                    by_value = grad[row] @ weights
                    by_weight = weights * (grad[row].mT @ tiling.seen(v, row).flatten(4))
                    by_score = torch.addcmul(by_weight, weights, by_weight.sum(4, keepdim=True), value=-1)
                    if slope is None:
                        by_query, by_key = patch @ by_score.mT, q[row] @ by_score
                    else:
                        factor = 2 if options.similarity == "squared_difference" else 1
                        by_slope = by_score * slope
                        by_query, by_key = -factor * by_slope.sum(4).unsqueeze(3), factor * by_slope.sum(3, keepdim=True)
                    grad_q.append(by_query)
                    for whole, part in ((grad_k, by_key), (grad_v, by_value)):
                        tiling.seen(whole, row).add_(part.unflatten(4, (-1, tiling.patch[1])))
                    if needs_geometry:
                        tiling.within(grad_bias, row).add_(by_score.sum((0, 2)).unflatten(2, (-1, tiling.patch[1])))
                grad_query[images] = tiling.join_tiles(torch.stack(grad_q), query.shape[1])
                grad_key[images] = tiling.sum_strips(grad_k, key.shape[1])
                grad_value[images] = tiling.sum_strips(grad_v, value.shape[1])
            grad_geometry = None
            if needs_geometry:
                grad_geometry = _sum_by_tap(grad_bias, tiling.index, tiling.kernel_size**2).view_as(geometry).to(geometry.dtype)
        return grad_query, grad_key, grad_value, grad_geometry, None


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
