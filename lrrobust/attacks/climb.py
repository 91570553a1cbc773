"""From budget to budget and start to start: what searches that step all their images at once have in common."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch

from lrrobust.attacks.assignment import Assignment, Claim
from lrrobust.attacks.losses import margin

#: What a search knows of the images of a batch: tensors whose first dimension is the image's place in it.
State = dict[str, torch.Tensor]


#: Logits of the same image in different batches differ by about this share of the largest.
_ROUNDING = 1e-6


class Start(NamedTuple):
    """One start of one image: its row among the attacked images, its budget's place on the ladder, its number."""

    row: int
    level: int
    number: int


class Step(NamedTuple):
    """What one step of a search found, for each image of the batch.

    Attributes:
        evaluated: (n, C, H, W), what the model has just seen.
        is_wrong: bool (n,), where the model misclassified it.
        proposed: (n, C, H, W), what to propose where the search ends with this step.
    """

    evaluated: torch.Tensor
    is_wrong: torch.Tensor
    proposed: torch.Tensor


class Search(Protocol):
    """How an attack searches. Images must not influence each other."""

    def begin(self, starts: Sequence[Start]) -> State:
        """What to know of starts before their first step."""

    def step(self, state: State) -> Step:
        """One forward pass of every image; changes `state`.

        Beside what `begin` returned, `state` holds `row` (n,), `eps` (n, 1, 1, 1), and `steps` (n,), how
        many steps each start has behind it.
        """

    def end(self, starts: Sequence[Start], state: State) -> None:
        """Called with starts that came to their end and left the image unbroken; does nothing unless it is defined anew."""


def climb(
    given: Assignment,
    *,
    starts: int,
    steps: int,
    search: Search,
) -> torch.Tensor:
    """Take every image through all starts at every budget, from the smallest up, until it is broken.

    What the model misclassifies is claimed at once, and the last proposal of every start in any case. The
    place of an image that is broken, or at the end of a start, goes to the next that waits: the batch is
    full as long as any does.

    Args:
        given: the images, and who judges; nothing is searched at a budget of 0.
        starts: starts of an image at one budget.
        steps: steps of a start.
        search: the attack.

    Returns:
        Steps by budget and image, int64 (len(ladder), N), on the CPU.
    """
    images, ladder, claim = given.images, given.ladder, given.claim
    taken = torch.zeros(len(ladder), len(images), dtype=torch.int64)
    first = next((level for level, eps in enumerate(ladder) if eps > 0), len(ladder))
    tops = given.levels.tolist()
    waiting = deque(Start(row, first, 0) for row, top in enumerate(tops) if first < top)
    active: list[Start] = []
    state: State = {}
    while waiting or active:
        joining = [waiting.popleft() for _ in range(min(len(waiting), given.batch_size - len(active)))]
        if joining:
            state = _join(state, _begin(search, joining, images, ladder))
            active += joining
        evaluated, is_wrong, proposed = search.step(state)
        state["steps"] = state["steps"] + 1
        for start in active:
            taken[start.level, start.row] += 1
        is_at_end = state["steps"] == steps
        broken = _claim(active, is_wrong.nonzero().flatten().tolist(), evaluated, ladder, claim, is_last=False)
        ended = [place for place in is_at_end.nonzero().flatten().tolist() if place not in broken]
        broken |= _claim(active, ended, proposed, ladder, claim, is_last=True)
        standing = [place for place in ended if place not in broken]
        if standing:
            search.end([active[place] for place in standing], _select(state, standing))
            onward = (_next(active[place], starts) for place in standing)
            waiting.extend(start for start in onward if start.level < tops[start.row])
        if broken or ended:
            left = broken.union(ended)
            staying = [place for place in range(len(active)) if place not in left]
            state, active = _select(state, staying), [active[place] for place in staying]
    return taken


def _begin(search: Search, starts: Sequence[Start], images: torch.Tensor, ladder: Sequence[float]) -> State:
    rows = torch.tensor([start.row for start in starts], device=images.device)
    eps = images.new_tensor([ladder[start.level] for start in starts])[:, None, None, None]
    return {"row": rows, "eps": eps, "steps": torch.zeros_like(rows), **search.begin(starts)}


def _next(start: Start, starts: int) -> Start:
    if start.number + 1 < starts:
        return start._replace(number=start.number + 1)
    return Start(start.row, start.level + 1, 0)


def _claim(
    active: Sequence[Start],
    places: Sequence[int],
    proposals: torch.Tensor,
    ladder: Sequence[float],
    claim: Claim,
    is_last: bool,
) -> set[int]:
    """Has the proposals at some places judged; the places of those that broke their images."""
    if not places:
        return set()
    claimed = [active[place] for place in places]
    is_broken = claim(
        [start.row for start in claimed],
        proposals[places].contiguous(),
        [ladder[start.level] for start in claimed],
        [is_last] * len(places),
    )
    return {place for place, broken in zip(places, is_broken, strict=True) if broken}


def _select(state: State, places: Sequence[int]) -> State:
    index = torch.tensor(places, dtype=torch.int64, device=state["row"].device)
    return {key: value[index] for key, value in state.items()}


def _join(state: State, joining: State) -> State:
    return {key: torch.cat([state[key], joining[key]]) for key in joining} if state else joining


Loss = Callable[[torch.Tensor], torch.Tensor]


def evaluate(model: Callable[[torch.Tensor], torch.Tensor], iterates: torch.Tensor, loss: Loss) -> tuple[torch.Tensor, ...]:
    """One forward and backward: logits (n, K), the loss of each image (n,) and its gradient by the iterate."""
    iterates = iterates.detach().requires_grad_()
    logits = model(iterates)
    losses = loss(logits)
    (gradient,) = torch.autograd.grad(losses.sum(), iterates)
    return logits.detach(), losses.detach(), gradient


def is_misclassified(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Which images another class won with finite logits; bool (n,)."""
    return (logits.argmax(1) != labels) & logits.isfinite().all(1)


def rounding(logits: torch.Tensor) -> torch.Tensor:
    """By about how much the logits (n, K) of an image differ from batch to batch, (n,)."""
    return _ROUNDING * logits.abs().amax(1)


def is_clearly_misclassified(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Which images another class won by more than rounding, with finite logits; bool (n,).

    For attacks that end at the boundary: the judge sees the image in another batch, where the last bits of its logits
    differ. A tie is no success either.
    """
    return (margin(logits, labels) > rounding(logits)) & logits.isfinite().all(1)
