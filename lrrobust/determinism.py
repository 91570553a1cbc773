"""The same numbers from the same seeds: float32 that is float32, and random numbers that depend on nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def deterministic_float32() -> Iterator[None]:
    """No TF32 and no autotuned kernels on CUDA: the numbers are called float32, and a rerun must give the same."""
    cudnn = torch.backends.cudnn
    with _set([(cudnn, "deterministic", True), (cudnn, "benchmark", False), *_exact_products()]):
        yield


@contextmanager
def tf32_products() -> Iterator[None]:
    """Products of float32 matrices may take TF32 on CUDA, several times as fast: for what is an approximation anyway."""
    matmul = torch.backends.cuda.matmul
    value = {"allow_tf32": True, "fp32_precision": "tf32"}
    with _set([(place, name, value[name]) for place, name, _ in _exact_products() if place is matmul]):
        yield


@contextmanager
def _set(wanted: list[tuple[Any, str, object]]) -> Iterator[None]:
    """The settings have these values inside, and after it those of before."""
    # What is so already is left alone: several settings of torch's say the same, and not all can be put back through one.
    changed = [(place, name, value, getattr(place, name)) for place, name, value in wanted if getattr(place, name) != value]
    try:
        for place, name, value, _ in changed:
            setattr(place, name, value)
        yield
    finally:
        for place, name, _, before in changed:
            setattr(place, name, before)


def float32_settings() -> tuple[object, ...]:
    """What decides on CUDA which kernels compute in float32, and how exactly: equal where the same ones run."""
    cudnn = torch.backends.cudnn
    is_deterministic = torch.are_deterministic_algorithms_enabled()
    return is_deterministic, cudnn.deterministic, cudnn.benchmark, *(getattr(place, name) for place, name, _ in _exact_products())


def _exact_products() -> list[tuple[Any, str, object]]:
    """What is to be set where, for convolutions and products of matrices in float32.

    torch 2.9 and newer have a second set of settings, and refuse to read the first where a program has used the second.
    """
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    try:
        cudnn.allow_tf32, matmul.allow_tf32  # noqa: B018 - whether they can be read
    except RuntimeError:
        return [(kind, "fp32_precision", "ieee") for kind in (cudnn.conv, cudnn.rnn, matmul)]
    return [(cudnn, "allow_tf32", False), (matmul, "allow_tf32", False)]


@contextmanager
def seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Torch's global generators start at `seed` inside, and are put back afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
