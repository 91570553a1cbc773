"""8-bit rounding inside ball and box, against enumeration of all grey levels."""

import math

import pytest
import torch

from lrrobust.evaluation.quantization import quantize
from lrrobust.threat import ThreatModel, distance, is_in_box


def eight_bit(count, seed=0, side=6):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, side, side), generator=generator).float() / 255


def within(images, eps, norm, seed=1):
    """Images exactly `eps` away, as far as the box lets them."""
    delta = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if norm == "linf":
        delta = (
            eps * delta.sign() * torch.rand(images.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        )
    else:
        delta *= eps / torch.linalg.vector_norm(delta.flatten(1), 2 if norm == "l2" else 1, dim=1).view(-1, 1, 1, 1)
    return (images.double() + delta).clamp(0, 1).float()


@pytest.mark.parametrize("eps", [0.5 / 255, 1 / 255, 2.7 / 255, 8 / 255, 0.4])
def test_linf_takes_the_nearest_grey_level_of_the_ball(eps):
    images = eight_bit(4)
    adversarial = within(images, eps, "linf")
    found = quantize(images, adversarial, ThreatModel("linf", eps))
    grid = (torch.arange(256).float() / 255).double().view(-1, 1)
    x, a = images.double().view(1, -1), adversarial.double().view(1, -1)
    is_allowed = (grid - x).abs() <= eps + 5e-7
    nearest = torch.where(is_allowed, (grid - a).abs(), torch.inf).amin(0)
    torch.testing.assert_close((found.double() - adversarial.double()).abs().flatten(), nearest, atol=1e-7, rtol=0)
    assert ThreatModel("linf", eps).is_in_ball(images, found).all()
    assert torch.equal(found, (255 * found).round() / 255)


@pytest.mark.parametrize("norm, eps", [("l2", 0.03), ("l2", 0.3), ("l2", 2.0), ("l1", 0.5), ("l1", 5.0), ("l1", 40.0)])
def test_other_norms_stay_in_the_ball_and_near_the_image(norm, eps):
    images = eight_bit(5)
    adversarial = within(images, eps, norm)
    threat = ThreatModel(norm, eps)
    found = quantize(images, adversarial, threat)
    plain = (255 * adversarial).round() / 255
    assert threat.is_in_ball(images, found).all() and is_in_box(found).all()
    assert torch.equal(found, (255 * found).round() / 255)
    assert ((found - adversarial).abs() < 1 / 255 + 1e-6).all()
    is_inside = threat.is_in_ball(images, plain)
    torch.testing.assert_close(found[is_inside], plain[is_inside], atol=1e-7, rtol=0)


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_roundings_are_undone_one_after_another(norm):
    order = 2 if norm == "l2" else 1
    generator = torch.Generator().manual_seed(0)
    clean = torch.randint(10, 245, (6, 3, 5, 5), generator=generator).double()
    moved = clean + 2.5 * torch.randn(clean.shape, generator=generator, dtype=torch.float64)
    eps = distance(clean / 255, moved / 255, norm)
    found = 255 * quantize(clean / 255, moved / 255, ThreatModel(norm, eps))
    for x, a, budget, levels in zip(clean.flatten(1), moved.flatten(1), (255 * eps) ** order, found.flatten(1), strict=True):
        expected = a.round()
        nearer = expected - (expected - x).sign()
        saved = (expected - x).abs() ** order - (nearer - x).abs() ** order
        price = ((nearer - a).abs() - (expected - a).abs()) / saved
        away = [i for i in range(len(x)) if (expected[i] - x[i]).abs() > (a[i] - x[i]).abs()]
        for i in sorted(away, key=lambda i: float(price[i])):
            if ((expected - x).abs() ** order).sum() > budget:
                expected[i] = nearer[i]
        assert levels.round().tolist() == expected.tolist()


def test_each_image_has_its_budget_and_infinity_is_none():
    images = eight_bit(3)
    adversarial = (255 * (1 - images)).round() / 255
    budgets = torch.tensor([1 / 255, 3 / 255, math.inf])
    found = quantize(images, adversarial, ThreatModel("linf", budgets))
    assert torch.equal(found[2], adversarial[2])
    for row, steps in ((0, 1), (1, 3)):
        assert (255 * (found[row] - images[row])).abs().round().max() == steps
    free = quantize(images, adversarial, ThreatModel("l2", math.inf))
    torch.testing.assert_close(free, adversarial, atol=1e-7, rtol=0)


def test_what_is_quantized_already_stays():
    images, adversarial = eight_bit(4), eight_bit(4, seed=3)
    for norm in ("linf", "l2", "l1"):
        eps = distance(images, adversarial, norm)
        assert torch.equal(quantize(images, adversarial, ThreatModel(norm, eps)), adversarial)


def test_values_are_those_of_a_file_read_again():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    read = levels.to(torch.float32).div(255)
    assert torch.equal(quantize(read, read + 1e-9, ThreatModel("linf", 0.1)), read)


def test_a_clean_image_between_grey_levels_may_have_no_room():
    images = torch.full((1, 3, 2, 2), 0.5)  # 127.5 / 255
    threat = ThreatModel("linf", 0.25 / 255)
    assert not threat.is_in_ball(images, quantize(images, images, threat)).any()
