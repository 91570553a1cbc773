import numpy as np
import pytest
import torch

from lrrobust.data.evaluation_set import build_evaluation_set
from lrrobust.data.preprocessing import Preprocessing
from lrrobust.data.sources import open_dataset
from lrrobust.data.training_images import load_training_images
from lrrobust.errors import DataError

CLASSES = ("fly", "dog", "altar", "cat")


@pytest.fixture
def source(tmp_path, pack, pets):
    return open_dataset(pack(tmp_path / "pets.tar.xz", pets))


def test_images_and_labels_in_the_order_of_the_source(source):
    images, labels = load_training_images(source, CLASSES, 8)
    assert (images.shape, images.dtype, images.is_contiguous()) == ((5, 3, 8, 8), torch.uint8, True)
    assert (labels.tolist(), labels.dtype) == ([3, 3, 3, 1, 1], torch.int64)
    for i in range(5):
        np.testing.assert_array_equal(images[i].numpy(), np.asarray(source.read(i)).transpose(2, 0, 1))


def test_training_sees_what_evaluation_sees(tmp_path, pack, encode):
    sizes = [(40, 30), (30, 40), (16, 16), (9, 20)]
    files = {f"cat/{i}.png": encode(i, size, "PNG") for i, size in enumerate(sizes)}
    source = open_dataset(pack(tmp_path / "x", files))
    images, _ = load_training_images(source, CLASSES, 16)
    evaluated, _ = build_evaluation_set(source, CLASSES, Preprocessing(16)).load(range(4))
    torch.testing.assert_close(images.float() / 255, evaluated, rtol=0, atol=0)


def test_other_classes_are_left_out(source):
    images, labels = load_training_images(source, ["dog"], 8)
    assert len(images) == 2 and labels.tolist() == [0, 0]
    with pytest.raises(DataError, match="none of its 5 images .*expected classes such as 'altar', found 'cat', 'dog'"):
        load_training_images(source, ["altar"], 8)


def test_damaged_image_is_named(tmp_path, pack, pets):
    source = open_dataset(pack(tmp_path / "x", {**pets, "dog/1.jpeg": b"no image"}))
    with pytest.raises(DataError, match="x: image 'dog/1.jpeg' is no JPEG"):
        load_training_images(source, CLASSES, 8)


def test_progress(source):
    seen = []
    load_training_images(source, CLASSES, 8, on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(5, 5)]
