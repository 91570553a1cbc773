"""Whole runs: resumed, repeated, cut differently, and with models that misbehave."""

import functools

import numpy as np
import pytest
import torch
from linear_attacks import CW, FGSM, LADDER, PGD, PGD_L2
from made_models import Function, detached
from torch import nn

from lrrobust.attacks import build
from lrrobust.attacks.pgd import pgd
from lrrobust.attacks.specs import PgdSpec, SquareSpec
from lrrobust.errors import ModelError
from lrrobust.results import load_run

PLAIN = PgdSpec(
    name="plain",
    kind="pgd",
    norm="linf",
    eps=(1 / 255, 2 / 255, 4 / 255, 8 / 255),
    steps=10,
    step_size_ratio=2.5,
    random_start=False,
)


def test_a_resumed_run_knows_what_was_broken_before(problem, tmp_path, run, images):
    specs = [FGSM, PGD.model_copy(update={"survivors_only": True})]
    whole = run(problem.model, 3, images, specs, tmp_path / "run")
    assert (whole.outcome == "broken_by_earlier_attack").any()
    for lost in ("pgd", "fgsm"):
        for part in (tmp_path / "run" / "parts").glob(f"{lost}-*"):
            part.unlink()
        assert drop_timings(run(problem.model, 3, images, specs, tmp_path / "run")).equals(drop_timings(whole))


def drop_timings(rows):
    return rows.drop(columns="wall_s").reset_index(drop=True)


def test_resumed_run_equals_uninterrupted_one(problem, tmp_path, run, images):
    specs = [FGSM, PGD, PGD_L2, CW]
    whole = run(problem.model, 3, images, specs, tmp_path / "whole")
    done = []

    def stop_after(count):
        def on_task(task, is_new):
            done.append((task.part, is_new))
            if sum(new for _, new in done) == count:
                raise KeyboardInterrupt

        return on_task

    for count in (1, 5):
        done.clear()
        with pytest.raises(KeyboardInterrupt):
            run(problem.model, 3, images, specs, tmp_path / "parts", on_task=stop_after(count))
    images.loaded.clear()
    done.clear()
    resumed = run(problem.model, 3, images, specs, tmp_path / "parts", on_task=lambda t, new: done.append((t.part, new)))
    assert [new for _, new in done].count(False) == 6
    assert images.loaded.count(0) == 1, "the first chunk is read once more, to see that the model is the same"
    assert drop_timings(resumed).equals(drop_timings(whole))


@pytest.mark.parametrize("spec", [PGD, PGD_L2], ids=lambda spec: spec.name)
def test_chunks_and_batches_change_nothing_but_rounding(problem, tmp_path, spec, run, in_memory):
    images = in_memory(problem.images.double(), problem.labels)
    problem.model.double()
    reference = None
    for chunk_size, batch_size in ((12, 12), (5, 3), (1, 1)):
        folder = tmp_path / f"{chunk_size}-{batch_size}"
        rows = run(problem.model, 3, images, [spec], folder, chunk_size, batch_size=batch_size)
        rows = drop_timings(rows.sort_values(["index", "eps"]))
        reference = rows if reference is None else reference
        exact = ["index", "eps", "outcome", "forward_passes", "adversarial_prediction"]
        assert rows[exact].equals(reference[exact])
        for column in ("linf_distance", "l2_distance", "adversarial_margin"):
            np.testing.assert_allclose(rows[column].to_numpy(float), reference[column].to_numpy(float), rtol=1e-9, atol=1e-12)
    assert {"broken", "robust"} <= set(reference.outcome)


@pytest.mark.parametrize(
    "spec, real_pixels, is_double",
    [
        (PGD, None, True),
        (PGD_L2, None, True),
        (PGD.model_copy(update={"eps": (1.3 / 255, 2 / 255, 3.7 / 255, 6 / 255)}), "judged", True),
        (PGD_L2.model_copy(update={"eps": (0.05, 0.1, 0.2, 0.4)}), "judged", True),
        # In float32 an iterate of a larger budget comes to lie one rounding beyond a smaller budget.
        (PLAIN, None, False),
        (PLAIN, "judged", False),
    ],
)
def test_larger_budgets_ahead_take_nothing_from_smaller_ones(
    spec, real_pixels, is_double, linear_problem, tmp_path, monkeypatch, run, in_memory
):
    problem = linear_problem(40, 3)
    precision = torch.float64 if is_double else torch.float32
    pixels, labels = problem.images.to(precision), problem.labels
    problem.model.to(precision)
    if spec.eps[-1] > LADDER[-1] and spec is not PGD_L2:  # images of 8 bits, some grey levels away from the boundary
        pixels = (255 * (0.5 + 8 * (pixels - 0.5)).clamp(0.1, 0.9)).round() / 255
        labels = problem.model(pixels).argmax(1)
    images = in_memory(pixels, labels)
    found = []
    for ahead in (False, True):
        monkeypatch.setitem(build._RUNNERS, PgdSpec, build._with_settings(functools.partial(pgd, ahead=ahead)))
        folder = tmp_path / str(ahead)
        rows = run(problem.model, 3, images, [spec], folder, chunk_size=40, batch_size=200, real_pixels=real_pixels)
        found.append(rows.sort_values(["index", "eps"]))
    same = ["index", "eps", "is_broken", "outcome", "is_broken_quantized"]
    assert found[0][same].equals(found[1][same])
    assert {"broken", "broken_at_smaller_eps", "robust"} <= set(found[0].outcome)
    if real_pixels is not None:
        assert 0 < found[0].is_broken_quantized.sum() < found[0].is_broken.sum() + (spec is PLAIN)
    stands = found[0].outcome == "robust"
    np.testing.assert_allclose(
        found[0][stands].adversarial_margin, found[1][stands].adversarial_margin, rtol=1e-9 if is_double else 1e-3
    )
    assert (found[1][stands].adversarial_margin > 0).all()


@pytest.mark.parametrize("is_complete", [True, False])
def test_resuming_with_another_model_is_refused(problem, tmp_path, is_complete, run, images):
    run(problem.model, 3, images, [FGSM], tmp_path / "run")
    if not is_complete:
        next((tmp_path / "run" / "parts").glob("*-000005-*")).unlink()
    with pytest.raises(ModelError, match="holds results of another model"):
        # The same parameters, other code.
        run(nn.Sequential(Function(lambda images: images * 0.9), problem.model).eval(), 3, images, [FGSM], tmp_path / "run")


def test_one_image_with_other_logits_is_another_model(problem, tmp_path, run, images):
    run(problem.model, 3, images, [FGSM], tmp_path / "run")
    first = problem.images[0]

    def other_on_one(images):
        """Leads on the first image alone are larger."""
        is_first = (images - first.to(images)).abs().flatten(1).amax(1) < 1e-6
        return problem.model(images) * torch.where(is_first, 1.5, 1.0)[:, None]

    other = Function(other_on_one)
    other.model = problem.model  # the same parameters
    with pytest.raises(ModelError, match="holds results of another model"):
        run(other.eval(), 3, images, [FGSM], tmp_path / "run")


@torch.no_grad()
def clamp(images):
    return images.clamp_(0.5, 0.6)


def darken_unseen(images):
    """Neither autograd nor the tensor's version hears of it."""
    images.data.mul_(0.5)
    return images


def have_no_room(images):
    raise torch.OutOfMemoryError("tried to allocate 40 GiB")


@pytest.mark.parametrize(
    ("before", "behind", "message"),
    [
        (None, nn.BatchNorm1d(3, track_running_stats=False), "depend on the other images of the batch"),
        (torch.Tensor.detach, None, "carry no gradient"),
        (clamp, None, "changes the images it is given.*let forward work on a copy"),
        (darken_unseen, None, "changes the images it is given"),
        (have_no_room, None, "out of memory on cpu with a single image: use smaller images, or another device"),
    ],
)
def test_models_that_cannot_be_judged_are_refused(problem, tmp_path, before, behind, message, run, images):
    model = nn.Sequential(Function(before) if before else nn.Identity(), problem.model, behind or nn.Identity())
    with pytest.raises(ModelError, match=message):
        run(model.eval(), 3, images, [FGSM], tmp_path / "run", batch_size=5)


def test_attacks_by_answers_alone_need_no_gradient(problem, tmp_path, run, images):
    square = SquareSpec(name="square", kind="square", norm="linf", eps=(0.0005, 0.002), queries=20)
    whole = run(problem.model, 3, images, [square], tmp_path / "whole")
    blind = run(detached(problem.model).eval(), 3, images, [square], tmp_path / "blind")
    assert drop_timings(blind).equals(drop_timings(whole)) and 0 < whole.is_broken.mean() < 1
    with pytest.raises(ModelError, match="--suite blackbox attacks by answers alone"):
        run(detached(problem.model).eval(), 3, images, [square, FGSM], tmp_path / "both")


def test_a_damaged_part_is_computed_again(problem, tmp_path, run, images):
    whole = run(problem.model, 3, images, [PGD], tmp_path / "run")
    part = sorted((tmp_path / "run" / "parts").glob("*.parquet"))[1]
    part.write_bytes(part.read_bytes()[:-20])
    again = run(problem.model, 3, images, [PGD], tmp_path / "run")
    assert drop_timings(again).equals(drop_timings(whole))


def test_random_state_of_the_caller_is_untouched_and_irrelevant(problem, tmp_path, run, images):
    torch.manual_seed(1)
    first = run(problem.model, 3, images, [PGD], tmp_path / "a")
    drawn = torch.rand(3)
    torch.manual_seed(2)
    torch.rand(1)
    second = run(problem.model, 3, images, [PGD], tmp_path / "b")
    assert drop_timings(first).equals(drop_timings(second))
    torch.manual_seed(1)
    torch.testing.assert_close(drawn, torch.rand(3), atol=0, rtol=0)


def test_nan_logits_stop_the_run_and_keep_what_was_done(problem, tmp_path, attack_is, run, images):
    calls = []

    def attack(model, batch, labels):
        calls.append(len(batch))
        return batch if len(calls) == 1 else torch.ones_like(batch)

    def nan_away(images):
        """Sound on images of mean near one half, NaN elsewhere: as networks that overflow are."""
        return torch.where((images.amax((1, 2, 3)) > 0.9).view(-1, 1), torch.nan, problem.model(images))

    attack_is(attack)
    spec = PgdSpec(name="pgd", kind="pgd", norm="linf", eps=(1.0,), steps=1)
    with pytest.raises(ModelError, match=r"NaN or infinite logits for 5 of 5 images, the first is class/5.png"):
        run(Function(nan_away).eval(), 3, images, [spec], tmp_path / "run")
    assert len(list((tmp_path / "run" / "parts").glob("*.parquet"))) == 1


def fail(images):
    raise RuntimeError("mat1 and mat2\nshapes cannot be multiplied")


@pytest.mark.parametrize(
    ("model", "num_classes", "message"),
    [
        (Function(fail), 3, "fails on images of shape .* RuntimeError: mat1 and mat2 shapes"),
        (nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), 3, r"\(4, 4\).*expected logits of shape \(4, 3\)"),
        (nn.Identity(), 3, "expected logits"),
    ],
)
def test_what_is_no_classifier_is_refused_in_one_line(problem, tmp_path, model, num_classes, message, run, images):
    with pytest.raises(ModelError, match=message) as caught:
        run(model, num_classes, images, [FGSM], tmp_path / "run")
    assert "\n" not in str(caught.value)


def test_a_randomised_model_is_said_aloud(problem, tmp_path, caplog, run, images):
    noisy = nn.Sequential(problem.model, Function(lambda logits: logits + torch.randn(len(logits), 3)))
    run(noisy.eval(), 3, images, [FGSM], tmp_path / "run")
    assert "the model is randomised" in caplog.text
    assert all("randomised" in part for part in load_run(tmp_path / "run").part_metadata.values())


def test_the_model_is_given_back_as_it_was(problem, tmp_path, run, images):
    model = nn.Sequential(problem.model, nn.BatchNorm1d(3)).train()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    run(model, 3, images, [FGSM, PGD], tmp_path / "run")
    assert model.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    for key, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[key], atol=0, rtol=0)
