"""Images in arrays: a `.npz` with their classes in it, a `.npy` with these beside it, as in CIFAR-10-C; MNIST's and SVHN's."""

from __future__ import annotations

import gzip
import io
import math
import re
import struct
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from lrrobust.data.file_trees import FileTree, most_unpacked_bytes
from lrrobust.data.layouts import LabelledFile, Labelling
from lrrobust.errors import DataError

_SUFFIXES = (".npz", ".npy", ".mat")

#: Of images of MNIST and its kin, as they are downloaded or as torchvision unpacks them.
_IDX_NAME = re.compile(r"(.*)images([-.])idx3-ubyte(\.gz)?")

_IMAGES = {"x", "image", "images", "img", "imgs", "data"}
_LABELS = {"y", "label", "labels", "target", "targets"}

#: Of several splits the first of these is read, where none is asked for.
_FIRST = ("val", "validation", "test")

#: Of each image, one after the other, in CIFAR-10-C and its kin.
_SEVERITIES = 5

#: How far 255 times a float may be from an integer, and stand for it; float16 rounds by more.
_TOLERANCE = 1e-3


class ArrayTree(FileTree):
    """The images of an array (N, H, W, C), (N, C, H, W) or (N, H, W), where C is 1 or 3: uint8, or floats k / 255.

    They are called after the file and their place in the array, from 0. Classes are an array of N names, or of numbers.

    Args:
        path: of a `.npz` with arrays such as `x_test` and `y_test`, or `images` and `labels`; of a `.npy`, beside which
            lies one called so, or `labels.npy`; of SVHN's `test_32x32.mat`; or of `t10k-images-idx3-ubyte.gz`, as MNIST has it.
        split: of a `.npz` that holds several the one to read, as "test"; of a `.npy` with five severities "1" to "5". None
            where there is no choice, or for the first of val and test.

    Attributes:
        labelling: the images and their classes, by name.

    Raises:
        DataError: a file cannot be read, is damaged, holds other arrays, or leaves open which are meant.
    """

    is_fork_safe = True

    def __init__(self, path: Path, split: str | None) -> None:
        super().__init__(path, ())
        if path.suffix.lower() == ".npz":
            self._images, labels, split = self._read_pair(split)
        elif path.suffix.lower() == ".mat":
            self._images, labels = _read_svhn(path)
        elif found := _IDX_NAME.fullmatch(path.name):
            beside = path.parent / f"{found[1]}labels{found[2]}idx1-ubyte{found[3] or ''}"
            self._images, labels = _read_idx(path, 3), _read_idx(beside, 1)
        else:
            self._images, labels = _load(path), _load(self._find_labels())
        shape = self._images.shape
        if len(shape) == 4 and shape[3] not in (1, 3) and shape[1] in (1, 3):
            self._images = self._images.transpose(0, 2, 3, 1)
        is_image = len(shape) == 3 or (len(shape) == 4 and self._images.shape[3] in (1, 3))
        if not is_image or 0 in shape or not (self._images.dtype == np.uint8 or self._images.dtype.kind == "f"):
            raise self._unexpected("images (N, H, W, 3) of uint8", f"{shape} of {self._images.dtype}")
        if labels.shape not in ((len(self._images),), (len(self._images), 1)) or labels.dtype.kind not in "iuU":
            expected = f"a name or number for each of {len(self._images)} images"
            raise self._unexpected(expected, f"{labels.shape} of {labels.dtype}")
        wnids = [str(label) for label in labels.ravel().tolist()]
        if bad := [wnid for wnid in wnids if not wnid.isprintable() or not wnid or "/" in wnid or wnid[0] == "-"]:
            raise self._unexpected("names of classes, or numbers from 0", repr(bad[0]))
        places = range(len(wnids))
        if path.suffix.lower() == ".npy":
            each, rest = divmod(len(wnids), _SEVERITIES)
            # What is called images has them only where somebody says so.
            may_have = split is not None or _split_name(path.stem)[1] is None
            if may_have and each > 1 and not rest and wnids == wnids[:each] * _SEVERITIES:
                if not re.fullmatch(f"[1-{_SEVERITIES}]", split or ""):
                    example = f"{path.name}#{_SEVERITIES // 2 + 1}"
                    found = split or "none named; where it has none, call it x.npy"
                    raise self._unexpected(f"one of its {_SEVERITIES} severities, as in {example!r}", found)
                places = range((int(split) - 1) * each, int(split) * each)
        if split is not None and path.suffix.lower() != ".npz" and len(places) == len(wnids):
            raise self._unexpected("no split, as it has none", f"'#{split}'")
        self._place_of = {f"{path.stem}-{place:07d}": place for place in places}
        self._names = set(self._place_of)
        files = [LabelledFile(wnids[place], name) for name, place in self._place_of.items()]
        self.labelling = Labelling(files, split or "", split is not None, 0, Counter(), set(wnids))

    def read(self, name: str) -> bytes:
        pixels = np.asarray(self._images[self._place_of[name]])
        if pixels.dtype != np.uint8:
            levels = 255 * pixels.astype(np.float64)
            tolerance = max(_TOLERANCE, 255 * np.finfo(pixels.dtype).eps / 2)
            pixels = levels.round().clip(0, 255)
            if not (np.abs(levels - pixels) <= tolerance).all():
                found = f"others in image {name}, from {levels.min() / 255:.6g} to {levels.max() / 255:.6g}"
                raise self._unexpected(
                    "uint8, or floats in [0, 1] of 8 bits", f"{found}; lrrobust.evaluate takes any in [0, 1]"
                )
            pixels = pixels.astype(np.uint8)
        encoded = io.BytesIO()
        Image.fromarray(pixels[..., 0] if pixels.shape[2:] == (1,) else pixels).save(encoded, "BMP")
        return encoded.getvalue()

    def _read_pair(self, asked: str | None) -> tuple[np.ndarray, np.ndarray, str | None]:
        """Images, their classes, and the split they are of, None where there is no choice."""
        with _one_line_errors(self.path), open(self.path, "rb") as file:
            arrays = np.load(file, allow_pickle=False)
            if isinstance(arrays, np.ndarray):
                raise self._unexpected("several arrays", "one; call it .npy")
            if sum(info.file_size for info in arrays.zip.infolist()) > most_unpacked_bytes(self.path):
                raise ValueError("it unpacks to far more than images do")
            labels_of = _by_role(arrays.files, _LABELS)
            pairs = {}
            for split, images in _by_role(arrays.files, _IMAGES).items():
                if labels := labels_of.get(split, labels_of.get("")):
                    pairs[split] = (images, labels)
            split = asked if asked is not None else next((name for name in (*_FIRST, *pairs) if name in pairs), "")
            if split not in pairs or (asked is None and len(pairs) > 1 and split not in _FIRST):
                what = " or ".join(f"'{self.path.name}#{name}'" for name in pairs if name) or "arrays as 'images' and 'labels'"
                raise self._unexpected(what, ", ".join(arrays.files[:8]) if asked is None else f"'#{asked}'")
            if any(len(keys) > 1 for keys in pairs[split]):
                raise self._unexpected("one array of images and one of labels", ", ".join(sum(pairs[split], [])))
            images, labels = (arrays[keys[0]] for keys in pairs[split])
            for (key,), array in zip(pairs[split], (images, labels)):
                if not isinstance(array, np.ndarray):
                    raise ValueError(f"{key!r} is none")
            return images, labels, split if asked is not None or len(pairs) > 1 else None

    def _find_labels(self) -> Path:
        """Of the arrays beside this one that which is called as it, but for `labels` or `y`; or that called so alone."""
        beside = [file.stem for file in sorted(self.path.parent.glob("*.npy"))]
        labels_of = _by_role(beside, _LABELS)
        own = _split_name(self.path.stem)[0]
        found = labels_of.get(own, labels_of.get("", []))
        if len(found) != 1 or self.path.stem in found:
            what = "images, with their classes in 'labels.npy' beside it"
            raise self._unexpected(what, ", ".join(f"{stem}.npy" for stem in found or beside[:8]))
        return self.path.parent / f"{found[0]}.npy"

    def _unexpected(self, expected: str, found: str) -> DataError:
        return DataError(f"{self.path}: expected {expected}, found {found}")


def is_array(path: Path) -> bool:
    """Whether a file is called as one that is read here."""
    return path.suffix.lower() in _SUFFIXES or _IDX_NAME.fullmatch(path.name) is not None


def holds_classes(path: Path) -> bool:
    """Whether a `.npy` is called as one of classes, and no images: a pattern takes it in as well."""
    return path.suffix.lower() == ".npy" and _split_name(path.stem)[1] is _LABELS


@contextmanager
def _one_line_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except MemoryError as error:
        raise DataError(f"{path} does not fit into memory ({error}): save its arrays as .npy, which stay on disk") from error
    except Exception as error:  # zipfile, zlib and NumPy raise whatever strikes them on damaged bytes
        if getattr(error, "errno", None) is not None:
            raise DataError(f"cannot read {path}: {error.strerror}") from error
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{path} is damaged, cut short or holds no plain arrays ({reason}); save it anew") from error


def _read_svhn(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Cropped digits of SVHN (Netzer et al., 2011) and their classes: 0 is called 10 there."""
    from scipy.io import loadmat, whosmat

    with _one_line_errors(path):
        shapes = {name: shape for name, shape, _ in whosmat(path)}
        if "y" not in shapes or len(shapes.get("X", ())) != 4:
            raise DataError(f"{path}: expected the cropped digits of SVHN, 'X' (H, W, 3, N) and 'y', found {list(shapes)[:8]}")
        if sum(map(math.prod, shapes.values())) > most_unpacked_bytes(path):
            raise ValueError("it unpacks to far more than images do")
        arrays = loadmat(path, variable_names=["X", "y"])
        return arrays["X"].transpose(3, 0, 1, 2), np.where(arrays["y"] == 10, 0, arrays["y"])


def _read_idx(path: Path, axes: int) -> np.ndarray:
    """An array of MNIST's format (LeCun et al., 1998): zeros, the type, the number of axes, their lengths, the bytes."""
    with _one_line_errors(path), (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
        head = file.read(4 + 4 * axes)
        if head[:4] != bytes([0, 0, 8, axes]):
            raise ValueError(f"it begins with {head[:4].hex()}, expected {bytes([0, 0, 8, axes]).hex()}")
        shape = struct.unpack(f">{axes}I", head[4:])
        size = math.prod(shape)
        if size > most_unpacked_bytes(path):
            raise ValueError("it unpacks to far more than images do")
        content = file.read(size + 1)
        if len(content) != size:
            raise ValueError(f"it holds another number of bytes than {shape}")
        return np.frombuffer(content, np.uint8).reshape(shape)


def _load(path: Path) -> np.ndarray:
    """The array of a `.npy`, which stays on disk."""
    with _one_line_errors(path):
        return np.lib.format.open_memmap(path, mode="r")


def _by_role(names: Iterable[str], role: set[str]) -> dict[str, list[str]]:
    """Those of `names` that are of a role, by what else they are called."""
    found: dict[str, list[str]] = defaultdict(list)
    for name in names:
        rest, own_role = _split_name(name)
        if own_role is role:
            found[rest].append(name)
    return found


def _split_name(name: str) -> tuple[str, set[str] | None]:
    """What a name says beside its role, and this: that of its last word of one, as in "image_labels", but for "y_data"."""
    words = re.findall("[a-z0-9]+", name.lower())
    roles = [word for word in words if word in _IMAGES | _LABELS]
    telling = [word for word in roles if word != "data"] or roles
    rest = "-".join(word for word in words if word not in roles)
    return rest, (_LABELS if telling[-1] in _LABELS else _IMAGES) if telling else None
