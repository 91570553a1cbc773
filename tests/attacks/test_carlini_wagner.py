import pytest
import torch
from made_models import Function
from torch import nn

from lrrobust.attacks.carlini_wagner import carlini_wagner_l2
from lrrobust.attacks.suite import load_suite
from lrrobust.threat import distance

SHIPPED = {
    "binary_search_steps": 5,
    "steps": 100,
    "lr": 0.01,
    "initial_c": 1.0,
    "confidence": 0.0,
    "abort_early": True,
}


def attack(model, images, labels, **changes):
    return carlini_wagner_l2(model, images, labels, **{**SHIPPED, **changes})[0]


def is_broken(model, images, labels):
    with torch.no_grad():
        return model(images).argmax(1) != labels


def test_the_settings_tested_are_the_shipped_ones():
    (spec,) = load_suite(["cw"])
    assert {key: getattr(spec, key) for key in SHIPPED} == SHIPPED


@pytest.mark.parametrize(
    "change",
    [
        lambda logits: logits.log_softmax(1),
        lambda logits: 100 * logits,
        lambda logits: logits - 1000,
        lambda logits: 0.01 * logits,
        lambda logits: 1e-4 * logits,
        lambda logits: 1e4 * logits,
        lambda logits: (100 * logits.double()).log_softmax(1).float(),
    ],
    ids=["log_softmax", "x100", "all negative", "x0.01", "x0.0001", "x10000", "x100 log_softmax"],
)
def test_sign_and_scale_of_logits_do_not_matter(change, linear_problem):
    problem = linear_problem(4, classes=5)
    model = nn.Sequential(problem.model, Function(change))
    adversarial = attack(model, problem.images, problem.labels)
    ratio = distance(problem.images, adversarial, "l2") / problem.nearest("l2")
    assert is_broken(model, adversarial, problem.labels).all()
    assert (ratio <= 1.05).all()


def test_images_do_not_influence_each_other(linear_problem):
    problem = linear_problem(8, classes=5)
    # In float64: Adam makes much of the last bits, which depend on the batch.
    model, images = problem.model.double(), problem.images.double()
    together = attack(model, images, problem.labels)
    alone = torch.cat([attack(model, images[i : i + 1], problem.labels[i : i + 1]) for i in range(8)])
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-8)


def test_images_do_not_influence_each_other_in_a_network(small_cnn):
    images = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    small_cnn.double()
    labels = small_cnn(images).argmax(1)
    short = {"binary_search_steps": 3, "steps": 40}
    together = attack(small_cnn, images, labels, **short)
    alone = torch.cat([attack(small_cnn, images[i : i + 1], labels[i : i + 1], **short) for i in range(8)])
    assert is_broken(small_cnn, together, labels).all()
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-8)


def test_confidence_is_a_margin(linear_problem):
    problem = linear_problem(4, classes=5)
    adversarial = attack(*problem, confidence=2.0)
    with torch.no_grad():
        logits = problem.model(adversarial)
    own = logits.gather(1, problem.labels[:, None])
    margin = (logits.scatter(1, problem.labels[:, None], -torch.inf).amax(1, keepdim=True) - own).squeeze(1)
    assert (margin >= 2.0 - 1e-4).all() and (margin < 2.5).all()


def test_what_is_returned_was_seen_by_the_model(linear_problem):
    problem = linear_problem(3, classes=5)
    seen = set()
    problem.model.register_forward_hook(
        lambda module, inputs, output: seen.update(image.numpy().tobytes() for image in inputs[0].detach())
    )
    adversarial = attack(*problem)
    assert all(image.numpy().tobytes() in seen for image in adversarial)


def test_the_clean_image_where_nothing_is_found(linear_problem):
    problem = linear_problem(3, classes=5)
    constant = nn.Sequential(problem.model, Function(lambda logits: 0 * logits + torch.arange(5.0)))
    labels = torch.full((3,), 4)
    assert torch.equal(attack(constant, problem.images, labels), problem.images)


def distant_problem():
    """A model (192 values, 2 classes), an image and its label; the boundary lies at distance 1."""
    layer = nn.Linear(192, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0], [-1.0]]).expand(2, 192))
        layer.bias.copy_(torch.tensor([-96.0, 96.0]) - torch.tensor([1.0, -1.0]) * 192**0.5)
    return nn.Sequential(nn.Flatten(), layer), torch.full((1, 3, 8, 8), 0.5), torch.tensor([1])


def test_the_first_c_is_what_the_linearised_model_needs():
    model, images, labels = distant_problem()
    found = attack(model, images, labels, binary_search_steps=1, initial_c=1e-6)
    assert 1 <= distance(images, found, "l2").item() <= 1.05


def test_c_grows_tenfold_until_it_suffices():
    """Where the slope falls on the way, what the model linearised at the image needs is far too small."""
    model, images, labels = distant_problem()
    bent = nn.Sequential(model, Function(lambda logits: logits + 5 * (logits - logits.clamp(-13, 13))))
    first = attack(bent, images, labels, binary_search_steps=1, initial_c=1e-6)
    assert torch.equal(first, images)
    later = attack(bent, images, labels, binary_search_steps=8, initial_c=1e-6)
    assert 1 <= distance(images, later, "l2").item() <= 1.05


@pytest.mark.parametrize("initial_c", [1e-3, 1.0, 100.0])
def test_the_search_reaches_the_optimum_from_any_first_c(initial_c, linear_problem):
    problem = linear_problem(3, classes=2)
    adversarial = attack(*problem, binary_search_steps=8, initial_c=initial_c)
    assert (distance(problem.images, adversarial, "l2") <= 1.05 * problem.nearest("l2")).all()


def test_images_that_are_done_leave_the_batch(linear_problem):
    problem = linear_problem(8, classes=5)
    sizes = []
    problem.model.register_forward_hook(lambda module, inputs, output: sizes.append(len(inputs[0])))
    early = attack(*problem)
    spent, full = sum(sizes), 8 + 8 * 5 * 100  # the clean images, then every step
    sizes.clear()
    late = attack(*problem, abort_early=False)
    assert sum(sizes) == full and set(sizes) == {8}
    assert spent < 0.8 * full
    saved = distance(problem.images, early, "l2") / distance(problem.images, late, "l2")
    assert (saved < 1.05).all()


@pytest.mark.parametrize("abort_early", [True, False])
def test_nan_is_no_success(abort_early, linear_problem):
    problem = linear_problem(1, classes=5)

    def nan_where_moved(images):
        is_moved = (images - problem.images).flatten(1).norm(dim=1) > 1e-3
        return torch.where(is_moved[:, None], torch.nan, problem.model(images))

    adversarial = attack(Function(nan_where_moved), problem.images, problem.labels, abort_early=abort_early)
    assert torch.equal(adversarial, problem.images)


def test_infinite_rivals_are_no_success(linear_problem):
    problem = linear_problem(2, classes=5)
    rivals = Function(lambda logits: torch.where(logits < logits.amax(1, keepdim=True), torch.inf, logits))
    model = nn.Sequential(problem.model, rivals)
    assert torch.equal(attack(model, problem.images, problem.labels), problem.images)


def test_the_spec_reaches_the_attack_batch_by_batch(linear_problem, attack_with):
    problem = linear_problem(3, classes=5)
    (spec,) = load_suite(["cw"])
    attacked = attack_with(spec, *problem, batch_size=2)
    for rows in (slice(0, 2), slice(2, 3)):
        proposed = attack(problem.model, problem.images[rows], problem.labels[rows])
        assert torch.equal(attacked.proposals[0, rows], proposed)
    assert [(row, is_last) for row, _, is_last, _ in attacked.claims] == [(0, True), (1, True), (2, True)]
