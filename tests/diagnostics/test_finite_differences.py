"""Gradients that are a part of the model's, or none of it, and models without a slope to compare with."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lrrobust.attacks.specs import PgdSpec, SquareSpec
from lrrobust.diagnostics.finite_differences import check_finite_differences
from lrrobust.diagnostics.subject import Subject
from lrrobust.evaluation.judge import Judge
from lrrobust.frozen import frozen

PGD = PgdSpec(name="pgd", kind="pgd", norm="linf", eps=(4 / 255,), steps=5)
SQUARE = SquareSpec(name="square", kind="square", norm="linf", eps=(4 / 255,), queries=5)
SIDE = 24


class Network(nn.Module):
    """Small and smooth almost everywhere, behind something done to its images."""

    def __init__(self, change=lambda images: images):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layers = nn.Sequential(
                nn.Conv2d(3, 6, 3, padding=1),
                nn.ReLU(),
                nn.MaxPool2d(4),
                nn.Conv2d(6, 8, 3),
                nn.GELU(),
                nn.Flatten(),
                nn.Linear(128, 5),
            )
        self.change = change

    def forward(self, images):
        return self.layers(self.change(images))


def part(share):
    """Keeps the gradient of this share of the values, always the same."""

    def change(images):
        keep = torch.rand(images.shape[1:], generator=torch.Generator().manual_seed(0)).to(images) < share
        return torch.where(keep, images, images.detach())

    return change


def rounded(images):
    return (images * 31).round() / 31


def rounded_with_a_gradient(images):
    """As BPDA attacks such models."""
    return images + (rounded(images) - images).detach()


class DetachedBranch(Network):
    def forward(self, images):
        return self.layers(images) + 3 * self.layers(images.flip(3)).detach()


class NoFloat64(Network):
    def forward(self, images):
        return super().forward(images.float())


class AnswersInFloat32(Network):
    def forward(self, images):
        return super().forward(images).float()


class Half(Network):
    def __init__(self):
        super().__init__()
        self.layers.half()

    def forward(self, images):
        return self.layers(images.half()).float()


class Noisy(Network):
    def forward(self, images):
        logits = super().forward(images)
        return logits + torch.randn_like(logits)


@pytest.fixture
def found():
    def run(model, spec=PGD):
        model.eval()
        images = torch.rand(12, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
        images[:2] = images[:2].round()  # at the ends of the box
        with frozen(model):
            labels = model(images).argmax(1)
            subject = Subject(
                Judge(model, 5, 5), images, labels, [str(i) for i in range(12)], (SimpleNamespace(spec=spec),), None, "f" * 16
            )
            return list(check_finite_differences(subject))

    return run


@pytest.mark.parametrize(
    "change",
    [lambda images: images, lambda images: (images - 0.4) / 0.2, lambda images: 1e-4 * images],
    ids=["as it is", "normalised", "small"],
)
def test_the_models_own_gradient_passes(found, change):
    (result,) = found(Network(change))
    assert result.passed is True and "of 0 of 8 images changes otherwise" in result.detail


@pytest.mark.parametrize(
    "model", [Network(part(0.25)), Network(part(0.6)), DetachedBranch()], ids=["quarter", "most", "branch"]
)
def test_a_part_of_the_gradient_fails(found, model):
    (result,) = found(model)
    assert result.passed is False and "a gradient that is not the model's, or a part of it" in result.detail


def moved(images):
    return images + (rounded(images).roll(2, 3) - images).detach()


@pytest.mark.parametrize("kind", [Network, NoFloat64])
def test_a_replaced_gradient_out_of_place_fails(found, kind):
    (result,) = found(kind(moved))
    assert result.passed is False and "By 4/255" in result.detail


@pytest.mark.parametrize("kind", [NoFloat64, AnswersInFloat32])
@pytest.mark.parametrize(
    ("change", "passed"),
    [
        (lambda images: images, True),
        (lambda images: 1e-2 * images, True),
        (part(0.25), False),
        (part(0.6), False),
        (part(0.85), False),
    ],
    ids=["as it is", "small", "quarter", "most", "nearly all"],
)
def test_what_cannot_be_computed_in_float64_is_asked_in_float32(found, kind, change, passed):
    (result,) = found(kind(change))
    assert result.passed is passed and "cannot be computed in float64" in result.detail and "in float32" in result.detail


@pytest.mark.parametrize(
    "model",
    [
        Network(rounded),
        Network(rounded_with_a_gradient),
        NoFloat64(rounded),
        AnswersInFloat32(rounded_with_a_gradient),
        Noisy(),
        Half(),
    ],
    ids=["rounded", "bpda", "rounded in float32", "bpda in float32", "noisy", "float16"],
)
def test_what_has_no_slope_is_not_known(found, model):
    (result,) = found(model)
    assert result.passed is None, result.detail


class PartForSome(Network):
    """With half of the gradient for the first of some images, which are black and white, and all of it for others."""

    def __init__(self, share):
        super().__init__()
        self.share = share

    def forward(self, images):
        is_some = images.flatten(1).mean(1) > self.share
        return self.layers(torch.where(is_some[:, None, None, None], part(0.5)(images), images))


@pytest.mark.parametrize(("differing", "passed"), [(1, True), (2, False)])
def test_one_image_may_be_at_an_edge_and_two_may_not(found, differing, passed):
    images = torch.rand(12, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    images[:2] = images[:2].round()
    means = (0.02 + 0.955 * images[:8].flatten(1).mean(1) + 0.0025).sort(descending=True).values
    (result,) = found(PartForSome(float(means[differing - 1 : differing + 1].mean())))
    assert result.passed is passed and f"of {differing} of 8 images" in result.detail


def test_attacks_without_gradients_need_none(found):
    assert found(Network(part(0.25)), SQUARE) == []
