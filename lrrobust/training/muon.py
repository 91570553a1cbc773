"""The Muon optimiser: momentum whose matrices are orthogonalised before every step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from lrrobust.determinism import tf32_products

#: Quintic polynomial a*s + b*s^3 + c*s^5 that takes every singular value in (0, 1] near 1 in a few
#: applications; it trades exactness (results lie in about [0.7, 1.2]) for a steep slope at zero.
QUINTIC = (3.4445, -4.7750, 2.0315)
#: For language models five are usual; three serve convolutional networks as well (Jordan, airbench94, 2024).
ITERATIONS = 3


#: Matrices orthogonalised at once at most. A GPU waits for every launch; a CPU is no faster with stacks (measured on
#: two cores: the same time within a tenth) and would need memory for them.
STACK_SIZE = {"cpu": 1, "cuda": 64}


def orthogonalise(matrices: torch.Tensor, iterations: int = ITERATIONS) -> torch.Tensor:
    """Nearly U V^T of the singular value decomposition U S V^T of every matrix, by Newton-Schulz iteration.

    The iterations multiply by polynomials of X X^T alone, so they are collected on that small matrix and meet the
    wide X once, at the end.

    Args:
        matrices: float32 (..., rows, columns), each of any scale; zero stays zero.

    Returns:
        float32 of the same shape. With 5 iterations singular values lie in about [0.7, 1.2], except those smaller
        than about a thousandth of the Frobenius norm; with 3, those smaller than about a fiftieth stay below.
    """
    a, b, c = QUINTIC
    x = matrices.reshape(-1, *matrices.shape[-2:])
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    is_tall = x.shape[1] > x.shape[2]
    if is_tall:
        x = x.mT
    gram = x @ x.mT
    product: torch.Tensor | None = None
    for i in range(iterations):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=1, dim2=2).add_(a)
        product = factor if product is None else factor @ product
        if i < iterations - 1:
            gram = factor @ gram @ factor
    result = x if product is None else product @ x
    return (result.mT if is_tall else result).reshape(matrices.shape)


def _as_matrix(tensor: torch.Tensor, is_channels_last: bool) -> torch.Tensor:
    """(first dimension, all others), the others in the order of the memory, so that it is a view.

    The order of the columns changes nothing but that of the result's.
    """
    return (tensor.movedim(1, -1) if is_channels_last else tensor).flatten(1)


def _shaped_as(matrix: torch.Tensor, parameter: torch.Tensor, is_channels_last: bool) -> torch.Tensor:
    """The way back from `_as_matrix`, with the strides of the parameter: with others it would be added alone."""
    if not is_channels_last:
        return matrix.view(parameter.shape)
    return matrix.view(parameter.movedim(1, -1).shape).movedim(-1, 1)


def _stacks(parameters: list[torch.Tensor]) -> Iterator[list[int]]:
    """Positions of parameters to be orthogonalised at once: of one shape as matrices, up to transposition; wide ones first."""
    alike: dict[tuple[Any, ...], list[int]] = {}
    for i, parameter in enumerate(parameters):
        rows, columns = parameter.shape[0], parameter[0].numel()
        alike.setdefault((min(rows, columns), max(rows, columns), parameter.device, parameter.dtype), []).append(i)
    for (rows, _, device, _), positions in alike.items():
        positions.sort(key=lambda i: parameters[i].shape[0] > rows)
        size = STACK_SIZE.get(device.type, 1)
        for start in range(0, len(positions), size):
            yield positions[start : start + size]


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
        # Nothing here may ask the device for a number: it is given the next step's work while it does this one's.
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            if group["weight_decay"]:
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            if group["orthogonal"]:
                self._step_orthogonal(parameters, group)
            else:
                self._step_adam(parameters, group)

    def _step_orthogonal(self, parameters: list[torch.Tensor], group: dict[str, Any]) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)
        momenta = [self.state[parameter]["momentum"] for parameter in parameters]
        torch._foreach_lerp_(momenta, [parameter.grad for parameter in parameters], 1 - group["momentum"])
        # The iterations bear far less than TF32 gives: Jordan et al. make them in bf16.
        with tf32_products():
            for stack in _stacks(parameters):
                _add_orthogonal([parameters[i] for i in stack], [momenta[i] for i in stack], group)

    def _step_adam(self, parameters: list[torch.Tensor], group: dict[str, Any]) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                zeros = torch.zeros_like
                self.state[parameter].update(step=0, mean=zeros(parameter), square=zeros(parameter))
            self.state[parameter]["step"] += 1
        gradients = [parameter.grad for parameter in parameters]
        steps, means, squares = ([self.state[parameter][key] for parameter in parameters] for key in ("step", "mean", "square"))
        first, second = group["betas"]
        torch._foreach_lerp_(means, gradients, 1 - first)
        torch._foreach_mul_(squares, second)
        torch._foreach_addcmul_(squares, gradients, gradients, value=1 - second)
        roots = torch._foreach_div(squares, [1 - second**step for step in steps])
        torch._foreach_sqrt_(roots)
        torch._foreach_add_(roots, group["eps"])
        torch._foreach_addcdiv_(parameters, means, roots, [-group["lr"] / (1 - first**step) for step in steps])


def _add_orthogonal(parameters: list[torch.Tensor], momenta: list[torch.Tensor], group: dict[str, Any]) -> None:
    """The step of parameters whose matrices have one shape up to transposition, the wide ones first."""
    gradients = [parameter.grad for parameter in parameters]
    updates = torch._foreach_lerp(gradients, momenta, group["momentum"])
    are_channels_last = [p.ndim == 4 and p.is_contiguous(memory_format=torch.channels_last) for p in parameters]
    matrices = [_as_matrix(update, last) for update, last in zip(updates, are_channels_last, strict=True)]
    wide = [matrix for matrix in matrices if matrix.shape[0] <= matrix.shape[1]]
    tall = [matrix.mT for matrix in matrices[len(wide) :]]
    result = orthogonalise(torch.stack(wide + tall))
    # Contiguous, for the strides of the parameters.
    moves = [*result[: len(wide)], *result[len(wide) :].mT.contiguous()]
    scale = 0.2 * max(result.shape[1:]) ** 0.5
    shaped = [_shaped_as(*each) for each in zip(moves, parameters, are_channels_last, strict=True)]
    torch._foreach_add_(parameters, shaped, alpha=-group["lr"] * scale)
