"""What a data set is to the rest of the program: encoded images in a fixed order, each with a class."""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Sequence

from PIL import Image, ImageFile

from lrrobust.errors import DataError

IMAGE_SUFFIXES = (".jpeg", ".jpg", ".png", ".webp", ".bmp")

#: More than any photo of ImageNet (61 million) and 192 MB decoded. A file of a few kilobytes can
#: claim any size, and decoding it would take all memory.
MAX_PIXELS = 64_000_000

#: An image one pixel wide would grow beyond all bounds when its shorter side is resized.
MAX_ASPECT_RATIO = 50

#: By content, not by name: ImageNet holds a PNG called .JPEG. The many other formats of Pillow stay
#: closed to files that nobody vouches for.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP")


class CorruptImageError(DataError):
    """An image is there, and its bytes are not those of a whole image."""


class ImageSource(ABC):
    """Ordered, random-access collection of encoded images.

    The key of an image is `<class>/<file name>` however the data set is packed, and images are
    sorted by key, so an index means the same image in a folder and in an archive of it. Reading is
    safe from several threads.

    Args:
        name: what a report calls the data set.
        keys: one unique key an image, ascending.
        wnids: class of each image.
        ignored_count: how many files were passed over because they are not labelled images.

    Raises:
        DataError: two images have the same key.
    """

    #: Whether several processes may read at once.
    is_fork_safe = False

    def __init__(self, name: str, keys: Sequence[str], wnids: Sequence[str], ignored_count: int = 0) -> None:
        for key, following in zip(keys, keys[1:]):
            if key == following:
                raise DataError(f"data set {name}: two images are called {key!r}; rename or remove one")
            if key > following:
                raise ValueError(f"keys must ascend, got {key!r} before {following!r}")
        self.name = name
        self.keys = tuple(keys)
        self.wnids = tuple(wnids)
        self.ignored_count = ignored_count

    def __len__(self) -> int:
        return len(self.keys)

    @abstractmethod
    def read_bytes(self, index: int) -> bytes:
        """The encoded image.

        Raises:
            CorruptImageError: the bytes are damaged, cut short, or too many.
            DataError: the file they lie in is gone or cannot be read.
        """

    def decode(self, index: int, encoded: bytes) -> Image.Image:
        """What `read_bytes(index)` gave, as an RGB image.

        Raises:
            CorruptImageError: these are not the bytes of a whole image within the size limit.
        """
        return decode_image(encoded, f"{self.name}: image {self.keys[index]!r}")

    def read(self, index: int) -> Image.Image:
        """The decoded RGB image; raises what `read_bytes` and `decode` do."""
        return self.decode(index, self.read_bytes(index))


def decode_image(encoded: bytes, where: str) -> Image.Image:
    """Decode a JPEG, PNG, WebP or BMP fully into 8-bit RGB.

    Grey, palette and CMYK images are converted, transparency is dropped, and an orientation tag is
    not obeyed: that is how the published accuracies of ImageNet classifiers were measured.

    Args:
        encoded: bytes of the file.
        where: names the image at the start of an error message.

    Raises:
        CorruptImageError: the bytes cannot be decoded to the end, or the image is too large.
    """
    try:
        image = Image.open(io.BytesIO(encoded), formats=_FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise Image.DecompressionBombError(f"{image.width}x{image.height}")
        if max(image.size) > MAX_ASPECT_RATIO * min(image.size):
            raise ValueError(f"{image.width}x{image.height} pixels, one side over {MAX_ASPECT_RATIO} times the other")
        # Which the file of a model may have asked Pillow for, and which would make grey of what is missing.
        ImageFile.LOAD_TRUNCATED_IMAGES = False
        image.load()
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise CorruptImageError(
            f"{where} has too many pixels ({error}); at most {MAX_PIXELS} are read: shrink or remove it"
        ) from error
    except Image.UnidentifiedImageError as error:
        raise CorruptImageError(
            f"{where} is no JPEG, PNG, WebP or BMP image ({len(encoded)} bytes); replace or remove it"
        ) from error
    except Exception as error:  # decoders raise whatever strikes them on damaged bytes, SyntaxError included
        raise CorruptImageError(f"{where} is damaged, cut short or no photo ({error}); replace or remove it") from error
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        # Pillow would clip these to white instead of scaling them.
        raise CorruptImageError(f"{where} has more than 8 bits a colour (mode {image.mode}); convert it to 8 bits")
    if "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")
