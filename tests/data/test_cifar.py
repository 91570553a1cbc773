import pickle
import struct

import numpy as np
import pytest

from lrrobust.data.class_lists import load_class_list
from lrrobust.data.evaluation_set import build_evaluation_set
from lrrobust.data.preprocessing import Preprocessing
from lrrobust.data.sources import open_dataset
from lrrobust.errors import DataError

TEN = [name.encode() for name in load_class_list("cifar-10")]
HUNDRED = [name.encode() for name in load_class_list("cifar-100")]
_FILES = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]


def draw(seed, count=3, classes=10):
    generator = np.random.default_rng(seed)
    return generator.integers(0, classes, count).tolist(), generator.integers(0, 256, (count, 3072), dtype=np.uint8)


def dump(value):
    """As Python 2 and numpy of its time pickled it."""

    def write(value):
        if isinstance(value, bytes):
            return b"T" + struct.pack("<i", len(value)) + value
        if isinstance(value, int):
            return b"J" + struct.pack("<i", value)
        if isinstance(value, (list, tuple)):
            return b"(" + b"".join(map(write, value)) + (b"l" if isinstance(value, list) else b"t")
        if isinstance(value, dict):
            return b"(" + b"".join(write(key) + write(each) for key, each in value.items()) + b"d"
        kind = b"cnumpy\ndtype\nU\x02u1K\0K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb"
        made = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85U\x01b\x87R"
        order = b"\x89" if value.flags.c_contiguous else b"\x88"
        return made + b"(K\x01" + write(value.shape) + kind + order + write(value.tobytes("A")) + b"tb"

    return b"\x80\x02" + write(value) + b"."


def batch(seed):
    labels, pixels = draw(seed)
    pixels = np.asarray(pixels, order="CF"[seed % 2])
    return {b"batch_label": b"one", b"labels": labels, b"data": pixels, b"filenames": [b"a.png"] * 3}


def binary(labels, pixels, before=b""):
    return b"".join(before + bytes([label]) + image.tobytes() for label, image in zip(labels, pixels))


@pytest.fixture
def ten():
    files = {f"cifar-10-batches-py/{file}": dump(batch(seed)) for seed, file in enumerate(_FILES)}
    meta = {b"num_cases_per_batch": 3, b"label_names": TEN, b"num_vis": 3072}
    return files | {"cifar-10-batches-py/batches.meta": dump(meta), "cifar-10-batches-py/readme.html": b"x"}


@pytest.fixture
def ten_binary():
    files = {f"cifar-10-batches-bin/{file}.bin": binary(*draw(seed)) for seed, file in enumerate(_FILES)}
    return files | {"cifar-10-batches-bin/batches.meta.txt": b"\n".join(TEN) + b"\n\n"}


def test_the_pickles_of_these_tests_are_pickles():
    for seed in range(2):
        found = pickle.loads(dump(batch(seed)), encoding="bytes")
        np.testing.assert_array_equal(found[b"data"], draw(seed)[1])
        assert found[b"labels"] == draw(seed)[0]


@pytest.mark.parametrize("root", ["", "data/"])
def test_both_splits_of_both_formats_in_every_container(tmp_path, container, pack, ten, ten_binary, root):
    for split, seeds in (("test", [5]), ("train", range(5))):
        labels = sum((draw(seed)[0] for seed in seeds), [])
        pixels = np.concatenate([draw(seed)[1] for seed in seeds])
        expected = {f"{TEN[label].decode()}/{split}-{i:05d}": i for i, label in enumerate(labels)}
        sets = []
        for name, files in (("py", ten), ("bin", ten_binary)):
            (tmp_path / name).mkdir(exist_ok=True)
            path = tmp_path / name / container
            if not path.exists():
                pack(path, {root + file: content for file, content in files.items()})
            found = open_dataset(path if split == "test" else f"{path}#{split}")
            assert found.name == f"{container}#{split}" and list(found.keys) == sorted(expected)
            for index, (key, wnid) in enumerate(zip(found.keys, found.wnids)):
                assert wnid == key.split("/")[0]
                image = pixels[expected[key]].reshape(3, 32, 32).transpose(1, 2, 0)
                np.testing.assert_array_equal(np.asarray(found.read(index)), image)
            sets.append(build_evaluation_set(found, load_class_list("cifar-10"), Preprocessing(32)))
        assert sets[0].sha256 == sets[1].sha256


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("order", ["C", "F"])
def test_copies_pickled_anew_are_read(tmp_path, pack, ten, protocol, order):
    labels, pixels = draw(5)
    entry = {"labels": labels, "data": np.asarray(pixels, order=order)}
    copies = {"test_batch": entry, "batches.meta": {"label_names": [name.decode() for name in TEN]}}
    copied = {f"cifar-10-batches-py/{file}": pickle.dumps(value, protocol) for file, value in copies.items()}
    sources = [open_dataset(pack(tmp_path / name, files)) for name, files in (("old", ten), ("new", ten | copied))]
    old, new = [[(key, source.read_bytes(place)) for place, key in enumerate(source.keys)] for source in sources]
    assert old == new


def test_labels_are_positions_in_the_models_own_list(tmp_path, pack, ten):
    classes = load_class_list("cifar-10")[::-1]
    found = build_evaluation_set(open_dataset(pack(tmp_path / "x", ten)), classes, Preprocessing(32), n=2)
    assert [classes[label] for label in found.labels] == [key.split("/")[0] for key in found.keys]


def test_cifar_100_has_fine_classes(tmp_path, pack):
    labels, pixels = draw(1, classes=100)
    coarse = [3] * 3
    entry = {b"coarse_labels": coarse, b"fine_labels": labels, b"data": pixels}
    meta = {b"fine_label_names": HUNDRED, b"coarse_label_names": [b"fish"]}
    pickled = {"train": dump(entry), "test": dump(entry), "meta": dump(meta), "file.txt~": b""}
    packed = {"test.bin": binary(labels, pixels, b"\x03"), "fine_label_names.txt": b"\n".join(HUNDRED) + b"\n"}
    paths = [
        pack(tmp_path / f"{form}.tar.gz", {f"cifar-100-{form}/{name}": content for name, content in files.items()})
        for form, files in (("python", pickled), ("binary", packed))
    ]
    one, other = map(open_dataset, paths)
    assert one.keys == other.keys and sorted(one.wnids) == sorted(HUNDRED[label].decode() for label in labels)
    assert [one.read_bytes(i) for i in range(3)] == [other.read_bytes(i) for i in range(3)]
    with pytest.raises(DataError, match=r"lacks cifar-100-binary/train.bin: unpack or download it anew"):
        open_dataset(f"{paths[1]}#train")


class _Code:
    def __reduce__(self):
        return print, ("run",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (dump(batch(5))[:-3000], "EOFError"),
        (b"", "EOFError"),
        (pickle.dumps({b"labels": _Code()}), "asks for 'builtins.print', and no code in pickles is run"),
        (b"cos\nsystem\n(S'echo run'\ntR.", "asks for 'os.system'"),
        (b"cnumpy\nndarray\n(J\0\0\0\x7ftR.", "AttributeError"),
        (dump(batch(5) | {b"labels": [0, 1]}), r"expected 2 rows of 3072 bytes for as many labels, found \(3, 3072\)"),
        (dump(batch(5) | {b"labels": [0, 1, 10]}), "image 2 is of class 10, expected 0 to 9"),
        (dump(batch(5) | {b"labels": [0, -1, 1]}), "image 1 is of class -1"),
        (dump(batch(5) | {b"labels": [0, b"1", 1]}), "image 1 is of class b'1'"),
        (dump(batch(5) | {b"data": b"x"}), "AttributeError"),
        (dump(batch(5)).replace(b"u1", b"i1"), "expected 3 rows"),
        (dump({b"labels": [], b"data": np.zeros((0, 3072), np.uint8)}), "no image"),
        (dump({b"x": 1}), "KeyError"),
        (dump([1]), "AttributeError"),
        # The reader in C of some versions of Python takes 32 GB for this.
        (b"\x80\x02}r\xff\xff\xff\x7f.", "KeyError"),
    ],
)
def test_pickles_that_are_no_batch_are_one_line_and_run_nothing(tmp_path, pack, ten, content, message, capfd):
    path = pack(tmp_path / "x", ten | {"cifar-10-batches-py/test_batch": content})
    with pytest.raises(DataError, match=f"'cifar-10-batches-py/test_batch' is damaged.*{message}") as caught:
        open_dataset(path)
    assert "\n" not in str(caught.value) and "run" not in capfd.readouterr().out


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("test_batch.bin", bytes(3073 * 2 - 1), "6145 bytes, and an image takes 3073"),
        ("test_batch.bin", b"", "no image"),
        ("test_batch.bin", b"\x0a" + bytes(3072), "image 0 is of class 10, expected 0 to 9"),
        ("batches.meta.txt", b"ant\nant\n", "2 names of classes, some twice"),
        ("batches.meta.txt", b"", "0 names of classes"),
        ("batches.meta.txt", b"\xff", "UnicodeDecodeError"),
    ],
)
def test_binary_files_that_are_no_batch_are_one_line(tmp_path, pack, ten_binary, file, content, message):
    path = pack(tmp_path / "x", ten_binary | {f"cifar-10-batches-bin/{file}": content})
    with pytest.raises(DataError, match=f"'cifar-10-batches-bin/{file}' is damaged.*{message}"):
        open_dataset(path)


def test_what_is_missing_twice_or_no_split_is_said(tmp_path, pack, ten, ten_binary):
    both = pack(tmp_path / "both", ten | ten_binary)
    with pytest.raises(DataError, match="expected CIFAR once, found '.*-bin/batches.meta.txt', '.*-py/batches.meta'; give"):
        open_dataset(both)
    with pytest.raises(DataError, match="is CIFAR: expected 'cifar-10-batches-py#train' or '#test', found '#val'"):
        open_dataset(f"{both}/cifar-10-batches-py#val")
    with pytest.raises(DataError, match="two images are called"):
        open_dataset(f"{both}/cifar-10-batches-py,{both}/cifar-10-batches-bin")
    (both / "cifar-10-batches-py" / "data_batch_3").unlink()
    (both / "cifar-10-batches-py" / "data_batch_4").unlink()
    with pytest.raises(DataError, match="is CIFAR, and lacks data_batch_3, data_batch_4: unpack or download it anew"):
        open_dataset(f"{both}/cifar-10-batches-py#train")


def test_files_of_these_names_beside_images_are_no_batches(tmp_path, container, pack, pets):
    assert len(open_dataset(pack(tmp_path / container, pets | {"train": b"x", "test": b"x", "meta": b"x"}))) == 5
