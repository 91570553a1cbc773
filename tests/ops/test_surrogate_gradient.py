"""Gradients of surrogates against those of the formula written out over all pairs of positions."""

import itertools

import pytest
import torch

from lrrobust.gradient_rules import GradientRule
from lrrobust.ops import local_relation
from lrrobust.ops.surrogate_gradient import local_relation_with_gradient

SIMILARITIES = ("squared_difference", "absolute_difference", "multiplication")
RULES = (
    GradientRule("exact"),
    GradientRule("tempered", 4.0),
    GradientRule("absolute_difference"),
    GradientRule("constant_weights"),
)
#: The window of every position holds the whole map.
SIDE, KERNEL = 3, 5


@pytest.fixture
def tensors():
    """query, key (2, 2, 3, 3), value (2, 4, 3, 3), geometry (2, 5, 5), all with gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 2, SIDE, SIDE), (2, 2, SIDE, SIDE), (2, 4, SIDE, SIDE), (2, KERNEL, KERNEL))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def by_pairs(query, key, value, geometry, score):
    """The definition, position by position, with scores made by `score` of query, key and geometry."""
    positions = list(itertools.product(range(SIDE), repeat=2))
    out = {}
    for y, x in positions:
        scores = torch.stack(
            [score(query[:, :, y, x], key[:, :, v, u], geometry[:, v - y + 2, u - x + 2]) for v, u in positions], dim=-1
        )
        weights = scores.softmax(-1).repeat_interleave(2, dim=1)
        out[y, x] = (weights * value.flatten(2)).sum(-1)
    return torch.stack([out[position] for position in positions], dim=-1).view_as(value)


def gradients(out, tensors):
    weights = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)
    found = torch.autograd.grad((out * weights).sum(), tensors, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(found, tensors, strict=True)]


PHI = {
    "squared_difference": lambda q, k: -((q - k) ** 2),
    "absolute_difference": lambda q, k: -(q - k).abs(),
    "multiplication": lambda q, k: q * k,
}


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.gradient_of)
@pytest.mark.parametrize("backend", ["auto", "unfold"])
def test_values_are_the_exact_ones_bit_by_bit(rule, similarity, backend, tensors):
    tensors = [tensor.detach().float().requires_grad_() for tensor in tensors]
    options = {"kernel_size": KERNEL, "similarity": similarity, "backend": backend}
    exact = local_relation(*tensors, **options)
    found = local_relation_with_gradient(rule, *tensors, **options)
    assert found.requires_grad
    assert torch.equal(found, exact)
    with torch.no_grad():
        assert torch.equal(local_relation_with_gradient(rule, *tensors, **options), exact)


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_tempered_gradient_is_that_of_scores_divided_by_the_temperature(similarity, temperature, tensors):
    found = local_relation_with_gradient(
        GradientRule("tempered", temperature), *tensors, kernel_size=KERNEL, similarity=similarity, backend="reference"
    )
    phi = PHI[similarity]
    surrogate = by_pairs(*tensors, lambda q, k, g: (phi(q, k) + g) / temperature)
    torch.testing.assert_close(gradients(found, tensors), gradients(surrogate, tensors))


def test_absolute_difference_replaces_the_squared_one(tensors):
    found = local_relation_with_gradient(GradientRule("absolute_difference"), *tensors, kernel_size=KERNEL, backend="reference")
    surrogate = by_pairs(*tensors, lambda q, k, g: g - (q - k).abs())
    torch.testing.assert_close(gradients(found, tensors), gradients(surrogate, tensors))


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_constant_weights_pass_gradients_to_values_alone(similarity, tensors):
    query, key, value, geometry = tensors
    found = local_relation_with_gradient(
        GradientRule("constant_weights"), *tensors, kernel_size=KERNEL, similarity=similarity, backend="reference"
    )
    phi = PHI[similarity]
    by_query, by_key, by_value, by_geometry = gradients(found, tensors)
    surrogate = by_pairs(query.detach(), key.detach(), value, geometry.detach(), lambda q, k, g: phi(q, k) + g)
    assert not by_query.any() and not by_key.any() and not by_geometry.any()
    torch.testing.assert_close(by_value, gradients(surrogate, [value])[0])


def test_a_saturated_softmax_hides_what_a_tempered_one_shows(tensors):
    query, key, value, geometry = (tensor.detach().float() for tensor in tensors)
    query = (100 * query).requires_grad_()

    def by_query(rule):
        out = local_relation_with_gradient(rule, query, 100 * key, value, geometry, kernel_size=KERNEL)
        return torch.autograd.grad(out.square().sum(), query)[0]

    hidden, shown = (by_query(rule).abs().median() for rule in (GradientRule("exact"), GradientRule("tempered", 10000.0)))
    assert hidden < 1e-30 and shown > 1e-4


@pytest.mark.parametrize(
    "rule", [GradientRule("tempered", 0.0), GradientRule("tempered", float("nan")), GradientRule("smooth")]
)
def test_rules_that_mean_nothing_are_refused(rule, tensors):
    with pytest.raises(ValueError, match="temperature above 0|unknown rule 'smooth'"):
        local_relation_with_gradient(rule, *tensors, kernel_size=KERNEL, backend="reference")
