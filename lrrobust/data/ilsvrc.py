"""Labels of ImageNet's validation images, which are published apart: in a development kit, and by Kaggle in a table."""

from __future__ import annotations

import io
import posixpath
import re
from collections.abc import Sequence
from pathlib import Path

from lrrobust.data.file_trees import Spool, open_tree
from lrrobust.errors import DataError

#: Name of a validation image; the group is its number, counted from 1.
FLAT_NAME = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")

#: The same in the archives of the Hugging Face hub; the group is its class.
HUB_NAME = re.compile(r"ILSVRC2012_val_\d{8}_(n\d{8})\.JPEG")

#: Name of a training image, on the hub with its class once more; the group is its class.
TRAIN_NAME = re.compile(r"(n\d{8})_\d+(?:_\1)?\.JPEG")

#: How names of any split begin or end, without the suffix of the file; the group that is there is the class.
_WNID_IN_NAME = re.compile(r"(?:^|/)(n\d{8})[_/]|_(n\d{8})$")

_DEVKIT_NAMES = ("ILSVRC2012_devkit_t12.tar.gz", "ILSVRC2012_devkit_t12")
_GROUND_TRUTH = "data/ILSVRC2012_validation_ground_truth.txt"
_META = "data/meta.mat"

_TABLE = "LOC_val_solution.csv"
_TABLE_HEAD = "ImageId,PredictionString"

#: The class, and the box of each object.
_TABLE_LINE = re.compile(r"ILSVRC2012_val_(\d{8}),(n\d{8})(?: -?\d+){4}(?: \2(?: -?\d+){4})* ?")

#: Kaggle's archive holds the table beside ILSVRC/Data/CLS-LOC/val.
_TABLE_ABOVE = 4

#: Ids beyond these are inner nodes of the WordNet tree, not classes.
_CLASS_COUNT = 1000


def load_validation_wnids(images_path: Path, spool: Spool) -> dict[int, str]:
    """Class of validation image 1, 2, ... from the development kit or Kaggle's table near the images.

    Args:
        images_path: the archive or folder of the images; both are looked for beside it, and also
            in it where it is a folder, the table in folders further up, too.
        spool: takes what is read of a compressed kit.

    Raises:
        DataError: neither is there, or what is there is not as published.
    """
    folders = [images_path.absolute().parent] + ([images_path] if images_path.is_dir() else [])
    candidates = [folder / name for folder in folders for name in _DEVKIT_NAMES]
    devkit = next((path for path in candidates if path.exists()), None)
    if devkit is None:
        tables = [folder / _TABLE for folder in (*folders, *images_path.absolute().parents[1:_TABLE_ABOVE])]
        if table := next(filter(Path.is_file, tables), None):
            return _read_table(table)
        raise DataError(
            f"{images_path} holds ImageNet validation images without classes; put Kaggle's {_TABLE} beside it, or "
            f"{_DEVKIT_NAMES[0]} (the ILSVRC2012 development kit) at {candidates[0]}"
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
        return {number: wnid_of[int(line)] for number, line in enumerate(content[_GROUND_TRUTH].split(), start=1)}
    except (ValueError, KeyError) as error:
        raise DataError(
            f"{devkit}: expected ids from 1 to {_CLASS_COUNT} in {_GROUND_TRUTH}, found {error}; download the kit anew"
        ) from error


def wnids_in(paths: Sequence[str], labels: Sequence[str]) -> list[str] | None:
    """WordNet ids that images are called after, where all are, and each class after one.

    Args:
        paths: of the images, as they were called before they were packed.
        labels: what else is said of their classes: a number, or common words, several of which are the same in ImageNet.
    """
    found = [_WNID_IN_NAME.search(posixpath.splitext(path)[0]) for path in paths]
    if not found or not all(found):
        return None
    wnids = [match[1] or match[2] for match in found]
    pairs = set(zip(labels, wnids, strict=True))
    return wnids if len(pairs) == len(set(labels)) == len(set(wnids)) else None


def _read_table(path: Path) -> dict[int, str]:
    try:
        head, *lines = path.read_text(encoding="utf-8-sig").splitlines() or [""]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    wnid_of: dict[int, str] = {}
    for number, line in enumerate([head, *lines], start=1):
        match = _TABLE_LINE.fullmatch(line)
        if (match is None or int(match[1]) in wnid_of) if number > 1 else line != _TABLE_HEAD:
            raise DataError(
                f"{path}, line {number}: expected {_TABLE_HEAD}, one class an image and each image once, found {line[:60]!r}; "
                "download it anew"
            )
        if match is not None:
            wnid_of[int(match[1])] = match[2]
    return wnid_of


def _read_synsets(meta: bytes, devkit: Path) -> dict[int, str]:
    from scipy.io import loadmat  # a second to import, and needed for this file alone

    try:
        synsets = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        wnid_of = {int(id_): str(wnid) for id_, wnid in zip(synsets["ILSVRC2012_ID"], synsets["WNID"])}
    except Exception as error:  # the reader raises whatever strikes it on damaged bytes
        raise DataError(f"{devkit}: cannot read {_META} ({type(error).__name__}: {error}); download the kit anew") from error
    return {id_: wnid for id_, wnid in wnid_of.items() if 1 <= id_ <= _CLASS_COUNT}
