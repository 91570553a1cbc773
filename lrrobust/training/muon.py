"""The Muon optimiser: momentum whose matrices are orthogonalised before every step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

#: Quintic polynomial a*s + b*s^3 + c*s^5 that takes every singular value in (0, 1] near 1 in a few
#: applications; it trades exactness (results lie in about [0.7, 1.2]) for a steep slope at zero.
QUINTIC = (3.4445, -4.7750, 2.0315)
#: For language models five are usual; three serve convolutional networks as well (Jordan, airbench94, 2024).
ITERATIONS = 3


def orthogonalise(matrix: torch.Tensor, iterations: int = ITERATIONS) -> torch.Tensor:
    """Nearly U V^T of the singular value decomposition U S V^T of `matrix`, by Newton-Schulz iteration.

    The iterations multiply by polynomials of X X^T alone, so they are collected on that small matrix and meet the
    wide X once, at the end.

    Args:
        matrix: float32 (rows, columns), any scale; zero stays zero.

    Returns:
        float32 of the same shape. With 5 iterations singular values lie in about [0.7, 1.2], except those smaller
        than about a thousandth of the Frobenius norm; with 3, those smaller than about a fiftieth stay below.
    """
    a, b, c = QUINTIC
    x = matrix / matrix.norm().clamp_min(torch.finfo(torch.float32).tiny)
    is_tall = x.shape[0] > x.shape[1]
    if is_tall:
        x = x.t()
    gram = x @ x.t()
    product: torch.Tensor | None = None
    for i in range(iterations):
        factor = b * gram + c * (gram @ gram)
        factor.diagonal().add_(a)
        product = factor if product is None else factor @ product
        if i < iterations - 1:
            gram = factor @ gram @ factor
    result = x if product is None else product @ x
    return result.t() if is_tall else result


class Muon(torch.optim.Optimizer):
    """Muon for kernels, AdamW for everything else, with one learning rate for both.

    Groups with `orthogonal=True` hold tensors of at least two dimensions, seen as matrices (first
    dimension, all others). Their update is scaled to the root mean square of a typical AdamW update, so
    AdamW's learning rate and weight decay serve for both kinds of groups.

    Source: Jordan et al., Muon: an optimizer for hidden layers in neural networks, 2024; the scale from
    Liu et al., Muon is Scalable for LLM Training, arXiv 2502.16982, section 2.2.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float,
        *,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {
            "lr": lr, "momentum": momentum, "betas": betas, "eps": eps, "weight_decay": weight_decay, "orthogonal": False
        }  # fmt: skip
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                if group["orthogonal"]:
                    self._step_orthogonal(parameter, group)
                else:
                    self._step_adam(parameter, group)

    def _step_orthogonal(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
        update = parameter.grad.lerp(state["momentum"], group["momentum"]).flatten(1)
        scale = 0.2 * max(update.shape) ** 0.5
        parameter.add_(orthogonalise(update).reshape(parameter.shape), alpha=-group["lr"] * scale)

    def _step_adam(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state.update(step=0, mean=torch.zeros_like(parameter), square=torch.zeros_like(parameter))
        state["step"] += 1
        first, second = group["betas"]
        state["mean"].lerp_(parameter.grad, 1 - first)
        state["square"].mul_(second).addcmul_(parameter.grad, parameter.grad, value=1 - second)
        root = (state["square"] / (1 - second ** state["step"])).sqrt_().add_(group["eps"])
        parameter.addcdiv_(state["mean"], root, value=-group["lr"] / (1 - first ** state["step"]))
