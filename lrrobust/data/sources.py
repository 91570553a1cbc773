"""From what a user writes to a data set: `open_dataset`."""

from __future__ import annotations

import difflib
import glob
import logging
import os
import posixpath
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from lrrobust.data.array_tree import ArrayTree, holds_classes, is_array
from lrrobust.data.avc_photos import open_photos
from lrrobust.data.cifar import CIFAR_SUFFIXES, CifarTree, find_batches
from lrrobust.data.class_lists import classes_by_number
from lrrobust.data.file_trees import FileTree, Spool, open_tree
from lrrobust.data.image_source import IMAGE_SUFFIXES, ImageSource
from lrrobust.data.label_tables import TABLE_SUFFIXES
from lrrobust.data.layouts import LAYOUT_SUFFIXES, SPLIT_FOLDERS, Labelling, describe_unread, label_files
from lrrobust.data.parquet_tree import SUFFIX, ParquetTree
from lrrobust.errors import DataError

__all__ = ["PHOTOS", "FileImages", "ImageSource", "open_dataset"]

_log = logging.getLogger(__name__)

#: The data set that needs no files of the user.
PHOTOS = "photos"


class TreeFile(NamedTuple):
    """A labelled image and where it lies; tuples of it sort by key."""

    key: str
    wnid: str
    name: str
    tree: FileTree


class FileImages(ImageSource):
    """Images in folders and archives.

    Args:
        name: what a report calls the data set.
        files: the images, in any order.
        ignored_count: how many files were passed over.
    """

    def __init__(self, name: str, files: Sequence[TreeFile], ignored_count: int) -> None:
        self._files = sorted(files, key=lambda file: file.key)
        keys = [file.key for file in self._files]
        super().__init__(name, keys, [file.wnid for file in self._files], ignored_count)
        self.is_fork_safe = all(tree.is_fork_safe for tree in {file.tree for file in self._files})

    def read_bytes(self, index: int) -> bytes:
        file = self._files[index]
        return file.tree.read(file.name)


def open_dataset(spec: str | Path, *class_lists: Sequence[str]) -> ImageSource:
    """Find the images of a data set; none is decoded yet.

    Args:
        spec: "photos" (500 labelled photos, fetched once), or paths of what the table in README names, separated by commas; a
            path may be a pattern, as in `train-*.tar.xz`. Where there are several splits `val` is read, of CIFAR `test`;
            `PATH#train` reads another, `PATH#COLUMN` takes classes from that column of a Parquet file, and `PATH#labels.csv`
            or `DIR/labels.csv` from that table. A Path object always means a file or folder, never "photos".
        class_lists: of each model all classes in label order: what the numbers 0, 1, ... mean where these are all
            the classes of the data set, which a warning says.

    Raises:
        DataError: nothing is there, it holds no labelled image, two images have the same key, an
            archive is damaged, or the photos cannot be fetched.
    """
    if spec == PHOTOS:
        if os.path.exists(PHOTOS):
            _log.warning("'%s' is the data set of that name, not what lies in ./%s: write ./%s to read that", *[PHOTOS] * 3)
        return open_photos()
    spool = Spool()
    names: list[str] = []
    files: list[TreeFile] = []
    ignored_count = 0
    said: set[str] = set()
    unread: Counter[str] = Counter()
    for part in _split_parts(str(spec)):
        pattern, split = _split_fragment(part)
        table = os.path.expanduser(pattern)
        if split is None and table.lower().endswith(TABLE_SUFFIXES) and os.path.isfile(table):
            # Which says the classes of the images below its folder.
            pattern, split = os.path.split(os.path.abspath(table))
        chosen_split = None
        path_of: dict[str, str] = {}
        paths = _expand(pattern)
        if len(paths) > 1:
            paths = [path for path in paths if not holds_classes(path)] or paths
        named = {"-".join(word for word in re.findall("[a-z]+", path.name.lower()) if word in SPLIT_FOLDERS) for path in paths}
        if len(named := sorted(named - {""})) > 1:
            raise DataError(f"data set {part!r} takes in {' and '.join(named)}: narrow the pattern to one")
        for path in paths:
            tree, labelling = _open_labelled(path, split, spool)
            chosen_split = chosen_split or (labelling.folder if labelling.is_choice else None)
            path_of[labelling.folder] = path.name
            ignored_count += labelling.ignored_count
            unread += labelling.unread
            said.update(labelling.said)
            files += [TreeFile(f"{wnid}/{posixpath.basename(name)}", wnid, name, tree) for wnid, name in labelling.files]
        for other in sorted(path_of.keys() & set(SPLIT_FOLDERS) - {chosen_split}):
            if chosen_split is not None:
                raise DataError(
                    f"data set {part!r} has images of {chosen_split!r}, and {path_of[other]} those of {other!r}; "
                    f"name the one to read, as in '{pattern}#{other}', or give the files that hold it"
                )
        names.append(_display_name(pattern, chosen_split))
    if unread:
        _log.warning(
            "%s: passed over %d files in class folders (%s), as only those that end in %s are read: if they are images, "
            "convert them to PNG",
            ",".join(names),
            unread.total(),
            describe_unread(unread),
            ", ".join(IMAGE_SUFFIXES),
        )
    name = ",".join(names)
    try:
        name_of = classes_by_number({file.wnid for file in files} | said, class_lists)
    except DataError as error:
        raise DataError(f"{name}: {error}") from error
    if name_of:
        ends = sorted(name_of, key=int)[:: max(len(name_of) - 1, 1)]
        examples = ", ".join(f"{number} is {name_of[number]!r}" for number in ends)
        _log.warning("%s: classes are numbers, taken for positions in the class list of the model, where %s", name, examples)
        files = [
            file._replace(wnid=name_of[file.wnid], key=f"{name_of[file.wnid]}/{file.key.partition('/')[2]}") for file in files
        ]
    return FileImages(name, files, ignored_count)


def _open_labelled(path: Path, split: str | None, spool: Spool) -> tuple[FileTree, Labelling]:
    """A file or folder in whichever format it is, and which of its images are of which class."""
    suffix = path.suffix.lower() if path.is_file() else ""
    if suffix == SUFFIX:
        tree = ParquetTree(path, split, spool)
    elif path.is_file() and is_array(path):
        tree = ArrayTree(path, split)
    else:
        files = open_tree(path, (*LAYOUT_SUFFIXES, *CIFAR_SUFFIXES), spool)
        batches = find_batches(files)
        if not batches:
            return files, label_files(files, split, spool)
        tree = CifarTree(files, batches, split, spool)
    return tree, tree.labelling


def _split_parts(spec: str) -> list[str]:
    if os.path.exists(spec):
        return [spec]
    parts = [part.strip() for part in spec.split(",")]
    if not all(parts):
        raise DataError(f"data set {spec!r}: expected '{PHOTOS}' or paths separated by commas, found an empty one")
    return parts


def _split_fragment(part: str) -> tuple[str, str | None]:
    if os.path.exists(part) or "#" not in part:
        return part, None
    pattern, _, split = part.rpartition("#")
    if not pattern or not split:
        raise DataError(f"data set {part!r}: expected PATH#SPLIT, as in 'tiny-imagenet-200.zip#val'")
    return pattern, split


def _expand(pattern: str) -> list[Path]:
    path = Path(os.path.expanduser(pattern))
    if os.path.exists(path):
        return [path]
    if glob.has_magic(pattern):
        if found := sorted(glob.glob(str(path))):
            return [Path(name) for name in found]
        raise DataError(f"data set {pattern!r}: no file or folder matches this pattern")
    siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, [*siblings, PHOTOS], n=3, cutoff=0.6)
    hint = f"did you mean {', '.join(near)}?" if near else f"give a folder, a zip, a tar, or '{PHOTOS}'"
    raise DataError(f"data set {pattern!r}: there is no such file or folder; {hint}")


def _display_name(pattern: str, split: str | None) -> str:
    name = Path(pattern).name or Path(pattern).absolute().name
    return name if split is None else f"{name}#{split}"
