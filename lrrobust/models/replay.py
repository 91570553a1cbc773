"""Passes through a network of ours recorded on a GPU and replayed, each as one launch.

An attack makes thousands of passes of the same network, which on small images keep the processor busier with launching
kernels than the GPU with running them. A CUDA graph launches all kernels of a pass at once. It reads and writes fixed
memory and holds for one batch size, so batches are copied in and filled up to the next size that is recorded; what the rows
beyond hold touches no other row, since the networks it is used for treat every image by itself.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch import nn

from lrrobust.determinism import float32_settings
from lrrobust.models.residual import ResidualNetwork
from lrrobust.out_of_memory import explain_in_brief, is_out_of_memory

_log = logging.getLogger(__name__)

#: Batches are filled up to one of these: of more than 32 images at most a third is computed in vain.
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512)

#: Pixels of a filled up batch above which launching takes no part worth the memory that a recording holds.
MOST_PIXELS = 512 * 64 * 64

#: What a recorded pass may differ by from the pass it was made of, as a share of the largest number.
TOLERANCE = 1e-3


class Recording(Protocol):
    """Passes at one batch size. `forward` reads `images` and writes `logits`; `backward`, which may follow on it more than
    once, reads `grad_logits` and writes `grad_images`."""

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
        pool: of memory that recordings share: a pass of one destroys what another keeps for its backward pass.

    Raises:
        RuntimeError: something in a pass cannot be recorded, or memory ran out.
    """

    def __init__(self, network: nn.Module, images: torch.Tensor, needs_gradient: bool, pool: Any) -> None:
        self.images = images.clone().requires_grad_(needs_gradient)
        self.grad_logits = self.grad_images = None
        # torch remembers a stream of whichever device came first; and a recording that fails leaves its stream behind.
        before, stream = torch.cuda.current_stream(images.device), torch.cuda.Stream(images.device)
        try:
            self._warm_up(network, before, stream)
            self._forward, self._backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
            # Other threads may go on with their own work on the device, such as copying the next images.
            where = {"pool": pool, "stream": stream, "capture_error_mode": "thread_local"}
            with torch.cuda.graph(self._forward, **where):
                logits = network(self.images)
            if needs_gradient:
                self.grad_logits = torch.zeros_like(logits)
                with torch.cuda.graph(self._backward, **where):
                    # Retained, so that it writes over nothing that it reads and can be replayed again.
                    (self.grad_images,) = torch.autograd.grad(logits, self.images, self.grad_logits, retain_graph=True)
            self.logits = logits.detach()
        finally:
            torch.cuda.set_stream(before)

    def _warm_up(self, network: nn.Module, before: torch.cuda.Stream, stream: torch.cuda.Stream) -> None:
        # What is made once, kernels and workspaces of libraries among it, must be there before; torch asks for a side stream.
        stream.wait_stream(before)
        with torch.cuda.stream(stream):
            for _ in range(2):
                logits = network(self.images)
                if logits.requires_grad:
                    torch.autograd.grad(logits, self.images, torch.zeros_like(logits))
        before.wait_stream(stream)

    def forward(self) -> None:
        self._forward.replay()

    def backward(self) -> None:
        self._backward.replay()


class _Replay(torch.autograd.Function):
    """Logits by a recording, and the gradient by the same one, wherever it stands by then."""

    @staticmethod
    def forward(ctx: Any, images: torch.Tensor, network: ReplayedNetwork, recording: Recording) -> torch.Tensor:
        ctx.network, ctx.recording = network, recording
        ctx.save_for_backward(images)
        logits, ctx.turn = network.run_forward(recording, images)
        return logits

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (images,) = ctx.saved_tensors
        if ctx.turn != ctx.network.turn:
            # Other passes came between, and took the memory of this one's intermediate results.
            _, ctx.turn = ctx.network.run_forward(ctx.recording, images)
        recording = ctx.recording
        recording.grad_logits[: len(images)].copy_(gradient)
        recording.backward()
        return recording.grad_images[: len(images)].clone(), None, None


class ReplayedNetwork(nn.Module):
    """The same function as `network`, in recorded passes where that is possible and as it is everywhere else.

    Recorded are float32 batches on a GPU, up to `MOST_PIXELS`, outside of autocast, with or without their gradient,
    which can be differentiated once. A recording is compared with the network before it is used. Where a pass cannot be
    recorded, a warning says so once. Where memory runs out, all recordings are given up for it.

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
        #: Images of the largest batch that memory suffices to record.
        self._most = BATCH_SIZES[-1]
        self._with_rules = [layer for layer in network.modules() if hasattr(layer, "gradient_rule")]
        _all.add(self)

    def __getstate__(self) -> dict[str, Any]:
        # Of copies, here and in other processes: recordings hold the addresses of these weights.
        return {**self.__dict__, "_recordings": {}, "_pool": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _all.add(self)

    def _apply(self, *arguments: Any, **options: Any) -> ReplayedNetwork:
        # Recordings hold the addresses of weights, which may move now.
        self._recordings.clear()
        return super()._apply(*arguments, **options)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        recording = self._find_recording(images) if self._can_replay(images) else None
        if recording is None:
            return self._run_as_it_is(images)
        if images.requires_grad and torch.is_grad_enabled():
            return _Replay.apply(images, self, recording)
        return self.run_forward(recording, images)[0]

    def _run_as_it_is(self, images: torch.Tensor) -> torch.Tensor:
        try:
            return self.network(images)
        except torch.OutOfMemoryError:
            if not forget_recordings():
                raise
        # Outside of the handler, whose frames hold what filled the memory.
        return self.network(images)

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
            and (count := _filled_up(len(images))) <= self._most
            and count * images.shape[2] * images.shape[3] <= MOST_PIXELS
            and not self.network.training
            and not torch.is_autocast_enabled(images.device.type)
            and all(layer.gradient_rule is None for layer in self._with_rules)
            and not (images.is_cuda and torch.cuda.is_current_stream_capturing())
            and not torch.compiler.is_compiling()
        )

    def _find_recording(self, images: torch.Tensor) -> Recording | None:
        needs_gradient = images.requires_grad and torch.is_grad_enabled()
        # The settings and the layers' backends decide which kernels a pass runs.
        backends = tuple(layer.backend for layer in self._with_rules)
        key = (_filled_up(len(images)), images.shape[1:], images.device, needs_gradient, float32_settings(), backends)
        if key not in self._recordings:
            found = self._record_anew(images, needs_gradient)
            if found is None:
                return None
            self._recordings[key] = found
        return self._recordings[key]

    def _record_anew(self, images: torch.Tensor, needs_gradient: bool) -> Recording | None:
        """A recording, or None where there is none to be had, or no memory for it beside what must go on."""
        self.turn += 1
        if self._pool is None and images.is_cuda:
            self._pool = torch.cuda.graph_pool_handle()
        # Not zeros, for which much that is wrong would be right.
        generator = torch.Generator(images.device).manual_seed(0)
        shape = _filled_up(len(images)), *images.shape[1:]
        on_device = torch.cuda.device(images.device) if images.is_cuda else nullcontext()
        try:
            # Whatever mode the caller is in, a recording serves all.
            with on_device, torch.inference_mode(False), torch.set_grad_enabled(needs_gradient):
                example = torch.rand(shape, device=images.device, generator=generator)
                recording = self._record(self.network, example, needs_gradient, self._pool)
                self._compare(recording, example, needs_gradient)
            return recording
        except RuntimeError as error:
            reason, is_memory = explain_in_brief(error), is_out_of_memory(error)
        # Outside of the handler, whose frames hold what a recording was made of.
        if is_memory:
            self._most = shape[0] - 1
            forget_recordings()
        else:
            self._gave_up = True
            self._recordings.clear()
            _log.warning("passes cannot be recorded on %s, and take longer so: %s", images.device, reason)
        return None

    def _compare(self, recording: Recording, example: torch.Tensor, needs_gradient: bool) -> None:
        """RuntimeError where a recording does other than the network."""
        images = example.clone().requires_grad_(needs_gradient)
        expected = [self.network(images)]
        found = [self.run_forward(recording, images)[0]]
        if needs_gradient:
            weights = torch.linspace(-1, 1, expected[0].numel(), device=images.device).view_as(expected[0])
            expected += torch.autograd.grad(expected[0], images, weights)
            recording.grad_logits.copy_(weights)
            recording.backward()
            found.append(recording.grad_images.clone())
        for ours, theirs in zip(found, expected, strict=True):
            # Written so that NaN is a difference, but for a network that gives nothing else.
            if theirs.isfinite().all() and not (ours - theirs).abs().max() <= TOLERANCE * theirs.abs().max():
                raise RuntimeError("a recorded pass gives other numbers than the network")


#: All that may hold memory for recordings.
_all: weakref.WeakSet[ReplayedNetwork] = weakref.WeakSet()


def forget_recordings() -> bool:
    """Gives the memory of all recordings back; whether there were any. They are made anew when they are next wanted."""
    found = [network for network in _all if network._recordings]
    for network in found:
        network._recordings.clear()
        network.turn += 1
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    return bool(found)


def _filled_up(count: int) -> int:
    return next(size for size in BATCH_SIZES if size >= count)


def replayed(network: nn.Module) -> nn.Module:
    """`network` with recorded passes where it is one of ours on a GPU, else as it is.

    Networks of other people are not known to do the same in every pass, nor to treat each image by itself.
    """
    if isinstance(network, ResidualNetwork) and next(network.parameters()).is_cuda:
        return ReplayedNetwork(network)
    return network
