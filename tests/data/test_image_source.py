import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from lrrobust.data.image_source import CorruptImageError, ImageSource, decode_image


class _Source(ImageSource):
    def read_bytes(self, index):
        return b"no image"


def _save(image: Image.Image, format: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def _png_claiming(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("format", ["JPEG", "PNG", "BMP", "WEBP"])
def test_formats_decode_to_rgb(format):
    image = decode_image(_save(Image.new("RGB", (8, 8), (200, 30, 60)), format, quality=95), "it")
    assert (image.mode, image.size) == ("RGB", (8, 8))
    assert np.abs(np.asarray(image)[0, 0].astype(int) - (200, 30, 60)).max() <= 4


@pytest.mark.parametrize("format", ["PNG", "BMP"])
def test_lossless_formats_are_exact(encode, format):
    expected = np.random.default_rng(3).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    np.testing.assert_array_equal(np.asarray(decode_image(encode(3, format=format), "it")), expected)


@pytest.mark.parametrize(
    ("mode", "format", "expected"),
    [("L", "JPEG", (77,) * 3), ("LA", "PNG", (77,) * 3), ("1", "PNG", (255,) * 3), ("RGBA", "PNG", (9, 8, 7))],
)
def test_other_modes_become_rgb(mode, format, expected):
    colour = {"L": 77, "LA": (77, 0), "1": 1, "RGBA": (9, 8, 7, 0)}[mode]
    image = decode_image(_save(Image.new(mode, (8, 8), colour), format), "it")
    assert (image.mode, image.getpixel((0, 0))) == ("RGB", expected)


def test_cmyk_jpeg_becomes_rgb():
    image = decode_image(_save(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95), "it")
    red, green, blue = image.getpixel((4, 4))
    assert image.mode == "RGB" and red > 240 and green < 15 and blue < 15


def test_palette_with_transparency_keeps_its_colours_without_a_warning():
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    image = decode_image(_save(palette, "PNG", transparency=b"\x00\x80"), "it")
    assert (image.mode, image.getpixel((0, 0))) == ("RGB", (10, 20, 30))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "BMP", "WEBP"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_truncated_image_is_corrupt(encode, format, share):
    whole = encode(1, size=(64, 64), format=format)
    with pytest.raises(CorruptImageError, match=r"^pets: image 'cat/1' .*remove it"):
        decode_image(whole[: int(len(whole) * share)], "pets: image 'cat/1'")


def test_truncated_image_is_corrupt_whatever_pillow_was_told(encode, monkeypatch):
    # Many training scripts say so, and a user's model file may import one.
    monkeypatch.setattr("PIL.ImageFile.LOAD_TRUNCATED_IMAGES", True)
    whole = encode(1, size=(64, 64))
    with pytest.raises(CorruptImageError, match="cut short"):
        decode_image(whole[: len(whole) // 4], "it")


def test_damaged_png_is_corrupt(encode):
    whole = bytearray(encode(1, size=(64, 64), format="PNG"))
    whole[len(whole) // 2] ^= 0xFF
    with pytest.raises(CorruptImageError, match="damaged"):
        decode_image(bytes(whole), "it")


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"GIF89a" + b"\0" * 50])
def test_other_content_is_corrupt(content):
    with pytest.raises(CorruptImageError, match=r"is no JPEG, PNG, WebP or BMP image \(\d+ bytes\)"):
        decode_image(content, "it")


@pytest.mark.parametrize("side", [8_001, 10_000, 60_000])
def test_decompression_bomb_is_refused_before_decoding(side):
    with pytest.raises(CorruptImageError, match="too many pixels"):
        decode_image(_png_claiming(side, side), "it")


def test_image_of_extreme_shape_is_refused():
    decode_image(_save(Image.new("RGB", (50, 1)), "PNG"), "it")
    with pytest.raises(CorruptImageError, match="51x1 pixels"):
        decode_image(_save(Image.new("RGB", (51, 1)), "PNG"), "it")


def test_sixteen_bit_image_is_refused():
    image = Image.fromarray(np.full((8, 8), 40_000, dtype=np.uint16))
    with pytest.raises(CorruptImageError, match="more than 8 bits"):
        decode_image(_save(image, "PNG"), "it")


def test_error_names_the_data_set_and_the_key():
    with pytest.raises(CorruptImageError, match=r"^pets: image 'cat/2.jpg' is no JPEG"):
        _Source("pets", ["cat/1.jpg", "cat/2.jpg"], ["cat", "cat"]).read(1)


def test_keys_must_be_unique_and_ascend():
    with pytest.raises(Exception, match="two images are called 'a/1'"):
        _Source("pets", ["a/1", "a/1"], ["a", "a"])
    with pytest.raises(ValueError, match="ascend"):
        _Source("pets", ["b/1", "a/1"], ["b", "a"])
