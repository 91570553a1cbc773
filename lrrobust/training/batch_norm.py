"""Batch normalisation over the whole batch, also where it is spread over several processes.

With statistics of each process alone, the loss curve would depend on the number of processes. torch's SyncBatchNorm
does the same on GPUs only; this one does it wherever processes can add tensors.
"""

from __future__ import annotations

import torch
import torch.distributed.nn.functional as differentiable
from torch import nn


class SharedBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` whose training statistics are those of all processes' images together.

    Parameters, buffers and evaluation are those of `nn.BatchNorm2d`. All processes hold equally many values.
    """

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(features)
        # float32 sums whatever the features are, as in torch's own. Two rounds: E[x^2] - E[x]^2 cancels.
        exact = features.float()
        processes = torch.distributed.get_world_size()
        mean = differentiable.all_reduce(exact.mean((0, 2, 3))) / processes
        centred = exact - mean.view(1, -1, 1, 1)
        variance = differentiable.all_reduce(centred.square().mean((0, 2, 3))) / processes
        with torch.no_grad():
            count = exact.numel() // exact.shape[1] * processes
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
