import copy
import math
from functools import partial

import pytest
import torch
from made_models import Function
from torch import nn

from lrrobust.attacks.build import Attack
from lrrobust.attacks.specs import ApgdSpec, CwSpec, DeepFoolSpec, FabSpec, FgsmSpec, FmnSpec, MiFgsmSpec, PgdSpec, SquareSpec
from lrrobust.threat import ThreatModel, is_in_box

FGSM = FgsmSpec(kind="fgsm", name="fgsm", eps=(0.01,))
PGD = PgdSpec(kind="pgd", name="pgd", norm="linf", eps=(0.01,), steps=20)
PGD_L2 = PgdSpec(kind="pgd", name="pgd_l2", norm="l2", eps=(0.2,), steps=20)
CW = CwSpec(kind="cw", name="cw", eps=(0.1,), binary_search_steps=4, steps=20, lr=0.1, initial_c=1.0)
APGD = ApgdSpec(kind="apgd", name="apgd", norm="linf", loss="dlr", eps=(0.01,), steps=20)
SQUARE = SquareSpec(kind="square", name="square", norm="linf", eps=(0.01,), queries=20)
MI_FGSM = MiFgsmSpec(kind="mi_fgsm", name="mi_fgsm", norm="linf", eps=(0.01,))
PGD_L1 = PgdSpec(kind="pgd", name="pgd_l1", norm="l1", eps=(2.0,), steps=20)
PGD_TARGETED = PgdSpec(kind="pgd", name="pgd_targeted", norm="linf", eps=(0.01,), steps=20, target="least_likely")
FAB = FabSpec(kind="fab_t", name="fab_t", norm="l2", eps=(0.1,), targets=2, steps=5)
FMN = FmnSpec(kind="fmn", name="fmn", norm="linf", eps=(0.1,), steps=10)
DEEPFOOL = DeepFoolSpec(kind="deepfool", name="deepfool", norm="l2", eps=(0.1,), targets=2, steps=5)

BUDGETED = pytest.mark.parametrize("spec", [FGSM, PGD, PGD_L2, PGD_L1], ids=lambda spec: spec.name)
BY_GRADIENT = pytest.mark.parametrize("spec", [FGSM, PGD, PGD_L2, CW, APGD, MI_FGSM], ids=lambda spec: spec.name)
EVERY = pytest.mark.parametrize(
    "spec", [FGSM, PGD, PGD_L2, PGD_L1, PGD_TARGETED, CW, APGD, SQUARE, MI_FGSM, FAB, FMN, DEEPFOOL], ids=lambda spec: spec.name
)


def at(spec, *ladder):
    return spec.model_copy(update={"eps": ladder})


@pytest.fixture
def images():
    return torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def labels(small_cnn, images):
    with torch.no_grad():
        return small_cnn(images).argmax(1)


@BUDGETED
@pytest.mark.parametrize("count", [1, 3, 8])
def test_attacks_succeed_exactly_beyond_the_nearest_adversarial_image(spec, count, assert_breaks_beyond_the_nearest):
    assert_breaks_beyond_the_nearest(partial(at, spec), spec.norm, count)


@pytest.mark.parametrize("spec", [PGD, PGD_L2], ids=lambda spec: spec.name)
def test_pgd_is_near_the_optimum_with_several_classes(spec, linear_problem, attack_with):
    # Steep, as cross-entropy pushes towards all classes by their probability, not to the nearest.
    problem = linear_problem(8, classes=5, slope=30.0)
    for row, wanted in enumerate(problem.nearest(spec.norm).tolist()):
        one = slice(row, row + 1)
        attacked = attack_with(at(spec, 0.98 * wanted, 1.1 * wanted), problem.model, problem.images[one], problem.labels[one])
        assert attacked.is_broken.flatten().tolist() == [False, True]


@BUDGETED
def test_box_and_budget_hold_where_pixels_are_at_the_ends(spec, small_cnn, images, labels, attack_with):
    images = images.round()
    ladder = (0.01, 0.3, 1.0)
    attacked = attack_with(at(spec, *ladder), small_cnn, images, labels)
    for eps, proposals in zip(ladder, attacked.proposals, strict=True):
        assert ThreatModel(spec.norm, eps).is_in_ball(images, proposals).all()
        assert is_in_box(proposals).all()
    assert (attacked.proposals[0] != images).flatten(1).any(1).all()


@BUDGETED
def test_at_a_budget_of_zero_nothing_is_claimed(spec, small_cnn, images, labels, attack_with):
    attacked = attack_with(at(spec, 0.0), small_cnn, images, labels)
    assert not attacked.claims and not attacked.effort.forward_passes.any()
    with_more = attack_with(at(spec, 0.0, 1e-6), small_cnn, images, labels)
    assert {eps for _, eps, *_ in with_more.claims} == {1e-6}
    assert not with_more.effort.forward_passes[0].any()


def test_ladder_of_a_minimal_attack_is_infinity():
    assert all(Attack(spec).ladder == (math.inf,) for spec in (CW, FAB, FMN, DEEPFOOL))
    assert Attack(PGD).ladder == PGD.eps


@EVERY
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_proposals_are_plain_tensors_in_every_gradient_mode(spec, mode, small_cnn, images, labels, attack_with):
    with mode():
        attacked = attack_with(spec, small_cnn, images + 0, labels + 0)
    assert (attacked.proposals != images).any()


@EVERY
def test_memory_formats_do_not_matter(spec, small_cnn, images, labels, attack_with):
    plain = attack_with(spec, small_cnn, images, labels).proposals
    last_model = copy.deepcopy(small_cnn).to(memory_format=torch.channels_last)
    last = attack_with(spec, last_model, images.to(memory_format=torch.channels_last), labels).proposals
    # Rounding can flip the sign of a gradient near zero: almost all pixels agree.
    assert ((plain - last).abs() < 1e-4).float().mean() > 0.98


def test_gradients_may_have_any_strides(small_cnn, images, labels, attack_with):
    # They cannot be viewed as rows.
    model = nn.Sequential(Function(lambda images: images.transpose(2, 3).contiguous()), small_cnn)
    assert attack_with(PGD_L2, model, images, labels).proposals.isfinite().all()


@EVERY
def test_the_model_is_left_as_it_was(spec, small_cnn, images, labels):
    small_cnn.train()
    small_cnn[1].eval()  # a frozen BatchNorm in a network under training
    small_cnn[0].bias.requires_grad_(False)
    modes = [module.training for module in small_cnn.modules()]
    trainable = [parameter.requires_grad for parameter in small_cnn.parameters()]
    state = copy.deepcopy(small_cnn.state_dict())
    seen = []
    hook = small_cnn.register_forward_hook(lambda module, *_: seen.append(any(inner.training for inner in module.modules())))

    def check_unchanged():
        assert [module.training for module in small_cnn.modules()] == modes
        assert [parameter.requires_grad for parameter in small_cnn.parameters()] == trainable
        assert all(parameter.grad is None for parameter in small_cnn.parameters())
        for key, value in small_cnn.state_dict().items():
            assert torch.equal(value, state[key])

    def attack():
        Attack(spec)(
            small_cnn,
            images,
            labels,
            batch_size=4,
            claim=lambda rows, *_: [False] * len(rows),
            draw=lambda *_: torch.Generator().manual_seed(0),
        )

    attack()
    assert seen and not any(seen)
    check_unchanged()
    hook.remove()

    def fail(*_):
        raise MemoryError

    small_cnn.register_forward_hook(fail)
    with pytest.raises(MemoryError):
        attack()
    check_unchanged()


class Parameterless(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("weight", torch.randn(192, 5, generator=torch.Generator().manual_seed(0)))

    def forward(self, images):
        assert (images >= 0).all() and (images <= 1).all()
        return images.flatten(1) @ self.weight


@EVERY
def test_models_may_lack_parameters_and_see_only_the_box(spec, images, labels, attack_with):
    attacked = attack_with(spec, Parameterless(), images.round(), labels)
    assert is_in_box(attacked.proposals).all() and (attacked.proposals != images).any()


@EVERY
def test_double_precision_is_kept(spec, small_cnn, images, labels, attack_with):
    assert attack_with(spec, small_cnn.double(), images.double(), labels).claims


@EVERY
def test_no_images_make_no_claims(spec, small_cnn, images, labels, attack_with):
    assert not attack_with(spec, small_cnn, images[:0], labels[:0]).claims


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
        Attack(FGSM)(small_cnn, *change(images, labels), batch_size=6, claim=None, draw=None)


@BY_GRADIENT
def test_gradients_that_are_not_finite_are_counted_and_hurt_nobody_else(spec, small_cnn, images, labels, attack_with):
    images[-1] *= 0.1
    with torch.no_grad():
        labels[-1] = small_cnn(images[-1:]).argmax(1)
    spec = spec.model_copy(update={"random_start": False}) if spec.kind == "pgd" else spec

    def nan_where_dark(images):
        """Finite logits, but the gradient of dark images is NaN."""
        mean = images.flatten(1).mean(1, keepdim=True)
        # sqrt has an infinite derivative at 0, and infinity times 0 is NaN.
        return small_cnn(images) + (mean * 0 + (mean > 0.2)).sqrt()

    attacked = attack_with(spec, Function(nan_where_dark), images, labels)
    assert attacked.proposals.isfinite().all() and is_in_box(attacked.proposals).all()
    assert (attacked.proposals[0, :-1] != images[:-1]).any()
    if spec is not APGD:  # whose starts are always random
        assert torch.equal(attacked.proposals[0, -1], images[-1])
    if spec is CW:
        assert attacked.effort.nonfinite_gradients >= 1
    else:
        assert (
            attacked.effort.nonfinite_gradients == attacked.effort.forward_passes[0, -1] == {FGSM: 1, MI_FGSM: 10}.get(spec, 20)
        )


@EVERY
def test_logits_of_nan_are_no_success(spec, images, labels):
    claims = []

    def claim(rows, proposed, eps, is_last):
        assert proposed.isfinite().all() and all(is_last)
        claims.extend(rows)
        return [False] * len(rows)

    model = Function(lambda images: images.flatten(1)[:, :5] * float("nan"))
    effort = Attack(spec)(model, images, labels, batch_size=6, claim=claim, draw=lambda *_: torch.Generator().manual_seed(0))
    assert sorted(claims) == list(range(6)) and (effort.nonfinite_gradients >= 6) == (spec is not SQUARE)


@BY_GRADIENT
def test_passes_are_counted_as_the_model_sees_them(spec, small_cnn, images, labels, attack_with):
    forwarded, backwarded = [], []

    def count(images):
        if images.requires_grad:
            forwarded.append(len(images))
            images.register_hook(lambda gradient: backwarded.append(len(gradient)))
        return small_cnn(images)

    effort = attack_with(spec, Function(count), images, labels, batch_size=4).effort
    assert effort.forward_passes.shape == effort.backward_passes.shape == (1, 6)
    assert effort.forward_passes.sum() == effort.backward_passes.sum() == sum(forwarded) == sum(backwarded)
    if spec is CW:
        assert len(set(effort.backward_passes[0].tolist())) > 1


class Precise(nn.Module):
    """Tells in which type its matrix product was computed."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.seen = set()

    def forward(self, images):
        logits = self.model(images)
        self.seen.add((torch.is_grad_enabled() and images.requires_grad, logits.dtype))
        return logits


@pytest.mark.parametrize("spec", [FGSM, PGD, PGD_L2], ids=lambda spec: spec.name)
def test_bf16_attacks_and_float32_judges(spec, small_cnn, images, labels, attack_with):
    model = Precise(small_cnn)
    attack_with(spec.model_copy(update={"precision": "bf16"}), model, images, labels)
    assert model.seen == {(True, torch.bfloat16), (False, torch.float32)}
