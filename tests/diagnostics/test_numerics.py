"""Where the images lie that float64 is asked about."""

import torch

from lrrobust.attacks.losses import margin
from lrrobust.attacks.specs import CwSpec, PgdSpec
from lrrobust.diagnostics.numerics import boundary_images
from lrrobust.diagnostics.outcomes import read_outcomes
from lrrobust.diagnostics.subject import Subject
from lrrobust.evaluation.judge import Judge

EPS = 8 / 255
NOTHING = PgdSpec(name="nothing", kind="pgd", norm="l2", eps=(1e-6,), steps=1)
PGD = PgdSpec(name="pgd", kind="pgd", norm="linf", eps=(EPS,), steps=10)
CW = CwSpec(name="cw", kind="cw", eps=(0.2,), binary_search_steps=2, steps=20, lr=0.01, initial_c=0.1)


def subject_of(evaluated, model, specs):
    data, run = evaluated(model, specs)
    places, outcomes = read_outcomes(run.rows, specs)
    images, labels = data.load(places.tolist()[:24])
    return Subject(Judge(model, 5, 50), images, labels, data.keys[:24], outcomes, "0123456789abcdef")


@torch.no_grad()
def test_they_lie_just_beyond_the_boundary(evaluated, sound_linear):
    # The first norm in which an image breaks is looked at.
    subject = subject_of(evaluated, sound_linear, (NOTHING, PGD))
    places, edge = boundary_images(subject)
    assert 10 < len(places) < 24
    clean, labels = subject.images[places], subject.labels[places]
    before, after = margin(sound_linear(clean), labels), margin(sound_linear(edge), labels)
    assert (before < 0).all() and (after > 0).all()
    way = (edge - clean).flatten(1).abs().amax(1)
    assert (way <= EPS + 1e-6).all()
    # Along a line the margin of a linear model is convex: the boundary is not before where a straight one would cross it.
    beyond = way * after / (after - before)
    assert (beyond <= 1.5 * EPS / 2**7).all()


def test_a_minimal_norm_attack_has_some_too(evaluated, sound_linear):
    places, edge = boundary_images(subject_of(evaluated, sound_linear, (CW,)))
    assert len(places) == len(edge) > 5


def test_where_nothing_breaks_there_are_none(evaluated, sound_linear):
    places, edge = boundary_images(subject_of(evaluated, sound_linear, (NOTHING,)))
    assert places.shape == (0,) and edge.shape == (0, 3, 8, 8)
