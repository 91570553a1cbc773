"""What computes a network, beside its parameters: the files that define its layers, or their code as it is loaded."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FunctionType
from typing import Any

from torch import nn

from lrrobust.loaded_code import code_of

#: Packages whose versions runs record, wherever they are installed.
_KNOWN_BY_VERSION = ("lrrobust", "torch", "torchvision", "timm")


def files_of_layers(network: nn.Module, folder: Path) -> tuple[Path, ...]:
    """Python files in a folder, or below it, that define the classes of a network's layers, while their modules are known."""
    root, found = folder.resolve(), set()
    for kind in _classes(network):
        file = getattr(sys.modules.get(kind.__module__), "__file__", None)
        if not file or not file.endswith(".py"):
            continue
        path = Path(file).resolve()
        # A virtual environment may lie in the folder.
        if path.is_relative_to(root) and "site-packages" not in path.relative_to(root).parts:
            found.add(path)
    return tuple(sorted(found))


def code_of_layers(network: nn.Module) -> bytes:
    """The code of a network's layers as it is loaded, and what else decides what they compute but parameters and buffers.

    That is the bytecode of the methods of their classes, which no comment changes and a cell of a notebook has too, and
    attributes that are numbers, texts or functions. What methods call otherwise is not seen.
    """
    said = [
        f"{kind.__module__}.{kind.__qualname__}.{name} {code_of(method)}"
        for kind in sorted(_classes(network), key=lambda kind: (kind.__module__, kind.__qualname__))
        for name, function in sorted(vars(kind).items())
        if (method := _unwrapped(function)) is not None
    ]
    for place, module in network.named_modules():
        for name, value in sorted(vars(module).items()):
            if isinstance(value, FunctionType):
                said.append(f"{place}.{name} {code_of(value)}")
            elif name != "training" and isinstance(value, (bool, int, float, str, tuple, list, type(None))):
                said.append(f"{place}.{name} {value!r}")
    # Without addresses of objects, which differ from process to process.
    return re.sub(r"0x[0-9a-f]+", "", "\n".join(said)).encode()


def _classes(network: nn.Module) -> Iterator[type]:
    """Of the layers and of what they are derived from, but for those of packages that are known by their version."""
    for kind in {base for of_layer in {*map(type, network.modules())} for base in of_layer.__mro__}:
        if kind.__module__.partition(".")[0] not in (*_KNOWN_BY_VERSION, "builtins"):
            yield kind


def _unwrapped(attribute: Any) -> Callable[..., Any] | None:
    if isinstance(attribute, property):
        attribute = attribute.fget
    attribute = getattr(attribute, "__func__", attribute)
    attribute = getattr(attribute, "__wrapped__", attribute)
    return attribute if isinstance(attribute, FunctionType) else None
