import gzip
import io
import struct
import zipfile

import numpy as np
import pytest
from scipy.io import savemat

from lrrobust.data import file_trees
from lrrobust.data.class_lists import load_class_list
from lrrobust.data.evaluation_set import build_evaluation_set
from lrrobust.data.preprocessing import Preprocessing
from lrrobust.data.sources import open_dataset
from lrrobust.errors import DataError

PIXELS = np.random.default_rng(0).integers(0, 256, (4, 6, 8, 3), dtype=np.uint8)
LABELS = np.array([2, 0, 1, 1])
CLASSES = ("ant", "bee", "cat")
BY_CLASS = [1, 2, 3, 0]  # places in the order of the keys


def save(path, **arrays):
    if path.suffix == ".npz":
        np.savez_compressed(path, **arrays)
    else:
        for name, array in arrays.items():
            np.save(path.parent / f"{name}.npy", array)
    return path


def read(spec, *class_lists):
    found = open_dataset(spec, *(class_lists or (CLASSES,)))
    return found, np.stack([np.asarray(found.read(index)) for index in range(len(found))])


@pytest.mark.parametrize("suffix", [".npz", ".npy"])
@pytest.mark.parametrize(
    "images",
    [
        PIXELS,
        PIXELS.transpose(0, 3, 1, 2),
        PIXELS / 255,
        (PIXELS / np.float32(255)).astype(np.float32),
        (PIXELS / 255).astype(np.float16),
        PIXELS.astype(">f8") / 255,
        np.asfortranarray(PIXELS),
    ],
    ids=["last", "first", "float64", "float32", "float16", "swapped", "fortran"],
)
def test_images_and_classes_are_those_of_the_arrays(tmp_path, suffix, images, caplog):
    path = save(tmp_path / f"x_test{suffix}", x_test=images, y_test=LABELS)
    found, pixels = read(path)
    assert found.wnids == ("ant", "bee", "bee", "cat") and found.is_fork_safe and found.name == path.name
    assert found.keys == tuple(f"{CLASSES[LABELS[place]]}/x_test-{place:07d}" for place in BY_CLASS)
    np.testing.assert_array_equal(pixels, PIXELS[BY_CLASS])
    assert "0 is 'ant'" in caplog.text


def test_svhn_as_it_is_downloaded(tmp_path):
    savemat(tmp_path / "test_32x32.mat", {"X": PIXELS.transpose(1, 2, 3, 0), "y": np.array([[2], [10], [1], [1]])})
    found, pixels = read(tmp_path / "test_32x32.mat")
    assert found.wnids == ("ant", "bee", "bee", "cat")
    np.testing.assert_array_equal(pixels, PIXELS[BY_CLASS])
    for arrays in ({"X": PIXELS}, {"X": PIXELS[0], "y": LABELS}, {"y": LABELS}):
        savemat(tmp_path / "other.mat", arrays)
        with pytest.raises(DataError, match="other.mat: expected the cropped digits of SVHN"):
            open_dataset(tmp_path / "other.mat")
    (tmp_path / "other.mat").write_bytes(b"no MATLAB file at all, and yet called so")
    with pytest.raises(DataError, match="other.mat is damaged"):
        open_dataset(tmp_path / "other.mat")


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_mnist_as_it_is_downloaded_or_unpacked(tmp_path, suffix):
    write = gzip.compress if suffix else bytes
    images, labels = (tmp_path / f"t10k-{name}-ubyte{suffix}" for name in ("images-idx3", "labels-idx1"))
    content = struct.pack(">4I", 0x803, 4, 6, 8) + PIXELS[..., 0].tobytes()
    images.write_bytes(write(content))
    labels.write_bytes(write(struct.pack(">2I", 0x801, 4) + LABELS.astype(np.uint8).tobytes()))
    found, pixels = read(images)
    assert found.wnids == ("ant", "bee", "bee", "cat")
    np.testing.assert_array_equal(pixels[..., 0], PIXELS[BY_CLASS][..., 0])
    with pytest.raises(DataError, match="expected no split"):
        open_dataset(f"{images}#test")
    for damaged in (content[:-1], content + b"0", b"", b"text" + content[4:]):
        images.write_bytes(write(damaged))
        with pytest.raises(DataError, match="is damaged, cut short"):
            open_dataset(images)
    images.write_bytes(write(content))
    labels.unlink()
    with pytest.raises(DataError, match="cannot read .*labels-idx1-ubyte.*: No such file"):
        open_dataset(images)


@pytest.mark.parametrize("shape", [(4, 6, 8), (4, 6, 8, 1), (4, 1, 6, 8)])
def test_grey_images_of_medmnist(tmp_path, shape):
    grey = PIXELS[..., 0]
    path = save(tmp_path / "pneumonia.npz", images=grey.reshape(shape), labels=np.array(["cat", "ant", "bee", "bee"])[:, None])
    found, pixels = read(path)
    assert found.wnids == ("ant", "bee", "bee", "cat")
    np.testing.assert_array_equal(pixels, np.repeat(grey[BY_CLASS][..., None], 3, axis=3))


def test_a_batch_holds_what_the_array_does(tmp_path):
    path = save(tmp_path / "a.npz", x=PIXELS[:, :, :6], y=LABELS)
    built = build_evaluation_set(open_dataset(path, CLASSES), CLASSES, Preprocessing(6, 6))
    images, _ = built.load(range(4))
    np.testing.assert_array_equal((images * 255).round().permute(0, 2, 3, 1).numpy(), PIXELS[BY_CLASS][:, :, :6])
    assert built.labels == (0, 1, 1, 2)


def test_splits_of_a_file(tmp_path):
    arrays = {f"{split}_{what}": array[::step] for split, step in (("train", 1), ("val", -1), ("test", 1))
              for what, array in (("images", PIXELS), ("labels", LABELS))}  # fmt: skip
    path = save(tmp_path / "derma.npz", **arrays)
    np.testing.assert_array_equal(read(path)[1], read(f"{path}#val")[1])
    assert read(path)[0].name == read(f"{path}#val")[0].name == "derma.npz#val"
    np.testing.assert_array_equal(read(f"{path}#test")[1], PIXELS[BY_CLASS])
    keras = save(tmp_path / "mnist.npz", x_train=PIXELS[::-1], y_train=LABELS[::-1], x_test=PIXELS, y_test=LABELS)
    assert read(keras)[0].name == "mnist.npz#test"
    with pytest.raises(DataError, match="expected 'mnist.npz#train' or 'mnist.npz#test', found '#dev'"):
        open_dataset(f"{keras}#dev", CLASSES)
    odd = save(tmp_path / "odd.npz", x_a=PIXELS, y_a=LABELS, x_b=PIXELS, y_b=LABELS)
    with pytest.raises(DataError, match="expected 'odd.npz#a' or 'odd.npz#b', found x_a, y_a, x_b, y_b"):
        open_dataset(odd, CLASSES)


def test_severities_of_cifar_10_c(tmp_path):
    pixels = np.random.default_rng(1).integers(0, 256, (100, 32, 32, 3), dtype=np.uint8)
    classes = load_class_list("cifar-10")
    path = save(tmp_path / "fog.npy", fog=pixels, labels=np.tile(np.arange(20) % 10, 5).astype(np.uint8))
    found, read_pixels = read(f"{path}#3", classes)
    places = sorted(range(40, 60), key=lambda place: f"{classes[place % 10]}{place:04d}")
    assert found.name == "fog.npy#3" and [key[-3:] for key in found.keys] == [f"{place:03d}" for place in places]
    np.testing.assert_array_equal(read_pixels, pixels[places])
    for spec in (f"{path}", f"{path}#6", f"{path}#test"):
        with pytest.raises(DataError, match="one of its 5 severities, as in 'fog.npy#3'"):
            open_dataset(spec, classes)


def test_images_whose_classes_recur_by_chance_have_no_severities(tmp_path):
    x = save(tmp_path / "x.npy", x=np.tile(PIXELS[:2], (5, 1, 1, 1)), y=np.tile([0, 1], 5))
    assert [len(open_dataset(f"{x}{split}", CLASSES[:2])) for split in ("", "#2")] == [10, 2]
    x.rename(tmp_path / "mine.npy")
    with pytest.raises(DataError, match="none named; where it has none, call it x.npy"):
        open_dataset(tmp_path / "mine.npy", CLASSES[:2])


@pytest.mark.parametrize("names", [("image", "image_label"), ("x_data", "y_data"), ("target_images", "target_labels")])
def test_labels_of_images_are_labels(tmp_path, names):
    for suffix in (".npz", ".npy"):
        path = save(tmp_path / f"{names[0]}{suffix}", **dict(zip(names, (PIXELS, LABELS))))
        assert read(path)[0].wnids == ("ant", "bee", "bee", "cat")


def test_a_pattern_takes_all_corruptions_and_not_their_labels(tmp_path):
    save(tmp_path / "x.npy", fog=np.tile(PIXELS, (5, 1, 1, 1)), snow=np.tile(PIXELS, (5, 1, 1, 1)), labels=np.tile(LABELS, 5))
    found, pixels = read(f"{tmp_path}/*.npy#2")
    assert len(found) == 8 and found.keys[:2] == ("ant/fog-0000005", "ant/snow-0000005")
    np.testing.assert_array_equal(pixels[:2], PIXELS[[1, 1]])


def test_labels_are_those_called_as_the_images(tmp_path):
    save(tmp_path / "x.npy", x_test=PIXELS, y_test=LABELS, y_train=LABELS[::-1], v4_data=PIXELS, v6_labels=LABELS)
    assert read(tmp_path / "x_test.npy")[0].wnids == ("ant", "bee", "bee", "cat")
    with pytest.raises(DataError, match="classes in 'labels.npy' beside it, found v4_data.npy, v6_labels.npy"):
        open_dataset(tmp_path / "v4_data.npy", CLASSES)
    with pytest.raises(DataError, match="y_test.npy: expected images, with their classes in 'labels.npy' beside it"):
        open_dataset(tmp_path / "y_test.npy", CLASSES)
    with pytest.raises(DataError, match="such as 'folder/x_test.npy'"):
        open_dataset(tmp_path, CLASSES)


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"arr_0": PIXELS, "arr_1": LABELS}, "expected arrays as 'images' and 'labels', found arr_0, arr_1"),
        ({"x": PIXELS, "images": PIXELS, "y": LABELS}, "one array of images and one of labels, found x, images, y"),
        ({"x": PIXELS.astype(np.int64), "y": LABELS}, r"images \(N, H, W, 3\) of uint8, found \(4, 6, 8, 3\) of int64"),
        ({"x": PIXELS[..., :2], "y": LABELS}, r"found \(4, 6, 8, 2\) of uint8"),
        ({"x": PIXELS[:0], "y": LABELS[:0]}, r"found \(0, 6, 8, 3\) of uint8"),
        ({"x": PIXELS, "y": LABELS[:3]}, r"for each of 4 images, found \(3,\) of int64"),
        ({"x": PIXELS, "y": np.eye(4)}, r"for each of 4 images, found \(4, 4\) of float64"),
        ({"x": PIXELS, "y": LABELS - 1}, "names of classes, or numbers from 0, found '-1'"),
        ({"x": PIXELS, "y": np.array(["a", "b/c", "d", "e"])}, "found 'b/c'"),
        ({"x": PIXELS, "y": np.array([1, "a", None, {}], dtype=object)}, "damaged, cut short or holds no plain arrays"),
    ],
)  # fmt: skip
def test_other_arrays_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataError, match=message):
        open_dataset(tmp_path / "a.npz", CLASSES)


@pytest.mark.parametrize("values", [PIXELS / 254.5, PIXELS.astype(float), PIXELS / 127.5 - 1, np.where(PIXELS > 9, 1, np.nan)])
def test_floats_that_8_bits_do_not_hold_are_refused(tmp_path, values):
    path = save(tmp_path / "a.npz", x=values, y=LABELS)
    with pytest.raises(DataError, match=r"floats in \[0, 1\] of 8 bits, found others in image a-000000"):
        read(path)


@pytest.mark.parametrize("suffix", [".npz", ".npy"])
def test_damage_is_said_in_one_line(tmp_path, suffix):
    path = save(tmp_path / f"x{suffix}", x=PIXELS, y=LABELS)
    whole = path.read_bytes()
    for content in (b"", whole[:100], whole[: len(whole) - 5], b"no array at all", whole[:200] + b"\0" * (len(whole) - 200)):
        path.write_bytes(content)
        if suffix == ".npy" and len(content) == len(whole):
            continue  # other pixels
        with pytest.raises(DataError, match=f"x{suffix} is damaged, cut short or holds no plain arrays") as raised:
            read(path)
        assert "\n" not in str(raised.value)
    if suffix == ".npy":
        np.savez(tmp_path / "y.npz", y=LABELS)
        (tmp_path / "y.npz").rename(tmp_path / "y.npy")
        path.write_bytes(whole)
        with pytest.raises(DataError, match="y.npy is damaged, cut short or holds no plain arrays"):
            open_dataset(path, CLASSES)
    np.save(tmp_path / "one.npy", PIXELS)
    (tmp_path / "one.npy").rename(tmp_path / "one.npz")
    with pytest.raises(DataError, match="one.npz: expected several arrays, found one; call it .npy"):
        open_dataset(tmp_path / "one.npz", CLASSES)


def test_members_that_are_no_arrays_or_too_large_are_said(tmp_path, monkeypatch):
    path = save(tmp_path / "a.npz", x=PIXELS)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("y", "ant bee")
    with pytest.raises(DataError, match="holds no plain arrays .'y' is none"):
        open_dataset(path, CLASSES)

    def allocate(*_, **__):
        raise MemoryError("Unable to allocate 12.0 TiB")

    monkeypatch.setattr(np.lib.format, "read_array", allocate)
    with pytest.raises(DataError, match="does not fit into memory .*12.0 TiB.: save its arrays as .npy"):
        open_dataset(path, CLASSES)


def test_what_unpacks_to_far_more_than_images_is_refused(tmp_path, monkeypatch):
    path = save(tmp_path / "a.npz", x=np.zeros((4, 300, 300, 3), np.uint8), y=LABELS)
    assert len(open_dataset(path, CLASSES)) == 4
    monkeypatch.setattr(file_trees, "MAX_UNPACKED_BYTES", 1000)
    with pytest.raises(DataError, match="far more than images do"):
        open_dataset(path, CLASSES)


def test_a_file_claims_more_than_it_holds(tmp_path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (10**6, 10**4, 10**4, 3)})
    (tmp_path / "x.npy").write_bytes(header.getvalue())
    np.save(tmp_path / "y.npy", LABELS)
    with pytest.raises(DataError, match="damaged"):
        open_dataset(tmp_path / "x.npy", CLASSES)
