"""The local relation with the gradient of a smoother function, for attackers who know what they attack."""

from __future__ import annotations

from typing import Any

import torch

from lrrobust.gradient_rules import GradientRule
from lrrobust.ops.local_relation import Similarity, local_relation


def local_relation_with_gradient(
    rule: GradientRule,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    geometry: torch.Tensor,
    *,
    similarity: Similarity = "squared_difference",
    **options: Any,
) -> torch.Tensor:
    """`local_relation`, bit by bit, whose gradient is that of a surrogate at the same arguments.

    With a temperature T the surrogate weighs by softmax of (phi + geometry) / T. Costs a second forward pass of the
    op, and none without gradients.

    Args:
        rule: which surrogate.
        query, key, value, geometry, similarity, options: as for `local_relation`.

    Raises:
        ValueError: the rule is unknown, its temperature is not positive, or the arguments do not fit together.
    """
    with torch.no_grad():
        exact = local_relation(query, key, value, geometry, similarity=similarity, **options)
    if not torch.is_grad_enabled():
        return exact
    if rule.gradient_of == "tempered":
        query, key, geometry = _tempered(query, key, geometry, similarity, rule.temperature)
    elif rule.gradient_of == "absolute_difference":
        similarity = "absolute_difference"
    elif rule.gradient_of == "constant_weights":
        query, key, geometry = query.detach(), key.detach(), geometry.detach()
    elif rule.gradient_of != "exact":
        raise ValueError(f"unknown rule {rule.gradient_of!r} for the gradient of local_relation")
    return _StraightThrough.apply(exact, local_relation(query, key, value, geometry, similarity=similarity, **options))


def _tempered(
    query: torch.Tensor, key: torch.Tensor, geometry: torch.Tensor, similarity: Similarity, temperature: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and geometry whose scores are those of the arguments divided by the temperature."""
    if not temperature > 0:
        raise ValueError(f"expected a temperature above 0, got {temperature}")
    # Of the first degree in the difference, else of the second in both together.
    scale = temperature if similarity == "absolute_difference" else temperature**0.5
    return query / scale, key / scale, geometry / temperature


class _StraightThrough(torch.autograd.Function):
    """The first argument, with the gradient of the second."""

    @staticmethod
    def forward(ctx, exact, surrogate):
        return exact.view_as(exact)

    @staticmethod
    def backward(ctx, gradient):
        return None, gradient
