import pytest
import torch

from lrrobust.training import augmentation
from lrrobust.training.augmentation import augment, draw_views


def noise(count=4, size=16):
    return torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def run(images, size=16, seed=0, crop_scale_min=0.5, horizontal_flip=True):
    generator = torch.Generator().manual_seed(seed)
    views = draw_views(len(images), crop_scale_min=crop_scale_min, horizontal_flip=horizontal_flip, generator=generator)
    return augment(images, size, views)


@pytest.fixture
def square_crops(monkeypatch):
    monkeypatch.setattr(augmentation, "ASPECT_RATIOS", (1.0, 1.0))


@pytest.mark.parametrize("size", [8, 13, 16, 24])
def test_the_generator_decides_everything(size):
    images = noise()
    before = images.clone()
    first = run(images, size)
    assert first.shape == (4, 3, size, size) and first.dtype == torch.float32
    torch.testing.assert_close(run(images, size), first, rtol=0, atol=0)
    torch.testing.assert_close(images, before, rtol=0, atol=0)
    torch.manual_seed(99)
    torch.testing.assert_close(run(images, size), first, rtol=0, atol=0)
    assert not torch.allclose(run(images, size, seed=1), first)


@pytest.mark.parametrize("size", [8, 13, 16, 24])
@pytest.mark.parametrize("crop_scale_min", [0.05, 1.0])
def test_pixels_stay_in_range(size, crop_scale_min):
    extremes = (noise(64) > 127).to(torch.uint8) * 255
    crops = run(extremes, size, crop_scale_min=crop_scale_min)
    assert crops.min() >= 0 and crops.max() <= 1 + 1e-6
    assert crops.max() > 0.9 and crops.min() < 0.1


def test_each_image_gets_a_crop_of_its_own():
    same = noise(1).expand(6, -1, -1, -1)
    crops = run(same, horizontal_flip=False)
    distances = torch.cdist(crops.flatten(1), crops.flatten(1)) + 9 * torch.eye(6)
    assert distances.min() > 0.1


def test_whole_square_without_mirroring_is_the_image(square_crops):
    images = noise()
    torch.testing.assert_close(run(images, crop_scale_min=1.0, horizontal_flip=False), images / 255, rtol=0, atol=1e-5)


def test_whole_square_at_half_the_size_is_the_mean_of_pixels(square_crops):
    images = noise()
    small = run(images, 8, crop_scale_min=1.0, horizontal_flip=False)
    torch.testing.assert_close(small, torch.nn.functional.avg_pool2d(images / 255, 2), rtol=0, atol=1e-5)


def test_mirroring(square_crops):
    images = noise(64)
    out = run(images, crop_scale_min=1.0)
    exact = images / 255
    is_same = (out - exact).abs().amax((1, 2, 3)) < 1e-5
    is_mirrored = (out - exact.flip(3)).abs().amax((1, 2, 3)) < 1e-5
    assert (is_same ^ is_mirrored).all()
    # A fair coin leaves [16, 48] of 64 once in 30,000 times; this generator is fixed anyway.
    assert 16 <= is_mirrored.sum() <= 48


def test_crops_have_the_area_and_the_shape_asked_for():
    # A ramp tells where a crop lies: its values are the coordinates.
    ramp = (torch.arange(256, dtype=torch.uint8)).view(1, 1, 1, 256).expand(1, 1, 256, 256)
    images = torch.cat([ramp, ramp.mT, ramp], 1).expand(200, -1, -1, -1)
    crops = run(images, 32, crop_scale_min=0.3, horizontal_flip=False)
    left, right = crops[:, 0, 0, 0], crops[:, 0, 0, -1]
    top, bottom = crops[:, 1, 0, 0], crops[:, 1, -1, 0]
    # The outermost samples lie half an output pixel inside.
    width, height = (right - left) * 32 / 31, (bottom - top) * 32 / 31
    area, aspect = width * height, width / height
    assert area.min() > 0.3 * 0.8 and area.max() > 0.8
    assert area.mean() == pytest.approx(0.65, abs=0.05)
    assert aspect.min() > 3 / 4 * 0.97 and aspect.max() < 4 / 3 * 1.03
    assert aspect.min() < 0.8 and aspect.max() > 1.25
    # Nothing is taken from beyond the edge, where the ramp would turn back.
    assert crops[:, 0, 0].diff().min() > 0 and crops[:, 1, :, 0].diff().min() > 0
    # Inside the image, and from one edge to the other: 0 and 1 are a crop's outermost places.
    for start, extent in ((left - width / 64, width), (top - height / 64, height)):
        place = (start / (1 - extent))[extent < 0.8]
        assert place.min() > -0.05 and place.max() < 1.05
        assert place.min() < 0.05 and place.max() > 0.95


def test_images_stay_in_their_places():
    constant = torch.arange(0, 240, 20, dtype=torch.uint8).view(12, 1, 1, 1).expand(12, 3, 16, 16)
    crops = run(constant, 24, crop_scale_min=0.1)
    torch.testing.assert_close(crops, (constant[:, :, :1, :1] / 255).expand_as(crops), rtol=0, atol=1e-5)
