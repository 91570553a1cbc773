from functools import partial

import pytest
import torch
from made_models import Function
from torch import nn

from lrrobust.attacks.apgd import checkpoints
from lrrobust.attacks.specs import ApgdSpec, PgdSpec
from lrrobust.threat import ThreatModel, is_in_box
from lrrobust.torchvision_import import import_torchvision

import_torchvision()
import torchattacks  # noqa: E402

NORMS = pytest.mark.parametrize("norm", ["linf", "l2"])
ALL_NORMS = pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
LOSSES = pytest.mark.parametrize("loss", ["ce", "dlr", "targeted_dlr"])


def apgd(norm, loss, *ladder, **settings):
    return ApgdSpec(kind="apgd", name="apgd", norm=norm, loss=loss, eps=ladder, **{"steps": 30, **settings})


def test_checkpoints_are_those_of_the_paper():
    at = [at for at, window in enumerate(checkpoints(100)) if window]
    assert at == [22, 41, 57, 70, 80, 87, 93, 99]
    assert [checkpoints(100)[each] for each in at] == [22, 19, 16, 13, 10, 7, 6, 6]
    assert checkpoints(1) == [0] and checkpoints(5) == [0, 1, 1, 1, 1]


@ALL_NORMS
@LOSSES
@pytest.mark.parametrize("count", [1, 3, 8])
def test_success_exactly_beyond_the_nearest_adversarial_image(norm, loss, count, assert_breaks_beyond_the_nearest):
    classes = 5 if loss == "targeted_dlr" else 2
    spec = partial(apgd, norm, loss, steps=60 if norm == "l1" else 10)
    assert_breaks_beyond_the_nearest(spec, norm, count, classes=classes, step=0.01, most=2)


@ALL_NORMS
@LOSSES
@pytest.mark.parametrize("classes", [2, 3, 4])
def test_few_classes(norm, loss, classes, linear_problem, attack_with):
    if norm == "l1" and classes > 3 and loss != "targeted_dlr":
        pytest.skip("in larger balls another class may lead")
    problem = linear_problem(4, classes=classes, slope=30.0)
    for row, nearest in enumerate(problem.nearest(norm).tolist()):
        one = slice(row, row + 1)
        spec = apgd(norm, loss, 0.97 * nearest, 1.05 * nearest, steps=100 if norm == "l1" else 30)
        attacked = attack_with(spec, problem.model, problem.images[one], problem.labels[one])
        assert attacked.is_broken.flatten().tolist() == [False, True]


@ALL_NORMS
@LOSSES
@pytest.mark.parametrize(
    "change",
    [lambda z: 500 * z, lambda z: z - 1e3, lambda z: (100 * z).log_softmax(1)],
    ids=["x500", "negative", "log_softmax"],
)
def test_sign_and_scale_of_logits_do_not_matter(norm, loss, change, trained, attack_with):
    model, images, labels = trained[0], trained[1][:40], trained[2][:40]
    spec = apgd(norm, loss, {"linf": 0.02, "l2": 0.25, "l1": 1.5}[norm], targets=3)
    plain = attack_with(spec, model, images, labels).is_broken
    changed = attack_with(spec, nn.Sequential(model, Function(change)), images, labels).is_broken
    assert 0.2 < plain.float().mean() < 0.9
    # The loss of confident models is nearly the margin; but for that, nothing is lost.
    assert (plain != changed).sum() <= (2 if loss == "ce" else 1)


def band(images):
    """Wrong where the mean of the image lies in a band; the margin falls off to both sides of it."""
    margin = 1e-3 - (images.flatten(1).mean(1) - 0.5311).abs()
    return torch.stack([-margin, margin], 1)


def test_halved_steps_find_what_long_ones_step_over(attack_with):
    images, labels = torch.full((8, 3, 4, 4), 0.5), torch.zeros(8, dtype=torch.int64)
    model = Function(band)
    found = attack_with(apgd("linf", "ce", 0.1, steps=100), model, images, labels)
    assert found.is_broken.all()
    steady = PgdSpec(kind="pgd", name="pgd", norm="linf", eps=(0.1,), steps=100, step_size_ratio=20.0)
    assert not attack_with(steady, model, images, labels).is_broken.any()


@ALL_NORMS
def test_box_and_budget_hold_where_pixels_are_at_the_ends(norm, trained, attack_with):
    model, images, labels = trained[0], trained[1][:8].round(), trained[2][:8]
    ladder = (0.001, 0.3, 1.0)
    attacked = attack_with(apgd(norm, "dlr", *ladder, steps=10), model, images, labels)
    for eps, proposals in zip(ladder, attacked.proposals, strict=True):
        assert ThreatModel(norm, eps).is_in_ball(images, proposals).all()
        assert is_in_box(proposals).all()


@ALL_NORMS
@LOSSES
def test_batches_change_nothing_but_rounding(norm, loss, assert_batches_do_not_matter):
    assert_batches_do_not_matter(
        apgd(norm, loss, *{"linf": (0.01, 0.02), "l2": (0.1, 0.2), "l1": (0.5, 1.0)}[norm], steps=12, targets=2)
    )


@LOSSES
def test_passes_are_those_of_the_model(loss, trained, attack_with):
    model, images, labels = trained
    with torch.no_grad():
        correct = (model(images).argmax(1) == labels).nonzero().flatten()[:10]
    images, labels = images[correct], labels[correct]
    seen = []

    def count(module, inputs, output):
        # Claims are judged, and targets chosen, without gradients.
        seen.append(len(output) * output.requires_grad)

    spec = apgd("linf", loss, 0.001, 0.02, steps=10, targets=3, restarts=2)
    hook = model.register_forward_hook(count)
    try:
        effort = attack_with(spec, model, images, labels, batch_size=4).effort
    finally:
        hook.remove()
    starts, chosen = (6, 1) if loss == "targeted_dlr" else (2, 0)
    assert (effort.backward_passes[0] == 10 * starts).all()
    assert torch.equal(effort.forward_passes - effort.backward_passes, torch.tensor([[chosen] * 10, [0] * 10]))
    assert (effort.forward_passes.sum(0) <= spec.max_forward_passes).all()
    assert effort.forward_passes.sum(0).max() == spec.max_forward_passes
    assert effort.backward_passes.sum() == sum(seen)


def test_every_start_has_a_target_and_noise_of_its_own(attack_with):
    seen = []

    def flat(images):
        seen.append(images.detach())
        return 0 * images.flatten(1)[:, :4] + torch.tensor([3.0, 1.0, 2.0, 0.0])

    image, label = torch.full((1, 3, 4, 4), 0.5), torch.tensor([0])
    spec = apgd("linf", "targeted_dlr", 0.1, steps=1, targets=2, restarts=2)
    attacked = attack_with(spec, Function(flat), image, label)
    assert [is_last for _, _, is_last, _ in attacked.claims] == [True] * 4
    starts = torch.cat([each for each in seen if len(each)]).flatten(1).unique(dim=0)
    assert len(starts) == 1 + 4  # the clean image, and four starts that no gradient moves
    distances = (starts - 0.5).abs().amax(1)
    torch.testing.assert_close(distances.sort().values, torch.tensor([0.0] + [0.1] * 4))


@NORMS
def test_a_warm_start_stretches_the_best_point_before(norm, attack_with):
    def keep(images):
        seen.append(images.detach())
        return torch.tensor([1.0, 0.0]) + 0 * images.flatten(1)[:, :2]

    image, label = torch.full((1, 3, 4, 4), 0.5), torch.tensor([0])
    for warm_start in (True, False):
        seen = []
        attack_with(apgd(norm, "ce", 0.1, 0.2, steps=1, warm_start=warm_start), Function(keep), image, label)
        first, second = (each - image for each in (seen[2], seen[4]))
        assert torch.allclose(second, 2 * first, atol=1e-6) == warm_start


def auto_pgd(model, image, label, start, norm, eps, steps, rho=0.75):
    """Algorithm 1 of the paper for one image, step by step; the points that the model is shown, and its turns back."""

    def project(point):
        delta = point - image
        if norm == "linf":
            delta = delta.clamp(-eps, eps)
        elif delta.norm() > eps:
            delta = delta * (eps / delta.norm())
        return (image + delta).clamp(0, 1)

    def loss_and_gradient(point):
        point = point.clone().requires_grad_()
        logits = model(point[None])[0]
        others = torch.cat([logits[:label], logits[label + 1 :]])
        loss = others.logsumexp(0) - logits[label]
        (gradient,) = torch.autograd.grad(loss, point)
        return loss.item(), gradient.sign() if norm == "linf" else gradient / gradient.norm()

    shares = [0.0, 0.22]
    while shares[-1] < 1:
        shares.append(shares[-1] + max(shares[-1] - shares[-2] - 0.03, 0.06))
    marks = [int(share * steps) for share in shares[1:]]
    shown, turns, last_checkpoint = [], 0, 0
    point = previous = start
    step_size = 2 * eps
    best, best_loss, best_direction, best_loss_before, was_halved = start, float("-inf"), None, float("-inf"), True
    reference = float("inf")
    rises = 0
    for k in range(steps):
        shown.append(point)
        loss, direction = loss_and_gradient(point)
        rises += loss > reference
        if loss > best_loss:
            best, best_loss, best_direction = point, loss, direction
        reference = loss
        if k in marks:
            if rises < rho * (k - last_checkpoint) or (not was_halved and best_loss == best_loss_before):
                step_size, was_halved, turns = step_size / 2, True, turns + 1
                point, direction, reference = best, best_direction, best_loss
            else:
                was_halved = False
            best_loss_before, last_checkpoint, rises = best_loss, k, 0
        ahead = project(point + step_size * direction)
        moved = ahead if k == 0 else project(point + 0.75 * (ahead - point) + 0.25 * (point - previous))
        previous, point = point, moved
    return shown, turns


@NORMS
def test_steps_are_those_of_the_paper(norm, in_double, attack_with):
    model, images, labels = in_double[0], in_double[1][:12], in_double[2][:12]
    eps, steps = (0.004, 100) if norm == "linf" else (0.05, 100)
    seen = []

    def keep(images):
        if images.requires_grad:
            seen.append(images.detach().clone())
        return model(images)

    compared = turned = 0
    for image, label in zip(images, labels, strict=True):
        seen.clear()
        attacked = attack_with(apgd(norm, "ce", eps, steps=steps), Function(keep), image[None], label[None])
        if attacked.is_broken.any():
            continue
        points = [each[0] for each in seen]
        expected, turns = auto_pgd(model, image, int(label), points[0], norm, eps, steps)
        torch.testing.assert_close(torch.stack(points), torch.stack(expected), rtol=0, atol=1e-7)
        compared, turned = compared + 1, turned + turns
    assert compared >= 5 and turned > 3 * compared


@NORMS
def test_no_weaker_than_torchattacks(norm, beside_peer):
    eps = {"linf": 0.02, "l2": 0.25}[norm]
    options = {"norm": {"linf": "Linf", "l2": "L2"}[norm], "eps": eps, "steps": 30}
    ours, theirs = beside_peer(apgd(norm, "ce", eps), partial(torchattacks.APGD, **options))
    assert 12 < theirs < 57
    assert ours >= theirs - 1


@LOSSES
def test_in_l1_the_nearest_of_the_box_is_found(loss, attack_with):
    """It moves the values of the steepest weights to the end of the box."""
    generator = torch.Generator().manual_seed(0)
    weight, image = torch.randn(192, generator=generator), torch.rand(192, generator=generator)
    room = torch.where(weight > 0, 1 - image, image)
    steepest = weight.abs().topk(10).indices
    nearest = room[steepest].sum()
    bias = weight @ image + (weight.abs() * room)[steepest].sum()
    model = Function(lambda images: torch.stack([0 * images.flatten(1)[:, 0], images.flatten(1) @ weight - bias], 1))
    spec = apgd("l1", loss, float(0.99 * nearest), float(1.02 * nearest), steps=60)
    assert attack_with(spec, model, image.view(1, 3, 8, 8), torch.tensor([0])).is_broken.flatten().tolist() == [False, True]


def test_in_l1_more_steps_break_no_fewer_and_no_fewer_than_pgd(trained, attack_with):
    model, images, labels = trained
    pgd = PgdSpec(kind="pgd", name="pgd", norm="l1", eps=(1.0,), steps=20)
    specs = [pgd, *(apgd("l1", "ce", 1.0, steps=steps) for steps in (5, 20, 100))]
    broken = [int(attack_with(spec, model, images, labels).is_broken.sum()) for spec in specs]
    assert 20 < broken[0] <= broken[2] and broken[1] <= broken[2] <= broken[3] < 180


def test_in_l1_only_what_is_in_the_ball_is_claimed(trained, attack_with):
    attacked = attack_with(apgd("l1", "ce", 0.3, steps=20), trained[0], trained[1][:20], trained[2][:20])
    assert all(is_adversarial for _, _, is_last, is_adversarial in attacked.claims if not is_last)
