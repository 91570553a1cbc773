"""The unit of work: a fixed range of images.

Batches, resuming and sharing among processes all follow the chunk, and random numbers the image, so
neither an interruption nor the number of processes changes what is drawn.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

#: Images whose results are stored together. Those of a chunk that still stand keep the batch full.
DEFAULT_CHUNK_SIZE = 128

#: Images passed through the model at once; 32 of 224 x 224 take about 4 GB with ResNet-50 in float32.
DEFAULT_BATCH_SIZE = 32


class Chunk(NamedTuple):
    """Images `start` to `stop` - 1 of the evaluated subset."""

    start: int
    stop: int


def plan_chunks(n: int, chunk_size: int) -> list[Chunk]:
    """Cuts n images into chunks.

    >>> plan_chunks(5, 2)
    [Chunk(start=0, stop=2), Chunk(start=2, stop=4), Chunk(start=4, stop=5)]
    """
    if n < 1 or chunk_size < 1:
        raise ValueError(f"expected at least one image and a positive chunk size, got {n=}, {chunk_size=}")
    return [Chunk(start, min(start + chunk_size, n)) for start in range(0, n, chunk_size)]


def chunk_seed(fingerprint: str, attack: str, start: int) -> int:
    """Seed of what a model draws itself while one attack runs on one chunk, below 2**63."""
    return _seed(f"{fingerprint} {attack} {start}")


def start_seed(fingerprint: str, attack: str, key: str, eps: float, restart: int) -> int:
    """Seed of one image's random start, whatever images share its chunk; below 2**63."""
    return _seed(f"{fingerprint} {attack} {eps!r} {restart} {key}")


def _seed(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
