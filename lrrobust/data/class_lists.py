"""Label spaces: which class each output of a classifier stands for.

A label is the position of a class in the list of the model, never its rank among the folders that
happen to be present: a data set with one class missing would otherwise shift every later label.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Sequence
from functools import cache
from importlib import resources
from pathlib import Path

from lrrobust.errors import DataError, UnknownNameError

#: WordNet ids in label order; read from the package on first use.
TINY_IMAGENET_200: tuple[str, ...]
IMAGENET_1K: tuple[str, ...]

_PACKAGED = {name: f"{name.replace('-', '_')}.txt" for name in ("tiny-imagenet-200", "imagenet-1k", "cifar-10", "cifar-100")}
_CONSTANTS = {"TINY_IMAGENET_200": "tiny-imagenet-200", "IMAGENET_1K": "imagenet-1k"}


def load_class_list(name_or_path: str | Path) -> tuple[str, ...]:
    """Classes in label order, of a known label space or of a text file with one class a line.

    Args:
        name_or_path: "tiny-imagenet-200", "imagenet-1k", "cifar-10", "cifar-100", or the path of a UTF-8 text file.

    Raises:
        UnknownNameError: it is neither a known name nor a file.
        DataError: the file is empty, cannot be read, or holds an empty line or a class twice.
    """
    if isinstance(name_or_path, str) and name_or_path in _PACKAGED:
        return _load_packaged(name_or_path)
    path = Path(name_or_path)
    if not path.is_file():
        raise UnknownNameError("class list or file", str(name_or_path), _PACKAGED, "a text file with one class a line")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"class list {path}: expected UTF-8 text with one class a line: {error}") from error
    return _parse(text, str(path))


def match_classes(
    wnids: Sequence[str], classes: Sequence[str], known_classes: Collection[str] | None = None
) -> tuple[list[int], list[int]]:
    """Positions of the images whose class has a label, and those labels.

    Args:
        wnids: class of each image; accents may be written in one character or two, as file systems differ there.
        classes: all classes of the model in label order.
        known_classes: if given, only images of these classes are kept as well.

    Returns:
        Two lists of equal length: positions in `wnids` (ascending), and positions in `classes`.

    Raises:
        DataError: `classes` holds a class twice, which would make its label ambiguous.
    """
    label_of = {composed(wnid): label for label, wnid in enumerate(classes)}
    if len(label_of) != len(classes):
        twice = next(wnid for label, wnid in enumerate(classes) if label_of[composed(wnid)] != label)
        raise DataError(f"the class list names {twice!r} more than once; give every class one label")
    if known_classes is not None:
        known = set(map(composed, known_classes))
        label_of = {wnid: label for wnid, label in label_of.items() if wnid in known}
    labels = [label_of.get(composed(wnid)) for wnid in wnids]
    return [position for position, label in enumerate(labels) if label is not None], [
        label for label in labels if label is not None
    ]


def no_known_class(name: str, found: Sequence[str], classes: Sequence[str]) -> str:
    """What is to be said of a data set, all of whose images are of other classes than the model's."""
    expected, others = (", ".join(map(repr, names[:3])) for names in (classes, sorted(set(found))))
    return (
        f"{name}: none of its {len(found)} images has a class of the model; expected classes such as "
        f"{expected}, found {others or 'no image'}; give the class list of the model or another data set"
    )


def classes_by_number(found: Collection[str], class_lists: Sequence[Sequence[str]]) -> dict[str, str]:
    """What the classes of a data set mean that are numbers, as in ImageNet-V2: positions, from 0, in the models' class lists.

    Args:
        found: classes of the data set.
        class_lists: of each model all classes in label order.

    Returns:
        Name by number; empty where not all are numbers, or a model has a class of such a name.

    Raises:
        DataError: they are numbers, and may as well count something else.
    """
    are_numbers = found and all(re.fullmatch(r"[0-9]{1,9}", name) for name in found)
    if not are_numbers or any(set(found) & set(classes) for classes in class_lists):
        return {}
    numbers = sorted(map(int, found))
    for classes in class_lists:
        if numbers != list(range(len(classes))):
            raise DataError(
                "the classes are numbers, and no positions among those of the model: expected each of 0 to "
                f"{len(classes) - 1}, found {len(numbers)} from {numbers[0]} to {numbers[-1]}; take the whole data set, or "
                "call classes by their names"
            )
        if list(classes) != sorted(classes) and all(re.fullmatch(r"n\d{8}", name) for name in classes):
            raise DataError(
                "the classes are numbers, and may count the WordNet ids in the order of the model or in theirs; call "
                "classes by their names"
            )
        if list(map(composed, classes)) != list(map(composed, class_lists[0])):
            raise DataError("the classes are numbers, and the models count theirs differently; evaluate one after the other")
    return {name: class_lists[0][int(name)] for name in found} if class_lists else {}


def composed(wnid: str) -> str:
    """The name of a class with accents in one character with their letter, as most but not all programs write them."""
    return unicodedata.normalize("NFC", wnid)


@cache
def _load_packaged(name: str) -> tuple[str, ...]:
    file = resources.files("lrrobust.data") / "class_lists" / _PACKAGED[name]
    return _parse(file.read_text(encoding="utf-8"), name)


def _parse(text: str, where: str) -> tuple[str, ...]:
    line_of: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        name = line.strip()
        if not name:
            raise DataError(f"class list {where}, line {number}: expected a class, found an empty line; remove it")
        if name in line_of:
            raise DataError(
                f"class list {where}, line {number}: class {name!r} stands already on line {line_of[name]}; "
                "give every class one line"
            )
        line_of[name] = number
    if not line_of:
        raise DataError(f"class list {where} is empty; expected one class a line, in label order")
    return tuple(line_of)


def __getattr__(name: str) -> tuple[str, ...]:
    if name in _CONSTANTS:
        return _load_packaged(_CONSTANTS[name])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
