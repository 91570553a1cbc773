"""Batch normalisation over the whole batch, also where it is spread over several processes.

With statistics of each process alone, the loss curve would depend on the number of processes. torch's SyncBatchNorm
does the same on GPUs only; this one does it wherever processes can add tensors.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn


class _MeanOverProcesses(torch.autograd.Function):
    """The mean of a tensor over all processes.

    Every process's result depends on every process's tensor, so a gradient is the mean of all processes' gradients:
    of the sum of all their losses, as `DistributedDataParallel` expects before it takes the mean.
    """

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        return _mean(value)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return _mean(gradient)


def _mean(value: torch.Tensor) -> torch.Tensor:
    total = value.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total / dist.get_world_size()


class SharedBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` whose training statistics are those of all processes' images together.

    Parameters, buffers and evaluation are those of `nn.BatchNorm2d`. All processes hold equally many values.
    """

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(features)
        # float32 sums whatever the features are, as in torch's own. Two rounds: E[x^2] - E[x]^2 cancels.
        exact = features.float()
        mean = _MeanOverProcesses.apply(exact.mean((0, 2, 3)))
        centred = exact - mean.view(1, -1, 1, 1)
        variance = _MeanOverProcesses.apply(centred.square().mean((0, 2, 3)))
        with torch.no_grad():
            count = exact.numel() // exact.shape[1] * dist.get_world_size()
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        normal = torch.addcmul(self.bias.view(1, -1, 1, 1), centred, scale.view(1, -1, 1, 1))
        return normal.to(features.dtype)


def share_batch_statistics(network: nn.Module) -> None:
    """Replaces every `nn.BatchNorm2d` of a network by a `SharedBatchNorm2d` with the same parameters and buffers."""
    for parent in list(network.modules()):
        for name, norm in list(parent.named_children()):
            if type(norm) is nn.BatchNorm2d:
                shared = SharedBatchNorm2d(norm.num_features, norm.eps, norm.momentum, device="meta")
                for key, tensor in norm.named_parameters():
                    setattr(shared, key, tensor)
                for key, tensor in norm.named_buffers():
                    setattr(shared, key, tensor)
                setattr(parent, name, shared.train(norm.training))
