"""PGD beside torchattacks, and what it does that torchattacks does not: leave broken images, keep batches full."""

import copy
import functools

import pytest
import torch
from made_models import Function
from torch import nn

from lrrobust.attacks import build
from lrrobust.attacks.build import Attack
from lrrobust.attacks.pgd import _is_ahead
from lrrobust.attacks.specs import PgdSpec
from lrrobust.errors import ConfigError
from lrrobust.threat import ThreatModel, is_in_box
from lrrobust.torchvision_import import import_torchvision

import_torchvision()
import torchattacks  # noqa: E402

LADDERS = {"linf": (0.004, 0.01, 0.02, 0.04), "l2": (0.05, 0.1, 0.25, 0.5)}
L1_LADDER = (0.3, 1.0, 2.5, 6.0)
NORMS = pytest.mark.parametrize("norm", LADDERS)
TARGETS = pytest.mark.parametrize("target", ["random", "least_likely", "top_k", 2])


def pgd(norm, *ladder, **settings):
    return PgdSpec(kind="pgd", name="pgd", norm=norm, eps=ladder or LADDERS[norm], **{"steps": 20, **settings})


def draw(row, eps, restart):
    return torch.Generator().manual_seed(0)


@torch.no_grad()
def accuracy(model, images, labels):
    return (model(images).argmax(1) == labels).float().mean().item()


def peer(norm, eps, model, images, labels, steps=20, random_start=True):
    """torchattacks' last iterates, with the same budget."""
    settings = {"eps": eps, "alpha": 2.5 * eps / steps, "steps": steps, "random_start": random_start}
    if norm == "linf":
        return torchattacks.PGD(model, **settings)(images, labels)
    return torchattacks.PGDL2(model, eps_for_division=1e-20, **settings)(images, labels)


@NORMS
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_robust_accuracy_is_no_higher_than_that_of_torchattacks(norm, precision, trained, attack_with, monkeypatch):
    """From the same random starts: between others, either attack varies by one or two images in 200."""
    model, images, labels = trained
    for seed in ("0", "1"):
        attacked = attack_with(pgd(norm, precision=precision), model, images, labels, seed=seed)
        ours = (~attacked.is_broken).float().mean(1)
        starts = attack_with(pgd(norm, steps=1), FLAT, images, 0 * labels, seed=seed).proposals
        theirs = []
        for eps, start in zip(LADDERS[norm], starts, strict=True):
            with monkeypatch.context() as patch:
                start_at(patch, start - images, eps)
                theirs.append(accuracy(model, peer(norm, eps, model, images, labels), labels))
        assert 0 < min(theirs) < 0.5 < max(theirs) < 1
        assert (ours <= torch.tensor(theirs) + 1 / 200 + 1e-6).all()
        # Nor much lower: what counts as broken is the judge's to say, and it knows no other budget.
        assert (ours >= torch.tensor(theirs) - 0.03).all()


def start_at(patch, delta, eps):
    """torchattacks draws noise of the images' shape or, in l2, a direction and lengths as shares of eps."""
    patch.setattr(torch.Tensor, "normal_", lambda noise: noise.copy_(delta))
    shares = delta.flatten(1).norm(dim=1).view(-1, 1, 1, 1) / eps
    patch.setattr(torch.Tensor, "uniform_", lambda noise, *_: noise.copy_(delta if noise.shape == delta.shape else shares))


@NORMS
def test_without_a_random_start_iterates_are_those_of_torchattacks(norm, in_double, attack_with):
    model, images, labels = in_double[0], in_double[1][:80], in_double[2][:80]
    attacked = attack_with(pgd(norm, random_start=False), model, images, labels)
    stood_all = 0
    for eps, is_broken, proposals in zip(LADDERS[norm], attacked.is_broken, attacked.proposals, strict=True):
        theirs = peer(norm, eps, model, images, labels, random_start=False)
        torch.testing.assert_close(proposals[~is_broken], theirs[~is_broken], atol=1e-6, rtol=0)
        assert (model(theirs[is_broken]).argmax(1) != labels[is_broken]).float().mean() > 0.9
        stood_all += (~is_broken).sum()
    assert stood_all > 50


@NORMS
def test_confident_models_are_attacked_as_well_as_others(norm, trained, attack_with):
    model, images, labels = trained[0], trained[1][:80], trained[2][:80]
    sure = nn.Sequential(model, Function(lambda logits: 500 * logits))
    plain = attack_with(pgd(norm), model, images, labels).is_broken
    confident = attack_with(pgd(norm), sure, images, labels).is_broken
    # Far beyond where the cross-entropy's gradient is zero in float32, and torchattacks at a loss.
    stuck = accuracy(sure, peer(norm, LADDERS[norm][-1], sure, images, labels), labels)
    assert stuck > 0.5 > (~plain[-1]).float().mean()
    assert ((~confident).float().mean(1) <= (~plain).float().mean(1) + 0.02).all()


@NORMS
def test_on_the_margin_the_scale_of_logits_does_not_matter(norm, trained, attack_with):
    model, images, labels = trained[0], trained[1][:120], trained[2][:120]
    plain = (~attack_with(pgd(norm), model, images, labels).is_broken).float().mean(1)
    small = nn.Sequential(model, Function(lambda logits: 1e-3 * logits))
    by_margin = (~attack_with(pgd(norm, loss="margin"), small, images, labels).is_broken).float().mean(1)
    by_cross_entropy = (~attack_with(pgd(norm), small, images, labels).is_broken).float().mean(1)
    assert (by_margin <= plain + 0.03).all()
    assert by_cross_entropy.sum() > by_margin.sum() + 0.03


def flat(threshold):
    """Wrong on an image if its mean is above a threshold; the gradient is zero, so starts stay what they are."""

    def answer(images):
        is_wrong = (images.flatten(1).mean(1) > threshold).float()
        return torch.stack([1 - is_wrong, is_wrong], 1) + 0 * images.flatten(1)[:, :2]

    return Function(answer)


#: Never wrong.
FLAT = flat(1)


@pytest.fixture
def grey():
    return torch.full((32, 3, 8, 8), 0.5), torch.zeros(32, dtype=torch.int64)


@NORMS
def test_random_starts_follow_the_image_alone(norm, grey, attack_with):
    images, labels = grey
    spec = pgd(norm, 0.1, 0.2, steps=2, restarts=2)
    whole = attack_with(spec, FLAT, images, labels)
    small = attack_with(spec, FLAT, images, labels, batch_size=5)
    reverse = attack_with(spec, FLAT, images, labels, names=range(31, -1, -1))
    few = attack_with(spec, FLAT, images[:3], labels[:3], names=(7, 30, 2))
    assert torch.equal(whole.proposals, small.proposals)
    assert torch.equal(whole.proposals, reverse.proposals.flip(1))
    assert torch.equal(whole.proposals[:, [7, 30, 2]], few.proposals)
    once = pgd(norm, 0.1, 0.2, steps=2)
    others = [attack_with(spec, FLAT, images, labels, seed="other"), attack_with(once, FLAT, images, labels)]
    starts = torch.cat([run.proposals.flatten(0, 1) for run in [whole, *others]]).flatten(1)
    assert len(starts.unique(dim=0)) == 3 * 64


def test_random_starts_fill_the_ball(grey, attack_with):
    images, labels = grey
    linf = attack_with(pgd("linf", 0.2, steps=1), FLAT, images, labels).proposals - images
    assert linf.abs().max() <= 0.2 + 1e-6
    # Uniform: variance eps^2 / 3, of 32 * 192 draws.
    assert linf.square().mean().item() == pytest.approx(0.2**2 / 3, rel=0.05)
    lengths = (attack_with(pgd("l2", 0.2, steps=1), FLAT, images, labels).proposals - images).flatten(2).norm(dim=2)
    assert lengths.max() <= 0.2 + 1e-6
    assert 0.05 < lengths.mean() < 0.15 and lengths.min() < 0.05 and lengths.max() > 0.15


def test_restarts_go_on_until_one_breaks_the_image(grey, attack_with):
    model = flat(threshold=0.5 + 0.004)  # one standard deviation: about 16 % each time
    once = attack_with(pgd("linf", 0.1, steps=1), model, *grey)
    often = attack_with(pgd("linf", 0.1, steps=1, restarts=8), model, *grey)
    assert 0 < once.is_broken.sum() < 16 < often.is_broken.sum() < 32
    assert (once.is_broken <= often.is_broken).all()
    assert (often.effort.forward_passes[~often.is_broken] == 8).all()
    assert (often.effort.forward_passes[once.is_broken] == 1).all()
    assert sum(is_last for _, _, is_last, _ in often.claims) == often.effort.forward_passes[~often.is_broken].sum() + sum(
        often.effort.forward_passes[often.is_broken] - 1
    )


@NORMS
def test_batches_change_nothing_but_rounding(norm, assert_batches_do_not_matter):
    assert_batches_do_not_matter(pgd(norm, steps=5), batch_sizes=(1, 7, 64), count=20)


@NORMS
def test_a_broken_image_costs_no_further_step(norm, trained, attack_with):
    model, images, labels = trained[0], trained[1][:80], trained[2][:80]
    attacked = attack_with(pgd(norm), model, images, labels)
    passes, is_broken = attacked.effort.forward_passes, attacked.is_broken
    assert (passes[~is_broken] == 20).all()
    assert (passes[1:][is_broken[:-1]] == 0).all()
    first = is_broken.clone()
    first[1:] &= ~is_broken[:-1]
    assert (1 <= passes[first]).all() and passes[first].float().mean() < 15
    for eps, proposals in zip(LADDERS[norm], attacked.proposals, strict=True):
        assert ThreatModel(norm, eps).is_in_ball(images, proposals).all()


def test_batches_are_kept_full_while_images_wait(trained):
    model, images, labels = trained
    judge, judged = copy.deepcopy(model), []

    def claim(rows, proposed, eps, is_last):
        judged.append(len(rows))
        return (judge(proposed).argmax(1) != labels[rows]).tolist()

    attacked = []
    hook = model.register_forward_hook(lambda module, inputs, output: attacked.append(len(inputs[0])))
    try:
        Attack(pgd("linf"))(model, images[:100], labels[:100], batch_size=16, claim=claim, draw=draw)
    finally:
        hook.remove()
    assert max(attacked) == 16 and attacked.count(16) / len(attacked) > 0.75
    # Claims are collected: judged one by one they would be small batches too.
    assert sum(judged) / len(judged) > 8


@pytest.fixture
def ahead(monkeypatch):
    """What attacks on a GPU do: larger budgets fill batches that no image waits for."""
    monkeypatch.setitem(build._RUNNERS, PgdSpec, build._with_settings(functools.partial(build.pgd, ahead=True)))


@NORMS
@pytest.mark.parametrize("batch_size, restarts", [(64, 1), (7, 1), (30, 3)])
def test_budgets_attacked_ahead_change_the_order_alone(norm, batch_size, restarts, in_double, attack_with, request):
    model, images, labels = in_double[0], in_double[1][:20], in_double[2][:20]
    spec, forwards = pgd(norm, steps=5, restarts=restarts), []
    hook = model.register_forward_hook(lambda module, inputs, output: forwards.append(inputs[0].requires_grad))
    try:
        one_by_one = attack_with(spec, model, images, labels, batch_size=batch_size)
        calls = sum(forwards)
        forwards.clear()
        request.getfixturevalue("ahead")
        at_once = attack_with(spec, model, images, labels, batch_size=batch_size)
    finally:
        hook.remove()
    assert torch.equal(at_once.is_broken, one_by_one.is_broken) and not at_once.is_broken.all()
    standing = ~at_once.is_broken
    torch.testing.assert_close(at_once.proposals[standing], one_by_one.proposals[standing], atol=1e-9, rtol=0)
    # At budgets at which an image stands, and at the one that breaks it, it is attacked as ever.
    counted = standing.clone()
    counted[1:] |= standing[:-1]
    counted[0] = True
    assert torch.equal(at_once.effort.forward_passes[counted], one_by_one.effort.forward_passes[counted])
    assert (one_by_one.effort.forward_passes[~counted] == 0).all()
    if batch_size == 64:  # all that can be at once
        assert sum(forwards) <= 0.6 * calls


def test_budgets_attacked_ahead_are_claimed_once_and_one_image_at_a_time(trained, ahead):
    model, images, labels = trained
    spec = pgd("linf", 0.01, 0.02, 0.04, steps=5, restarts=2)
    last = []

    def refuse(rows, proposed, eps, is_last):
        assert len(rows) == len(set(rows)) <= 20
        last.extend((row, each) for row, each, whether in zip(rows, eps, is_last, strict=True) if whether)
        return [False] * len(rows)

    effort = Attack(spec)(model, images[:9], labels[:9], batch_size=20, claim=refuse, draw=draw)
    assert (effort.forward_passes == 10).all()
    assert sorted(last) == sorted((row, eps) for row in range(9) for eps in spec.eps for _ in range(2))


def test_who_attacks_ahead():
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert [_is_ahead(None, device, warm) for device in (gpu, cpu) for warm in (False, True)] == [True, False, False, False]
    assert _is_ahead(True, cpu, False) and not _is_ahead(True, cpu, True) and not _is_ahead(False, gpu, False)


def test_no_budget_is_attacked_ahead_of_its_own_levels(trained, ahead):
    model, images, labels = trained
    levels = torch.tensor([0, 1, 3, 2])
    effort = Attack(pgd("linf", 0.0, 0.001, 0.002, steps=2))(
        model, images[:4], labels[:4], batch_size=64, claim=lambda rows, *_: [False] * len(rows), draw=draw, levels=levels
    )
    assert effort.forward_passes.tolist() == [[0, 0, 0, 0], [0, 0, 2, 2], [0, 0, 2, 0]]


def test_a_claim_that_the_judge_refuses_changes_nothing(trained):
    model, images, labels = trained
    spec = pgd("linf", 0.01, 0.04, steps=5, restarts=2)
    last, others = [], []

    def refuse(rows, proposed, eps, is_last):
        for row, each, whether in zip(rows, eps, is_last, strict=True):
            (last if whether else others).append((row, each))
        return [False] * len(rows)

    effort = Attack(spec)(model, images[:9], labels[:9], batch_size=4, claim=refuse, draw=draw)
    assert (effort.forward_passes == 10).all()
    assert sorted(last) == sorted((row, eps) for row in range(9) for eps in spec.eps for _ in range(2))
    assert len(others) > 10


def test_step_size_is_the_ratio_of_eps(trained, attack_with):
    model, images, labels = trained
    with torch.no_grad():
        labels = model(images * 0.5 + 0.25).argmax(1)
    spec = pgd("linf", 1e-4, steps=5, step_size_ratio=0.5, random_start=False)
    delta = attack_with(spec, model, images * 0.5 + 0.25, labels).proposals - images * 0.5 - 0.25
    assert delta.abs().max().item() == pytest.approx(0.5e-4, rel=2e-3)


def test_a_gradient_of_zero_leaves_the_image(grey, attack_with):
    images, labels = grey
    attacked = attack_with(pgd("l2", 0.5, random_start=False), FLAT, images, labels)
    assert torch.equal(attacked.proposals[0], images)


def test_in_l1_sparse_steps_break_what_they_can(linear_problem, attack_with):
    """The nearest adversarial image changes one value alone, as far as the box lets it: budgets tell of no more."""
    problem = linear_problem(8, classes=2, slope=30.0)
    for row, nearest in enumerate(problem.nearest("l1").tolist()):
        one = slice(row, row + 1)
        spec = pgd("l1", 0.98 * nearest, 1.1 * nearest, sparsity=0.005)
        attacked = attack_with(spec, problem.model, problem.images[one], problem.labels[one])
        assert attacked.is_broken.flatten().tolist() == [False, True]


@pytest.mark.parametrize("precision", ["trained", "in_double"])
def test_in_l1_box_and_budget_hold_and_more_breaks_more(precision, request, attack_with):
    model, images, labels = request.getfixturevalue(precision)
    images, labels = images[:60].clone(), labels[:60].clone()
    images[::2] = images[::2].round()
    with torch.no_grad():
        labels[::2] = model(images[::2]).argmax(1)
    attacked = attack_with(pgd("l1", *L1_LADDER), model, images, labels)
    for eps, proposals in zip(L1_LADDER, attacked.proposals, strict=True):
        assert ThreatModel("l1", eps).is_in_ball(images, proposals).all() and is_in_box(proposals).all()
    broken = attacked.is_broken.float().mean(1).tolist()
    assert broken[0] < 0.3 and broken[-1] > 0.7 and broken == sorted(broken)


def test_random_starts_in_l1_fill_the_ball(grey, attack_with):
    starts = attack_with(pgd("l1", 2.0, steps=1), FLAT, *grey).proposals[0] - grey[0]
    lengths = starts.abs().sum((1, 2, 3))
    assert lengths.max() <= 2 + 1e-5 and lengths.min() < 0.5 and lengths.max() > 1.5
    assert len(starts.flatten(1).unique(dim=0)) == 32


def fixed(images):
    """Shows what it is asked for: logit k rises with pixel k alone, and no image is taken for another class."""
    return images.flatten(1)[:, :4] * 1e-3 + torch.tensor([4.0, 3.0, 2.0, 1.0])


@pytest.mark.parametrize("loss", ["ce", "margin"])
@TARGETS
def test_a_target_is_where_the_search_goes(target, loss, attack_with):
    images, labels = torch.full((6, 3, 4, 4), 0.5), torch.zeros(6, dtype=torch.int64)
    settings = {"targets": 2, "steps": 3, "random_start": False, "target": target, "loss": loss}
    attacked = attack_with(pgd("linf", 0.1, 0.2, **settings), Function(fixed), images, labels)
    starts = 2 if target == "top_k" else 1
    # What was proposed last went up for the target, and down for all others.
    raised = (attacked.proposals[1].flatten(1)[:, :4] - 0.5).argmax(1)
    expected = {"least_likely": {3}, "top_k": {2}, 2: {2}, "random": {1, 2, 3}}[target]
    assert set(raised.tolist()) <= expected and not attacked.is_broken.any()
    assert (attacked.effort.backward_passes == 3 * starts).all()
    assert attacked.effort.forward_passes.tolist() == [[3 * starts + 1] * 6, [3 * starts] * 6]
    assert sum(is_last for _, _, is_last, _ in attacked.claims) == 2 * 6 * starts


def test_random_targets_differ_from_start_to_start(attack_with):
    images, labels = torch.full((1, 3, 4, 4), 0.5), torch.zeros(1, dtype=torch.int64)
    seen = []

    def watched(images):
        seen.append(images.detach().flatten(1)[:, :4].argmax(1).item())
        return fixed(images)

    spec = pgd("linf", 0.1, steps=2, random_start=False, target="random", restarts=30)
    attack_with(spec, Function(watched), images, labels)
    # The second iterate of a start went up for its target alone.
    assert set(seen) >= {1, 2, 3}


@TARGETS
def test_any_wrong_class_breaks_the_image_whatever_the_target(target, trained, attack_with):
    model, images, labels = trained[0], trained[1][:40], trained[2][:40]
    spec = pgd("linf", 0.04, target=target, targets=2)
    attacked = attack_with(spec, model, images, labels)
    with torch.no_grad():
        found = model(attacked.proposals[0]).argmax(1)
    # The least likely class is the hardest to reach, and others are seldom met on the way.
    least = 0.05 if target == "least_likely" else 0.3
    assert torch.equal(attacked.is_broken[0], found != labels) and attacked.is_broken.float().mean() > least
    plain = attack_with(pgd("linf", 0.04), model, images, labels).is_broken
    assert target != "top_k" or attacked.is_broken.sum() >= plain.sum() - 2


def test_a_target_that_the_model_does_not_know_is_refused(trained, attack_with):
    model, images, labels = trained
    with pytest.raises(ConfigError, match="target: expected a class from 0 to 4"):
        attack_with(pgd("linf", 0.1, target=5), model, images[:2], labels[:2])


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_a_warm_start_stretches_where_the_start_before_ended(norm, attack_with):
    seen = []

    def keep(images):
        seen.append(images.detach())
        return FLAT(images)

    image, label = torch.full((1, 3, 4, 4), 0.5), torch.tensor([0])
    for warm_start in (True, False):
        seen.clear()
        attack_with(pgd(norm, 0.1, 0.2, steps=1, restarts=2, warm_start=warm_start), Function(keep), image, label)
        # Of every start the iterate is shown, then its last one to the judge; the clean image was shown before.
        shown = [each - image for each in seen[1:]]
        assert len(shown) == 8
        assert torch.allclose(shown[4], 2 * shown[1], atol=1e-6) == warm_start
        assert not torch.allclose(shown[6], 2 * shown[3], atol=1e-6)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_warm_starts_break_no_fewer_images(norm, trained, attack_with):
    model, images, labels = trained[0], trained[1][:80], trained[2][:80]
    cold, warm = (attack_with(pgd(norm, steps=5, warm_start=warm), model, images, labels) for warm in (False, True))
    assert warm.is_broken.sum() >= cold.is_broken.sum() - 2
    for eps, proposals in zip(LADDERS[norm], warm.proposals, strict=True):
        assert ThreatModel(norm, eps).is_in_ball(images, proposals).all() and is_in_box(proposals).all()


def band(images):
    """On the way to class 1, which is never reached, images are taken for class 2 for a while."""
    grey = images[:, 0, 0, 0]
    return torch.stack([0 * grey + 1, 100 * (grey - 1), 1.02 - 30 * (grey - 0.54).abs()], 1)


def test_another_class_than_the_target_counts_when_it_is_met_on_the_way(attack_with):
    images, labels = torch.full((2, 3, 4, 4), 0.5), torch.zeros(2, dtype=torch.int64)
    spec = pgd("linf", 0.1, target=1, steps=10, step_size_ratio=1.0, random_start=False)
    assert attack_with(spec, Function(band), images, labels).is_broken.all()
