"""Square attack: random search over squares, by the model's answers alone."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cache

import torch

from lrrobust.attacks.assignment import Assignment, Passes
from lrrobust.attacks.ball import l2_length, project
from lrrobust.attacks.climb import Search, Start, State, Step, climb, is_misclassified
from lrrobust.attacks.losses import margin
from lrrobust.threat import Norm

#: The share of pixels in a square is halved after so many of 10000 queries.
_HALVED_AFTER = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


def square(
    given: Assignment,
    *,
    norm: Norm,
    queries: int,
    p_init: float,
    rescale_schedule: bool,
    restarts: int,
) -> Passes:
    """Attack images at every budget, from the smallest up, until they are broken; no gradients are taken.

    A query changes one random square of the image and is kept if the margin between label and other
    classes shrank. In linf the search starts from vertical stripes at distance eps, and a query sets each
    colour in the square to eps above or below the image; in l2 it starts from a pattern of tiles, and a
    query moves the budget of one square to another, in the shape of a peak beside a trough. Squares
    cover a share `p_init` of the pixels at first, and ever fewer later.

    Every image has its own squares and colours, drawn for all its queries at once: results do not depend
    on who shares its batch.

    Args:
        given: the images, and who judges.
        norm: "linf" or "l2".
        queries: forward passes of a start, the start itself among them.
        p_init: see above.
        rescale_schedule: shrink squares in proportion to `queries`, as the paper does with other numbers of
            queries than its 10000, instead of after fixed numbers of them, as AutoAttack does.
        restarts: starts at a budget.

    Returns:
        Forward and backward passes by budget and image; int64 (len(ladder), N). The latter are 0.

    Source: Andriushchenko et al., Square Attack: a query-efficient black-box adversarial attack via random
    search, 2020, section 3. Unlike in the authors' code, squares reach the last row and column.
    """
    sizes = square_sizes(queries, p_init, rescale_schedule, *given.images.shape[-2:])
    kind = _LinfSquares if norm == "linf" else _L2Squares
    search = kind(given, sizes)
    forward = climb(given, starts=restarts, steps=queries, search=search)
    return forward, torch.zeros_like(forward)


def square_sizes(queries: int, p_init: float, rescale_schedule: bool, height: int, width: int) -> list[int]:
    """The side of the square in pixels after 0, 1, ... queries; at most that of the image.

    >>> sizes = square_sizes(5000, 0.8, False, 64, 64)
    >>> sizes[0], sizes[11], sizes[4999]
    (57, 40, 5)
    """
    sides = []
    for query in range(queries):
        at = query * 10000 // queries if rescale_schedule else query
        p = p_init / 2 ** sum(at > bound for bound in _HALVED_AFTER)
        sides.append(min(max(round(math.sqrt(p * height * width)), 1), height, width))
    return sides


class _Squares(Search, ABC):
    """The search; what a start and a query look like the norms say. As `lrrobust.attacks.climb` takes it."""

    def __init__(
        self,
        given: Assignment,
        sizes: Sequence[int],
    ) -> None:
        self._given = given
        self._channels, self._height, self._width = given.images.shape[1:]
        self._sizes = torch.tensor(sizes, device=given.images.device)

    @property
    @abstractmethod
    def _numbers(self) -> int:
        """How many uniform numbers a query takes."""

    def begin(self, starts: Sequence[Start]) -> State:
        first, uniform = [], []
        for start in starts:
            eps = self._given.ladder[start.level]
            generator = self._given.draw(start.row, eps, start.number)
            first.append(self._first(self._given.images[start.row], eps, generator))
            uniform.append(torch.rand(len(self._sizes), self._numbers, generator=generator))
        query = torch.stack(first)
        return {
            "query": query,
            "best": query,
            "best_margin": query.new_full((len(starts),), -math.inf, dtype=torch.float64),
            "uniform": torch.stack(uniform).to(query.device),
        }

    def step(self, state: State) -> Step:
        query, images, labels = state["query"], self._given.images[state["row"]], self._given.labels[state["row"]]
        with torch.no_grad():
            logits = self._given.model(query)
        found = margin(logits, labels)
        is_better = found > state["best_margin"]
        state["best_margin"] = torch.where(is_better, found, state["best_margin"])
        state["best"] = torch.where(is_better[:, None, None, None], query, state["best"])
        uniform = state["uniform"][torch.arange(len(query), device=query.device), state["steps"]]
        state["query"] = self._next(images, state["best"], state["eps"], self._sizes[state["steps"]], uniform)
        return Step(query, is_misclassified(logits, labels), state["best"])

    @abstractmethod
    def _first(self, image: torch.Tensor, eps: float, generator: torch.Generator) -> torch.Tensor:
        """Where the search of one image (C, H, W) starts."""

    @abstractmethod
    def _next(
        self, images: torch.Tensor, best: torch.Tensor, eps: torch.Tensor, sizes: torch.Tensor, uniform: torch.Tensor
    ) -> torch.Tensor:
        """The queries (n, C, H, W) after those in `best`, made of uniform (n, numbers), squares of sizes (n,)."""

    def _places(self, uniform: torch.Tensor, sizes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Places within squares drawn by uniform (n, 2): row (n, 1, H, 1), column (n, 1, 1, W), from 0 to size - 1."""
        top = _below(uniform[:, 0], self._height - sizes + 1)
        left = _below(uniform[:, 1], self._width - sizes + 1)
        rows = torch.arange(self._height, device=sizes.device)[None, :] - top[:, None]
        columns = torch.arange(self._width, device=sizes.device)[None, :] - left[:, None]
        return rows[:, None, :, None], columns[:, None, None, :]

    def _square(self, uniform: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
        """Which pixels lie in the squares drawn by uniform (n, 2); bool (n, 1, H, W)."""
        rows, columns = self._places(uniform, sizes)
        sizes = sizes[:, None, None, None]
        return (rows >= 0) & (rows < sizes) & (columns >= 0) & (columns < sizes)


class _LinfSquares(_Squares):
    @property
    def _numbers(self) -> int:
        return 2 + self._channels

    def _first(self, image: torch.Tensor, eps: float, generator: torch.Generator) -> torch.Tensor:
        stripes = _signs(torch.rand(self._channels, 1, self._width, generator=generator))
        return (image + eps * stripes.to(image)).clamp(0, 1)

    def _next(
        self, images: torch.Tensor, best: torch.Tensor, eps: torch.Tensor, sizes: torch.Tensor, uniform: torch.Tensor
    ) -> torch.Tensor:
        is_in = self._square(uniform[:, :2], sizes)
        change = eps * _signs(uniform[:, 2:, None, None]).to(best)
        query = torch.where(is_in, (images + change).clamp(0, 1), best)
        # A query that changes nothing is wasted; the opposite colours do change something, or nothing can.
        is_same = (query == best).flatten(1).all(1)[:, None, None, None]
        return torch.where(is_in & is_same, (images - change).clamp(0, 1), query)


class _L2Squares(_Squares):
    @property
    def _numbers(self) -> int:
        return 5 + self._channels

    def _first(self, image: torch.Tensor, eps: float, generator: torch.Generator) -> torch.Tensor:
        """Five by five tiles, as far as they fit; each a peak and a trough, side by side or one above the other."""
        side = min(max(min(self._height, self._width) // 5, 2), self._height, self._width)
        down, across = self._height // side, self._width // side
        uniform = torch.rand(down * across, 1 + self._channels, generator=generator)
        tile = _peak_and_trough(side)
        turned = torch.where(uniform[:, :1, None] < 0.5, tile, tile.T)
        tiles = turned[:, None] * _signs(uniform[:, 1:, None, None])
        pattern = tiles.view(down, across, self._channels, side, side).permute(2, 0, 3, 1, 4)
        delta = torch.zeros(image.shape)
        top, left = (self._height - side * down) // 2, (self._width - side * across) // 2
        delta[:, top : top + side * down, left : left + side * across] = pattern.reshape(
            self._channels, side * down, side * across
        )
        moved = image + eps * _normalised(delta, (0, 1, 2)).to(image)
        return project(image[None], moved[None], image.new_full((1, 1, 1, 1), eps), "l2")[0]

    def _next(
        self, images: torch.Tensor, best: torch.Tensor, eps: torch.Tensor, sizes: torch.Tensor, uniform: torch.Tensor
    ) -> torch.Tensor:
        delta = best - images
        # Odd, and of three pixels at least, as far as the image is large enough.
        largest = min(self._height, self._width)
        sizes = (sizes.clamp_min(3) // 2 * 2 + 1).clamp_max(largest - (largest + 1) % 2)
        target, source = self._square(uniform[:, :2], sizes), self._square(uniform[:, 2:4], sizes)
        # Each colour gets back what both squares held of it, and an equal share of what the box had cut off.
        unused = (eps.double().square() - l2_length(delta).square()).clamp_min(0)
        share = (l2_length(delta * (target | source), (2, 3)).square() + unused / self._channels).sqrt().to(delta)
        shape = self._shapes(uniform[:, :2], sizes, uniform[:, 4] < 0.5).to(delta) * _signs(uniform[:, 5:, None, None]).to(
            delta
        )
        shape = shape + _normalised(delta * target, (2, 3))
        moved = torch.where(target, share * _normalised(shape * target, (2, 3)), delta.masked_fill(source, 0))
        return project(images, images + eps * _normalised(moved, (1, 2, 3)), eps, "l2")

    def _shapes(self, uniform: torch.Tensor, sizes: torch.Tensor, is_turned: torch.Tensor) -> torch.Tensor:
        """Peak and trough in squares of uniform (n, 2), turned where it is said; (n, 1, H, W)."""
        rows, columns = self._places(uniform, sizes)
        shapes = torch.zeros(len(sizes), 1, self._height, self._width, device=sizes.device)
        for size in sizes.unique().tolist():
            of_size = (sizes == size).nonzero().flatten()
            pattern = _peak_and_trough(size).to(sizes.device)
            row, column = (place[of_size].clamp(0, size - 1) for place in (rows, columns))
            turned = is_turned[of_size, None, None, None]
            shapes[of_size] = torch.where(turned, pattern[column, row], pattern[row, column])
        return shapes


def _below(uniform: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """Integers from 0 to count - 1."""
    # A product of float32 can round up to count.
    return torch.minimum((uniform * count).long(), count - 1)


def _signs(uniform: torch.Tensor) -> torch.Tensor:
    return torch.where(uniform < 0.5, -1.0, 1.0)


def _normalised(values: torch.Tensor, dim: tuple[int, ...]) -> torch.Tensor:
    """Of length 1 over `dim`; zeros stay."""
    return (values / l2_length(values, dim).clamp_min(torch.finfo(values.dtype).tiny)).to(values)


@cache
def _peak_and_trough(size: int) -> torch.Tensor:
    """A pattern (size, size) of length 1: a peak in the upper half, its negative in the lower."""
    upper = size // 2
    pattern = torch.cat([_peak(upper, size), -_peak(size - upper, size)])
    return pattern / pattern.norm()


def _peak(height: int, width: int) -> torch.Tensor:
    """Sums of 1 / j^2 from the distance to the centre, in the larger of rows and columns, plus one outwards."""
    if not height:
        return torch.zeros(0, width)
    distance = torch.maximum(
        (torch.arange(height) - height // 2).abs()[:, None], (torch.arange(width) - width // 2).abs()[None, :]
    )
    terms = torch.arange(1, max(height, width) // 2 + 2).float() ** -2
    from_centre = terms.flip(0).cumsum(0).flip(0)
    return from_centre[distance] / from_centre[distance].norm()
