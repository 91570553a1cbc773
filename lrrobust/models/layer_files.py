"""Which files define the layers of a network: what a user's model computes, beside its parameters."""

from __future__ import annotations

import sys
from pathlib import Path

from torch import nn

#: Packages whose versions runs record, wherever they are installed.
_KNOWN_BY_VERSION = ("lrrobust", "torch", "torchvision", "timm")

#: Folders of installed packages; a virtual environment may lie beside the user's files.
_INSTALLED = {"site-packages", "dist-packages"}


def files_of_layers(network: nn.Module, folder: Path | None = None) -> tuple[Path, ...]:
    """Python files, absolute, that define the classes of a network's layers, as far as their modules are imported.

    Args:
        network: of any structure.
        folder: only files in it or below it count; None: all but those of installed packages.
    """
    root, found = None if folder is None else folder.resolve(), set()
    for name in {base.__module__ for kind in {*map(type, network.modules())} for base in kind.__mro__}:
        file = getattr(sys.modules.get(name), "__file__", None)
        if not file or not file.endswith(".py") or name.partition(".")[0] in _KNOWN_BY_VERSION:
            continue
        path = Path(file).resolve()
        if root is not None and not path.is_relative_to(root):
            continue
        below = path if root is None else path.relative_to(root)
        if _INSTALLED.isdisjoint(below.parts):
            found.add(path)
    return tuple(sorted(found))
