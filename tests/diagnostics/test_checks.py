"""Every check on models built to trip it, and on sound ones that must trip none."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from made_models import Function
from torch import nn

from lrrobust.attacks.build import Attack
from lrrobust.attacks.specs import ApgdSpec, CwSpec, FgsmSpec, FmnSpec, MiFgsmSpec, PgdAdaptiveSpec, PgdSpec, SquareSpec
from lrrobust.diagnostics.late_breaks import check_late_breaks
from lrrobust.diagnostics.outcomes import Outcomes, read_outcomes
from lrrobust.diagnostics.subject import PART

LADDER = tuple(step / 255 for step in (2, 4, 8, 16))
FGSM = FgsmSpec(name="fgsm", kind="fgsm", eps=LADDER)
PGD = PgdSpec(name="pgd", kind="pgd", norm="linf", eps=LADDER, steps=10)
PGD_L2 = PgdSpec(name="pgd_l2", kind="pgd", norm="l2", eps=(0.05, 0.1, 0.2, 0.4), steps=10)
CW = CwSpec(name="cw", kind="cw", eps=(0.05, 0.1, 0.2, 0.4), binary_search_steps=5, steps=30, lr=0.01, initial_c=0.1)
APGD_CE = ApgdSpec(name="apgd_ce", kind="apgd", norm="linf", eps=LADDER, loss="ce", steps=10)
SQUARE = SquareSpec(name="square", kind="square", norm="linf", eps=LADDER[-2:], queries=100)
LONG_SQUARE = SQUARE.model_copy(update={"eps": LADDER, "queries": 1000})
ON_SURVIVORS = LONG_SQUARE.model_copy(update={"survivors_only": True})
#: Cannot even reach the faces of the ball.
WEAK = PgdSpec(name="weak", kind="pgd", norm="linf", eps=LADDER, steps=2, step_size_ratio=0.2, random_start=False)

NAMES = {
    "zero_gradient", "finite_differences", "jumps", "loss_rises", "single_step", "random_noise", "black_box", "late_breaks",
    "convergence", "large_eps", "determinism", "float64",
}  # fmt: skip


def failed(found):
    return {name for (name, _), result in found.items() if result.passed is False}


@pytest.mark.parametrize("model", ["sound_linear", "sound_cnn", "confident_linear"])
def test_sound_attacks_on_sound_models_pass(diagnosed, request, model):
    found = diagnosed(request.getfixturevalue(model), FGSM, PGD, PGD_L2)
    assert {name for name, _ in found} == NAMES
    assert {key: result.detail for key, result in found.items() if result.passed is not True} == {}


def test_a_minimal_norm_attack_on_a_sound_model_passes(diagnosed, sound_linear):
    found = diagnosed(sound_linear, CW)
    assert {key: result.detail for key, result in found.items() if result.passed is not True} == {}
    # It climbs at no budget.
    assert {name for name, _ in found} == NAMES - {"late_breaks"}
    assert "withstand pgd with 50 steps, which stands in for" in found["large_eps", "cw"].detail
    assert "24 clean images and 10 adversarial ones at the boundary, 0 are" in found["float64", None].detail


@pytest.mark.parametrize(
    "spec",
    [
        ApgdSpec(name="aimed", kind="apgd", norm="linf", eps=LADDER, loss="targeted_dlr", targets=4, steps=10),
        PgdSpec(name="aimed", kind="pgd", norm="linf", eps=LADDER, target="least_likely", steps=10),
    ],
    ids=["apgd", "pgd"],
)
def test_an_attack_that_aims_at_classes(diagnosed, sound_linear, spec):
    found = diagnosed(sound_linear, spec)
    # Towards a far class the margin to the nearest may grow.
    assert found["loss_rises", "aimed"].passed is None and not failed(found) & {"zero_gradient", "large_eps"}


def test_a_rounding_layer_under_an_attack_that_aims_at_classes(diagnosed, unsound):
    spec = ApgdSpec(name="aimed", kind="apgd", norm="linf", eps=LADDER, loss="targeted_dlr", targets=4, steps=10)
    assert {"zero_gradient", "random_noise"} <= failed(diagnosed(unsound("rounded"), spec))


def test_a_rounding_layer(diagnosed, unsound):
    found = diagnosed(unsound("rounded"))
    assert failed(found) >= {"zero_gradient", "loss_rises", "random_noise", "black_box", "large_eps"}
    assert "for 24 of 24 images" in found["zero_gradient", "fgsm"].detail
    # What does not depend on gradients is as it should be.
    assert found["determinism", None].passed and found["float64", None].passed


def test_a_rounding_layer_in_l2(diagnosed, unsound):
    assert failed(diagnosed(unsound("rounded"), PGD_L2)) >= {"zero_gradient", "loss_rises", "black_box", "large_eps"}


def test_a_shattered_gradient(diagnosed, unsound):
    found = diagnosed(unsound("shattered"))
    # The gradient is anything but small.
    assert found["zero_gradient", "pgd"].passed
    assert failed(found) >= {"loss_rises", "random_noise", "black_box", "large_eps"}


@pytest.mark.parametrize("specs", [(FGSM, PGD), (PGD,)], ids=["from rows", "on the sample"])
def test_a_gradient_that_only_a_single_step_meets(diagnosed, unsound, specs):
    found = diagnosed(unsound("gradient_on_grid"), *specs)
    assert not found["single_step", "pgd"].passed
    # Seen only where the attack starts: at the clean images there is a gradient.
    assert not found["zero_gradient", "pgd"].passed
    assert found.get(("zero_gradient", "fgsm")) is None or found["zero_gradient", "fgsm"].passed


def test_a_network_distilled_at_a_high_temperature(diagnosed, unsound):
    found = diagnosed(unsound("distilled"), PGD, APGD_CE)
    for attack in ("pgd", "apgd_ce"):
        assert found["zero_gradient", attack].passed is False
        assert "the gradient it follows is zero, or too small to matter, for 2" in found["zero_gradient", attack].detail
        assert {"loss_rises", "black_box", "large_eps"} <= failed(found)


def test_networks_that_vote(diagnosed, unsound):
    found = diagnosed(unsound("voting"), PGD)["loss_rises", "pgd"]
    assert found.passed is False and "do not change along the way, as where networks vote" in found.detail


def test_logits_that_saturate_the_cross_entropy(diagnosed, confident_linear):
    # The logits of the same network: attacks on the cross-entropy follow it where float32 has no softmax left.
    found = diagnosed(confident_linear, FGSM, PGD, APGD_CE)
    assert {key: result.detail for key, result in found.items() if result.passed is not True} == {}
    for attack in ("fgsm", "pgd", "apgd_ce"):
        assert "plain cross-entropy, which it does not use, for 2" in found["zero_gradient", attack].detail


def test_an_attack_that_breaks_images_to_its_last_step(diagnosed, unsound):
    found = diagnosed(unsound("gradient_of_few"), PGD.model_copy(update={"eps": LADDER[-1:]}))
    assert found["late_breaks", "pgd"].passed is False
    assert "pgd had not converged, and more steps or restarts would break more" in found["late_breaks", "pgd"].detail


def test_attacks_that_have_converged_break_few_images_late(evaluated, sound_linear):
    # Where most images are near the boundary.
    ladder = LADDER[1:2]
    specs = (
        PGD, PGD_L2, APGD_CE,
        PGD.model_copy(update={"name": "short", "steps": 5}),
        PGD.model_copy(update={"name": "restarts", "restarts": 2}),
        PGD.model_copy(update={"name": "top_k", "target": "top_k", "targets": 2}),
        APGD_CE.model_copy(update={"name": "apgd_t", "loss": "targeted_dlr", "targets": 2}),
        MiFgsmSpec(name="mi_fgsm", kind="mi_fgsm", norm="linf", eps=ladder, step_size_ratio=2.5),
        PgdAdaptiveSpec(
            name="adaptive", kind="pgd_adaptive", norm="linf", eps=ladder, gradients=("exact", "tempered"), temperature=4.0,
            steps=10,
        ),
    )  # fmt: skip
    specs = [spec if spec.norm == "l2" else spec.model_copy(update={"eps": ladder}) for spec in specs]
    _, run = evaluated(sound_linear, specs)
    _, outcomes = read_outcomes(run.rows, specs)
    found = {one.attack: one for one in check_late_breaks(SimpleNamespace(outcomes=outcomes))}
    assert found.keys() == {spec.name for spec in specs}
    assert {name: one.detail for name, one in found.items() if one.passed is not True} == {}


def test_passes_at_budgets_above_the_one_that_breaks_are_not_late_breaks():
    # As on a GPU, which attacks larger budgets beside smaller ones: all images break at the first step of the smallest.
    n, shape = 100, (2, 100)
    outcomes = Outcomes(
        PGD.model_copy(update={"eps": LADDER[:2]}), LADDER[:2], np.ones(shape, bool), np.ones(shape, bool),
        np.full(n, LADDER[0]), np.ones(n), np.full(shape, np.nan), np.array([[2.0] * n, [PGD.steps] * n]),
    )  # fmt: skip
    (found,) = check_late_breaks(SimpleNamespace(outcomes=[outcomes]))
    assert found.passed and "none of 100 images" in found.detail


@pytest.mark.parametrize("spec", [FGSM, CW, SQUARE], ids=["one step", "minimal norm", "black box"])
def test_a_large_budget_for_attacks_of_any_kind(diagnosed, sound_linear, spec):
    found = diagnosed(sound_linear, spec)
    assert found["large_eps", spec.name].passed and found["float64", None].passed
    assert " 0 adversarial ones" not in found["float64", None].detail


@pytest.mark.parametrize("spec", [FGSM, CW], ids=["one step", "minimal norm"])
def test_a_large_budget_for_attacks_whose_gradients_are_masked(diagnosed, unsound, spec):
    found = diagnosed(unsound("rounded"), spec)["large_eps", spec.name]
    # One part of them is enough to know.
    assert found.passed is False and int(re.search(r" of (\d+) images withstand", found.detail)[1]) <= PART


def test_black_box_attacks_do_without_gradients_at_a_large_budget_too(diagnosed, evaluated, unsound):
    found = diagnosed(unsound("rounded"), SQUARE)["large_eps", "square"]
    assert found.passed and "withstand square with 100 queries" in found.detail
    # Struck are the sample of 24 and what the run left standing. Of these none beyond the sample that is of the class of grey:
    # which class that is, rounding decides, as all logits are zero there.
    _, run = evaluated(unsound("rounded"), (SQUARE,))
    _, (outcomes,) = read_outcomes(run.rows, (SQUARE,))
    fell = int((outcomes.breaking_eps[24:] <= LADDER[-1]).sum())
    struck = re.search(rf" 0 of (\d+) images .*; the other {fell} fell within", found.detail)
    assert struck and 24 < int(struck[1]) <= len(outcomes.breaking_eps) - fell


@pytest.mark.parametrize(
    "specs", [(PGD,), (PGD, LONG_SQUARE), (APGD_CE, ON_SURVIVORS)], ids=["alone", "beside square", "before square"]
)
def test_what_square_breaks_does_not_hide_that_gradients_are_masked(diagnosed, unsound, specs):
    found = diagnosed(unsound("gradient_of_quarter"), *specs)
    of_search = found["black_box", specs[0].name if len(specs) == 1 else None]
    assert of_search.passed is False and "gradients are masked" in of_search.detail
    if len(specs) > 1:
        assert found["black_box", "square"].passed is False
        assert "images that the attacks by gradient left standing" in found["black_box", "square"].detail


@pytest.mark.parametrize("square", [LONG_SQUARE, ON_SURVIVORS], ids=["all images", "survivors"])
def test_square_after_sound_attacks_passes(diagnosed, sound_linear, square):
    found = diagnosed(sound_linear, FGSM, PGD, square)
    assert {key: result.detail for key, result in found.items() if result.passed is not True} == {}
    assert found["black_box", "square"].passed and found["black_box", None].passed


def test_what_was_broken_before_tells_nothing_of_later_attacks(diagnosed, sound_linear):
    # PGD is left little that breaks: that Square broke the rest is no reproach to it.
    found = diagnosed(sound_linear, LONG_SQUARE, PGD.model_copy(update={"survivors_only": True}))
    assert not failed(found) & {"black_box", "random_noise", "convergence", "large_eps"}
    # It is made on them before anything is said.
    assert found["black_box", "square"].passed
    assert " breaks 0 of " in found["black_box", "square"].detail and "were let at" in found["black_box", "square"].detail


@pytest.mark.parametrize(
    "specs",
    [
        (LONG_SQUARE, PGD.model_copy(update={"survivors_only": True})),
        (PGD, LONG_SQUARE, APGD_CE.model_copy(update={"survivors_only": True})),
        (LONG_SQUARE, CW.model_copy(update={"norm": "l2"}), PGD.model_copy(update={"survivors_only": True})),
    ],
    ids=["first", "between", "first, and another norm"],
)
def test_masked_gradients_do_not_pass_where_square_took_the_images_away(diagnosed, unsound, specs):
    found = diagnosed(unsound("gradient_of_quarter"), *specs)["black_box", "square"]
    assert found.passed is False and "that not all of these were let at" in found.detail


def test_square_is_compared_at_budgets_of_its_own(diagnosed, unsound, sound_linear):
    square = LONG_SQUARE.model_copy(update={"eps": tuple(step / 255 for step in (3, 6, 12))})
    found = diagnosed(unsound("gradient_of_quarter"), PGD, square)["black_box", "square"]
    assert found.passed is False and any(f"At eps {step}/255," in found.detail for step in (3, 6, 12))
    # PGD broke most at the next larger budget: at this one it is made anew.
    assert diagnosed(sound_linear, PGD, square)["black_box", "square"].passed


def test_an_attack_without_rows_of_a_budget_does_not_stand_in_the_way(diagnosed, unsound):
    # One step at another budget, and PGD at smaller ones alone, which says nothing of larger ones.
    one_step, near = FGSM.model_copy(update={"eps": (3 / 255,)}), PGD.model_copy(update={"name": "near", "eps": LADDER[:1]})
    found = diagnosed(unsound("gradient_of_quarter"), one_step, PGD, near, LONG_SQUARE)
    assert found["black_box", "square"].passed is False
    found = diagnosed(unsound("gradient_of_quarter"), near, LONG_SQUARE.model_copy(update={"eps": LADDER[1:]}))
    assert found["black_box", "square"].passed is None
    assert "No attack by gradient has a budget as large" in found["black_box", "square"].detail


FAR = tuple(step / 255 for step in (4, 8, 16, 128))


def test_masked_gradients_do_not_pass_where_a_far_budget_breaks_all(diagnosed, unsound):
    square = LONG_SQUARE.model_copy(update={"eps": FAR})
    found = diagnosed(unsound("gradient_of_quarter"), square, PGD.model_copy(update={"eps": FAR, "survivors_only": True}))
    assert found["black_box", "square"].passed is False and "At eps 128/255" not in found["black_box", "square"].detail
    # Nor are others asked where nothing is left to be told of.
    for check in ("black_box", "random_noise"):
        assert "of 0)" not in found[check, None].detail and "of 0 images" not in found[check, None].detail


def test_a_weak_attack_does_not_hide_behind_a_sound_one_at_another_budget(diagnosed, sound_linear):
    weak = WEAK.model_copy(update={"eps": LADDER[1:2], "steps": 5, "step_size_ratio": 0.3})
    square = LONG_SQUARE.model_copy(update={"eps": LADDER[1::2]})
    sound = APGD_CE.model_copy(update={"eps": LADDER[3:], "survivors_only": True})
    found = diagnosed(sound_linear, weak, square, sound)["black_box", "square"]
    assert found.passed is False and "At eps 4/255" in found.detail


@pytest.mark.parametrize("model", ["sound_linear", "sound_cnn"])
def test_what_aims_elsewhere_does_not_stand_in_for_a_sound_attack(diagnosed, request, model):
    aimed = PgdSpec(name="aimed", kind="pgd", norm="linf", eps=LADDER[3:], steps=20, target="least_likely", survivors_only=True)
    found = diagnosed(request.getfixturevalue(model), LONG_SQUARE, PGD.model_copy(update={"survivors_only": True}), aimed)
    assert not failed(found), {key: result.detail for key, result in found.items() if result.passed is False}
    if model == "sound_cnn":
        of_aimed = found["single_step", "aimed"]
        assert of_aimed.passed is None and "aimed aims at one class, which may be far" in of_aimed.detail


def test_noise_may_break_all_that_the_attacks_break_where_that_is_all(diagnosed, sound_linear):
    found = diagnosed(sound_linear, PGD.model_copy(update={"eps": (0.5,)}))["random_noise", "pgd"]
    assert found.passed and "breaks 24 of 24 images" in found.detail


def test_one_step_that_came_later_is_no_reproach(diagnosed, sound_cnn):
    short = PGD.model_copy(update={"eps": LADDER[3:], "steps": 5})
    found = diagnosed(sound_cnn, short, FGSM.model_copy(update={"eps": LADDER[3:], "survivors_only": True}))
    # What PGD broke it was not let at: a step on the sample has its turn.
    assert found["single_step", "pgd"].passed and "one gradient step breaks" in found["single_step", "pgd"].detail


@pytest.mark.parametrize("other", [(), (FGSM.model_copy(update={"name": "far", "eps": (20 / 255,)}),)], ids=["alone", "beside"])
def test_one_step_that_came_first_does_not_hide_that_more_mislead(diagnosed, unsound, other):
    found = diagnosed(unsound("gradient_on_grid"), *other, FGSM, PGD.model_copy(update={"survivors_only": True}))
    assert found["single_step", "pgd"].passed is False


def test_rows_of_any_single_step_are_compared(diagnosed, unsound):
    far = FGSM.model_copy(update={"name": "far", "eps": (20 / 255,)})
    found = diagnosed(unsound("gradient_on_grid"), far, FGSM, PGD)["single_step", "pgd"]
    assert found.passed is False and "the single step of fgsm" in found.detail


def test_one_step_at_a_budget_of_its_own_is_compared_with_the_next_larger_one(diagnosed, unsound, sound_linear):
    one_step = FGSM.model_copy(update={"eps": (3 / 255, 20 / 255)})
    found = diagnosed(unsound("gradient_on_grid"), one_step, PGD)["single_step", "pgd"]
    assert found.passed is False and "At eps 3/255" in found.detail
    assert diagnosed(sound_linear, one_step, PGD)["single_step", "pgd"].passed
    # At none that both reach, a step is taken on the sample.
    found = diagnosed(unsound("gradient_on_grid"), one_step.model_copy(update={"eps": (20 / 255,)}), PGD)["single_step", "pgd"]
    assert found.passed is False and "one gradient step breaks" in found.detail


def test_an_attack_by_gradient_without_a_budget_is_none(diagnosed, sound_linear):
    found = diagnosed(sound_linear, PGD.model_copy(update={"eps": (0.0,)}), LONG_SQUARE)
    assert (
        found["black_box", None].passed is None and "None of the attacks is one by gradients" in found["black_box", None].detail
    )


def test_one_step_is_compared_at_a_budget_that_both_had(diagnosed, sound_linear):
    near, far = PGD.model_copy(update={"eps": LADDER[:1]}), PGD.model_copy(update={"name": "far", "eps": LADDER[2:3]})
    found = diagnosed(sound_linear, near, far)
    assert found["single_step", "pgd"].passed and found["single_step", "far"].passed


def test_black_box_attacks_alone_leave_nothing_to_compare(diagnosed, sound_linear):
    found = diagnosed(sound_linear, LONG_SQUARE)
    assert found["black_box", "square"].passed is None
    assert "None of the attacks is one by gradients" in found["black_box", "square"].detail
    assert not failed(found) & {"random_noise", "large_eps"}


def test_that_pgd_breaks_nothing_more_tells_nothing_where_no_gradient_was_seen_to_lead_anywhere(diagnosed, unsound):
    found = diagnosed(unsound("rounded"), LONG_SQUARE)["convergence", "square"]
    assert found.passed is None and "lead anywhere is not known" in found.detail


def test_thousands_of_queries_may_beat_a_single_step(diagnosed, sound_linear):
    found = diagnosed(sound_linear, FGSM, LONG_SQUARE)
    assert ("black_box", "square") not in found and found["black_box", None].passed


def test_a_stand_in_at_a_large_budget_says_in_which_norm(diagnosed, sound_linear):
    found = diagnosed(sound_linear, FGSM, SQUARE)
    assert found["large_eps", None].passed and found["large_eps", None].norm == "linf"
    assert found["determinism", None].norm is None


@pytest.mark.parametrize(
    "spec",
    [
        PgdSpec(name="a", kind="pgd", norm="l1", eps=(0.2, 0.5, 1, 2, 4), steps=20, sparsity=0.01),
        FmnSpec(name="a", kind="fmn", norm="l1", eps=(0.2, 0.5, 1, 2, 4), steps=30),
        MiFgsmSpec(name="a", kind="mi_fgsm", norm="linf", eps=LADDER),
        PgdAdaptiveSpec(
            name="a", kind="pgd_adaptive", norm="linf", eps=LADDER, gradients=("exact", "tempered"), temperature=4.0, steps=20
        ),
    ],
    ids=lambda spec: f"{spec.kind} {spec.norm}",
)  # fmt: skip
def test_a_large_budget_in_other_norms_and_with_other_attacks(diagnosed, sound_linear, spec):
    sound = diagnosed(sound_linear, spec)["large_eps", "a"]
    assert sound.passed and sound.norm == spec.norm, sound.detail


def test_an_attack_with_too_few_steps(diagnosed, sound_linear):
    found = diagnosed(sound_linear, WEAK)
    assert failed(found) >= {"convergence", "single_step"}
    # Its gradient is sound.
    assert not failed(found) & {"zero_gradient", "loss_rises"}
    assert "they had not converged" in found["convergence", "weak"].detail


def test_a_stochastic_layer(diagnosed, unsound):
    found = diagnosed(unsound("randomised"))
    assert found["determinism", None].passed is False
    assert "attacks that do not average over that (--eot-iter) may overstate" in found["determinism", None].detail
    # Whatever rounding does, chance does more.
    assert found["float64", None].passed is None and "randomised" in found["float64", None].detail


def test_attacks_that_average_over_a_stochastic_layer(diagnosed, unsound):
    averaged = PGD.model_copy(update={"eot_iter": 8})
    found = diagnosed(unsound("randomised"), averaged)
    assert found["determinism", None].passed is None
    assert "attacks average over 8 passes; whether these are enough is not known" in found["determinism", None].detail
    assert diagnosed(unsound("randomised"), averaged, FGSM)["determinism", None].passed is False


def test_own_attacks_average_over_as_many_passes_and_convergence_over_twice_as_many(diagnosed, unsound, monkeypatch):
    struck = []

    def record(spec):
        struck.append((spec.name, spec.eot_iter))
        return Attack(spec)

    monkeypatch.setattr("lrrobust.diagnostics.subject.Attack", record)
    diagnosed(unsound("randomised"), WEAK.model_copy(update={"eot_iter": 3}))
    assert {times for name, times in struck if name.startswith("convergence")} == {6}
    assert {times for name, times in struck if not name.startswith("convergence")} == {3}


def test_a_model_that_is_random_only_where_attacks_go(diagnosed, unsound):
    found = diagnosed(unsound("random_off_grid"))["determinism", None]
    assert found.passed is False and "of 24 images differ by at most 0, with noise on them by" in found.detail


@pytest.mark.parametrize(
    ("model", "what"), [("noise_of_bits", "noise of 1e-06"), ("noise_of_levels", "one value changed by 1/255")]
)
def test_noise_that_is_drawn_from_the_image(diagnosed, unsound, model, what):
    found = diagnosed(unsound(model), FGSM)["determinism", None]
    assert found.passed is False and "differ by at most 0, with noise on them by at most 0, but by" in found.detail
    assert f"with {what}, as with noise of 2/255 on all: randomness drawn from the image" in found.detail


@pytest.mark.parametrize("model", ["rounded", "rounded_coarsely"])
def test_rounded_images_are_not_random(diagnosed, unsound, model):
    assert diagnosed(unsound(model), FGSM)["determinism", None].passed


@pytest.mark.parametrize("specs", [(FGSM, PGD), (CW,)], ids=["within a budget", "minimal norm"])
def test_logits_lost_to_rounding(diagnosed, unsound, specs):
    found = diagnosed(unsound("cancelling"), *specs)
    assert not found["float64", None].passed
    assert found["determinism", None].passed


def test_half_precision_moves_boundaries_by_too_little_to_matter(diagnosed, sound_cnn):
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = sound_cnn

        def forward(self, images):
            with torch.autocast("cpu", torch.bfloat16):
                return self.network(images).float()

    found = diagnosed(Half().eval(), PGD)["float64", None]
    assert found.passed and "more are, by less than 10 % of the median clean margin" in found.detail, found.detail


def test_rounding_at_the_boundary_is_not_known_where_none_comes_to_it(diagnosed, sound_linear):
    found = diagnosed(sound_linear, PGD.model_copy(update={"eps": (1e-6,)}))
    assert found["float64", None].passed is None
    assert "No attack came to the boundary" in found["float64", None].detail


def test_a_model_that_cannot_be_cast_is_no_failure(diagnosed, sound_linear):
    def refuse(module, inputs):
        if inputs[0].dtype != sound_linear[1].bias.dtype or str(inputs[0].dtype) == "torch.float64":
            raise RuntimeError("float32 only")

    sound_linear.register_forward_pre_hook(refuse)
    found = diagnosed(sound_linear, FGSM)
    assert found["float64", None].passed is None
    assert "float32 only" in found["float64", None].detail


def test_small_logits_make_attacks_on_the_cross_entropy_look_strong(diagnosed):
    found = diagnosed(nn.Sequential(build_wide(), Function(lambda logits: logits / 300)), PGD)
    result = found["convergence", "pgd"] if ("convergence", "pgd") in found else found["convergence", None]
    assert result.passed is False and "as the cross-entropy of small logits does" in result.detail
    # The same network with the logits that training would leave.
    assert "convergence" not in failed(diagnosed(build_wide(), PGD))


def build_wide():
    """Linear, five classes, two pairs of which are near each other: the nearest lies elsewhere than the mean."""
    generator = torch.Generator().manual_seed(2)
    layer = nn.Linear(192, 5)
    with torch.no_grad():
        weight = torch.randn(5, 192, generator=generator)
        weight[1] = weight[0] + 0.3 * torch.randn(192, generator=generator)
        weight[3] = weight[2] + 0.3 * torch.randn(192, generator=generator)
        layer.weight.copy_(4 * weight)
        layer.bias.copy_(-0.5 * layer.weight.sum(1))
    return nn.Sequential(nn.Flatten(), layer).eval()


class Bright(nn.Module):
    """By the mean, of two classes and three that no image is of: a dark image of grey's class stays dark at 1/2."""

    def forward(self, images):
        mean = images.flatten(1).mean(1) - 0.75
        return 10 * torch.stack([-mean, mean, *[torch.full_like(mean, -1)] * 3], 1)


@pytest.mark.parametrize("has_bright", [True, False])
def test_images_of_the_class_of_grey_may_withstand_where_all_can_be_grey(diagnosed, images, has_bright):
    bright = torch.rand(len(images), generator=torch.Generator().manual_seed(0)) < (0.5 if has_bright else 0)
    images.mul_(0.2).add_(0.8 * bright.view(-1, 1, 1, 1))
    found = diagnosed(Bright().eval(), PGD)
    assert found["large_eps", "pgd"].passed is (True if has_bright else None)
    assert "that are of the class of grey and may be robust" in found["large_eps", "pgd"].detail


class RoundingMost(nn.Module):
    """Rounds images of all classes but one, as a linear classifier takes them."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, images):
        is_first = (self.linear(images).argmax(1) == 0)[:, None, None, None]
        return self.linear(torch.where(is_first, images, (images * 48).round() / 48))


def sort_by_class(images, model):
    """As folders of classes have them."""
    images.copy_(images[model(images).argmax(1).argsort(stable=True)])


def test_images_sorted_by_class_may_begin_with_the_class_of_grey(diagnosed, images):
    images.mul_(0.2)[60:].add_(0.8)
    assert diagnosed(Bright().eval(), PGD)["large_eps", "pgd"].passed


def test_a_rounding_layer_for_all_classes_but_the_first(diagnosed, images, sound_linear):
    sort_by_class(images, sound_linear)
    found = diagnosed(RoundingMost(sound_linear).eval(), PGD)
    assert {"zero_gradient", "loss_rises", "black_box", "large_eps"} <= failed(found)
