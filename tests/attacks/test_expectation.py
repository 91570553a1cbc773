"""Randomised models: the mean of several passes, its gradient, and what attacks gain by it."""

import pytest
import torch
from made_models import Function, with_random_gradients
from torch import nn

from lrrobust.attacks.build import Attack
from lrrobust.attacks.expectation import Expectation
from lrrobust.attacks.specs import ApgdSpec, CwSpec, DeepFoolSpec, FabSpec, FmnSpec, HopSkipJumpSpec, PgdSpec, SquareSpec
from lrrobust.evaluation.chunks import Chunk
from lrrobust.evaluation.tasks import Task


def behind_noise(network, scale=0.1):
    return nn.Sequential(Function(lambda images: images + scale * torch.randn_like(images)), network)


@pytest.fixture
def noisy(small_cnn):
    return behind_noise(small_cnn.double())


@pytest.fixture
def images():
    return torch.rand(3, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_the_mean_of_the_passes_and_its_gradient(noisy, images):
    weights = torch.randn(3, 5, dtype=torch.float64)
    torch.manual_seed(3)
    expected_input = images.clone().requires_grad_()
    expected = torch.stack([noisy(expected_input) for _ in range(4)]).mean(0)
    (expected_gradient,) = torch.autograd.grad((expected * weights).sum(), expected_input)
    model = Expectation(noisy, 4)
    for _ in range(2):
        torch.manual_seed(3)
        attacked = images.clone().requires_grad_()
        found = model(attacked)
        after = torch.get_rng_state()
        # Other random numbers in between change nothing, and theirs go on where they were.
        torch.rand(7)
        between = torch.get_rng_state()
        (gradient,) = torch.autograd.grad((found * weights).sum(), attacked)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-12, atol=1e-12)
        assert torch.equal(torch.get_rng_state(), between) and not torch.equal(after, between)
    torch.manual_seed(3)
    with torch.no_grad():
        torch.testing.assert_close(model(images), expected, rtol=1e-12, atol=1e-12)
    (parameter, *_) = noisy.parameters()
    assert parameter.grad is None


def test_gradients_of_several_classes_one_after_the_other(noisy, images):
    attacked = images.clone().requires_grad_()
    torch.manual_seed(0)
    logits = Expectation(noisy, 3)(attacked)
    apart = [torch.autograd.grad(logits[:, k].sum(), attacked, retain_graph=True)[0] for k in range(5)]
    (together,) = torch.autograd.grad(logits.sum(), attacked)
    torch.testing.assert_close(sum(apart), together)


def test_passes_are_made_again_as_they_were_under_autocast(small_cnn, images):
    seen = []
    small_cnn[0].register_forward_hook(lambda *given: seen.append(given[-1].dtype))
    attacked = images.float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        logits = Expectation(small_cnn, 2)(attacked)
    torch.autograd.grad(logits.float().sum(), attacked)
    assert seen == [torch.bfloat16] * 4


def test_many_logits_of_half_precision_are_averaged_as_they_are(images):
    logits = torch.tensor([[1.0, 1.0078125, -3.0]], dtype=torch.bfloat16)
    model = Expectation(lambda images: logits + 0 * images.flatten(1)[:, :3].bfloat16(), 100)
    for attacked in (images[:1], images[:1].clone().requires_grad_()):
        torch.testing.assert_close(model(attacked).detach(), logits.float(), rtol=1e-6, atol=0)


def test_a_deterministic_model_is_attacked_alike(in_double, attack_with):
    model, images, labels = in_double[0], in_double[1][:20], in_double[2][:20]
    spec = PgdSpec(kind="pgd", name="pgd", norm="linf", eps=(0.02, 0.05), steps=5)
    one = attack_with(spec, model, images, labels)
    # A power of two leaves the mean of equal numbers as they are.
    mean = attack_with(spec.model_copy(update={"eot_iter": 4}), model, images, labels)
    assert torch.equal(one.is_broken, mean.is_broken) and 0 < one.is_broken.sum() < one.is_broken.numel()
    # Four passes forward for an answer, and as many again for its gradient.
    assert torch.equal(mean.effort.backward_passes, 4 * one.effort.backward_passes)
    assert torch.equal(mean.effort.forward_passes, 4 * (one.effort.forward_passes + one.effort.backward_passes))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_gradients_of_noise_lead_somewhere_on_average(linear_problem, attack_with, norm):
    problem = linear_problem(40, 3)
    eps = 1.5 * problem.nearest(norm).median().item()
    within = problem.nearest(norm) <= eps
    model = with_random_gradients(problem.model, scale=30.0)
    spec = PgdSpec(kind="pgd", name="pgd", norm=norm, eps=(eps,), steps=10)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        alone = attack_with(spec, model, problem.images, problem.labels).is_broken[0]
        mean = attack_with(spec.model_copy(update={"eot_iter": 60}), model, problem.images, problem.labels).is_broken[0]
    assert not (mean & ~within).any() and not (alone & ~within).any()
    assert mean.sum() >= 0.8 * within.sum() and alone.sum() <= 0.6 * within.sum()


@pytest.mark.parametrize(
    "spec",
    [
        ApgdSpec(kind="apgd", name="a", norm="linf", eps=(0.05,), loss="targeted_dlr", targets=2, steps=4, eot_iter=3),
        CwSpec(kind="cw", name="a", eps=(1.0,), binary_search_steps=2, steps=4, lr=0.05, initial_c=1.0, eot_iter=3),
        FabSpec(kind="fab_t", name="a", norm="l2", eps=(1.0,), targets=2, steps=4, eot_iter=3),
        FmnSpec(kind="fmn", name="a", norm="l2", eps=(1.0,), steps=6, eot_iter=3),
        DeepFoolSpec(kind="deepfool", name="a", norm="l2", eps=(1.0,), targets=2, steps=1, overshoot=0.001, eot_iter=3),
        SquareSpec(kind="square", name="a", norm="linf", eps=(0.05,), queries=20, eot_iter=3),
        HopSkipJumpSpec(kind="hop_skip_jump", name="a", norm="l2", eps=(1.0,), queries=200, eot_iter=3),
    ],
    ids=lambda spec: spec.kind,
)  # fmt: skip
def test_every_attack_sees_the_mean(trained, spec):
    model, images, labels = trained
    calls = []

    def counted(images):
        calls.append(len(images))
        return model(images)

    claimed = []

    def claim(rows, proposals, eps, is_last):
        claimed.extend(rows)
        return [False] * len(rows)

    draw = lambda row, eps, start: torch.Generator().manual_seed(row)  # noqa: E731
    effort = Attack(spec)(Function(counted), images[:6], labels[:6], batch_size=6, claim=claim, draw=draw)
    assert claimed and len(calls) % 3 == 0 and len(calls) >= 6
    # All passes are counted, those made again for gradients too.
    assert effort.forward_passes.sum() % 3 == 0 and effort.forward_passes.sum() >= sum(calls) * 0.9
    assert effort.backward_passes.sum() <= 3 * 6 * spec.max_backward_passes
    assert effort.forward_passes.sum() <= Task(spec, Chunk(0, 6)).cost


def test_averages_break_fewer_images_by_chance(linear_problem, attack_with):
    problem = linear_problem(80, 3)
    distance = problem.nearest("l2")
    is_far = distance > distance.median()
    eps = 0.01 * problem.nearest("linf")[is_far].min().item()
    model = behind_noise(problem.model, scale=1.6 * distance.median().item())
    spec = PgdSpec(kind="pgd", name="pgd", norm="linf", eps=(eps,), steps=20)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        # Within eps there is no other class: what breaks does so by chance.
        alone, mean = (
            attack_with(spec.model_copy(update={"eot_iter": draws}), model, problem.images[is_far], problem.labels[is_far])
            for draws in (1, 30)
        )
    assert alone.is_broken.sum() > 2 * mean.is_broken.sum()
