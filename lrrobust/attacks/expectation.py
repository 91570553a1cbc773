"""What an attack on a randomised model sees: the mean of several of its answers, and the gradient of that mean."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn


class Expectation(nn.Module):
    """Images (N, C, H, W) -> the mean of the logits (N, K) of several forward passes, float32 at least, differentiable once.

    One pass of a randomised model shows one of many networks, and a step along its gradient may lead nowhere for the others.
    The mean of logits is, up to a constant for each image, that of log probabilities: attacks climb their loss of the
    expected answer, not the expectation of their loss.

    The backward pass makes the forward passes once more, one after the other, so that the memory of a single one is enough.
    Random numbers of torch are then the same again; a model that draws elsewhere shows other networks of the same kind.

    Args:
        model: images to logits.
        draws: passes that make a mean.

    Source: Athalye et al., Synthesizing Robust Adversarial Examples, 2018, section 2.1; Athalye et al., Obfuscated Gradients
    Give a False Sense of Security, 2018, section 4.2.
    """

    def __init__(self, model: nn.Module, draws: int) -> None:
        super().__init__()
        self.model, self.draws = model, draws

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and images.requires_grad:
            return _MeanOfDraws.apply(images, self.model, self.draws)
        return _mean(self.model(images) for _ in range(self.draws))


class _MeanOfDraws(torch.autograd.Function):
    @staticmethod
    def forward(ctx, images: torch.Tensor, model: Callable[[torch.Tensor], torch.Tensor], draws: int) -> torch.Tensor:
        ctx.save_for_backward(images)
        ctx.model, ctx.states = model, []
        kind = images.device.type
        ctx.autocast = {"dtype": torch.get_autocast_dtype(kind), "enabled": torch.is_autocast_enabled(kind)}

        def draw() -> Iterator[torch.Tensor]:
            for _ in range(draws):
                ctx.states.append(_random_state(images.device))
                yield model(images)

        return _mean(draw())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, by_logits: torch.Tensor):
        (images,) = ctx.saved_tensors
        gradient = torch.zeros_like(images)
        kept = torch.random.fork_rng(devices=[images.device] if images.device.type == "cuda" else [])
        with kept, torch.autocast(images.device.type, **ctx.autocast), torch.enable_grad():
            for state in ctx.states:
                _set_random_state(images.device, state)
                attacked = images.detach().requires_grad_()
                logits = ctx.model(attacked)
                (each,) = torch.autograd.grad(logits, attacked, by_logits.to(logits.dtype) / len(ctx.states))
                gradient += each
        return gradient, None, None


def _mean(draws: Iterator[torch.Tensor]) -> torch.Tensor:
    total, count = None, 0
    for count, logits in enumerate(draws, start=1):
        # A sum of many in half precision would be rounded by more than they differ.
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        total = logits.clone() if total is None else total + logits
    assert total is not None
    return total / count


def _random_state(device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(device: torch.device, state: tuple[torch.Tensor, torch.Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
