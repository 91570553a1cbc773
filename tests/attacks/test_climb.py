from collections import Counter

import pytest
import torch

from lrrobust.attacks.assignment import Assignment
from lrrobust.attacks.climb import Step, climb

LADDER = (0.0, 0.1, 0.2, 0.4)


class Counting:
    """Image r is misclassified at its step number `wrong_at[r]`, if it gets so far; iterates say what they are of."""

    def __init__(self, count, wrong_at=None):
        self.wrong_at = torch.tensor(wrong_at if wrong_at is not None else [10**6] * count)
        self.began, self.ended, self.sizes = [], [], []

    def begin(self, starts):
        self.began += starts
        return {"identity": torch.tensor([[*start] for start in starts])}

    def step(self, state):
        self.sizes.append(len(state["row"]))
        assert torch.equal(state["row"], state["identity"][:, 0])
        assert torch.equal(state["eps"].flatten(), torch.tensor(LADDER)[state["identity"][:, 1]])
        shown = torch.zeros(len(state["row"]), 3, 1, 1)
        shown[:, 0, 0, 0] = state["row"].float()
        shown[:, 1, 0, 0] = state["steps"].float()
        return Step(shown, state["steps"] == self.wrong_at[state["row"]], shown + 0.5)

    def end(self, starts, state):
        assert [[*start] for start in starts] == state["identity"].tolist()
        self.ended += starts


def run(search, count, *, levels=None, starts=1, steps=5, batch_size=3, breaks=lambda row, eps, is_last: False):
    claims = []

    def claim(rows, proposals, eps, is_last):
        assert len(rows) == len(set(rows)) == len(proposals) == len(eps) == len(is_last) <= batch_size
        assert proposals.is_contiguous()
        assert proposals[:, 0, 0, 0].tolist() == [row + 0.5 * last for row, last in zip(rows, is_last, strict=True)]
        claims.extend(zip(rows, eps, is_last, strict=True))
        return [breaks(*each) for each in zip(rows, eps, is_last, strict=True)]

    levels = torch.full((count,), len(LADDER)) if levels is None else torch.tensor(levels)
    given = Assignment(
        model=None,
        images=torch.zeros(count, 3, 1, 1),
        labels=None,
        ladder=LADDER,
        levels=levels,
        batch_size=batch_size,
        claim=claim,
        draw=None,
    )
    taken = climb(given, starts=starts, steps=steps, search=search)
    return taken, claims


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_the_last_proposal_of_every_start_is_claimed_once(batch_size):
    search = Counting(5)
    taken, claims = run(search, 5, starts=2, batch_size=batch_size)
    assert Counter(claims) == {(row, eps, True): 2 for row in range(5) for eps in LADDER[1:]}
    assert taken.tolist() == [[0] * 5] + [[10] * 5] * 3
    assert sorted(search.began) == sorted(search.ended) and len(set(search.began)) == 5 * 3 * 2
    for row in range(5):
        climbed = [(start.level, start.number) for start in search.began if start.row == row]
        assert climbed == [(level, number) for level in (1, 2, 3) for number in (0, 1)]


def test_images_are_attacked_at_as_many_budgets_as_said():
    taken, claims = run(Counting(4), 4, levels=[0, 1, 2, 4])
    assert (taken > 0).sum(0).tolist() == [0, 0, 1, 3]
    assert sorted(claims) == [(2, 0.1, True), (3, 0.1, True), (3, 0.2, True), (3, 0.4, True)]


def test_nothing_to_attack():
    for count, levels in ((0, []), (2, [1, 0])):
        taken, claims = run(Counting(count), count, levels=levels)
        assert taken.shape == (4, count) and not taken.any() and not claims


def test_a_broken_image_costs_no_further_step():
    search = Counting(4, wrong_at=[0, 2, 4, 9])
    taken, claims = run(search, 4, breaks=lambda row, eps, is_last: not is_last and eps == 0.1)
    assert taken.tolist() == [[0] * 4, [1, 3, 5, 5], [0, 0, 0, 5], [0, 0, 0, 5]]
    assert claims.count((2, 0.1, False)) == 1 and (2, 0.1, True) not in claims
    assert {start.row for start in search.ended} == {3}


def test_a_refused_claim_changes_nothing():
    taken, claims = run(Counting(3, wrong_at=[1, 4, 9]), 3)
    assert (taken[1:] == 5).all()
    assert Counter(claims) == {
        **{(row, eps, True): 1 for row in range(3) for eps in LADDER[1:]},
        **{(row, eps, False): 1 for row in range(2) for eps in LADDER[1:]},
    }


def test_the_batch_is_full_while_images_wait():
    search = Counting(20, wrong_at=[row % 5 for row in range(20)])
    run(search, 20, batch_size=4, breaks=lambda row, eps, is_last: not is_last)
    assert max(search.sizes) == 4 and sum(search.sizes) / len(search.sizes) > 3.5
