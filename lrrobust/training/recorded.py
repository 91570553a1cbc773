"""Training passes of a network recorded on a GPU and replayed, forward and backward each as one launch."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import nn

from lrrobust.out_of_memory import explain_in_brief

_log = logging.getLogger(__name__)

#: Images of one shape to logits whose gradient reaches the parameters.
Passes = Callable[[torch.Tensor], torch.Tensor]


class RecordedPasses:
    """A network's passes in training mode, recorded for one shape of batch after the other.

    The thousands of kernels of a step take a processor longer to launch than a large GPU to run. Nothing of what is
    computed is another: weights and statistics are read and written where they lie. Where passes cannot be recorded, or memory
    does not suffice to, a warning says so once.

    Args:
        network: on a GPU; it does the same in every pass, and keeps its parameters and buffers where they are.
        precision: "bf16" runs it under autocast.
    """

    def __init__(self, network: nn.Module, precision: str) -> None:
        self._network = network
        self._precision = precision
        #: One alone: image sizes of a training follow one another, and a recording holds the memory of a step.
        self._shape: torch.Size | None = None
        self._recorded: Passes | None = None
        self._gave_up = False
        # Recording leaves the last node of every parameter on a stream of its own, of which newer versions of torch warn.
        if (warn := getattr(torch.autograd.graph, "set_warn_on_accumulate_grad_stream_mismatch", None)) is not None:
            warn(False)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Logits, which the next call overwrites."""
        if images.shape != self._shape and not self._gave_up:
            self._recorded = None
            self._recorded = self._record(images)
            self._shape = images.shape
        with self._autocast(images):
            return (self._recorded or self._network)(images)

    def _autocast(self, images: torch.Tensor) -> torch.autocast:
        # What autocast remembers would belong to one pass and be replayed in all.
        return torch.autocast(images.device.type, torch.bfloat16, enabled=self._precision == "bf16", cache_enabled=False)

    def _record(self, images: torch.Tensor) -> Passes | None:
        network = self._network
        # Recording begins with passes that count for nothing, but move the statistics of batch normalisation.
        buffers = [buffer.clone() for buffer in network.buffers()]
        stream = torch.cuda.current_stream(images.device) if images.is_cuda else None
        on_device = torch.cuda.device(images.device) if images.is_cuda else nullcontext()
        try:
            with on_device, self._autocast(images):
                torch.cuda.make_graphed_callables(network, (images.clone(memory_format=torch.preserve_format),))
            # It takes the place of the network's own `forward`, where it would be in the way of other shapes and of evaluation.
            return network.forward
        except RuntimeError as error:
            self._gave_up = True
            _log.warning(
                "training passes cannot be recorded on %s, and take longer so: %s", images.device, explain_in_brief(error)
            )
            return None
        finally:
            network.__dict__.pop("forward", None)
            if stream is not None:  # which a recording that fails leaves another
                torch.cuda.set_stream(stream)
            with torch.no_grad():
                for buffer, value in zip(network.buffers(), buffers, strict=True):
                    buffer.copy_(value)
