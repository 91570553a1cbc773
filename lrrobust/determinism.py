"""The same numbers from the same seeds: float32 that is float32, and random numbers that depend on nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch


@contextmanager
def deterministic_float32() -> Iterator[None]:
    """Float32 that is float32, whatever anybody in this process has asked torch for, and the same at every rerun.

    No TF32 and no autotuned kernels on CUDA, no bfloat16 in products of float32 on the CPU, no autocast around; a model's
    own autocast, inside its forward pass, stays.
    """
    cudnn = torch.backends.cudnn
    with _set([(cudnn, "deterministic", True), (cudnn, "benchmark", False), *_exact_products()]), ExitStack() as stack:
        for device_type in filter(torch.is_autocast_enabled, _AUTOCAST_TYPES):
            stack.enter_context(torch.autocast(device_type, enabled=False))
        yield


@contextmanager
def arithmetic_kept() -> Iterator[None]:
    """What code inside asks torch for, for the whole process, is taken back: precision, autocast, default device."""
    # By both sets of settings, as code inside may be the first to use the newer one.
    new, every = (
        [(place, name, getattr(place, name)) for place, name, _ in each] for each in (_new_settings(), _exact_products())
    )
    autocasts = {device_type: torch.is_autocast_enabled(device_type) for device_type in _AUTOCAST_TYPES}
    # Not `torch.get_default_device`, which torch 2.6 has fail once a default was taken back.
    device = torch.empty(0).device
    try:
        yield
    finally:
        if not _reads_old_settings():
            _put(new)
        if _reads_old_settings():
            _put([*every, *new])
        for device_type, is_enabled in autocasts.items():
            torch.set_autocast_enabled(device_type, is_enabled)
        # A named default, of the CPU too, is looked up at every call, and torch's compiler stumbles over it.
        if torch.empty(0).device != device:
            torch.set_default_device(None if device.type == "cpu" else device)


@contextmanager
def tf32_products() -> Iterator[None]:
    """Products of float32 matrices may take TF32 on CUDA, several times as fast: for what is an approximation anyway."""
    matmul = torch.backends.cuda.matmul
    with _set([(matmul, "allow_tf32", True) if _reads_old_settings() else (matmul, "fp32_precision", "tf32")]):
        yield


@contextmanager
def _set(wanted: list[tuple[Any, str, object]]) -> Iterator[None]:
    """The settings have these values inside, and after it those of before."""
    before = [(place, name, getattr(place, name)) for place, name, _ in wanted]
    try:
        _put(wanted)
        yield
    finally:
        # Code inside may have changed what was left alone.
        _put(before)


def _put(wanted: list[tuple[Any, str, object]]) -> None:
    # What is so already is left alone: several settings of torch's say the same, and not all can be put back through one.
    for place, name, value in wanted:
        if getattr(place, name) != value:
            setattr(place, name, value)


def float32_settings() -> tuple[object, ...]:
    """What decides which kernels compute in float32, and how exactly: equal where the same ones run."""
    cudnn = torch.backends.cudnn
    is_deterministic = torch.are_deterministic_algorithms_enabled()
    return (
        is_deterministic,
        cudnn.deterministic,
        cudnn.benchmark,
        *(getattr(place, name) for place, name, _ in _exact_products()),
    )


def _exact_products() -> list[tuple[Any, str, object]]:
    """What is to be set where, for convolutions and products of matrices in float32, on CUDA and on processors.

    Processors with bfloat16 instructions compute float32 products by them where they are asked to.
    """
    if not _reads_old_settings():
        return _new_settings()
    # The precision of products is one setting for all devices: set through `allow_tf32` alone, "medium" is not put back. It
    # sets that of processors as well, which comes after it, and is put back after it.
    old = [(torch.backends.cudnn, "allow_tf32", False), (_FloatProducts, "precision", "highest")]
    return [*old, *_new_settings()[_ON_PROCESSORS]]


def _new_settings() -> list[tuple[Any, str, object]]:
    cudnn, matmul, mkldnn = torch.backends.cudnn, torch.backends.cuda.matmul, torch.backends.mkldnn
    if not hasattr(mkldnn, "matmul"):
        return []
    kinds = (cudnn.conv, cudnn.rnn, matmul, mkldnn.matmul, mkldnn.conv, mkldnn.rnn)
    return [(kind, "fp32_precision", "ieee") for kind in kinds]


#: Those of `_new_settings` that are not for CUDA.
_ON_PROCESSORS = slice(3, None)


def _reads_old_settings() -> bool:
    """torch 2.9 and newer have a second set of settings, and refuse to read the first where a program has used the second."""
    try:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32, _FloatProducts.precision  # noqa: B018
    except RuntimeError:
        return False
    return True


class _AsSetting:
    """`torch.set_float32_matmul_precision` as an attribute."""

    @property
    def precision(self) -> str:
        return torch.get_float32_matmul_precision()

    @precision.setter
    def precision(self, value: str) -> None:
        torch.set_float32_matmul_precision(value)


_FloatProducts = _AsSetting()

_AUTOCAST_TYPES = ("cpu", "cuda")


@contextmanager
def seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Torch's global generators start at `seed` inside, and are put back afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
