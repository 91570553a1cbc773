import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from lrrobust.training.augmentation import augment, draw_views
from lrrobust.training.trivial_augment import (
    COLOUR_CHANGES,
    MAX_BLEND,
    MAX_SHIFT,
    MAX_TURN,
    OPERATIONS,
    WARPS,
    change_colours,
    draw_operations,
    warps,
)


@pytest.fixture
def photo():
    """uint8 (3, 24, 24): smooth, with every colour over another range."""
    y, x = torch.meshgrid(torch.linspace(0, 1, 24), torch.linspace(0, 1, 24), indexing="ij")
    noise = torch.rand(3, 24, 24, generator=torch.Generator().manual_seed(0))
    planes = torch.stack([40 + 150 * x, 90 + 100 * x * y, 20 + 60 * (1 - y)]) + 20 * noise
    return planes.to(torch.uint8)


def change(photo, name, strength):
    images = photo[None] / 255
    return change_colours(images.clone(), torch.tensor([OPERATIONS.index(name)]), torch.tensor([strength]))[0]


def with_pillow(photo, function):
    return torch.from_numpy(np.array(function(Image.fromarray(photo.permute(1, 2, 0).numpy())))).permute(2, 0, 1) / 255


ENHANCERS = {
    "brightness": ImageEnhance.Brightness,
    "colour": ImageEnhance.Color,
    "contrast": ImageEnhance.Contrast,
    "sharpness": ImageEnhance.Sharpness,
}


@pytest.mark.parametrize("name", ENHANCERS)
@pytest.mark.parametrize("strength", [-1.0, -0.4, 0.0, 0.5, 1.0])
def test_blends_are_pillows(photo, name, strength):
    expected = with_pillow(photo, lambda image: ENHANCERS[name](image).enhance(1 + MAX_BLEND * strength))
    changed = change(photo, name, strength)
    if name == "sharpness":  # Pillow leaves the edge as it is
        expected, changed = expected[:, 1:-1, 1:-1], changed[:, 1:-1, 1:-1]
    # Pillow rounds its grey and its result to whole levels.
    torch.testing.assert_close(changed, expected, rtol=0, atol=2.1 / 255)


@pytest.mark.parametrize("strength", [-1.0, -0.5, 0.0, 0.8])
def test_posterize_is_pillows(photo, strength):
    bits = 8 - round(6 * abs(strength))
    torch.testing.assert_close(change(photo, "posterize", strength), with_pillow(photo, lambda i: ImageOps.posterize(i, bits)))


def test_solarize_turns_the_bright(photo):
    expected = with_pillow(photo, lambda image: ImageOps.solarize(image, threshold=128))
    torch.testing.assert_close(change(photo, "solarize", 0.5), expected)
    torch.testing.assert_close(change(photo, "solarize", 1.0), 1 - photo / 255)
    torch.testing.assert_close(change(photo, "solarize", 0.0), photo / 255)


def test_autocontrast_is_pillows(photo):
    expected = with_pillow(photo, ImageOps.autocontrast)
    torch.testing.assert_close(change(photo, "autocontrast", 0.3), expected, rtol=0, atol=1.1 / 255)


def test_equalize_is_pillows(photo):
    torch.testing.assert_close(change(photo, "equalize", -0.3), with_pillow(photo, ImageOps.equalize))


@pytest.mark.parametrize("name", COLOUR_CHANGES)
def test_plain_images_stay_finite_and_in_range(name):
    plain = torch.stack([torch.full((3, 8, 8), value) for value in (0, 77, 255)]).to(torch.uint8) / 255
    changed = change_colours(plain.clone(), torch.full((3,), OPERATIONS.index(name)), torch.tensor([-1.0, 1.0, 0.5]))
    assert changed.isfinite().all() and changed.min() >= 0 and changed.max() <= 1
    if name in ("autocontrast", "equalize"):
        torch.testing.assert_close(changed, plain)


def test_each_image_gets_its_own_and_only_its_own(photo):
    images = (photo[None] / 255).repeat(len(OPERATIONS), 1, 1, 1)
    changed = change_colours(images.clone(), torch.arange(len(OPERATIONS)), torch.full((len(OPERATIONS),), 0.6))
    for place, name in enumerate(OPERATIONS):
        if name in COLOUR_CHANGES:
            torch.testing.assert_close(changed[place], change(photo, name, 0.6))
            assert not torch.allclose(changed[place], images[place], atol=0.01)
        else:
            torch.testing.assert_close(changed[place], images[place], rtol=0, atol=0)


def test_draws_are_uniform_and_reproducible():
    operation, strength = draw_operations(14_000, torch.Generator().manual_seed(0))
    assert operation.bincount(minlength=len(OPERATIONS)).min() > 850 and len(operation.unique()) == len(OPERATIONS) == 14
    assert strength.min() < -0.99 and strength.max() > 0.99 and abs(strength.mean().item()) < 0.02
    again = draw_operations(14_000, torch.Generator().manual_seed(0))
    torch.testing.assert_close(again, (operation, strength), rtol=0, atol=0)


# --- warps -------------------------------------------------------------------------------------------


def test_only_warps_move_pixels():
    for place, name in enumerate(OPERATIONS):
        matrix = warps(torch.tensor([place]), torch.tensor([0.5]))[0]
        assert torch.equal(matrix, torch.eye(3)) != (name in WARPS)


def test_warps_move_points_as_their_names_say():
    def source(name, strength, x, y):
        return (warps(torch.tensor([OPERATIONS.index(name)]), torch.tensor([strength]))[0] @ torch.tensor([x, y, 1.0]))[
            :2
        ].tolist()

    assert source("translate_x", 0.5, 0.0, 0.2) == pytest.approx([MAX_SHIFT, 0.2])
    assert source("translate_y", -1.0, 0.0, 0.0) == pytest.approx([0.0, -2 * MAX_SHIFT])
    assert source("rotate", torch.pi / 2 / MAX_TURN, 1.0, 0.0) == pytest.approx([0.0, 1.0], abs=1e-6)
    assert source("shear_x", 1.0, 0.0, 0.5) == pytest.approx([0.495, 0.5])
    assert source("shear_y", -1.0, 0.5, 0.0) == pytest.approx([0.5, -0.495])


def test_a_warp_is_sampled_together_with_the_crop(photo, monkeypatch):
    monkeypatch.setattr("lrrobust.training.augmentation.ASPECT_RATIOS", (1.0, 1.0))
    views = draw_views(
        1, crop_scale_min=1.0, horizontal_flip=False, generator=torch.Generator().manual_seed(0), trivial_augment=True
    )
    quarter = OPERATIONS.index("rotate"), torch.pi / 2 / MAX_TURN
    views.operation[0], views.strength[0] = quarter[0], quarter[1]
    turned = augment(photo[None], 24, views)[0]
    # Where the result's pixel (x, y) comes from is turned by 90 degrees: (-y, x).
    torch.testing.assert_close(turned, photo.rot90(1, (1, 2)) / 255, rtol=0, atol=1e-4)


def test_cropped_images_are_not_cropped_again(photo):
    views = draw_views(1, crop_scale_min=0.1, horizontal_flip=False, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(augment(photo[None], 24, views, are_cropped=True)[0], photo / 255, rtol=0, atol=1e-5)
    assert not torch.allclose(augment(photo[None], 24, views)[0], photo / 255, atol=0.05)
