"""Models whose logits tell attacks nothing of the boundary before they are beyond it."""

import dataclasses

import pytest
import torch
from made_models import Function

from lrrobust.attacks.custom import CustomAttack
from lrrobust.attacks.specs import HopSkipJumpSpec, PgdSpec
from lrrobust.diagnostics.jumps import IMAGES, check_jumps
from lrrobust.frozen import frozen

PGD = PgdSpec(name="pgd", kind="pgd", norm="linf", eps=(4 / 255,), steps=2)
HOP_SKIP_JUMP = HopSkipJumpSpec(name="hop", kind="hop_skip_jump", norm="linf", eps=(4 / 255,), queries=50)

CUSTOM = CustomAttack(lambda model, images, labels, eps: images, "linf", [4 / 255], name="idle").spec()


def check(subject):
    with frozen(subject.judge.model):
        return list(check_jumps(subject))


@pytest.mark.parametrize(("name", "spec"), [("anti_adversary", PGD), ("voting", PGD), ("voting", CUSTOM), ("log_votes", PGD)])
def test_a_margin_that_jumps_where_the_class_changes(subject_of, unsound, name, spec):
    (found,) = check(subject_of(unsound(name), spec))
    assert found.passed is False and "nothing of the boundary before they are beyond it" in found.detail
    # It is asked of what attacks climb.
    assert check(subject_of(unsound(name), HOP_SKIP_JUMP)) == []


@pytest.mark.parametrize("model", ["sound_linear", "sound_cnn", "confident_linear"])
def test_one_that_falls_to_zero(subject_of, request, model):
    (found,) = check(subject_of(request.getfixturevalue(model), PGD))
    assert found.passed and f"Where blends of {IMAGES} pairs of images change class" in found.detail


def test_a_network_in_bfloat16(subject_of, sound_cnn):
    @torch.autocast("cpu", torch.bfloat16)
    def half(images):
        return sound_cnn(images).float()

    (found,) = check(subject_of(Function(half).eval(), PGD))
    assert found.passed, found.detail


def test_a_randomised_model_is_not_judged(subject_of, unsound):
    (found,) = check(subject_of(unsound("randomised"), PGD))
    assert found.passed is None and "randomised" in found.detail


def test_partners_come_from_beyond_a_sample_of_one_class(subject_of, unsound):
    subject = subject_of(unsound("anti_adversary"), PGD)
    labels = torch.stack([subject.load([place])[1][0] for place in range(len(subject.outcomes[0].breaking_eps))])
    alike = (labels == labels.mode().values).nonzero().flatten()[:IMAGES].tolist()
    images, their_labels, keys = subject.load(alike)
    (found,) = check(dataclasses.replace(subject, images=images, labels=their_labels, keys=keys))
    assert found.passed is False and f"blends of {len(alike)} pairs" in found.detail
    # Where there is no other class, nothing is known.
    alone = dataclasses.replace(
        subject, images=images, labels=their_labels, keys=keys, load=lambda _: (images, their_labels, keys)
    )
    (found,) = check(alone)
    assert found.passed is None and "pairs of different classes are needed" in found.detail
