"""The one place that imports torchvision, also when its compiled operators do not fit torch.

torchvision's package registers shapes for its operators `nms` and `qnms` while it is imported, and
stops with "operator torchvision::nms does not exist" when its C++ extension could not be loaded,
as with a CPU build of torch beside a CUDA build of torchvision. Models and transforms need none of
these operators. Whoever imports something that imports torchvision in its turn (torchattacks, timm)
calls `import_torchvision` first.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from functools import cache
from types import ModuleType

import torch

#: The operators whose shapes torchvision registers without asking whether its extension was loaded.
_UNGUARDED_OPERATORS = ("nms", "qnms")


def import_torchvision() -> ModuleType:
    """Import torchvision and return it; calling again is free.

    torchvision's own operators are used wherever its extension loads. Where it does not, the two
    missing ones are declared without an implementation: torchvision imports, and calling them
    still fails, with torchvision's own explanation.

    Raises:
        ImportError: torchvision is not installed.
    """
    with warnings.catch_warnings():
        # Said when the extension that decodes images cannot be loaded; images are decoded by Pillow.
        warnings.filterwarnings("ignore", message="Failed to load", category=UserWarning)
        try:
            return importlib.import_module("torchvision")
        except RuntimeError:
            if all(hasattr(torch.ops.torchvision, name) for name in _UNGUARDED_OPERATORS):
                raise
        _declare_missing_operators()
        # The failed import left submodules behind that a second one would not bind to the package.
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        return importlib.import_module("torchvision")


@cache  # the declarations live as long as the library object, which the cache keeps
def _declare_missing_operators() -> torch.library.Library:
    """Declare, without implementation, those of the unguarded operators that do not exist."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in _UNGUARDED_OPERATORS:
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library
