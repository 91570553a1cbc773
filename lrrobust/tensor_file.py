"""Files that torch saved, read as tensors alone and only where they are whole."""

from __future__ import annotations

import zipfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import torch

#: What checkpoints hold beside tensors, such as options and accuracies; making it runs no code of the file.
_PLAIN = [
    Namespace,
    np.dtype,
    *{type(np.dtype(kind)) for kind in "efdilq?"},
    *((np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]


def load_tensors(path: Path) -> Any:
    """What `torch.save` wrote, on the CPU; no code in the file runs.

    Raises:
        ValueError: a checksum in the file says that it is damaged, or it is TorchScript, a folder, a pipe or a device.
        Exception: of many types, where it is none of torch's.
    """
    # A pipe would have us wait.
    if path.exists() and not path.is_file():
        raise ValueError("it is not a regular file")
    # torch compares no checksums: one flipped bit, and the file holds other weights.
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            # torch would warn, and advise to run the code in it.
            if any(name.endswith("/constants.pkl") for name in names):
                raise ValueError("it is a TorchScript archive: return torch.jit.load of it from a file.py:factory")
            damaged = [name for name in names if not _is_whole(archive, name)]
        # Where all are wrong, torch was told to write none.
        if damaged and len(damaged) < len(names):
            raise ValueError(f"{damaged[0]} in it is damaged, as its checksum shows")
    # On leaving torch forgets what it is given here, also what a caller allowed before.
    with torch.serialization.safe_globals([each for each in _PLAIN if each not in torch.serialization.get_safe_globals()]):
        return torch.load(path, map_location="cpu", weights_only=True)


def _is_whole(archive: zipfile.ZipFile, name: str) -> bool:
    try:
        with archive.open(name) as file:
            while file.read(1 << 20):
                pass
    except zipfile.BadZipFile:
        return False
    return True
