"""Training passes of a network recorded on a GPU and replayed, forward and backward each as one launch."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import nn

_log = logging.getLogger(__name__)

#: Images of one shape to logits whose gradient reaches the parameters.
Passes = Callable[[torch.Tensor], torch.Tensor]


class RecordedPasses:
    """A network's passes in training mode, recorded once for every shape of batch.

    The thousands of kernels of a step take a processor longer to launch than a large GPU to run. Nothing of what is
    computed is another: weights and statistics are read and written where they lie. Where passes cannot be recorded, a
    warning says so once.

    Args:
        network: on a GPU; it does the same in every pass, and keeps its parameters and buffers where they are.
        precision: "bf16" runs it under autocast.
    """

    def __init__(self, network: nn.Module, precision: str) -> None:
        self._network = network
        self._precision = precision
        self._by_shape: dict[torch.Size, Passes] = {}
        self._gave_up = False
        # Recording leaves the last node of every parameter on a stream of its own, of which newer versions of torch warn.
        if (warn := getattr(torch.autograd.graph, "set_warn_on_accumulate_grad_stream_mismatch", None)) is not None:
            warn(False)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Logits, which the next call overwrites."""
        if not self._gave_up and images.shape not in self._by_shape:
            self._record(images)
        passes = self._by_shape.get(images.shape, self._network)
        with self._autocast(images):
            return passes(images)

    def _autocast(self, images: torch.Tensor) -> torch.autocast:
        # What autocast remembers would belong to one pass and be replayed in all.
        return torch.autocast(images.device.type, torch.bfloat16, enabled=self._precision == "bf16", cache_enabled=False)

    def _record(self, images: torch.Tensor) -> None:
        network = self._network
        # Recording begins with passes that count for nothing, but move the statistics of batch normalisation.
        before = [buffer.clone() for buffer in network.buffers()]
        try:
            with self._autocast(images):
                torch.cuda.make_graphed_callables(network, (images.clone(memory_format=torch.preserve_format),))
            # It takes the place of the network's own `forward`, where it would be in the way of other shapes and of evaluation.
            self._by_shape[images.shape] = network.forward
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self._gave_up = True
            reason = " ".join(str(error).split())[:200]
            _log.warning("training passes cannot be recorded on %s, and take longer so: %s", images.device, reason)
        finally:
            network.__dict__.pop("forward", None)
            with torch.no_grad():
                for buffer, value in zip(network.buffers(), before, strict=True):
                    buffer.copy_(value)
