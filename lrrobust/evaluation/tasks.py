"""What is to be done: every attack on every chunk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lrrobust.attacks.specs import AttackSpec
from lrrobust.evaluation.chunks import Chunk, plan_chunks


@dataclass(frozen=True)
class Task:
    """One attack, at all its eps, on one chunk: what one part of the results holds."""

    spec: AttackSpec
    chunk: Chunk

    @property
    def part(self) -> tuple[str, int, int]:
        return self.spec.name, self.chunk.start, self.chunk.stop

    @property
    def cost(self) -> int:
        """Upper bound of the forward passes, all images of the chunk added up."""
        spec, passes = self.spec, self.spec.max_forward_passes
        if spec.eot_iter > 1:
            # Of several draws all are made again for each gradient.
            passes = spec.eot_iter * (passes + spec.max_backward_passes)
        return passes * (self.chunk.stop - self.chunk.start)


def plan_tasks(specs: Sequence[AttackSpec], n: int, chunk_size: int) -> list[Task]:
    """All tasks, chunk by chunk, so that an interrupted run has every attack on its first images."""
    return [Task(spec, chunk) for chunk in plan_chunks(n, chunk_size) for spec in specs]
