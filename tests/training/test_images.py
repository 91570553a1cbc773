import numpy as np
import pytest
import torch
from PIL import Image

from lrrobust.data.preprocessing import Preprocessing
from lrrobust.data.sources import open_dataset
from lrrobust.errors import DataError
from lrrobust.training.augmentation import crop_box, draw_views
from lrrobust.training.images import Batch, StreamedImages, TrainingSet


@pytest.fixture
def photos(tmp_path):
    """Twelve photos of 30 x 20 pixels in three classes; the red of photo i is 20 i, green grows to the right."""
    for i in range(12):
        pixels = np.zeros((20, 30, 3), np.uint8)
        pixels[..., 0] = 20 * i
        pixels[..., 1] = np.arange(30) * 8
        folder = tmp_path / "photos" / "abc"[i % 3]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{i:02}.png")
    return open_dataset(tmp_path / "photos")


@pytest.fixture
def streamed(photos):
    def build(workers=0):
        labels = torch.tensor([ord(wnid) - ord("a") for wnid in photos.wnids])
        return StreamedImages(photos, tuple(range(12)), labels, workers)

    return build


def batch_of(positions, size=16):
    generator = torch.Generator().manual_seed(0)
    return Batch(
        torch.tensor(positions), draw_views(len(positions), crop_scale_min=0.3, horizontal_flip=True, generator=generator), size
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_streamed_crops_are_those_of_the_views(photos, streamed, workers):
    data = streamed(workers)
    asked = [batch_of([3, 7, 0, 11]), batch_of([5, 1], size=12)]
    for batch, images in zip(asked, data.batches(iter(asked)), strict=True):
        assert images.dtype == torch.uint8 and images.shape == (len(batch.positions), 3, batch.size, batch.size)
        for image, position, crop in zip(images, batch.positions.tolist(), batch.views.crops(), strict=True):
            number = int(photos.keys[position].partition("/")[2][:2])
            assert (image[0] == 20 * number).all()
            left, _, right, _ = crop_box(*crop, 30, 20)
            # Green at a pixel's centre is 8 times its column, less half a pixel.
            centres = left + (right - left) * (torch.arange(batch.size) + 0.5) / batch.size - 0.5
            torch.testing.assert_close(image[1].float().mean(0)[1:-1], 8 * centres.clamp(0, 29)[1:-1], rtol=0, atol=5)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_image_is_said_in_one_line_wherever_it_is_decoded(photos, streamed, tmp_path, workers):
    (tmp_path / "photos" / photos.keys[7]).write_bytes(b"")
    with pytest.raises(DataError, match=f"photos: image '{photos.keys[7]}' is no JPEG[^\n]*; replace or remove it$"):
        list(streamed(workers).batches(iter([batch_of([3, 7, 0, 11])])))


def test_crop_boxes_are_those_of_images_in_memory():
    # A ramp tells where a crop of a square image lies.
    from lrrobust.training.augmentation import augment

    ramp = torch.arange(64, dtype=torch.uint8).view(1, 1, 1, 64).expand(1, 1, 64, 64)
    views = draw_views(20, crop_scale_min=0.2, horizontal_flip=False, generator=torch.Generator().manual_seed(1))
    crops = augment(torch.cat([ramp, ramp.mT, ramp], 1).expand(20, -1, -1, -1), 32, views) * 255
    for crop, image in zip(views.crops(), crops):
        left, upper, right, lower = crop_box(*crop, 64, 64)
        middle = torch.tensor([(left + right) / 2, (upper + lower) / 2]) - 0.5
        torch.testing.assert_close(image[:2].mean((1, 2)), middle, rtol=0, atol=0.05)


def test_a_wide_image_is_cropped_within_its_edges():
    views = draw_views(500, crop_scale_min=0.9, horizontal_flip=False, generator=torch.Generator().manual_seed(1))
    for crop in views.crops():
        left, upper, right, lower = crop_box(*crop, 100, 30)
        assert 0 <= left < right <= 100 and 0 <= upper < lower <= 30


def test_streamed_images_as_a_whole(photos, streamed):
    preprocessing = Preprocessing(16, 18)
    parts = list(streamed().whole(range(1, 12, 2), preprocessing, 4))
    assert [len(labels) for _, labels in parts] == [4, 2]
    images, labels = torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
    for image, label, position in zip(images, labels.tolist(), range(1, 12, 2)):
        torch.testing.assert_close(image / 255, preprocessing(photos.read(position)))
        assert "abc"[label] == photos.wnids[position]


def test_split_of_streamed_images(streamed):
    rest, held = streamed().split(3, seed=0)
    assert len(rest.labels) == len(rest.positions) == 9 and sorted(held.labels.tolist()) == [0, 1, 2]
    assert sorted(rest.positions + held.positions) == list(range(12))
    for part in (rest, held):
        assert part.labels.tolist() == [streamed().labels[position].item() for position in part.positions]


def test_digest_of_streamed_images_sees_names_and_labels(photos, streamed):
    digest = streamed().sha256()
    assert digest == streamed(workers=3).sha256()
    assert digest != StreamedImages(photos, tuple(range(12)), torch.zeros(12, dtype=torch.long), 0).sha256()
    assert digest != streamed().split(3, seed=0)[0].sha256()


def test_streaming_leaves_the_global_generator_alone(streamed):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    list(streamed().batches(iter([batch_of([1, 2])])))
    torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)


def test_images_in_memory_come_as_they_are():
    images = torch.randint(0, 256, (10, 3, 16, 16), dtype=torch.uint8)
    data = TrainingSet(images, torch.arange(10))
    (taken,) = data.batches([batch_of([3, 9, 4])])
    assert torch.equal(taken, images[[3, 9, 4]])
    parts = list(data.whole(range(0, 10, 3), Preprocessing(16), 3))
    assert torch.equal(torch.cat([part for part, _ in parts]), images[::3])
    assert torch.cat([labels for _, labels in parts]).tolist() == [0, 3, 6, 9]
