"""How a fused backend becomes an operation of torch: seen by its compiler, and called past the dispatcher otherwise.

A network calls the operation many times on small maps, where getting to it costs more than what it computes. Custom
operations are what torch.compile, fake tensors and tensor subclasses need, and take a quarter of a millisecond forward
and backward; plain tensors in a plain program go through an autograd function instead, to the same two functions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from lrrobust.errors import BackendError


def build_operation(
    name: str,
    *,
    forward: Callable[..., tuple[Tensor, ...]],
    backward: Callable[..., tuple[Tensor, ...]],
    allocate_outputs: Callable[[Tensor, Tensor], tuple[Tensor, ...]],
    allocate_gradients: Callable[[Tensor, Tensor, Tensor, Tensor, bool], tuple[Tensor, ...]],
    device_types: tuple[str, ...],
) -> Callable[..., Tensor]:
    """Registers `lrrobust::NAME` and `lrrobust::NAME_backward`.

    Custom operations take their arguments as they come, so there is no rule for autocast: the backends take half
    precision and float32 side by side and sum in float32.

    Args:
        forward: (query, key, value, geometry, stride, dilation, similarity, per_group) -> (output, *saved), with annotations,
            of which torch makes the operation's signature; `saved` is what the backward pass wants to have again.
        backward: (query, key, value, geometry, *saved, grad_out, stride, dilation, similarity, per_group, needs_geometry) ->
            gradients of the four tensors; that of the geometry is empty where it is not needed.
        allocate_outputs: (query, value) -> what `forward` returns, by shape, dtype and layout.
        allocate_gradients: (query, key, value, geometry, needs_geometry) -> the same of `backward`.
        device_types: where it runs.

    Returns:
        The arguments of `forward` -> its first result, differentiable once.
    """

    def register(name: str, function: Callable) -> Any:
        return torch.library.custom_op(f"lrrobust::{name}", function, mutates_args=(), device_types=device_types)

    forward_op, backward_op = register(name, forward), register(f"{name}_backward", backward)
    forward_op.register_fake(lambda query, key, value, *_: allocate_outputs(query, value))
    backward_op.register_fake(lambda *arguments: allocate_gradients(*arguments[:4], arguments[-1]))

    def setup_context(ctx, inputs, output) -> None:
        *tensors, ctx.stride, ctx.dilation, ctx.similarity, ctx.per_group = inputs
        ctx.save_for_backward(*tensors, *output[1:])
        ctx.set_materialize_grads(False)

    def differentiate(ctx, grad_out: Tensor | None, run: Callable[..., tuple[Tensor, ...]]) -> tuple[Tensor | None, ...]:
        if grad_out is None:
            return (None,) * 8
        needs_geometry = ctx.needs_input_grad[3]
        options = (ctx.stride, ctx.dilation, ctx.similarity, ctx.per_group)
        *grads, grad_geometry = run(*ctx.saved_tensors, grad_out, *options, needs_geometry)
        return *grads, grad_geometry if needs_geometry else None, None, None, None, None

    forward_op.register_autograd(
        lambda ctx, grad_out, *_: differentiate(ctx, grad_out, backward_op), setup_context=setup_context
    )

    def refuse(ctx, *_) -> None:
        raise BackendError(f"lrrobust::{name} can be differentiated once: give local_relation(..., backend='unfold')")

    # Torch's own refusal names neither the reason nor the way out.
    backward_op.register_autograd(refuse)

    class _LocalRelation(torch.autograd.Function):
        # Without a setup_context of its own, for which torch would look at the signature at every call.
        @staticmethod
        def forward(ctx, *inputs):
            output = forward(*inputs)
            setup_context(ctx, inputs, output)
            return output[0]

        @staticmethod
        def backward(ctx, grad_out):
            # Where the gradient is to be differentiated in turn, the operation refuses. `once_differentiable` would do so
            # only for those who ask for gradients of all there is, and leave its part out for others.
            return differentiate(ctx, grad_out, backward_op if torch.is_grad_enabled() else backward)

    def call(*inputs) -> Tensor:
        return _LocalRelation.apply(*inputs) if _is_plain(inputs[:4]) else forward_op(*inputs)[0]

    return call


def new_channels_last(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """(N, C, H, W) on the device of `like`, whose memory is (N, H, W, C) without gaps, whatever the sizes.

    Not a permuted view, which nobody may change in place where autograd made it.
    """
    _, channels, height, width = shape
    return like.new_empty_strided(shape, (height * width * channels, 1, width * channels, channels), dtype=dtype)


def _is_plain(tensors: tuple[Tensor, ...]) -> bool:
    """Whether nobody but autograd has to learn of an operation on these tensors."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active():
        return False
    # Tracers, and policies of checkpoints.
    if _get_current_dispatch_mode() is not None:
        return False
    return all(type(x) is Tensor or type(x) is torch.nn.Parameter for x in tensors)
