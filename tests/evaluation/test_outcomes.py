"""What is kept of proposals: the nearest verified adversarial image, and from which eps on an image is broken."""

import math

import pytest
import torch
from made_rows import build_row

from lrrobust.attacks.specs import PgdSpec
from lrrobust.evaluation.chunks import Chunk
from lrrobust.evaluation.judge import Judge
from lrrobust.evaluation.outcomes import BrokenAt, Outcomes
from lrrobust.evaluation.tasks import Task
from lrrobust.results import rows_to_table
from lrrobust.threat import ThreatModel

LINF = PgdSpec(name="pgd", kind="pgd", norm="linf", eps=(0.1, 0.3), steps=1, survivors_only=True)


@pytest.fixture
def judge(problem):
    return Judge(problem.model, 3)


@pytest.fixture
def outcomes(problem, judge):
    clean = judge.predict(problem.images, problem.labels, [str(i) for i in range(len(problem.labels))])
    return Outcomes(problem.images, clean, problem.labels, levels=2)


@pytest.fixture
def enter(problem, judge, outcomes):
    """Judges and enters one proposal for image 0, this far towards the nearest other class; whether it is broken by now."""
    logits = problem.model(problem.images[:1])[0]
    own = int(problem.labels[0])
    other = int(logits.index_fill(0, torch.tensor(own), -math.inf).argmax())
    direction = (problem.weight[other] - problem.weight[own]).sign().view(1, 3, 8, 8)

    def enter(length, eps):
        row, proposed = torch.tensor([0]), problem.images[:1] + length * direction
        threat = ThreatModel("linf", torch.tensor([eps], dtype=torch.float64))
        verdict = judge.judge(problem.images[:1], problem.labels[:1], proposed, threat, ["0"])
        return bool(outcomes.enter(row, proposed, verdict, threat))

    return enter


def test_the_nearest_is_kept_in_whatever_order_they_come(enter, outcomes, problem):
    assert enter(0.2, 0.3) and enter(0.05, 0.3) and enter(0.1, 0.3)
    assert outcomes.distances["linf"][0] == pytest.approx(0.05, abs=1e-6)
    assert (outcomes.nearest[0] - problem.images[0]).abs().max() == pytest.approx(0.05, abs=1e-6)
    assert outcomes.breaks_at[0] == pytest.approx(0.05, abs=1e-6)
    assert outcomes.prediction[0] != problem.labels[0] and outcomes.margin[0] < 0
    assert outcomes.is_broken.tolist() == [True] + [False] * 11


def test_what_lies_beyond_its_ball_is_not_kept(enter, outcomes):
    assert not enter(0.2, 0.1)
    assert not outcomes.is_broken.any() and math.isinf(outcomes.distances["linf"][0])


def test_what_the_tolerance_of_the_ball_let_in_counts_at_its_eps(enter, outcomes):
    eps = 0.1
    assert enter(eps + 5e-7, eps)
    assert outcomes.breaks_at[0] <= torch.tensor(eps) < outcomes.distances["linf"][0]


def test_an_image_found_far_away_is_not_broken_at_a_smaller_eps(enter):
    assert enter(0.2, 0.3)
    # Asked again at a small eps with what breaks nothing there.
    assert not enter(0.0, 0.1)
    assert enter(0.0, 0.25)


def rows(distances, eps, in_8_bits=None):
    """Rows of two images at one eps."""
    return [
        build_row(index, "pgd", "linf", eps, math.inf if distance is None else distance, is_broken_quantized=in_8_bits)
        for index, distance in enumerate(distances)
    ]


def test_later_attacks_are_told_the_nearest_of_earlier_ones():
    known = BrokenAt(2)
    task = Task(LINF, Chunk(0, 2))
    known.enter(task, rows_to_table(rows([None, 0.06], 0.1) + rows([0.25, 0.06], 0.3)), in_8_bits=False)
    known.enter(task, rows_to_table(rows([0.2, None], 0.3)), in_8_bits=False)
    assert known.of(LINF).tolist() == pytest.approx([0.2, 0.06])
    l2 = LINF.model_copy(update={"norm": "l2"})
    assert known.of(l2).isinf().all()
    assert known.of(LINF.model_copy(update={"survivors_only": False})).isinf().all()


def test_where_8_bits_count_an_image_is_broken_from_the_eps_on_that_says_so():
    known = BrokenAt(2)
    table = rows_to_table(rows([0.05, 0.06], 0.1, in_8_bits=False) + rows([0.05, 0.06], 0.3, in_8_bits=True))
    known.enter(Task(LINF, Chunk(0, 2)), table, in_8_bits=True)
    assert known.of(LINF).tolist() == [0.3, 0.3]
