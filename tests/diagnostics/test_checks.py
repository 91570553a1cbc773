"""Every check on models built to trip it, and on sound ones that must trip none."""

import pytest

from lrrobust.attacks.specs import ApgdSpec, CwSpec, FgsmSpec, PgdSpec

LADDER = tuple(step / 255 for step in (2, 4, 8, 16))
FGSM = FgsmSpec(name="fgsm", kind="fgsm", eps=LADDER)
PGD = PgdSpec(name="pgd", kind="pgd", norm="linf", eps=LADDER, steps=10)
PGD_L2 = PgdSpec(name="pgd_l2", kind="pgd", norm="l2", eps=(0.05, 0.1, 0.2, 0.4), steps=10)
CW = CwSpec(name="cw", kind="cw", eps=(0.05, 0.1, 0.2, 0.4), binary_search_steps=5, steps=30, lr=0.01, initial_c=0.1)
#: Cannot even reach the faces of the ball.
WEAK = PgdSpec(name="weak", kind="pgd", norm="linf", eps=LADDER, steps=2, step_size_ratio=0.2, random_start=False)

NAMES = {
    "zero_gradient", "loss_rises", "single_step", "random_noise", "black_box", "convergence", "large_eps", "determinism",
    "float64",
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
    assert {("zero_gradient", "cw"), ("convergence", "cw"), ("black_box", "cw")} <= found.keys()
    # It has no budget to enlarge.
    assert "large_eps" not in {name for name, _ in found}


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


def test_logits_that_saturate_the_cross_entropy(diagnosed, confident_linear, monkeypatch):
    found = diagnosed(confident_linear)
    for attack in ("fgsm", "pgd"):
        assert found["zero_gradient", attack].passed
        assert "cross-entropy, which it does not use, for 2" in found["zero_gradient", attack].detail


def test_an_attack_that_does_use_the_cross_entropy(diagnosed, confident_linear, sound_linear, monkeypatch):
    monkeypatch.setattr("lrrobust.diagnostics.zero_gradient.loss_of", lambda spec: "cross_entropy")
    assert diagnosed(confident_linear, FGSM)["zero_gradient", "fgsm"].passed is False


def test_an_attack_with_too_few_steps(diagnosed, sound_linear):
    found = diagnosed(sound_linear, WEAK)
    assert failed(found) >= {"convergence", "single_step"}
    # Its gradient is sound.
    assert not failed(found) & {"zero_gradient", "loss_rises"}
    assert "they had not converged" in found["convergence", "weak"].detail


def test_a_stochastic_layer(diagnosed, unsound):
    found = diagnosed(unsound("randomised"))
    assert not found["determinism", None].passed
    assert "randomised" in found["determinism", None].detail


def test_logits_lost_to_rounding(diagnosed, unsound):
    found = diagnosed(unsound("cancelling"))
    assert not found["float64", None].passed
    assert found["determinism", None].passed


def test_a_model_that_cannot_be_cast_is_no_failure(diagnosed, sound_linear):
    def refuse(module, inputs):
        if inputs[0].dtype != sound_linear[1].bias.dtype or str(inputs[0].dtype) == "torch.float64":
            raise RuntimeError("float32 only")

    sound_linear.register_forward_pre_hook(refuse)
    found = diagnosed(sound_linear, FGSM)
    assert found["float64", None].passed is None
    assert "float32 only" in found["float64", None].detail
