"""Small images, and the containers they come in."""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

Pack = Callable[[Path, Mapping[str, bytes]], Path]


def _encode(seed: int = 0, size: tuple[int, int] = (8, 8), format: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format)
    return out.getvalue()


@pytest.fixture
def encode() -> Callable[..., bytes]:
    """encode(seed, size=(width, height), format) -> an encoded image of noise."""
    return _encode


@pytest.fixture
def pets() -> dict[str, bytes]:
    """Three cats and two dogs, by key."""
    names = ["cat/1.jpg", "cat/2.jpg", "cat/3.png", "dog/1.jpeg", "dog/2.JPEG"]
    return {name: _encode(seed, format="PNG" if name.endswith("png") else "JPEG") for seed, name in enumerate(names)}


def _pack_folder(path: Path, files: Mapping[str, bytes]) -> Path:
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def _pack_zip(path: Path, files: Mapping[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def _pack_tar(path: Path, files: Mapping[str, bytes]) -> Path:
    compression = path.suffix.removeprefix(".").replace("tar", "").replace("tgz", "gz")
    with tarfile.open(path, f"w:{compression}") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture
def pack() -> Pack:
    """A folder, zip or tar, compressed as the suffix of the path says."""

    def pack_by_suffix(path: Path, files: Mapping[str, bytes]) -> Path:
        if not path.suffix:
            return _pack_folder(path, files)
        return (_pack_zip if path.suffix == ".zip" else _pack_tar)(path, files)

    return pack_by_suffix


CONTAINERS = ["pets", "pets.zip", "pets.tar", "pets.tar.gz", "pets.tar.xz", "pets.tar.bz2", "pets.tgz"]


@pytest.fixture(params=CONTAINERS)
def container(request: pytest.FixtureRequest) -> str:
    """File name of each kind of container."""
    return request.param
