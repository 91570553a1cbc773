import numpy as np
import pytest
import torch
from PIL import Image

from lrrobust.data.preprocessing import Preprocessing
from lrrobust.errors import DataError
from lrrobust.torchvision_import import import_torchvision


def _noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("resize_size", [None, 64])
def test_right_size_is_bit_exact(resize_size):
    image = _noise(64, 64)
    tensor = Preprocessing(64, resize_size)(image)
    expected = torch.tensor(np.asarray(image).transpose(2, 0, 1).copy(), dtype=torch.float32) / 255
    assert (tensor.dtype, tensor.is_contiguous()) == (torch.float32, True)
    torch.testing.assert_close(tensor, expected, rtol=0, atol=0)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(64, 64), (75, 50), (50, 83), (301, 224), (31, 97), (24, 24), (32, 40)])
@pytest.mark.parametrize(("input_size", "resize_size"), [(24, None), (24, 32), (25, 32), (32, 32)])
def test_agrees_with_torchvision(size, input_size, resize_size, interpolation):
    import_torchvision()
    from torchvision.transforms import v2

    image = _noise(*size)
    tensor = Preprocessing(input_size, resize_size, interpolation)(image)
    resize = v2.Resize(resize_size or input_size, getattr(v2.InterpolationMode, interpolation.upper()))
    expected = v2.CenterCrop(input_size)(resize(image))
    assert tensor.shape == (3, input_size, input_size)
    np.testing.assert_array_equal(np.round(tensor.numpy() * 255).astype(np.uint8), np.asarray(expected).transpose(2, 0, 1))


def test_right_size_is_still_resized_where_the_recipe_asks_for_it():
    image = _noise(64, 64)
    assert not torch.equal(Preprocessing(64, 72)(image), Preprocessing(64)(image))


def test_shrinking_is_antialiased():
    stripes = np.zeros((64, 64, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    tensor = Preprocessing(8)(Image.fromarray(stripes))
    assert (tensor - 0.5).abs().max() < 0.05


def test_values_lie_in_the_box():
    tensor = Preprocessing(16, None, "bicubic")(_noise(5, 7))
    assert 0 <= tensor.min() and tensor.max() <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "input_size: expected 1 or more, got 0"),
        ((64, 32), "resize_size: expected at least self.input_size=64, got 32"),
        ((64, None, "nearest"), "expected one of bilinear, bicubic, got 'nearest'"),
    ],
)
def test_bad_values_are_refused(arguments, message):
    with pytest.raises(DataError, match=message):
        Preprocessing(*arguments)
