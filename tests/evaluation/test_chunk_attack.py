"""What attacks do on models whose nearest adversarial images are known, and attacks that misbehave."""

import math

import numpy as np
import pytest
import torch
from linear_attacks import CW, FGSM, L2_LADDER, LADDER, PGD, PGD_L2, rows_of
from torch import nn

from lrrobust.attacks.build import Attack, Effort
from lrrobust.attacks.specs import PgdSpec
from lrrobust.evaluation import chunk_attack
from lrrobust.evaluation.tasks import plan_tasks


@pytest.mark.parametrize("spec", [FGSM, PGD, PGD_L2, CW], ids=lambda spec: spec.name)
def test_linear_model_breaks_exactly_where_its_margin_says(linear_problem, tmp_path, spec, run, in_memory):
    # Two classes: with more, the gradient of the cross-entropy does not point to the nearest one.
    problem = linear_problem(12, 2)
    rows = run(problem.model, 2, in_memory(problem.images, problem.labels), [spec], tmp_path / "run")
    nearest = problem.nearest(spec.norm).numpy()
    is_judged = 0
    for eps in spec.eps:
        is_broken = rows_of(rows, spec.name, eps).is_broken.to_numpy(dtype=bool)
        assert is_broken[nearest < 0.95 * eps].all()
        assert not is_broken[nearest > eps * (1 + 1e-3)].any()
        is_judged += (nearest < 0.95 * eps).sum() + (nearest > 1.001 * eps).sum()
    assert is_judged > 20
    assert 0 < rows.is_broken.mean() < 1


def test_what_an_attack_can_come_to_is_told_before(problem, tmp_path, run, in_memory):
    labels = problem.labels.clone()
    labels[:2] = (labels[:2] + 1) % 3
    images = in_memory(problem.images, labels)
    specs, shares = [FGSM, PGD.model_copy(update={"survivors_only": True})], []
    rows = run(problem.model, 3, images, specs, tmp_path / "run", chunk_size=12, on_begin=lambda _, share: shares.append(share))
    # Whom fgsm attacked: all that are correct when clean; and pgd: these where they stood.
    broken = rows[rows.attack == "fgsm"].is_broken
    assert 2 / 12 < broken.mean() < 1
    assert shares == pytest.approx([10 / 12, 1 - broken.mean()])


def test_survivors_alone_are_attacked_again(problem, tmp_path, run, images):
    weak = FGSM.model_copy(update={"eps": LADDER[1::2]})
    strong = PGD.model_copy(update={"survivors_only": True})
    alone = run(problem.model, 3, images, [weak, PGD], tmp_path / "alone")
    rows = run(problem.model, 3, images, [weak, strong], tmp_path / "after")
    assert rows[rows.attack == "fgsm"].is_broken.sum() == alone[alone.attack == "fgsm"].is_broken.sum() > 0
    # The worst case of both is the same, and what fgsm broke within an eps was not attacked there.
    distance = rows[rows.attack == "fgsm"].groupby("index").linf_distance.min().astype(float).fillna(math.inf)
    spent = 0
    for eps in LADDER:
        now, before = rows_of(rows, "pgd", eps), rows_of(alone, "pgd", eps)
        assert (now.is_broken.to_numpy() == before.is_broken.to_numpy()).all()
        left_out = now[now.outcome == "broken_by_earlier_attack"]
        assert left_out.empty or left_out.is_broken.all()
        assert (distance[left_out["index"]] <= eps + 1e-6).all()
        assert left_out.forward_passes.sum() == left_out.backward_passes.sum() == 0
        assert left_out.linf_distance.isna().all() and left_out.adversarial_prediction.isna().all()
        spent += now.forward_passes.sum()
    assert spent < alone[alone.attack == "pgd"].forward_passes.sum()
    assert (rows.outcome == "broken_by_earlier_attack").any()


def test_an_attack_in_another_norm_leaves_nobody_out(problem, tmp_path, run, images):
    last = PGD_L2.model_copy(update={"survivors_only": True})
    rows = run(problem.model, 3, images, [PGD, last], tmp_path / "run")
    assert rows[rows.attack == "pgd"].is_broken.any()
    assert not (rows.outcome == "broken_by_earlier_attack").any()


def test_minimal_norms_of_survivors(problem, tmp_path, run, images):
    cw = CW.model_copy(update={"survivors_only": True, "eps": L2_LADDER[2:]})
    rows = run(problem.model, 3, images, [PGD_L2, cw], tmp_path / "run")
    found = rows[(rows.attack == "pgd_l2") & rows.is_broken].groupby("index").eps.min()
    beaten = set(found[found <= cw.eps[0]].index)
    assert 0 < len(beaten) < len(images)
    unbounded = rows_of(rows, "cw", math.inf)
    assert set(unbounded[unbounded.outcome == "broken_by_earlier_attack"]["index"]) == beaten
    assert ((unbounded.forward_passes == 0) == unbounded["index"].isin(beaten)).all()


def test_forward_passes_and_time_are_those_of_the_attack(problem, tmp_path, run, images):
    forwarded = []
    rows = run(
        problem.model,
        3,
        images,
        [PGD],
        tmp_path / "run",
        on_forward=forwarded.append,
    )
    assert rows.forward_passes.sum() == sum(forwarded) <= sum(task.cost for task in plan_tasks([PGD], 12, 5))
    assert max(forwarded) == 3
    assert ((rows.wall_s > 0) == (rows.forward_passes > 0)).all()
    assert (rows[rows.outcome == "robust"].forward_passes == PGD.steps).all()


def one_eps(eps):
    return PgdSpec(name="pgd", kind="pgd", norm="linf", eps=(eps,), steps=1)


def test_survivors_whose_nearest_image_is_not_found_stay_robust_without_a_budget(problem, tmp_path, attack_is, run, images):
    attack_is(lambda model, images, labels: images)
    cw = CW.model_copy(update={"survivors_only": True})
    rows = run(problem.model, 3, images, [PGD_L2, cw], tmp_path / "run")
    assert not rows.is_broken.any() and set(rows.outcome) == {"robust"}


def test_an_attack_that_leaves_the_ball_is_rejected_not_believed(problem, tmp_path, attack_is, run, images):
    attack_is(lambda model, images, labels: 1 - images)
    flipped_labels = problem.model(1 - problem.images).argmax(1)
    rows = run(problem.model, 3, images, [one_eps(0.001)], tmp_path / "run")
    assert not rows.is_broken.any()
    is_flipped = (flipped_labels != problem.labels).numpy()
    assert is_flipped.any()
    np.testing.assert_array_equal((rows.sort_values("index").outcome == "rejected").to_numpy(), is_flipped)


def test_what_was_broken_once_stays_broken_whatever_is_claimed_later(problem, tmp_path, monkeypatch, run, images):
    class Forgetful(Attack):
        def __call__(self, model, images, labels, *, claim, **_):
            with torch.enable_grad():
                leaf = images.clone().requires_grad_()
                gradient = torch.autograd.grad(nn.functional.cross_entropy(model(leaf), labels), leaf)[0]
            rows, eps = list(range(len(images))), list(self.ladder) * len(images)
            for length, is_last in ((0.04, False), (0.05, False), (0.0, True)):
                assert all(claim(rows, images + length * gradient.sign(), eps, [is_last] * len(rows)))
            passes = torch.ones(1, len(images), dtype=torch.int64)
            return Effort(passes, passes, 0)

    monkeypatch.setattr(chunk_attack, "Attack", Forgetful)
    rows = run(problem.model, 3, images, [one_eps(0.05)], tmp_path / "run")
    assert rows.is_broken.all() and (rows.adversarial_prediction != rows.label).all()
    np.testing.assert_allclose(rows.linf_distance.to_numpy(dtype=float), 0.04, atol=1e-6)


@pytest.mark.parametrize("pixel", [float("nan"), float("inf")])
def test_an_attack_that_proposes_no_numbers_breaks_nothing(problem, tmp_path, attack_is, pixel, run, images):
    attack_is(lambda model, images, labels: torch.full_like(images, pixel))
    rows = run(problem.model, 3, images, [one_eps(0.5)], tmp_path / "run")
    assert not rows.is_broken.any()
    assert (rows.outcome == "rejected").all()
