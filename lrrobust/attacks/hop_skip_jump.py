"""HopSkipJump: along the boundary to the nearest adversarial image, by the class that the model answers alone."""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Generator

import torch

from lrrobust.attacks.assignment import Assignment, Passes
from lrrobust.attacks.ball import l2_length
from lrrobust.attacks.climb import is_clearly_misclassified
from lrrobust.threat import Norm, distance

#: Images that are searched for at the same time: while one asks about a single image, others fill the batch.
_AT_ONCE = 8

#: Random images that a search may begin at, before plain ones.
_RANDOM_STARTS = 64

#: How far beside a point directions are asked for their class, in units of its distance; and by what this grows where more
#: than that share of the answers is the same, as of models that round their images.
_PROBE, _GROWTH, _ALIKE = 0.01, 2.0, 0.9

#: Points that are drawn and asked about together, whatever passes through the model at once.
_BLOCK = 16

#: An estimate by fewer directions leads nowhere.
_FEWEST_DIRECTIONS = 10

#: Times that a step is halved until it stays in another class.
_HALVINGS = 20

#: Asks about images (n, C, H, W), is told which are misclassified, bool (n,).
_Answers = Generator[torch.Tensor, torch.Tensor, torch.Tensor]
_Point = Generator[torch.Tensor, torch.Tensor, "torch.Tensor | None"]
_Estimate = Generator[torch.Tensor, torch.Tensor, tuple[torch.Tensor, float]]


def hop_skip_jump(given: Assignment, *, norm: Norm, queries: int, initial_evaluations: int, enough: float) -> Passes:
    """Look for the nearest adversarial image of each image by the model's classes: no logits, no gradients.

    From any image of another class to the boundary, by bisection of the way to the clean image; there random directions are
    asked for their class, the mean of those that leave the label's is a step away from the boundary, and so on. The number of
    directions rises with the square root of the number of steps, as the length of steps falls.

    Unlike the paper's, directions are as long as a hundredth of the distance, since its own are lost to the rounding of
    float32, and longer where answers hardly differ. Of all points on the boundary the nearest is proposed.

    Args:
        given: the images, and who judges; its `draw` gives all that is random.
        norm: "linf" or "l2".
        queries: forward passes of an image, at most.
        initial_evaluations: directions of the first estimate.
        enough: an image is done as soon as its adversarial image is no farther away.

    Returns:
        Forward and backward passes by budget and image, int64 (1, N); the latter are 0.

    Source: Chen, Jordan and Wainwright, HopSkipJumpAttack: a query-efficient decision-based attack, 2020, algorithm 2.
    """
    taken = torch.zeros(1, len(given.images), dtype=torch.int64)
    waiting = deque(given.levels.nonzero().flatten().tolist())
    searches: dict[int, _Point] = {}
    asked: dict[int, torch.Tensor] = {}
    while waiting or searches:
        while waiting and len(searches) < _AT_ONCE:
            row = waiting.popleft()
            search = _Search(given, row, norm, queries, initial_evaluations, enough)
            searches[row] = search.run()
            asked[row] = next(searches[row])
        for row, answers in _ask(given, asked).items():
            taken[0, row] += len(answers)
            try:
                asked[row] = searches[row].send(answers)
            except StopIteration as end:
                nearest = given.images[row] if end.value is None else end.value
                given.claim([row], nearest[None], [math.inf], [True])
                del searches[row], asked[row]
    return taken, torch.zeros_like(taken)


@torch.no_grad()
def _ask(given: Assignment, asked: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
    """Which of the images that each search asks about are misclassified, by its row."""
    counts = [len(images) for images in asked.values()]
    rows = torch.tensor(list(asked)).repeat_interleave(torch.tensor(counts))
    labels = given.labels[rows.to(given.labels.device)]
    images = torch.cat(list(asked.values()))
    parts = zip(images.split(given.batch_size), labels.split(given.batch_size), strict=True)
    answers = torch.cat([is_clearly_misclassified(given.model(part), of_part) for part, of_part in parts])
    return dict(zip(asked, answers.split(counts), strict=True))


class _Search:
    """The search of one image (C, H, W); its methods ask by `yield`."""

    def __init__(self, given: Assignment, row: int, norm: Norm, queries: int, initial_evaluations: int, enough: float) -> None:
        self._image, self._norm, self._enough = given.images[row], norm, enough
        self._left, self._initial, self._most_at_once = queries, initial_evaluations, given.batch_size
        self._generator = given.draw(row, math.inf, 0)
        size = self._image.numel()
        #: How near a point comes to the boundary: less than what directions at random move across it.
        self._precision = _PROBE / math.sqrt(size)
        self._bisections = math.ceil(math.log2(1 / self._precision))
        #: Of a direction, where `_PROBE` is one of the distance in the norm.
        self._direction_length = math.sqrt(size) if norm == "linf" else 1.0

    def run(self) -> _Point:
        """Ends with the nearest misclassified point, or None where none was found."""
        point = yield from self._begin()
        if point is None:
            return None
        nearest = point = yield from self._to_boundary(point)
        probe, steps = _PROBE, 0
        while self._distance(nearest) > self._enough:
            steps += 1
            count = min(int(self._initial * math.sqrt(steps)), self._left - self._bisections - _HALVINGS)
            if count < _FEWEST_DIRECTIONS:
                break
            length = self._distance(point)
            direction, share = yield from self._estimate(point, probe * length * self._direction_length, count)
            # On a plain boundary half of the directions cross it.
            probe = probe * _GROWTH if max(share, 1 - share) > _ALIKE else max(probe / _GROWTH, _PROBE)
            moved = yield from self._leap(point, direction, length / math.sqrt(steps))
            if moved is not None:
                point = yield from self._to_boundary(moved)
                nearest = min(nearest, point, key=self._distance)
        return nearest

    def _ask(self, points: torch.Tensor) -> _Answers:
        self._left -= len(points)
        answers = []
        for part in points.split(self._most_at_once):
            answers.append((yield part))
        return torch.cat(answers)

    def _distance(self, point: torch.Tensor) -> float:
        return float(distance(self._image[None], point[None], self._norm))

    def _begin(self) -> _Point:
        """Any image of another class: noise, or a plain colour."""
        channels = len(self._image)
        plain = torch.tensor([(0.5,) * channels, *itertools.islice(itertools.product((0.0, 1.0), repeat=channels), 8)])
        noise = torch.rand(_RANDOM_STARTS, *self._image.shape, generator=self._generator)
        starts = torch.cat([noise, plain[:, :, None, None].expand(-1, *self._image.shape)])
        for points in starts.to(self._image)[: self._left].split(_BLOCK):
            is_wrong = yield from self._ask(points)
            if is_wrong.any():
                return points[is_wrong.nonzero()[0, 0]]
        return None

    def _to_boundary(self, point: torch.Tensor) -> _Point:
        """From a misclassified point towards the image, by bisection: just before it comes back into its class."""
        way = point - self._image
        farthest = way.abs().max()
        inside, outside, nearest = 0.0, 1.0, point
        for _ in range(min(self._bisections, self._left)):
            share = (inside + outside) / 2
            # In linf values come nearer that are farther away than all others may be.
            closer = way.clamp(-share * farthest, share * farthest) if self._norm == "linf" else share * way
            moved = self._image + closer
            if (yield from self._ask(moved[None])).item():
                outside, nearest = share, moved
            else:
                inside = share
        return nearest

    def _estimate(self, point: torch.Tensor, reach: float, count: int) -> _Estimate:
        """Where misclassified images lie from a point on the boundary, of length 1 in the norm, and their share."""
        along_wrong, along_all = torch.zeros_like(point), torch.zeros_like(point)
        wrong = 0
        for first in range(0, count, _BLOCK):
            drawn = torch.randn(min(_BLOCK, count - first), *point.shape, generator=self._generator).to(point)
            directions = drawn / l2_length(drawn).to(drawn)
            points = (point + reach * directions).clamp(0, 1)
            # What the box cut off was not asked.
            directions = points - point
            is_wrong = yield from self._ask(points)
            along_wrong += directions[is_wrong].sum(0)
            along_all += directions.sum(0)
            wrong += int(is_wrong.sum())
        share = wrong / count
        # Signs less their mean: estimates of directions that are asked anyway have less variance so.
        direction = 2 * (along_wrong - share * along_all) if 0 < wrong < count else (2 * share - 1) * along_all
        if self._norm == "linf":
            return direction.sign(), share
        length = l2_length(direction[None])[0].clamp_min(torch.finfo(direction.dtype).tiny)
        return direction / length.to(direction), share

    def _leap(self, point: torch.Tensor, direction: torch.Tensor, length: float) -> _Point:
        """As far along a direction as a halved length stays misclassified, or None."""
        for _ in range(min(_HALVINGS, self._left)):
            moved = (point + length * direction).clamp(0, 1)
            if (yield from self._ask(moved[None])).item():
                return moved
            length /= 2
        return None
