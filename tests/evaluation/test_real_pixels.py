"""Adversarial images in 8 bits, on linear models where every grey level counts."""

import math

import numpy as np
import pytest
import torch

from lrrobust.attacks.specs import CwSpec, FgsmSpec, PgdSpec
from lrrobust.results import load_adversarial
from lrrobust.threat import distance

LADDER = tuple(steps / 255 for steps in (0.5, 1, 1.5, 2, 3, 4.9))
FGSM = FgsmSpec(name="fgsm", kind="fgsm", eps=LADDER)
PGD_L2 = PgdSpec(name="pgd_l2", kind="pgd", norm="l2", eps=(0.05, 0.1, 0.2, 0.4), steps=8)
CW = CwSpec(name="cw", kind="cw", eps=(0.05, 0.1, 0.2, 0.4), binary_search_steps=4, steps=30, lr=0.005, initial_c=1.0)


@pytest.fixture
def problem(linear_problem):
    """Images of 8 bits, up to some grey levels away from the boundary."""
    problem = linear_problem(14, 2)
    images = (255 * (0.5 + 8 * (problem.images - 0.5)).clamp(0.1, 0.9)).round() / 255
    with torch.no_grad():
        labels = problem.model(images).argmax(1)
    return type(problem)(problem.model, problem.weight, images, labels)


def at(rows, eps):
    return rows[rows.eps == eps].sort_values("index")


def test_an_image_breaks_in_8_bits_where_whole_grey_levels_suffice(evaluated, problem):
    rows = evaluated(*problem, [FGSM], real_pixels="judged").rows
    nearest = 255 * problem.nearest("linf").numpy()
    is_late = 0
    for eps in LADDER:
        found = at(rows, eps)
        # The step of each value, rounded inside the ball, is the whole part of eps.
        steps = math.floor(255 * eps + 1e-9)
        is_broken = found.is_broken_quantized.fillna(False).to_numpy(bool)
        assert is_broken[nearest < steps - 1e-3].all()
        assert not is_broken[nearest > steps + 1e-3].any()
        in_floats = found.is_broken.to_numpy(bool)
        assert in_floats[nearest < 255 * eps - 1e-3].all() and not (is_broken & ~in_floats).any()
        is_late += (in_floats & ~is_broken).sum()
    assert is_late > 3 and 0.1 < rows.is_broken_quantized.fillna(False).mean() < 0.9
    has_image = rows.linf_distance.notna()
    assert (rows.is_broken_quantized.notna() == has_image).all()


def test_it_is_asked_for_or_unknown(evaluated, problem):
    rows = evaluated(*problem, [FGSM]).rows
    assert rows.is_broken_quantized.isna().all() and rows.is_broken.any()


@pytest.mark.parametrize("spec", [FGSM, PGD_L2, CW], ids=lambda spec: spec.name)
def test_saved_images_are_what_the_rows_say(evaluated, problem, spec):
    run = evaluated(*problem, [spec], real_pixels="saved")
    saved = [image for _, images in load_adversarial(run) for image in images]
    broken = run.rows[run.rows.is_broken_quantized.fillna(False).astype(bool)]
    assert {image.index for image in saved} == set(broken["index"]) and len(saved) > 3
    for image in saved:
        pair = np.stack([image.clean, image.adversarial])
        clean, found = (torch.from_numpy(pair).permute(0, 3, 1, 2).float() / 255).split(1)
        assert torch.equal(clean[0], problem.images[image.index // 10])
        assert problem.model(found).argmax().item() == image.prediction != image.label
        for norm in ("linf", "l2", "l1"):
            assert distance(clean, found, norm).item() == getattr(image, f"{norm}_distance")
        assert getattr(image, f"{spec.norm}_distance") <= image.eps + 1e-6
        assert broken[broken["index"] == image.index].eps.min() == image.eps


def test_later_attacks_leave_out_what_is_broken_in_8_bits(evaluated, problem):
    eager = FGSM.model_copy(update={"name": "again", "survivors_only": True})
    rows = evaluated(*problem, [FGSM, eager], real_pixels="judged").rows
    first, second = (rows[rows.attack == name].sort_values(["eps", "index"]) for name in ("fgsm", "again"))
    is_broken = first.is_broken_quantized.fillna(False).to_numpy(bool)
    assert second.outcome[is_broken].isin(["broken_by_earlier_attack", "broken_at_smaller_eps"]).all()
    in_8_bits = second.is_broken_quantized.fillna(False).to_numpy(bool)
    in_8_bits |= (second.outcome == "broken_by_earlier_attack").to_numpy(bool)
    np.testing.assert_array_equal(in_8_bits, is_broken)
    assert (second[is_broken].forward_passes == 0).all() and (second[~is_broken].forward_passes == 1).all()


def test_resumed_parts_hold_the_same(evaluated, problem):
    eager = PGD_L2.model_copy(update={"survivors_only": True})
    specs = [FGSM, PGD_L2, eager.model_copy(update={"name": "again", "steps": 4})]
    whole = evaluated(*problem, specs, real_pixels="saved", name="whole")

    def stop(task, is_new):
        if is_new and (task.chunk.start, task.spec.name) == (5, "pgd_l2"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluated(*problem, specs, real_pixels="saved", name="parts", on_task=stop)
    again = evaluated(*problem, specs, real_pixels="saved", name="parts")
    assert again.rows.drop(columns="wall_s").equals(whole.rows.drop(columns="wall_s"))
    ours, theirs = (
        [image.adversarial.tobytes() for _, images in load_adversarial(run) for image in images] for run in (whole, again)
    )
    assert ours == theirs and ours
