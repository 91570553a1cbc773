"""Passes through a network of ours recorded on a GPU and replayed, each as one launch.

An attack makes thousands of passes of the same network, which on small images keep the processor busier with launching
kernels than the GPU with running them. A CUDA graph launches all kernels of a pass at once. It reads and writes fixed
memory and holds for one batch size, so batches are copied in and filled up to the next size that is recorded; what the rows
beyond hold touches no other row, since the networks it is used for treat every image by itself.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn

from lrrobust.determinism import float32_settings
from lrrobust.models.residual import ResidualNetwork

_log = logging.getLogger(__name__)

#: Batches are filled up to one of these: at most a third of a large batch is computed in vain.
BATCH_SIZES = (4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512)

#: Pixels of a batch above which launching takes no part worth the memory that a recording holds.
MOST_PIXELS = 512 * 64 * 64


class Recording(Protocol):
    """Passes at one batch size. `forward` reads `images` and writes `logits`; `backward`, which must follow on it, reads
    `grad_logits` and writes `grad_images`."""

    images: torch.Tensor
    logits: torch.Tensor
    grad_logits: torch.Tensor | None
    grad_images: torch.Tensor | None

    def forward(self) -> None: ...

    def backward(self) -> None: ...


class CudaRecording:
    """CUDA graphs of a forward pass and, if asked for, of the backward pass to the images.

    Args:
        network: images to logits, with constant weights.
        images: (N, C, H, W) on the device, as an example of what will come.
        needs_gradient: whether the backward pass is recorded too.
        pool: of memory that recordings share, so that at most one of them may stand between its two passes.

    Raises:
        RuntimeError: something in a pass cannot be recorded, or memory ran out.
    """

    def __init__(self, network: nn.Module, images: torch.Tensor, needs_gradient: bool, pool: Any) -> None:
        self.images = images.clone().requires_grad_(needs_gradient)
        self.grad_logits = self.grad_images = None
        self._warm_up(network)
        self._forward, self._backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        # Other threads may go on with their own work on the device, such as copying the next images.
        mode = {"capture_error_mode": "thread_local"}
        with torch.cuda.graph(self._forward, pool, **mode):
            self.logits = network(self.images)
        if needs_gradient:
            self.grad_logits = torch.zeros_like(self.logits)
            with torch.cuda.graph(self._backward, pool, **mode):
                (self.grad_images,) = torch.autograd.grad(self.logits, self.images, self.grad_logits)
        self.logits = self.logits.detach()

    def _warm_up(self, network: nn.Module) -> None:
        # What is made once, kernels and workspaces of libraries among it, must be there before; torch asks for a side stream.
        stream = torch.cuda.Stream(self.images.device)
        stream.wait_stream(torch.cuda.current_stream(self.images.device))
        with torch.cuda.stream(stream):
            for _ in range(2):
                logits = network(self.images)
                if logits.requires_grad:
                    torch.autograd.grad(logits, self.images, torch.zeros_like(logits))
        torch.cuda.current_stream(self.images.device).wait_stream(stream)

    def forward(self) -> None:
        self._forward.replay()

    def backward(self) -> None:
        self._backward.replay()


class _Replay(torch.autograd.Function):
    """Logits by a recording, and the gradient by the same one, wherever it stands by then."""

    @staticmethod
    def forward(ctx: Any, images: torch.Tensor, network: ReplayedNetwork, recording: Recording) -> torch.Tensor:
        ctx.network, ctx.recording, ctx.set_materialize_grads = network, recording, True
        ctx.save_for_backward(images)
        logits, ctx.turn = network.run_forward(recording, images)
        return logits

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (images,) = ctx.saved_tensors
        if ctx.turn != ctx.network.turn:
            # Other passes came between, and took the memory of this one's intermediate results.
            ctx.network.run_forward(ctx.recording, images)
        ctx.network.turn += 1
        recording = ctx.recording
        recording.grad_logits[: len(images)].copy_(gradient)
        recording.backward()
        return recording.grad_images[: len(images)].clone(), None, None


class ReplayedNetwork(nn.Module):
    """The same function as `network`, in recorded passes where that is possible and as it is everywhere else.

    Recorded are float32 batches on a GPU, up to `MOST_PIXELS`, outside of autocast, with or without their gradient,
    which can be differentiated once. Where a pass cannot be recorded, a warning says so once.

    Args:
        network: in evaluation mode, constant, each image's logits its own. Gradient rules of its layers are followed.
        record: makes recordings, see `CudaRecording` for the arguments.
    """

    def __init__(self, network: nn.Module, record: Callable[..., Recording] = CudaRecording) -> None:
        super().__init__()
        self.network = network
        self.train(network.training)
        self.turn = 0
        self._record = record
        self._recordings: dict[tuple, Recording] = {}
        self._pool: Any = None
        self._gave_up = False
        self._with_rules = [layer for layer in network.modules() if hasattr(layer, "gradient_rule")]

    def __deepcopy__(self, memo: dict[int, Any]) -> ReplayedNetwork:
        return ReplayedNetwork(copy.deepcopy(self.network, memo), self._record)

    def _apply(self, *arguments: Any, **options: Any) -> ReplayedNetwork:
        # Recordings hold the addresses of weights, which may move now.
        self._recordings.clear()
        return super()._apply(*arguments, **options)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        recording = self._find_recording(images) if self._can_replay(images) else None
        if recording is None:
            return self.network(images)
        if images.requires_grad and torch.is_grad_enabled():
            return _Replay.apply(images, self, recording)
        return self.run_forward(recording, images)[0]

    def run_forward(self, recording: Recording, images: torch.Tensor) -> tuple[torch.Tensor, int]:
        """Logits (n, K), a copy, and the number of this pass among all."""
        self.turn += 1
        with torch.no_grad():
            recording.images[: len(images)].copy_(images)
            recording.forward()
            return recording.logits[: len(images)].clone(), self.turn

    def _can_replay(self, images: torch.Tensor) -> bool:
        return (
            not self._gave_up
            and images.dtype == torch.float32
            and images.ndim == 4
            and 0 < len(images) <= BATCH_SIZES[-1]
            and images.shape[0] * images.shape[2] * images.shape[3] <= MOST_PIXELS
            and not self.network.training
            and not torch.is_autocast_enabled(images.device.type)
            and all(layer.gradient_rule is None for layer in self._with_rules)
            and not (images.is_cuda and torch.cuda.is_current_stream_capturing())
            and not torch.compiler.is_compiling()
        )

    def _find_recording(self, images: torch.Tensor) -> Recording | None:
        count = next(size for size in BATCH_SIZES if size >= len(images))
        needs_gradient = images.requires_grad and torch.is_grad_enabled()
        # The settings decide which kernels a pass runs.
        key = (count, images.shape[1:], images.device, needs_gradient, float32_settings())
        if key not in self._recordings:
            self.turn += 1
            try:
                self._recordings[key] = self._record_anew(images, count, needs_gradient)
            except RuntimeError as error:
                self._recordings.clear()
                if "out of memory" in str(error):
                    raise
                self._gave_up = True
                reason = " ".join(str(error).split())[:200]
                _log.warning("passes cannot be recorded on %s, and take longer so: %s", images.device, reason)
                return None
        return self._recordings[key]

    def _record_anew(self, images: torch.Tensor, count: int, needs_gradient: bool) -> Recording:
        if self._pool is None and images.is_cuda:
            self._pool = torch.cuda.graph_pool_handle()
        # Whatever mode the caller is in, a recording serves all.
        with torch.inference_mode(False), torch.set_grad_enabled(needs_gradient):
            example = torch.zeros(count, *images.shape[1:], device=images.device)
            return self._record(self.network, example, needs_gradient, self._pool)


def replayed(network: nn.Module) -> nn.Module:
    """`network` with recorded passes where it is one of ours on a GPU, else as it is.

    Networks of other people are not known to do the same in every pass, nor to treat each image by itself.
    """
    if isinstance(network, ResidualNetwork) and next(network.parameters()).is_cuda:
        return ReplayedNetwork(network)
    return network
