import io

import numpy as np
import pytest
from scipy.io import savemat

from lrrobust.data.sources import open_dataset
from lrrobust.errors import DataError

WNIDS = ["n00000011", "n00000022", "n00000033"]
KIT = "ILSVRC2012_devkit_t12"


def _meta() -> bytes:
    rows = [(3, WNIDS[2], 0), (1, WNIDS[0], 0), (2, WNIDS[1], 0), (1001, "n00000099", 2)]
    synsets = np.array(rows, dtype=[("ILSVRC2012_ID", "O"), ("WNID", "O"), ("num_children", "O")]).reshape(-1, 1)
    out = io.BytesIO()
    savemat(out, {"synsets": synsets})
    return out.getvalue()


@pytest.fixture
def devkit() -> dict[str, bytes]:
    return {
        f"{KIT}/data/ILSVRC2012_validation_ground_truth.txt": b"2\n3\n2\n1\n",
        f"{KIT}/data/meta.mat": _meta(),
        f"{KIT}/readme.txt": b"hello",
    }


@pytest.fixture
def images(encode) -> dict[str, bytes]:
    return {f"ILSVRC2012_val_{i:08d}.JPEG": encode(i) for i in range(1, 5)}


def _check(source, images):
    expected = dict(zip(sorted(images), ["n00000022", "n00000033", "n00000022", "n00000011"]))
    assert {key.split("/")[1]: wnid for key, wnid in zip(source.keys, source.wnids)} == expected
    assert [source.read_bytes(i) for i in range(4)] == [images[key.split("/")[1]] for key in source.keys]


def test_flat_tar_with_the_devkit_beside_it(tmp_path, pack, images, devkit):
    pack(tmp_path / f"{KIT}.tar.gz", devkit)
    _check(open_dataset(pack(tmp_path / "ILSVRC2012_img_val.tar", images)), images)


@pytest.mark.parametrize("prefix", ["", "val/", "ILSVRC2012_img_val/"])
def test_flat_folder_with_an_unpacked_devkit_in_it(tmp_path, pack, images, devkit, prefix):
    root = pack(tmp_path / "imagenet", {prefix + name: content for name, content in images.items()})
    pack(root, devkit)
    _check(open_dataset(root), images)


TABLE = "ImageId,PredictionString\n" + "".join(
    f"ILSVRC2012_val_{i:08d},{wnid} 1 2 30 40 {f'{wnid} 5 6 7 8 ' * (i % 2)}\n"
    for i, wnid in ((3, WNIDS[1]), (1, WNIDS[1]), (4, WNIDS[0]), (2, WNIDS[2]))
)


def test_the_table_of_kaggle_takes_the_place_of_the_devkit(tmp_path, pack, images):
    val = "ILSVRC/Data/CLS-LOC/val"
    root = pack(tmp_path / "kaggle", {f"{val}/{name}": content for name, content in images.items()})
    tar = pack(root / "val.tar", images)
    (root / "LOC_val_solution.csv").write_text(TABLE)
    for path in (root, root / val, tar):
        _check(open_dataset(path), images)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("", "line 1: expected ImageId,PredictionString"),
        (TABLE.partition("\n")[2], "line 1: expected"),
        (TABLE + "ILSVRC2012_val_00000001,n00000011 1 2 3 4\n", "line 6: .*each image once"),
        (TABLE.replace("n00000022 5", "n00000033 5"), "line 2: .*one class an image"),
        (TABLE[:-30], "line 5: .*found 'ILSVRC2012_val_"),
        (TABLE[: TABLE.rindex("ILSVRC")], "'.*ILSVRC2012_val_00000002.JPEG' has no label; 3 others have one"),
    ],
)
def test_a_table_that_is_not_as_published_is_refused(tmp_path, pack, images, table, message):
    (tmp_path / "LOC_val_solution.csv").write_text(table)
    with pytest.raises(DataError, match=message):
        open_dataset(pack(tmp_path / "ILSVRC2012_img_val.tar", images))


def test_flat_val_beside_sorted_train(tmp_path, pack, images, devkit, encode):
    root = pack(tmp_path / "imagenet", {f"val/{name}": content for name, content in images.items()})
    pack(root, {"train/n00000011/n00000011_1.JPEG": encode()})
    pack(tmp_path / f"{KIT}.tar.gz", devkit)
    _check(open_dataset(root), images)


def test_sorted_validation_images_need_no_devkit(tmp_path, pack, images):
    root = pack(tmp_path / "val", {f"n00000011/{name}": content for name, content in images.items()})
    assert set(open_dataset(root).wnids) == {"n00000011"}


def test_missing_devkit_says_where_to_put_it(tmp_path, pack, images):
    path = pack(tmp_path / "ILSVRC2012_img_val.tar", images)
    with pytest.raises(DataError, match=r"put .* or ILSVRC2012_devkit_t12.tar.gz .* at ") as caught:
        open_dataset(path)
    assert str(caught.value).endswith(str(tmp_path / f"{KIT}.tar.gz"))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("meta.mat", None, "expected a file data/meta.mat"),
        ("meta.mat", b"damaged" * 100, "cannot read data/meta.mat"),
        ("ILSVRC2012_validation_ground_truth.txt", None, "expected a file data/ILSVRC2012_validation_ground_truth.txt"),
        ("ILSVRC2012_validation_ground_truth.txt", b"1\n2\nthree\n4\n", "expected ids from 1 to 1000"),
        ("ILSVRC2012_validation_ground_truth.txt", b"1\n2\n1001\n3\n", "expected ids from 1 to 1000"),
        ("ILSVRC2012_validation_ground_truth.txt", b"1\n2\n", r"'ILSVRC2012_val_00000003.JPEG' has no label"),
    ],
)
def test_unusable_devkit_is_refused(tmp_path, pack, images, devkit, file, content, message):
    if content is None:
        del devkit[f"{KIT}/data/{file}"]
    else:
        devkit[f"{KIT}/data/{file}"] = content
    pack(tmp_path / f"{KIT}.tar.gz", devkit)
    with pytest.raises(DataError, match=message):
        open_dataset(pack(tmp_path / "ILSVRC2012_img_val.tar", images))
