import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from lrrobust.data import file_trees, parquet_tree
from lrrobust.data.evaluation_set import build_evaluation_set
from lrrobust.data.image_source import CorruptImageError
from lrrobust.data.preprocessing import Preprocessing
from lrrobust.data.sources import open_dataset
from lrrobust.errors import DataError

NAMES = ["ant", "bee", "cat"]
LABELS = [2, 0, 1, 1]


def encode(seed):
    content = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(content, "PNG")
    return content.getvalue()


IMAGES = [encode(seed) for seed in range(4)]


def write(path, columns, features):
    """A file as the library `datasets` writes them."""
    table = pa.table(columns)
    if features is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path)
    return path


def images(paths=(None,) * 4, contents=IMAGES):
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return pa.array([{"bytes": content, "path": path} for content, path in zip(contents, paths)], kind)


def class_label(names=NAMES):
    return {"names": names, "_type": "ClassLabel"}


FEATURES = {"image": {"_type": "Image"}, "label": class_label()}


def test_images_and_classes_are_those_of_the_rows(tmp_path):
    path = write(tmp_path / "validation.parquet", {"image": images(), "label": LABELS}, FEATURES)
    found = open_dataset(path)
    assert found.wnids == ("ant", "bee", "bee", "cat") and not found.is_fork_safe
    assert [found.read_bytes(index) for index in range(4)] == [IMAGES[1], IMAGES[2], IMAGES[3], IMAGES[0]]
    assert found.read(0).size == (8, 8)


def test_a_folder_of_the_same_images_is_evaluated_alike(tmp_path):
    path = write(tmp_path / "validation.parquet", {"image": images(), "label": LABELS}, FEATURES)
    for row, (label, content) in enumerate(zip(LABELS, IMAGES)):
        (tmp_path / "images" / NAMES[label]).mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / NAMES[label] / f"validation-{row:07d}.png").write_bytes(content)
    classes = ("cat", "ant", "bee")
    ours, theirs = (build_evaluation_set(open_dataset(each), classes, Preprocessing(8)) for each in (path, tmp_path / "images"))
    assert ours.labels == theirs.labels == (1, 2, 2, 0)
    pixels = [each.load(range(4))[0] for each in (ours, theirs)]
    assert (pixels[0] == pixels[1]).all()


def test_several_files_are_one_data_set(tmp_path):
    for number in range(2):
        rows = slice(2 * number, 2 * number + 2)
        columns = {"image": images(contents=IMAGES[rows]), "label": LABELS[rows]}
        write(tmp_path / f"validation-0000{number}-of-00002.parquet", columns, FEATURES)
    found = open_dataset(str(tmp_path / "validation-*.parquet"))
    assert found.wnids == ("ant", "bee", "bee", "cat") and {found.read_bytes(index) for index in range(4)} == set(IMAGES)


def test_imagenet_is_taken_by_the_wnids_that_its_images_are_called_after(tmp_path):
    wnids = ["n02119789", "n02100735", "n02110185"]
    paths = [f"ILSVRC2012_val_0000000{row}_{wnids[label]}.JPEG" for row, label in enumerate(LABELS)]
    path = write(tmp_path / "validation.parquet", {"image": images(paths), "label": LABELS}, FEATURES)
    assert open_dataset(path).wnids == ("n02100735", "n02100735", "n02110185", "n02119789")
    # Not where they say another thing than the labels, or only some say anything.
    for other in (f"ILSVRC2012_val_00000003_{wnids[0]}.JPEG", "3.JPEG", None):
        write(path, {"image": images([*paths[:3], other]), "label": LABELS}, FEATURES)
        assert set(open_dataset(path).wnids) == set(NAMES)


def test_other_columns(tmp_path):
    path = tmp_path / "cifar.parquet"
    features = {"img": {"_type": "Image"}, "fine": class_label(), "coarse": class_label(["alive", "dead"])}
    write(path, {"img": images(), "thumbnail": IMAGES, "fine": LABELS, "coarse": [0, 1, 0, 0]}, features)
    with pytest.raises(DataError, match="classes stand in fine, coarse; name the column to take, as in 'cifar.parquet#fine'"):
        open_dataset(path)
    assert set(open_dataset(f"{path}#fine").wnids) == set(NAMES)
    assert set(open_dataset(f"{path}#coarse").wnids) == {"alive", "dead"}
    with pytest.raises(DataError, match="classes in a column 'medium'"):
        open_dataset(f"{path}#medium")
    # Bytes alone, and names alone, from elsewhere.
    write(path, {"image": IMAGES, "label": [NAMES[label] for label in LABELS]}, None)
    assert open_dataset(path).wnids == ("ant", "bee", "bee", "cat")


@pytest.mark.parametrize(
    ("columns", "features", "message"),
    [
        ({"image": images(), "label": LABELS}, None, "expected a column of classes, with their names"),
        ({"image": images(), "label": LABELS}, {"label": class_label(["ant", "ant", "bee"])}, "expected a column of classes"),
        ({"image": images(), "label": [0, 1, 2, -1]}, FEATURES, "row 3 has no class: expected a number from 0 to 2, found -1"),
        ({"image": images(), "label": [0, 1, 2, None]}, FEATURES, "row 3 has no class.*found None"),
        ({"image": images(), "label": ["ant", "", "a", "b"]}, None, "row 1 has no class: expected a name, found ''"),
        ({"image": images(contents=[*IMAGES[:3], None]), "label": LABELS}, FEATURES, "row 3 has no image in 'image'"),
        ({"label": LABELS}, FEATURES, "expected one column of encoded images, found none among label"),
        ({"image": IMAGES, "other": IMAGES, "label": LABELS}, {"label": class_label()}, "found image, other"),
        ({"image": [1, 2, 3, 4], "label": LABELS}, FEATURES, "expected encoded images in 'image', found int64"),
    ],
)
def test_what_does_not_say_which_image_is_of_which_class_is_refused(tmp_path, columns, features, message):
    with pytest.raises(DataError, match=message):
        open_dataset(write(tmp_path / "some.parquet", columns, features))


def test_damage_is_one_line(tmp_path):
    path = write(tmp_path / "some.parquet", {"image": images(), "label": LABELS}, FEATURES)
    content = path.read_bytes()
    for damaged in (b"", b"PAR1", content[: len(content) // 2], content[:40] + b"x" * 60 + content[100:]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="some.parquet.*copy or download it anew"):
            open_dataset(path)


def test_images_and_files_of_no_bounded_size_are_refused(tmp_path, monkeypatch):
    path = write(tmp_path / "some.parquet", {"image": images(contents=[*IMAGES[:3], bytes(1000)]), "label": LABELS}, FEATURES)
    monkeypatch.setattr(file_trees, "MAX_MEMBER_BYTES", 500)
    found = open_dataset(path)
    assert found.read_bytes(0) == IMAGES[1]
    with pytest.raises(CorruptImageError, match="1000 bytes; at most 500"):
        found.read_bytes(2)
    monkeypatch.setattr(parquet_tree, "most_unpacked_bytes", lambda _: 500)
    with pytest.raises(DataError, match="unpacks to far more than images do"):
        open_dataset(path)


def test_a_folder_of_them_says_how_they_are_given(tmp_path):
    write(tmp_path / "validation-00000-of-00001.parquet", {"image": images(), "label": LABELS}, FEATURES)
    with pytest.raises(DataError, match=r"give their names or a pattern such as 'folder/validation-\*\.parquet'"):
        open_dataset(tmp_path)
