import copy
import sys

import pytest
import torch
from torch import nn

from lrrobust.attacks.build import build_attack
from lrrobust.attacks.specs import CwSpec, FgsmSpec, PgdSpec
from lrrobust.threat import ThreatModel, is_in_box

FGSM = FgsmSpec(kind="fgsm", name="fgsm", eps=(0.1,))
PGD = PgdSpec(kind="pgd", name="pgd", norm="linf", eps=(0.1,), steps=20)
PGD_L2 = PgdSpec(kind="pgd", name="pgd_l2", norm="l2", eps=(0.1,), steps=20)
CW = CwSpec(kind="cw", name="cw", eps=(0.1,), binary_search_steps=2, steps=10, lr=0.01, initial_c=1.0)

BUDGETED = pytest.mark.parametrize("spec", [FGSM, PGD, PGD_L2], ids=lambda spec: spec.name)
EVERY = pytest.mark.parametrize(("spec", "eps"), [(FGSM, 0.01), (PGD, 0.01), (PGD_L2, 0.2), (CW, None)], ids=str)


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture
def images():
    return torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def labels():
    return torch.tensor([0, 1, 2, 3, 4, 0])


@BUDGETED
@pytest.mark.parametrize("count", [1, 3, 8])
def test_attacks_succeed_exactly_beyond_the_nearest_adversarial_image(spec, count, linear_problem):
    problem = linear_problem(count, classes=2)
    nearest = problem.nearest(spec.norm)
    for wanted in nearest:
        for share in (0.98, 1.02):
            eps = float(share * wanted)
            adversarial = build_attack(spec, eps)(problem.model, problem.images, problem.labels)
            is_broken = problem.model(adversarial).argmax(1) != problem.labels
            decided = (eps - nearest).abs() > 0.015 * nearest
            assert torch.equal(is_broken[decided], eps > nearest[decided])
            assert ThreatModel(spec.norm, eps).is_in_ball(problem.images, adversarial).all()
            assert is_in_box(adversarial).all()


@pytest.mark.parametrize("spec", [PGD, PGD_L2], ids=lambda spec: spec.name)
def test_pgd_is_near_the_optimum_with_several_classes(spec, linear_problem):
    # Steep, as cross-entropy pushes towards all classes by their probability, not to the nearest.
    problem = linear_problem(8, classes=5, slope=30.0)
    for row, wanted in enumerate(problem.nearest(spec.norm)):
        one = slice(row, row + 1)
        for share, is_expected in ((0.98, False), (1.1, True)):
            attack = build_attack(spec, float(share * wanted))
            adversarial = attack(problem.model, problem.images[one], problem.labels[one])
            assert (problem.model(adversarial).argmax(1) != problem.labels[one]).item() == is_expected


@BUDGETED
def test_box_and_budget_hold_where_pixels_are_at_the_ends(spec, small_cnn, images, labels):
    for eps in (0.01, 0.3, 1.0):
        adversarial = build_attack(spec, eps)(small_cnn, images.round(), labels)
        assert ThreatModel(spec.norm, eps).is_in_ball(images.round(), adversarial).all()
        assert is_in_box(adversarial).all()
        assert (adversarial != images.round()).any()


@BUDGETED
def test_a_budget_of_zero_returns_the_images(spec, images, labels):
    def refuse(*_):
        raise AssertionError("the model was attacked")

    model = nn.Flatten()
    model.register_forward_hook(refuse)
    torch.testing.assert_close(build_attack(spec, 0.0)(model, images, labels), images, rtol=0, atol=0)


def test_budgets_must_fit_the_attack():
    for eps in (None, -0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="pgd: expected a finite budget"):
            build_attack(PGD, eps)
    with pytest.raises(ValueError, match="cw: a minimal-norm attack runs once"):
        build_attack(CW, 0.1)


@EVERY
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_proposals_are_plain_tensors_in_every_gradient_mode(spec, eps, mode, small_cnn, images, labels):
    with mode():
        adversarial = build_attack(spec, eps)(small_cnn, images + 0, labels + 0)
    assert adversarial.shape == images.shape and adversarial.dtype == torch.float32
    assert adversarial.is_contiguous() and not adversarial.requires_grad and not adversarial.is_inference()
    assert (adversarial != images).any()


@EVERY
def test_memory_formats_do_not_matter(spec, eps, small_cnn, images, labels):
    def propose(model, images):
        torch.manual_seed(5)
        return build_attack(spec, eps)(model, images, labels)

    plain = propose(small_cnn, images)
    last = propose(copy.deepcopy(small_cnn).to(memory_format=torch.channels_last), images.to(memory_format=torch.channels_last))
    assert last.is_contiguous()
    # Rounding can flip the sign of a gradient near zero: almost all pixels agree.
    assert ((plain - last).abs() < 1e-4).float().mean() > 0.98


class Transposing(nn.Module):
    """Hands back gradients that cannot be viewed as rows."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        return self.model(images.transpose(2, 3).contiguous())


def test_gradients_may_have_any_strides(small_cnn, images, labels):
    assert build_attack(PGD_L2, 0.2)(Transposing(small_cnn), images, labels).isfinite().all()


@EVERY
def test_the_model_is_left_as_it_was(spec, eps, small_cnn, images, labels):
    small_cnn.train()
    small_cnn[1].eval()  # a frozen BatchNorm in a network under training
    small_cnn[0].bias.requires_grad_(False)
    modes = [module.training for module in small_cnn.modules()]
    trainable = [parameter.requires_grad for parameter in small_cnn.parameters()]
    state = copy.deepcopy(small_cnn.state_dict())
    seen = []
    hook = small_cnn.register_forward_hook(
        lambda module, *_: seen.append(any(inner.training for inner in module.modules()))
    )

    def check_unchanged():
        assert [module.training for module in small_cnn.modules()] == modes
        assert [parameter.requires_grad for parameter in small_cnn.parameters()] == trainable
        assert all(parameter.grad is None for parameter in small_cnn.parameters())
        for key, value in small_cnn.state_dict().items():
            assert torch.equal(value, state[key])

    build_attack(spec, eps)(small_cnn, images, labels)
    assert seen and not any(seen)
    check_unchanged()
    hook.remove()

    def fail(*_):
        raise MemoryError

    small_cnn.register_forward_hook(fail)
    with pytest.raises(MemoryError):
        build_attack(spec, eps)(small_cnn, images, labels)
    check_unchanged()


class RobModel(nn.Module):
    """torchattacks normalises by itself for models of this name; this one also has no parameters."""

    mean, std = torch.full((3,), 0.5), torch.full((3,), 0.5)

    def __init__(self):
        super().__init__()
        self.register_buffer("weight", torch.randn(192, 5, generator=torch.Generator().manual_seed(0)))

    def forward(self, images):
        assert (images >= 0).all() and (images <= 1).all()
        return images.flatten(1) @ self.weight


@EVERY
def test_models_may_lack_parameters_and_have_any_name(spec, eps, images, labels, capsys):
    adversarial = build_attack(spec, eps)(RobModel(), images, labels)
    assert is_in_box(adversarial).all() and (adversarial != images).any()
    assert capsys.readouterr().out == ""


@EVERY
def test_double_precision_is_kept(spec, eps, small_cnn, images, labels):
    assert build_attack(spec, eps)(small_cnn.double(), images.double(), labels).dtype == torch.float64


@EVERY
def test_no_images_give_no_images(spec, eps, small_cnn, images, labels):
    assert build_attack(spec, eps)(small_cnn, images[:0], labels[:0]).shape == (0, 3, 8, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda images, labels: (2 * images - 1, labels), r"expected images in \[0, 1\], got values from -0.9"),
        (lambda images, labels: (images.log() * 0 / 0, labels), r"expected images in \[0, 1\], got values from nan"),
        (lambda images, labels: (images[0], labels), "expected float images"),
        (lambda images, labels: ((255 * images).byte(), labels), "expected float images"),
        (lambda images, labels: (images, labels[:3]), "expected int64 labels"),
        (lambda images, labels: (images, labels.int()), "expected int64 labels"),
    ],
)
def test_unfit_inputs_are_refused(change, message, small_cnn, images, labels):
    with pytest.raises(ValueError, match=message):
        build_attack(FGSM, 0.1)(small_cnn, *change(images, labels))


class NanGradient(nn.Module):
    """Finite logits, but the gradient of the last image is NaN."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        poison = torch.ones(len(images), 1)
        poison[-1] = 0
        # sqrt has an infinite derivative at 0, and infinity times 0 is NaN.
        return self.model(images) + (images.flatten(1).sum(1, keepdim=True) * 0 + (1 - poison) * 0 + poison).sqrt()


@EVERY
def test_gradients_that_are_not_finite_are_counted_and_hurt_nobody_else(spec, eps, small_cnn, images, labels):
    attack = build_attack(spec, eps)
    assert attack.nonfinite_gradients == 0
    adversarial = attack(NanGradient(small_cnn), images, labels)
    assert adversarial.isfinite().all() and is_in_box(adversarial).all()
    assert (adversarial[:-1] != images[:-1]).flatten(1).any(1).sum() >= 3
    assert attack.nonfinite_gradients >= 1
    if spec in (FGSM, PGD):
        assert attack.nonfinite_gradients == (1 if spec is FGSM else PGD.steps)
    if spec is FGSM:
        assert torch.equal(adversarial[-1], images[-1])


class NanLogits(nn.Module):
    def forward(self, images):
        return images.flatten(1)[:, :5] * float("nan")


@EVERY
def test_a_model_of_nan_gives_finite_proposals(spec, eps, images, labels):
    attack = build_attack(spec, eps)
    adversarial = attack(NanLogits(), images, labels)
    assert adversarial.isfinite().all() and attack.nonfinite_gradients >= len(images)
    if spec is CW:
        assert torch.equal(adversarial, images)


def test_a_gradient_of_zero_leaves_finite_images(images, labels):
    class Constant(nn.Module):
        def forward(self, images):
            return images.flatten(1)[:, :5] * 0

    attack = build_attack(PGD_L2.model_copy(update={"random_start": False}), 0.5)
    assert torch.equal(attack(Constant(), images, labels), images)


def test_pgd_l2_breaks_confident_models(linear_problem):
    """Here gradients are near 1e-13; divided by their norm plus 1e-10, PGD would not move."""
    problem = linear_problem(1, classes=2, slope=60.0)
    with torch.no_grad():
        margin = problem.model(problem.images).sort(1).values.diff(dim=1).item()
    assert 30 < margin < 45
    # In float32 the label's own share of the gradient is zero by now, so the way is longer by sqrt(2).
    eps = 1.6 * problem.nearest("l2").item()
    spec = PGD_L2.model_copy(update={"random_start": False})
    adversarial = build_attack(spec, eps)(problem.model, problem.images, problem.labels)
    assert (problem.model(adversarial).argmax(1) != problem.labels).all()


def count_forwards(model):
    shapes = []
    model.register_forward_hook(lambda module, inputs, output: shapes.append(len(inputs[0])))
    return shapes


@BUDGETED
def test_every_forward_holds_all_images(spec, small_cnn, images, labels):
    shapes = count_forwards(small_cnn)
    build_attack(spec, 0.1)(small_cnn, images, labels)
    assert shapes == [6] * (1 if spec is FGSM else 20)


def test_step_size_is_the_ratio_of_eps(small_cnn, images, labels):
    spec = PGD.model_copy(update={"steps": 5, "step_size_ratio": 0.5, "random_start": False})
    adversarial = build_attack(spec, 0.1)(small_cnn, images * 0.5 + 0.25, labels)
    assert (adversarial - images * 0.5 - 0.25).abs().max().item() == pytest.approx(0.05, rel=1e-4)


def test_random_starts_follow_the_global_generator(small_cnn, images, labels):
    def propose(seed):
        torch.manual_seed(seed)
        return build_attack(PGD, 0.1)(small_cnn, images, labels)

    assert torch.equal(propose(1), propose(1))
    assert not torch.equal(propose(1), propose(2))


class LotteryModel(nn.Module):
    """Wrong on an image only if its mean is above a threshold, which random starts pass by luck.

    The gradient is zero, so steps do nothing.
    """

    def __init__(self, threshold):
        super().__init__()
        self.threshold = threshold

    def forward(self, images):
        is_wrong = (images.flatten(1).mean(1) > self.threshold).float()
        return torch.stack([1 - is_wrong, is_wrong], 1) + 0 * images.flatten(1)[:, :1]


def test_restarts_keep_the_first_that_breaks_an_image():
    images, labels = torch.full((32, 3, 8, 8), 0.5), torch.zeros(32, dtype=torch.int64)
    model = LotteryModel(threshold=0.5 + 0.004)  # one standard deviation: about 16 % each time

    def broken(restarts):
        torch.manual_seed(0)
        spec = PGD.model_copy(update={"steps": 1, "restarts": restarts})
        return model(build_attack(spec, 0.1)(model, images, labels)).argmax(1) == 1

    once, often = broken(1), broken(8)
    assert 0 < once.sum() < 16
    assert often.sum() > 16
    assert (once <= often).all()


def test_restarts_attack_all_images_again(small_cnn, images, labels):
    shapes = count_forwards(small_cnn)
    build_attack(PGD.model_copy(update={"restarts": 3}), 0.1)(small_cnn, images, labels)
    assert shapes == [6] * (3 * 20 + 2)


def test_torchattacks_is_imported_late():
    import subprocess

    code = "import sys, lrrobust.attacks.build, lrrobust.attacks.suite; assert 'torchattacks' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
