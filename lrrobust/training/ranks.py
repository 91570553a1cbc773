"""Several processes that train one network: who they are, and what they tell each other."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from lrrobust.errors import ConfigError


@dataclass(frozen=True)
class Ranks:
    """This process among `count` that do the same steps, each with its part of every batch.

    A single process is rank 0 of 1, and nothing is sent.
    """

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and reports."""
        return self.rank == 0

    def rows(self, batch_size: int) -> slice:
        """This process's part of a batch; the parts have equal sizes.

        Raises:
            ConfigError: the batch cannot be divided into equal parts of whole pairs, which mixing needs.
        """
        part = batch_size // self.count
        if part * self.count != batch_size or (self.count > 1 and part % 2):
            raise ConfigError(
                f"batch_size {batch_size} cannot be divided among {self.count} processes into equal, even parts: "
                f"make it a multiple of {2 * self.count}, or start fewer processes"
            )
        return slice(self.rank * part, (self.rank + 1) * part)

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """The mean of a tensor over all processes, the same bits in each."""
        if self.count == 1:
            return value
        total = value.clone()
        dist.all_reduce(total)
        return total / self.count

    def total(self, number: int, device: torch.device) -> int:
        """The sum of a number over all processes."""
        if self.count == 1:
            return number
        sums = torch.tensor([number], device=device)
        dist.all_reduce(sums)
        return int(sums.item())


def is_left_alone(error: RuntimeError) -> bool:
    """Whether gloo or nccl says that another process has ended."""
    return any(sign in str(error) for sign in ("closed by peer", "reset by peer", "remote process exited"))


@contextmanager
def joined_ranks(device: torch.device) -> Iterator[tuple[Ranks, torch.device]]:
    """Joins the processes that torchrun started together with this one; alone where it started none.

    Args:
        device: "cuda" without a number becomes this process's own GPU. The processes talk through nccl on GPUs
            and through gloo on the CPU.

    Raises:
        ConfigError: the processes cannot find each other, or there are fewer GPUs than processes.
    """
    # torchrun sets these; see https://pytorch.org/docs/stable/elastic/run.html
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Ranks(), device
        return
    if device.type == "cuda":
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise ConfigError(
                f"process {local} of this machine has no GPU, there are {torch.cuda.device_count()}: "
                "start as many processes as there are GPUs"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"the training processes cannot join ({reason}): start them with torchrun") from None
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size()), device
    finally:
        dist.destroy_process_group()
