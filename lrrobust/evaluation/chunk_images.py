"""What is evaluated, and the part of it that is worked on at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from lrrobust.evaluation.chunks import Chunk


class Images(Protocol):
    """What is evaluated; `lrrobust.data.evaluation_set.EvaluationSet` is one."""

    indices: Sequence[int]
    keys: Sequence[str]
    wnids: Sequence[str]
    labels: Sequence[int]

    def __len__(self) -> int: ...

    def load(self, positions: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]: ...


@dataclass(frozen=True)
class ChunkImages:
    images: torch.Tensor
    labels: torch.Tensor
    indices: Sequence[int]
    keys: Sequence[str]
    wnids: Sequence[str]

    @classmethod
    def load(cls, images: Images, chunk: Chunk) -> ChunkImages:
        positions = range(*chunk)
        pixels, labels = images.load(positions)
        return cls(
            pixels,
            labels,
            [images.indices[i] for i in positions],
            [images.keys[i] for i in positions],
            [images.wnids[i] for i in positions],
        )

    def to(self, device: torch.device) -> ChunkImages:
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))
