"""Images made on one linear model and judged on another: where they break it is known in closed form."""

import pytest
import torch
from made_models import detached
from torch import nn

from lrrobust.attacks.specs import CwSpec, FgsmSpec, PgdSpec
from lrrobust.errors import ModelError
from lrrobust.evaluation.chunk_attack import Surrogate

LADDER = (1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3, 3.2e-3, 6.4e-3)
FGSM = FgsmSpec(name="fgsm", kind="fgsm", eps=LADDER)
PGD = PgdSpec(name="pgd", kind="pgd", norm="linf", eps=LADDER, steps=8)
PGD_L2 = PgdSpec(name="pgd_l2", kind="pgd", norm="l2", eps=tuple(10 * eps for eps in LADDER), steps=8, random_start=False)


@pytest.fixture
def target(linear_problem):
    return linear_problem(12, 2)


@pytest.fixture
def surrogate(target):
    """Half the target, half noise: its gradients lead across the target's boundary, but not the shortest way."""
    generator = torch.Generator().manual_seed(5)
    layer = nn.Linear(target.weight.shape[1], 2)
    with torch.no_grad():
        layer.weight.copy_(target.weight + target.weight.std() * torch.randn(target.weight.shape, generator=generator))
        layer.bias.copy_(-0.5 * layer.weight.sum(1))
    return nn.Sequential(nn.Flatten(), layer).eval()


def transfer_distance(target, surrogate, norm):
    """How far an image must go along the surrogate's gradient to leave its class in the target, (N,)."""
    weight = surrogate[1].weight.detach().double()
    own, other = target.labels, 1 - target.labels
    direction = weight[other] - weight[own]
    direction = direction.sign() if norm == "linf" else direction / direction.norm(dim=1, keepdim=True)
    with torch.no_grad():
        logits = target.model(target.images).double()
    margin = (logits.gather(1, own[:, None]) - logits.gather(1, other[:, None])).squeeze(1)
    speed = ((target.weight[own] - target.weight[other]).double() * direction).sum(1)
    return margin / -speed


@pytest.mark.parametrize("spec", [FGSM, PGD_L2], ids=lambda spec: spec.name)
def test_the_target_breaks_exactly_where_its_margin_along_the_surrogates_gradient_says(evaluated, target, surrogate, spec):
    labels = target.labels
    attacked = Surrogate(surrogate, 2, labels.tolist())
    rows = evaluated(target.model, target.images, labels, [spec], surrogate=attacked).rows
    distance = transfer_distance(target, surrogate, spec.norm).numpy()
    assert (distance > 1.2 * target.nearest(spec.norm).numpy()).all(), "nothing to tell transfer from a white-box attack"
    for eps in spec.eps:
        is_broken = rows[rows.eps == eps].sort_values("index").is_broken.to_numpy(bool)
        assert is_broken[distance < 0.999 * eps].all()
        assert not is_broken[distance > 1.001 * eps].any()
    assert 0.2 < rows.is_broken.mean() < 0.9
    # The surrogate falls earlier: an attack that ended there would leave the target standing.
    with torch.no_grad():
        at_smallest = target.images - spec.eps[0]
        assert (surrogate(target.images).argmax(1) != labels).any() or (surrogate(at_smallest).argmax(1) != labels).any()


def test_stronger_attacks_break_what_the_last_iterate_must(evaluated, target, surrogate):
    attacked = Surrogate(surrogate, 2, target.labels.tolist())
    rows = evaluated(*target, [PGD], surrogate=attacked).rows
    distance = transfer_distance(target, surrogate, "linf").numpy()
    for eps in LADDER:
        is_broken = rows[rows.eps == eps].sort_values("index").is_broken.to_numpy(bool)
        assert is_broken[distance < 0.999 * eps].all()
        # In the ball nothing is nearer than the white-box optimum.
        assert not is_broken[target.nearest("linf").numpy() > 1.001 * eps].any()
    standing = rows[rows.outcome == "robust"]
    assert len(standing) and (standing.forward_passes == PGD.steps).all(), "a surrogate that falls ends no attack"


def test_the_surrogate_has_labels_of_its_own(evaluated, target, surrogate):
    swapped = nn.Sequential(nn.Flatten(), nn.Linear(target.weight.shape[1], 3)).eval()
    with torch.no_grad():
        swapped[1].weight[[2, 0]] = surrogate[1].weight
        swapped[1].bias[[2, 0]] = surrogate[1].bias
        swapped[1].weight[1], swapped[1].bias[1] = 0, -1e3
    found = []
    for model, num_classes, labels in ((surrogate, 2, target.labels), (swapped, 3, 2 - 2 * target.labels)):
        attacked = Surrogate(model, num_classes, labels.tolist())
        found.append(evaluated(*target, [FGSM], surrogate=attacked, name=f"of-{num_classes}").rows)
    assert found[0].is_broken.tolist() == found[1].is_broken.tolist()


def test_only_what_the_target_gets_right_is_attacked(evaluated, target, surrogate):
    labels = target.labels.clone()
    labels[::3] = 1 - labels[::3]
    rows = evaluated(target.model, target.images, labels, [FGSM], surrogate=Surrogate(surrogate, 2, labels.tolist())).rows
    wrong = rows[rows["index"].isin(range(0, 120, 30))]
    assert (wrong.outcome == "wrong_when_clean").all() and (wrong.forward_passes == 0).all()
    assert (rows[~rows["index"].isin(range(0, 120, 30))].forward_passes.groupby(rows["index"]).sum() > 0).all()


def test_an_attack_that_gives_up_early_proposes_its_nearest_image(evaluated, target, surrogate):
    spec = CwSpec(name="cw", kind="cw", eps=(0.01, 0.1), binary_search_steps=4, steps=50, lr=0.0005, initial_c=1.0)
    attacked = Surrogate(surrogate, 2, target.labels.tolist())
    rows = evaluated(*target, [spec], surrogate=attacked).rows
    broken = rows[rows.outcome == "broken"]
    assert (broken.adversarial_prediction != broken.label).all()


def test_a_target_without_gradient_can_be_judged_by_transfer_alone(evaluated, target, surrogate):
    attacked = Surrogate(surrogate, 2, target.labels.tolist())
    whole = evaluated(*target, [FGSM], surrogate=attacked, name="whole").rows
    blind = evaluated(
        detached(target.model).eval(), target.images, target.labels, [FGSM], surrogate=attacked, name="blind"
    ).rows
    assert blind.is_broken.tolist() == whole.is_broken.tolist()
    with pytest.raises(ModelError, match="carry no gradient"):
        evaluated(
            target.model,
            target.images,
            target.labels,
            [FGSM],
            name="no",
            surrogate=Surrogate(detached(surrogate).eval(), 2, target.labels.tolist()),
        )


def test_interrupted_transfer_goes_on_with_the_same_rows(evaluated, target, surrogate):
    attacked = Surrogate(surrogate, 2, target.labels.tolist())
    whole = evaluated(*target, [PGD], surrogate=attacked, name="whole").rows

    def stop(task, is_new):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluated(*target, [PGD], surrogate=attacked, name="parts", on_task=stop)
    again = evaluated(*target, [PGD], surrogate=attacked, name="parts").rows
    assert again.drop(columns="wall_s").equals(whole.drop(columns="wall_s"))
    assert not any(parameter.requires_grad is False for parameter in surrogate.parameters())
