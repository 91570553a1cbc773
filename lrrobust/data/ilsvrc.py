"""Labels of ImageNet's validation images, which are published apart from them in a development kit."""

from __future__ import annotations

import io
import re
from pathlib import Path

from lrrobust.data.file_trees import Spool, open_tree
from lrrobust.errors import DataError

#: Name of a validation image; the group is its number, counted from 1.
FLAT_NAME = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")

#: The same in the archives of the Hugging Face hub; the group is its class.
HUB_NAME = re.compile(r"ILSVRC2012_val_\d{8}_(n\d{8})\.JPEG")

#: How names of any split end there, without the suffix of the file; the group is the class.
WNID_IN_NAME = re.compile(r"_(n\d{8})$")

_DEVKIT_NAMES = ("ILSVRC2012_devkit_t12.tar.gz", "ILSVRC2012_devkit_t12")
_GROUND_TRUTH = "data/ILSVRC2012_validation_ground_truth.txt"
_META = "data/meta.mat"

#: Ids beyond these are inner nodes of the WordNet tree, not classes.
_CLASS_COUNT = 1000


def load_validation_wnids(images_path: Path, spool: Spool) -> tuple[str, ...]:
    """Class of validation image 1, 2, ... from the development kit near the images.

    Args:
        images_path: the archive or folder of the images; the kit is looked for beside it, and also
            in it where it is a folder.
        spool: takes what is read of a compressed kit.

    Raises:
        DataError: the kit is not there, or its files are not as published.
    """
    folders = [images_path.absolute().parent] + ([images_path] if images_path.is_dir() else [])
    candidates = [folder / name for folder in folders for name in _DEVKIT_NAMES]
    devkit = next((path for path in candidates if path.exists()), None)
    if devkit is None:
        raise DataError(
            f"{images_path} holds ImageNet validation images without classes; "
            f"put {_DEVKIT_NAMES[0]} (the ILSVRC2012 development kit) at {candidates[0]}"
        )
    tree = open_tree(devkit, (".txt", ".mat"), spool)
    content = {}
    for wanted in (_GROUND_TRUTH, _META):
        name = next((name for name in tree.names if f"/{name}".endswith(f"/{wanted}")), None)
        if name is None:
            raise DataError(f"{devkit}: expected a file {wanted} in it, found none; download the kit anew")
        content[wanted] = tree.read(name)
    wnid_of = _read_synsets(content[_META], devkit)
    try:
        return tuple(wnid_of[int(line)] for line in content[_GROUND_TRUTH].split())
    except (ValueError, KeyError) as error:
        raise DataError(
            f"{devkit}: expected ids from 1 to {_CLASS_COUNT} in {_GROUND_TRUTH}, found {error}; download the kit anew"
        ) from error


def _read_synsets(meta: bytes, devkit: Path) -> dict[int, str]:
    from scipy.io import loadmat  # a second to import, and needed for this file alone

    try:
        synsets = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        wnid_of = {int(id_): str(wnid) for id_, wnid in zip(synsets["ILSVRC2012_ID"], synsets["WNID"])}
    except Exception as error:  # the reader raises whatever strikes it on damaged bytes
        raise DataError(
            f"{devkit}: cannot read {_META} ({type(error).__name__}: {error}); download the kit anew"
        ) from error
    return {id_: wnid for id_, wnid in wnid_of.items() if 1 <= id_ <= _CLASS_COUNT}
