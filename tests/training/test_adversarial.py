import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lrrobust.models import registry
from lrrobust.threat import ThreatModel, is_in_box
from lrrobust.training.adversarial import AdversarialSpec, draw_starts, perturb
from lrrobust.training.images import TrainingSet
from lrrobust.training.recipe import Phase
from lrrobust.training.trainer import Training

FAST = AdversarialSpec(norm="linf", eps=8 / 255, steps=1, step_size_ratio=1.25)
NORMS = [("linf", 8 / 255), ("l2", 0.5)]


@pytest.fixture
def images():
    """Also black and white ones, where the box cuts the ball."""
    generator = torch.Generator().manual_seed(0)
    return torch.cat([torch.rand(6, 3, 8, 8, generator=generator), torch.zeros(1, 3, 8, 8), torch.ones(1, 3, 8, 8)])


@pytest.fixture
def seeded():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize("norm, eps", NORMS)
@pytest.mark.parametrize("steps, random_start", [(1, True), (3, True), (2, False)])
def test_perturbed_images_stay_in_ball_and_box_and_raise_the_loss(small_cnn, images, norm, eps, steps, random_start):
    spec = AdversarialSpec(norm=norm, eps=eps, steps=steps, step_size_ratio=2.0, random_start=random_start)
    starts = draw_starts(images.shape, spec, torch.Generator().manual_seed(1)) if random_start else None
    labels = torch.arange(8) % 5
    perturbed = perturb(small_cnn, images, labels, spec, starts, "float32")
    assert ThreatModel(norm, eps).is_in_ball(images, perturbed).all() and is_in_box(perturbed).all()
    assert not ThreatModel(norm, eps / 2).is_in_ball(images, perturbed).any()
    with torch.no_grad():
        before = F.cross_entropy(small_cnn(images), labels, reduction="none")
        after = F.cross_entropy(small_cnn(perturbed), labels, reduction="none")
    assert (after > before).all()


def test_one_step_on_a_linear_network_is_the_best_there_is(linear_problem):
    problem = linear_problem(6, 2)
    spec = AdversarialSpec(norm="linf", eps=0.01, steps=1, step_size_ratio=1.0, random_start=False)
    perturbed = perturb(*problem, spec, None, "float32")
    direction = (problem.weight[1 - problem.labels] - problem.weight[problem.labels]).sign().view_as(problem.images)
    torch.testing.assert_close(perturbed, problem.images + 0.01 * direction)


def test_perturbing_leaves_the_network_as_it_was(small_cnn, images):
    small_cnn.train()
    small_cnn[4].eval()
    small_cnn[0].bias.requires_grad_(False)
    before = {key: tensor.clone() for key, tensor in small_cnn.state_dict().items()}
    perturb(small_cnn, images, torch.zeros(8, dtype=torch.long), FAST, None, "float32")
    torch.testing.assert_close(dict(small_cnn.state_dict()), before, rtol=0, atol=0)
    assert [module.training for module in small_cnn] == [True, True, True, True, False, True, True]
    assert [p.requires_grad for p in small_cnn.parameters()].count(False) == 1
    assert all(p.grad is None for p in small_cnn.parameters())


def test_an_image_is_perturbed_the_same_in_any_batch(small_cnn, images):
    small_cnn.train()
    labels = torch.arange(8) % 5
    starts = draw_starts(images.shape, FAST, torch.Generator().manual_seed(1))
    whole = perturb(small_cnn, images, labels, FAST, starts, "float32")
    part = perturb(small_cnn, images[2:4], labels[2:4], FAST, starts[2:4], "float32")
    torch.testing.assert_close(part, whole[2:4])


@pytest.mark.parametrize("norm, eps", NORMS)
def test_starts_fill_the_ball(norm, eps):
    spec = AdversarialSpec(norm=norm, eps=eps, steps=1, step_size_ratio=1.0)
    starts = draw_starts(torch.Size((400, 3, 8, 8)), spec, torch.Generator().manual_seed(0))
    length = starts.flatten(1).norm(dim=1) if norm == "l2" else starts.abs().flatten()
    assert length.max() <= eps * (1 + 1e-5) and length.max() > 0.95 * eps
    assert length.mean().item() == pytest.approx(eps / 2, rel=0.1)
    assert starts.mean().abs() < 0.01 * eps
    torch.testing.assert_close(draw_starts(starts.shape, spec, torch.Generator().manual_seed(0)), starts, rtol=0, atol=0)


class Cells(nn.Sequential):
    """Sees single pixels of 8 x 8 images."""

    def __init__(self, num_classes: int, stem: str = "imagenet") -> None:
        super().__init__(nn.Flatten(), nn.Linear(192, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, num_classes))


def fragile_problem(count, seed):
    """Two classes told apart by a weak pattern on all pixels but one, which every small change hides, or by the first.

    A naturally trained network relies on the pattern, since it is there in every image; the first pixels are right
    in most images and cannot be hidden.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (count,), generator=generator)
    sign = (2 * labels - 1).view(-1, 1, 1, 1)
    pattern = torch.where(torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0)) < 0.5, -1, 1)
    images = 128 + 3 * sign * pattern + torch.randint(-2, 3, (count, 3, 8, 8), generator=generator)
    is_right = torch.rand(count, 1, 1, 1, generator=generator) < 0.95
    images[:, :, :2, :2] = 128 + torch.where(is_right, 60, -60) * sign
    return TrainingSet(images.to(torch.uint8), labels)


@pytest.mark.parametrize("steps, ratio", [(1, 1.25), (5, 2.5)], ids=["fast", "pgd"])
def test_adversarial_training_makes_robust(monkeypatch, recipe, tmp_path, seeded, steps, ratio):
    monkeypatch.setattr(registry, "NETWORKS", {"cells": Cells})
    classes = tmp_path / "two.txt"
    classes.write_text("a\nb\n")
    spec = AdversarialSpec(norm="linf", eps=8 / 255, steps=steps, step_size_ratio=ratio)
    judge = AdversarialSpec(norm="linf", eps=8 / 255, steps=20, step_size_ratio=2.5)
    # Pixels have to stay in their places.
    monkeypatch.setattr("lrrobust.training.augmentation.ASPECT_RATIOS", (1.0, 1.0))
    test = fragile_problem(200, seed=2)
    images = test.images / 255
    robust, clean = {}, {}
    for name, adversarial in (("natural", None), ("adversarial", spec)):
        changes = {
            # Below the smallest size a recipe takes: the network sees every pixel by itself.
            "classes": str(classes),
            "phases": (Phase.model_construct(epochs=6, size=8),),
            "batch_size": 50,
            "holdout": 0,
            "crop_scale_min": 1.0,
            "horizontal_flip": False,
            "adversarial": adversarial,
            "label_smoothing": 0.0,
        }
        training = Training("cells", recipe.model_copy(update=changes), fragile_problem(600, seed=1), tmp_path / name)
        training.run()
        network = training.network.eval()
        starts = draw_starts(images.shape, judge, torch.Generator().manual_seed(5))
        attacked = perturb(network, images, test.labels, judge, starts, "float32")
        with torch.inference_mode():
            clean[name] = (network(images).argmax(1) == test.labels).float().mean().item()
            robust[name] = (network(attacked).argmax(1) == test.labels).float().mean().item()
    assert clean["natural"] > 0.9 and clean["adversarial"] > 0.85
    assert robust["natural"] < 0.4 and robust["adversarial"] > 0.75, (clean, robust)
