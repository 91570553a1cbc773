import pytest
import torch

from lrrobust.data.tensor_images import TensorImages, check_images

CLASSES = ("ant", "bee", "cat")


@pytest.fixture
def images():
    return torch.rand(4, 3, 5, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def labels():
    return torch.tensor([2, 0, 0, 1])


def test_gives_what_it_was_given(images, labels):
    found = TensorImages("mine", images, labels, CLASSES)
    pixels, of_them = found.load([3, 0])
    assert torch.equal(pixels, images[[3, 0]]) and of_them.tolist() == [1, 2] and of_them.dtype == torch.int64
    assert len(found) == 4 and found.wnids == ("cat", "ant", "ant", "bee") and len(set(found.keys)) == 4
    assert found.record()["n"] == 4 and found.record()["name"] == "mine"


def test_hash_tells_pixels_labels_and_shapes_apart(images, labels):
    changed = images.clone()
    changed[2, 1, 0, 0] += 1e-6
    variants = [
        (images, labels, CLASSES),
        (changed, labels, CLASSES),
        (images, torch.tensor([2, 0, 1, 1]), CLASSES),
        (images.reshape(4, 3, 6, 5), labels, CLASSES),
        (images[:3], labels[:3], CLASSES),
        (images, labels, ("ant", "bee", "dog")),
    ]
    hashes = [TensorImages("mine", *variant).record()["sha256"] for variant in variants]
    assert len(set(hashes)) == len(variants)
    assert TensorImages("other", images.to(memory_format=torch.channels_last), labels, CLASSES).record()["sha256"] == hashes[0]


def test_labels_of_no_class_are_refused(images, labels):
    with pytest.raises(ValueError, match="expected labels of 0 to 1, got 0 to 2"):
        TensorImages("mine", images, labels, CLASSES[:2])


def test_copies_are_counted(images, labels):
    assert TensorImages("mine", images, labels, CLASSES).copies == 0
    assert TensorImages("mine", images[[0, 1, 0, 0]], labels, CLASSES).copies == 2


@pytest.mark.filterwarnings("error")
def test_what_is_wrong_says_what_to_do(images, labels):
    check_images(images.requires_grad_(), labels)
    with pytest.raises(ValueError, match="images / 255$"):
        check_images(images * 255, labels)
    for given, hint in ((torch.eye(4), r"labels.argmax\(1\)$"), (labels[:, None], r"labels.flatten\(\).long\(\)$")):
        with pytest.raises(ValueError, match=hint):
            check_images(images, given)
