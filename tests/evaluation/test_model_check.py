import itertools

import pytest
import torch
from made_models import Function
from torch import nn

from lrrobust.errors import ModelError
from lrrobust.evaluation.judge import check_evaluation_mode
from lrrobust.evaluation.model_check import check_model
from lrrobust.frozen import frozen

IMAGES = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def check(linear_problem):
    def run(end):
        # Small, so that the softmax is not 0 and 1 already.
        return check_model(nn.Sequential(linear_problem(1, classes=3, slope=0.1).model, Function(end)), 3, IMAGES)

    return run


def test_probabilities_are_said_aloud(check, caplog):
    assert check(lambda logits: logits.softmax(1)) == {"probabilities": "instead of logits: attacks are weakened"}
    assert "return the logits" in caplog.text


@pytest.mark.parametrize(
    "end",
    [
        lambda logits: logits,
        torch.relu,
        lambda logits: logits.log_softmax(1),
        # They add up to 1, but some are negative.
        lambda logits: torch.cat([3 * logits[:, :2], 1 - 3 * logits[:, :2].sum(1, keepdim=True)], 1),
    ],
    ids=["logits", "not negative", "log-probabilities", "adding up to 1"],
)
def test_logits_are_not_taken_for_probabilities(check, caplog, end):
    assert check(end) == {}
    assert not caplog.records


def test_an_exported_program_has_no_mode():
    # `torch.export` leaves programs that refuse eval() and train().
    model = torch.export.export(nn.Sequential(nn.Flatten(), nn.Linear(192, 3)), (IMAGES,)).module()
    with pytest.raises(NotImplementedError):
        model.eval()
    with frozen(model):
        assert torch.equal(model(IMAGES), model(IMAGES))
        # Nor is it refused for the flags that it has all the same.
        check_evaluation_mode(model)


def seeded_noise(logits):
    return logits + torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("scale", [1.0, 1e-6])
@pytest.mark.parametrize(
    "mix",
    [
        lambda logits: logits - logits.mean(0),
        lambda logits: logits[:1].expand(len(logits), -1),
        lambda logits: logits + logits[:1],
        seeded_noise,
        lambda logits: logits - 10 * logits.mean(0) + 0.01 * torch.randn(logits.shape),
    ],
    ids=["mean", "first for all", "first on top", "seeded noise", "mean and noise"],
)
def test_logits_that_depend_on_the_batch_are_refused_at_any_scale(linear_problem, mix, scale):
    model = nn.Sequential(linear_problem(1, classes=3).model, Function(lambda logits: scale * mix(logits)))
    with pytest.raises(ModelError, match="depend on the other images of the batch, or on its place"):
        check_model(model, 3, IMAGES)


def test_masked_classes_hide_no_randomness():
    classes = 40

    def masked(images, noise=1.0):
        logits = images.flatten(1)[:, :classes] + noise * torch.randn(len(images), classes)
        return logits.index_fill(1, torch.arange(10, classes), -1e9)

    assert "randomised" in check_model(Function(masked), classes, IMAGES)
    assert check_model(Function(lambda images: masked(images, noise=0.0)), classes, IMAGES) == {}


@pytest.mark.parametrize("scale", [1e3, 1.0, 1e-7])
def test_random_logits_are_said_aloud_at_any_scale(check, caplog, scale):
    assert "randomised" in check(lambda logits: scale * (logits + torch.randn(logits.shape)))
    assert "the model is randomised" in caplog.text
    assert check(lambda logits: scale * logits) == {}


def test_a_model_that_mixes_the_images_of_large_batches_alone_is_refused(linear_problem):
    problem = linear_problem(16, classes=3)
    mix = Function(lambda images: images if len(images) < 8 else images - images.mean(0) + 0.5)
    model = nn.Sequential(mix, problem.model)
    assert check_model(model, 3, problem.images[:6]) == {}
    with pytest.raises(ModelError, match="depend on the other images of the batch"):
        check_model(model, 3, problem.images)


def test_a_model_that_is_another_where_a_gradient_is_wanted_off_the_grid_is_marked(linear_problem):
    problem = linear_problem(4, classes=3)
    on_grid = (255 * problem.images).round() / 255

    def two_faced(images):
        is_off_grid = not torch.equal((255 * images).round() / 255, images)
        return problem.model(images) * (0.5 if is_off_grid and torch.is_grad_enabled() else 1)

    assert "randomised" in check_model(Function(two_faced), 3, on_grid)


def test_a_number_added_to_all_logits_hides_no_randomness(check):
    assert check(lambda logits: logits + 1000) == {}
    assert "randomised" in check(lambda logits: logits + 1000 + 0.001 * torch.randn(logits.shape))


def test_a_model_that_is_random_off_the_grid_of_8_bits_alone_is_randomised(linear_problem):
    linear = linear_problem(1, classes=3, slope=0.1).model
    on_grid = (IMAGES * 255).round() / 255

    def off_grid(images):
        is_off = ((images * 255).round() / 255 - images).abs().flatten(1).amax(1, keepdim=True) > 1e-6
        return linear(images + is_off[..., None, None] * 0.01 * torch.randn(images.shape))

    model = Function(off_grid)
    assert torch.equal(model(on_grid), model(on_grid))
    assert "randomised" in check_model(model, 3, on_grid)


def test_a_model_that_draws_one_of_two_ways_is_randomised_not_refused(linear_problem):
    ways = itertools.cycle([0, 0, 1, 0, 1, 0, 1])
    model = nn.Sequential(linear_problem(1, classes=3, slope=0.1).model, Function(lambda z: z.roll(next(ways), 1)))
    assert "randomised" in check_model(model, 3, IMAGES)


def leaf(images):
    """The graph of the logits does not reach the images."""
    return images.detach().clone().requires_grad_()


def turn_gradient_off(images):
    torch.set_grad_enabled(False)
    return images


@pytest.mark.parametrize("before", [leaf, turn_gradient_off])
def test_logits_without_a_gradient_to_the_images_are_refused_in_one_line(linear_problem, before):
    model = nn.Sequential(Function(before), linear_problem(1, classes=3).model)
    with torch.enable_grad():
        with pytest.raises(ModelError, match="carry no gradient to the images") as caught:
            check_model(model, 3, IMAGES)
        assert "\n" not in str(caught.value)
        # Judged by images made on another it needs none.
        assert check_model(model, 3, IMAGES, needs_gradient=False) == {}


class Failing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits):
        return logits.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise ValueError("no kernel for\nbackward")


def test_a_backward_pass_that_fails_is_one_line(check):
    with pytest.raises(ModelError, match="gradient of the model's logits cannot be computed .no kernel for backward"):
        check(Failing.apply)


def test_gradients_of_zero_are_marked_where_they_are_followed(linear_problem, caplog):
    linear = linear_problem(1, classes=3).model
    of_few_levels = nn.Sequential(Function(lambda images: (16 * images).round() / 16), linear)
    assert check_model(of_few_levels, 3, IMAGES, needs_gradient=False) == {} and not caplog.text
    assert list(check_model(of_few_levels, 3, IMAGES)) == ["flat"]
    assert "zero on all of 4 images" in caplog.text
    assert check_model(nn.Sequential(linear, nn.LogSoftmax(1)), 3, IMAGES) == {}
