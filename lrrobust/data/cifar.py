"""CIFAR-10 and CIFAR-100 as they are published (Krizhevsky, 2009): batches of raw pixels, pickled or one after the other."""

from __future__ import annotations

import io
import pickle
import posixpath
import reprlib
import struct
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lrrobust.data.file_trees import FileTree, Spool, SpooledTree
from lrrobust.data.image_source import IMAGE_SUFFIXES
from lrrobust.data.layouts import LabelledFile, Labelling
from lrrobust.errors import DataError

_SIDE = 32
_PIXELS = 3 * _SIDE * _SIDE

#: Of a BMP whose first row is the top one, and whose rows need no padding.
_BMP_HEADER = struct.pack("<2sIIIIiiHHIIiiII", b"BM", 54 + _PIXELS, 0, 54, 40, _SIDE, -_SIDE, 1, 24, 0, _PIXELS, 0, 0, 0, 0)

_TEN = {"train": tuple(f"data_batch_{number}" for number in range(1, 6)), "test": ("test_batch",)}
_HUNDRED = {"train": ("train",), "test": ("test",)}


class _Edition(NamedTuple):
    """How a data set is packed: the files of each split, that of the classes' names, and what its pickles call both.

    In binary files so many bytes stand before the pixels of an image, the last of which is its class.
    """

    batches: Mapping[str, tuple[str, ...]]
    names: str
    names_key: str
    labels_key: str
    label_bytes: int

    @property
    def is_pickled(self) -> bool:
        return not self.names.endswith(".txt")


def _in_binary(batches: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    return {split: tuple(f"{file}.bin" for file in files) for split, files in batches.items()}


_EDITIONS = (
    _Edition(_TEN, "batches.meta", "label_names", "labels", 1),
    _Edition(_in_binary(_TEN), "batches.meta.txt", "", "", 1),
    _Edition(_HUNDRED, "meta", "fine_label_names", "fine_labels", 2),
    _Edition(_in_binary(_HUNDRED), "fine_label_names.txt", "", "", 2),
)

#: What `find_batches` has to see of a tree.
CIFAR_SUFFIXES = tuple(f"/{file}" for edition in _EDITIONS for file in (*sum(edition.batches.values(), ()), edition.names))


def find_batches(tree: FileTree) -> list[tuple[str, _Edition]]:
    """Folders of a tree without images that hold batches, and how these are packed."""
    if any(name.lower().endswith(IMAGE_SUFFIXES) for name in tree.names):
        return []
    held = {posixpath.split(name) for name in tree.names}
    folders = sorted({folder for folder, _ in held})
    return [
        (folder, edition)
        for folder in folders
        for edition in _EDITIONS
        if any((folder, file) in held for files in edition.batches.values() for file in files)
    ]


class CifarTree(SpooledTree):
    """The images of one split, all of which are put into `spool` as BMP files.

    They are called after the split and their place in it, from 0, which is the same in both formats.

    Args:
        tree: opened with `CIFAR_SUFFIXES`.
        found: what `find_batches` found in it.
        split: "train" or "test", which None means, too.
        spool: takes the images.

    Attributes:
        labelling: the images and their classes, by name.

    Raises:
        DataError: a file is missing, or is not as it is published; nothing of a pickle but plain data is ever made.
    """

    def __init__(self, tree: FileTree, found: Sequence[tuple[str, _Edition]], split: str | None, spool: Spool) -> None:
        super().__init__(tree.path, (), spool)
        self._tree = tree
        if len(found) > 1:
            where = ", ".join(repr(posixpath.join(folder, edition.names)) for folder, edition in found)
            raise DataError(f"{self.path}: expected CIFAR once, found {where}; give the folder or archive of the one to read")
        self._folder, self._edition = found[0]
        split = split or "test"
        if split not in self._edition.batches:
            raise DataError(f"{self.path} is CIFAR: expected '{self.path.name}#train' or '#test', found '#{split}'")
        batches = self._edition.batches[split]
        files = [posixpath.join(self._folder, file) for file in (*batches, self._edition.names)]
        if missing := [file for file in files if file not in tree.names]:
            raise DataError(f"{self.path} is CIFAR, and lacks {', '.join(missing)}: unpack or download it anew")
        *paths, names_path = files
        names = self._read_names(names_path)
        labelled = []
        for path in paths:
            labels, pixels = self._read_batch(path, len(names))
            # Planes of red, green and blue -> rows of blue, green and red.
            rows = pixels.reshape(-1, 3, _SIDE, _SIDE)[:, ::-1].transpose(0, 2, 3, 1)
            for label, image in zip(labels, rows, strict=True):
                name = f"{split}-{len(labelled):05d}"
                self._put(name, _BMP_HEADER + image.tobytes())
                labelled.append(LabelledFile(names[label], name))
        self._names = set(self._spans)
        self.labelling = Labelling(labelled, split, True, tree.ignored_count, Counter())

    def _read_names(self, path: str) -> list[str]:
        content = self._tree.read(path)
        try:
            if self._edition.is_pickled:
                names = [_text(name) for name in _unpickle(content)[self._edition.names_key]]
            else:
                names = content.decode().split()
        except Exception as error:  # unpickling raises whatever strikes it
            raise self._damaged(path, _reason(error)) from error
        if not names or "" in names or len(set(names)) < len(names) or any("/" in name for name in names):
            raise self._damaged(path, f"{len(names)} names of classes, some twice, empty or with a slash")
        return names

    def _read_batch(self, path: str, class_count: int) -> tuple[list[int], np.ndarray]:
        """The classes of the images of a file, and their pixels: uint8 (N, 3072)."""
        content = self._tree.read(path)
        if self._edition.is_pickled:
            try:
                batch = _unpickle(content)
                labels = batch[self._edition.labels_key]
                pixels = batch["data"].pixels(len(labels))
            except Exception as error:
                raise self._damaged(path, _reason(error)) from error
        else:
            size = self._edition.label_bytes + _PIXELS
            if len(content) % size:
                raise self._damaged(path, f"{len(content)} bytes, and an image takes {size}")
            records = np.frombuffer(content, np.uint8).reshape(-1, size)
            labels = records[:, self._edition.label_bytes - 1].tolist()
            pixels = records[:, self._edition.label_bytes :]
        if not labels:
            raise self._damaged(path, "no image")
        for row, label in enumerate(labels):
            if type(label) is not int or not 0 <= label < class_count:
                raise self._damaged(path, f"image {row} is of class {reprlib.repr(label)}, expected 0 to {class_count - 1}")
        return labels, pixels

    def _damaged(self, path: str, reason: str) -> DataError:
        return DataError(f"{self.path}: {path!r} is damaged, cut short or not of CIFAR ({reason}); unpack or download it anew")


class _Parts:
    """Stands for a function, class or object of numpy: what it was made of, so that no code of numpy runs on a pickle."""

    __slots__ = ("arguments", "state")

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def pixels(self, count: int) -> np.ndarray:
        """Those of an array (count, 3072) of uint8."""
        _, shape, kind, is_fortran, values = self.state
        if shape != (count, _PIXELS) or _text(kind.arguments[0]) != "u1" or len(values) != count * _PIXELS:
            raise ValueError(f"expected {count} rows of {_PIXELS} bytes for as many labels, found {reprlib.repr(shape)}")
        return np.frombuffer(values, np.uint8).reshape(shape, order="F" if is_fortran else "C")


def _encode(text: str, encoding: str) -> bytes:
    """How Python 3 writes bytes where Python 2 shall read them."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it asks for text in {reprlib.repr(encoding)}")
    return text.encode("latin1")


def _from_buffer(values: bytes, kind: _Parts, shape: tuple[int, ...], order: str, *_: Any) -> _Parts:
    """How protocol 5 writes arrays, as `_Parts` has others."""
    array = _Parts()
    array.state = (1, shape, kind, order == "F", values)
    return array


#: What is published was pickled by Python 2; copies may have been pickled anew, by any numpy.
_STANDS_FOR = {
    "numpy.core.multiarray._reconstruct": _Parts,
    "numpy._core.multiarray._reconstruct": _Parts,
    "numpy.core.numeric._frombuffer": _from_buffer,
    "numpy._core.numeric._frombuffer": _from_buffer,
    "numpy.ndarray": _Parts,
    "numpy.dtype": _Parts,
    "_codecs.encode": _encode,
}


class _Unpickler(pickle._Unpickler):
    """Python's own in Python, since the one in C takes any amount of memory where a few bytes ask for it."""

    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        asked = f"{module}.{name}"
        if asked not in _STANDS_FOR:
            raise pickle.UnpicklingError(f"it asks for {asked!r}, and no code in pickles is run")
        return _STANDS_FOR[asked]


def _unpickle(content: bytes) -> dict[str, Any]:
    found = _Unpickler(io.BytesIO(content), encoding="bytes").load()
    return {_text(key): value for key, value in found.items()}


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _reason(error: Exception) -> str:
    return f"{type(error).__name__} {' '.join(str(error).split())[:150]}".rstrip()
