import json

import numpy as np
import pytest
import torch

from lrrobust.data.evaluation_set import build_evaluation_set
from lrrobust.data.preprocessing import Preprocessing
from lrrobust.data.sources import open_dataset
from lrrobust.errors import DataError

CLASSES = ("fly", "dog", "altar", "cat")  # neither sorted nor all present
EXACT = Preprocessing(8)


@pytest.fixture
def source(tmp_path, pack, pets):
    return open_dataset(pack(tmp_path / "pets.zip", pets))


@pytest.fixture
def damaged(tmp_path, pack, pets):
    broken = {"cat/2.jpg": pets["cat/2.jpg"][:100], "dog/2.JPEG": b""}
    return open_dataset(pack(tmp_path / "damaged", {**pets, **broken}))


def test_labels_follow_the_class_list(source):
    chosen = build_evaluation_set(source, CLASSES, EXACT)
    assert len(chosen) == 5
    assert chosen.keys == ("cat/1.jpg", "cat/2.jpg", "cat/3.png", "dog/1.jpeg", "dog/2.JPEG")
    assert chosen.wnids == ("cat", "cat", "cat", "dog", "dog")
    assert chosen.labels == (3, 3, 3, 1, 1)
    assert chosen.indices == (0, 1, 2, 3, 4)


def test_load_gives_images_and_labels_in_the_order_asked_for(source):
    images, labels = build_evaluation_set(source, CLASSES, EXACT).load([4, 2])
    assert (images.shape, images.dtype, images.is_contiguous()) == ((2, 3, 8, 8), torch.float32, True)
    assert labels.dtype == torch.int64 and labels.tolist() == [1, 3]
    pixels = np.random.default_rng(2).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    expected = torch.tensor(pixels).permute(2, 0, 1).float() / 255
    torch.testing.assert_close(images[1], expected, rtol=0, atol=0)


def test_another_model_sees_the_same_images_with_its_own_labels_and_size(source):
    ours = build_evaluation_set(source, CLASSES, EXACT, n=3)
    theirs = ours.seen_by(("dog", "cat"), Preprocessing(4))
    again = build_evaluation_set(source, ("dog", "cat"), Preprocessing(4), known_classes=CLASSES, n=3)
    assert theirs.record() == ours.record() == again.record()
    assert theirs.labels == again.labels != ours.labels
    torch.testing.assert_close(theirs.load([0, 2]), again.load([0, 2]), rtol=0, atol=0)


def test_load_of_nothing_is_empty(source):
    images, labels = build_evaluation_set(source, CLASSES, EXACT).load([])
    assert images.shape == (0, 3, 8, 8) and labels.shape == (0,)


def test_packing_does_not_change_the_hash(tmp_path, container, pack, pets, source):
    packed = build_evaluation_set(open_dataset(pack(tmp_path / container, pets)), CLASSES, EXACT)
    reference = build_evaluation_set(source, CLASSES, EXACT)
    assert packed.sha256 == reference.sha256
    assert (packed.keys, packed.labels) == (reference.keys, reference.labels)
    torch.testing.assert_close(packed.load(range(5))[0], reference.load(range(5))[0], rtol=0, atol=0)


def test_hash_depends_on_keys_bytes_and_classes(tmp_path, pack, pets, encode):
    def sha256(name, files):
        return build_evaluation_set(open_dataset(pack(tmp_path / name, files)), CLASSES, EXACT).sha256

    without = {key: content for key, content in pets.items() if key != "cat/1.jpg"}
    variants = {
        sha256("same", pets),
        sha256("renamed", {**without, "cat/0.jpg": pets["cat/1.jpg"]}),
        sha256("other class", {**without, "altar/1.jpg": pets["cat/1.jpg"]}),
        sha256("other bytes", {**pets, "cat/1.jpg": encode(99)}),
        sha256("fewer", without),
    }
    assert len(variants) == 5
    assert sha256("copy", pets) in variants


def test_copies_under_other_names_are_counted(tmp_path, pack, pets):
    for name, files, copies in (("without", pets, 0), ("with", {**pets, "cat/9.jpg": pets["cat/1.jpg"]}, 1)):
        assert build_evaluation_set(open_dataset(pack(tmp_path / name, files)), CLASSES, EXACT).copies == copies


def test_hash_is_pinned(tmp_path, pack):
    # Results name the images by this hash; a change would orphan every stored result.
    bmp = b"BM" + (58).to_bytes(4, "little") + bytes(4) + (54).to_bytes(4, "little") + (40).to_bytes(4, "little")
    bmp += (1).to_bytes(4, "little") * 2 + (1).to_bytes(2, "little") + (24).to_bytes(2, "little") + bytes(24)
    bmp += bytes([3, 2, 1, 0])
    source = open_dataset(pack(tmp_path / "x", {"cat/1.bmp": bmp}))
    chosen = build_evaluation_set(source, ["cat"], Preprocessing(1))
    assert (chosen.load([0])[0] * 255).flatten().tolist() == [1, 2, 3]
    assert chosen.sha256 == "6efb8619153eb05e9d540c6542d883b3d4721752dde448c4070500e14e5f7e50"


def test_images_of_other_classes_are_left_out(source):
    chosen = build_evaluation_set(source, ["dog"], EXACT)
    assert (chosen.wnids, chosen.labels, chosen.indices, chosen.left_out_count) == (("dog", "dog"), (0, 0), (3, 4), 3)


def test_classes_of_one_side_only_are_named(source):
    chosen = build_evaluation_set(source, ["hound", "dog", "Cat"], EXACT)
    assert chosen.left_out_classes == (("cat",), ("hound", "Cat"))
    assert build_evaluation_set(source, CLASSES, EXACT, known_classes={"dog", "zebra"}).left_out_classes[0] == ("cat",)


def test_known_classes_leave_out_without_moving_labels(source):
    chosen = build_evaluation_set(source, CLASSES, EXACT, known_classes={"dog", "zebra"})
    assert (chosen.labels, chosen.left_out_count) == ((1, 1), 3)


def test_no_common_class_shows_both_sides(source):
    with pytest.raises(DataError, match=r"none of its 5 images .*such as 'n1', 'n2', found 'cat', 'dog'"):
        build_evaluation_set(source, ["n1", "n2"], EXACT)


def test_draws(source):
    two = build_evaluation_set(source, CLASSES, EXACT, n=2, seed=4)
    three = build_evaluation_set(source, CLASSES, EXACT, n=3, seed=4)
    assert len(two) == 2 and set(two.keys) < set(three.keys)
    for seed in range(5):
        balanced = build_evaluation_set(source, CLASSES, EXACT, n=4, seed=seed, balanced=True)
        assert balanced.labels == (3, 3, 1, 1)
    with pytest.raises(DataError, match="3 images asked for, and only 2"):
        build_evaluation_set(source, ["dog"], EXACT, n=3)


def test_explicit_indices_count_in_the_source(source):
    chosen = build_evaluation_set(source, CLASSES, EXACT, indices=[4, 1])
    assert (chosen.indices, chosen.keys) == ((1, 4), ("cat/2.jpg", "dog/2.JPEG"))
    assert chosen.record()["subset"] == {"explicit": 2}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"indices": [3, 5]}, "expected indices from 0 to 4, got 5"),
        ({"indices": [-1]}, "expected indices from 0 to 4, got -1"),
        ({"indices": [0]}, r"image 0 \('cat/1.jpg'\) is of class 'cat', which is not among the classes"),
        ({"indices": [3, 3]}, "index 3 is given twice"),
        ({"indices": []}, "at least one index"),
        ({"indices": [3], "n": 1}, "either explicit indices or a draw"),
        ({"indices": [3], "balanced": True}, "either explicit indices or a draw"),
    ],
)
def test_bad_indices_are_refused(source, options, message):
    with pytest.raises(DataError, match=message):
        build_evaluation_set(source, ["dog"], EXACT, **options)


def test_corrupt_images_are_all_named(damaged):
    with pytest.raises(DataError, match=r"2 of 5 .*: 'cat/2.jpg', 'dog/2.JPEG'; .*--skip-corrupt"):
        build_evaluation_set(damaged, CLASSES, EXACT)


def test_corrupt_images_are_dropped_on_request(damaged):
    chosen = build_evaluation_set(damaged, CLASSES, EXACT, skip_corrupt=True)
    assert chosen.corrupt_keys == ("cat/2.jpg", "dog/2.JPEG")
    assert (chosen.indices, chosen.labels) == ((0, 2, 3), (3, 3, 1))
    assert chosen.load(range(3))[1].tolist() == [3, 3, 1]


def test_many_corrupt_images_are_counted(tmp_path, pack):
    source = open_dataset(pack(tmp_path / "x", {f"cat/{i}.jpg": b"" for i in range(9)}))
    with pytest.raises(DataError, match=r"'cat/4.jpg' and 4 more"):
        build_evaluation_set(source, CLASSES, EXACT)
    with pytest.raises(DataError, match="none of the 9 chosen images can be decoded"):
        build_evaluation_set(source, CLASSES, EXACT, skip_corrupt=True)


def test_corrupt_image_outside_of_the_subset_does_no_harm(damaged):
    assert build_evaluation_set(damaged, CLASSES, EXACT, indices=[0, 2, 3]).corrupt_keys == ()


def test_vanished_file_is_no_corruption(tmp_path, pack, pets):
    root = pack(tmp_path / "pets", pets)
    source = open_dataset(root)
    (root / "cat/2.jpg").unlink()
    with pytest.raises(DataError, match=r"cannot read .*cat/2.jpg: No such file"):
        build_evaluation_set(source, CLASSES, EXACT, skip_corrupt=True)


@pytest.mark.parametrize("change", ["replace", "truncate", "remove"])
def test_change_after_the_check_is_noticed(tmp_path, pack, pets, change):
    root = pack(tmp_path / "pets", pets)
    chosen = build_evaluation_set(open_dataset(root), CLASSES, EXACT)
    if change == "remove":
        (root / "cat/2.jpg").unlink()
    else:
        (root / "cat/2.jpg").write_bytes(pets["cat/1.jpg"] if change == "replace" else pets["cat/2.jpg"][:-9])
    chosen.load([0, 2])
    with pytest.raises(DataError, match="cat/2.jpg"):
        chosen.load([0, 1])


def test_record_is_json(damaged):
    chosen = build_evaluation_set(damaged, CLASSES[1:], EXACT, n=5, seed=7, balanced=True, skip_corrupt=True)
    assert json.loads(json.dumps(chosen.record())) == {
        "name": "damaged",
        "sha256": chosen.sha256,
        "n": 3,
        "left_out_count": 0,
        "corrupt_keys": ["cat/2.jpg", "dog/2.JPEG"],
        "subset": {"n": 5, "seed": 7, "balanced": True},
    }


def test_progress_reaches_the_number_of_images(source):
    seen = []
    build_evaluation_set(source, CLASSES, EXACT, n=3, on_progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (3, 3)


def test_images_are_preprocessed(tmp_path, pack, encode):
    source = open_dataset(pack(tmp_path / "x", {"cat/1.png": encode(0, (40, 30), "PNG")}))
    preprocessing = Preprocessing(16, 20, "bicubic")
    images, _ = build_evaluation_set(source, CLASSES, preprocessing).load([0])
    torch.testing.assert_close(images[0], preprocessing(source.read(0)), rtol=0, atol=0)
