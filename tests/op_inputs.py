"""Random inputs of the operation; found by every test, as pyproject.toml says."""

import torch

SIMILARITIES = ("squared_difference", "absolute_difference", "multiplication")


def make_inputs(batch, channels, height, width, kernel_size, stride=1, per_group=8, dtype=torch.float64, seed=0):
    """Query, key, value and geometry."""
    generator = torch.Generator().manual_seed(seed)
    groups = -(-channels // per_group)
    shapes = (
        (batch, groups, -(-height // stride), -(-width // stride)),
        (batch, groups, height, width),
        (batch, channels, height, width),
        (groups, kernel_size, kernel_size),
    )
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
