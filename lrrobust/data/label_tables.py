"""Classes of images that a table beside them says: a CSV with headings, or lines that begin with a file and its class."""

from __future__ import annotations

import csv
import io
import posixpath
import re
from collections import defaultdict

from lrrobust.data.class_lists import load_class_list
from lrrobust.data.file_trees import FileTree
from lrrobust.data.image_source import IMAGE_SUFFIXES
from lrrobust.errors import DataError

TABLE_SUFFIXES = (".csv", ".tsv", ".txt")

#: Of a column of classes, of letters alone. Not "target", which may say where an attack shall lead.
_HEADINGS = {"label", "labels", "class", "classname", "category", "wnid", "synset", "truelabel"}


def read_table(tree: FileTree, table: str) -> tuple[dict[str, str], set[str]]:
    """Image -> class, of images in and below the folder of `table`; and all its classes, of images elsewhere, too.

    It has their paths from there or file names, with or without suffix. Of two columns the headings may be any, or missing.

    Raises:
        DataError: it is no table, or leaves open which image or class is meant.
    """
    where = f"{tree.path}: {table!r}"
    rows = _read_rows(tree, table, where)
    cells = {cell for row in rows for cell in row}
    called: dict[str, list[str]] = defaultdict(list)
    above = posixpath.join(posixpath.dirname(table), "")
    for image in tree.names:
        if image.startswith(above) and _is_file(image):
            names = {image.removeprefix(above), posixpath.basename(image)}
            for name in cells & {*names, *(posixpath.splitext(name)[0] for name in names)}:
                called[name].append(image)
    if not called:
        return {}, set()
    heads: list[str] = []
    files_at = [column for column, cells in enumerate(zip(*rows)) if not called.keys().isdisjoint(cells)]
    if not any(cell in called or _is_file(cell) for cell in rows[0]):
        heads = [re.sub(r"[\W_]", "", cell.lower()) for cell in rows.pop(0)]
        files_at = [column for column in files_at if heads[column] not in _HEADINGS]
    # 7 may be 7.png, or a class; "7.png" is a file.
    files_at = [column for column in files_at if any(_is_file(row[column]) for row in rows)] or files_at
    # Without headings, numbers of several columns may be one of each class, or sizes.
    if not heads and (len(rows[0]) == 2 or not rows[0][1].isdigit()):
        files_at, classes_at = files_at[:1], [1]
    elif len(heads) == 2 and "target" not in "".join(heads):
        classes_at = [1 - column for column in files_at]
    else:
        classes_at = [column for column, head in enumerate(heads) if head in _HEADINGS]
    if len(files_at) != 1 or len(classes_at) != 1 or files_at == classes_at:
        raise DataError(f"{where}: expected one column of files and one called 'label', found {heads or rows[0]}"[:400])
    columns = files_at + classes_at
    # NeurIPS 2017's competition of attacks counts ImageNet's classes from 1.
    is_from_one = [heads[column] for column in columns if heads] == ["imageid", "truelabel"]
    imagenet = {str(place): wnid for place, wnid in enumerate(load_class_list("imagenet-1k"), start=1)}
    wnid_of: dict[str, str] = {}
    said = set()
    for row in rows:
        file, wnid = (row[column] for column in columns)
        wnid = imagenet.get(wnid, "") if is_from_one else wnid
        if not wnid or not wnid.isprintable() or "/" in wnid:
            raise DataError(f"{where}: expected a file and its class, found {row}"[:400])
        said.add(wnid)
        images = called.get(file, [])
        if len(images) > 1:
            raise DataError(f"{where}: {file!r} may be {images[0]!r} or {images[1]!r}; move one away")
        if images and (before := wnid_of.setdefault(images[0], wnid)) != wnid:
            raise DataError(f"{where}: {file!r} is of class {before!r}, and {wnid!r} further down; remove one line")
    return wnid_of, said


def _is_file(cell: str) -> bool:
    return cell.lower().endswith(IMAGE_SUFFIXES)


def _read_rows(tree: FileTree, table: str, where: str) -> list[list[str]]:
    try:
        text = tree.read(table).decode("utf-8-sig")
        head = text.partition("\n")[0]
        if (delimiter := max("\t,;", key=head.count)) in head:
            lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        else:
            lines = (line.rsplit(maxsplit=1) for line in text.splitlines())
        rows = [[cell.strip().replace("\\", "/").removeprefix("./") for cell in line] for line in lines if line] or [[]]
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{where} is no table in UTF-8: {error}") from error
    for number, row in enumerate(rows, start=1):
        if len(row) != max(2, len(rows[0])):
            raise DataError(f"{where}, line {number}: expected {max(2, len(rows[0]))} columns, found {row}"[:400])
    return rows
