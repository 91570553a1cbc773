"""Which files of a tree are images of which class: the folder layouts of ImageNet and its kin."""

from __future__ import annotations

import json
import logging
import posixpath
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from lrrobust.data.file_trees import FileTree, Spool
from lrrobust.data.ilsvrc import FLAT_NAME, HUB_NAME, TRAIN_NAME, load_validation_wnids, wnids_in
from lrrobust.data.image_source import IMAGE_SUFFIXES
from lrrobust.data.label_tables import TABLE_SUFFIXES, read_table
from lrrobust.errors import DataError

_log = logging.getLogger(__name__)

#: What `label_files` has to see of a tree.
LAYOUT_SUFFIXES = (*IMAGE_SUFFIXES, *TABLE_SUFFIXES, ".cls", ".json")

#: Folders of these names hold a split and no class, unless class folders lie beside them (CIFAR-100 has a class "train"): so
#: the unlabelled `test/images` of Tiny-ImageNet does not become a class "test".
SPLIT_FOLDERS = ("train", "val", "validation", "test")

#: The folder of a class' images, likewise.
_IMAGES = "images"

_ANNOTATIONS = "val_annotations.txt"

#: Bytes of what is said of an image.
_MOST_JSON = 100_000
_WNID = re.compile(r"n\d{8}")


def _is_validation_image(file: str) -> bool:
    return FLAT_NAME.fullmatch(file) is not None or HUB_NAME.fullmatch(file) is not None


class LabelledFile(NamedTuple):
    """An image of a tree: its class, and its name there."""

    wnid: str
    name: str


class Labelling(NamedTuple):
    """The labelled images of one split of a tree.

    They lie in class folders in `folder`, `is_choice` where the tree offered several, or images outside of it without a
    class, or one was asked for; `unread` counts by suffix the files in its class folders that are of no format that is read.
    `said`: all classes of a table, of images elsewhere, too.
    """

    files: list[LabelledFile]
    folder: str
    is_choice: bool
    ignored_count: int
    unread: Counter[str]
    said: Collection[str] = ()


def label_files(tree: FileTree, split: str | None, spool: Spool) -> Labelling:
    """Find the images of a tree and their classes.

    Understood are, below any folders: `<class>/<image>`, `<class>/images/<image>`, Tiny-ImageNet's
    `val/images/<image>` with `val/val_annotations.txt`, and ImageNet's unsorted validation images, with the development kit
    or Kaggle's table beside them or called after their classes as on the Hugging Face hub, loose training images by their
    names, and WebDataset's `<key>.cls` beside `<key>.jpg`. Of several sets of class folders `val` is taken.

    Args:
        tree: opened with `LAYOUT_SUFFIXES`.
        split: name of the folder right above the class folders, or of a table, or None to choose.
        spool: passed on when a compressed development kit has to be read.

    Raises:
        DataError: there is no labelled image, or it is unclear which folder is meant.
    """
    names = tree.names
    if split is not None and split.lower().endswith(TABLE_SUFFIXES):
        return _label_by_table(tree, split)
    annotations = {
        posixpath.dirname(name): read_table(tree, name)[0] for name in names if posixpath.basename(name) == _ANNOTATIONS
    }
    groups: dict[str, list[tuple[str | None, str]]] = defaultdict(list)  # by the folder above the classes
    ignored_count = tree.ignored_count
    unlabelled: list[str] = []
    in_shard = _read_class_files(tree)
    beside = _Neighbours(name for name in names if name.lower().endswith(IMAGE_SUFFIXES))
    for name in names:
        if not name.lower().endswith(IMAGE_SUFFIXES):
            ignored_count += posixpath.basename(name) != _ANNOTATIONS
            continue
        folder, file = posixpath.split(name)
        is_class = beside.are_classes(folder)
        if posixpath.basename(folder) == _IMAGES:
            above = posixpath.dirname(folder)
            if above in annotations and name in annotations[above]:
                groups[above].append((annotations[above][name], name))
                continue
            if not is_class:
                folder = above
        above, wnid = posixpath.split(folder)
        is_loose = not wnid or (wnid in SPLIT_FOLDERS and not is_class)
        if is_loose and name in in_shard:
            groups[folder].append((in_shard[name], name))
        elif is_loose and (named := TRAIN_NAME.fullmatch(file)):
            groups[folder].append((named[1], name))
        elif _is_validation_image(file) and not _WNID.fullmatch(wnid) and not beside.are_sorted(folder):
            named = HUB_NAME.fullmatch(file)
            groups[folder].append((named and named[1], name))
        elif wnid and (is_class or wnid not in SPLIT_FOLDERS):
            groups[above].append((wnid, name))
        else:
            unlabelled.append(name)
            ignored_count += 1
    chosen = _choose_group(tree, groups, split, bool(unlabelled))
    # Whoever reads `val`, or asked for a split, expects nothing of what lies beside it.
    is_expected = split is not None or posixpath.basename(chosen) == "val"
    missed = [name for name in unlabelled if not is_expected or not chosen or name.startswith(f"{chosen}/")]
    if missed:
        _log.warning(
            "%s: passed over %d images outside of class folders, such as %r: if they belong to it, put them into the folders "
            "of their classes", tree.path, len(missed), missed[0],
        )  # fmt: skip
    files = groups[chosen]
    if any(wnid is None for wnid, _ in files):
        files = _label_flat(tree.path, [name for _, name in files], spool)
    is_choice = split is not None or len(groups) > 1 or (chosen != "" and len(missed) > 0)
    return Labelling(
        [LabelledFile(wnid, name) for wnid, name in files],
        posixpath.basename(chosen),
        is_choice,
        ignored_count,
        _unread_below(tree, chosen),
    )


def _label_by_table(tree: FileTree, split: str) -> Labelling:
    tables = [name for name in tree.names if f"/{name}".endswith(f"/{split}")]
    if len(tables) != 1:
        raise DataError(f"{tree.path}: expected one table {split!r}, found {tables[:3] or 'none'}; give its whole path")
    wnid_of, said = read_table(tree, tables[0])
    if not wnid_of:
        raise DataError(f"{tree.path}: {tables[0]!r} names none of the images beside it or below")
    folders = {posixpath.dirname(name) for name in wnid_of}
    images = [name for name in tree.names if name.lower().endswith(IMAGE_SUFFIXES)]
    missed = [name for name in images if name not in wnid_of and posixpath.dirname(name) in folders]
    if missed:
        _log.warning("%s: passed over %d images that %r lacks, such as %r", tree.path, len(missed), split, missed[0])
    files = [LabelledFile(wnid, name) for name, wnid in wnid_of.items()]
    return Labelling(files, split, True, tree.ignored_count + len(images) - len(files), Counter(), said)


class _Neighbours:
    """What the folders that hold images tell of each other, by the names of all images of a tree."""

    def __init__(self, names: Iterable[str]) -> None:
        is_flat: dict[str, bool] = defaultdict(bool)
        for folder, file in map(posixpath.split, names):
            is_flat[folder] |= _is_validation_image(file)
        ordinary = [folder for folder in is_flat if posixpath.basename(folder) not in ("", *SPLIT_FOLDERS, _IMAGES)]
        self._ordinary = Counter(posixpath.dirname(folder) for folder in ordinary)
        self._flat = Counter(posixpath.dirname(folder) for folder in ordinary if is_flat[folder])

    def are_classes(self, folder: str) -> bool:
        """Whether folders that can be nothing but classes lie beside one named as a split, or as a folder of images."""
        return folder != "" and self._ordinary[posixpath.dirname(folder)] > 0

    def are_sorted(self, folder: str) -> bool:
        """Whether ILSVRC2012 validation images were put into several folders side by side: by class, under other names."""
        return self._flat[posixpath.dirname(folder)] > 1


def _unread_below(tree: FileTree, above: str) -> Counter[str]:
    """Of the class folders alone: beside them lie readmes and lists."""
    found: Counter[str] = Counter()
    for (folder, suffix), count in tree.unread.items():
        if folder != above and (not above or folder.startswith(f"{above}/")):
            found[suffix] += count
    return found


def describe_unread(unread: Counter[str]) -> str:
    """Counts by suffix in words, the most first."""
    ordered = sorted(unread.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count} {suffix or 'without a suffix'}" for suffix, count in ordered)


def _choose_group(tree: FileTree, groups: dict[str, list], split: str | None, has_unlabelled: bool) -> str:
    path = tree.path
    if not groups:
        found = "images outside of any class folder" if has_unlabelled else "no image"
        hint = ""
        # Of texts, most are something else.
        if has_unlabelled and (tables := [name for suffix in TABLE_SUFFIXES for name in tree.names if name.endswith(suffix)]):
            hint = f"; where a table says their classes, name it, as in {f'{path.name}#{tables[0]}'!r}"
        if not has_unlabelled and (unread := _unread_below(tree, "")):
            found = f"none that ends in {', '.join(IMAGE_SUFFIXES)}, but {describe_unread(unread)}"
        suffixes = {suffix for _, suffix in tree.unread}
        if not suffixes.isdisjoint((".tar", ".xz", ".gz", ".zip", ".parquet", ".npy", ".npz")):
            hint = "; archives within it are not read: unpack it first"
            if path.is_dir():
                examples = {".parquet": "validation-*.parquet", ".npy": "x_test.npy", ".npz": "images.npz"}
                example = next((example for suffix, example in examples.items() if suffix in suffixes), "train-*.tar.xz")
                hint = f"; to read archives in it, give their names or a pattern such as 'folder/{example}'"
        raise DataError(f"{path}: expected images in one folder a class (<class>/<image>), found {found}{hint}")
    wanted = split if split is not None else "val"
    if split is None and len(groups) == 1:
        return next(iter(groups))
    matches = [above for above in groups if posixpath.basename(above) == wanted]
    if len(matches) == 1:
        return matches[0]
    present = ", ".join(repr(above or ".") for above in sorted(groups)[:5]) + (", ..." if len(groups) > 5 else "")
    if split is not None and not matches:
        raise DataError(f"{path}: expected class folders in a folder {split!r}, found them in {present}")
    example = next(filter(None, map(posixpath.basename, sorted(groups))))
    raise DataError(
        f"{path}: expected class folders in one place, found them in {present}; "
        f"name the one folder to read, as in '{path.name}#{example}', or give its own path"
    )


def _read_class_files(tree: FileTree) -> dict[str, str]:
    """Image -> class, of a shard of WebDataset: `<key>.cls` has its number or name, which `<key>.json` says the file name of.

    ImageNet's images are taken by the WordNet ids that they were called after.
    """
    names = {name for name in tree.names if name.endswith((".cls", ".json"))}
    images, paths, labels = [], [], []
    for name in tree.names if names else ():
        key, suffix = posixpath.splitext(name)
        if suffix.lower() not in IMAGE_SUFFIXES or f"{key}.cls" not in names:
            continue
        label = tree.read(f"{key}.cls")[:200].decode(errors="replace").strip()
        if not label.isprintable() or not label or "/" in label:
            raise DataError(f"{tree.path}: expected the number or name of a class in '{key}.cls', found {label[:60]!r}")
        try:
            path = json.loads(tree.read(f"{key}.json")[:_MOST_JSON])["filename"] if f"{key}.json" in names else ""
        except (ValueError, KeyError, TypeError, RecursionError):
            path = ""
        images.append(name)
        paths.append(path if isinstance(path, str) and path else name)
        labels.append(label)
    return dict(zip(images, wnids_in(paths, labels) or labels, strict=True))


def _label_flat(path: Path, names: Sequence[str], spool: Spool) -> list[tuple[str, str]]:
    wnid_of = load_validation_wnids(path, spool)
    labelled = []
    for name in names:
        match = FLAT_NAME.fullmatch(posixpath.basename(name))
        if match is None:
            raise DataError(f"{path}: {name!r} lies among ILSVRC2012 validation images and is none; remove it")
        if int(match[1]) not in wnid_of:
            raise DataError(f"{path}: {name!r} has no label; {len(wnid_of)} others have one")
        labelled.append((wnid_of[int(match[1])], name))
    return labelled
