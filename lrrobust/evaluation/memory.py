"""What does not fit into memory is done again in smaller batches."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import torch

from lrrobust.errors import ModelError
from lrrobust.out_of_memory import explain_in_brief, is_out_of_memory

T = TypeVar("T")

_log = logging.getLogger(__name__)


class FittingBatch:
    """The size of batches, halved whenever memory runs out; it does not grow again.

    Args:
        size: images at once, to begin with.
        device: for the message.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.size = size
        self._wanted = size
        self._device = device

    def run(self, work: Callable[[int], T]) -> T:
        """`work` with as many images at once as fit; begun anew after each failure, so it must start from its seeds.

        Raises:
            ModelError: one image at a time does not fit either.
        """
        while True:
            # Nothing of a failure may outlive it: its frames hold the tensors that filled the memory.
            reason = None
            try:
                return work(self.size)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                reason = explain_in_brief(error)
            if self.size == 1:
                raise ModelError(
                    f"out of memory on {self._device} with a single image: use smaller images, or another device ({reason})"
                )
            if self.size == self._wanted:
                _log.warning(
                    "out of memory on %s with %d images at once: done again, and gone on with, in batches of half the size, "
                    "halved again where needed; a smaller --batch-size is faster",
                    self._device,
                    self.size,
                )
            self.size = (self.size + 1) // 2
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
